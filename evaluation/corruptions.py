"""Corrupted images: the official CIFAR-10-C and CIFAR-100-C (Hendrycks & Dietterich, 2019), and built-in corruptions.

`corrupt(name, severity, images)` corrupts any images. The built-in corruptions resemble the official ones, but give
other images. Their results cannot be compared with published results. The built-in corruptions are seeded: the same
images in the same order are always corrupted in the same way.
"""

import io
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from readers import files, npy
from readers.files import DataError

SEVERITIES = (1, 2, 3, 4, 5)

# Published results are means over these 15 corruptions. The official folders hold four more, for validation.
BENCHMARK = (
    'gaussian_noise', 'shot_noise', 'impulse_noise', 'defocus_blur', 'glass_blur', 'motion_blur', 'zoom_blur', 'snow',
    'frost', 'fog', 'brightness', 'contrast', 'elastic_transform', 'pixelate', 'jpeg_compression',
)  # fmt: skip


def in_mean(names: Collection[str]) -> list[str]:
    """Returns the corruptions to average over: all built-in corruptions, or those in BENCHMARK from an official folder.

    Returns all names if none of them is in BENCHMARK.
    """
    if set(names) == set(CORRUPTIONS):  # tested first because some built-in corruptions have official names
        return list(names)
    return [name for name in names if name in BENCHMARK] or list(names)


def description(names: Collection[str]) -> str:
    """Returns a caption for the mean over these corruptions, such as `mean of the benchmark's 15 corruptions`."""
    if set(names) == set(CORRUPTIONS):
        return f'mean of the {len(names)} built-in corruptions'
    number, official = len(in_mean(names)), len(BENCHMARK)
    if not set(names) & set(BENCHMARK):
        return f'mean of {number} corruptions, none of them in the benchmark'
    return f"mean of {'' if number == official else f'{number} of '}the benchmark's {official} corruptions"


def corrupt(name: str, severity: int, images: np.ndarray) -> np.ndarray:
    """Returns corrupted images, uint8 [N, H, W, C].

    Leaves an alpha channel as it is. Images with two or four channels have one, the last channel.

    Args:
        name: a key of CORRUPTIONS.
        severity: from 1 to 5.
        images: uint8 [N, H, W, C].
    """
    function, amounts = CORRUPTIONS[name]
    colours = images.shape[-1] - (images.shape[-1] in (2, 4))
    corrupted = function(amounts[severity - 1], images[..., :colours])
    return np.concatenate([corrupted, images[..., colours:]], axis=-1)


def read_official(
    folder: str | Path, shape: tuple[int, ...], labels: np.ndarray
) -> dict[str, Callable[[int], np.ndarray]]:
    """Reads the corruptions of a folder CIFAR-10-C or CIFAR-100-C. Ignores hidden files, such as ._NAME.npy from macOS.

    Args:
        folder: holds NAME.npy, uint8 [5 N, H, W, C], for every corruption, and labels.npy, [5 N].
        shape: [H, W, C], the shape of a test image.
        labels: int [N], the labels of the test images.

    Returns:
        {name: function(severity) -> images uint8 [N, H, W, C]}.

    Raises:
        DataError: a file is missing, is damaged or does not belong to the test images.
    """
    folder = Path(folder)
    if '\0' in str(folder):
        raise DataError(f'{folder} is not a path: it contains a NUL character')
    arrays = [path for path in folder.glob('*.npy') if not files.is_litter(path.name)]
    names = sorted(path.stem for path in arrays if path.name != 'labels.npy')
    if not names:
        raise DataError(f'{folder} holds no corruptions: unpack CIFAR-10-C.tar or CIFAR-100-C.tar there')
    held = npy.load(folder / 'labels.npy')
    if not np.array_equal(held, np.tile(labels, len(SEVERITIES))):
        raise DataError(
            f'{folder / "labels.npy"} does not match the labels of the test images: it is for another data set'
        )
    arrays = {name: npy.load(folder / f'{name}.npy') for name in names}
    for name, array in arrays.items():
        if array.dtype != np.uint8 or array.shape != (len(held), *shape):
            raise DataError(f'{folder / name}.npy holds {array.dtype} {array.shape}, not uint8 {(len(held), *shape)}')
    return {name: partial(_official, array, len(labels)) for name, array in arrays.items()}


def _official(array, num_images, severity):
    return np.array(array[(severity - 1) * num_images : severity * num_images])


