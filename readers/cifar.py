"""Reads CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): binary records or pickles, in folders or .tar.gz archives.

A record is one label byte (CIFAR-10) or two (CIFAR-100: coarse and fine), then 3,072 pixel values channel by channel.
"""

import gzip
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

import errors
from readers import files, pickles
from readers.files import DataError, OfficialFile


class Layout(NamedTuple):
    """Names and sizes that differ between CIFAR-10 and CIFAR-100."""

    binary_folder: str
    python_folder: str
    official: OfficialFile
    files: dict
    label_bytes: int
    label_key: str
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Returns the number of classes."""
        return len(self.class_names)

    @property
    def binary_archive(self) -> str:
        """Returns the name of the archive of records."""
        return self.official.url.rsplit('/', 1)[1]

    @property
    def python_archive(self) -> str:
        """Returns the name of the archive of pickles."""
        return self.binary_archive.replace('binary', 'python')


LIMIT = 1 << 28  # bytes of an unpacked archive or a file; the official archives unpack to 186 million

CIFAR10 = Layout(
    'cifar-10-batches-bin',
    'cifar-10-batches-py',
    OfficialFile(
        'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
        'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd',
        170_052_171,
    ),
    files={'train': [f'data_batch_{i}' for i in range(1, 6)], 'test': ['test_batch']},
    label_bytes=1,
    label_key='labels',
    class_names=('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck'),
)

CIFAR100 = Layout(
    'cifar-100-binary',
    'cifar-100-python',
    OfficialFile(
        'https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz',
        '58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec',
        168_513_733,
    ),
    files={'train': ['train'], 'test': ['test']},
    label_bytes=2,
    label_key='fine_labels',
    class_names=(
        'apple', 'aquarium_fish', 'baby', 'bear', 'beaver', 'bed', 'bee', 'beetle', 'bicycle', 'bottle', 'bowl', 'boy',
        'bridge', 'bus', 'butterfly', 'camel', 'can', 'castle', 'caterpillar', 'cattle', 'chair', 'chimpanzee', 'clock',
        'cloud', 'cockroach', 'couch', 'crab', 'crocodile', 'cup', 'dinosaur', 'dolphin', 'elephant', 'flatfish',
        'forest', 'fox', 'girl', 'hamster', 'house', 'kangaroo', 'keyboard', 'lamp', 'lawn_mower', 'leopard', 'lion',
        'lizard', 'lobster', 'man', 'maple_tree', 'motorcycle', 'mountain', 'mouse', 'mushroom', 'oak_tree', 'orange',
        'orchid', 'otter', 'palm_tree', 'pear', 'pickup_truck', 'pine_tree', 'plain', 'plate', 'poppy', 'porcupine',
        'possum', 'rabbit', 'raccoon', 'ray', 'road', 'rocket', 'rose', 'sea', 'seal', 'shark', 'shrew', 'skunk',
        'skyscraper', 'snail', 'snake', 'spider', 'squirrel', 'streetcar', 'sunflower', 'sweet_pepper', 'table', 'tank',
        'telephone', 'television', 'tiger', 'tractor', 'train', 'trout', 'tulip', 'turtle', 'wardrobe', 'whale',
        'willow_tree', 'wolf', 'woman', 'worm',
    ),
)  # fmt: skip


def read(layout: Layout, folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images, uint8 [N, 32, 32, 3], and the labels, int32 [N], of a split.

    Reads the first that exists: the folder of records, its archive, the folder of pickles, its archive. Downloads the
    archive of records if none exists.

    Args:
        layout: CIFAR10 or CIFAR100.
        folder: the folder of the data sets.
        split: 'train' or 'test'.

    Raises:
        DataError: a file is missing or damaged, or a download failed.
    """
    binary = [f'{name}.bin' for name in layout.files[split]]
    places = [
        (folder / layout.binary_folder, layout.binary_folder, binary, _parse_records),
        (folder / layout.binary_archive, layout.binary_folder, binary, _parse_records),
        (folder / layout.python_folder, layout.python_folder, layout.files[split], _parse_pickle),
        (folder / layout.python_archive, layout.python_folder, layout.files[split], _parse_pickle),
    ]
    found = [place for place in places if place[0].exists()]
    if not found:
        files.download(layout.official, folder / layout.binary_archive)
        found = [places[1]]
    path, inner_folder, names, parse = found[0]
    parts = _parse_members(path, inner_folder, names, partial(parse, layout), layout.official)
    labels = files.checked_labels(np.concatenate([labels for _, labels in parts]), layout.num_classes, path)
    images = [images for images, _ in parts]
    del parts
    return files.joined(images), labels


