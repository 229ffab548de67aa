"""Pooling that is fast on CPUs."""

from functools import reduce

import jax.numpy as jnp
from jax import lax


def max_pool(x, size, stride):
    """The largest value of each channel in windows of size × size pixels that lie inside the image.

    A maximum of shifted images instead of XLA's window reduction, with which a gradient of LeNet-5 takes 1.2 to 1.7
    times as long on CPUs. Equal values share their gradient. x: [B, H, W, C]; returns [B, H', W', C].
    """
    for axis in (1, 2):
        reach = x.shape[axis] - size + 1
        shifted = [lax.slice_in_dim(x, i, i + reach, stride, axis) for i in range(size)]
        x = reduce(jnp.maximum, shifted)
    return x
