"""Processes, on one host or many, that `join` makes one run of.

All of them run the same program. The first process reads and writes the run folder, except for checkpoints, which all
processes may write together.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import traceback
import zlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from ops import sharding
from runs import signals
from runs.devices import DeviceError


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
    types = jax.eval_shape(lambda held: jax.tree.map(sharding.key_data, held), arrays)
    numbers = jax.tree.map(
        lambda x, of: np.asarray(sharding.key_data(x)) if is_first() else np.zeros(of.shape, of.dtype), arrays, types
    )
    return jax.tree.map(sharding.like_key, multihost_utils.broadcast_one_to_all(numbers), arrays)


_SHARE = 0.4  # of a device's memory that images may take


def must_stream(images):
    """Returns, in all processes, whether images would fill a device of the first process."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')
    return from_first(lambda: limit is not None and images.nbytes > _SHARE * limit)


def reached_stop(stop):
    """Returns whether training is to end after a step. All processes end after the same step.

    To be called once a step, with a signals.Stop. JAX's service for preemption tells all processes of the SIGTERM of
    any. It wants the number of the call, from 1 on, and tells of an earlier signal at number 1.
    """
    stop.calls += 1
    if not jax.distributed.is_initialized():
        return stop.signal is not None
    if multihost_utils.reached_preemption_sync_point(stop.calls):
        stop.signal = signal.SIGTERM
    return stop.signal is not None


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
