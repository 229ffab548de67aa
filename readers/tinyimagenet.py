"""Reads TinyImageNet: 200 folders of 64×64 JPEGs. Decodes them once, and writes a cache with checksums."""

import contextlib
import hashlib
import os
import shlex
from pathlib import Path

import numpy as np

from readers import decoded, files
from readers.decoding import Recipe
from readers.files import DataError, OfficialFile

OFFICIAL = OfficialFile(
    'http://cs231n.stanford.edu/tiny-imagenet-200.zip',
    '6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821',
    248_100_043,
)
RECIPE = Recipe(64, 64, formats=('JPEG',))


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
        return decoded.read_cache(cache, len(paths), (RECIPE.height, RECIPE.width)), labels
    return decoded.decode(RECIPE, paths, cache), labels


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
