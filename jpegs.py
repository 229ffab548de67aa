"""JPEGs to arrays: a file of its own for the processes that decode, which would import JAX with data.py for seconds."""

import multiprocessing
import os
import signal
import threading
import warnings

import numpy as np
from PIL import Image


class DamagedError(Exception):
    """A file that is no JPEG of the size that is wanted; its arguments are the path and the reason, of one line."""


def decode(shape, paths):
    """Image files as one array uint8 [N, *shape], grey ones as RGB. Raises DamagedError.

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
            except (OSError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
                raise DamagedError(path, str(error)) from error
    return np.asarray(tall).reshape(-1, *shape)


def decode_into(path, shape, paths, offset):
    """Decodes image files into a file that exists, from byte `offset` on. Raises OSError where it cannot grow."""
    images = decode(shape, paths)
    with open(path, 'r+b') as file:
        file.seek(offset)
        file.write(images)


def end_with_parent():
    """In a process that decodes: Ctrl-C is the main one's business, and its end, even by SIGKILL, is this one's too."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait, daemon=True).start()
