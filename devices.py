"""Several devices: a mesh over which batches, the sub-batches of SAM and its kin, or posterior samples are spread.

Weights and images are on every device; under `jax.set_mesh(create_mesh())` training and evaluation share their batches
out. The same seeds give the same batches, perturbations and noise on any number of devices, and results that are equal
to rounding.

The devices may belong to several processes, on one host or many, that `join` makes one run of. All of them run the
same program; the first reads and writes the run folder, but for checkpoints, which all may write together.
"""

import collections
import contextlib
import json
import os
import signal
import sys
import threading
import traceback
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import errors
import signals

AXIS = 'batch'


class DeviceError(errors.UserError):
    """Devices that are missing, or that cannot share a batch equally."""


def create_mesh(number=None):
    """A mesh of all devices, or of the first `number` of them. Raises DeviceError."""
    devices = jax.devices()
    if number is not None and jax.process_count() > 1:
        raise DeviceError(f'--devices {number} is for a run of one process: start fewer processes')
    if number is not None and number > len(devices):
        raise DeviceError(f'--devices {number}: there are {len(devices)} ({devices[0].platform})')
    devices = devices[:number]
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def require():
    """Raises a DeviceError if JAX finds no device, or not as many in each process.

    All processes meet here, before they read data: that may take one of them longer than the others would wait.
    """
    try:
        found = jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = ' '.join(str(error).split())[:300] or f'JAX_PLATFORMS is {os.environ.get("JAX_PLATFORMS")}'
        raise DeviceError(f'JAX finds no device: {reason}') from error
    require_right_numbers()
    numbers = sorted(set(collections.Counter(device.process_index for device in found).values()))
    if len(numbers) > 1:
        raise DeviceError(f'some processes have {numbers[0]} devices and some {numbers[-1]}: give each as many')
    wait_for_all()


def require_right_numbers():
    """Raises a DeviceError if this jaxlib miscompiles a sum over products on CPUs, as 0.10.2 and 0.11.0 do.

    The program is the one of JAX's issue 39103; its last value is 2³⁰.
    """
    if jax.default_backend() != 'cpu':
        return
    rows = np.zeros((32769, 3), np.float32)
    rows[:, 0] = np.arange(len(rows))
    found = float(jax.device_get(_squared_norms(jax.device_put(rows)))[-1])
    if found != 2.0**30:
        raise DeviceError(
            f'jaxlib {jax.lib.__version__} computes wrong numbers on this CPU ({found:.0f} for {2**30}, '
            "JAX's issue 39103): run pip install -r requirements.txt, which leaves such versions out"
        )


@jax.jit
def _squared_norms(rows):
    return jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2))(rows)


def unequal_shares(what, number, offers, mesh):
    """The DeviceError of a number of examples or sub-batches that cannot be shared out equally over a mesh.

    what: the flag that says how many; offers: flags that may be given instead, to which fewer devices are added.
    """
    fewer = max(n for n in range(1, mesh.size) if number % n == 0)
    with_fewer = f'--devices {fewer}' if jax.process_count() == 1 else f'processes that have {fewer} devices together'
    offered = ', or '.join([*offers, with_fewer])
    return DeviceError(f'{what} {number} cannot be shared out over {mesh.size} devices: take {offered}')


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


def join(script, coordinator, processes, process_id, timeout=None, stops_by_step=False):
    """Makes the processes that call it one run: jax.devices() are those of all of them. Raises DeviceError.

    coordinator: 'HOST:PORT' of process 0, or 'auto' to take all from Slurm, Open MPI or Kubernetes. Where not all have
    joined after `timeout` seconds, 60 if it is None, each ends with a line from `script` and status 2; a process that
    is not heard of for half a minute later on ends the others. With stops_by_step, reached_stop tells of the signals
    of signals.STOPPING; else they end the process.
    """
    if jax.__version_info__ < (0, 10, 2):  # whose cached collectives never return: another process waits for them
        jax.config.update('jax_enable_compilation_cache', False)
    jax.config.update('jax_enable_preemption_service', stops_by_step)
    address = {'coordinator_address': coordinator, 'cluster_detection_method': 'deactivate'}
    given = {} if coordinator == 'auto' else address
    signals.handle(signal.SIG_DFL)
    timeout = timeout or 60
    waiting = threading.Timer(timeout, _give_up, [script, coordinator, timeout])
    waiting.start()
    try:
        jax.distributed.initialize(
            **given,
            num_processes=processes,
            process_id=process_id,
            initialization_timeout=timeout + 30,
            heartbeat_timeout_seconds=30,
            shutdown_timeout_seconds=60,
        )
    except (ValueError, RuntimeError) as error:
        reason = ' '.join(str(error).split())[:300]
        if coordinator == 'auto' and isinstance(error, ValueError):
            where = 'neither Slurm, Open MPI nor Kubernetes says which processes there are'
            reason = f'{where}; give HOST:PORT, --processes and --processid'
        raise DeviceError(f'--coordinator {coordinator}: {reason}') from error
    finally:
        waiting.cancel()
    if stops_by_step:
        signals.handle(_terminate, [number for number in signals.STOPPING if number != signal.SIGTERM])


