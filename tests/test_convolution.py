"""Convolutions and their gradients against JAX's own, under `vmap` too."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ops import convolution


def jax_convolution(x, kernel, stride, padding):
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


@pytest.mark.parametrize('few_channels', [True, False])
@pytest.mark.parametrize('padding', ['SAME', 'VALID'])
@pytest.mark.parametrize(
    ('pixels', 'size', 'stride', 'features'),
    [
        (8, 3, 1, 4), (8, 3, 2, 4), (9, 3, 2, 4), (8, 1, 2, 4), (9, 5, 1, 4), (8, 4, 1, 4), (7, 2, 3, 4), (8, 3, 1, 60),
        (9, 3, 2, 90),
    ],
)  # fmt: skip
def test_convolution_gradient(pixels, size, stride, features, padding, few_channels, platform, monkeypatch, x64):
    """Value and gradient equal JAX's, also for kernels that outweigh the images."""
    if not few_channels:
        monkeypatch.setattr(convolution, '_FEWEST_CHANNELS_OF_PRODUCTS', 3)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, pixels, pixels + 1, 3))
    kernel = rng.standard_normal((size, size, 3, features))
    assert convolution._outweighs(x, kernel) == (features > 4)

    theirs = partial(jax_convolution, stride=stride, padding=padding)
    cotangent = rng.standard_normal(jax.eval_shape(theirs, x, kernel).shape)
    expected, *expected_gradients = value_and_gradients(theirs, x, kernel, cotangent)
    ours = partial(convolution.convolve, strides=(stride, stride), padding=padding)
    value, *gradients = value_and_gradients(ours, x, kernel, cotangent)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for found, exact in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(('images', 'largest_block'), [(50, 30), (55, 7), (53, 30), (3, 0)])
