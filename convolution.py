"""2-D convolutions that are fast inside of loops on CPUs, and with several kernels at once on GPUs.

    y = convolve(x, kernel, strides=(1, 1), padding='SAME')

x: [B, H, W, C]; kernel: [h, w, C, D]; strides: two ints; padding: 'SAME' or 'VALID'; y: [B, H', W', D].
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
from jax import lax

import devices


def nhwc_convolution(x, kernel, strides, padding, lhs_dilation=None, rhs_dilation=None, groups=1):
    dimension_numbers = ('NHWC', 'HWIO', 'NHWC')
    return lax.conv_general_dilated(
        x, kernel, strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count=groups
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x, kernel, strides, padding):
    """A 2-D convolution with a gradient of its own.

    JAX's permutes dimension numbers instead of arrays. XLA's CPU backend has no fast code for those inside
    of loops, where it is some twenty times slower (jax-ml/jax issue 12868). `vmap` over kernels would turn the
    gradient by them into convolutions with windows as large as the image, see `_with_own_kernels`. Arrays: as above.
    """
    return _forward(tuple(strides), padding)(x, kernel)


def _convolve_forward(x, kernel, strides, padding):
    return convolve(x, kernel, strides, padding), (x, kernel)


def _convolve_backward(strides, padding, residuals, grads):
    return _backward(tuple(strides), padding)(*residuals, grads)


convolve.defvjp(_convolve_forward, _convolve_backward)


@cache
def _forward(strides, padding):
    """A function of x and kernel with a rule for `vmap`."""

    @jax.custom_batching.custom_vmap
    def forward(x, kernel):
        formulation = _by_product if _outweighs(kernel, x) else nhwc_convolution
        return formulation(x, kernel, strides, padding)

    @forward.def_vmap
    def of_several(number, batched, x, kernel):
        if not batched[1]:
            return _in_one_batch(partial(forward, kernel=kernel), x), True
        return _with_own_kernels(*_stacked(number, batched, x, kernel), strides, padding), True

    return forward


@cache
def _backward(strides, padding):
    """A function of x, kernel and the outputs' gradient, that returns those of both, with a rule for `vmap`."""

    @jax.custom_batching.custom_vmap
    def backward(x, kernel, grads):
        if _outweighs(kernel, x):
            _, gradients = jax.vjp(partial(_by_product, strides=strides, padding=padding), x, kernel)
            return gradients(grads)
        x_grads = _input_gradient(x, grads, kernel, strides, padding)
        return x_grads, _kernel_gradient(x, grads, kernel, strides, padding)

    @backward.def_vmap
    def of_several(number, batched, x, kernel, grads):
        shared = kernel
        x, kernel, grads = _stacked(number, batched, x, kernel, grads)
        outputs = partial(_with_own_kernels, strides=strides, padding=padding)
        _, by_kernel = jax.vjp(partial(outputs, x, most_channels=_MOST_CHANNELS_OF_KERNELS), kernel)
        if batched[1]:
            _, by_input = jax.vjp(lambda x: outputs(x, kernel), x)
            (x_grads,) = by_input(grads)
        else:
            x_grads = _in_one_batch(partial(_input_gradient, kernel=shared, strides=strides, padding=padding), x, grads)
        return (x_grads, *by_kernel(grads)), (True, True)

    return backward


def _outweighs(kernel, x):
    """Whether a kernel is so much larger than its images that copies of it, which convolutions and their gradients
    make on CPUs, would cost more than the windows that a product of matrices needs."""
    return kernel.size > 2 * x.size


def _input_gradient(x, grads, kernel, strides, padding):
    """The gradient by x: a convolution with strides turned into dilations, padded to the size that it must have."""
    x_padding = [(k - 1 - p, n + p - r) for n, k, p, r in _sides(x, grads, kernel, strides, padding)]
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    return nhwc_convolution(grads, flipped, (1, 1), x_padding, lhs_dilation=strides)


def _kernel_gradient(x, grads, kernel, strides, padding):
    """The gradient by the kernel: a convolution as for the input; the batch is what is summed over.

    On CPUs XLA's convolution takes several times as long where its images leave a core's caches: there the gradient is
    summed over blocks of images, and is a product of matrices for each weight, the pixels under it and `grads`, if
    there are channels enough for that.
    """
    channels, features = kernel.shape[2:]

    def by_convolution(x, grads):
        kernel_padding = [(p, r + k - 1 - n - p) for n, k, p, r in _sides(x, grads, kernel, strides, padding)]
        batch_last, batch_third = x.transpose(3, 1, 2, 0), grads.transpose(1, 2, 0, 3)
        kernel_grads = nhwc_convolution(batch_last, batch_third, (1, 1), kernel_padding, rhs_dilation=strides)
        return kernel_grads.transpose(1, 2, 0, 3)

    def by_products(x, grads):
        rows = grads.reshape(-1, features)
        products = [pixels.reshape(-1, channels).T @ rows for pixels in _under_weights(x, kernel, strides, padding)]
        return jnp.stack(products).reshape(kernel.shape)

    of_block = by_convolution if channels < _FEWEST_CHANNELS_OF_PRODUCTS else by_products
    on_cpus = partial(devices.sum_over_shares, partial(_sum_over_blocks, of_block, kernel.shape))
    return lax.platform_dependent(x, grads, cpu=on_cpus, default=by_convolution)


