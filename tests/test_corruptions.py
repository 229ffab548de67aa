"""Built-in corruptions: reproducible, stronger with severity, of the same shape as the images. Official files."""

import jax
import numpy as np
import pytest
from PIL import Image

import data
from evaluation import corruptions

EXTRA = ['gaussian_blur', 'saturate', 'spatter', 'speckle_noise']


def smooth_images(n, size, channels):
    """Returns blurred noise, which is smooth like photographs."""
    noise = np.random.default_rng(0).integers(0, 256, (n, size // 4, size // 4, channels), np.uint8)
    return data.resized(noise, (size, size, channels))


def distance(images, others):
    return np.abs(images.astype(float) - others).mean()


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('name', corruptions.CORRUPTIONS)
def test_built_in_corruptions(name, channels):
    images = smooth_images(20, 32, channels)
    corrupted = [corruptions.corrupt(name, severity, images) for severity in corruptions.SEVERITIES]
    distances = [distance(images, c) for c in corrupted]
    assert all(c.shape == images.shape and c.dtype == np.uint8 for c in corrupted)
    assert distances[0] > 0.5 and distances == sorted(distances) and distances[-1] > 1.5 * distances[0]
    np.testing.assert_array_equal(corruptions.corrupt(name, 3, images), corrupted[2])


@pytest.mark.parametrize('channels', [2, 4])
@pytest.mark.parametrize('name', corruptions.CORRUPTIONS)
def test_an_alpha_channel_stays(name, channels):
    """The colours are corrupted as in images without the channel."""
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 24, channels), np.uint8)
    corrupted = corruptions.corrupt(name, 4, images)
    np.testing.assert_array_equal(corrupted[..., -1], images[..., -1])
    np.testing.assert_array_equal(corrupted[..., :-1], corruptions.corrupt(name, 4, images[..., :-1]))


@pytest.mark.parametrize('name', ['gaussian_noise', 'shot_noise'])
def test_corruptions_are_the_same_whatever_the_default_generator(name):
    images = smooth_images(3, 16, 3)
    expected = corruptions.corrupt(name, 2, images)
    with jax.default_prng_impl('rbg'):
        np.testing.assert_array_equal(corruptions.corrupt(name, 2, images), expected)


@pytest.mark.parametrize(
    ('names', 'averaged', 'description'),
    [
        (corruptions.CORRUPTIONS, list(corruptions.CORRUPTIONS), 'mean of the 9 built-in corruptions'),
        (sorted([*corruptions.BENCHMARK, *EXTRA]), sorted(corruptions.BENCHMARK), "mean of the benchmark's 15 corrup"),
        (['fog', 'gaussian_blur', 'contrast'], ['fog', 'contrast'], "mean of 2 of the benchmark's 15 corruptions"),
        (EXTRA, EXTRA, 'mean of 4 corruptions, none of them in the benchmark'),
    ],
    ids=['built-in', 'official', 'some', 'extra'],
)
def test_means_are_over_the_benchmark(names, averaged, description):
    assert corruptions.in_mean(names) == averaged and corruptions.description(names).startswith(description)


def test_an_image_is_corrupted_the_same_in_any_block():
    images = smooth_images(5, 32, 1)
    many = np.concatenate([images, np.repeat(images[:1], 1200, axis=0)])
    first = corruptions.corrupt('gaussian_noise', 3, many)[:5]
    np.testing.assert_array_equal(first, corruptions.corrupt('gaussian_noise', 3, images))


def test_noise_has_the_deviation_that_it_should():
    images = np.full((100, 32, 32, 1), 128, np.uint8)
    noise = corruptions.corrupt('gaussian_noise', 1, images) / 255 - 128 / 255
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 0.04], atol=5e-4)
    shot = corruptions.corrupt('shot_noise', 3, images) / 255
    np.testing.assert_allclose([shot.mean(), shot.var()], [0.502, 0.502 / 60], rtol=0.02)


def test_official_files(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (15, 32, 32, 3), np.uint8), np.tile([3, 1, 2], 5)
    np.save(tmp_path / 'fog.npy', images)
    np.save(tmp_path / 'labels.npy', labels.astype(np.uint8))
    for name in ('._fog.npy', '._labels.npy', '.DS_Store'):
        (tmp_path / name).write_bytes(b'\0\5\26\7\0\2\0\0Mac OS X        ')
    functions = corruptions.read_official(tmp_path, (32, 32, 3), np.array([3, 1, 2]))
    assert list(functions) == ['fog']
    np.testing.assert_array_equal(functions['fog'](severity=4), images[9:12])

    def refused(message, shape=(32, 32, 3), labels=(3, 1, 2)):
        with pytest.raises(data.DataError, match=message):
            corruptions.read_official(tmp_path, shape, np.array(labels))

    refused(r'labels\.npy does not match the labels of the test images', labels=(3, 1, 9))
    refused(r'labels\.npy does not match the labels of the test images', labels=(3, 1, 2, 0))
    refused(r'fog\.npy holds uint8 \(15, 32, 32, 3\), not uint8 \(15, 28, 28, 1\)', shape=(28, 28, 1))
    np.save(tmp_path / 'fog.npy', np.array([print], object), allow_pickle=True)
    refused(r'fog\.npy is not an \.npy file of numbers or text')
    (tmp_path / 'fog.npy').write_bytes(b'PK\x03\x04')
    refused(r'fog\.npy is not an \.npy file of numbers or text')
    np.save(tmp_path / 'fog.npy', images)
    (tmp_path / '._fog.npy').write_bytes(b'Mac OS X')
    assert list(corruptions.read_official(tmp_path, (32, 32, 3), np.array([3, 1, 2]))) == ['fog']
    (tmp_path / 'fog.npy').unlink()
    (tmp_path / 'labels.npy').unlink()
    refused('holds no corruptions')


def test_resized_images():
    colour = smooth_images(2, 32, 3)
    grey = data.resized(colour, (28, 28, 1))
    assert grey.shape == (2, 28, 28, 1) and data.resized(colour, (32, 32, 3)) is colour
    expected = Image.fromarray(colour[1]).convert('L').resize((28, 28), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(grey[1, ..., 0], expected)
    assert (np.ptp(data.resized(grey, (32, 32, 3)), axis=3) == 0).all()