def _parse_members(path, inner_folder, names, parse, official):
    """Parses files in a folder or a .tar.gz. Returns the results in the order of `names`.

    Args:
        path: the folder or the archive.
        inner_folder: the folder that holds the files within an archive.
        names: the file names.
        parse: a function (file, num_bytes, where) -> result, where `where` names the file in messages.
        official: the official archive, for messages.
    """
    if path.is_dir():
        parts = {name: _parse_file(path / name, parse) for name in names}
    else:
        parts = _parse_archive(path, {f'{inner_folder}/{name}': name for name in names}, parse, official)
    return [parts.pop(name) for name in names]


def _parse_file(path, parse):
    with files.opened(path) as file, files.one_error(path):
        return parse(file, os.fstat(file.fileno()).st_size, path)


def _parse_archive(archive, wanted, parse, official):
    """Parses the members of a .tar.gz that `wanted`, {member: name}, lists. Returns {name: result}.

    Reads the archive to the end, where gzip compares its checksum.
    """
    parts = {}
    with files.opened(archive) as raw, files.one_error(archive, official), gzip.open(raw) as unpacked:
        stream = files.Limited(unpacked, LIMIT, archive)
        for member, num_bytes in _tar_members(stream):
            if member in wanted and wanted[member] not in parts:
                parts[wanted[member]] = parse(stream, num_bytes, f'{archive}: {member}')
            else:
                stream.skip(num_bytes)
        stream.skip_rest()
    missing = [member for member, name in wanted.items() if name not in parts]
    if missing:
        raise DataError(files.damaged(archive, f'it holds no {missing[0]}', official))
    return parts


_BLOCK = 512
_LARGEST_PAX = 1 << 16  # bytes


def _tar_members(stream: files.Limited) -> Iterator[tuple[str | None, int]]:
    """Yields (name, size in bytes) of each member of a tar stream. The name is None if the member is not a plain file.

    The caller must read or skip the member's bytes before the next member.
    """
    pax = {}
    while (header := stream.read_exactly(_BLOCK)).strip(b'\0'):
        if sum(header[:148]) + 8 * ord(' ') + sum(header[156:]) != int(header[148:156].strip(b' \0') or b'0', 8):
            raise ValueError('a tar header has a wrong checksum')
        num_bytes = int(pax.get(b'size') or int(header[124:136].strip(b' \0') or b'0', 8))
        name = pax.get(b'path') or header[:100].partition(b'\0')[0]
        if header[156:157] == b'x' and num_bytes <= _LARGEST_PAX:  # describes the next member
            pax = dict(re.findall(rb'\d+ ([^=\n]+)=([^\n]*)\n', stream.read_exactly(num_bytes)))
        else:
            is_regular = header[156:157] in b'0\0' and not any(key.startswith(b'GNU.sparse') for key in pax)
            pax = {}
            yield (name.decode('latin-1') if is_regular else None), num_bytes
        stream.skip(-num_bytes % _BLOCK)


def _parse_records(layout: Layout, file: BinaryIO | files.Limited, num_bytes: int, where: object):
    record = layout.label_bytes + 3072
    if not 0 < num_bytes < LIMIT or num_bytes % record:
        raise DataError(
            f'{where} is damaged: {num_bytes} bytes are not a whole number of CIFAR records ({record} bytes each)'
        )
    images, labels = np.empty((num_bytes // record, 32, 32, 3), np.uint8), np.empty(num_bytes // record, np.uint8)
    for start in range(0, len(images), 1000):
        block = slice(start, min(start + 1000, len(images)))
        records = np.frombuffer(file.read(record * (block.stop - start)), np.uint8).reshape(-1, record)
        images[block] = _channels_last(records[:, layout.label_bytes :])
        labels[block] = records[:, layout.label_bytes - 1]
    return images, labels


def _parse_pickle(layout: Layout, file: BinaryIO | files.Limited, num_bytes: int, where: object):
    if num_bytes > LIMIT:
        raise DataError(f'{where} is damaged (it exceeds {LIMIT} bytes)')
    try:
        batch = pickles.load(file.read(num_bytes))
        pixels, labels = (pickles.as_array(batch[name]) for name in ('data', layout.label_key))
    except Exception as error:  # a damaged pickle can raise anything
        reason = f'it has no key {error}' if isinstance(error, KeyError) else errors.first_line(error)
        raise DataError(f'{where} is damaged or not a CIFAR batch: {reason}') from error
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3072) or labels.ndim != 1:
        raise DataError(f'{where} is damaged: data is {pixels.dtype} {pixels.shape}, not uint8 [N, 3072] with N labels')
    return _channels_last(pixels), labels


def _channels_last(pixels):
    return np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
