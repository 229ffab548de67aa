"""Runs processes of train.py and test.py side by side: one per GPU, or one at a time without GPUs."""

import math
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

from runs import folders, json_files, signals, training_flags

SCRIPTS = Path(__file__).parent.parent


def on_devices(tasks: Sequence[Callable], number: int | None = None) -> list:
    """Calls task(run) for each task, N at once.

    `run(command, write)` runs a process on a separate GPU or share of the cores. It calls write(line) with each line
    that the process prints, and returns the exit status of the process. Signals of signals.STOPPING are passed on to
    the running processes. Then no new process starts, and this process ends after the running processes.

    Args:
        tasks: functions of `run`.
        number: N, how many tasks run at once. None means one per GPU, or one without GPUs.

    Returns:
        The results of the tasks. If a task raises a RunError, its message is printed and its result is None.
    """
    gpus = _gpus()
    number = number or len(gpus) or 1
    free = queue.SimpleQueue()
    for job in range(number):
        free.put(os.environ | _share_of_gpus(gpus, job, number) | (share_of_cores(number) if number > 1 else {}))

    def call(task):
        if processes.signal:
            return None
        environment = free.get()
        try:
            return task(partial(processes.run, environment))
        except _StoppedError:
            return None
        except folders.RunError as error:
            print(error, file=sys.stderr, flush=True)
            return None
        finally:
            free.put(environment)

    with _Processes() as processes, ThreadPoolExecutor(number) as pool:
        futures = [pool.submit(call, task) for task in tasks]
        while wait(futures, timeout=0.2).not_done:  # a signal to another thread does not wake this thread
            pass
        results = [future.result() for future in futures]
    if processes.signal:
        sys.exit(128 + processes.signal)
    return results


class _StoppedError(Exception):
    """The process with this number ended after a signal. The number is None if no process was started."""

    def __init__(self, number=None):
        self.number = number


class _Processes:
    """Starts processes, and passes signals of signals.STOPPING on to them while the context is entered."""

    def __init__(self):
        self.signal = None
        self._running = set()
        self._before = {}

    def __enter__(self):
        self._before = signals.handle(self._pass_on)
        return self

    def __exit__(self, *exception):
        signals.restore(self._before)

    def run(self, environment, command, write):
        """Runs a process to the end and returns its exit status. Raises _StoppedError after a signal."""
        if self.signal:
            raise _StoppedError
        with _start(environment, command) as process:
            self._running.add(process)
            if self.signal:
                process.send_signal(self.signal)
            for line in process.stdout:
                write(line)
        self._running.discard(process)
        if self.signal:
            raise _StoppedError(process.pid)
        return process.returncode

    def _pass_on(self, number, frame):
        del frame
        self.signal = number
        for process in list(self._running):
            process.send_signal(number)
        signals.say(f'{signal.Signals(number).name}: waiting for the running processes to save and end')


def _start(environment, command):
    """Starts a process. Its stderr goes to its stdout."""
    return subprocess.Popen(
        list(map(str, command)),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace',
        start_new_session=True,  # otherwise Ctrl-C would reach the process twice
    )


