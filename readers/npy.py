"""Reads NumPy's .npy and .npz files: plain arrays of numbers or text, of exactly the size that the header claims."""

import math
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

import numpy as np

from readers import files
from readers.files import DataError

_HEADER = re.compile(
    r"\{'descr': '([<>|]?[biufU][1-9]\d{0,5})', 'fortran_order': (True|False), 'shape': \(([\dL, ]*)\),? *\} *\n"
)
_LONGEST_HEADER = 10_000  # bytes, as in NumPy


def load(path: Path, tail: int = 0) -> np.ndarray:
    """Returns the array of an .npy file, mapped into memory read-only. Raises DataError.

    Args:
        path: the file.
        tail: number of bytes after the array.
    """
    with files.opened(path) as file, files.one_error(path):
        num_bytes = os.fstat(file.fileno()).st_size - tail
        dtype, order, shape = parse_header(file, num_bytes, path)
        if not math.prod(shape):
            return np.empty(shape, dtype, order)
        return np.memmap(file, dtype, 'r', file.tell(), shape, order)


def load_npz(path: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Returns the arrays of an .npz file by name. Raises DataError.

    Args:
        path: the file.
        names: the names of the arrays to read, None for all. Other members of the file are not read.
    """
    arrays = {}
    with files.opened_zip(path) as members:
        for member in members.infolist():
            name, where = member.filename.removesuffix('.npy'), f'{path}: {member.filename}'
            if names is not None and name not in names:
                continue
            if name in arrays or name == member.filename:
                raise DataError(f'{where} is not an .npy file, or occurs twice')
            with members.open(member) as file:
                dtype, order, shape = parse_header(file, member.file_size, where)
                arrays[name] = np.empty(shape, dtype, order)
                _fill(arrays[name], file)
    return arrays


_CHUNK = 1 << 20


def _fill(array, file):
    """Reads the values of an array from the rest of a file. Raises EOFError if the file ends too early."""
    target, start = array.reshape(-1, order='A').view(np.uint8), 0
    while payload := file.read(_CHUNK):
        target[start : start + len(payload)] = np.frombuffer(payload, np.uint8)
        start += len(payload)
    if start < len(target):
        raise EOFError('it ends too early')


def parse_header(file: BinaryIO, num_bytes: int, where: object) -> tuple[np.dtype, str, tuple[int, ...]]:
    """Reads the header of an .npy file, and leaves the file at the first byte of the array.

    Args:
        file: the file, at its beginning.
        num_bytes: the size of header and array.
        where: the file, for the message.

    Returns:
        The array's dtype, order ('C' or 'F') and shape.

    Raises:
        DataError: the header is damaged, or does not match the size.
    """
    magic = file.read(8)
    width = {1: 2, 2: 4, 3: 4}.get(magic[6] if len(magic) == 8 and magic[:6] == b'\x93NUMPY' else 0, 0)
    length = int.from_bytes(file.read(width), 'little')
    found = _HEADER.fullmatch(file.read(min(length, _LONGEST_HEADER)).decode('latin-1'))
    if not found:
        raise DataError(f'{where} is not an .npy file of numbers or text')
    shape = tuple(int(n.strip().removesuffix('L')) for n in found[3].split(',') if n.strip())
    dtype = np.dtype(found[1])
    claimed, held = math.prod(shape) * dtype.itemsize, num_bytes - file.tell()
    if claimed != held:
        raise DataError(f'{where} is damaged: its header claims {claimed} bytes, but {held} follow')
    return dtype, 'F' if found[2] == 'True' else 'C', shape
