"""Convolutions and their gradients against JAX's own, under `vmap` too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import convolution


def jax_convolution(x, kernel, stride, padding):
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


@pytest.mark.parametrize('padding', ['SAME', 'VALID'])
@pytest.mark.parametrize(
    ('pixels', 'size', 'stride', 'features'),
    [(8, 3, 1, 4), (8, 3, 2, 4), (9, 3, 2, 4), (8, 1, 2, 4), (9, 5, 1, 4), (7, 2, 3, 4), (8, 3, 1, 60), (9, 3, 2, 90)],
)
def test_convolution_gradient(pixels, size, stride, features, padding, x64):
    """Value and gradient are JAX's own, also of kernels that outweigh the images."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, pixels, pixels + 1, 3))
    kernel = jax.random.normal(keys[1], (size, size, 3, features))
    assert convolution._outweighs(kernel, x) == (features > 4)

    expected, expected_gradient = jax.vjp(lambda x, k: jax_convolution(x, k, stride, padding), x, kernel)
    value, gradient = jax.vjp(lambda x, k: convolution.convolve(x, k, (stride, stride), padding), x, kernel)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    cotangent = jax.random.normal(keys[2], value.shape)
    for ours, jaxs in zip(gradient(cotangent), expected_gradient(cotangent), strict=True):
        np.testing.assert_allclose(ours, jaxs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(('images', 'largest_block'), [(50, 30), (50, 7), (53, 30)])
@pytest.mark.parametrize('channels', [3, 64])
@pytest.mark.parametrize('stride', [1, 2])
def test_convolution_gradient_of_blocks(images, largest_block, channels, stride, monkeypatch, x64):
    """Blocks of 25 images, of 5 and of one, by convolutions and by products: JAX's gradient, in bfloat16 too."""
    monkeypatch.setattr(convolution, '_NUMBERS_OF_A_BLOCK', largest_block * 6 * 7 * channels)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (images, 6, 7, channels))
    kernel = jax.random.normal(keys[1], (3, 3, channels, 4))
    cotangent = jax.random.normal(keys[2], (images, -(-6 // stride), -(-7 // stride), 4))

    def gradient(convolve, *arrays):
        return jax.jit(lambda x, k, cotangent: jax.vjp(convolve, x, k)[1](cotangent))(*arrays)

    def ours(x, kernel):
        return convolution.convolve(x, kernel, (stride, stride), 'SAME')

    expected = gradient(lambda x, k: jax_convolution(x, k, stride, 'SAME'), x, kernel, cotangent)
    for found, jaxs in zip(gradient(ours, x, kernel, cotangent), expected, strict=True):
        np.testing.assert_allclose(found, jaxs, rtol=1e-9, atol=1e-12)
    coarse = [array.astype(jnp.bfloat16) for array in (x, kernel, cotangent)]
    wide = gradient(ours, *(array.astype(jnp.float64) for array in coarse))
    for found, exact in zip(gradient(ours, *coarse), wide, strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float64), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize('axes', [(0, None), (None, 0), (0, 0)])
@pytest.mark.parametrize(
    ('size', 'stride', 'channels', 'padding'),
    [
        (3, 1, (16, 20), 'SAME'), (3, 1, (16, 16), 'VALID'), (3, 1, (3, 4), 'SAME'), (3, 2, (16, 16), 'SAME'),
        (1, 2, (4, 5), 'SAME'), (2, 3, (3, 2), 'VALID'),
    ],
)  # fmt: skip
def test_convolutions_of_several_kernels(size, stride, channels, padding, axes, x64):
    """`vmap` over kernels, images or both: values and gradients are those of JAX's own convolution."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (5, 2, 8, 9, channels[0]))
    kernel = jax.random.normal(keys[1], (5, size, size, *channels))
    x, kernel = (a if axis == 0 else a[0] for a, axis in zip((x, kernel), axes, strict=True))

    def results(convolve):
        def of_one(x, kernel):
            value, gradient = jax.vjp(convolve, x, kernel)
            return value, gradient(jnp.sin(value))

        return jax.vmap(of_one, axes)(x, kernel)

    expected = results(lambda x, k: jax_convolution(x, k, stride, padding))
    found = results(lambda x, k: convolution.convolve(x, k, (stride, stride), padding))
    for ours, jaxs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, jaxs, rtol=1e-9, atol=1e-12)
