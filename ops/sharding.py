"""Arrays over the devices of a mesh: copies on each, or shares of a batch.

Weights and images are on every device; under `jax.set_mesh(mesh)` training and evaluation shard their batches. The same
seeds give the same batches, perturbations and noise on any number of devices, and results that are equal to rounding.
"""

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = 'batch'


def replicate(arrays, mesh):
    """A pytree of arrays, the same in all processes, on every device of a mesh."""
    everywhere = NamedSharding(mesh, P())
    if jax.process_count() > 1:
        return jax.jit(_same, out_shardings=everywhere)(arrays)
    return jax.device_put(arrays, everywhere)


def _same(arrays):
    return arrays


def place_rows(arrays, indices, mesh):
    """The rows of host arrays [N, ...] that are at `indices`, int [B], shared out over a mesh if they can be equally.

    Each process reads those rows only that its devices hold.
    """
    shares = NamedSharding(mesh, P() if len(indices) % mesh.size else P(AXIS))

    def place(array):
        shape = len(indices), *array.shape[1:]
        return jax.make_array_from_callback(shape, shares, lambda where: array[indices[where[0]]])

    return jax.tree.map(place, arrays)


def send(arrays):
    """A pytree of arrays, the same in all processes, on every device of the mesh that is set."""
    mesh = jax.sharding.get_mesh()
    return jax.device_put(arrays) if mesh.empty else replicate(arrays, mesh)


def num_devices():
    """How many devices the mesh has that is set; 1 if none is, and for what `on_each` runs on one of them."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or mesh.manual_axes else mesh.size


def shareable(number_of_images):
    """The next number that the devices of the mesh that is set can share out equally."""
    return -(-number_of_images // num_devices()) * num_devices()


def _can_share(number):
    return num_devices() > 1 and number % num_devices() == 0


def shard(x, axis=0):
    """In a jitted function: lets the devices of the mesh that is set share out an axis of x, if they can equally."""
    return jax.lax.with_sharding_constraint(x, P(*[None] * axis, AXIS)) if _can_share(x.shape[axis]) else x


def over_shares(function, x):
    """In a jitted function: function(x) of x [B, ...], whose row i, of [B, ...], depends on row i of x only.

    The devices of the mesh that is set each compute their share of rows, if they can share them out equally.
    """
    if not _can_share(len(x)):
        return function(x)
    return jax.shard_map(function, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False)(x)


def sum_over_shares(function, *arrays):
    """In a jitted function: function(*arrays), which is a sum over the rows of arrays [B, ...], shared out likewise."""
    if not _can_share(len(arrays[0])):
        return function(*arrays)

    def sum_over_devices(*shares):
        return jax.lax.psum(function(*shares), AXIS)

    return jax.shard_map(sum_over_devices, in_specs=P(AXIS), out_specs=P(), check_vma=False)(*arrays)


def gather(arrays):
    """In a jitted function: gives all of a pytree of arrays to every device of the mesh that is set."""
    return arrays if num_devices() == 1 else jax.lax.with_sharding_constraint(arrays, P())


def on_all(function, arrays):
    """In a jitted function: a function of arrays on all devices, which share what it shards; see on_each."""
    return function(arrays)


def on_each(function, arrays):
    """In a jitted function: on each of the D devices a function of its own part of arrays [D, ...].

    function: a jax.tree_util.Partial of all other arrays that it needs. Returns the D results, arrays [D, ...] whose
    parts stay where they were computed.
    """

    def on_one(function, parts):
        result = function(jax.tree.map(lambda x: x[0], parts))
        return jax.tree.map(lambda x: x[None], result)

    return jax.shard_map(on_one, in_specs=(P(), P(AXIS)), out_specs=P(AXIS), check_vma=False)(function, arrays)


def key_data(x):
    """An array, or the numbers of a key."""
    return jax.random.key_data(x) if _is_key(x) else x


def like_key(x, like):
    """An array, or a key of the numbers x if `like` is one and x is not."""
    return jax.random.wrap_key_data(x, impl='threefry2x32') if _is_key(like) and not _is_key(x) else x


def _is_key(x):
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
