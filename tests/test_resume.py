"""Runs that are stopped, killed, resumed, or run out of disk: nothing is lost, and the result is the same."""

import contextlib
import errno
import fcntl
import itertools
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

import optimizers
import test as evaluate
import train
from children import ROOT, Child
from conftest import arrays, read_log, restore
from runs import checkpoints, devices, folders, launch, signals
from runs.report import Report


def assert_same_run(run, other):
    """Asserts that two runs end in the same state and log.

    Weights, momentum, precision, batch statistics and key are equal bit for bit. Times in the log may differ.
    """
    for one, two in zip(arrays(restore(run)[1]), arrays(restore(other)[1]), strict=True):
        np.testing.assert_array_equal(one, two)
    assert without_times(read_log(run)) == without_times(read_log(other))


def without_times(log):
    return [
        {key: value for key, value in record.items() if key not in ('seconds', 'images_per_second')} for record in log
    ]


@pytest.fixture
def signal_after(monkeypatch):
    """Sends SIGTERM to this process after N training steps."""

    def arrange(steps):
        report, left = Report.step, [steps]

        def step(self, steps_done, loss):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            report(self, steps_done, loss)

        monkeypatch.setattr(Report, 'step', step)

    return arrange


def stopped(arguments):
    """Runs train.py, and asserts that SIGTERM stops it."""
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == 128 + signal.SIGTERM


QUICK = ('sgd', 'sam', 'bsam', 'swag', 'ivon')  # each with other arrays in its state; the others are slow tests
INSIDE_THE_FIRST_EPOCH, AFTER_AN_EPOCH, INSIDE_THE_SECOND = 1, 2, 3


