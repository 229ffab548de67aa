"""Reads MNIST and its relatives from idx files, plain or .gz.

MNIST is by LeCun et al. (1998), Fashion-MNIST by Xiao et al. (2017), KMNIST by Clanuwat et al. (2018) and EMNIST by
Cohen et al. (2017).
"""

import gzip
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from readers import files
from readers.files import DataError, OfficialFile


class Layout(NamedTuple):
    """Describes the four files of a data set.

    Attributes:
        folders: the folders that may hold the files.
        url: the official address, without the file name, or the address of an archive that holds the files.
        sha256: {file name: (SHA-256, size in bytes)}, or {} if the files are only in the archive.
        class_names: the name of each class.
        prefixes: {split: how the names of its two files begin}.
        first_label: the label of class 0 in the files.
        transposed: whether the files hold rows and columns exchanged.
    """

    folders: tuple[str, ...]
    url: str
    sha256: dict
    class_names: tuple[str, ...]
    prefixes: dict = {'train': 'train', 'test': 't10k'}  # noqa: RUF012
    first_label: int = 0
    transposed: bool = False


MNIST = Layout(
    ('mnist', 'MNIST/raw'),
    'https://storage.googleapis.com/cvdf-datasets/mnist/',
    {
        'train-images-idx3-ubyte.gz': ('440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609', 9_912_422),
        'train-labels-idx1-ubyte.gz': ('3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c', 28_881),
        't10k-images-idx3-ubyte.gz': ('8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6', 1_648_877),
        't10k-labels-idx1-ubyte.gz': ('f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6', 4_542),
    },
    class_names=tuple('0123456789'),
)

FASHION = Layout(
    ('fashion', 'FashionMNIST/raw', 'fashion-mnist'),
    'http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/',
    {
        'train-images-idx3-ubyte.gz': ('3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84', 26_421_880),
        'train-labels-idx1-ubyte.gz': ('a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845', 29_515),
        't10k-images-idx3-ubyte.gz': ('346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073', 4_422_102),
        't10k-labels-idx1-ubyte.gz': ('67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5', 5_148),
    },
    class_names=(
        'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot',
    ),
)  # fmt: skip

KMNIST = Layout(
    ('kmnist', 'KMNIST/raw'),
    'http://codh.rois.ac.jp/kmnist/dataset/kmnist/',
    {
        'train-images-idx3-ubyte.gz': ('51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4', 18_165_135),
        'train-labels-idx1-ubyte.gz': ('e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17', 29_497),
        't10k-images-idx3-ubyte.gz': ('edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5', 3_041_136),
        't10k-labels-idx1-ubyte.gz': ('20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c', 5_120),
    },
    class_names=('o', 'ki', 'su', 'tsu', 'na', 'ha', 'ma', 'ya', 're', 'wo'),
)

EMNIST = Layout(
    ('emnist', 'emnist/gzip', 'EMNIST/raw'),
    'https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip',
    {},
    class_names=tuple('0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt'),  # C and c are one class, for example
    prefixes={'train': 'emnist-balanced-train', 'test': 'emnist-balanced-test'},
    transposed=True,
)

EMNIST_LETTERS = EMNIST._replace(
    class_names=tuple('abcdefghijklmnopqrstuvwxyz'),
    prefixes={'train': 'emnist-letters-train', 'test': 'emnist-letters-test'},
    first_label=1,
)


def read(layout: Layout, folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images, uint8 [N, H, W, 1], and the labels, int32 [N], of a split. Downloads missing files.

    Args:
        layout: MNIST, FASHION, KMNIST, EMNIST or EMNIST_LETTERS.
        folder: the folder of the data sets.
        split: 'train' or 'test'.

    Raises:
        DataError: a file is damaged, a download failed, or a file that cannot be downloaded is missing.
    """
    prefix = layout.prefixes[split]
    images_path = _find(layout, folder, f'{prefix}-images-idx3-ubyte')
    labels_path = _find(layout, folder, f'{prefix}-labels-idx1-ubyte')
    images, labels = (read_file(path, _official(layout, path.name)) for path in (images_path, labels_path))
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise DataError(
            f'{images_path} has the shape {images.shape} and {labels_path} {labels.shape}, not [N, H, W] and [N]'
        )
    if not images[:1].size and len(images):
        raise DataError(f'{images_path} has the shape {images.shape}: its images have no pixels')
    if layout.transposed:
        images = np.ascontiguousarray(images.swapaxes(1, 2))
    labels = files.checked_labels(labels, len(layout.class_names), labels_path, layout.first_label)
    return images[..., None], labels


def _find(layout, folder, name):
    """Returns the path of a file, such as train-images-idx3-ubyte or train-images.idx3-ubyte, plain or .gz."""
    for inner_folder in layout.folders:
        for stem in (name, name.replace('-idx', '.idx')):
            for path in (folder / inner_folder / stem, folder / inner_folder / f'{stem}.gz'):
                if path.exists():
                    return path
    path = folder / layout.folders[0] / f'{name}.gz'
    if not layout.sha256:
        wanted = f'{name.rsplit("-", 4)[0]}-*.gz'
        raise DataError(f'{path} is missing: download {layout.url} and put its files {wanted} in {path.parent}')
    files.download(_official(layout, path.name), path)
    return path


def _official(layout, name):
    return OfficialFile(layout.url + name, *layout.sha256[name]) if name in layout.sha256 else None


_DEFLATE_LIMIT = 1032  # the most bytes that one byte of a .gz file can expand to
_MAX_RANK = 4


def read_file(path: Path, official: OfficialFile | None = None) -> np.ndarray:
    """Returns the array of an idx file, plain or .gz, as uint8 in the shape that the header gives. Raises DataError."""
    with files.opened(path) as raw:
        num_bytes = os.fstat(raw.fileno()).st_size
        limit = min(files.budget(num_bytes), _DEFLATE_LIMIT * num_bytes) if path.suffix == '.gz' else num_bytes
        with files.one_error(path, official), gzip.open(raw) if path.suffix == '.gz' else raw as file:
            return _parse(file, path, limit)


def _parse(file, path, limit):
    magic = file.read(4)
    rank = magic[3] if len(magic) == 4 else 0
    header = file.read(4 * rank)
    if magic[:3] != b'\0\0\x08' or not 0 < rank <= _MAX_RANK or len(header) < 4 * rank:
        raise DataError(f'{path} is damaged: it does not start like an idx file of bytes')
    shape = [int(n) for n in np.frombuffer(header, '>u4')]
    expected = math.prod(shape)
    if expected > limit:
        raise DataError(f'{path} is damaged: its header claims {expected} bytes, more than the file can hold')
    values, num_bytes = np.empty(expected, np.uint8), 0
    while block := file.read(1 << 18):
        if num_bytes + len(block) > expected:
            raise DataError(f'{path} is damaged: its header claims {expected} bytes, but more follow')
        values[num_bytes : num_bytes + len(block)] = np.frombuffer(block, np.uint8)
        num_bytes += len(block)
    if num_bytes < expected:
        raise DataError(f'{path} is damaged: its header claims {expected} bytes, but {num_bytes} follow')
    return values.reshape(shape)
