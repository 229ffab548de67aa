"""2-D convolutions that are fast inside loops on CPUs, and with several kernels at once on GPUs.

    y = convolve(x, kernel, strides=(1, 1), padding='SAME')

x: float [B, H, W, C]; kernel: float [h, w, C, D]; strides: two ints; padding: 'SAME' or 'VALID'; y: [B, H', W', D].

CPUs compute most convolutions in tiles, with fewer multiplications (Lavin & Gray, "Fast Algorithms for Convolutional
Neural Networks", 2016).
"""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from ops import sharding


def nhwc_convolution(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: str | list[tuple[int, int]],
    lhs_dilation: tuple[int, int] | None = None, rhs_dilation: tuple[int, int] | None = None, groups: int = 1,
) -> jax.Array:  # fmt: skip
    """Returns XLA's convolution of x [B, H, W, C] by kernel [h, w, C / groups, D]: float [B, H', W', D].

    The other arguments are as in jax.lax.conv_general_dilated.
    """
    dimension_numbers = ('NHWC', 'HWIO', 'NHWC')
    return lax.conv_general_dilated(
        x, kernel, strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count=groups
    )


def convolve(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: str) -> jax.Array:
    """Returns a 2-D convolution. The top of this file says what the arguments are.

    Uses XLA's convolution and JAX's gradient if x has symbolic dimensions, as in jax.export. The faster formulations
    depend on the size of x. The barrier is needed because XLA on CPUs may fuse two convolutions and a mean, and then
    computes NaN in bfloat16 (JAX 0.12.0.1).
    """
    if any(map(export.is_symbolic_dim, x.shape)):
        y = nhwc_convolution(x, kernel, strides, padding)
        return lax.platform_dependent(y, cpu=lax.optimization_barrier, default=lambda y: y)
    return _convolve(x, kernel, strides, padding)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x, kernel, strides, padding):
    """Returns a 2-D convolution of x with known dimensions, with a custom gradient.

    JAX's gradient permutes dimension numbers instead of arrays. XLA's CPU backend has no fast code for permuted
    numbers inside loops. There JAX's gradient is about twenty times slower (jax-ml/jax issue 12868). `vmap` over
    kernels would turn the kernels' gradients into convolutions with windows as large as the image. The custom gradient
    avoids this with `_with_own_kernels`.
    """
    return _forward(tuple(strides), padding)(x, kernel)


def _convolve_forward(x, kernel, strides, padding):
    return _convolve(x, kernel, strides, padding), (x, kernel)


def _convolve_backward(strides, padding, residuals, grads):
    return _backward(tuple(strides), padding)(*residuals, grads)


_convolve.defvjp(_convolve_forward, _convolve_backward)


@cache
def _forward(strides, padding):
    """Returns forward(x, kernel) -> y, with a rule for `vmap`."""

    @jax.custom_batching.custom_vmap
    def forward(x, kernel):
        formulation = _by_product if _outweighs(x, kernel) else nhwc_convolution
        elsewhere = partial(formulation, strides=strides, padding=padding)
        on_cpus = _in_tiles if _suits_tiles(x, kernel, strides, padding) else elsewhere
        return lax.platform_dependent(x, kernel, cpu=on_cpus, default=elsewhere)

    @forward.def_vmap
    def of_several(axis_size, batched, x, kernel):
        if not batched[1]:
            return _in_one_batch(partial(convolve, kernel=kernel, strides=strides, padding=padding), x), True
        return _with_own_kernels(*_stacked(axis_size, batched, x, kernel), strides, padding), True

    return forward


@cache
def _backward(strides, padding):
    """Returns backward(x, kernel, gradient of y) -> (gradient of x, gradient of kernel), with a rule for `vmap`."""

    @jax.custom_batching.custom_vmap
    def backward(*arrays):
        return _input_gradient(*arrays, strides, padding), _kernel_gradient(*arrays, strides, padding)

    @backward.def_vmap
    def of_several(axis_size, batched, x, kernel, grads):
        shared = kernel
        x, kernel, grads = _stacked(axis_size, batched, x, kernel, grads)
        outputs = partial(_with_own_kernels, strides=strides, padding=padding)
        _, kernel_vjp = jax.vjp(partial(outputs, x, most_channels=_MOST_CHANNELS_OF_KERNELS), kernel)
        if batched[1]:
            _, input_vjp = jax.vjp(lambda x: outputs(x, kernel), x)
            (x_grads,) = input_vjp(grads)
        else:
            x_grads = _in_one_batch(lambda x, grads: _input_gradient(x, shared, grads, strides, padding), x, grads)
        return (x_grads, *kernel_vjp(grads)), (True, True)

    return backward


def _outweighs(x, kernel):
    """Returns whether a kernel is so large that copies of the kernel cost more than the windows of the images.

    Convolutions and their gradients copy the kernel on CPUs. A product of matrices needs the windows instead.
    """
    return kernel.size > 2 * x.size


