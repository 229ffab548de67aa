"""Decodes image files to arrays.

The decoding processes import only this module, and neither JAX nor the main script.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import types
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401

# Pillow's other plugins are rarely used and tested. It imports them all if one of these is missing.
FORMATS = ('JPEG', 'PNG', 'BMP', 'GIF', 'TIFF', 'WEBP', 'PPM')
Image.preinit()  # TIFF and WEBP are imported above
logging.getLogger('PIL').addHandler(logging.NullHandler())  # damaged files would print lines


class DamagedError(Exception):
    """A file cannot become an image. The arguments are the path and the reason, in one line."""


class UnsuitableError(DamagedError):
    """A file is not damaged, but cannot become an image. The reason continues a sentence that begins with the path."""


class Recipe(NamedTuple):
    """Describes how image files become RGB images of one size.

    Attributes:
        height, width: the size of the images, in pixels.
        formats: names from FORMATS. Suffixes of files do not matter.
        fit: whether to resize and crop images of other sizes. Otherwise they are refused.
        reference: a file of this size, for the message about another size.
    """

    height: int
    width: int
    formats: tuple[str, ...] = FORMATS
    fit: bool = False
    reference: str | None = None


# Images.


def size_of(path: str) -> tuple[int, int]:
    """Returns the width and the height of an upright image. Raises DamagedError."""
    with _warnings():
        try:
            with Image.open(path, formats=FORMATS) as image:
                return _upright(image).size
        except Exception as error:
            raise _explained(error, path, FORMATS) from error


def decode(recipe: Recipe, paths: Sequence[str]) -> np.ndarray:
    """Returns the N image files as one array, uint8 [N, H, W, 3]. Raises DamagedError.

    - Grey levels become three equal channels. 16-bit grey levels are rounded to 8 bits.
    - Transparency is dropped, as Image.convert('RGB') does. The hidden colours of transparent pixels then show.
    - Images are turned upright, as the EXIF orientation says.
    - The first picture of an MPO file is the photograph, and the others are previews. Other files must hold one image.
    - With `recipe.fit`, the shorter side is resized with antialiasing, and the centre is cropped.

    Large JPEGs are decoded at full size, because images then equal those of other programs. Image.draft would be 4 to 8
    times as fast for 12 megapixels, but would change pixels by up to 20 of 255 levels.
    """
    height, width = recipe.height, recipe.width
    tall = Image.new('RGB', (width, len(paths) * height))  # one conversion to an array is faster than N
    with _warnings():
        for i, path in enumerate(paths):
            try:
                with Image.open(path, formats=recipe.formats) as image:
                    tall.paste(_fitted(image, recipe), (0, i * height, width, (i + 1) * height))
            except Exception as error:  # Pillow raises many kinds for damaged files
                raise _explained(error, path, recipe.formats) from error
    return np.asarray(tall).reshape(-1, height, width, 3)


@contextlib.contextmanager
def _warnings():
    """Turns the warning about huge images into an error, and ignores others, such as of damaged metadata."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        warnings.simplefilter('error', Image.DecompressionBombWarning)
        yield


def _explained(error, path, formats):
    """Returns what was raised while a file was decoded as a DamagedError."""
    if isinstance(error, UnsuitableError):
        return UnsuitableError(path, *error.args)
    if getattr(error, 'errno', None):
        return UnsuitableError(path, f'cannot be read: {error.strerror}')
    if isinstance(error, UnidentifiedImageError):
        return DamagedError(path, f'it does not start like {" or ".join(formats)}')
    return DamagedError(path, str(error) or type(error).__name__)


def _fitted(image, recipe):
    """Returns an opened image as RGB, upright, in the size of the recipe."""
    size = recipe.width, recipe.height
    if recipe.fit:
        return ImageOps.fit(_upright(image), size, Image.Resampling.BILINEAR)
    if image.size != size[::-1]:  # which a turn could make right
        _require_size(image, recipe)  # before the pixels are decoded
    image = _upright(image)
    _require_size(image, recipe)
    return image


