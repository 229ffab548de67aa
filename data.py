"""Image sets: read the official files, shuffle, augment and normalise.

A reader takes the folder of the data sets and a split, 'train' or 'test', and returns
images uint8 [N, H, W, C] and labels int32 [N]. What it cannot find, or finds damaged, is a
DataError whose message says which file and what to do.
"""

import contextlib
import gzip
import hashlib
import http.client
import importlib.util
import io
import math
import mmap
import multiprocessing
import os
import pickle
import queue
import shlex
import sys
import tarfile
import threading
import urllib.request
import zlib
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

import errors
import flags
import jpegs


class DataError(errors.UserError):
    """A data set that is missing, damaged or of no use."""


# On the device: the batches of an epoch, augmentation, normalisation.


def shuffled_batches(key, num_images, batch_size):
    """The images of every batch of an epoch in a random order, int32 [num_images // batch_size, batch_size]."""
    steps = num_images // batch_size
    return jax.random.permutation(key, num_images)[: steps * batch_size].reshape(steps, batch_size)


def augment(key, images):
    """A random crop after zero padding by 4 pixels, then a horizontal flip of every other image on average.

    images: uint8 [B, H, W, C], raw: black, not the mean colour, fills the border. Returns the same shape.
    """
    pad = 4
    crop_key, flip_key = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corners = jax.random.randint(crop_key, (len(images), 2), 0, 2 * pad + 1)
    cropped = jax.vmap(lambda image, c: jax.lax.dynamic_slice(image, (c[0], c[1], 0), images.shape[1:]))(
        padded, corners
    )
    flipped = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
    return jnp.where(flipped, cropped[:, :, ::-1], cropped)


def normalise(images, mean, std):
    """uint8 [B, H, W, C] to float32, (images / 255 − mean) / std with a value for every channel."""
    mean, std = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, -1) for x in (mean, std))
    return (images.astype(jnp.float32) / 255 - mean) / std


# On the host: the data sets.


class Dataset(NamedTuple):
    """How to read an image set, and what to do with its images; without `mean` and `std` they are measured."""

    read: Callable
    num_classes: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    augment: bool


def dataset(name, folder):
    """The row of DATASETS called `name`, or one made for 'tfds/NAME'; its read(split) is bound to `folder`."""
    folder = Path(folder)
    if name.startswith('tfds/'):
        return _tfds_dataset(name.removeprefix('tfds/'), folder)
    row = DATASETS[name]
    return row._replace(read=partial(_read, row.read, folder))


def _read(read, folder, split):
    try:
        return read(folder, split)
    except OSError as error:
        raise DataError(f'{error.filename or folder} cannot be read: {error.strerror or error}') from error


def describe(dataset, train_images, train_labels):
    """What networks need to know of an image set, as plain values: sizes, and mean and std of every channel; and the
    CRC-32 of the training labels, which tells other images and another order of them."""
    mean, std = channel_statistics(train_images) if dataset.mean is None else (dataset.mean, dataset.std)
    return {
        'num_train': len(train_images),
        'num_classes': dataset.num_classes,
        'image_shape': list(train_images.shape[1:]),
        'mean': list(mean),
        'std': list(std),
        'labels_crc32': zlib.crc32(np.ascontiguousarray(train_labels)),
    }


def require_same(found, description, folder, run):
    """Raises a DataError if parts of a description that were found in a folder differ from a run's."""
    if any(description.get(name, value) != value for name, value in found.items()):
        raise DataError(f'{folder} holds other images than those that {run} was begun with')


def read_train(dataset, of_run):
    """Training images and labels in two parts, (rest, validation), of --trainimages; without --validation (all, None).

    of_run: the run's flags. Raises DataError.
    """
    train = subset('--trainimages', of_run['trainimages'], *dataset.read('train'))
    return hold_out(*train, of_run['validation']) if of_run['validation'] else (train, None)


