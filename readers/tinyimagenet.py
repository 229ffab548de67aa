"""Reads TinyImageNet: 200 folders of 64×64 JPEGs. Decodes them once, and writes a cache with checksums."""

import contextlib
import hashlib
import os
import re
import shlex
import sys
import zlib
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

import errors
from readers import files, jpegs, npy
from readers.files import DataError, OfficialFile

OFFICIAL = OfficialFile(
    'http://cs231n.stanford.edu/tiny-imagenet-200.zip',
    '6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821',
    248_100_043,
)
SHAPE = (64, 64, 3)


def read(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images, uint8 [N, 64, 64, 3], mapped from the cache, and the labels, int32 [N], of a split.

    setup_tinyimagenet.py must have run before. The split 'test' is the validation set. Raises DataError.
    """
    root = folder / 'tiny-imagenet-200'
    split_folder = root / {'train': 'train', 'test': 'val'}[split]
    if not all(path.is_dir() for path in (split_folder, root / 'train')) or (root / 'val' / 'images').exists():
        setup = f'python setup_tinyimagenet.py --datasetfolder {shlex.quote(str(folder))}'
        raise DataError(f'{split_folder} is missing or not set up: run {setup}')
    classes = sorted(entry.name for entry in os.scandir(root / 'train') if entry.is_dir() and entry.name[0] == 'n')
    paths, labels, fingerprint = _list_image_folders(split_folder, classes)
    if len(classes) != 200 or len(set(labels)) != 200:
        raise DataError(
            f'{split_folder} holds images of {len(set(labels))} classes, and {root / "train"} has {len(classes)} '
            'class folders: both must be 200'
        )
    cache = root / f'{split}-{fingerprint}.npy'
    with contextlib.suppress(DataError):  # no cache, or a damaged one
        return _read_cache(cache, len(paths)), labels
    try:
        return _decode(paths, cache), labels
    except jpegs.DamagedError as error:
        raise DataError(files.damaged(*error.args)) from error
    except BrokenExecutor as error:
        raise DataError('a process that decodes images died, perhaps for lack of memory: start again') from error


def _list_image_folders(folder, classes):
    """Lists the JPEGs in each class folder.

    Returns:
        Their paths, their labels int32 [N], which are indices into `classes`, and a fingerprint. The fingerprint is a
        hash of file names and sizes, and so changes when the images change.
    """
    paths, labels, fingerprint = [], [], hashlib.sha256()
    for label, name in enumerate(classes):
        inner = folder / name / 'images'
        if not (folder / name).is_dir():
            raise DataError(f'{folder / name} is missing: delete {folder.parent} and run setup_tinyimagenet.py again')
        entries = os.scandir(inner if inner.is_dir() else folder / name)
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.endswith('.JPEG') and not files.is_litter(entry.name):
                if not entry.is_file():
                    raise DataError(f'{entry.path} is not a regular file')
                paths.append(entry.path)
                labels.append(label)
                fingerprint.update(f'{name}/{entry.name} {entry.stat().st_size}\n'.encode(errors='surrogateescape'))
    return paths, np.array(labels, np.int32), fingerprint.hexdigest()[:16]


# The cache is an .npy file of all images. The CRC-32 of every block follows the array, as little-endian uint32.


def _read_cache(path: Path, num_images: int) -> np.ndarray:
    """Returns the images of a cache, mapped. Reads the whole file once to compare checksums. Raises DataError."""
    images = npy.load(path, tail=4 * -(-num_images // jpegs.BLOCK))
    if images.shape != (num_images, *SHAPE) or images.dtype != np.uint8 or not images.flags.c_contiguous:
        raise DataError(f'{path} holds other images')
    with files.opened(path) as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        end = images.offset + images.nbytes
        sizes = [images[start : start + jpegs.BLOCK].nbytes for start in range(0, num_images, jpegs.BLOCK)]
        starts = images.offset + np.cumsum([0, *sizes[:-1]])
        # pread, because mapped pages count as memory of this process
        found = pool.map(lambda size, start: zlib.crc32(os.pread(file.fileno(), size, start)), sizes, starts)
        if np.array(list(found), '<u4').tobytes() != os.pread(file.fileno(), 4 * len(sizes), end):
            raise DataError(files.damaged(path, 'its pixels have changed'))
    return images


def _decode(paths, cache):
    """Decodes image files, writes them to `cache`, and returns them mapped from there, uint8 [N, 64, 64, 3].

    If the cache cannot be written, prints a line and returns the images in memory. Raises jpegs.DamagedError or
    BrokenExecutor.
    """
    try:
        _write_cache(paths, cache)
        return _read_cache(cache, len(paths))
    except OSError as error:
        print(f'{cache} could not be written ({error.strerror}): images are decoded at every start', file=sys.stderr)
    images, end = np.empty((len(paths), *SHAPE), np.uint8), 0
    for block, _ in _decoded_blocks(paths):
        images[end : end + len(block)] = block
        end += len(block)
    return images


def _write_cache(paths, cache):
    checksums = []
    with errors.replacing(cache) as unfinished, open(unfinished, 'wb') as file:
        header = {'descr': '|u1', 'fortran_order': False, 'shape': (len(paths), *SHAPE)}
        np.lib.format.write_array_header_1_0(file, header)
        with contextlib.closing(_decoded_blocks(paths)) as blocks:
            for block, checksum in blocks:
                file.write(block)
                checksums.append(checksum)
        file.write(np.array(checksums, '<u4').tobytes())
    split = cache.name.split('-')[0]
    for stale in cache.parent.iterdir():
        if re.fullmatch(rf'{split}-[0-9a-f]{{16}}\.npy', stale.name) and stale != cache:
            with contextlib.suppress(OSError):
                stale.unlink()


def _decoded_blocks(paths):
    progress = tqdm(None, 'decoding', len(paths), unit=' images', disable=None)
    with progress, contextlib.closing(jpegs.decoded_blocks(SHAPE, paths)) as blocks:
        for block, checksum in blocks:
            yield block, checksum
            progress.update(len(block))
