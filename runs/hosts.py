"""Several processes that train or evaluate one run together, on one host or several. `join` connects them.

All processes run the same program. Only the first process, process 0, reads and writes the run folder.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import traceback
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ops import sharding
from runs import devices, launch, signals
from runs.devices import DeviceError


@contextlib.contextmanager
def joined(
    script: str, start: argparse.Namespace, *, after_an_end: str, less_memory: str, stops_by_step: bool = False
) -> Iterator[contextlib.ExitStack]:
    """Joins the processes of a run if --coordinator is given, and checks the devices.

    Only the first process prints to stdout. An error ends the script with one line, and ends all processes.

    Args:
        script: the name of the script, for messages.
        start: the flags `coordinator`, `processes`, `processid` and `jointimeout`.
        after_an_end: what to do after another process has ended, for the message.
        less_memory: how to use less memory of a device, for the message.
        stops_by_step: as for `join`.

    Yields:
        A stack that closes when the context ends.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(ended_together(script, after_an_end))
        stack.enter_context(launch.one_line_errors(script))
        stack.enter_context(devices.enough_memory(less_memory))
        if start.coordinator:
            join(script, start.coordinator, start.processes, start.processid, start.jointimeout, stops_by_step)
        devices.require()
        wait_for_all()  # before data is read, because one process may read for longer than the others would wait
        if not is_first():
            stack.enter_context(contextlib.redirect_stdout(None))
        yield stack


def join(
    script: str, coordinator: str, processes: int | None, process_id: int | None, timeout: int | None = None,
    stops_by_step: bool = False,
) -> None:  # fmt: skip
    """Connects all processes that call this function. Then jax.devices() lists the devices of all processes.

    If a process sends no heartbeat for 30 seconds later on, the other processes end.

    Args:
        script: the name of the script, for messages.
        coordinator: 'HOST:PORT' of process 0, or 'auto' if Slurm, Open MPI or Kubernetes describes the processes.
        processes: the number of processes, None with 'auto'.
        process_id: the index of this process, None with 'auto'.
        timeout: seconds within which all processes must join. None means 60. After that, a waiting process ends with a
            message and status 2.
        stops_by_step: whether reached_stop reports the signals of signals.STOPPING. If not, the signals end the
            process.

    Raises:
        DeviceError: the processes cannot be joined.
    """
    if jax.__version_info__ < (0, 10, 2):  # cached collectives never return in older versions, and block all processes
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
            found = 'this process is not in a job of Slurm, Open MPI or Kubernetes'
            reason = f'{found}; give --coordinator HOST:PORT, --processes and --processid'
        raise DeviceError(f'--coordinator {coordinator}: {reason}') from error
    finally:
        waiting.cancel()
    if stops_by_step:
        signals.handle(_terminate, [number for number in signals.STOPPING if number != signal.SIGTERM])


def _give_up(script, coordinator, timeout):
    """Ends the process with a message, because JAX would abort without saying why."""
    what = f'--coordinator {coordinator}: not all processes joined within {timeout} s'
    print(f'{script}: error: {what}; see the output of the other processes, or raise --jointimeout', file=sys.stderr)
    _leave(2)


def _terminate(number, frame):
    """Turns a signal into SIGTERM, which JAX reports to all processes. The same signal again ends this process."""
    del frame
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def require_same(held: dict) -> None:
    """Raises a DeviceError if the values {name: value} differ between processes. The values must fit in JSON."""
    held = json.loads(json.dumps(held))
    for name, value in from_first(lambda: held).items():
        if held.get(name) != value:
            where = f'process {jax.process_index()} and process 0'
            raise DeviceError(f'{where} differ in their {name}: start all processes with the same flags and data')


def require_same_arrays(name: str, *arrays: np.ndarray) -> None:
    """Raises a DeviceError if the arrays differ between processes. name: what the arrays are, for the message."""
    if jax.process_count() > 1:
        require_same({name: [zlib.crc32(np.ascontiguousarray(array)) for array in arrays]})


def is_first() -> bool:
    """Returns whether this is the first process, which reads and writes the run folder."""
    return jax.process_index() == 0


def from_first(function: Callable) -> Any:
    """Calls function() in the first process, and returns its result in every process.

    All processes must call from_first. The result must fit in JSON.
    """
    if jax.process_count() == 1:
        return function()
    encoded = json.dumps(function()).encode() if is_first() else b''
    size = multihost_utils.broadcast_one_to_all(np.int32(len(encoded)))
    text = np.frombuffer(encoded, np.uint8) if is_first() else np.zeros(size, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(text).tobytes())


def wait_for_all() -> None:
    """Waits until all processes have called this function."""
    from_first(lambda: None)


def arrays_from_first(arrays: Any) -> Any:
    """Returns the first process's pytree of arrays in every process. Arrays may be random keys.

    The other processes pass jax.ShapeDtypeStructs of the arrays.
    """
    if jax.process_count() == 1:
        return arrays
    types = jax.eval_shape(lambda held: jax.tree.map(sharding.key_data, held), arrays)
    numbers = jax.tree.map(
        lambda x, of: np.asarray(sharding.key_data(x)) if is_first() else np.zeros(of.shape, of.dtype), arrays, types
    )
    return jax.tree.map(sharding.like_key, multihost_utils.broadcast_one_to_all(numbers), arrays)


_SHARE = 0.4  # the largest fraction of a device's memory that images may take


def must_stream(images: np.ndarray) -> bool:
    """Returns whether images would take too much of a device's memory. All processes get the first process's answer.

    images: uint8 [N, H, W, C].
    """
    limit = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')
    return from_first(lambda: limit is not None and images.nbytes > _SHARE * limit)


def reached_stop(stop: signals.Stop) -> bool:
    """Returns whether training must end after a step. All processes end after the same step.

    Must be called once a step. If any process gets a SIGTERM, JAX's preemption service reports it to all processes.
    The service needs the number of the call, from 1. It reports a signal before the first call at call 1.
    """
    stop.calls += 1
    if not jax.distributed.is_initialized():
        return stop.signal is not None
    if multihost_utils.reached_preemption_sync_point(stop.calls):
        stop.signal = signal.SIGTERM
    return stop.signal is not None


@contextlib.contextmanager
def ended_together(script: str, advice: str) -> Iterator[None]:
    """Ends this process at once after an error, or after another process has ended.

    Otherwise the processes would wait for each other. Changes nothing in a run of one process.

    Args:
        script: the name of the script, for messages.
        advice: what to do after another process has ended, for the message.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized() or (isinstance(error, SystemExit) and error.code not in (1, 2)):
            raise
        if isinstance(error, SystemExit):
            _leave(error.code)
        if any(name in str(error) for name in ('Gloo', 'NCCL', 'UNAVAILABLE')):
            ended = f'{script}: error: another process ended, so process {jax.process_index()} ends too'
            print(f'{ended}; {advice}', file=sys.stderr)
        else:
            traceback.print_exc()
        _leave(1)


def _leave(status):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