def subset(flag, size, images, labels):
    """A random subset of images and labels, the same one whatever a run's seed is; all of them for None.

    Raises DataError, which names the flag, if there are fewer.
    """
    if size is None:
        return images, labels
    if size > len(images):
        raise DataError(f'{flag} {size} exceeds the {len(images)} images that there are')
    chosen = np.sort(_fixed_order(images)[:size])
    return images[chosen], labels[chosen]


def hold_out(images, labels, fraction):
    """Training images and labels in two parts, (rest, validation): the second is a random `fraction` of them.

    It is the same part whatever a run's seed is, so that no run is tuned on images that another was trained on.
    Raises DataError if either would be empty.
    """
    order = _fixed_order(images)
    num_held = round(fraction * len(images))
    if not 0 < num_held < len(images):
        raise DataError(f'--validation {fraction:g} of {len(images)} training images leaves none on one side')
    held, rest = np.sort(order[:num_held]), np.sort(order[num_held:])
    return (images[rest], labels[rest]), (images[held], labels[held])


def _fixed_order(images):
    return np.random.default_rng(0).permutation(len(images))


def resized(images, shape):
    """Images uint8 [N, H, W, C] in the shape (H', W', C'): grey turned to colour or back, and resized, where needed."""
    if images.shape[1:] == tuple(shape):
        return images
    mode = 'L' if shape[2] == 1 else 'RGB'
    outputs = np.empty((len(images), *shape), np.uint8)
    for i, image in enumerate(images):
        image = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).convert(mode)
        output = image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
        outputs[i] = np.asarray(output).reshape(shape)
    return outputs


def check_description(description, where):
    """Raises a DataError if what a file holds cannot be what `describe` returned."""

    def whole(value):
        return isinstance(value, int) and 0 < value < 2**31

    def finite(values):
        return isinstance(values, list) and all(isinstance(x, float) and math.isfinite(x) for x in values)

    names = ('num_train', 'num_classes', 'image_shape', 'mean', 'std')
    held = {name: description.get(name) if isinstance(description, dict) else None for name in names}
    num_train, num_classes, shape, mean, std = held.values()
    sizes = isinstance(shape, list) and len(shape) == 3 and all(whole(n) for n in shape)
    channels = finite(mean) and finite(std) and sizes and len(mean) == len(std) and len(mean) in (1, shape[2])
    if not (whole(num_train) and whole(num_classes) and channels):
        raise DataError(f'{where} does not describe images that train.py could have read: {held}')


def channel_statistics(images):
    """Mean and standard deviation of every channel of uint8 [N, H, W, C], on the scale [0, 1]."""
    values = np.arange(256) / 255
    counts = np.zeros((images.shape[-1], 256), np.int64)
    for start in range(0, len(images), 1000):  # bincount makes its input eight times as large
        for channel, count in enumerate(counts):
            count += np.bincount(images[start : start + 1000, ..., channel].ravel(), minlength=256)
    means = [np.average(values, weights=count) for count in counts]
    variances = [np.average((values - m) ** 2, weights=count) for m, count in zip(means, counts, strict=True)]
    return [float(m) for m in means], [float(np.sqrt(v)) for v in variances]


class OfficialFile(NamedTuple):
    """A file at its official address, with its published SHA-256 and size in bytes."""

    url: str
    sha256: str
    num_bytes: int


# CIFAR (Krizhevsky, 2009): records of one or two label bytes and 3,072 pixels, or pickled arrays.


class _Cifar(NamedTuple):
    binary_folder: str
    python_folder: str
    official: OfficialFile
    files: dict
    label_bytes: int
    label_key: bytes
    num_classes: int

    @property
    def binary_archive(self):
        return self.official.url.rsplit('/', 1)[1]

    @property
    def python_archive(self):
        return self.binary_archive.replace('binary', 'python')


_CIFAR_LIMIT = 1 << 28  # bytes; the official archives hold 186 million

_CIFAR10 = _Cifar(
    'cifar-10-batches-bin',
    'cifar-10-batches-py',
    OfficialFile(
        'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
        'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd',
        170_052_171,
    ),
    files={'train': [f'data_batch_{i}' for i in range(1, 6)], 'test': ['test_batch']},
    label_bytes=1,
    label_key=b'labels',
    num_classes=10,
)

