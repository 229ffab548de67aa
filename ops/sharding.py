"""Arrays on the devices of a mesh: replicated, or batches that are sharded.

Weights are on every device, and images too unless they are streamed. Under `jax.set_mesh(mesh)` training and evaluation
shard their batches. The same seeds give the same batches, perturbations and noise on any number of devices. Results are
equal up to rounding.

The current mesh is the mesh that `jax.set_mesh` sets.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = 'batch'


def replicate(arrays: Any, mesh: jax.sharding.Mesh) -> Any:
    """Returns a pytree of arrays on every device of a mesh. All processes must pass the same arrays."""
    everywhere = NamedSharding(mesh, P())
    if jax.process_count() > 1:
        return jax.jit(_same, out_shardings=everywhere)(arrays)
    return jax.device_put(arrays, everywhere)


def _same(arrays):
    return arrays


def place_rows(arrays: Any, indices: np.ndarray, mesh: jax.sharding.Mesh) -> Any:
    """Returns the rows of host arrays at some indices, sharded over a mesh if the shards are equal.

    Each process reads only the rows that the devices of this process hold.

    Args:
        arrays: a pytree of np.ndarray [N, ...].
        indices: int [B].
        mesh: the devices. Each holds all rows if B is not divisible by the number of devices.

    Returns:
        A pytree of jax.Array [B, ...].
    """
    shares = NamedSharding(mesh, P() if len(indices) % mesh.size else P(AXIS))

    def place(array):
        shape = len(indices), *array.shape[1:]
        return jax.make_array_from_callback(shape, shares, lambda where: array[indices[where[0]]])

    return jax.tree.map(place, arrays)


def send(arrays: Any) -> Any:
    """Returns a pytree of arrays on every device of the current mesh. All processes must pass the same arrays."""
    mesh = jax.sharding.get_mesh()
    return jax.device_put(arrays) if mesh.empty else replicate(arrays, mesh)


def num_devices() -> int:
    """Returns the number of devices of the current mesh, 1 without a mesh.

    It is also 1 inside a function of `on_each`, `over_shares` or `sum_over_shares`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or mesh.manual_axes else mesh.size


def shareable(number_of_images: int) -> int:
    """Returns `number_of_images`, rounded up to a multiple of the number of devices."""
    return -(-number_of_images // num_devices()) * num_devices()


def _can_share(number):
    return num_devices() > 1 and number % num_devices() == 0


def shard(x: jax.Array, axis: int = 0) -> jax.Array:
    """Shards an axis of x over the current mesh if the shards are equal. Must be called in a jitted function."""
    return jax.lax.with_sharding_constraint(x, P(*[None] * axis, AXIS)) if _can_share(x.shape[axis]) else x


def over_shares(function: Callable, x: jax.Array) -> jax.Array:
    """Returns function(x) of x [B, ...], sharded over the current mesh if the shards are equal.

    Row i of the result [B, ...] must depend on row i of x only. Must be called in a jitted function.
    """
    if not _can_share(len(x)):
        return function(x)
    return jax.shard_map(function, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False)(x)


def sum_over_shares(function: Callable, *arrays: jax.Array) -> jax.Array:
    """Returns function(*arrays), a sum over the rows of arrays [B, ...], sharded as in over_shares.

    Must be called in a jitted function.
    """
    if not _can_share(len(arrays[0])):
        return function(*arrays)

    def sum_over_devices(*shares):
        return jax.lax.psum(function(*shares), AXIS)

    return jax.shard_map(sum_over_devices, in_specs=P(AXIS), out_specs=P(), check_vma=False)(*arrays)


def gather(arrays: Any) -> Any:
    """Replicates a pytree of arrays on every device of the current mesh. Must be called in a jitted function."""
    return arrays if num_devices() == 1 else jax.lax.with_sharding_constraint(arrays, P())


def on_all(function: Callable, arrays: Any) -> Any:
    """Returns function(arrays), computed by all devices together. The function may shard arrays. See also `on_each`.

    Must be called in a jitted function.
    """
    return function(arrays)


def on_each(function: Callable, arrays: Any) -> Any:
    """Calls a function on each of the D devices, with one part of arrays [D, ...]. Must be called in a jitted function.

    Args:
        function: a jax.tree_util.Partial of all other arrays that the function needs.
        arrays: a pytree of arrays [D, ...].

    Returns:
        The D results, a pytree of arrays [D, ...]. Each part stays on the device that computed it.
    """

    def on_one(function, parts):
        result = function(jax.tree.map(lambda x: x[0], parts))
        return jax.tree.map(lambda x: x[None], result)

    return jax.shard_map(on_one, in_specs=(P(), P(AXIS)), out_specs=P(AXIS), check_vma=False)(function, arrays)


def key_data(x: jax.Array) -> jax.Array:
    """Returns the numbers of a key, or any other array unchanged."""
    return jax.random.key_data(x) if _is_key(x) else x


def like_key(x: jax.Array | np.ndarray, like: Any) -> jax.Array | np.ndarray:
    """Returns a key made of the numbers x if `like` is a key. Otherwise, or if x is a key, returns x.

    `like` is an array or a jax.ShapeDtypeStruct.
    """
    return jax.random.wrap_key_data(x, impl='threefry2x32') if _is_key(like) and not _is_key(x) else x


def _is_key(x):
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
