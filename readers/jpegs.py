"""JPEGs to arrays. Processes that decode import this module alone, and neither JAX nor the main script."""

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
    """A file that is no JPEG of the size that is wanted. Its arguments are the path and the reason, in one line."""


BLOCK = 500  # images that are decoded at once


def decode(shape: tuple[int, int, int], paths: Sequence[str]) -> np.ndarray:
    """Returns image files as one array uint8 [N, *shape], grey ones as RGB. Raises DamagedError.

    They are pasted into one tall image, which is converted once: each on its own would take longer.
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
    """Returns image files as one array uint8 [N, *shape], and the CRC-32 of the array. Raises DamagedError."""
    images = decode(shape, paths)
    return images, zlib.crc32(images)


def decoded_blocks(shape: tuple[int, int, int], paths: Sequence[str]) -> Iterator[tuple[np.ndarray, int]]:
    """Yields blocks of images, in order, with their checksums. Decodes on all cores, a few blocks ahead.

    Raises DamagedError, and BrokenExecutor if a process that decodes ends.
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
    """Returns a pool of processes, as Pillow leaves its threads little to do at once; or a thread for a few blocks."""
    if num_blocks <= 2:
        return ThreadPoolExecutor(1)
    context = multiprocessing.get_context('spawn')
    return ProcessPoolExecutor(min(num_blocks, os.cpu_count()), context, _end_with_parent)


def submit(pool: Executor, function: Callable, *arguments: object) -> Future:
    """Submits a call to a pool, which may start a process for it, and returns the call's future.

    A spawned process imports the main script again, unless __main__ has no file. A script without a guard would run.
    """
    main = sys.modules['__main__']
    sys.modules['__main__'] = types.ModuleType('__main__')
    try:
        return pool.submit(function, *arguments)
    finally:
        sys.modules['__main__'] = main


def _end_with_parent():
    """In a process that decodes: Ctrl-C is the main one's business, and its end, even by SIGKILL, is this one's too."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait, daemon=True).start()