def _give_up(script, coordinator, timeout):
    """Ends the process, which JAX would do with an abort and without saying why."""
    what = f'--coordinator {coordinator}: not all processes joined within {timeout} s'
    print(f'{script}: error: {what}; see what those say that ended, or give a longer --jointimeout', file=sys.stderr)
    _leave(2)


def _terminate(number, frame):
    """Does at another signal what SIGTERM does; a second one ends the process at once."""
    del frame
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def require_same(held):
    """Raises a DeviceError if a process holds other values than the first, {name: what JSON can hold}."""
    held = json.loads(json.dumps(held))
    for name, value in from_first(lambda: held).items():
        if held.get(name) != value:
            where = f'process {jax.process_index()}'
            raise DeviceError(f'{where} has other {name} than process 0: start all with the same flags and data')


def require_same_arrays(name, *arrays):
    """Raises a DeviceError if a process holds other arrays than the first."""
    if jax.process_count() > 1:
        require_same({name: [zlib.crc32(np.ascontiguousarray(array)) for array in arrays]})


def is_first():
    """Whether this is the first process, which has the run folder."""
    return jax.process_index() == 0


def from_first(function):
    """What a function of no arguments returns in the first process, in all of them; it is called there only.

    It is a value that JSON can hold.
    """
    if jax.process_count() == 1:
        return function()
    encoded = json.dumps(function()).encode() if is_first() else b''
    size = multihost_utils.broadcast_one_to_all(np.int32(len(encoded)))
    text = np.frombuffer(encoded, np.uint8) if is_first() else np.zeros(size, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(text).tobytes())


def wait_for_all():
    """Returns when all processes are here."""
    from_first(lambda: None)


def in_any_process(condition):
    """Whether a condition holds in any process, each of which has to call it."""
    return bool(np.any(multihost_utils.process_allgather(np.bool_(condition))))


def arrays_from_first(arrays):
    """A pytree of arrays of the first process, keys among them, in all; the others have its jax.ShapeDtypeStructs."""
    if jax.process_count() == 1:
        return arrays
    types = jax.eval_shape(lambda held: jax.tree.map(key_data, held), arrays)
    numbers = jax.tree.map(
        lambda x, of: np.asarray(key_data(x)) if is_first() else np.zeros(of.shape, of.dtype), arrays, types
    )
    return jax.tree.map(like_key, multihost_utils.broadcast_one_to_all(numbers), arrays)


def key_data(x):
    """An array, or the numbers of a key."""
    return jax.random.key_data(x) if _is_key(x) else x


def like_key(x, like):
    """An array, or a key of the numbers x if `like` is one and x is not."""
    return jax.random.wrap_key_data(x, impl='threefry2x32') if _is_key(like) and not _is_key(x) else x


def _is_key(x):
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def reached_stop(stop, call):
    """Whether training is to end after a step, which is asked once a step: all processes end after the same one.

    stop: a signals.Stop. Of several processes, JAX's service for preemption tells all of the SIGTERM of any; it wants
    the number of the call, from 1 on: of a signal before the first it tells at number 1.
    """
    if not jax.distributed.is_initialized():
        return stop.signal is not None
    if multihost_utils.reached_preemption_sync_point(call):
        stop.signal = signal.SIGTERM
    return stop.signal is not None


@contextlib.contextmanager
def enough_memory(advice):
    """Raises a DeviceError where the memory of a device is exhausted. advice: what takes less."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        raise DeviceError(f'a device has not enough memory: {advice}') from error


@contextlib.contextmanager
def ended_together(script, advice):
    """Ends this process at once if an error or another process's end does, as each would wait for the other.

    advice: what to do after another process's end. In a run of one process it does nothing.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized() or (isinstance(error, SystemExit) and error.code not in (1, 2)):
            raise
        if isinstance(error, SystemExit):
            _leave(error.code)
        if any(name in str(error) for name in ('Gloo', 'NCCL', 'UNAVAILABLE')):
            ended = f'{script}: error: another process ended, so process {jax.process_index()} does too'
            print(f'{ended}; {advice}', file=sys.stderr)
        else:
            traceback.print_exc()
        _leave(1)


def _leave(status):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
