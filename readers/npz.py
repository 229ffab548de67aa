"""Reads an image set from one .npz file with the arrays of Keras or MedMNIST (Yang et al., 2023). Reads no pickles.

Keras saves x_train, y_train, x_test and y_test. MedMNIST has train_images, train_labels, test_images and test_labels.
Other arrays are not read, such as MedMNIST's val_images.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from readers import files, npy
from readers.files import DataError

_LAYOUTS = (
    {'train': ('x_train', 'y_train'), 'test': ('x_test', 'y_test')},
    {'train': ('train_images', 'train_labels'), 'test': ('test_images', 'test_labels')},
)
_MOST_CLASSES = 1 << 16


class Opened(NamedTuple):
    """An .npz file whose arrays were checked.

    Attributes:
        path: the file.
        names: {split: the names of its images and its labels}.
        missing: the names of test arrays that the file lacks.
        shape: the height, width and channels of an image.
        num_classes: the largest label + 1.
    """

    path: Path
    names: dict
    missing: list
    shape: tuple[int, int, int]
    num_classes: int

    @property
    def channels(self) -> int:
        """Returns the number of channels of an image."""
        return self.shape[2]


def open_set(path: Path) -> Opened:
    """Opens an .npz file. Reads all labels, but only the headers of the images. Raises DataError."""
    with files.opened_zip(path) as members:
        held = [name.removesuffix('.npy') for name in members.namelist()]
        layout = next((names for names in _LAYOUTS if set(names['train']) <= set(held)), None)
        if layout is None:
            raise DataError(
                f'{path} holds {", ".join(held) or "no arrays"}: x_train and y_train (as in Keras) or train_images and '
                'train_labels (as in MedMNIST) are needed'
            )
        missing = [name for name in layout['test'] if name not in held]
        splits = ['train'] if missing else ['train', 'test']
        images, labels = zip(*(layout[split] for split in splits), strict=True)
        headers = [_header(members, name, path) for name in images]
    shapes = [_image_shape(*header, f'{path}: {name}') for header, name in zip(headers, images, strict=True)]
    if shapes[0] != shapes[-1]:
        raise DataError(f'{path}: {images[0]} has images of shape {shapes[0]}, but {images[1]} of shape {shapes[1]}')
    arrays = npy.load_npz(path, labels)
    largest = [
        _largest_label(arrays[name], shape[0], f'{path}: {name}')
        for name, (_, shape) in zip(labels, headers, strict=True)
    ]
    return Opened(Path(path), layout, missing, shapes[0], max(largest) + 1)


def _header(members, name, path):
    """Returns the dtype and the shape of an array in a zip file."""
    member = members.getinfo(f'{name}.npy')
    with members.open(member) as file:
        dtype, _, shape = npy.parse_header(file, member.file_size, f'{path}: {name}')
    return dtype, shape


def _image_shape(dtype, shape, where):
    """Returns the height, width and channels of an image, given the dtype and shape of all images."""
    if dtype != np.uint8:
        raise DataError(f'{where} is {dtype}: uint8 from 0 to 255 is needed')
    *sizes, channels = (*shape, 1) if len(shape) == 3 else shape
    if len(sizes) != 3 or not 1 <= channels <= 4:
        raise DataError(f'{where} has the shape {shape}: [N, H, W] or [N, H, W, C] with 1 to 4 channels is needed')
    if not all(sizes):
        raise DataError(f'{where} has the shape {shape}: it holds no images')
    return *sizes[1:], channels


def _largest_label(labels, num_images, where):
    if labels.dtype.kind not in 'iu':
        raise DataError(f'{where} is {labels.dtype}: whole numbers are needed')
    if labels.shape not in ((num_images,), (num_images, 1)):
        raise DataError(f'{where} has the shape {labels.shape}: one label per image, [{num_images}], is needed')
    return int(files.checked_labels(labels, _MOST_CLASSES, where).max())


def read(opened: Opened, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images, uint8 [N, H, W, C], and the labels, int32 [N], of a split, 'train' or 'test'.

    Raises DataError.
    """
    if split == 'test' and opened.missing:
        raise DataError(
            f'{opened.path} has no {" and ".join(opened.missing)}: train with --validation 0.1, and evaluate with '
            '--split validation'
        )
    names = opened.names[split]
    with files.one_error(opened.path):  # fails if the file has changed since it was opened
        arrays = npy.load_npz(opened.path, names)
        images, labels = (arrays[name] for name in names)
        images = np.ascontiguousarray(images).reshape(len(labels), *opened.shape)
        return images, files.checked_labels(labels.reshape(-1), opened.num_classes, opened.path)
