"""Several devices: a mesh over which batches, or the sub-batches of SAM and its kin, are spread.

Weights and images are on every device; under `jax.set_mesh(create_mesh())` training and evaluation share their batches
out. The same seeds give the same batches, perturbations and noise on any number of devices, and results that are equal
to rounding.
"""

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = 'batch'


class DeviceError(Exception):
    """Devices that are not there, or that a batch cannot be shared out over, in one line for the user."""


def create_mesh(number=None):
    """A mesh of all devices, or of the first `number` of them. Raises DeviceError."""
    devices = jax.devices()
    if number is not None and number > len(devices):
        raise DeviceError(f'--devices {number}: there are {len(devices)} ({devices[0].platform})')
    devices = devices[:number]
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def require_divisible(flag, number, mesh):
    """Raises a DeviceError if a number of examples or sub-batches cannot be shared out equally."""
    if number % mesh.size:
        nearest = sorted({max(number // mesh.size, 1) * mesh.size, (number // mesh.size + 1) * mesh.size})
        offer = ' or '.join(f'{flag} {n}' for n in nearest)
        raise DeviceError(
            f'{flag} {number} cannot be shared out over {mesh.size} devices: take {offer}, or --devices 1'
        )


def replicate(arrays, mesh):
    """A pytree of arrays on every device of a mesh."""
    return jax.device_put(arrays, NamedSharding(mesh, P()))


def spread(x, axis=0):
    """In a jitted function: lets the devices of the mesh that is set share out an axis of x, if they can equally."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or x.shape[axis] % mesh.size:
        return x
    return jax.lax.with_sharding_constraint(x, P(*[None] * axis, AXIS))