_CIFAR100 = _Cifar(
    'cifar-100-binary',
    'cifar-100-python',
    OfficialFile(
        'https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz',
        '58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec',
        168_513_733,
    ),
    files={'train': ['train'], 'test': ['test']},
    label_bytes=2,
    label_key=b'fine_labels',
    num_classes=100,
)


def _read_cifar(layout, folder, split):
    binary = [f'{name}.bin' for name in layout.files[split]]
    places = [
        (folder / layout.binary_folder, layout.binary_folder, binary, _parse_cifar_records),
        (folder / layout.binary_archive, layout.binary_folder, binary, _parse_cifar_records),
        (folder / layout.python_folder, layout.python_folder, layout.files[split], _parse_cifar_pickle),
        (folder / layout.python_archive, layout.python_folder, layout.files[split], _parse_cifar_pickle),
    ]
    found = [place for place in places if place[0].exists()]
    if not found:
        download(layout.official, folder / layout.binary_archive)
        found = [places[1]]
    path, inner_folder, names, parse = found[0]
    parts = _parse_members(path, inner_folder, names, partial(parse, layout), layout.official)
    labels = _checked_labels(np.concatenate([labels for _, labels in parts]), layout.num_classes, path)
    images = [images for images, _ in parts]
    del parts
    return _joined(images), labels


def _parse_members(path, inner_folder, names, parse, official):
    """parse(file, num_bytes, where) of each of the named files in a folder or in a .tar.gz, in the order of names."""
    if path.is_dir():
        parts = {name: _parse_file(path / name, parse) for name in names}
    else:
        parts = _parse_archive(path, {f'{inner_folder}/{name}': name for name in names}, parse, official)
    return [parts.pop(name) for name in names]


def _parse_cifar_records(layout, file, num_bytes, where):
    record = layout.label_bytes + 3072
    if not 0 < num_bytes < _CIFAR_LIMIT or num_bytes % record:
        raise DataError(f'{where} is damaged: {num_bytes} bytes are not a number of CIFAR records of {record} bytes')
    images, labels = np.empty((num_bytes // record, 32, 32, 3), np.uint8), np.empty(num_bytes // record, np.uint8)
    for start in range(0, len(images), 1000):
        block = slice(start, min(start + 1000, len(images)))
        records = np.frombuffer(file.read(record * (block.stop - start)), np.uint8).reshape(-1, record)
        images[block] = _channels_last(records[:, layout.label_bytes :])
        labels[block] = records[:, layout.label_bytes - 1]
    return images, labels


def _parse_cifar_pickle(layout, file, num_bytes, where):
    del num_bytes
    try:
        batch = _ArraysOnlyUnpickler(io.BytesIO(file.read(_CIFAR_LIMIT)), encoding='bytes').load()
        pixels, labels = np.asarray(batch[b'data']), np.asarray(batch[layout.label_key])
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f'{where} is damaged or not a CIFAR batch: {error}') from error
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3072) or labels.dtype.kind not in 'iu':
        raise DataError(f'{where} is damaged: data is {pixels.dtype} {pixels.shape}, not uint8 [N, 3072] with N labels')
    return _channels_last(pixels), labels


def _channels_last(pixels):
    return np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _joined(parts):
    """np.concatenate that empties the list of parts on its way: memory is taken when it is written to."""
    if len(parts) == 1:
        return parts.pop()
    joined = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    end = 0
    while parts:
        part = parts.pop(0)
        joined[end : end + len(part)] = part
        end += len(part)
    return joined


class _ArraysOnlyUnpickler(pickle._Unpickler):
    """Reads pickles of NumPy arrays, strings and plain containers; anything else in them is refused, not run.

    It is the unpickler in Python, since the one in C takes as much memory as a damaged pickle claims to need.
    """

    def find_class(self, module, name):
        admitted = {
            ('numpy', 'dtype'): np.dtype,
            ('numpy', 'ndarray'): np.ndarray,
            ('numpy.core.multiarray', '_reconstruct'): _empty_array,
            ('numpy._core.multiarray', '_reconstruct'): _empty_array,
            ('_codecs', 'encode'): _encode_latin1,
        }
        if (module, name) not in admitted:
            raise pickle.UnpicklingError(f'it refers to {module}.{name}; only arrays and plain containers are admitted')
        return admitted[module, name]


