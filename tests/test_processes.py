"""Runs of several processes, as on several hosts: real processes on this machine, with one CPU device each."""

import json
import os
import shlex
import signal
import socket
import time

import jax
import numpy as np
import pytest

import archives
import conftest
import data
import models
import test as evaluate
import train
from children import ROOT, Child
from runs import checkpoints

# Runs train.py or test.py with small networks, which compile fast.
SCRIPT = f"""if True:
    import sys
    sys.path[:0] = ['{ROOT}/tests', '{ROOT}']
    import conftest, models, test, train
    models.MODELS |= {{'resnet18': conftest.SmallResNet, 'resnet20': conftest.ShortResNet20}}
    {{'train': train, 'test': test}}[sys.argv[1]].main(sys.argv[2:])
"""
FLAGS = ['--dataset=mnist', '--alpha=0.05', '--batchsize=96', '--warmup=0', '--epochs=1']
LONG = ['--optim=bsam', '--model=resnet18', '--checkpointevery=1']
# More threads than cores slow each other down.
SMALL = {'JAX_PLATFORMS': 'cpu', 'PJRT_NPROC': '1', 'XLA_FLAGS': conftest.XLA_FLAGS_OF_FEW_STEPS}


def free_address():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return f'127.0.0.1:{free.getsockname()[1]}'


def start(number, *arguments, last=(), script='train', devices_of_last=1, folder_of_last=ROOT, code=SCRIPT):
    """Starts the processes of one run, the last with more arguments. A single process gets no --coordinator."""
    address = free_address()
    others = [[f'--coordinator={address}', f'--processes={number}', f'--processid={i}'] for i in range(number)]
    others[-1] += last
    of_last = f'{conftest.XLA_FLAGS_OF_FEW_STEPS} --xla_force_host_platform_device_count={devices_of_last}'
    environments = [os.environ | SMALL] * (number - 1) + [os.environ | SMALL | {'XLA_FLAGS': of_last}]
    folders = [ROOT] * (number - 1) + [folder_of_last]
    return [
        Child(['-c', code, script, *arguments, *(own if number > 1 else [])], folder, environment)
        for own, environment, folder in zip(others, environments, folders, strict=True)
    ]


def ended(processes):
    """Waits for processes. Returns [(exit status, stdout, stderr)]."""
    said = [process.communicate() for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


@pytest.fixture(scope='module')
def short(tmp_path_factory):
    """Flags of a short run on 480 digits of scikit-learn.

    The digits are in files of MNIST's format, because importing scikit-learn would take each process a second.
    """
    folder = tmp_path_factory.mktemp('digits')
    digits = data.dataset('digits', folder)
    parts = ([array[:number] for array in digits.read(split)] for split, number in (('train', 480), ('test', 120)))
    archives.write_idx_files(folder / 'mnist', *parts)
    return [*FLAGS, f'--datasetfolder={folder}']


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    """Gives this process, which trains and evaluates alone for comparison, the same small networks."""
    monkeypatch.setitem(models.MODELS, 'resnet18', conftest.SmallResNet)
    monkeypatch.setitem(models.MODELS, 'resnet20', conftest.ShortResNet20)


def weights(run):
    """Returns all weights and batch statistics of a run's newest checkpoint, and the step."""
    step, state, _ = conftest.restore(run)
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves((state.params, state.batch_stats))]), step


@pytest.mark.parametrize(
    ('number', 'optim', 'model', 'more'),
    [(2, 'bsam', 'lenet', ['--stream']), (4, 'sam', 'resnet20', []), (2, 'sgd', 'resnet18', ['--stream'])],
)
def test_processes_train_as_one(number, optim, model, more, short, tmp_path):
    """With --stream each process reads only its part of a batch. The single process keeps all images on its device.

    The last of several processes does not see the run folder.
    """
    flags = [*short, f'--optim={optim}', f'--model={model}', '--trainimages=192']
    alone, together = tmp_path / 'alone', tmp_path / 'to[ge]ther'
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    relative = os.path.relpath(together, ROOT)
    processes = start(number, *flags, *more, f'--resultsfolder={relative}', folder_of_last=elsewhere)
    train.main([*flags, f'--resultsfolder={alone}'])
    for status, _, errors in ended(processes):
        assert status == 0, errors
    run = f'mnist_{model}/{optim}/run_0'
    assert [path.name for path in (together / run).parent.iterdir()] == ['run_0']
    (expected, last), (found, step) = (weights(folder / run) for folder in (alone, together))
    assert step == last == 4
    assert not list(elsewhere.iterdir())
    assert 0 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-5