def _require_size(image, recipe):
    if image.size != (recipe.width, recipe.height):
        found, expected = f'{image.width}×{image.height} pixels', f'{recipe.width}×{recipe.height}'
        if recipe.reference is None:
            raise ValueError(f'{found} instead of {expected}')
        raise UnsuitableError(f'has {found}, and {recipe.reference} has {expected}: add --imagesize N')


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image):
    """Returns an opened image as RGB, turned as its EXIF orientation says. Pillow itself turns TIFF files."""
    rgb = _rgb(image)
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged metadata, which other programs ignore, too
        turn = None
    return rgb if turn is None else rgb.transpose(turn)


def _rgb(image):
    if getattr(image, 'is_animated', False) and image.format != 'MPO':
        raise UnsuitableError('has several frames or pages: save one of them as an image of its own')
    is_16_bit = _is_16_bit_grey(image)
    if not is_16_bit and image.mode not in ('RGB', 'L', '1', 'LA', 'P', 'PA', 'RGBA', 'RGBX', 'CMYK', 'YCbCr'):
        raise UnsuitableError(f"has pixels of Pillow's mode {image.mode}: save it as RGB with 8 bits per channel")
    image.load()
    if is_16_bit:
        levels = (np.asarray(image).astype(np.int32) + 128) // 257  # Pillow would clip them to 255
        image = Image.fromarray(levels.astype(np.uint8))
    return image if image.mode == 'RGB' else image.convert('RGB')


def _is_16_bit_grey(image):
    """Returns whether the pixels of an opened image are grey levels from 0, which is black, to 65,535."""
    if image.format == 'TIFF':
        bits, black = (
            image.tag_v2.get(tag) for tag in (TiffImagePlugin.BITSPERSAMPLE, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION)
        )
        return image.mode.startswith('I;16') and bits == (16,) and black == 1
    return image.mode.startswith('I;16') or (image.format == 'PPM' and image.mode == 'I')


# Many images, in blocks.

BLOCK = 500  # the most images in a block
_BYTES = 1 << 24  # the most bytes in a block


def block_length(height: int, width: int, fit: bool) -> int:
    """Returns the number of images in a block, which one task decodes.

    Images that are resized may be large photographs, so their blocks are shorter. Then all cores have work.
    """
    return max(1, min(BLOCK // 10 if fit else BLOCK, _BYTES // (height * width * 3)))


def decode_with_checksum(recipe: Recipe, paths: Sequence[str]) -> tuple[np.ndarray, int]:
    """Returns the N image files as one array, uint8 [N, H, W, 3], and the array's CRC-32. Raises DamagedError."""
    images = decode(recipe, paths)
    return images, zlib.crc32(images)


def decoded_blocks(recipe: Recipe, paths: Sequence[str]) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (images, CRC-32) of each block of images, in order. Decodes on all cores, a few blocks ahead.

    Raises a DamagedError, or a BrokenExecutor if a decoding process dies.
    """
    length = block_length(recipe.height, recipe.width, recipe.fit)
    blocks = [paths[start : start + length] for start in range(0, len(paths), length)]
    pending = deque()
    with decoders(len(blocks)) as pool:
        try:
            for block in blocks:
                pending.append(submit(pool, decode_with_checksum, recipe, block))
                if len(pending) > 2 * os.cpu_count():
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def decoders(num_blocks: int) -> Executor:
    """Returns a pool of processes to decode N blocks, or a pool of one thread if N <= 2.

    Pillow hardly decodes in parallel in several threads of a process.
    """
    if num_blocks <= 2:
        return ThreadPoolExecutor(1)
    context = multiprocessing.get_context('spawn')
    return ProcessPoolExecutor(min(num_blocks, os.cpu_count()), context, _end_with_parent)


def submit(pool: Executor, function: Callable, *arguments: object) -> Future:
    """Submits a call to a pool, which may start a process for it. Returns the call's future.

    A spawned process imports the main script again, and a script without an `if __name__ == '__main__'` guard would
    run twice. An empty `__main__` without a file prevents the import.
    """
    main = sys.modules['__main__']
    sys.modules['__main__'] = types.ModuleType('__main__')
    try:
        return pool.submit(function, *arguments)
    finally:
        sys.modules['__main__'] = main


def _end_with_parent():
    """Makes a decoding process ignore Ctrl-C, and end when the main process ends, even by SIGKILL."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait, daemon=True).start()