def _empty_array(kind, shape, dtype):
    """NumPy's array reconstructor, held to the empty arrays that pickles start from."""
    if kind is not np.ndarray or shape != (0,):
        raise pickle.UnpicklingError('it does not start its arrays from empty ones')
    return np.ndarray(shape, dtype)


def _encode_latin1(text, encoding):
    if encoding not in ('latin1', b'latin1'):
        raise pickle.UnpicklingError(f'it encodes bytes as {encoding}')
    return text.encode('latin1')


# MNIST (LeCun et al., 1998) and Fashion-MNIST (Xiao et al., 2017): idx files, plain or compressed.


class _Idx(NamedTuple):
    folders: tuple[str, ...]
    url: str
    sha256: dict


_MNIST = _Idx(
    ('mnist', 'MNIST/raw'),
    'https://storage.googleapis.com/cvdf-datasets/mnist/',
    {
        'train-images-idx3-ubyte.gz': ('440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609', 9_912_422),
        'train-labels-idx1-ubyte.gz': ('3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c', 28_881),
        't10k-images-idx3-ubyte.gz': ('8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6', 1_648_877),
        't10k-labels-idx1-ubyte.gz': ('f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6', 4_542),
    },
)

_FASHION = _Idx(
    ('fashion', 'FashionMNIST/raw', 'fashion-mnist'),
    'http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/',
    {
        'train-images-idx3-ubyte.gz': ('3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84', 26_421_880),
        'train-labels-idx1-ubyte.gz': ('a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845', 29_515),
        't10k-images-idx3-ubyte.gz': ('346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073', 4_422_102),
        't10k-labels-idx1-ubyte.gz': ('67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5', 5_148),
    },
)


def _read_idx_set(layout, folder, split):
    prefix = {'train': 'train', 'test': 't10k'}[split]
    images_path = _idx_file(layout, folder, f'{prefix}-images-idx3-ubyte')
    labels_path = _idx_file(layout, folder, f'{prefix}-labels-idx1-ubyte')
    images, labels = (read_idx(path, _official_idx(layout, path.name)) for path in (images_path, labels_path))
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise DataError(f'{images_path} holds {images.shape} and {labels_path} {labels.shape}, not N images, N labels')
    return images[..., None], _checked_labels(labels, 10, labels_path)


def _idx_file(layout, folder, name):
    for inner_folder in layout.folders:
        for path in (folder / inner_folder / name, folder / inner_folder / f'{name}.gz'):
            if path.exists():
                return path
    path = folder / layout.folders[0] / f'{name}.gz'
    download(_official_idx(layout, path.name), path)
    return path


def _official_idx(layout, name):
    return OfficialFile(layout.url + name, *layout.sha256[name]) if name in layout.sha256 else None


_DEFLATE_LIMIT = 1032  # the most bytes that a byte of a .gz file can stand for