def _sum_over_blocks(function, shape, *arrays):
    """The sum, added up in float32, of function(*blocks), of this shape, over equal blocks of images [B, H, W, C].

    A block of the first array has _IMAGES_OF_A_BLOCK and _NUMBERS_OF_A_BLOCK at most, or one image.
    """
    largest = max(1, min(_IMAGES_OF_A_BLOCK, _NUMBERS_OF_A_BLOCK // arrays[0][0].size))
    size = max(n for n in range(1, largest + 1) if len(arrays[0]) % n == 0)
    dtype = jnp.promote_types(arrays[0].dtype, jnp.float32)

    def add(total, blocks):
        return total + function(*(x.astype(dtype) for x in blocks)), None

    total, _ = lax.scan(add, jnp.zeros(shape, dtype), [x.reshape(-1, size, *x.shape[1:]) for x in arrays])
    return total.astype(arrays[0].dtype)


_IMAGES_OF_A_BLOCK, _NUMBERS_OF_A_BLOCK, _FEWEST_CHANNELS_OF_PRODUCTS = 25, 420_000, 64


def _sides(x, grads, kernel, strides, padding):
    """Of height and width: the pixels, those of the kernel, the padding before and the reach of the strides."""
    low = [before for before, _ in lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)]
    reach = [stride * (n - 1) + 1 for stride, n in zip(strides, grads.shape[1:3], strict=True)]
    return list(zip(x.shape[1:3], kernel.shape[:2], low, reach, strict=True))


def _stacked(number, batched, *arrays):
    return [
        x if is_batched else jnp.broadcast_to(x, (number, *x.shape))
        for is_batched, x in zip(batched, arrays, strict=True)
    ]


def _in_one_batch(function, *arrays):
    """A function of arrays [B, ...] on all M·B rows of arrays [M, B, ...] at once."""
    rows = function(*(x.reshape(-1, *x.shape[2:]) for x in arrays))
    return rows.reshape(len(arrays[0]), -1, *rows.shape[1:])


# Of grouped convolutions with stride 1, as seen with cuDNN on an H100: up to so many channels of all groups together,
# fewer in the gradient by the kernel, one GPU kernel computes all groups. Else each has its own, with copies around it,
# and products of matrices were faster, as they are with images of few channels.
_MOST_CHANNELS, _MOST_CHANNELS_OF_KERNELS, _FEWEST_CHANNELS = 2048, 1024, 16


def _with_own_kernels(x, kernel, strides, padding, most_channels=_MOST_CHANNELS):
    """Convolutions of x [M, B, H, W, C], each with its own kernel [M, h, w, C, D]: [M, B, H', W', D].

    As the groups of one where cuDNN has a fast way to compute those, else as products of matrices.
    """
    groups, channels = len(x), kernel.shape[-2:]
    if strides == (1, 1) and min(channels) >= _FEWEST_CHANNELS and groups * max(channels) <= most_channels:
        y = nhwc_convolution(_groups_last(x), _groups_last(kernel), strides, padding, groups=groups)
        return jnp.moveaxis(y.reshape(*y.shape[:-1], groups, -1), -2, 0)
    return jax.vmap(partial(_by_product, strides=strides, padding=padding))(x, kernel)


def _groups_last(x):
    """[M, ..., C] as [..., M·C]."""
    x = jnp.moveaxis(x, 0, -2)
    return x.reshape(*x.shape[:-2], -1)


def _by_product(x, kernel, strides, padding):
    """A convolution as the product of two matrices: the window of every output, and the kernel.

    Without the barrier XLA may fuse the windows into the product, and fails at that (JAX 0.11.2 on an H100).
    """
    windows = jnp.concatenate(_under_weights(x, kernel, strides, padding), axis=-1)
    features = kernel.shape[-1]
    rows = lax.optimization_barrier(windows.reshape(-1, windows.shape[-1]))
    return (rows @ kernel.reshape(-1, features)).reshape(*windows.shape[:3], features)


def _under_weights(x, kernel, strides, padding):
    """For each of the h·w weights of a kernel [h, w, C, D] the pixels that it multiplies, [B, H', W', C]."""
    height, width = kernel.shape[:2]
    x = jnp.pad(x, ((0, 0), *lax.padtype_to_pads(x.shape[1:3], (height, width), strides, padding), (0, 0)))
    down, right = x.shape[1] - height + 1, x.shape[2] - width + 1
    return [x[:, i : i + down : strides[0], j : j + right : strides[1]] for i in range(height) for j in range(width)]
