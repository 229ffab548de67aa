"""Processes of train.py side by side: one a GPU, or one at a time where there is none."""

import os
import queue
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SCRIPTS = Path(__file__).parent


def arguments(values):
    """Flags as on the command line, of {name: value}; a switch is given where it is true."""
    given = {name: value for name, value in values.items() if value is not False}
    return [f'--{name}' if value is True else f'--{name}={value}' for name, value in given.items()]


def begun_run(folder):
    """The run folder below `folder` that has a checkpoint to go on from, None if there is none."""
    checkpoints = folder.glob('*/*/run_*/checkpoints/*')
    return next((path.parent.parent for path in checkpoints if path.name.isdecimal()), None)


def on_devices(tasks, number=None):
    """Calls task(environment) of each, `number` at once, one a GPU by default; returns what they return.

    environment: the os.environ of processes that are to run on a GPU of their own, or on their share of the cores.
    """
    gpus = _gpus()
    number = number or len(gpus) or 1
    free = queue.SimpleQueue()
    for job in range(number):
        gpu = {'CUDA_VISIBLE_DEVICES': gpus[job % len(gpus)]} if gpus else {}
        free.put(os.environ | gpu | (share_of_cores(number) if number > 1 else {}))

    def call(task):
        environment = free.get()
        try:
            return task(environment)
        finally:
            free.put(environment)

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(call, tasks))


def share_of_cores(number):
    """What lets XLA start threads for one of so many processes side by side; with more they hinder each other."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return {'PJRT_NPROC': str(max(1, cores // number))}


def _gpus():
    """The ids of the GPUs that CUDA_VISIBLE_DEVICES names, or all that nvidia-smi lists."""
    if 'CUDA_VISIBLE_DEVICES' in os.environ:
        return [gpu for gpu in os.environ['CUDA_VISIBLE_DEVICES'].split(',') if gpu]
    if shutil.which('nvidia-smi') is None:
        return []
    listed = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True).stdout
    return [str(i) for i, _ in enumerate(listed.splitlines())]


def train_seeds(values, seeds):
    """Trains with the flags {name: value} and each seed, in processes whose lines it prints; returns an exit status.

    SIGTERM and SIGINT are passed on to those that run, which save and end, and the others are not begun.
    """
    running, signals = set(), []

    def train(seed, environment):
        if signals:
            return 0
        command = [sys.executable, SCRIPTS / 'train.py', *arguments(values | {'randomseed': seed})]
        with subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            running.add(process)
            if signals:
                process.send_signal(signals[0])
            for line in process.stdout:
                print(f'seed {seed}: {line}', end='', flush=True)
            running.discard(process)
        return process.returncode

    def pass_on(number, frame):
        del frame
        signals.append(number)
        for process in list(running):
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        statuses = on_devices([lambda environment, seed=seed: train(seed, environment) for seed in seeds])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + signals[0] if signals else max(128 - status if status < 0 else status for status in statuses)