@jax.named_scope('input_gradient')
def _input_gradient(x, kernel, grads, strides, padding):
    """Returns the gradient with respect to x: a convolution with dilations for strides, padded to the size of x."""
    x_padding = [(k - 1 - p, n + p - r) for n, k, p, r in _sides(x, kernel, grads, strides, padding)]

    def by_convolution(grads, kernel):
        flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
        return nhwc_convolution(grads, flipped, (1, 1), x_padding, lhs_dilation=strides)

    def by_product(grads, kernel):
        return jax.vjp(lambda x: _by_product(x, kernel, strides, padding), x)[1](grads)[0]

    elsewhere = by_product if _outweighs(x, kernel) else by_convolution
    on_cpus = partial(_in_tiles, flipped=True) if _suits_tiles(x, kernel, strides, padding) else elsewhere
    return lax.platform_dependent(grads, kernel, cpu=on_cpus, default=elsewhere)


@jax.named_scope('kernel_gradient')
def _kernel_gradient(x, kernel, grads, strides, padding):
    """Returns the gradient with respect to the kernel: a convolution as for the input, which sums over the batch.

    On CPUs the gradient is a sum over blocks of images that stay in a core's caches. Each block is a convolution if
    channels are few, otherwise products of matrices. The products are in tiles, or they multiply the pixels under a
    weight by `grads`. Without strides, one product gives the gradients of all weights.
    """
    size, (channels, features) = kernel.shape[:2], kernel.shape[2:]
    sides = _sides(x, kernel, grads, strides, padding)

    def by_convolution(x, grads):
        kernel_padding = [(p, r + k - 1 - n - p) for n, k, p, r in sides]
        batch_last, batch_third = x.transpose(3, 1, 2, 0), grads.transpose(1, 2, 0, 3)
        kernel_grads = nhwc_convolution(batch_last, batch_third, (1, 1), kernel_padding, rhs_dilation=strides)
        return kernel_grads.transpose(1, 2, 0, 3)

    def by_product(x, grads):
        return jax.vjp(lambda kernel: _by_product(x, kernel, strides, padding), kernel)[1](grads)[0]

    def by_products(x, grads):
        rows = grads.reshape(-1, features)
        products = [pixels.reshape(-1, channels).T @ rows for pixels in _under_weights(x, size, strides, padding)]
        return jnp.stack(products).reshape(kernel.shape)

    def by_rows(x, grads):
        """Returns the gradients of all weights from one product of matrices.

        The gradient of weight (i, j) is the sum over pixels (u, v) of x[u, v + j] · grads[u - i, v], padding aside.
        The product has the factors `x` shifted along the width, [w·C, K], and `grads` shifted along the height,
        [K, h·D].
        """
        (height, down, above, reach), (_, right, *_) = sides
        columns = jnp.stack(_under_weights(x, (1, right), strides, padding), axis=3)
        padded = jnp.pad(grads, ((0, 0), (down - 1 - above, height + above - reach), (0, 0), (0, 0)))
        rows = jnp.stack([padded[:, i : i + height] for i in reversed(range(down))], axis=3)
        product = columns.reshape(-1, right * channels).T @ rows.reshape(-1, down * features)
        return product.reshape(right, channels, down, features).transpose(2, 0, 1, 3)

    def over_blocks(x, grads):
        of_block, most_values = by_products, _VALUES_OF_A_BLOCK
        if channels < _FEWEST_CHANNELS_OF_PRODUCTS:
            of_block = by_convolution
        elif strides == (1, 1):
            of_block, most_values = by_rows, _VALUES_OF_A_SMALL_BLOCK
        return _sum_over_blocks(of_block, kernel.shape, x, grads, most_values).astype(x.dtype)

    elsewhere, on_cpus = by_convolution, partial(sharding.sum_over_shares, over_blocks)
    if _outweighs(x, kernel):
        elsewhere = on_cpus = by_product
    if _suits_tiles(x, kernel, strides, padding) and channels >= _FEWEST_CHANNELS_OF_KERNEL_GRADIENTS_IN_TILES:
        on_cpus = partial(sharding.sum_over_shares, partial(_kernel_gradient_in_tiles, kernel))
    return lax.platform_dependent(x, grads, cpu=on_cpus, default=elsewhere)


def _suits_tiles(x, kernel, strides, padding):
    """Returns whether Winograd tiles apply here and pay off.

    Tiles need enough channels for products of matrices. A kernel must not outweigh the images so much that copies of
    the kernel cost more than tiles save. The bounds were measured on two cores of an AMD EPYC.
    """
    has_tiles = kernel.shape[:2] == (3, 3) and strides == (1, 1) and padding == 'SAME'
    return has_tiles and min(kernel.shape[2:]) >= _FEWEST_CHANNELS_OF_TILES and kernel.size <= 12 * x.size