@pytest.mark.parametrize(
    ('optim', 'dataset', 'model', 'steps'),
    [
        *(
            pytest.param(optim, 'mnist', 'mlp', INSIDE_THE_SECOND, marks=[pytest.mark.slow] * (optim not in QUICK))
            for optim in optimizers.OPTIMIZERS
        ),
        ('sgd', 'mnist', 'mlp', INSIDE_THE_FIRST_EPOCH),
        ('swag', 'mnist', 'mlp', AFTER_AN_EPOCH),
        ('bsam', 'mnist', 'mlp', AFTER_AN_EPOCH),
        ('bsam', 'mnist', 'resnet18', INSIDE_THE_SECOND),
        ('sgd', 'cifar10', 'resnet18', INSIDE_THE_SECOND),
        ('bsam', 'mnist', f'{ROOT}/docs/examples/own_network.py:Small', INSIDE_THE_SECOND),  # with dropout
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    optim, dataset, model, steps, flags_of, small_resnet18, signal_after, tmp_path, capsys
):
    flags = {'optim': optim, 'dataset': dataset, 'model': model, 'epochs': 2}
    whole = train.main(flags_of(**flags, resultsfolder=tmp_path / 'whole'))
    signal_after(steps)
    stopped(flags_of(**flags))
    run = tmp_path / 'results' / f'{dataset}_{folders.short_name(model)}' / optim / 'run_0'
    assert f'resume with: python train.py --resume {run}' in capsys.readouterr().err
    assert [record['epoch'] for record in folders.read_log(run)] == list(range((steps - 1) // 2))
    assert train.main([f'--resume={run}']) == run
    assert_same_run(run, whole)


def test_checkpoints_within_epochs_change_nothing(flags_of, tmp_path):
    """A complete run can resume from a checkpoint of any step."""
    whole = train.main(flags_of(resultsfolder=tmp_path / 'whole'))
    run = train.main(flags_of(checkpointevery=1))
    assert checkpoints.all_steps(run / 'checkpoints') == [3, 4]
    assert checkpoints.all_steps(whole / 'checkpoints') == [2, 4]
    assert_same_run(run, whole)
    train.main([f'--resume={run}', '--checkpoint=3'])
    assert_same_run(run, whole)


def test_later_checkpoints_stay_until_there_is_a_new_one(flags_of, monkeypatch):
    run = train.main(flags_of(checkpointevery=1))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr('data.Feed', mock.Mock(side_effect=devices.DeviceError('no memory')))
        train.main([f'--resume={run}', '--checkpoint=3'])
    assert checkpoints.all_steps(run / 'checkpoints') == [3, 4]
    train.main([f'--resume={run}', '--checkpoint=3', '--epochs=2'])
    assert checkpoints.all_steps(run / 'checkpoints') == [5, 6]


def test_later_checkpoints_are_removed_by_a_new_one(flags_of, signal_after, tmp_path):
    """The resumed run starts at step 2. Its new checkpoint, of step 4, also removes the checkpoint of step 3."""
    signal_after(3)
    stopped(flags_of(epochs=2))
    run = tmp_path / 'results' / 'mnist_mlp' / 'bsam' / 'run_0'
    assert checkpoints.all_steps(run / 'checkpoints') == [2, 3]
    signal_after(2)
    stopped([f'--resume={run}', '--checkpoint=2'])
    assert checkpoints.all_steps(run / 'checkpoints') == [2, 4]


def test_failed_saves_are_reported_once(flags_of, monkeypatch, capsys):
    monkeypatch.setattr('runs.checkpoints.Writer._complete', mock.Mock(side_effect=OSError(5, 'Input/output error')))
    with pytest.raises(SystemExit) as stop:
        train.main(flags_of(epochs=3))
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count('could not be saved in') == 1
    assert '(Input/output error); training continues and tries again at the next' in error


def test_checkpoints_every_few_minutes(flags_of):
    assert checkpoints.all_steps(train.main(flags_of(checkpointevery='0.000001min')) / 'checkpoints') == [3, 4]
    assert checkpoints.all_steps(train.main(flags_of(checkpointevery='60min')) / 'checkpoints') == [2, 4]


def test_resuming_a_complete_run_repeats_its_result_and_more_epochs_go_on(flags_of):
    run = train.main(flags_of(epochs=1))
    before, log = arrays(restore(run)[1]), read_log(run)
    train.main([f'--resume={run}'])
    for one, two in zip(arrays(restore(run)[1]), before, strict=True):
        np.testing.assert_array_equal(one, two)
    assert without_times(read_log(run)) == without_times(log)
    train.main([f'--resume={run}', '--epochs=3'])
    assert [record['epoch'] for record in read_log(run)] == [0, 1, 2, 3]
    assert without_times(read_log(run))[:2] == without_times(log) and folders.read_config(run)['flags']['epochs'] == 3


def test_best_checkpoint_is_kept_where_asked(flags_of):
    accuracies = itertools.cycle([0.3, 0.9, 0.1, 0.2, 0.4])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('metrics.accuracy', lambda probs, labels: next(accuracies))
        run = train.main([*flags_of(epochs=4), '--keepbest'])
        without = train.main(flags_of(epochs=4))
    assert checkpoints.all_steps(run / 'checkpoints') == [4, 8, 10]
    assert checkpoints.all_steps(without / 'checkpoints') == [8, 10]
    evaluate.main([f'--resultsfolder={run}', '--checkpoint=4'])


def test_best_checkpoint_of_those_that_are_there(flags_of):
    """A resumed run chooses from the checkpoints that still exist. Its last epoch is evaluated again."""
    accuracies = iter([0.9, 0.1, 0.2, 0.2, 0.15, 0.1, 0.1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('metrics.accuracy', lambda probs, labels: next(accuracies))
        run = train.main(flags_of(epochs=2))
        train.main([f'--resume={run}', '--epochs=5', '--keepbest'])
    assert checkpoints.all_steps(run / 'checkpoints') == [6, 10, 12]


def test_fewer_epochs(flags_of, signal_after, tmp_path, capsys):
    """Epochs that have begun cannot be left out, nor epochs with a later checkpoint."""
    signal_after(5)
    stopped(flags_of(epochs=200))
    run = tmp_path / 'results' / 'mnist_mlp' / 'bsam' / 'run_0'
    for given in (['--epochs=1'], ['--checkpoint=4', '--epochs=3']):
        with pytest.raises(SystemExit) as stop:
            train.main([f'--resume={run}', *given])
        assert stop.value.code == 2 and f'{given[-1].replace("=", " ")} is too few' in capsys.readouterr().err
    train.main([f'--resume={run}', '--epochs=2'])
    assert len(read_log(run)) == 3 and folders.read_config(run)['flags']['epochs'] == 2


def test_compilecache_is_never_the_one_that_a_run_names(flags_of, tmp_path, compilecache):
    """The cache holds machine code that is run, and the run may come from somebody else."""
    run = train.main(flags_of(compilecache=tmp_path / 'cache'))
    try:
        train.main([f'--resume={run}'])
        assert jax.config.jax_compilation_cache_dir == str(compilecache)
        train.main([f'--resume={run}', f'--compilecache={tmp_path / "other"}'])
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'other')
    finally:
        launch.use_compilecache(str(compilecache))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ([], None),
        (['--alpha=0.1'], None),
        (['--alpha=0.2'], '--alpha 0.2: {run} began with 0.1; omit the flag'),
        (['--optim=sgd'], '--optim sgd: {run} began with bsam'),
        (['--noaugment'], '--noaugment True: {run} began with False'),
        (['--epochs=0'], '--epochs 0 is too few to resume {run}: use 1 or more'),
        (['--checkpoint=7'], 'holds no checkpoint 7; choose from 2, 4'),
        (['--datasetfolder=/nowhere'], 'could not be downloaded'),
    ],
)
def test_flags_beside_resume(changes, message, flags_of, capsys):
    run = train.main(flags_of())
    before = {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}
    capsys.readouterr()
    if message is None:
        assert train.main([f'--resume={run}', *changes]) == run
        return
    with pytest.raises(SystemExit) as stop:
        train.main([f'--resume={run}', *changes])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and message.format(run=run) in error
    assert {path: path.read_bytes() for path in run.rglob('*') if path.is_file()} == before


def test_flags_that_agree_beside_resume(flags_of):
    """They are checked against the run's other flags, not against defaults."""
    run = train.main(flags_of(batchsize=12, batchsplit=3))
    assert train.main([f'--resume={run}', '--batchsplit=3']) == run


def test_swag_has_one_schedule(flags_of, capsys):
    run = train.main(flags_of(optim='swag'))
    with pytest.raises(SystemExit) as stop:
        train.main([f'--resume={run}', '--epochs=5'])
    assert stop.value.code == 2 and 'follows the schedule of --epochs 1; begin another run' in capsys.readouterr().err


def test_checkpoint_without_resume(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(['--checkpoint=3'])
    assert stop.value.code == 2 and '--checkpoint needs --resume' in capsys.readouterr().err


def test_no_two_processes_train_a_run(flags_of, capsys):
    """The lock file names the process that holds the lock. The lock file of a dead process blocks nobody."""
    run = train.main(flags_of())
    with folders.locked(run), pytest.raises(SystemExit) as stop:
        train.main([f'--resume={run}'])
    holder = f'process {os.getpid()} on {socket.gethostname()}'
    assert stop.value.code == 2 and f'is being trained by {holder}: wait' in capsys.readouterr().err
    (run / 'lock').write_text('process 1 on a host that died\n')
    train.main([f'--resume={run}'])


def test_divergence_keeps_the_last_finite_checkpoint(flags_of, monkeypatch, capsys):
    """The learning rate of the second epoch is far too high, so its second loss is NaN. The disk is slow."""
    write = checkpoints.Writer._write
    monkeypatch.setattr(checkpoints.Writer, '_write', lambda *args: time.sleep(1) or write(*args))
    monkeypatch.setattr('optimizers.lr_factor', lambda epoch, epochs, warmup: 1 if epoch == 0 else 1e30)
    with pytest.raises(SystemExit) as stop:
        train.main(flags_of(optim='sgd', alpha=0.05))
    out, error = capsys.readouterr()
    run = Path(out.split(':')[0])
    assert stop.value.code == 1 and error.count('\n') == 1
    assert 'after step 4 (epoch 2), learning rate 5e+28: try a run with a smaller --alpha, or' in error
    assert f'earlier checkpoints remain in {run}' in error
    assert restore(run)[0] == 2 and all(np.isfinite(leaf).all() for leaf in arrays(restore(run)[1]))
    assert train.main([f'--resume={run}', '--keepgoing']) == run
    assert restore(run)[0] == 4 and [record['loss'] is None for record in read_log(run)] == [False, True]


def test_divergence_before_the_first_checkpoint(flags_of, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(flags_of(optim='sgd', alpha=1e30))
    assert stop.value.code == 1 and 'there is no checkpoint in' in capsys.readouterr().err


def test_divergence_after_a_checkpoint_of_the_same_epoch(flags_of, monkeypatch, capsys):
    """The learning rate is so high that the loss diverges within the epoch, after the first checkpoint."""
    monkeypatch.setattr('optimizers.lr_factor', lambda epoch, epochs, warmup: 1e30)
    with pytest.raises(SystemExit) as stop:
        train.main(flags_of(optim='sgd', alpha=1e-29, checkpointevery=1, batchsize=5))
    assert stop.value.code == 1 and 'earlier checkpoints remain' in capsys.readouterr().err


def test_state_that_is_not_finite_is_not_saved(flags_of, monkeypatch, capsys):
    """The learning rate of the second epoch is infinite. Its first loss precedes the update, so it is finite."""
    monkeypatch.setattr('optimizers.lr_factor', lambda epoch, epochs, warmup: 1 if epoch == 0 else math.inf)
    with pytest.raises(SystemExit) as stop:
        train.main(flags_of(optim='sgd', alpha=0.05, checkpointevery=1))
    out, error = capsys.readouterr()
    assert stop.value.code == 1 and error.count('\n') == 1
    assert 'weights or optimizer state are not finite after step 3 (epoch 2)' in error
    assert restore(Path(out.split(':')[0]))[0] == 2


def test_other_images_than_before(flags_of, tmp_path, capsys):
    run = train.main(flags_of())
    import archives

    archives.write_idx_set(tmp_path / 'other' / 'mnist', num_train=60, num_test=20)
    with pytest.raises(SystemExit) as stop:
        train.main([f'--resume={run}', f'--datasetfolder={tmp_path / "other"}'])
    assert stop.value.code == 2 and 'does not hold the images that' in capsys.readouterr().err


@pytest.mark.parametrize('number', signals.STOPPING)
def test_signal_to_a_process(number, flags_of, tmp_path):
    """The process saves and exits after a signal, also if the signal comes twice."""
    run = tmp_path / 'results' / 'mnist_mlp' / 'bsam' / 'run_0'
    for sent in (1, 2) if number in (signal.SIGTERM, signal.SIGINT) else (1,):
        arguments = flags_of(epochs=100_000) if sent == 1 else [f'--resume={run}']
        with Child(['train.py', *arguments]) as process:
            next(line for line in process.stdout if line.startswith('epoch'))
            for _ in range(sent):
                process.send_signal(number)
                time.sleep(0.01)
            _, error = process.communicate(timeout=60)
        late = -number  # a second signal may hit the interpreter as it exits; shells show 128 + number for it too
        assert process.returncode in (128 + number, late if sent == 2 else None)
        assert 'finishing the step' in error and 'Traceback' not in error
        epochs = [record['epoch'] for record in read_log(run)]
        assert epochs == list(range(len(epochs)))
        assert restore(run)[0] > 0


def test_second_signal(monkeypatch):
    """Within a second it counts as the first signal, passed on by the parent. Later it ends the process."""
    now, statuses = [0.0], []
    monkeypatch.setattr(signals.time, 'monotonic', lambda: now[0])
    monkeypatch.setattr(os, '_exit', statuses.append)
    with signals.Stop():  # before there is anything to save
        os.kill(os.getpid(), signal.SIGINT)
        assert statuses.pop() == 128 + signal.SIGINT
    with signals.Stop() as stop:
        stop.begin()
        for now[0], ended in ((0.0, []), (0.9, []), (1.1, [128 + signal.SIGTERM])):
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal == signal.SIGTERM and statuses == ended


def test_signal_before_the_first_step_ends_without_a_traceback(flags_of):
    command = [sys.executable, 'train.py', '--dataset=digits', '--model=mlp']
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(0.7)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGINT, -signal.SIGINT) and 'Traceback' not in error


# Checkpoints below unusual paths, and checkpoints that are read during training.


@pytest.mark.parametrize('name', ['a[2024]', 'a\\b', 'a*?{}', b'caf\xe9', 'line\nbreak'])
def test_checkpoints_below_any_path(name, flags_of, tmp_path):
    folder = tmp_path / os.fsdecode(name)
    run = train.main(flags_of(resultsfolder=folder, epochs=0))
    train.main([f'--resume={run}', '--epochs=1'])
    evaluate.main([f'--resultsfolder={run}'])
    plain = train.main(flags_of())
    assert_same_run(run, plain)
    assert sorted(path.name for path in (run / 'checkpoints').iterdir()) == ['2', '4']


def test_a_checkpoint_that_cannot_be_read_back_is_not_kept(flags_of, monkeypatch, capsys):
    """The earlier checkpoints stay, and the exit status reports the failure."""
    run = train.main(flags_of())
    savez = np.savez

    def change_a_bit(path, **arrays):
        savez(path, **arrays | {'key': arrays['key'] ^ 1})

    monkeypatch.setattr(np, 'savez', change_a_bit)
    with pytest.raises(SystemExit) as stop:
        train.main([f'--resume={run}', '--epochs=2'])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count('a checkpoint could not be saved') == 1
    assert sorted(path.name for path in (run / 'checkpoints').iterdir()) == ['2', '4']
    monkeypatch.undo()
    train.main([f'--resume={run}', '--epochs=2'])
    assert restore(run)[0] == 6


def test_a_checkpoint_that_is_read_is_not_removed(flags_of):
    run = train.main(flags_of())
    read = run / 'checkpoints' / '2'
    with checkpoints._locked(read, fcntl.LOCK_SH) as is_there:
        assert is_there
        train.main([f'--resume={run}', '--epochs=2'])
        assert checkpoints.find_damage(read) is None
    train.main([f'--resume={run}', '--epochs=3'])
    assert checkpoints.all_steps(run / 'checkpoints') == [6, 8]


def test_a_run_can_be_read_while_it_is_trained(flags_of):
    """Each read gives the newest complete checkpoint, although training soon replaces it."""
    run = train.main(flags_of(epochs=0))
    with ThreadPoolExecutor(1) as pool, Child(['train.py', f'--resume={run}', '--epochs=3000']) as process:
        ended = pool.submit(process.communicate)
        while restore(run)[0] < 8:
            pass
        steps, deadline = [], time.monotonic() + 60
        while len(set(steps)) < 6 and time.monotonic() < deadline:
            steps.append(restore(run)[0])
        process.send_signal(signal.SIGTERM)
        ended.result()
    assert steps == sorted(steps) and len(set(steps)) == 6


def test_leftovers_of_a_killed_process_go_at_the_next_start(flags_of):
    """Files and folders that train.py did not write stay. None of them is read as a checkpoint."""
    run = train.main(flags_of())
    for name in ('6.partial', '2.removed', 'notes.partial', '008', '٩', '3'):
        (run / 'checkpoints' / name).mkdir()
    (run / 'checkpoints' / '9').symlink_to('nowhere')
    train.main([f'--resume={run}', '--epochs=2'])
    kept = ['3', '4', '6', '9', '008', 'notes.partial', '٩']
    assert sorted(path.name for path in (run / 'checkpoints').iterdir()) == sorted(kept)
    assert restore(run)[0] == 6


def test_a_lock_that_leads_elsewhere(flags_of, tmp_path, capsys):
    """A run may come from somebody else. Nothing is written through its links, and no pipe blocks the script."""
    run = train.main(flags_of())
    precious = tmp_path / 'precious'
    precious.write_text('mine')
    for make in (lambda path: path.symlink_to(precious), os.mkfifo):
        (run / 'lock').unlink()
        make(run / 'lock')
        with pytest.raises(SystemExit) as stop:
            train.main([f'--resume={run}', '--epochs=2'])
        assert stop.value.code == 2 and f'{run}/lock' in capsys.readouterr().err
    assert precious.read_text() == 'mine'


def test_a_pipe_in_place_of_checksums(flags_of, capsys):
    run = train.main(flags_of())
    path = run / 'checkpoints' / '4' / 'checksums.json'
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SystemExit) as stop:
        evaluate.main([f'--resultsfolder={run}'])
    assert stop.value.code == 2 and '4 is damaged: ' in capsys.readouterr().err


@pytest.mark.parametrize('number', [errno.EINVAL, errno.ENOTSUP])
def test_folders_that_cannot_be_flushed(number, flags_of, monkeypatch, capsys):
    """Some network shares refuse fsync and posix_fallocate."""

    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    for name in ('fsync', 'posix_fallocate'):
        monkeypatch.setattr(os, name, refuse)
    run = train.main(flags_of())
    assert restore(run)[0] == 4 and not capsys.readouterr().err


@pytest.mark.parametrize(
    'damage',
    [
        '"epoch": Infinity',
        '"epoch": 1e999',
        '"epoch": {}',
        '"epoch": 1.5',
        '"step": -1',
        f'"step": 1{"0" * 30}',
        '"log": [[]]',
    ],
)
def test_progress_that_is_none(damage, flags_of, capsys):
    """The checksum is right, as in a forged run."""
    run = train.main(flags_of())
    checkpoint = run / 'checkpoints' / '4'
    held = json.loads((checkpoint / 'progress.json').read_text())
    name = json.loads('{' + damage.partition(':')[0] + ': 0}').popitem()[0]
    text = json.dumps({key: value for key, value in held.items() if key != name})
    (checkpoint / 'progress.json').write_text(text[:-1] + ', ' + damage + '}')
    (checkpoint / 'checksums.json').write_text(json.dumps(checkpoints._checksums(checkpoint)))
    with pytest.raises(SystemExit) as stop:
        evaluate.main([f'--resultsfolder={run}'])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and 'progress.json is not what train.py writes' in error


SHORT_STEPS = (
    '--dataset=mnist', '--model=mlp', '--optim=bsam', '--alpha=0.1', '--batchsize=20', '--batchsplit=2', '--epochs=40',
)  # fmt: skip


@pytest.mark.parametrize('seeds', [(0,), pytest.param((2, 3), marks=pytest.mark.slow)])
def test_killed_anywhere(seeds, datasets, tmp_path):
    """Kills and resumes runs at 12 random moments each, most of them during steps and saves."""
    folder_of_whole = f'--resultsfolder={tmp_path / "whole"}'
    never_killed = train.main([*SHORT_STEPS, f'--datasetfolder={datasets}', folder_of_whole])
    with ThreadPoolExecutor(2) as pool:
        chains = [pool.submit(kill_12_times, datasets, tmp_path / str(seed), seed) for seed in seeds]
    for chain in chains:
        run, steps = chain.result()
        assert steps == sorted(steps) and len(set(steps)) > 5 and steps[-1] < restore(never_killed)[0]
        train.main([f'--resume={run}', '--checkpointevery=1000'])
        assert_same_run(run, never_killed)


def kill_12_times(datasets, folder, seed):
    """Starts a run, then kills and resumes it 12 times. Returns its folder and the newest step after each kill.

    A run prints six lines before its first step, and one more if it resumes at the end of an epoch.
    """
    run, moments, steps = folder / 'mnist_mlp' / 'bsam' / 'run_0', random.Random(seed), []
    flags = [*SHORT_STEPS, '--checkpointevery=1', f'--datasetfolder={datasets}', f'--resultsfolder={folder}']
    for _ in range(12):
        begun = (run / 'checkpoints').exists() and checkpoints.all_steps(run / 'checkpoints')
        if not begun:
            shutil.rmtree(run, ignore_errors=True)
        with Child(['train.py', *([f'--resume={run}'] if begun else flags)]) as process:
            for _ in range(moments.choice((0, 6, 7, 8, 8, 8, 8, 9))):
                process.stdout.readline()
            time.sleep(moments.uniform(0, 0.2))
            process.kill()
        assert process.returncode == -signal.SIGKILL
        log = [record['epoch'] for record in folders.read_log(run)] if run.exists() else []
        assert log == list(range(len(log)))
        with contextlib.suppress(folders.RunError):
            step, _, progress = restore(run)
            assert [record['epoch'] for record in progress.log] == list(range(progress.epoch))
            assert len(log) in (progress.epoch, progress.epoch + 1)
            steps.append(step)
    return run, steps
