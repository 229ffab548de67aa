"""The networks, as Flax linen modules.

ResNet-18, with pre-activation too, wide ResNets, ResNet-20 with filter response normalisation, LeNet-5 and an MLP.

    model = create('resnet20', num_classes=10)
    variables = model.init(key, images, train=False)
    logits, updates = model.apply(variables, images, train=True, mutable=['batch_stats'])
    logits = model.apply(variables, images, train=False)

images: float [B, H, W, C]; logits: float [B, num_classes]. The collections are `params` and, with batch
normalisation, `batch_stats`. Layers, initial distributions and running averages follow the reference code
of Möllenhoff & Khan (ICLR 2023). Only LeNet-5's head differs: in the reference code it has num_classes − 1 outputs.
The reference code has no PreActResNet.
"""

import contextlib
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
from flax import linen as nn

import errors
from ops import convolution, normalisation, pooling
from readers import python_files


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


def fan_out_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Draws from a normal with the standard deviation √(2/fan_out), without truncation (He et al., 2015).

    The product of all dimensions except the inputs is fan_out. Draws a flat array as `_truncated_normal` does. Up to
    rounding, returns the numbers of jax.nn.initializers.variance_scaling(2, 'fan_out', 'normal'). The arguments are as
    in `truncated_fan_in`.
    """
    fan_out = math.prod(shape) // shape[-2]
    return jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape) * math.sqrt(2 / fan_out)


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


class PreActResNet(nn.Module):
    """A residual network with pre-activation for small images: normalisation and ReLU come before each convolution.

    The 3×3 stem has no pooling and no normalisation. All stages except the first halve height and width. Batch
    normalisation, ReLU and the mean over pixels precede the head (He et al., "Identity Mappings in Deep Residual
    Networks", 2016).

    Initial weights follow the published code. Convolutions are from `fan_out_normal`. The weights of the head are
    uniform between ±1/√fan_in, its bias is 0. Batch normalisation has scale 1 and shift 0.

    Attributes:
        num_classes: the number of logits.
        stem: channels of the stem.
        widths: channels of each stage.
        blocks: residual blocks in each stage, with two convolutions each.
    """

    num_classes: int
    stem: int
    widths: tuple[int, ...]
    blocks: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = _conv(self.stem, 3, 1, fan_out_normal, use_bias=False, name='stem')(images)
        for i, features in enumerate(self.widths, start=1):
            x = _PreActStage(features, self.blocks, stride=1 if i == 1 else 2, name=f'stage{i}')(x, train)
        x = BatchNorm(relu=True, name='norm')(x, train).mean(axis=(1, 2))
        uniform_fan_in = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
        return nn.Dense(self.num_classes, kernel_init=uniform_fan_in, name='head')(x)


class _PreActStage(nn.Module):
    features: int
    blocks: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        for i in range(1, self.blocks + 1):
            x = _PreActBlock(self.features, self.stride if i == 1 else 1, name=f'block{i}')(x, train)
        return x


class _PreActBlock(nn.Module):
    """Adds two convolutions to a shortcut: the block's input, or a 1×1 convolution of the activated input.

    The convolution is used where the shape changes.
    """

    features: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        conv = partial(_conv, self.features, kernel_init=fan_out_normal, use_bias=False)
        activated = BatchNorm(relu=True, name='norm1')(x, train)
        y = conv(kernel_size=3, stride=self.stride, name='conv1')(activated)
        y = conv(kernel_size=3, stride=1, name='conv2')(BatchNorm(relu=True, name='norm2')(y, train))
        if x.shape != y.shape:
            x = conv(kernel_size=1, stride=self.stride, name='shortcut')(activated)
        return x + y


def preactresnet18(num_classes: int) -> PreActResNet:
    """Returns ResNet-18 with pre-activation (He et al., 2016).

    The shortcut of the first block is the stem's output. In the paper, normalisation and ReLU are applied to it.
    """
    return PreActResNet(num_classes, stem=64, widths=(64, 128, 256, 512), blocks=2)


def wide_resnet(num_classes: int, depth: int = 28, width: int = 10) -> PreActResNet:
    """Returns the wide ResNet WRN-depth-width (Zagoruyko & Komodakis, 2016) without dropout.

    The published code draws the initial scales of batch normalisation uniformly between 0 and 1. Here they are 1.

    Args:
        num_classes: the number of logits.
        depth: 6n + 4, with n of at least 1. n is the number of blocks in each of the three stages.
        width: the factor of the stages' 16, 32 and 64 channels.

    Raises:
        ModelError: if no n gives the depth.
    """
    if depth < 10 or depth % 6 != 4:
        raise ModelError(f'wrn{depth}x{width}: the depth of a wide ResNet is 6n + 4, such as 28')
    return PreActResNet(num_classes, stem=16, widths=(16 * width, 32 * width, 64 * width), blocks=depth // 6)


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


MODELS = {
    'resnet18': ResNet18, 'preactresnet18': preactresnet18, 'wrn28x10': wide_resnet, 'resnet20': ResNet20, 'mlp': MLP,
    'lenet': LeNet,
}  # fmt: skip
WIDE_RESNET = 'wrn([1-9][0-9]{0,3})x([1-9][0-9]{0,3})'  # a regular expression of depth and width


def create(name: str, num_classes: int) -> nn.Module:
    """Returns the network called `name`, with `num_classes` logits. Raises CodeError and ModelError.

    Args:
        name: a name in MODELS, wrnDxK for any wide ResNet, or FILE.py:CLASS for a user's network. FILE.py runs only
            if `readers.python_files.allow` was called for it.
        num_classes: the number of logits.
    """
    if python_files.is_name(name):
        return _own(name, num_classes)
    if name in MODELS:
        return MODELS[name](num_classes)
    wide = re.fullmatch(WIDE_RESNET, name)
    if not wide:
        raise ModelError(f'unknown model {name!r} (choose from {", ".join(MODELS)}, wrnDxK)')
    return wide_resnet(num_classes, *map(int, wide.groups()))


def _own(name, num_classes):
    """Returns the network of FILE.py:CLASS. Raises CodeError and ModelError."""
    create = python_files.load(name)
    with python_files.one_error(name):
        model = create(num_classes=num_classes)
    if not isinstance(model, nn.Module):
        raise ModelError(f'{name} is {type(model).__name__}, not a network: name a class of flax.linen.Module')
    try:
        hash(model)
    except TypeError as error:
        raise ModelError(f'{name} has an attribute that is not hashable: use tuples instead of lists') from error
    return model


def require_fits(name: str, model: nn.Module, image_shape: tuple[int, int, int], num_classes: int) -> bool:
    """Returns whether a user's network has dropout. Raises CodeError and ModelError. Only traces the network.

    Args:
        name: FILE.py:CLASS.
        model: the network.
        image_shape: (H, W, C).
        num_classes: K. The network must return logits [B, K].
    """
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)

    def logits(variables, images):
        return model.apply(variables, images, train=True, mutable=['batch_stats'])[0]

    with python_files.one_error(name):
        variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
        unknown = variables.keys() - {'params', 'batch_stats'}
        if unknown or 'params' not in variables:
            raise ModelError(f'{name} has the collections {sorted(variables)}: use params and batch_stats')
        try:
            shape, has_dropout = jax.eval_shape(logits, variables, images).shape, False
        except flax.errors.InvalidRngError:
            shape = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, train=True)[0], images).shape
            has_dropout = True
    if shape != (2, num_classes):
        raise ModelError(f'{name} returns logits {list(shape)} for 2 images, not [2, {num_classes}]')
    return has_dropout


def apply(
    model: nn.Module, params: Any, batch_stats: Any, images: jax.Array, train: bool, dtype: Any = None,
    dropout_seed: jax.Array | None = None,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Runs a network with weights and images cast to `dtype`.

    Args:
        model: the network.
        params: the weights.
        batch_stats: the batch statistics, {} for a network without batch normalisation.
        images: float [B, H, W, C].
        train: whether to normalise by the batch's statistics and to update `batch_stats`.
        dtype: the precision of the computation. None casts nothing.
        dropout_seed: uint32 [], the seed of dropout, None for a network without dropout or to leave dropout out. If
            `train` is False, all images get the same mask, so that a seed stands for one thinned network.

    Returns:
        The logits [B, num_classes] and the new batch statistics. Both are float32 at least, whatever `dtype` is,
        because normalisation takes averages in float32.
    """
    params, images = jax.tree.map(lambda x: x.astype(dtype or x.dtype), (params, images))
    variables = {'params': params, 'batch_stats': batch_stats}
    rngs = {} if dropout_seed is None else {'dropout': jax.random.key(dropout_seed, impl='threefry2x32')}
    thinned = nn.intercept_methods(_thinned) if rngs and not train else contextlib.nullcontext()
    with thinned:
        mutable = ['batch_stats'] if train else []
        logits, updates = model.apply(variables, images, train=train, mutable=mutable, rngs=rngs)
    return convolution.at_least_float32(logits), updates.get('batch_stats', batch_stats)


def _thinned(function, inputs, options, context):
    """Calls a layer. Dropout drops the same values of every image, also in evaluation."""
    layer = context.module
    if not isinstance(layer, nn.Dropout) or context.method_name != '__call__':
        return function(*inputs, **options)
    (x,) = inputs
    shared = (0, *(dim % x.ndim for dim in layer.broadcast_dims))
    shape = [1 if dim in shared else size for dim, size in enumerate(x.shape)]
    kept = jax.random.bernoulli(layer.make_rng(layer.rng_collection), 1 - layer.rate, shape)
    return jnp.where(kept, x / (1 - layer.rate), 0)


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
        raise ModelError('the last layer is not an nn.Dense with a bias, which --laplace and --init need')
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
    size, strides = (kernel_size, kernel_size), (stride, stride)
    return Conv(features, size, strides, use_bias=use_bias, kernel_init=kernel_init, name=name)


def Conv(*args: Any, **options: Any) -> nn.Conv:  # noqa: N802, because it stands for a class
    """Returns an nn.Conv that is fast on CPUs too, where XLA's gradient of a convolution is slow within loops."""
    return nn.Conv(*args, conv_general_dilated=_flax_convolution, **options)


def _flax_convolution(x, kernel, strides, padding, **defaults):
    """Calls `convolve` from nn.Conv, or JAX's own convolution if there are dilation or groups."""
    dilations = (*defaults['lhs_dilation'], *defaults['rhs_dilation'])
    if set(dilations) != {1} or defaults['feature_group_count'] != 1 or x.ndim != 4 or not isinstance(padding, str):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **defaults)
    return convolution.convolve(x, kernel, strides, padding)
