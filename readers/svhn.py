"""Reads the cropped digits of SVHN (Netzer et al., 2011) from MATLAB files of version 5."""

import math
import os
import zlib
from pathlib import Path

import numpy as np

from readers import files
from readers.files import DataError, OfficialFile

_URL = 'http://ufldl.stanford.edu/housenumbers/'
OFFICIAL = {
    'train': OfficialFile(
        f'{_URL}train_32x32.mat', '435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8', 182_040_794
    ),
    'extra': OfficialFile(
        f'{_URL}extra_32x32.mat', 'a133a4beb38a00fcdda90c9489e0c04f900b660ce8a316a5e854838379a71eb3', 1_329_278_602
    ),
    'test': OfficialFile(
        f'{_URL}test_32x32.mat', 'cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b', 64_275_384
    ),
}
CLASS_NAMES = tuple('0123456789')


def read(folder: Path, split: str, extra: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images, uint8 [N, 32, 32, 3], and the labels, int32 [N], of a split. Downloads missing files.

    Args:
        folder: the folder of the data sets.
        split: 'train' or 'test'.
        extra: whether the split 'train' also has the 531,131 images of the split 'extra', after its own.

    Raises:
        DataError: a file is damaged, or a download failed.
    """
    parts, labels = [], []
    for name in ('train', 'extra') if extra and split == 'train' else (split,):
        labels.append(_read_file(folder, name, parts))
    return files.joined(parts), np.concatenate(labels)


def _read_file(folder, split, images):
    """Returns the labels of a file, int32 [N]. Appends the images to the list `images` in parts, uint8 [n, 32, 32, 3].

    In the file, the label 10 is the digit 0.
    """
    name = f'{split}_32x32.mat'
    found = [path for path in (folder / 'svhn' / name, folder / name) if path.exists()]
    path = found[0] if found else folder / 'svhn' / name
    if not found:
        files.download(OFFICIAL[split], path)
    content = read_mat(path, ('X', 'y'), OFFICIAL[split])
    pixels, labels = content['X'], np.concatenate(content['y'], axis=-1)
    dtype, shape = pixels[0].dtype, (*pixels[0].shape[:-1], sum(part.shape[-1] for part in pixels))
    if dtype != np.uint8 or len(shape) != 4 or shape[:3] != (32, 32, 3):
        raise DataError(f'{path}: X is {dtype} {shape}, not uint8 [32, 32, 3, N]')
    if labels.dtype.kind not in 'iu' or labels.size != shape[3] or max(labels.shape) != labels.size:
        raise DataError(f'{path}: y is {labels.dtype} {labels.shape}, not whole numbers [{shape[3]}, 1]')
    labels = files.checked_labels(labels.ravel(), 11, path) % 10
    while pixels:  # frees each part once it is copied
        images.append(np.ascontiguousarray(pixels.pop(0).transpose(3, 0, 1, 2)))
    return labels


_TYPES = {1: 'i1', 2: 'u1', 3: 'i2', 4: 'u2', 5: 'i4', 6: 'u4', 7: 'f4', 9: 'f8', 12: 'i8', 13: 'u8'}
_MATRIX, _COMPRESSED = 14, 15
_NUMERIC_CLASSES = range(6, 16)  # MATLAB's classes of arrays from double to uint64
_COMPLEX = 0x08  # the flag of an array of complex numbers
_PART = 1 << 26  # numbers in a part of an array


def read_mat(path: Path, names: tuple[str, ...], official: OfficialFile | None = None) -> dict[str, list[np.ndarray]]:
    """Returns the named arrays of a MATLAB file in parts along the last axis, {name: parts}. Skips all others.

    Args:
        path: the file.
        names: the names of the arrays.
        official: the official file, for messages.

    Raises:
        DataError: the file is damaged, or a named array is missing, sparse, complex or not numeric.
    """
    with files.opened(path) as file, files.one_error(path, official):
        limit = files.budget(os.fstat(file.fileno()).st_size)
        header = file.read(128)
        order = {b'IM': '<', b'MI': '>'}.get(header[126:])
        if order is None:
            raise ValueError('it does not start like a MATLAB file of version 5')
        arrays = {}
        while (tag := file.read(8)) and len(arrays) < len(names):
            kind, num_bytes = np.frombuffer(tag, f'{order}u4').tolist()
            end = file.tell() + num_bytes
            if is_compressed := kind == _COMPRESSED:
                stream = files.Limited(_Inflated(file, num_bytes), limit, path)
                kind, _ = np.frombuffer(stream.read_exactly(8), f'{order}u4').tolist()
            else:
                stream = files.Limited(file, min(num_bytes, limit), path)
            if kind == _MATRIX:
                name, parts = _parse_matrix(stream, order, names)
                limit -= sum(part.nbytes for part in parts)
                arrays |= {name: parts} if name in names else {}
            if is_compressed:
                stream.skip_rest()
            file.seek(end)
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ValueError(f'it holds no {missing[0]}')
    return arrays


def _parse_matrix(stream, order, names):
    """Returns the name of an array, and its values in parts along the last axis.

    There are no parts if `names` lacks the name.
    """
    (flags,) = _parse_element(stream, order, 8)
    if flags.dtype.itemsize != 4 or len(flags) != 2:
        raise ValueError('an array has no flags')
    *shape, length = _parse_element(stream, order, 256)[0].tolist()
    name = _parse_element(stream, order, 256)[0].tobytes().decode('latin-1')
    if name not in names:
        return name, []
    step = math.prod(shape)  # numbers from one index of the last axis to the next
    if flags[0] & 0xFF not in _NUMERIC_CLASSES or flags[0] >> 8 & _COMPLEX or min(*shape, length) < 0:
        raise ValueError(f'{name} is not a full array of real numbers')
    parts = _parse_element(stream, order, step=max(1, step))
    num_values = sum(map(len, parts))
    if num_values != step * length:
        raise ValueError(f'{name} has {num_values} values, but the shape {(*shape, length)}')
    return name, [part.reshape(*shape, len(part) // step if step else length, order='F') for part in parts]


def _parse_element(stream, order, most_bytes=math.inf, step=1):
    """Returns the numbers of the next element, in parts of about _PART numbers. Each part is a multiple of `step`.

    An element is a tag of eight bytes, followed by data that are padded to a multiple of eight bytes. In a small
    element, tag and data have four bytes each.
    """
    tag = stream.read_exactly(8)
    kind, num_bytes = np.frombuffer(tag, f'{order}u4').tolist()
    is_small = kind >> 16
    if is_small:
        kind, num_bytes = kind & 0xFFFF, kind >> 16
    if kind not in _TYPES or (is_small and num_bytes > 4) or num_bytes > most_bytes:
        raise ValueError(f'it has an element of unknown type or size: type {kind}, {num_bytes} bytes')
    dtype = np.dtype(order + _TYPES[kind])
    if is_small:
        return [np.frombuffer(tag[4 : 4 + num_bytes], dtype)]
    stream.require(num_bytes)
    parts, left, most = [], num_bytes, max(1, _PART // step) * step * dtype.itemsize
    while left or not parts:
        parts.append(np.frombuffer(stream.read_exactly(min(left, most)), dtype))
        left -= parts[-1].nbytes
    stream.read(min(-num_bytes % 8, stream.left))  # some writers omit the last padding
    return parts


class _Inflated:
    """Decompresses a zlib stream of `num_bytes` bytes piece by piece, as a file that can be read."""

    def __init__(self, file, num_bytes):
        self._file, self._left, self._inflater = file, num_bytes, zlib.decompressobj()

    def read(self, num_bytes):
        content = bytearray()
        while len(content) < num_bytes and not self._inflater.eof:
            block = self._inflater.unconsumed_tail
            if not block:
                block = self._file.read(min(1 << 18, self._left))
                self._left -= len(block)
                if not block:
                    raise EOFError('it ends too early')
            content += self._inflater.decompress(block, num_bytes - len(content))
        return content
