"""Batch normalisation and filter response normalisation, with gradients that take few passes over the images."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ops.convolution import at_least_float32

_BATCH_EPSILON, _RESPONSE_EPSILON = 1e-5, 1e-6  # ε of batch and of filter response normalisation


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def batch_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, relu: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (outputs, mean, variance) of batch normalisation, with ReLU after it if `relu` is set.

    The outputs are γ x̂ + β with x̂ = (x − μ) r and r = 1/√(σ² + ε), for each channel over all images and pixels.

    Let d be the loss's gradient with respect to γ x̂ + β. Then the gradient with respect to x is
    γ r (d − mean(d) − x̂ mean(d x̂)). JAX's own gradient takes more passes over the images, where GPUs spend much of
    their time.

    Args:
        x: float [B, H, W, C].
        scale: γ, float [C].
        bias: β, float [C].
        relu: whether ReLU follows.

    Returns:
        The outputs [B, H, W, C] in the precision of x, the mean μ [C] and the variance σ² [C]. μ and σ² are float32 at
        least, and must not be differentiated.
    """
    return _batch_forward(x, scale, bias, relu)[0]


def _batch_forward(x, scale, bias, relu):
    wide = at_least_float32(x)
    mean, mean_square = _means_of_channels(wide, jnp.square(wide))
    var = jnp.maximum(mean_square - jnp.square(mean), 0)
    return (batch_norm_outputs(x, mean, var, scale, bias, relu), mean, var), (x, mean, var, scale, bias)


def _batch_backward(relu, residuals, grads):
    x, mean, var, scale, bias = residuals
    y_grads, r = at_least_float32(grads[0]), lax.rsqrt(var + _BATCH_EPSILON)
    if relu:
        y_grads = jnp.where(batch_norm_outputs(x, mean, var, scale, bias, relu) > 0, y_grads, 0)
    normalised = (x - _channels(mean)) * _channels(r)
    of_bias, of_scale = _means_of_channels(y_grads, y_grads * normalised)
    of_var = jnp.where(var > 0, of_scale, 0)  # a variance that rounding made negative is clamped to 0, a constant
    x_grads = _channels(scale * r) * (y_grads - _channels(of_bias) - normalised * _channels(of_var))
    size = x.size // x.shape[-1]
    return x_grads.astype(x.dtype), (size * of_scale).astype(scale.dtype), (size * of_bias).astype(bias.dtype)


batch_norm.defvjp(_batch_forward, _batch_backward)


def batch_norm_outputs(
    x: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array, relu: bool
) -> jax.Array:
    """Returns γ (x − μ)/√(σ² + ε) + β in the precision of x, with ReLU if `relu`.

    Args:
        x: float [B, H, W, C].
        mean: μ, float [C].
        var: σ², float [C].
        scale: γ, float [C].
        bias: β, float [C].
        relu: whether ReLU follows.
    """
    factor = scale * lax.rsqrt(var + _BATCH_EPSILON)
    y = ((x - _channels(mean)) * _channels(factor) + _channels(bias)).astype(x.dtype)
    return jax.nn.relu(y) if relu else y


def _means_of_channels(*arrays):
    """Returns the per-channel means [C] of each array [B, H, W, C].

    Sums the pixels of each image first, because a GPU would mostly idle with a few hundred sums at once. The barrier is
    needed because XLA would merge the sum over pixels and the sum over images.
    """
    of_images = lax.optimization_barrier([x.sum(axis=(1, 2)) for x in arrays])
    return [totals.sum(axis=0) / (x.size // x.shape[-1]) for x, totals in zip(arrays, of_images, strict=True)]


@jax.custom_vjp
def filter_response_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, threshold: jax.Array) -> jax.Array:
    """Returns max(γ x̂ + β, τ) with x̂ = x r and r = 1/√(ν² + ε), for each channel.

    The mean of x² over an image's pixels is ν². The gradient is written by hand.
    Let d be the gradient with respect to γ x̂ + β. Then the gradient of one image and channel with respect to x is
    γ r (d − x̂ mean(d x̂)). JAX's own gradient takes more passes over the images. On CPUs it makes a gradient of
    ResNet-20 up to a tenth slower.

    Args:
        x: float [B, H, W, C].
        scale: γ, float [C].
        bias: β, float [C].
        threshold: τ, float [C].

    Returns:
        The outputs [B, H, W, C] in the precision of x.
    """
    return _response_forward(x, scale, bias, threshold)[0]


def _response_forward(x, scale, bias, threshold):
    r = lax.rsqrt(jnp.square(at_least_float32(x)).mean(axis=(1, 2), keepdims=True) + _RESPONSE_EPSILON)
    y = _channels(scale) * (x * r) + _channels(bias)
    return jnp.maximum(y, _channels(threshold)).astype(x.dtype), (x, r, scale, bias, threshold)


def _response_backward(residuals, grads):
    x, r, scale, bias, threshold = residuals
    normalised = x * r
    y, lowest = _channels(scale) * normalised + _channels(bias), _channels(threshold)
    above = jnp.where(y > lowest, 1, jnp.where(y == lowest, 0.5, 0)).astype(y.dtype)  # ties share, as in JAX
    y_grads = above * grads

    def over_pixels(values):
        return at_least_float32(values).sum(axis=(1, 2), keepdims=True)

    of_outputs, of_bias, of_scale = over_pixels(grads), over_pixels(y_grads), over_pixels(y_grads * normalised)
    pixels = x.shape[1] * x.shape[2]
    x_grads = _channels(scale) * r * (y_grads - normalised * (of_scale / pixels))
    of_parameters = [of.sum(axis=(0, 1, 2)).astype(scale.dtype) for of in (of_scale, of_bias, of_outputs - of_bias)]
    return x_grads.astype(x.dtype), *of_parameters


filter_response_norm.defvjp(_response_forward, _response_backward)


def _channels(x):
    return x.reshape(1, 1, 1, -1)
