"""Image sets: the table of data sets, splits, and training batches (shuffled, augmented and normalised).

Images are uint8 [N, H, W, C] and labels are int32 [N]. A missing, damaged or unsuitable data set raises a DataError.
The message names the file and says what to do.
"""

import functools
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ops import sharding
from readers import cifar, digits, files, idx, image_folder, npz, python_files, svhn, tfds, tinyimagenet
from readers.files import DataError

# On the device: the batches of an epoch, augmentation, normalisation.


class Feed:
    """The training batches of a run.

    The images are on every device, or they are streamed: they stay on the host, and each batch is sent when it is
    needed. Both ways give the same batches. The batches of an epoch depend only on the key and the epoch.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, batch_size: int, key: jax.Array, mesh: jax.sharding.Mesh,
        normalise: Callable, *, augmented: bool, streamed: bool, with_seeds: bool = False,
    ) -> None:  # fmt: skip
        """Sends the images to every device, unless they are streamed.

        Args:
            images: uint8 [N, H, W, C], in memory or mapped from a file.
            labels: int32 [N].
            batch_size: B, the examples in a batch.
            key: the key of the run's batches.
            mesh: the devices. A batch is sharded over them if the shards are equal.
            normalise: a function of images uint8 [B, H, W, C], applied after augmentation.
            augmented: whether to crop and flip images at random.
            streamed: whether the images stay on the host.
            with_seeds: whether batches have seeds of dropout.
        """
        self._key, self._mesh = sharding.replicate(key, mesh), mesh
        self._num_images, self._batch_size = len(images), batch_size
        self._normalise, self._augmented, self._streamed = normalise, augmented, streamed
        self._with_seeds = with_seeds
        self._arrays = (images, labels) if streamed else sharding.replicate((images, labels), mesh)

    def batches(self, epoch: int, done: int = 0) -> Iterator[tuple[jax.Array, ...]]:
        """Yields the batches of an epoch: (outputs of `normalise`, labels int32 [B]), with seeds uint32 [B] as third.

        Drops the last examples of the random order if they do not fill a batch.

        Args:
            epoch: 0, 1, ...
            done: the number of batches to skip.
        """
        epoch, step = sharding.replicate((np.int32(epoch), np.int32(done)), self._mesh)
        order, key = _begin_epoch(self._key, epoch, self._num_images, self._batch_size)
        for arrays in self._sent(np.array(order)[done:]) if self._streamed else [self._arrays] * (len(order) - done):
            batch, step = _take(
                arrays, None if self._streamed else order, key, step, self._augmented, self._normalise, self._with_seeds
            )
            yield batch

    def _sent(self, batches):
        """Yields the examples of each batch, given the indices int [S, B]. Sends two batches ahead."""
        with ThreadPoolExecutor(1) as reader:
            place = partial(sharding.place_rows, self._arrays, mesh=self._mesh)
            ahead = [reader.submit(place, indices) for indices in batches[:2]]
            for i in range(len(batches)):
                ahead += [reader.submit(place, indices) for indices in batches[i + 2 : i + 3]]
                yield ahead.pop(0).result()


@partial(jax.jit, static_argnames=('num_images', 'batch_size'))
def _begin_epoch(key, epoch, num_images, batch_size):
    """Returns the order of an epoch's images, int32 [S, B], and the key of its augmentation."""
    order_key, augment_key = jax.random.split(jax.random.fold_in(key, epoch))
    return shuffled_batches(order_key, num_images, batch_size), augment_key


@partial(jax.jit, static_argnames=('augmented', 'normalise', 'with_seeds'))
def _take(arrays, order, key, step, augmented, normalise, with_seeds):
    """Returns the batch of a step, and step + 1. `arrays` holds all examples, or only the batch if `order` is None."""
    if order is not None:
        chosen = sharding.shard(order[step])
        arrays = jax.tree.map(lambda x: sharding.shard(x[chosen]), arrays)
    images, labels = arrays
    step_key = jax.random.fold_in(key, step)
    if augmented:
        images = augment(step_key, images)
    # 2, because `augment` splits the key into 0 and 1
    seeds = (jax.random.bits(jax.random.fold_in(step_key, 2), labels.shape),) if with_seeds else ()
    return (normalise(images), labels, *seeds), step + 1


def shuffled_batches(key: jax.Array, num_images: int, batch_size: int) -> jax.Array:
    """Returns the indices of every batch of an epoch, in random order, int32 [num_images // batch_size, batch_size]."""
    steps = num_images // batch_size
    return jax.random.permutation(key, num_images)[: steps * batch_size].reshape(steps, batch_size)