@pytest.mark.parametrize(
    ('kind', 'channels', 'stride'),
    [('convolution', 3, 1), ('convolution', 3, 2), ('rows', 64, 1), ('products', 64, 2), ('tiles', 5, 1)],
)
def test_convolution_over_blocks(images, largest_block, kind, channels, stride, monkeypatch, x64):
    """Values and gradients equal JAX's, in bfloat16 too.

    Blocks hold 25 images, 5 images, 25 images and a rest, or one image. Tiles of 2×2 pixels extend beyond these images.
    """
    for name in ('_VALUES_OF_A_BLOCK', '_VALUES_OF_A_SMALL_BLOCK'):
        monkeypatch.setattr(convolution, name, largest_block * 7 * 9 * channels)
    for name in ('_FEWEST_CHANNELS_OF_TILES', '_FEWEST_CHANNELS_OF_KERNEL_GRADIENTS_IN_TILES'):
        monkeypatch.setattr(convolution, name, 3 if kind == 'tiles' else 100)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((images, 7, 9, channels))
    kernel = rng.standard_normal((3, 3, channels, 4))
    cotangent = rng.standard_normal((images, -(-7 // stride), -(-9 // stride), 4))

    def ours(x, kernel):
        return convolution.convolve(x, kernel, (stride, stride), 'SAME')

    expected = value_and_gradients(lambda x, k: jax_convolution(x, k, stride, 'SAME'), x, kernel, cotangent)
    assert convolution._suits_tiles(x, kernel, (stride, stride), 'SAME') == (kind == 'tiles')
    for found, exact in zip(value_and_gradients(ours, x, kernel, cotangent), expected, strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-9, atol=1e-12)
    coarse = [array.astype(jnp.bfloat16) for array in (x, kernel, cotangent)]
    wide = value_and_gradients(ours, *(array.astype(jnp.float64) for array in coarse))
    for found, exact in zip(value_and_gradients(ours, *coarse), wide, strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float64), exact, rtol=2**-8, atol=1e-4)


@partial(jax.jit, static_argnums=0)
def value_and_gradients(convolve, x, kernel, cotangent):
    value, gradients = jax.vjp(convolve, x, kernel)
    return value, *gradients(cotangent)


@pytest.mark.parametrize(('pixels', 'in_tiles'), [((3, 8), True), ((2, 11), False)])
def test_kernel_that_outweighs_tiles(pixels, in_tiles, x64):
    """Values and gradients equal JAX's for an image of 1/12 of the kernel (24 pixels) and for a smaller one (22)."""
    rng = np.random.default_rng(0)
    x, cotangent = rng.standard_normal((2, 1, *pixels, 32))
    kernel = rng.standard_normal((3, 3, 32, 32))
    assert convolution._outweighs(x, kernel) and convolution._suits_tiles(x, kernel, (1, 1), 'SAME') == in_tiles
    expected = value_and_gradients(partial(jax_convolution, stride=1, padding='SAME'), x, kernel, cotangent)
    found = value_and_gradients(partial(convolution.convolve, strides=(1, 1), padding='SAME'), x, kernel, cotangent)
    for ours, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-9, atol=1e-12)


def test_rounding_of_tiles(x64):
    """The errors of tiles in float32, against float64, are less than twice XLA's errors."""
    rng = np.random.default_rng(0)
    x, cotangent = rng.standard_normal((2, 4, 8, 8, 128))
    kernel = rng.standard_normal((3, 3, 128, 128))
    assert convolution._suits_tiles(x, kernel, (1, 1), 'SAME')
    exact = value_and_gradients(partial(jax_convolution, stride=1, padding='SAME'), x, kernel, cotangent)
    narrow = [array.astype(jnp.float32) for array in (x, kernel, cotangent)]
    theirs = value_and_gradients(partial(jax_convolution, stride=1, padding='SAME'), *narrow)
    ours = value_and_gradients(partial(convolution.convolve, strides=(1, 1), padding='SAME'), *narrow)
    for found, plain, wide in zip(ours, theirs, exact, strict=True):
        assert 0 < np.linalg.norm(found - wide) < 2 * np.linalg.norm(plain - wide)


@pytest.mark.parametrize('axes', [(0, None), (None, 0), (0, 0)])
@pytest.mark.parametrize(
    ('size', 'stride', 'channels', 'padding'),
    [
        (3, 1, (16, 20), 'SAME'), (3, 1, (32, 32), 'SAME'), (3, 1, (16, 16), 'VALID'), (3, 1, (3, 4), 'SAME'),
        (3, 2, (16, 16), 'SAME'), (1, 2, (4, 5), 'SAME'), (2, 3, (3, 2), 'VALID'),
    ],
)  # fmt: skip
def test_convolutions_of_several_kernels(size, stride, channels, padding, axes, x64):
    """Values and gradients equal JAX's under `vmap` over kernels, images or both."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 2, 8, 9, channels[0]))
    kernel = rng.standard_normal((5, size, size, *channels))
    x, kernel = (a if axis == 0 else a[0] for a, axis in zip((x, kernel), axes, strict=True))

    def results(convolve):
        def of_one(x, kernel):
            value, gradient = jax.vjp(convolve, x, kernel)
            return value, gradient(jnp.sin(value))

        return jax.jit(jax.vmap(of_one, axes))(x, kernel)

    expected = results(lambda x, k: jax_convolution(x, k, stride, padding))
    found = results(lambda x, k: convolution.convolve(x, k, (stride, stride), padding))
    for ours, jaxs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, jaxs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ('size', 'stride', 'padding'), [(3, 1, 'SAME'), (3, 2, 'SAME'), (4, 1, 'VALID'), (2, 3, 'VALID'), (1, 2, 'SAME')]
)
def test_symbolic_batch_size(size, stride, padding, x64):
    """Values and gradients equal JAX's for several batch sizes of one exported function."""
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((5, 8, 9, 3)), rng.standard_normal((size, size, 3, 4))
    theirs = partial(jax_convolution, stride=stride, padding=padding)
    cotangent = rng.standard_normal(jax.eval_shape(theirs, x, kernel).shape)
    ours = partial(convolution.convolve, strides=(stride, stride), padding=padding)
    shapes = jax.export.symbolic_args_specs((x, kernel, cotangent), ('b, ...', None, 'b, ...'))
    exported = jax.export.export(value_and_gradients, platforms=('cpu', 'cuda'))(ours, *shapes)
    for n in (1, 2, 5):
        expected = value_and_gradients(theirs, x[:n], kernel, cotangent[:n])
        for found, exact in zip(exported.call(x[:n], kernel, cotangent[:n]), expected, strict=True):
            np.testing.assert_allclose(found, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ('axes', 'shape', 'symbolic'),
    [
        ((0, None), (5, 2, 8, 9, 3), 'b, ...'),
        ((None, 0), (5, 8, 9, 3), 'b, ...'),
        ((0, 0), (4, 5, 8, 9, 3), '4, b, ...'),
    ],
)
def test_symbolic_batch_size_under_vmap(axes, shape, symbolic, x64):
    """Values equal JAX's under `vmap` over images, kernels or both, with a symbolic number of images."""
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal(shape), rng.standard_normal((4, 3, 3, 3, 60))
    kernel = kernel if axes[1] == 0 else kernel[0]
    ours = jax.jit(jax.vmap(partial(convolution.convolve, strides=(1, 1), padding='SAME'), axes))
    shapes = jax.export.symbolic_args_specs((x, kernel), (symbolic, None))
    found = jax.export.export(ours, platforms=('cpu', 'cuda'))(*shapes).call(x, kernel)
    expected = jax.vmap(partial(jax_convolution, stride=1, padding='SAME'), axes)(x, kernel)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