def read_idx(path, official=None):
    """The unsigned bytes of an idx file, plain or .gz, in the shape that its header gives; DataError if damaged."""
    try:
        with gzip.open(path) if path.suffix == '.gz' else open(path, 'rb') as file:
            return _parse_idx(file, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(damaged(path, error, official)) from error
    except OSError as error:
        raise DataError(f'{path} cannot be read: {error.strerror}') from error


def _parse_idx(file, path):
    magic = file.read(4)
    rank = magic[3] if len(magic) == 4 else 0
    header = file.read(4 * rank)
    if magic[:3] != b'\0\0\x08' or not rank or len(header) < 4 * rank:
        raise DataError(f'{path} is damaged: it does not start like an idx file of bytes')
    shape = [int(n) for n in np.frombuffer(header, '>u4')]
    expected = math.prod(shape)
    if expected > _DEFLATE_LIMIT * path.stat().st_size:
        raise DataError(f'{path} is damaged: its header promises {expected} bytes, more than the file can hold')
    values, num_bytes = np.empty(expected, np.uint8), 0
    while block := file.read(1 << 20):
        if num_bytes + len(block) > expected:
            raise DataError(f'{path} is damaged: more bytes follow a header that promises {expected}')
        values[num_bytes : num_bytes + len(block)] = np.frombuffer(block, np.uint8)
        num_bytes += len(block)
    if num_bytes < expected:
        raise DataError(f'{path} is damaged: {num_bytes} bytes follow a header that promises {expected}')
    return values.reshape(shape)


# SVHN (Netzer et al., 2011), cropped digits: MATLAB files.

_SVHN_URL = 'http://ufldl.stanford.edu/housenumbers/'
_SVHN = {
    'train': OfficialFile(
        f'{_SVHN_URL}train_32x32.mat', '435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8', 182_040_794
    ),
    'test': OfficialFile(
        f'{_SVHN_URL}test_32x32.mat', 'cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b', 64_275_384
    ),
}


def _read_svhn(folder, split):
    name = f'{split}_32x32.mat'
    found = [path for path in (folder / 'svhn' / name, folder / name) if path.exists()]
    path = found[0] if found else folder / 'svhn' / name
    if not found:
        download(_SVHN[split], path)
    import scipy.io

    try:
        content = scipy.io.loadmat(path, variable_names=('X', 'y'))
        pixels, labels = content['X'], content['y'].ravel()
    except Exception as error:  # SciPy raises many kinds for damaged files
        raise DataError(damaged(path, flags.first_line(error), _SVHN[split])) from error
    if pixels.dtype != np.uint8 or pixels.shape != (32, 32, 3, len(labels)) or labels.dtype.kind not in 'iu':
        raise DataError(f'{path} holds X {pixels.dtype} {pixels.shape}, not uint8 [32, 32, 3, N] with N labels y')
    return np.ascontiguousarray(pixels.transpose(3, 0, 1, 2)), _checked_labels(labels, 11, path) % 10


# TinyImageNet: 200 folders of 64×64 JPEGs, decoded once.

TINYIMAGENET = OfficialFile(
    'http://cs231n.stanford.edu/tiny-imagenet-200.zip',
    '6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821',
    248_100_043,
)


def _read_tinyimagenet(folder, split):
    root = folder / 'tiny-imagenet-200'
    split_folder = root / {'train': 'train', 'test': 'val'}[split]
    if not all(path.is_dir() for path in (split_folder, root / 'train')) or (root / 'val' / 'images').exists():
        setup = f'python setup_tinyimagenet.py --datasetfolder {shlex.quote(str(folder))}'
        raise DataError(f'{split_folder} is missing or not sorted: run {setup}')
    classes = sorted(entry.name for entry in os.scandir(root / 'train') if entry.is_dir() and entry.name[0] == 'n')
    paths, labels, fingerprint = _list_image_folders(split_folder, classes)
    if len(classes) != 200 or len(set(labels)) != 200:
        raise DataError(f'{split_folder} holds images of {len(set(labels))} of {len(classes)} classes, not of 200')
    cache = root / f'{split}-{fingerprint}.npy'
    with contextlib.suppress(OSError, ValueError, EOFError):  # no cache, or a damaged one
        images = _mapped(cache)
        if images.shape == (len(paths), 64, 64, 3) and images.dtype == np.uint8:
            return images, labels
    try:
        return _decoded(paths, (64, 64, 3), cache), labels
    except jpegs.DamagedError as error:
        raise DataError(damaged(*error.args)) from error


_DECODED_AT_ONCE = 500


def _list_image_folders(folder, classes):
    """Paths of the JPEGs below each class folder, their labels in the order of `classes`, and a fingerprint of
    names and sizes that changes with the images."""
    paths, labels, fingerprint = [], [], hashlib.sha256()
    for label, name in enumerate(classes):
        inner = folder / name / 'images'
        if not (folder / name).is_dir():
            raise DataError(f'{folder / name} is missing: delete {folder.parent} and run setup_tinyimagenet.py again')
        entries = os.scandir(inner if inner.is_dir() else folder / name)
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.endswith('.JPEG'):
                paths.append(entry.path)
                labels.append(label)
                fingerprint.update(f'{name}/{entry.name} {entry.stat().st_size}\n'.encode())
    return paths, np.array(labels, np.int32), fingerprint.hexdigest()[:16]


def _decoded(paths, shape, cache):
    """Image files as one array uint8 [N, *shape], mapped from `cache`, which is written; in memory where it cannot be.

    Raises jpegs.DamagedError.
    """
    try:
        _write_decoded(paths, shape, cache)
        return _mapped(cache)
    except OSError as error:
        print(f'{cache} could not be written ({error.strerror}): images are decoded at every start', file=sys.stderr)
    images = np.empty((len(paths), *shape), np.uint8)
    starts = range(0, len(paths), _DECODED_AT_ONCE)
    for start, block in zip(starts, _in_blocks(partial(jpegs.decode, shape), paths), strict=True):
        images[start : start + len(block)] = block
    return images


def _mapped(path):
    """The array of an .npy file, mapped; the system is told to read all of it ahead, not each page when it is due."""
    array = np.load(path, mmap_mode='r')
    array.base.madvise(mmap.MADV_WILLNEED)
    return array


def _write_decoded(paths, shape, cache):
    """What np.save writes of the decoded images: the processes that decode write, each its blocks where they belong."""
    with errors.replacing(cache) as unfinished, open(unfinished, 'wb') as file:
        header = {'descr': '|u1', 'fortran_order': False, 'shape': (len(paths), *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        offsets = [file.tell() + i * math.prod(shape) for i in range(0, len(paths), _DECODED_AT_ONCE)]
        for _ in _in_blocks(partial(jpegs.decode_into, unfinished, shape), paths, offsets):
            os.fsync(file.fileno())  # else a power failure could leave black images; the others go on decoding
    for stale in cache.parent.glob(f'{cache.name.split("-")[0]}-*.npy'):
        if stale != cache:
            with contextlib.suppress(OSError):
                stale.unlink()


def _in_blocks(decode, paths, *more):
    """decode(block, ...) for blocks of _DECODED_AT_ONCE paths, in order, on all cores; `more` has a value for each."""
    blocks = [paths[start : start + _DECODED_AT_ONCE] for start in range(0, len(paths), _DECODED_AT_ONCE)]
    progress = tqdm(None, 'decoding', len(paths), unit=' images', disable=None)
    try:
        with progress, _decoders(len(blocks)) as pool:
            for block, decoded in zip(blocks, pool.map(decode, blocks, *more), strict=True):
                yield decoded
                progress.update(len(block))
    except BrokenExecutor as error:
        raise DataError('a process that decodes images ended, perhaps for lack of memory: start again') from error


def _decoders(num_blocks):
    """Processes, as Pillow leaves its threads little to do at once; a few images are not worth starting them."""
    if num_blocks <= 2:
        return ThreadPoolExecutor(1)
    context = multiprocessing.get_context('spawn')
    return ProcessPoolExecutor(min(num_blocks, os.cpu_count()), context, jpegs.end_with_parent)


# TensorFlow Datasets: any image classification set that is prepared in the folder.


def _tfds_dataset(name, folder):
    try:
        import tensorflow_datasets as tfds
    except ModuleNotFoundError as error:
        raise DataError(f'tfds/{name}: there is no {error.name}, run pip install -r requirements.txt') from error
    try:
        builder = _tfds_builder(tfds, name, folder)
    except DataError:
        raise
    except Exception as error:  # TFDS has no error of its own for unknown names and damaged folders
        raise DataError(f'{folder / name} cannot be read by TFDS: {flags.first_line(error)}') from error
    image_key, label_key = (builder.info.supervised_keys or ('image', 'label'))[:2]
    features = builder.info.features
    has_images = image_key in features and isinstance(features[image_key], tfds.features.Image)
    has_classes = label_key in features and isinstance(features[label_key], tfds.features.ClassLabel)
    if not (has_images and has_classes) or 'train' not in builder.info.splits:
        raise DataError(f'tfds/{name} is no image classification set with a split "train"')
    read = partial(_read_tfds, builder, image_key, label_key, folder / name)
    in_colour = features[image_key].shape[-1] == 3
    return Dataset(read, features[label_key].num_classes, mean=None, std=None, augment=in_colour)


def _tfds_builder(tfds, name, folder):
    prepared = sorted((folder / name).glob('**/dataset_info.json'), key=lambda path: path.stat().st_mtime)
    if prepared:
        return tfds.builder_from_directory(prepared[-1].parent)
    if importlib.util.find_spec('tensorflow') is None:
        raise DataError(
            f'{folder / name} holds no prepared data set, and TFDS needs tensorflow to prepare one: where it is '
            f"installed, run tfds.builder('{name}', data_dir='{folder}', file_format='array_record')"
            '.download_and_prepare(), or install tensorflow here'
        )
    builder = tfds.builder(name, data_dir=folder, file_format='array_record')
    builder.download_and_prepare()
    return builder


def _read_tfds(builder, image_key, label_key, folder, split):
    splits = [s for s in ((split,) if split == 'train' else ('test', 'validation')) if s in builder.info.splits]
    if not splits:
        raise DataError(f'{builder.info.full_name} has neither a split "test" nor "validation"')
    try:
        source = builder.as_data_source(splits[0])
    except NotImplementedError as error:
        raise DataError(
            f"{builder.info.full_name} was not prepared with file_format='array_record': {error}"
        ) from error
    try:
        shape, dtype = source[0][image_key].shape, source[0][image_key].dtype
    except (RuntimeError, OSError, ValueError, IndexError) as error:
        raise DataError(f'{folder}: its split "{splits[0]}" is empty or damaged: {flags.first_line(error)}') from error
    if dtype != np.uint8:
        raise DataError(f'{builder.info.full_name} has images of {dtype}, and networks here take uint8')
    images, labels = np.empty((len(source), *shape), np.uint8), np.empty(len(source), np.int32)

    def decode(i):
        try:
            example = source[i]
        except (RuntimeError, OSError, ValueError) as error:
            raise DataError(f'{folder}: image {i} is damaged: {flags.first_line(error)}') from error
        if example[image_key].shape != shape:
            sizes = f'{shape} and {example[image_key].shape}'
            raise DataError(f'{builder.info.full_name} has images of different sizes, {sizes}; one size is needed')
        images[i], labels[i] = example[image_key], example[label_key]

    _for_each(decode, len(source))
    return images, _checked_labels(labels, builder.info.features[label_key].num_classes, builder.info.full_name)


def _for_each(decode, num_images):
    """Calls decode(i) for every image, on all cores, under a progress bar."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        calls = pool.map(decode, range(num_images))
        for _ in tqdm(calls, 'decoding', num_images, unit=' images', leave=False, disable=None):
            pass


# The digits that scikit-learn ships: no file, no network.


def _read_digits(folder, split):
    """1,797 handwritten digits (Alpaydin & Kaynak, 1998), enlarged from 8×8 to 32×32; 1,437 to train, 360 to test."""
    del folder
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.stack([np.asarray(Image.fromarray(p).resize((32, 32), Image.Resampling.BILINEAR)) for p in pixels])
    parts = train_test_split(images[..., None], digits.target, test_size=360, random_state=0, stratify=digits.target)
    images, labels = (parts[0], parts[2]) if split == 'train' else (parts[1], parts[3])
    return images, labels.astype(np.int32)


DATASETS = {
    'cifar10': Dataset(
        partial(_read_cifar, _CIFAR10), 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), augment=True
    ),
    'cifar100': Dataset(
        partial(_read_cifar, _CIFAR100), 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761), augment=True
    ),
    'tinyimagenet': Dataset(_read_tinyimagenet, 200, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), augment=True),
    'svhn': Dataset(_read_svhn, 10, mean=None, std=None, augment=False),
    'mnist': Dataset(partial(_read_idx_set, _MNIST), 10, (0.0,), (1.0,), augment=False),
    'fashion': Dataset(partial(_read_idx_set, _FASHION), 10, (0.0,), (1.0,), augment=False),
    'digits': Dataset(_read_digits, 10, (0.0,), (1.0,), augment=False),
}


# Files: download, check, read.


def download(official, path):
    """Fetches an OfficialFile to `path` with a progress bar; it appears there whole and checked, or not at all.

    Raises a DataError that says which file to put where if the network does not answer within 10 seconds.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with errors.replacing(path) as unfinished:
            sha256 = _fetch(official, unfinished)
            if sha256 != official.sha256:
                raise DataError(f'what {official.url} sent has the SHA-256 {sha256}, not {official.sha256}: not kept')
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, 'reason', None) or error
        raise DataError(
            f'{path} is missing and could not be fetched ({reason}): download {official.url} and put it there'
        ) from error


def _fetch(official, path):
    sha256 = hashlib.sha256()
    with (
        _open_url(official.url) as response,
        open(path, 'wb') as file,
        tqdm(None, path.name, official.num_bytes, unit='B', unit_scale=True, disable=None) as progress,
    ):
        while chunk := response.read(1 << 20):
            file.write(chunk)
            sha256.update(chunk)
            progress.update(len(chunk))
    return sha256.hexdigest()


def _open_url(url, seconds=10):
    """urlopen within `seconds`: its own timeout holds for every address of a host and not for looking them up."""
    answers = queue.SimpleQueue()

    def connect():
        try:
            answers.put(urllib.request.urlopen(url, timeout=seconds))
        except (OSError, http.client.HTTPException) as error:
            answers.put(error)

    threading.Thread(target=connect, daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f'no answer in {seconds} seconds') from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _parse_file(path, parse):
    try:
        with open(path, 'rb') as file:
            return parse(file, path.stat().st_size, path)
    except OSError as error:
        raise DataError(f'{path} cannot be read: {error.strerror}') from error


def _parse_archive(archive, wanted, parse, official):
    """parse(file, num_bytes, where) of members of a .tar.gz, {member: name}, by name; it is read to its end."""
    parts = {}
    try:
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode='r:') as tar:
            for member in tar:
                if member.offset_data + member.size > _CIFAR_LIMIT:
                    raise tarfile.ReadError(f'it goes on beyond {_CIFAR_LIMIT} bytes')
                if member.name in wanted and member.isfile():
                    parts[wanted[member.name]] = parse(
                        tar.extractfile(member), member.size, f'{archive}: {member.name}'
                    )
            while stream.read(1 << 20):  # gzip's checksum is behind the last byte
                if stream.tell() > _CIFAR_LIMIT:
                    raise tarfile.ReadError(f'it goes on beyond {_CIFAR_LIMIT} bytes')
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(damaged(archive, error, official)) from error
    missing = [member for member, name in wanted.items() if name not in parts]
    if missing:
        raise DataError(damaged(archive, f'it holds no {missing[0]}', official))
    return parts


def damaged(path, reason, official=None):
    """The line on a damaged file: its checksum beside the published one, where that is known."""
    message = f'{path} is damaged ({reason})'
    if official is None or Path(path).name != official.url.rsplit('/', 1)[1]:
        return message
    try:
        with open(path, 'rb') as file:
            sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError:
        return f'{path} cannot be read ({reason})'
    return f'{message}: its SHA-256 is {sha256}, the published one {official.sha256}; delete it to download it again'


def _checked_labels(labels, num_classes, where):
    if not len(labels):
        raise DataError(f'{where} holds no images')
    if not 0 <= labels.min() <= labels.max() < num_classes:
        raise DataError(f'{where} has labels from {labels.min()} to {labels.max()}, not 0 to {num_classes - 1}')
    return labels.astype(np.int32)
