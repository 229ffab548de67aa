"""Decodes JPEGs to arrays. The decoding processes import only this module, and neither JAX nor the main script."""

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

import numpy as np
from PIL import Image


class DamagedError(Exception):
    """A file is not a JPEG of the expected size. The arguments are the path and the reason, in one line."""


BLOCK = 500  # images that one task decodes


def decode(shape: tuple[int, int, int], paths: Sequence[str]) -> np.ndarray:
    """Returns the N image files as one array, uint8 [N, *shape]. Grey images become RGB. Raises DamagedError.

    Pastes all images into one tall image, because one conversion to an array is faster than N.
    """
    height, width, _ = shape
    tall = Image.new('RGB', (width, len(paths) * height))
    with warnings.catch_warnings():
        warnings.simplefilter('error', Image.DecompressionBombWarning)
        for i, path in enumerate(paths):
            try:
                with Image.open(path, formats=('JPEG',)) as image:
                    if image.size != (width, height):
                        raise ValueError(f'{image.size[0]}×{image.size[1]} pixels instead of {width}×{height}')
                    tall.paste(image, (0, i * height))
            except Exception as error:  # Pillow raises many kinds for damaged files
                raise DamagedError(path, str(error)) from error
    return np.asarray(tall).reshape(-1, *shape)


def decode_with_checksum(shape: tuple[int, int, int], paths: Sequence[str]) -> tuple[np.ndarray, int]:
    """Returns the N image files as one array, uint8 [N, *shape], and the array's CRC-32. Raises DamagedError."""
    images = decode(shape, paths)
    return images, zlib.crc32(images)


def decoded_blocks(shape: tuple[int, int, int], paths: Sequence[str]) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (images, CRC-32) of each block of up to BLOCK images, in order. Decodes on all cores, a few blocks ahead.

    Raises a DamagedError, or a BrokenExecutor if a decoding process dies.
    """
    blocks = [paths[start : start + BLOCK] for start in range(0, len(paths), BLOCK)]
    pending = deque()
    with decoders(len(blocks)) as pool:
        try:
            for block in blocks:
                pending.append(submit(pool, decode_with_checksum, shape, block))
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
