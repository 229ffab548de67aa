"""Reads images from a folder for each class: PATH/train/CLASS/IMAGE and PATH/test/CLASS/IMAGE."""

import contextlib
import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from readers import decoded, decoding
from readers.files import DataError

_SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.gif', '.tif', '.tiff', '.webp', '.ppm', '.pgm')


class Opened(NamedTuple):
    """The image files of a folder, and how to decode them.

    Attributes:
        path: the folder.
        image_size: the height and the width to which images are resized and cropped. None keeps their size.
        cache_folder: the folder for decoded images.
        class_names: the names of the classes. Labels are indices into them.
        files: {split: (paths, labels int32 [N])}.
    """

    path: Path
    image_size: int | None
    cache_folder: Path
    class_names: tuple[str, ...]
    files: dict[str, tuple[list[str], np.ndarray]]


def open_set(path: Path, image_size: int | None, cache_folder: Path) -> Opened:
    """Lists the image files of a folder. Raises DataError.

    The classes are the folders in PATH/train, or those in PATH if there is no folder train. The split 'test' is in
    PATH/test, or in PATH/val. A class includes the folders within it. Links are followed. Hidden files, and files
    without a suffix of images, are skipped.

    Args:
        path: PATH.
        image_size: the height and the width to which images are resized and cropped, in pixels. None keeps their size,
            which must be the same for all.
        cache_folder: the folder for decoded images. It is made when it is needed.
    """
    path = Path(path)
    with _one_error(path):
        train, test = _split_folders(path)
        listed = {'train': _list_classes(train)}
        if not any(listed['train'].values()):
            raise DataError(
                f'{path} holds no images: train/CLASS/IMAGE.png and test/CLASS/IMAGE.png are expected in it'
            )
        if test:
            listed['test'] = _list_classes(test)
    indices = {name: i for i, name in enumerate(listed['train'])}
    _require_images(train, listed['train'], indices)
    if test:
        _require_images(test, listed['test'], indices)
    files = {split: _labelled(paths, indices) for split, paths in listed.items()}
    return Opened(path, image_size, Path(cache_folder), tuple(indices), files)


@contextlib.contextmanager
def _one_error(path):
    """Turns errors of listing into DataErrors."""
    try:
        yield
    except OSError as error:
        raise DataError(f'{error.filename or path} cannot be read: {error.strerror or error}') from error
    except ValueError as error:  # NUL in the path
        raise DataError(f'{path} is not a valid path: {error}') from error


def _split_folders(path):
    """Returns the folders of the training classes and of the test classes. The second is None if it is missing."""
    os.listdir(path)  # raises an OSError if it is no folder
    train, *others = (path / name for name in ('train', 'test', 'val'))
    test = next((folder for folder in others if folder.is_dir()), None)
    if train.is_dir():
        return train, test
    if test:
        raise DataError(f'{path} has a folder {test.name}, but no folder train')
    return path, None


def _list_classes(folder):
    """Returns the paths of the images of each class, {class name: paths}. Names and paths are sorted."""
    above = {_identity(parent) for parent in (folder, *Path(os.path.realpath(folder)).parents)}
    names = [entry.name for entry in _entries(folder) if entry.is_dir()]
    for name in names:
        if not name.isprintable():
            raise DataError(f'{folder / name}: the name of a class must be printable text, so rename the folder')
    return {name: _list_images(folder / name, set(above)) for name in names}


def _list_images(folder: Path, visited: set[tuple[int, int]]) -> list[str]:
    """Returns the sorted paths of the images in a folder and in the folders within it.

    Args:
        folder: the folder.
        visited: the folders to skip, as _identity names them. All folders within `folder` are added, because links can
            lead in circles.
    """
    found, folders = [], [str(folder)]
    while folders:
        current = folders.pop()
        if _identity(current) in visited:
            continue
        visited.add(_identity(current))
        for entry in _entries(current):
            if entry.is_dir():
                folders.append(entry.path)
            elif not entry.is_file():
                raise DataError(f'{entry.path} is not a regular file')
            elif entry.name.lower().endswith(_SUFFIXES):
                found.append(entry.path)
    return sorted(found)


def _entries(folder):
    """Returns what a folder holds, sorted by name, except for hidden files."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if entry.name[0] != '.'), key=lambda entry: entry.name)


def _identity(folder):
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _require_images(folder, by_class, indices):
    """Raises a DataError if a class is unknown or has no images."""
    if not by_class:
        raise DataError(f'{folder} holds no folders of classes')
    for name, paths in by_class.items():
        if name not in indices:
            raise DataError(f'{folder / name}: {folder.parent / "train"} has no such class')
        if not paths:
            raise DataError(f'{folder / name} holds no images: add some ({", ".join(_SUFFIXES)}) or remove the folder')


def _labelled(by_class, indices):
    paths = [path for paths in by_class.values() for path in paths]
    labels = np.array([indices[name] for name in by_class], np.int32)
    return paths, np.repeat(labels, [len(paths) for paths in by_class.values()])


def read(opened: Opened, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images, uint8 [N, H, W, 3], mapped from the cache, and the labels, int32 [N], of a split.

    The first time, decodes all images and writes the cache. If it cannot be written, prints a line and returns the
    images in memory. Nothing is written to the folder of the images.

    Args:
        opened: what open_set returned.
        split: 'train' or 'test'.

    Raises:
        DataError: the folder has no such split, or a file is damaged or unsuitable.
    """
    if split not in opened.files:
        raise DataError(
            f'{opened.path} has no folder test or val: train with --validation 0.1, and evaluate with '
            '--split validation'
        )
    paths, labels = opened.files[split]
    with _one_error(opened.path):
        cache = _cache(opened, split)
    size = opened.image_size and (opened.image_size, opened.image_size)
    with contextlib.suppress(DataError):  # no cache, or a damaged one
        return decoded.read_cache(cache, len(paths), size, fit=size is not None), labels
    if _is_within(cache, opened.path):
        decoded.say_unwritten(cache, f'nothing is written to {opened.path}')
        cache = None
    return decoded.decode(_recipe(opened), paths, cache), labels


def _recipe(opened):
    if opened.image_size:
        return decoding.Recipe(opened.image_size, opened.image_size, fit=True)
    reference = opened.files['train'][0][0]
    with decoded.data_errors():
        width, height = decoding.size_of(reference)
    return decoding.Recipe(height, width, reference=reference)


def _is_within(path, folder):
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _cache(opened, split):
    """Returns the path of the cache of a split, FOLDER-HASH-SPLIT-FINGERPRINT.npy.

    The hash of the folder's absolute path keeps folders of the same name apart. The fingerprint changes when the image
    size or a file changes.
    """
    folder = os.path.realpath(opened.path)
    paths, _ = opened.files[split]
    if not opened.image_size:  # the first training image sets the size of all
        paths = [opened.files['train'][0][0], *paths]
    fingerprint = hashlib.sha256(os.fsencode(f'{folder}\n{opened.image_size}\n'))
    for path in paths:
        status = os.stat(path)
        name = path.removeprefix(str(opened.path))
        fingerprint.update(os.fsencode(f'{name}\0{status.st_size}\0{status.st_mtime_ns}\n'))
    name = re.sub(r'[^A-Za-z0-9_.-]', '_', os.path.basename(folder))[:64]
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]
    return opened.cache_folder / f'{name}-{digest}-{split}-{fingerprint.hexdigest()[:16]}.npy'
