"""Batch normalisation and filter response normalisation, with gradients that take few passes over the images."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ops.convolution import at_least_float32

_BATCH_EPSILON, _RESPONSE_EPSILON = 1e-5, 1e-6  # ε of batch and of filter response normalisation


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def batch_norm(x, scale, bias, relu):
    """γ x̂ + β with x̂ = (x − μ) r and r = 1/√(σ² + ε), of each channel over all images and pixels; then ReLU if `relu`.

    x: [B, H, W, C]; scale γ and bias β: [C]. Returns the outputs [B, H, W, C] in the precision of x, and the mean μ and
    the variance σ² [C], float32 at least; these two are not to be differentiated. If d is the loss's gradient with
    respect to γ x̂ + β, that with respect to x is γ r (d − mean(d) − x̂ mean(d x̂)). JAX's own takes more passes over the
    images, where GPUs spend much of their time.
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
    of_var = jnp.where(var > 0, of_scale, 0)  # rounding can make the variance negative, and then it is a constant
    x_grads = _channels(scale * r) * (y_grads - _channels(of_bias) - normalised * _channels(of_var))
    size = x.size // x.shape[-1]
    return x_grads.astype(x.dtype), (size * of_scale).astype(scale.dtype), (size * of_bias).astype(bias.dtype)


batch_norm.defvjp(_batch_forward, _batch_backward)


def batch_norm_outputs(x, mean, var, scale, bias, relu):
    factor = scale * lax.rsqrt(var + _BATCH_EPSILON)
    y = ((x - _channels(mean)) * _channels(factor) + _channels(bias)).astype(x.dtype)
    return jax.nn.relu(y) if relu else y


def _means_of_channels(*arrays):
    """Of arrays [B, H, W, C] over images and pixels: a list of [C].

    An image's pixels are summed first: a GPU would be idle for the most part with a few hundred sums at once. Without
    the barrier XLA makes one sum of the two.
    """
    of_images = lax.optimization_barrier([x.sum(axis=(1, 2)) for x in arrays])
    return [totals.sum(axis=0) / (x.size // x.shape[-1]) for x, totals in zip(arrays, of_images, strict=True)]


@jax.custom_vjp
def filter_response_norm(x, scale, bias, threshold):
    """max(γ x̂ + β, τ) with x̂ = x r, r = 1/√(ν² + ε) and ν² the mean of x² over an image's pixels, for each channel.

    x: [B, H, W, C]; scale γ, bias β and threshold τ: [C]. Returns [B, H, W, C] in the precision of x.
    Its gradient is written out, as sums for each image from which all others follow: of one image and channel it is
    γ r (d − x̂ mean(d x̂)) by x, if d is that by γ x̂ + β. JAX's own takes more passes over the images, and a gradient of
    ResNet-20 up to a tenth longer on CPUs.
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
    above = jnp.where(y > lowest, 1, jnp.where(y == lowest, 0.5, 0)).astype(y.dtype)  # equal ones share, as in JAX
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
