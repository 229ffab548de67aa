"""2-D convolutions that are fast inside loops on CPUs, and with several kernels at once on GPUs.

    y = convolve(x, kernel, strides=(1, 1), padding='SAME')

x: [B, H, W, C]; kernel: [h, w, C, D]; strides: two ints; padding: 'SAME' or 'VALID'; y: [B, H', W', D].

On CPUs most of them are in tiles, with fewer multiplications (Lavin & Gray, "Fast Algorithms for Convolutional Neural
Networks", 2016).
"""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ops import sharding


def nhwc_convolution(x, kernel, strides, padding, lhs_dilation=None, rhs_dilation=None, groups=1):
    """XLA's convolution of x [B, H, W, C] by kernel [h, w, C / groups, D]: [B, H', W', D]. Others: as in JAX."""
    dimension_numbers = ('NHWC', 'HWIO', 'NHWC')
    return lax.conv_general_dilated(
        x, kernel, strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count=groups
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x, kernel, strides, padding):
    """A 2-D convolution with a gradient of its own.

    JAX's permutes dimension numbers instead of arrays. XLA's CPU backend has no fast code for those inside
    loops, where it is some twenty times slower (jax-ml/jax issue 12868). `vmap` over kernels would turn their
    gradients into convolutions with windows as large as the image, see `_with_own_kernels`. Arrays: as above.
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
        formulation = _by_product if _outweighs(x, kernel) else nhwc_convolution
        elsewhere = partial(formulation, strides=strides, padding=padding)
        on_cpus = _in_tiles if _suits_tiles(x, kernel, strides, padding) else elsewhere
        return lax.platform_dependent(x, kernel, cpu=on_cpus, default=elsewhere)

    @forward.def_vmap
    def of_several(axis_size, batched, x, kernel):
        if not batched[1]:
            return _in_one_batch(partial(forward, kernel=kernel), x), True
        return _with_own_kernels(*_stacked(axis_size, batched, x, kernel), strides, padding), True

    return forward


@cache
def _backward(strides, padding):
    """A function of x, kernel and the outputs' gradient, that returns those of both, with a rule for `vmap`."""

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
    """Whether a kernel is so much larger than its images that copies of it, which convolutions and their gradients
    make on CPUs, would cost more than the windows that a product of matrices needs."""
    return kernel.size > 2 * x.size


@jax.named_scope('input_gradient')
def _input_gradient(x, kernel, grads, strides, padding):
    """The gradient with respect to x: a convolution with strides turned into dilations, padded to the size of x."""
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
    """The gradient with respect to the kernel: a convolution as for the input; the batch is what is summed over.

    On CPUs it is a sum over blocks of images that stay in a core's caches, and of products of matrices unless channels
    are few: in tiles, or of the pixels under a weight and `grads`, for all weights at once if there are no strides.
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
        """Weight (i, j) is the sum over pixels (u, v) of x[u, v + j] · grads[u - i, v], padding aside: one product of
        `x` shifted along the width, [w·C, K], and `grads` shifted along the height, [K, h·D], has all of them."""
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
    """Whether `_in_tiles` computes a convolution, and soon: with channels enough for products of matrices, and a kernel
    that does not outweigh its images so much (measured on two cores of an AMD EPYC) that copies of it cost more."""
    has_tiles = kernel.shape[:2] == (3, 3) and strides == (1, 1) and padding == 'SAME'
    return has_tiles and min(kernel.shape[2:]) >= _FEWEST_CHANNELS_OF_TILES and kernel.size <= 12 * x.size


def _in_tiles(x, kernel, flipped=False):
    """A convolution by 3×3 weights as F(2×2, 3×3) of Lavin & Gray (2016, section 4.1), after Winograd, on CPUs.

    Four outputs take 16 multiplications by weights of a channel instead of 36: Y = Aᵀ[(G K Gᵀ) ⊙ (Bᵀ X B)]A, where X
    are the 4×4 pixels under a tile of 2×2 outputs Y; next to one another those overlap by two. `flipped`: by the kernel
    flipped in height and width, its channels and features exchanged.
    """
    tiles = partial(_tiles, weights=_weights_of_tiles(kernel), flipped=flipped)
    return sharding.over_shares(partial(_map_over_blocks, tiles), x)


def _kernel_gradient_in_tiles(kernel, x, grads):
    """`_in_tiles` is linear in the kernel, and is transposed. kernel: of its shape and dtype; returns [3, 3, C, D]."""
    weights = jax.eval_shape(_weights_of_tiles, kernel)

    def of_block(x, grads):
        return jax.linear_transpose(partial(_tiles, x), weights)(grads)[0]

    weights_grads = _sum_over_blocks(of_block, weights.shape, x, grads, _VALUES_OF_A_BLOCK)
    return jax.linear_transpose(_weights_of_tiles, kernel)(weights_grads)[0]


_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_A = np.array([[1, 0], [1, 1], [1, -1], [0, -1]])


def _weights_of_tiles(kernel):
    """G K Gᵀ of every two channels: [3, 3, C, D] as [16, C, D], in float32 at least."""
    kernel = at_least_float32(kernel)
    return (np.kron(_G, _G).astype(kernel.dtype) @ kernel.reshape(9, -1)).reshape(16, *kernel.shape[2:])


def _tiles(x, weights, flipped=False):
    """The convolution of x [B, H, W, C] by weights [16, C, D], or flipped [16, D, C]: [B, H, W, D].

    To flip a kernel is to exchange the first and the last row of G K Gᵀ, and such columns. Instead those of the pixels
    and of the outputs are exchanged here, which needs no copy of the weights.
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
    """Rows of Bᵀ X in this order, along an axis of x: [4, ...], with an entry a tile there."""
    a, b, c, d = (lax.slice_in_dim(x, i, i + x.shape[axis] - 3, 2, axis) for i in range(4))
    rows = a - c, b + c, c - b, b - d
    return jnp.stack([rows[i] for i in order])


