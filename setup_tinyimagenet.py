"""Set up TinyImageNet: unpack the official zip, sort the validation images into class folders, decode all images.

    python setup_tinyimagenet.py --datasetfolder datasets

Downloads the zip if the zip and the folder tiny-imagenet-200 are missing. The script can be interrupted at any point
and run again.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))  # PYTHONSAFEPATH=1 leaves this folder out

from runs import launch

# isort: split

import argparse
import re
from pathlib import Path, PurePosixPath

from tqdm import tqdm

import data
import errors
from readers import files, tinyimagenet
from readers.files import DataError
from runs import parsing


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the flags. Ends the script if a flag is wrong."""
    parser = parsing.Parser(__doc__)
    help = 'folder of tiny-imagenet-200.zip or tiny-imagenet-200/; if both are missing, the zip is downloaded there'
    parser.add_argument('--datasetfolder', type=parsing.path, default=Path('datasets'), help=help)
    return parser.parse_args(argv)


@launch.script('setup_tinyimagenet.py')
def main(argv: list[str] | None = None) -> None:
    """Sets up the data set, and prints the number of images in each split."""
    args = parse_args(argv)
    root = args.datasetfolder / 'tiny-imagenet-200'
    archive = args.datasetfolder / 'tiny-imagenet-200.zip'
    if not os.path.lexists(root):
        if not os.path.exists(archive):
            files.download(tinyimagenet.OFFICIAL, archive)
        unpack(archive, root)
    for name in ('train', 'val'):
        if not (root / name).is_dir():
            raise DataError(f'{root} is not the unpacked zip: it has no folder {name}; move it away')
    try:
        sort_validation_images(root / 'val')
    except OSError as error:
        raise DataError(f'{root / "val"} cannot be sorted: {error}') from error
    dataset = data.dataset('tinyimagenet', args.datasetfolder)
    for split in ('train', 'test'):
        images, labels = dataset.read(split)
        print(f'{split}: {len(images)} images of {len(set(labels.tolist()))} classes')


_LARGEST_MEMBER = 1 << 20  # bytes; the largest file that is unpacked, val_annotations.txt, has 300 thousand


def unpack(archive: Path, root: Path) -> None:
    """Unpacks the training and validation images beside `root`, and moves them to `root` when all are unpacked.

    Raises DataError.
    """
    try:
        with errors.replacing(root) as partial, files.opened_zip(archive, tinyimagenet.OFFICIAL) as members:
            wanted = [name for name in members.namelist() if _is_wanted(PurePosixPath(name))]
            for name in tqdm(wanted, 'unpacking', unit=' files', leave=False, disable=None):
                _unpack_member(members, name, partial)
            for name in ('train', 'val'):
                if not (partial / name).is_dir():
                    raise ValueError(f'it holds no folder {root.name}/{name}')
    except OSError as error:
        raise DataError(f'{archive} cannot be unpacked to {root}: {error}') from error


def _unpack_member(members, name, folder):
    if members.getinfo(name).file_size > _LARGEST_MEMBER:
        raise ValueError(f'{name} has more than {_LARGEST_MEMBER} bytes')
    if '..' in PurePosixPath(name).parts:
        raise ValueError(f'{name} leads out of the folder')
    path = folder.joinpath(*PurePosixPath(name).parts[1:])
    if name.endswith('/'):
        path.mkdir(parents=True, exist_ok=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(members.read(name))


def _is_wanted(path):
    inside = path.parts[:1] == ('tiny-imagenet-200',) and path.parts[1:2] in (('train',), ('val',), ('wnids.txt',))
    return inside and not files.is_litter(path.name)


_FILE_NAME = re.compile(r'\w[\w.]{0,99}', re.ASCII)


def sort_validation_images(val: Path) -> None:
    """Moves val/images/NAME to val/CLASS/NAME as val_annotations.txt says. Skips images that were moved before.

    Raises DataError, or OSError for a file that cannot be moved.
    """
    annotations, unsorted = val / 'val_annotations.txt', val / 'images'
    if not unsorted.exists():
        return
    if not annotations.exists():
        raise DataError(f'{annotations} is missing, so the images in {unsorted} cannot be sorted')
    for line in files.read_text(annotations).splitlines():
        name, class_name = [*line.split('\t'), ''][:2]
        if not _FILE_NAME.fullmatch(name) or not _FILE_NAME.fullmatch(class_name):
            raise DataError(f'{annotations} is damaged: {name[:50]!r} and {class_name[:50]!r} are not plain names')
        (val / class_name).mkdir(exist_ok=True)
        if (unsorted / name).exists():
            os.replace(unsorted / name, val / class_name / name)
        elif not (val / class_name / name).exists():
            raise DataError(f'{unsorted / name} is missing: delete {val.parent} and start again from the zip')
    for name in filter(files.is_litter, os.listdir(unsorted)):
        os.replace(unsorted / name, val / name)
    leftover = sorted(os.listdir(unsorted))
    if leftover:
        raise DataError(f'{unsorted / leftover[0]} is not listed in {annotations}')
    unsorted.rmdir()


if __name__ == '__main__':
    main()
