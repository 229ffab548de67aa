"""Decodes image files once, and keeps the images in a cache: a file with checksums that is mapped into memory.

The cache is an .npy file of all images. The CRC-32 of every block follows the array, as little-endian uint32.
"""

import contextlib
import os
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

import errors
from readers import decoding, files, npy
from readers.decoding import Recipe
from readers.files import DataError


def read_cache(path: Path, num_images: int, size: tuple[int, int] | None = None, fit: bool = False) -> np.ndarray:
    """Returns the images of a cache, uint8 [N, H, W, 3], mapped. Reads the whole file once to compare checksums.

    Args:
        path: the cache.
        num_images: N.
        size: (H, W), or None if any size is right.
        fit: whether the images were resized and cropped. Blocks are then shorter.

    Raises:
        DataError: the file is missing or damaged, or holds something else.
    """
    height, width = _size_in(path) if size is None else size
    length = decoding.block_length(height, width, fit)
    images = npy.load(path, tail=4 * -(-num_images // length))
    expected = (num_images, height, width, 3)
    if images.shape != expected or images.dtype != np.uint8 or not images.flags.c_contiguous:
        raise DataError(f'{path} holds other images')
    with files.opened(path) as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        end = images.offset + images.nbytes
        sizes = [images[start : start + length].nbytes for start in range(0, num_images, length)]
        starts = images.offset + np.cumsum([0, *sizes[:-1]])
        # pread, because mapped pages count as memory of this process
        found = pool.map(lambda size, start: zlib.crc32(os.pread(file.fileno(), size, start)), sizes, starts)
        if np.array(list(found), '<u4').tobytes() != os.pread(file.fileno(), 4 * len(sizes), end):
            raise DataError(files.damaged(path, 'its pixels have changed'))
    return images


def _size_in(path):
    """Returns the height and the width in the header of a cache."""
    with files.opened(path) as file, files.one_error(path):
        np.lib.format.read_magic(file)
        (_, height, width, _), _, _ = np.lib.format.read_array_header_1_0(file)
        if height < 1 or width < 1:
            raise ValueError('its images have no pixels')
    return height, width


def decode(recipe: Recipe, paths: Sequence[str], cache: Path | None) -> np.ndarray:
    """Decodes N image files on all cores, writes them to a cache, and returns them mapped, uint8 [N, H, W, 3].

    If the cache cannot be written, prints a line and returns the images in memory.

    Args:
        recipe: how files become images.
        paths: the image files.
        cache: the path of the cache, NAME-FINGERPRINT.npy, where the fingerprint has 16 hexadecimal digits. Caches of
            the same name with another fingerprint are deleted. None keeps the images in memory.

    Raises:
        DataError: a file is damaged or unsuitable, or a decoding process died.
    """
    with data_errors():
        images = _through_cache(recipe, paths, cache) if cache else None
        return _in_memory(recipe, paths) if images is None else images


@contextlib.contextmanager
def data_errors() -> Iterator[None]:
    """Turns what decoding raises into DataErrors."""
    try:
        yield
    except decoding.UnsuitableError as error:
        raise DataError(' '.join(error.args)) from error
    except decoding.DamagedError as error:
        raise DataError(files.damaged(*error.args)) from error
    except BrokenExecutor as error:
        raise DataError('a process that decodes images died, perhaps for lack of memory: start again') from error


def say_unwritten(cache: Path, reason: str) -> None:
    """Prints why a cache could not be written."""
    print(f'{cache} could not be written ({reason}): images are decoded at every start', file=sys.stderr)


def _through_cache(recipe, paths, cache):
    """Returns the images mapped from the cache, or None if it cannot be written."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with errors.replacing(cache) as unfinished:
            _write(recipe, paths, unfinished)
            # mapped before it has its name, because another process may then delete it
            images = read_cache(unfinished, len(paths), (recipe.height, recipe.width), recipe.fit)
    except OSError as error:
        return say_unwritten(cache, errors.reason(error))
    _remove_older(cache)
    return images


def _write(recipe, paths, unfinished):
    checksums = []
    with open(unfinished, 'wb') as file, contextlib.closing(_blocks(recipe, paths)) as blocks:
        header = {'descr': '|u1', 'fortran_order': False, 'shape': (len(paths), recipe.height, recipe.width, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        for block, checksum in blocks:
            file.write(block)
            checksums.append(checksum)
        file.write(np.array(checksums, '<u4').tobytes())


def _remove_older(cache):
    name = re.escape(cache.name.rpartition('-')[0])
    with contextlib.suppress(OSError):
        for other in cache.parent.iterdir():
            if re.fullmatch(rf'{name}-[0-9a-f]{{16}}\.npy', other.name) and other != cache:
                other.unlink()


def _in_memory(recipe, paths):
    images, end = np.empty((len(paths), recipe.height, recipe.width, 3), np.uint8), 0
    for block, _ in _blocks(recipe, paths):
        images[end : end + len(block)] = block
        end += len(block)
    return images


def _blocks(recipe: Recipe, paths: Sequence[str]) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (images, CRC-32) of each block, in order, with a progress bar."""
    progress = tqdm(None, 'decoding', len(paths), unit=' images', disable=None)
    with progress, contextlib.closing(decoding.decoded_blocks(recipe, paths)) as blocks:
        for block, checksum in blocks:
            yield block, checksum
            progress.update(len(block))