def until_step(folder, step):
    """Waits for a checkpoint of a run below a folder, and returns the run."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for checkpoint in folder.glob('*/*/run_*/checkpoints/[0-9]*'):
            if checkpoint.name.isdecimal() and int(checkpoint.name) >= step:
                return checkpoint.parent.parent
        time.sleep(0.05)
    raise TimeoutError(f'no checkpoint of step {step} in {folder}')


def test_signal_and_resume_on_more(short, tmp_path):
    """SIGTERM to one of two processes ends both after the same step. Four resume, and match a single process."""
    flags = [*short, *LONG, '--epochs=4']
    alone, together = tmp_path / 'alone', tmp_path / 'to[ge]ther'
    processes = start(2, *flags, f'--resultsfolder={together}')
    run = until_step(together, 2)
    processes[1].send_signal(signal.SIGTERM)
    (first, _, saved), (second, _, _) = ended(processes)
    assert (first, second) == (143, 143)
    assert f'saved; resume with: python train.py --resume {shlex.quote(str(run))}' in saved
    assert 2 <= weights(run)[1] < 25
    processes = start(4, f'--resume={run}', '--checkpointevery=1000')
    train.main([*flags, '--checkpointevery=1000', f'--resultsfolder={alone}'])
    for status, _, errors in ended(processes):
        assert status == 0, errors
    (expected, last), (found, step) = weights(alone / run.relative_to(together)), weights(run)
    assert step == last == 25
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-4


def test_signal_before_the_first_step_that_is_resumed(short, tmp_path):
    """The signal arrives while the step is compiled. Both processes end after the step."""
    run = train.main([*short, '--optim=bsam', '--model=resnet18', f'--resultsfolder={tmp_path}'])
    begun = weights(run)[1]
    processes = start(2, f'--resume={run}', '--epochs=100000')
    assert any(line.startswith(str(run)) for line in processes[0].stdout)
    processes[1].send_signal(signal.SIGTERM)
    assert [status for status, _, _ in ended(processes)] == [143, 143]
    assert begun < weights(run)[1] < begun + 10


# Runs SCRIPT so that the first process cannot write its checkpoints.
CANNOT_SAVE = f"""if True:
    import sys
    import numpy
    from unittest import mock
    if '--processid=0' in sys.argv:
        numpy.savez = mock.Mock(side_effect=OSError(5, 'Input/output error'))
{SCRIPT.removeprefix('if True:')}"""


def test_checkpoints_that_are_not_written(short, tmp_path):
    """The first process reports the failure once. All processes end with status 1."""
    processes = start(2, *short, '--optim=sgd', '--model=mlp', f'--resultsfolder={tmp_path}', code=CANNOT_SAVE)
    (first, _, said), (second, _, other) = ended(processes)
    assert (first, second) == (1, 1)
    assert said.count('could not be saved in') == 1 and 'Input/output error' in said and 'saved in' not in other


@pytest.mark.parametrize('killed', [0, 1])
def test_killed_process_ends_the_others(killed, short, tmp_path):
    """The others end within a minute, with a message. A single process can resume the run."""
    processes = start(2, *short, *LONG, '--epochs=100000', f'--resultsfolder={tmp_path}')
    run = until_step(tmp_path, 2)
    processes[killed].kill()
    began = time.monotonic()
    status, _, errors = ended(processes)[1 - killed]
    assert status != 0 and time.monotonic() - began < 60
    assert 'another process ended' in errors or 'another task died' in errors
    last = checkpoints.all_steps(run / 'checkpoints')[-1]
    assert checkpoints.find_damage(run / 'checkpoints' / str(last)) is None
    (process,) = start(1, f'--resume={run}')
    until_step(tmp_path, last + 1)
    process.send_signal(signal.SIGTERM)
    ((status, _, errors),) = ended([process])
    assert status == 143, errors


@pytest.mark.parametrize(
    ('flags', 'line'),
    [
        (['--coordinator=host'], "argument --coordinator: 'host' is neither HOST:PORT nor auto"),
        (['--coordinator=host:1'], '--coordinator HOST:PORT needs --processes N, and a --processid from 0 to N - 1'),
        (['--coordinator=host:1', '--processes=2', '--processid=2'], 'needs --processes N, and a --processid'),
        (['--jointimeout=9'], '--jointimeout needs --coordinator'),
        (['--processes=2'], '--processes and --processid need --coordinator HOST:PORT'),
    ],
)
def test_addresses_that_are_not_whole(flags, line, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    assert stop.value.code == 2 and line in capsys.readouterr().err


def test_automatic_without_a_cluster(short, tmp_path):
    ((status, _, error),) = ended(start(1, *short, '--coordinator=auto', f'--resultsfolder={tmp_path}'))
    assert status == 2 and error.count('\n') == 1 and not list(tmp_path.iterdir())
    assert '--coordinator auto: this process is not in a job of Slurm, Open MPI or Kubernetes' in error


@pytest.mark.parametrize('number', [0, 1])
def test_process_that_waits_for_one_that_never_joins(number, short, tmp_path):
    address = ['--processes=2', f'--processid={number}', f'--coordinator={free_address()}', '--jointimeout=2']
    began = time.monotonic()
    ((status, _, error),) = ended(start(1, *short, *address, f'--resultsfolder={tmp_path}'))
    assert status == 2 and error.count('\n') == 1 and time.monotonic() - began < 60
    assert 'not all processes joined within 2 s' in error and not list(tmp_path.iterdir())


def test_error_of_one_ends_all(datasets, tmp_path):
    """One of two processes does not find its data, or has other flags. It ends with status 2, the other soon after."""
    flags = ['--dataset=mnist', '--model=mlp', '--batchsize=20', '--optim=sgd', f'--datasetfolder={datasets}']
    processes = start(2, *flags, f'--resultsfolder={tmp_path}', last=['--dataset=tinyimagenet'])
    began = time.monotonic()
    (first, _, _), (second, _, errors) = ended(processes)
    assert first != 0 and second == 2 and time.monotonic() - began < 60
    assert 'train.py: error:' in errors and 'Traceback' not in errors
    (first, _, _), (second, _, errors) = ended(start(2, *flags, f'--resultsfolder={tmp_path}', last=['--alpha=0.5']))
    assert first != 0 and second == 2
    assert 'process 1 and process 0 differ in their flags: start all processes with the same flags and data' in errors


@pytest.mark.parametrize(
    ('optim', 'model', 'flags'),
    [('bsam', 'resnet18', ['--testmc=5', '--bnrefresh=2', '--ood=mnist', '--plots']), ('sgd', 'mlp', ['--laplace'])],
)
def test_processes_evaluate_as_one(optim, model, flags, datasets, tmp_path):
    """Two processes, one without the run folder, measure the same as one. The first prints and writes the results."""
    training = [*FLAGS, f'--optim={optim}', f'--model={model}', f'--datasetfolder={datasets}', '--epochs=0']
    training += ['--dataset=cifar10', '--batchsize=8']
    run = train.main([*training, f'--resultsfolder={tmp_path}'])
    metrics = run / f'metrics{"-laplace" * (optim == "sgd")}.json'
    elsewhere = [f'--resultsfolder={tmp_path / "elsewhere"}']
    processes = ended(start(2, f'--resultsfolder={run}', *flags, last=elsewhere, script='test'))
    for i, (status, out, errors) in enumerate(processes):
        assert status == 0, errors
        assert ('results at mean of distribution:' in out) == (i == 0)
    assert not (tmp_path / 'elsewhere').exists()
    of_two = json.loads(metrics.read_text())
    evaluate.main([f'--resultsfolder={run}', *flags])
    of_one = json.loads(metrics.read_text())
    for at in ('mean', 'average'):
        one, two = (np.array(list(found[at].values()), float) for found in (of_one, of_two))
        np.testing.assert_allclose(two, one, rtol=1e-4)


def test_processes_that_differ_in_devices(short, tmp_path):
    flags = [*short, '--optim=sgd', '--model=mlp', f'--resultsfolder={tmp_path}']
    found = ended(start(2, *flags, devices_of_last=2))
    assert all(status != 0 and 'Traceback' not in errors for status, _, errors in found)
    assert any('some processes have 1 devices, others 2: give all the same number' in errors for _, _, errors in found)


def test_one_process_that_joined_is_stopped_as_ever(short, tmp_path):
    flags = [*short, *LONG, '--epochs=100000', '--processes=1', '--processid=0', f'--coordinator={free_address()}']
    (process,) = start(1, *flags, f'--resultsfolder={tmp_path}')
    until_step(tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    ((status, _, errors),) = ended([process])
    assert status == 143 and 'saved; resume with' in errors
