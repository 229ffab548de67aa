"""The devices of a run: the mesh, and checks that the devices work and can share a batch."""

import argparse
import collections
import contextlib
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

import errors
from ops.sharding import AXIS


class DeviceError(errors.UserError):
    """Devices that are missing, fail a check, or cannot share a batch equally."""


def create_mesh(number: int | None = None) -> jax.sharding.Mesh:
    """Returns a mesh of the first `number` devices. None means all devices. Raises DeviceError."""
    devices = jax.devices()
    if number is not None and jax.process_count() > 1:
        raise DeviceError(f'--devices {number} works in a run of one process only: start fewer processes instead')
    if number is not None and number > len(devices):
        raise DeviceError(f'--devices {number} is too many: JAX finds {len(devices)} ({devices[0].platform})')
    devices = devices[:number]
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def require() -> None:
    """Raises a DeviceError if JAX finds no device, or if processes have different numbers of devices.

    Also raises it if this jaxlib computes wrong numbers. See require_right_numbers.
    """
    try:
        found = jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = ' '.join(str(error).split())[:300] or f'JAX_PLATFORMS is {os.environ.get("JAX_PLATFORMS")}'
        raise DeviceError(f'JAX finds no device: {reason}') from error
    require_right_numbers()
    numbers = sorted(set(collections.Counter(device.process_index for device in found).values()))
    if len(numbers) > 1:
        raise DeviceError(f'some processes have {numbers[0]} devices, others {numbers[-1]}: give all the same number')


def require_right_numbers() -> None:
    """Raises a DeviceError if this jaxlib miscompiles a sum over products on CPUs, as 0.10.2 and 0.11.0 do.

    Runs the program of JAX's issue 39103, whose last value must be 2³⁰.
    """
    if jax.default_backend() != 'cpu':
        return
    rows = np.zeros((32769, 3), np.float32)
    rows[:, 0] = np.arange(len(rows))
    found = float(jax.device_get(_squared_norms(jax.device_put(rows)))[-1])
    if found != 2.0**30:
        raise DeviceError(
            f'jaxlib {jax.lib.__version__} computes wrong numbers on this CPU ({found:.0f} instead of {2**30}, '
            'JAX issue 39103): run pip install -r requirements.txt, which excludes such versions'
        )


@jax.jit
def _squared_norms(rows):
    return jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2))(rows)


def mesh_of_training(args: argparse.Namespace, flags_hold: bool = False) -> jax.sharding.Mesh:
    """Returns the mesh of devices that the flags ask for. Raises DeviceError if the devices cannot share a batch.

    Args:
        args: the flags of train.py.
        flags_hold: whether the run is resumed. Its batch size is fixed, so the error suggests only --devices.
    """
    mesh = create_mesh(args.devices)
    if isinstance(args.checkpointevery, str) and jax.process_count() > 1:
        raise DeviceError(f'--checkpointevery {args.checkpointevery}: several processes need steps, not minutes')
    what, number = ('--batchsize', args.batchsize) if args.batchsplit is None else ('--batchsplit', args.batchsplit)
    if number * (args.trainmc or 1) % mesh.size:
        offers = [] if flags_hold else _shareable(args.batchsize, args.batchsplit, mesh.size)
        fewer = max(n for n in range(1, mesh.size) if number % n == 0)
        one_process = jax.process_count() == 1
        offers.append(f'--devices {fewer}' if one_process else f'processes with {fewer} devices in total')
        what = f'{what} {number} cannot be sharded equally over {mesh.size} devices'
        raise DeviceError(f'{what}: use {", or ".join(offers)}')
    return mesh


def _shareable(batch_size, batchsplit, num_devices):
    """Returns flags that N devices can share, with the nearest --batchsize, --batchsplit or both."""
    multiples = range(num_devices, batch_size + num_devices + 1, num_devices)
    if batchsplit is None:
        return [f'--batchsize {size}' for size in _nearest(batch_size, multiples)]
    splits = [n for n in multiples if batch_size % n == 0]
    if splits:
        return [f'--batchsplit {split}' for split in _nearest(batchsplit, splits)]
    offers = []
    for size in _nearest(batch_size, multiples):
        split = min((n for n in multiples if size % n == 0), key=lambda n: abs(n - batchsplit))
        offers.append(f'--batchsize {size} --batchsplit {split}')
    return offers


def _nearest(number, possible):
    """Returns the next smaller and the next larger of the `possible` numbers, which are ascending."""
    return [n for n in possible if n < number][-1:] + [n for n in possible if n > number][:1]


@contextlib.contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Raises a DeviceError if a device runs out of memory. advice: how to use less memory, for the message."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        raise DeviceError(f'a device ran out of memory: {advice}') from error