def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Returns random crops of images, each flipped left to right with probability ½.

    Args:
        key: a JAX random key.
        images: uint8 [B, H, W, C], not normalised. They are padded by 4 black pixels on every side.

    Returns:
        The crops, uint8 [B, H, W, C].
    """
    pad = 4
    crop_key, flip_key = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corners = jax.random.randint(crop_key, (len(images), 2), 0, 2 * pad + 1)
    crop = lambda image, corner: jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])  # noqa: E731
    cropped = jax.vmap(crop)(padded, corners)
    flipped = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
    return jnp.where(flipped, cropped[:, :, ::-1], cropped)


def normalise(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Returns (images / 255 − mean) / std.

    Args:
        images: uint8 [B, H, W, C].
        mean, std: one value per channel, on the scale [0, 1].

    Returns:
        float32 [B, H, W, C].
    """
    mean, std = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, -1) for x in (mean, std))
    return (images.astype(jnp.float32) / 255 - mean) / std


# On the host: the data sets.


class Dataset(NamedTuple):
    """Describes how an image set is read, augmented and normalised.

    Attributes:
        read: read(folder, 'train' or 'test') -> images uint8 [N, H, W, C] and labels int32 [N].
        num_classes: the number of classes. Labels are 0 to num_classes − 1.
        mean, std: one value per channel, on the scale [0, 1], or None to measure them on the training images.
        augment: whether to crop and flip training images at random.
        class_names: the name of each class, None if the classes have only numbers.
    """

    read: Callable
    num_classes: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    augment: bool
    class_names: tuple[str, ...] | None = None


def dataset(name: str, folder: str | Path, image_size: int | None = None) -> Dataset:
    """Returns the description of a data set. Its `read` takes only the split. Raises CodeError and DataError.

    Args:
        name: a name in DATASETS, 'tfds/NAME', 'folder:PATH', 'npz:FILE' or 'FILE.py:FUNCTION'. If PATH or FILE is
            missing, as on another machine, a path with the same last part in `folder` is taken.
        folder: the folder of the data sets. Decoded images of 'folder:PATH' are kept there.
        image_size: the height and width of the images of 'folder:PATH', None for the size of the files.
    """
    folder = Path(folder)
    if '\0' in str(folder):
        raise DataError(f'{folder} is not a path: it contains a NUL character')
    kind, _, path = name.partition(':')
    if python_files.is_name(name):
        row = _own(name, folder)
    elif kind == 'folder':
        opened = image_folder.open_set(_located(path, folder), image_size, folder / 'decoded')
        names = opened.class_names
        row = Dataset(partial(image_folder.read, opened), len(names), None, None, augment=True, class_names=names)
    elif kind == 'npz':
        opened = npz.open_set(_located(path, folder))
        row = Dataset(partial(npz.read, opened), opened.num_classes, None, None, augment=opened.channels == 3)
    elif name.startswith('tfds/'):
        opened = tfds.open_set(name.removeprefix('tfds/'), folder)
        row = Dataset(partial(tfds.read, opened), opened.num_classes, None, None, augment=opened.channels == 3)
    elif name in DATASETS:
        row = DATASETS[name]._replace(read=partial(DATASETS[name].read, folder))
    else:
        raise DataError(f'unknown data set {name!r} (choose from {", ".join(DATASETS)})')
    return row._replace(read=partial(_read, row.read, row.num_classes, name, folder))


def _located(path, folder):
    elsewhere = folder / Path(path).name
    return elsewhere if elsewhere.exists() and not os.path.exists(path) else Path(path)


def _own(name, folder):
    """Returns the row of a user's function, FILE.py:FUNCTION. Reads each split once."""
    function = python_files.load(name)

    @functools.cache
    def read(split):
        with python_files.one_error(name):
            images, labels = function(str(folder), split)
            return np.asanyarray(images), np.asanyarray(labels)

    names = getattr(function, 'class_names', None)
    images, labels = _checked(*read('train'), len(names) if names else None, name)
    num_classes = len(names) if names else int(labels.max()) + 1
    names = tuple(map(str, names)) if names else None
    return Dataset(read, num_classes, None, None, augment=images.shape[3] == 3, class_names=names)


def _read(read, num_classes, name, folder, split):
    try:
        return _checked(*read(split), num_classes, name)
    except OSError as error:
        raise DataError(f'{error.filename or folder} cannot be read: {error.strerror or error}') from error