def _on_device(function):
    """Returns a corruption of uint8 images [N, H, W, C] that is computed in JAX.

    Args:
        function: function(key, amount, image float32 [H, W, C] in [0, 1]) -> the corrupted image. Each image has its
            own key.
    """

    @jax.jit
    def block(amount, keys, images):
        corrupted = jax.vmap(function, in_axes=(0, None, 0))(keys, amount, images.astype(jnp.float32) / 255)
        return jnp.round(255 * jnp.clip(corrupted, 0, 1)).astype(jnp.uint8)

    def run(amount, images):
        first = jax.random.key(0, impl='threefry2x32')  # the same images for every JAX_DEFAULT_PRNG_IMPL
        keys = jax.vmap(partial(jax.random.fold_in, first))(jnp.arange(len(images)))
        blocks = range(0, len(images), 1000)
        parts = [block(amount, keys[i : i + 1000], images[i : i + 1000]) for i in blocks]
        return np.concatenate([jax.device_get(part) for part in parts])

    return run


def _gaussian_noise(key, deviation, image):
    return image + deviation * jax.random.normal(key, image.shape)


def _shot_noise(key, photons, image):
    """Adds Poisson noise. `photons` is the expected number of photons of a white pixel."""
    return jax.random.poisson(key, photons * image) / photons


def _brightness(key, added, image):
    del key
    return image + added


def _contrast(key, factor, image):
    del key
    mean = image.mean(axis=(0, 1), keepdims=True)
    return mean + factor * (image - mean)


def _blur(key, deviation, image):
    """Blurs with a Gaussian. `deviation` is the standard deviation relative to the sides of the image."""
    del key
    rows, columns = (_gaussian_average(size, deviation * size) for size in image.shape[:2])
    return jnp.einsum('ij,kl,jlc->ikc', rows, columns, image)


def _gaussian_average(size, deviation):
    """Returns weights [size, size]. Row i averages the pixels around pixel i, without pixels beyond the border."""
    distance = jnp.arange(size)[:, None] - jnp.arange(size)[None]
    kernel = jnp.exp(-jnp.square(distance / deviation) / 2)
    return kernel / kernel.sum(axis=1, keepdims=True)


def _haze(key, density, image):
    """Adds a bright veil whose density changes smoothly over the image."""
    coarse = jax.random.uniform(key, (4, 4, 1))
    veil = density * (0.5 + jax.image.resize(coarse, (*image.shape[:2], 1), 'cubic'))
    veil = jnp.clip(veil, 0, 1)
    return (1 - veil) * image + 0.9 * veil


def _occlusion(key, side, image):
    """Covers the image with a grey square at a random place. `side` is relative to the sides of the image."""
    height, width, _ = image.shape
    top, left = jax.random.uniform(key, (2,)) * (1 - side)
    row, column = jnp.mgrid[:height, :width]
    row, column = row / height, column / width
    inside = (row >= top) & (row < top + side) & (column >= left) & (column < left + side)
    return jnp.where(inside[..., None], 0.5, image)


def _with_pillow(function):
    """Returns a corruption of uint8 images [N, H, W, C] from function(amount, PIL image) -> PIL image."""

    def run(amount, images):
        return np.stack([_to_array(function(amount, _to_pillow(image)), image) for image in images])

    return run


def _to_pillow(image):
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _to_array(corrupted, image):
    return np.asarray(corrupted.convert('L' if image.shape[-1] == 1 else 'RGB')).reshape(image.shape)


def _pixelate(share, image):
    small = image.resize([max(1, round(share * n)) for n in image.size], Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.NEAREST)


def _jpeg(quality, image):
    with io.BytesIO() as file:
        image.save(file, 'JPEG', quality=quality)
        return Image.open(file).copy()


CORRUPTIONS = {
    'gaussian_noise': (_on_device(_gaussian_noise), (0.04, 0.07, 0.11, 0.16, 0.22)),
    'shot_noise': (_on_device(_shot_noise), (300, 120, 60, 30, 15)),
    'blur': (_on_device(_blur), (0.015, 0.022, 0.03, 0.042, 0.06)),
    'brightness': (_on_device(_brightness), (0.08, 0.16, 0.24, 0.32, 0.4)),
    'contrast': (_on_device(_contrast), (0.75, 0.55, 0.4, 0.28, 0.18)),
    'pixelate': (_with_pillow(_pixelate), (0.8, 0.65, 0.5, 0.4, 0.3)),
    'jpeg': (_with_pillow(_jpeg), (60, 40, 25, 15, 8)),
    'haze': (_on_device(_haze), (0.15, 0.25, 0.35, 0.45, 0.55)),
    'occlusion': (_on_device(_occlusion), (0.2, 0.3, 0.4, 0.5, 0.6)),
}  # fmt: skip