def share_of_cores(number: int) -> dict[str, str]:
    """Returns environment variables that limit XLA's threads in each of N parallel processes.

    With more threads the processes slow each other down.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return {'PJRT_NPROC': str(max(1, cores // number))}


def _share_of_gpus(gpus, job, number):
    """Returns environment variables that give process `job` of N a GPU, or a part of a GPU's memory.

    Without them, JAX would reserve most of the memory.
    """
    if not gpus:
        return {}
    on_one = math.ceil(number / len(gpus))
    part = {'XLA_PYTHON_CLIENT_MEM_FRACTION': f'{0.9 / on_one:.2f}'} if on_one > 1 else {}
    return {'CUDA_VISIBLE_DEVICES': gpus[job % len(gpus)]} | part


def _gpus():
    """Returns the ids of the GPUs that CUDA_VISIBLE_DEVICES names, or of all that nvidia-smi lists."""
    if 'CUDA_VISIBLE_DEVICES' in os.environ:
        return [gpu for gpu in os.environ['CUDA_VISIBLE_DEVICES'].split(',') if gpu]
    if shutil.which('nvidia-smi') is None:
        return []
    listed = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True).stdout
    return [str(i) for i, _ in enumerate(line for line in listed.splitlines() if line.startswith('GPU '))]


def train_seeds(values: dict, seeds: Sequence[int]) -> int:
    """Trains with the flags {name: value} and each seed, one process per seed. Prints the lines of all processes.

    Returns the highest exit status of all processes, 0 if all succeed. A process that signal N ends counts as 128 + N.
    """
    args = training_flags.parse_args(training_flags.command_line(values))
    left = set(seeds)

    def train(seed, run):
        def write(line):
            print(f'seed {seed}: {line}', end='', flush=True)

        try:
            status = run(
                [sys.executable, SCRIPTS / 'train.py', *training_flags.command_line(values | {'randomseed': seed})],
                write,
            )
        except _StoppedError as stopped:
            parent = folders.parent_of(args.resultsfolder, args.dataset, args.model, args.optim)
            if any(folders.has_checkpoint(path) for path in folders.locked_by(parent, stopped.number)):
                left.discard(seed)
            raise
        left.discard(seed)
        return status

    try:
        statuses = on_devices([partial(train, seed) for seed in seeds])
    except SystemExit:
        if left:
            numbers = ' '.join(str(seed) for seed in seeds if seed in left)
            print(f'seeds without a checkpoint: train with the same flags and --seeds {numbers}', file=sys.stderr)
        raise
    return max(128 - status if status < 0 else status for status in statuses)


def trained_and_tested(run: Callable, folder: Path, values: dict, requests: Sequence) -> tuple[Path, list[dict]]:
    """Trains or resumes one run and evaluates it. The scripts print to folder/output.txt.

    Args:
        run: the function that on_devices passes to a task.
        folder: a folder for this run. The run folder is made below it.
        values: flags of train.py, {name: value}.
        requests: an evaluation.request.Request for each call of test.py.

    Returns:
        The run folder, and a list with the metrics of each call.

    Raises:
        RunError: a script failed, or the folder holds another run.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / 'output.txt').exists() and not (folder / 'output.txt').is_file():
            raise folders.RunError(f'{folder / "output.txt"} is not a regular file: remove it')
        with folders.locked(folder), open(folder / 'output.txt', 'a', buffering=1) as output:
            call = partial(_call, run, folder, output)
            trained = _trained(call, folder, values)
            return trained, [_tested(call, trained, values, request) for request in requests]
    except (OSError, ValueError) as error:
        raise folders.RunError(f'{folder}: {error}') from error


def _call(run, folder, output, script, given):
    status = run([sys.executable, SCRIPTS / script, *given], output.write)
    if status:
        raise folders.RunError(f'{folder}: {script} ended with status {status}, see output.txt')


def _is_of_a_start(path):
    """Returns whether train.py writes this file or folder before the first checkpoint of the run is complete."""
    if path.name == 'checkpoints' and path.is_dir():
        return all(folders.LEFTOVER_CHECKPOINT.fullmatch(inner.name) for inner in path.iterdir())
    return re.fullmatch(r'lock|(config\.json|log\.jsonl)(\..+\.partial)?', path.name)


def _trained(call, folder, values):
    require_same_flags(folder, values)
    begun = begun_run(folder)
    if begun:
        may_change = {name: value for name, value in values.items() if name in training_flags.MAY_CHANGE}
        call(
            'train.py', [f'--resume={begun}', *training_flags.command_line(may_change), *training_flags.code_of(values)]
        )
        return begun
    for left in folder.glob('*/*/run_*'):
        others = sorted(path.name for path in left.iterdir() if not _is_of_a_start(path))
        if others:
            raise folders.RunError(f'{left} holds {others[0]} but no checkpoint: move the folder away, and try again')
        with folders.locked(left):
            pass
        shutil.rmtree(left)  # after the lock is closed, because NFS keeps open files in the folder
    call('train.py', [*training_flags.command_line(values), f'--resultsfolder={folder}'])
    return next(folder.glob('*/*/run_*'))


def _tested(call, trained, values, request):
    folders_given = {name: value for name, value in values.items() if name in ('datasetfolder', 'compilecache')}
    given = [*training_flags.command_line(folders_given), *request.arguments(), *training_flags.code_of(values)]
    call('test.py', [f'--resultsfolder={trained}', *given])
    return json_files.read_json(request.metrics_file(trained))


def require_same_flags(folder: Path, values: dict) -> None:
    """Raises a RunError if the run below `folder` began with other flags {name: value}.

    Ignores the flags that may change when a run is resumed, except --epochs.
    """
    exempt = {*training_flags.OF_START, *training_flags.MAY_CHANGE, 'resultsfolder'} - {'epochs'}
    for path in folder.glob('*/*/run_*/config.json'):
        given = vars(training_flags.parse_args(training_flags.command_line(values)))
        held = training_flags.checked_config(path.parent)['flags']
        for name in sorted(given.keys() - exempt, key=lambda name: (name not in values, name)):
            if held[name] != given[name]:
                raise folders.RunError(
                    f'{path.parent} began with --{name} {held[name]}, not {given[name]}: '
                    'use another folder, or remove this one'
                )


def begun_run(folder: Path) -> Path | None:
    """Returns the run folder below `folder` that has a checkpoint to resume from, or None."""
    return next((run for run in folder.glob('*/*/run_*') if folders.has_checkpoint(run)), None)