def _in_tiles(x, kernel, flipped=False):
    """Returns a convolution by 3×3 weights as F(2×2, 3×3) of Lavin & Gray (2016, section 4.1), after Winograd, on CPUs.

    Four outputs take 16 multiplications by weights of a channel instead of 36: Y = Aᵀ[(G K Gᵀ) ⊙ (Bᵀ X B)]A. Here X
    are the 4×4 pixels under a tile of 2×2 outputs Y. The pixels of neighbouring tiles overlap by two. With `flipped`
    the kernel is flipped in height and width, and channels and features are exchanged.
    """
    tiles = partial(_tiles, weights=_weights_of_tiles(kernel), flipped=flipped)
    return sharding.over_shares(partial(_map_over_blocks, tiles), x)


def _kernel_gradient_in_tiles(kernel, x, grads):
    """Returns the gradient [3, 3, C, D] with respect to the kernel: the transpose of `_in_tiles`, a linear function.

    Takes only the shape and the dtype from `kernel`.
    """
    weights = jax.eval_shape(_weights_of_tiles, kernel)

    def of_block(x, grads):
        return jax.linear_transpose(partial(_tiles, x), weights)(grads)[0]

    weights_grads = _sum_over_blocks(of_block, weights.shape, x, grads, _VALUES_OF_A_BLOCK)
    return jax.linear_transpose(_weights_of_tiles, kernel)(weights_grads)[0]


_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_A = np.array([[1, 0], [1, 1], [1, -1], [0, -1]])


def _weights_of_tiles(kernel):
    """Returns G K Gᵀ for every pair of channel and feature: [16, C, D] of [3, 3, C, D], in float32 at least."""
    kernel = at_least_float32(kernel)
    return (np.kron(_G, _G).astype(kernel.dtype) @ kernel.reshape(9, -1)).reshape(16, *kernel.shape[2:])


def _tiles(x, weights, flipped=False):
    """Returns the convolution of x [B, H, W, C] by weights [16, C, D], or flipped [16, D, C]: [B, H, W, D].

    A flipped kernel has the first and last row of G K Gᵀ exchanged, and the first and last column. This function
    exchanges the rows and columns of pixels and outputs instead, because that needs no copy of the weights.
    """
    images, height, width, channels = x.shape
    order = [3, 1, 2, 0] if flipped else [0, 1, 2, 3]
    x = jnp.pad(x, ((0, 0), (1, 1 + height % 2), (1, 1 + width % 2), (0, 0)))
    columns = _pixels_of_tiles(x, 2, order)
    pixels = _pixels_of_tiles(columns, 2, order)
    down, right = pixels.shape[3:5]
    products = pixels.reshape(16, -1, channels) @ (weights.mT if flipped else weights)
    y = np.kron(_A[order], _A[order]).T.astype(x.dtype) @ products.reshape(16, -1)
    y = y.reshape(2, 2, images, down, right, -1).transpose(2, 3, 0, 4, 1, 5)
    return y.reshape(images, 2 * down, 2 * right, -1)[:, :height, :width]


def _pixels_of_tiles(x, axis, order):
    """Returns the rows of Bᵀ X along an axis of x in this order, [4, ...]. The axis then has one entry per tile."""
    a, b, c, d = (lax.slice_in_dim(x, i, i + x.shape[axis] - 3, 2, axis) for i in range(4))
    rows = a - c, b + c, c - b, b - d
    return jnp.stack([rows[i] for i in order])


def _map_over_blocks(function, x):
    """Applies a function of single images to all of x [B, H, W, C], in blocks of images, in float32 at least."""

    def of_block(x):
        return function(at_least_float32(x)).astype(x.dtype)

    blocks, rest = _cut(x, _images_of_block(x, _VALUES_OF_A_BLOCK))
    y = lax.map(of_block, blocks)
    y = y.reshape(-1, *y.shape[2:])
    return jnp.concatenate([y, of_block(rest)]) if len(rest) else y


def _sum_over_blocks(function, shape, x, grads, most_values):
    """Returns function(x, grads), which must be a sum over images with the given shape.

    Adds up blocks of images [B, H, W, C], in float32 at least.
    """

    def add(total, blocks):
        return total + function(*map(at_least_float32, blocks)), None

    size = _images_of_block(x, most_values)
    (blocks, rest), (grads_blocks, grads_rest) = _cut(x, size), _cut(grads, size)
    total, _ = lax.scan(add, jnp.zeros(shape, at_least_float32(x).dtype), (blocks, grads_blocks))
    return add(total, (rest, grads_rest))[0] if len(rest) else total


