"""Reads NumPy's .npy and .npz files: plain arrays of numbers or text, of exactly the size that the header claims."""

import io
import math
import os
import re
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
        dtype, order, shape = _parse_header(file, num_bytes, path)
        if not math.prod(shape):
            return np.empty(shape, dtype, order)
        return np.memmap(file, dtype, 'r', file.tell(), shape, order)


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of an .npz file by name. Raises DataError."""
    arrays = {}
    with files.opened_zip(path) as members:
        for member in members.infolist():
            name, where = member.filename.removesuffix('.npy'), f'{path}: {member.filename}'
            if name in arrays or name == member.filename:
                raise DataError(f'{where} is not an .npy file, or occurs twice')
            payload = members.read(member)
            file = io.BytesIO(payload)
            dtype, order, shape = _parse_header(file, len(payload), where)
            arrays[name] = np.frombuffer(bytearray(payload), dtype, math.prod(shape), file.tell()).reshape(
                shape, order=order
            )
    return arrays


def _parse_header(file: BinaryIO, num_bytes: int, where: object) -> tuple[np.dtype, str, tuple[int, ...]]:
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