def _checked(images, labels, num_classes, name):
    """Returns images as uint8 [N, H, W, C] and labels as int32 [N]. Raises DataError."""
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        raise DataError(f'{name}: images are {images.dtype} {list(images.shape)}, not uint8 [N, H, W, C]')
    if labels.dtype.kind not in 'iu' or labels.shape != images.shape[:1]:
        raise DataError(f'{name}: labels are {labels.dtype} {list(labels.shape)}, not whole numbers [{len(images)}]')
    return images, files.checked_labels(labels, num_classes or int(labels.max(initial=0)) + 1, name)


def describe(dataset: Dataset, train_images: np.ndarray, train_labels: np.ndarray) -> dict:
    """Returns the properties of an image set that a run needs, as plain values: sizes, per-channel mean and std.

    The CRC-32 of the training labels detects other images, and the same images in another order. A constant channel
    gets std 1 and a warning, because a division by 0 would not be finite.

    Args:
        dataset: the row of the image set.
        train_images: uint8 [N, H, W, C].
        train_labels: int [N].
    """
    mean, std = channel_statistics(train_images) if dataset.mean is None else (dataset.mean, dataset.std)
    for channel in (i for i, deviation in enumerate(std) if deviation < _CONSTANT):
        print(f'warning: channel {channel} of the images is constant and is left unscaled', file=sys.stderr)
    std = [1.0 if deviation < _CONSTANT else deviation for deviation in std]
    return {
        'num_train': len(train_images),
        **describe_classes(dataset),
        'image_shape': list(train_images.shape[1:]),
        'mean': list(mean),
        'std': list(std),
        'labels_crc32': zlib.crc32(np.ascontiguousarray(train_labels)),
    }


def describe_classes(dataset: Dataset) -> dict:
    """Returns the part of a description that needs no images: the number and the names of the classes."""
    names = dataset.class_names
    return {'num_classes': dataset.num_classes, 'class_names': list(names) if names else None}


_CONSTANT = 1e-9  # a smaller std is a rounding error: one pixel in 10^13 that is one level brighter gives a larger std


def require_images_of_run(found: dict, description: dict, folder: str | Path, run: str | Path) -> None:
    """Raises a DataError if a folder does not hold the images of a run.

    Args:
        found: the description of the images in the folder, or a part of it.
        description: the description in the configuration of the run.
        folder: the folder of the data sets, for the message.
        run: the run folder, for the message.
    """
    if any(description.get(name, value) != value for name, value in found.items()):
        raise DataError(
            f'{folder} does not hold the images that {run} was trained on: name another with --datasetfolder'
        )


def require_shape(images: np.ndarray, split: str, shape: Sequence[int]) -> None:
    """Raises a DataError if the images of a split have another shape [H, W, C] than the training images."""
    if list(images.shape[1:]) != list(shape):
        found, expected = ('×'.join(map(str, s)) for s in (images.shape[1:], shape))
        raise DataError(f'the {split} images are {found}, but the training images are {expected}: make them equal')


def read_train(dataset: Dataset, flags: dict) -> tuple[tuple, tuple | None]:
    """Reads the training images and labels of a run in two parts: (rest, held out).

    The held-out part is None without --validation. Raises DataError.
    """
    train = subset('--trainimages', flags['trainimages'], *dataset.read('train'))
    return hold_out(*train, flags['validation']) if flags['validation'] else (train, None)


def subset(
    flag: str, size: int | None, images: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Returns a random subset of images and labels, which does not depend on the seed of a run.

    Args:
        flag: the flag that sets `size`, for the message.
        size: the number of images, or None for all.
        images: uint8 [N, H, W, C].
        labels: int32 [N].

    Raises:
        DataError: `size` is larger than N.
    """
    if size is None:
        return images, labels
    if size > len(images):
        raise DataError(f'{flag} {size} exceeds the {len(images)} available images')
    chosen = np.sort(_fixed_order(images)[:size])
    return images[chosen], labels[chosen]


def hold_out(images: np.ndarray, labels: np.ndarray, fraction: float) -> tuple[tuple, tuple]:
    """Splits training images and labels into two parts, (rest, held out). A random fraction is held out.

    The parts do not depend on the seed of a run. Otherwise a run could be tuned on images that another run trained on.

    Args:
        images: uint8 [N, H, W, C].
        labels: int32 [N].
        fraction: the held-out share of the images, in (0, 1).

    Raises:
        DataError: a part would be empty.
    """
    order = _fixed_order(images)
    num_held = round(fraction * len(images))
    if not 0 < num_held < len(images):
        raise DataError(
            f'--validation {fraction:g} holds out {num_held} of {len(images)} training images: choose another fraction'
        )
    held, rest = np.sort(order[:num_held]), np.sort(order[num_held:])
    return (images[rest], labels[rest]), (images[held], labels[held])


def _fixed_order(images):
    return np.random.default_rng(0).permutation(len(images))


_MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}


def resized(images: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Returns images resized to H' × W' pixels and converted to C' channels, as far as needed.

    Images with 1 to 4 channels are grey, grey with alpha, RGB and RGBA. A new alpha channel is opaque.

    Args:
        images: uint8 [N, H, W, C].
        shape: (H', W', C').

    Returns:
        uint8 [N, H', W', C'].

    Raises:
        DataError: the shapes differ, and C or C' is not 1 to 4.
    """
    if images.shape[1:] == tuple(shape):
        return images
    if not (images.shape[3] in _MODES and shape[2] in _MODES):
        raise DataError(f'images with {images.shape[3]} channels cannot be converted to {shape[2]} channels')
    outputs = np.empty((len(images), *shape), np.uint8)
    for i, image in enumerate(images):
        image = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).convert(_MODES[shape[2]])
        output = image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
        outputs[i] = np.asarray(output).reshape(shape)
    return outputs