def _images_of_block(x, most_values):
    """Returns the number of images of x [B, H, W, C] in a block: the largest divisor of B within the bounds.

    Returns the largest number within the bounds if the divisor is below a quarter of it. Some images are then left.
    """
    largest = max(1, min(_IMAGES_OF_A_BLOCK, most_values // math.prod(x.shape[1:]), len(x)))
    divisor = max(n for n in range(1, largest + 1) if len(x) % n == 0)
    return divisor if 4 * divisor >= largest else largest


def _cut(x, size):
    """Returns x [B, ...] as equal blocks [B // size, size, ...], and the rows that are left."""
    full = len(x) // size * size
    return x[:full].reshape(-1, size, *x.shape[1:]), x[full:]


# The fastest bounds on two cores of an AMD EPYC: the most images and values in a block, and the fewest channels.
_IMAGES_OF_A_BLOCK, _VALUES_OF_A_BLOCK, _VALUES_OF_A_SMALL_BLOCK = 25, 420_000, 84_000
_FEWEST_CHANNELS_OF_PRODUCTS, _FEWEST_CHANNELS_OF_TILES, _FEWEST_CHANNELS_OF_KERNEL_GRADIENTS_IN_TILES = 8, 32, 64


def at_least_float32(x: jax.Array) -> jax.Array:
    """Returns x, cast to float32 if x has a lower precision."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _sides(x, kernel, grads, strides, padding):
    """Returns for height and width: pixels of x, pixels of the kernel, padding before x and reach of the strides."""
    low = [before for before, _ in lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)]
    reach = [stride * (n - 1) + 1 for stride, n in zip(strides, grads.shape[1:3], strict=True)]
    return list(zip(x.shape[1:3], kernel.shape[:2], low, reach, strict=True))


def _stacked(axis_size, batched, *arrays):
    return [
        x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
        for is_batched, x in zip(batched, arrays, strict=True)
    ]


def _in_one_batch(function, *arrays):
    """Applies a function of arrays [B, ...] to all M·B rows of arrays [M, B, ...] at once."""
    rows = function(*(x.reshape(-1, *x.shape[2:]) for x in arrays))
    return rows.reshape(arrays[0].shape[0], -1, *rows.shape[1:])


# Bounds of grouped convolutions with stride 1, measured with cuDNN on an H100. One GPU kernel computes all groups if
# they have at most _MOST_CHANNELS together, or _MOST_CHANNELS_OF_KERNELS in the kernel gradient. Beyond these bounds
# each group takes a GPU kernel with copies around it, and products of matrices were faster. Products of matrices were
# also faster for images of fewer than _FEWEST_CHANNELS.
_MOST_CHANNELS, _MOST_CHANNELS_OF_KERNELS, _FEWEST_CHANNELS = 2048, 1024, 16


def _with_own_kernels(x, kernel, strides, padding, most_channels=_MOST_CHANNELS):
    """Returns convolutions of x [M, B, H, W, C], each with its own kernel [M, h, w, C, D]: [M, B, H', W', D].

    Computes one grouped convolution where cuDNN has a fast way for groups, otherwise products of matrices.
    """
    groups, channels = len(x), kernel.shape[-2:]
    if strides == (1, 1) and min(channels) >= _FEWEST_CHANNELS and groups * max(channels) <= most_channels:
        y = nhwc_convolution(_groups_last(x), _groups_last(kernel), strides, padding, groups=groups)
        return jnp.moveaxis(y.reshape(*y.shape[:-1], groups, -1), -2, 0)
    return jax.vmap(partial(_by_product, strides=strides, padding=padding))(x, kernel)


def _groups_last(x):
    """Returns x [M, ..., C] as [..., M·C]."""
    x = jnp.moveaxis(x, 0, -2)
    return x.reshape(*x.shape[:-2], -1)


def _by_product(x, kernel, strides, padding):
    """Returns a convolution as the product of two matrices: the windows of all outputs, and the kernel.

    The barrier is needed because XLA may fuse the windows into the product, and then fails (JAX 0.11.2 on an H100).
    """
    windows = jnp.concatenate(_under_weights(x, kernel.shape[:2], strides, padding), axis=-1)
    features = kernel.shape[-1]
    rows = lax.optimization_barrier(windows.reshape(-1, windows.shape[-1]))
    return (rows @ kernel.reshape(-1, features)).reshape(*windows.shape[:3], features)


def _under_weights(x, size, strides, padding):
    """Returns for each weight of a kernel of size h × w the pixels that the weight multiplies, [B, H', W', C]."""
    height, width = size
    x = jnp.pad(x, ((0, 0), *lax.padtype_to_pads(x.shape[1:3], size, strides, padding), (0, 0)))
    down, right = x.shape[1] - height + 1, x.shape[2] - width + 1
    return [x[:, i : i + down : strides[0], j : j + right : strides[1]] for i in range(height) for j in range(width)]
