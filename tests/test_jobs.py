"""Parallel processes: how they share the machine, what they print, and how they end."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from runs import folders, processes, signals

WAITS = [sys.executable, '-c', 'import time; print("begun", flush=True); time.sleep(60)']


def test_jobs_share_the_machine(monkeypatch):
    """Each of two parallel tasks gets its own GPU and half of the cores."""
    monkeypatch.setattr('os.sched_getaffinity', lambda process: range(8), raising=False)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,5')
    both_run = threading.Barrier(2)
    code = 'import os; print(os.environ["CUDA_VISIBLE_DEVICES"], os.environ["PJRT_NPROC"])'

    def task(run):
        both_run.wait(timeout=10)
        lines = []
        assert run([sys.executable, '-c', code], lines.append) == 0
        return lines

    assert sorted(processes.on_devices([task, task])) == [['3 4\n'], ['5 4\n']]


def test_a_task_that_fails_leaves_the_others(capsys):
    def fails(run):
        raise folders.RunError('run_0: train.py ended with status 1')

    assert processes.on_devices([fails, lambda run: run([sys.executable, '-c', 'exit(3)'], print)]) == [None, 3]
    assert capsys.readouterr().err == 'run_0: train.py ended with status 1\n'


@pytest.mark.parametrize('number', signals.STOPPING)
def test_a_signal_ends_what_runs_and_begins_no_more(number, capsys):
    before = signal.getsignal(number)

    def is_stopped(run):
        return run(WAITS, lambda line: os.kill(os.getpid(), number))

    with pytest.raises(SystemExit) as stop:
        processes.on_devices([is_stopped, lambda run: run([sys.executable, '-c', 'print("begun")'], print)])
    out, error = capsys.readouterr()
    assert stop.value.code == 128 + number and not out and f'{number.name}: waiting for the running processes' in error
    assert signal.getsignal(number) == before


def test_a_signal_that_another_thread_gets(capsys):
    """The system may deliver a signal to any thread. This does not wake the main thread."""
    began = time.monotonic()

    def is_stopped(run):
        return run(WAITS, lambda line: signal.pthread_kill(threading.get_ident(), signal.SIGTERM))

    with pytest.raises(SystemExit) as stop:
        processes.on_devices([is_stopped])
    assert stop.value.code == 143 and time.monotonic() - began < 30


def test_status_of_seeds_of_which_one_is_killed(monkeypatch):
    monkeypatch.setattr(processes, 'on_devices', lambda tasks: [0, -9, 1])
    assert processes.train_seeds({}, [0, 1, 2]) == 137


def test_seeds_that_a_signal_left_out_are_named(monkeypatch, tmp_path, capsys):
    """Seed 0 is complete, seed 1 has a checkpoint, seed 2 has none, seed 3 was not started."""

    def saved(command, write):
        run = tmp_path / 'cifar10_resnet18' / 'sgd' / 'run_1'
        (run / 'checkpoints' / '5').mkdir(parents=True)
        (run / 'lock').write_text(f'process 17 on {socket.gethostname()}\n')
        raise processes._StoppedError(17)

    def stopped(command, write):
        raise processes._StoppedError(18)

    def on_devices(tasks):
        for task, run in zip(tasks, (lambda command, write: 0, saved, stopped), strict=False):
            with contextlib.suppress(processes._StoppedError):
                task(run)
        sys.exit(143)

    monkeypatch.setattr(processes, 'on_devices', on_devices)
    with pytest.raises(SystemExit):
        processes.train_seeds({'resultsfolder': tmp_path}, [0, 1, 2, 3])
    assert capsys.readouterr().err.endswith('train with the same flags and --seeds 2 3\n')


def test_run_to_go_on_with(tmp_path):
    """Only a run with a complete checkpoint can be resumed. A half-written checkpoint does not count."""
    checkpoints = tmp_path / 'mnist_mlp' / 'sgd' / 'run_0' / 'checkpoints'
    (checkpoints / '5.partial').mkdir(parents=True)
    assert processes.begun_run(tmp_path) is None
    (checkpoints / '4').mkdir()
    assert processes.begun_run(tmp_path) == checkpoints.parent


def test_several_processes_on_a_gpu(monkeypatch):
    """Processes that share a GPU get a part of its memory each. A process with its own GPU keeps JAX's default."""
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0,1')
    monkeypatch.delenv('XLA_PYTHON_CLIENT_MEM_FRACTION', raising=False)
    code = 'import os; print(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION"))'

    def part(run):
        lines = []
        run([sys.executable, '-c', code], lines.append)
        return lines

    assert processes.on_devices([part], 2) == [['None\n']] and processes.on_devices([part], 4) == [['0.45\n']]


def test_gpus_that_are_listed(monkeypatch):
    """Lines with an error or with a part of a GPU (MIG) do not count."""
    said = 'GPU 0: NVIDIA H100 (UUID: GPU-1)\n  MIG 1g.10gb Device 0: (UUID: MIG-2)\nGPU 1: NVIDIA H100 (UUID: GPU-3)\n'
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    monkeypatch.setattr('shutil.which', lambda name: name)
    for text, found in ((said, ['0', '1']), ("NVIDIA-SMI has failed because it couldn't communicate\n", [])):
        monkeypatch.setattr('subprocess.run', lambda *args, text_=text, **kwargs: SimpleNamespace(stdout=text_))
        assert processes._gpus() == found


def test_a_run_that_another_process_works_on_is_left_alone(tmp_path):
    """The run is neither trained twice nor removed, although it has no checkpoint yet."""
    run = tmp_path / 'sweep' / 'mnist_mlp' / 'sgd' / 'run_0'
    run.mkdir(parents=True)
    for folder in (run, tmp_path / 'sweep'):
        with folders.locked(folder), pytest.raises(folders.RunError, match='is being trained by'):
            processes.trained_and_tested(pytest.fail, tmp_path / 'sweep', {'optim': 'sgd'}, [])
    assert run.exists()


def test_folders_that_others_made_are_kept(tmp_path):
    """Only files that train.py writes before the first checkpoint are removed."""
    run = tmp_path / 'project' / 'images' / 'run_7'
    run.mkdir(parents=True)
    (run / 'lock').touch()
    (run / 'precious.txt').touch()
    with pytest.raises(folders.RunError, match=r'run_7 holds precious\.txt but no checkpoint: move the folder away'):
        processes._trained(None, tmp_path, {})
    assert (run / 'precious.txt').exists()


def test_a_run_of_nothing_but_a_start_is_begun_anew(tmp_path):
    """Any other file belongs to somebody, and stays."""
    for name, is_ours in (
        ('lock', True), ('config.json', True), ('log.jsonl.host.1.partial', True), ('config.old', False),
        ('log.txt', False), ('checkpoints', True), ('checkpoints/2.partial', True), ('checkpoints/thesis.tex', False),
    ):  # fmt: skip
        path = tmp_path / name
        path.mkdir() if name == 'checkpoints' else path.touch()
        assert bool(processes._is_of_a_start(tmp_path / name.partition('/')[0])) == is_ours, name