def check_description(description: object, where: object) -> None:
    """Raises a DataError if a description cannot be a result of `describe`.

    Args:
        description: the content of a file.
        where: the file, for the message.
    """

    def whole(value):
        return isinstance(value, int) and 0 < value < 2**31

    def finite(values):
        return isinstance(values, list) and all(isinstance(x, float) and math.isfinite(x) for x in values)

    names = ('num_train', 'num_classes', 'image_shape', 'mean', 'std')
    held = {name: description.get(name) if isinstance(description, dict) else None for name in names}
    num_train, num_classes, shape, mean, std = held.values()
    sizes = isinstance(shape, list) and len(shape) == 3 and all(whole(n) for n in (*shape, math.prod(shape)))
    channels = finite(mean) and finite(std) and sizes and len(mean) == len(std) and len(mean) in (1, shape[2])
    channels = channels and min(std) > 0
    if not (whole(num_train) and whole(num_classes) and channels):
        raise DataError(f'{where} does not describe images that train.py could have read: {held}')
    names = description.get('class_names') or [''] * num_classes
    if not isinstance(names, list) or len(names) != num_classes or not all(isinstance(name, str) for name in names):
        raise DataError(f'{where} does not name {num_classes} classes: {names}')


def channel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Returns the per-channel means and standard deviations of uint8 [N, H, W, C], on the scale [0, 1]."""
    values = np.arange(256) / 255
    counts = np.zeros((images.shape[-1], 256), np.int64)
    for start in range(0, len(images), 1000):  # bincount makes its input eight times as large
        for channel, count in enumerate(counts):
            count += np.bincount(images[start : start + 1000, ..., channel].ravel(), minlength=256)
    means = [np.average(values, weights=count) for count in counts]
    variances = [np.average((values - m) ** 2, weights=count) for m, count in zip(means, counts, strict=True)]
    return [float(m) for m in means], [float(np.sqrt(v)) for v in variances]


DATASETS = {
    'cifar10': Dataset(
        partial(cifar.read, cifar.CIFAR10), 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), augment=True,
        class_names=cifar.CIFAR10.class_names,
    ),
    'cifar100': Dataset(
        partial(cifar.read, cifar.CIFAR100), 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761), augment=True,
        class_names=cifar.CIFAR100.class_names,
    ),
    'tinyimagenet': Dataset(tinyimagenet.read, 200, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), augment=True),
    'svhn': Dataset(svhn.read, 10, mean=None, std=None, augment=False, class_names=svhn.CLASS_NAMES),
    'svhn_extra': Dataset(
        partial(svhn.read, extra=True), 10, mean=None, std=None, augment=False, class_names=svhn.CLASS_NAMES
    ),
    'mnist': Dataset(partial(idx.read, idx.MNIST), 10, (0.0,), (1.0,), False, idx.MNIST.class_names),
    'fashion': Dataset(partial(idx.read, idx.FASHION), 10, (0.0,), (1.0,), False, idx.FASHION.class_names),
    'kmnist': Dataset(partial(idx.read, idx.KMNIST), 10, (0.0,), (1.0,), False, idx.KMNIST.class_names),
    'emnist': Dataset(partial(idx.read, idx.EMNIST), 47, (0.0,), (1.0,), False, idx.EMNIST.class_names),
    'emnist_letters': Dataset(
        partial(idx.read, idx.EMNIST_LETTERS), 26, (0.0,), (1.0,), False, idx.EMNIST_LETTERS.class_names
    ),
    'digits': Dataset(digits.read, 10, (0.0,), (1.0,), augment=False, class_names=digits.CLASS_NAMES),
}  # fmt: skip