def _map_over_blocks(function, x):
    """function(x), image by image, of x [B, H, W, C]: over blocks of images, in float32 at least."""

    def of_block(x):
        return function(at_least_float32(x)).astype(x.dtype)

    blocks, rest = _cut(x, _images_of_block(x, _VALUES_OF_A_BLOCK))
    y = lax.map(of_block, blocks)
    y = y.reshape(-1, *y.shape[2:])
    return jnp.concatenate([y, of_block(rest)]) if len(rest) else y


def _sum_over_blocks(function, shape, x, grads, most_values):
    """function(x, grads), of this shape, a sum over images [B, H, W, C]: over blocks of images, in float32 at least."""

    def add(total, blocks):
        return total + function(*map(at_least_float32, blocks)), None

    size = _images_of_block(x, most_values)
    (blocks, rest), (grads_blocks, grads_rest) = _cut(x, size), _cut(grads, size)
    total, _ = lax.scan(add, jnp.zeros(shape, at_least_float32(x).dtype), (blocks, grads_blocks))
    return add(total, (rest, grads_rest))[0] if len(rest) else total


def _images_of_block(x, most_values):
    """Of x [B, H, W, C]: a divisor of B, unless all are far below the number of images that was fastest."""
    largest = max(1, min(_IMAGES_OF_A_BLOCK, most_values // math.prod(x.shape[1:]), len(x)))
    divisor = max(n for n in range(1, largest + 1) if len(x) % n == 0)
    return divisor if 4 * divisor >= largest else largest


def _cut(x, size):
    """x [B, ...] as equal blocks [B // size, size, ...], and the rows that are left."""
    full = len(x) // size * size
    return x[:full].reshape(-1, size, *x.shape[1:]), x[full:]


# Fastest on two cores of an AMD EPYC: at most in a block of images, and the fewest channels.
_IMAGES_OF_A_BLOCK, _VALUES_OF_A_BLOCK, _VALUES_OF_A_SMALL_BLOCK = 25, 420_000, 84_000
_FEWEST_CHANNELS_OF_PRODUCTS, _FEWEST_CHANNELS_OF_TILES, _FEWEST_CHANNELS_OF_KERNEL_GRADIENTS_IN_TILES = 8, 32, 64


def at_least_float32(x):
    """x in float32 if its precision is lower, else as it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _sides(x, kernel, grads, strides, padding):
    """Of height and width: the pixels, those of the kernel, the padding before and the reach of the strides."""
    low = [before for before, _ in lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)]
    reach = [stride * (n - 1) + 1 for stride, n in zip(strides, grads.shape[1:3], strict=True)]
    return list(zip(x.shape[1:3], kernel.shape[:2], low, reach, strict=True))


def _stacked(axis_size, batched, *arrays):
    return [
        x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
        for is_batched, x in zip(batched, arrays, strict=True)
    ]


def _in_one_batch(function, *arrays):
    """A function of arrays [B, ...] on all M·B rows of arrays [M, B, ...] at once."""
    rows = function(*(x.reshape(-1, *x.shape[2:]) for x in arrays))
    return rows.reshape(len(arrays[0]), -1, *rows.shape[1:])


# Of grouped convolutions with stride 1, measured with cuDNN on an H100: up to so many channels of all groups together,
# fewer in the kernel gradient, one GPU kernel computes all groups. Else each has its own, with copies around it,
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
    windows = jnp.concatenate(_under_weights(x, kernel.shape[:2], strides, padding), axis=-1)
    features = kernel.shape[-1]
    rows = lax.optimization_barrier(windows.reshape(-1, windows.shape[-1]))
    return (rows @ kernel.reshape(-1, features)).reshape(*windows.shape[:3], features)


def _under_weights(x, size, strides, padding):
    """For each of the h·w weights of a kernel of this size the pixels that it multiplies, [B, H', W', C]."""
    height, width = size
    x = jnp.pad(x, ((0, 0), *lax.padtype_to_pads(x.shape[1:3], size, strides, padding), (0, 0)))
    down, right = x.shape[1] - height + 1, x.shape[2] - width + 1
    return [x[:, i : i + down : strides[0], j : j + right : strides[1]] for i in range(height) for j in range(width)]
