"""ResNet-18, ResNet-20 with filter response normalisation, LeNet-5 and an MLP, as Flax linen modules.

    model = create('resnet20', num_classes=10)
    variables = model.init(key, images, train=False)
    logits, updates = model.apply(variables, images, train=True, mutable=['batch_stats'])
    logits = model.apply(variables, images, train=False)

images: float [B, H, W, C]; logits: float [B, num_classes]. The collections are `params` and, with batch
normalisation, `batch_stats`. Layers, initial distributions and running averages follow the reference code
of Möllenhoff & Khan (ICLR 2023). Only LeNet-5's head differs: in the reference code it has num_classes − 1 outputs.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import errors
from ops import convolution, normalisation, pooling


class ModelError(errors.UserError):
    """An unknown network, or a network that does not fit the images or the evaluation."""


def truncated_fan_in(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Draws from a standard normal truncated at ±2, divided by √fan_in.

    The standard deviation is 0.88/√fan_in. It is not corrected to 1/√fan_in.

    Args:
        key: a JAX random key.
        shape: [..., inputs, outputs]. The product of all dimensions except the last is fan_in.
        dtype: of the drawn array.
    """
    return _truncated_normal(key, shape, dtype) / math.sqrt(math.prod(shape[:-1]))


def he_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Draws from a truncated normal with the standard deviation √(2/fan_in) (He et al., 2015).

    Draws a standard normal truncated at ±2, then rescales it. Returns the same numbers as
    jax.nn.initializers.he_normal. The arguments are as in `truncated_fan_in`.
    """
    variance = jnp.asarray(2 / math.prod(shape[:-1]), dtype)
    return _truncated_normal(key, shape, dtype) * (jnp.sqrt(variance) / _TRUNCATED_STD)


_TRUNCATED_STD = 0.87962566103423978  # of a standard normal truncated at ±2


def _truncated_normal(key, shape, dtype):
    """Draws a flat array and reshapes it, which gives the same numbers.

    XLA on CPUs would otherwise spend seconds on unrolling loops over short dimensions.
    """
    return jax.random.truncated_normal(key, -2, 2, (math.prod(shape),), dtype).reshape(shape)


class ResNet18(nn.Module):
    """ResNet-18 (He et al., 2016) for small images, with a 3×3 stem without pooling, and batch normalisation."""

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = _ConvNorm(64, relu=True, name='stem')(images, train)
        x = _Stage18(64, stride=1, name='stage1')(x, train)
        x = _Stage18(128, stride=2, name='stage2')(x, train)
        x = _Stage18(256, stride=2, name='stage3')(x, train)
        x = _Stage18(512, stride=2, name='stage4')(x, train)
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros, name='head')(x)


class _Stage18(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        x = _Block18(self.features, self.stride, name='block1')(x, train)
        return _Block18(self.features, name='block2')(x, train)


class _Block18(nn.Module):
    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x, train):
        y = _ConvNorm(self.features, stride=self.stride, relu=True, name='layer1')(x, train)
        y = _ConvNorm(self.features, name='layer2')(y, train)
        if x.shape != y.shape:
            x = _ConvNorm(self.features, kernel_size=1, stride=self.stride, name='shortcut')(x, train)
        return nn.relu(x + y)


class _ConvNorm(nn.Module):
    features: int
    kernel_size: int = 3
    stride: int = 1
    relu: bool = False

    @nn.compact
    def __call__(self, x, train):
        x = _conv(self.features, self.kernel_size, self.stride, truncated_fan_in, use_bias=False)(x)
        return BatchNorm(relu=self.relu, name='norm')(x, train)


class ResNet20(nn.Module):
    """ResNet-20 with filter response normalisation (FRN).

    The threshold of FRN is the only non-linearity: none follows the sums of the residual blocks.
    """

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        _require_size('resnet20', images, 29, 'for its 8×8 pool')
        x = _ConvFRN(16, name='stem')(images)
        x = _Stage20(16, stride=1, name='stage1')(x)
        x = _Stage20(32, stride=2, name='stage2')(x)
        x = _Stage20(64, stride=2, name='stage3')(x)
        x = nn.avg_pool(x, (8, 8), strides=(8, 8))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(self.num_classes, kernel_init=he_normal, name='head')(x)


class _Stage20(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x):
        x = _Block20(self.features, self.stride, name='block1')(x)
        x = _Block20(self.features, name='block2')(x)
        return _Block20(self.features, name='block3')(x)


class _Block20(nn.Module):
    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        y = _ConvFRN(self.features, stride=self.stride, name='layer1')(x)
        y = _ConvFRN(self.features, name='layer2')(y)
        if x.shape != y.shape:
            x = _ConvFRN(self.features, kernel_size=1, stride=self.stride, name='shortcut')(x)
        return x + y


class _ConvFRN(nn.Module):
    features: int
    kernel_size: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        x = _conv(self.features, self.kernel_size, self.stride, he_normal)(x)
        return FilterResponseNorm(name='frn')(x)


class LeNet(nn.Module):
    """LeNet-5 with 6, 16 and 120 channels of 5×5 weights, ReLU and overlapping 3×3 pools."""

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        _require_size('lenet', images, 15, 'for its three 3×3 pools')
        x = images
        for i, features in enumerate((6, 16, 120), start=1):
            x = nn.relu(_conv(features, 5, 1, truncated_fan_in, name=f'conv{i}')(x))
            x = pooling.max_pool(x, size=3, stride=2)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(64, kernel_init=truncated_fan_in, name='dense1')(x))
        return nn.Dense(self.num_classes, kernel_init=truncated_fan_in, name='dense2')(x)


class MLP(nn.Module):
    """Fully connected layers with ELU in between. All biases start at 0.05."""

    num_classes: int
    features: tuple[int, ...] = (500, 300)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = images.reshape(images.shape[0], -1)
        bias_init = nn.initializers.constant(0.05)
        for i, features in enumerate((*self.features, self.num_classes), start=1):
            x = x if i == 1 else nn.elu(x)
            x = nn.Dense(features, kernel_init=truncated_fan_in, bias_init=bias_init, name=f'dense{i}')(x)
        return x


MODELS = {'resnet18': ResNet18, 'resnet20': ResNet20, 'mlp': MLP, 'lenet': LeNet}


def create(name: str, num_classes: int) -> nn.Module:
    """Returns the network called `name` in MODELS, with `num_classes` logits. Raises ModelError for other names."""
    if name not in MODELS:
        raise ModelError(f'unknown model {name!r} (choose from {", ".join(MODELS)})')
    return MODELS[name](num_classes)


def apply(
    model: nn.Module, params: Any, batch_stats: Any, images: jax.Array, train: bool, dtype: Any = None
) -> tuple[jax.Array, Any]:
    """Runs a network with weights and images cast to `dtype`.

    Args:
        model: the network.
        params: the weights.
        batch_stats: the batch statistics, {} for a network without batch normalisation.
        images: float [B, H, W, C].
        train: whether to normalise by the batch's statistics and to update `batch_stats`.
        dtype: the precision of the computation. None casts nothing.

    Returns:
        The logits [B, num_classes] and the new batch statistics. Both are float32 at least, whatever `dtype` is,
        because normalisation takes averages in float32.
    """
    params, images = jax.tree.map(lambda x: x.astype(dtype or x.dtype), (params, images))
    variables = {'params': params, 'batch_stats': batch_stats}
    logits, updates = model.apply(variables, images, train=train, mutable=['batch_stats'] if train else [])
    return convolution.at_least_float32(logits), updates.get('batch_stats', batch_stats)


def with_features(apply: Callable) -> Callable:
    """Returns a function that takes the arguments of `apply` and returns (outputs of `apply`, features).

    The features are the inputs, float [B, F], of the last nn.Dense that `apply` calls.
    """

    def applied(*args):
        calls = []
        with _dense_calls(calls):
            outputs = apply(*args)
        return outputs, convolution.at_least_float32(calls[-1][1])

    return applied


def last_layer(apply: Callable, *args: Any) -> tuple[str, ...]:
    """Returns the path in `params` of the last nn.Dense that apply(*args) calls, such as ('head',).

    Only traces `apply`, and computes nothing. Raises a ModelError if the layer has no bias, or if `apply` calls no
    nn.Dense.
    """
    calls = []
    with _dense_calls(calls):
        jax.eval_shape(lambda *args: apply(*args), *args)  # a new function, because JAX caches traces
    if not calls or not calls[-1][2]:
        raise ModelError('--laplace needs a network whose last layer is an nn.Dense with a bias')
    return calls[-1][0]


def _dense_calls(calls):
    """Returns a context in which every call of an nn.Dense appends (path, inputs, use_bias) to the list `calls`."""

    def intercept(function, inputs, options, context):
        if isinstance(context.module, nn.Dense) and context.method_name == '__call__':
            calls.append((context.module.path, inputs[0], context.module.use_bias))
        return function(*inputs, **options)

    return nn.intercept_methods(intercept)


def _require_size(name, images, pixels, reason):
    height, width = images.shape[1:3]
    if min(height, width) < pixels:
        raise ModelError(f'{name} needs images of {pixels}×{pixels} pixels or more {reason}, not {height}×{width}')


_DECAY = 0.9  # of the running averages of batch normalisation


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy, 2015) with zero-debiased running averages.

    The running average after t updates is Σ 0.9^(t−i) x_i / Σ 0.9^(t−i), so the first update replaces the initial
    value. Flax's own running average starts at mean 0 and variance 1 and forgets them slowly.
    `batch_stats` holds the debiased averages `mean` [C] and `var` [C], and the number of updates `count` []. All are
    floats.

    Attributes:
        relu: whether to apply ReLU to the outputs.
    """

    relu: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        shape = x.shape[-1:]
        scale = self.param('scale', nn.initializers.ones, shape)
        bias = self.param('bias', nn.initializers.zeros, shape)
        running_mean = self.variable('batch_stats', 'mean', jnp.zeros, shape)
        running_var = self.variable('batch_stats', 'var', jnp.ones, shape)
        count = self.variable('batch_stats', 'count', jnp.zeros, ())

        if not train:
            return normalisation.batch_norm_outputs(x, running_mean.value, running_var.value, scale, bias, self.relu)
        y, mean, var = normalisation.batch_norm(x, scale, bias, self.relu)
        if not self.is_initializing():
            count.value += 1
            weight = (1 - _DECAY) / (1 - _DECAY**count.value)
            running_mean.value += weight * (mean - running_mean.value)
            running_var.value += weight * (var - running_var.value)
        return y


class FilterResponseNorm(nn.Module):
    """Filter response normalisation with a thresholded linear unit (Singh & Krishnan, 2020)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:]
        scale = self.param('scale', nn.initializers.ones, shape)
        bias = self.param('bias', nn.initializers.zeros, shape)
        threshold = self.param('threshold', nn.initializers.zeros, shape)
        return normalisation.filter_response_norm(x, scale, bias, threshold)


def _conv(features, kernel_size, stride, kernel_init, use_bias=True, name='conv'):
    return nn.Conv(
        features,
        (kernel_size, kernel_size),
        (stride, stride),
        use_bias=use_bias,
        kernel_init=kernel_init,
        conv_general_dilated=_flax_convolution,
        name=name,
    )


def _flax_convolution(x, kernel, strides, padding, **defaults):
    """Calls `convolve` from nn.Conv. Drops dilation and groups, because no network here uses them."""
    del defaults
    return convolution.convolve(x, kernel, strides, padding)
