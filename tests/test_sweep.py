"""Sweeps: which runs they make, how they resume, and the table of validation metrics."""

import csv
import shutil
import signal
import subprocess
import sys
import time

import pytest

import sweep
import test as evaluate
from runs import folders, processes, training_flags

pytestmark = pytest.mark.usefixtures('forked_jobs')

SWEEP = """
[flags]
dataset = 'mnist'
model = 'mlp'
datasetfolder = '{datasets}'
validation = 0.25
batchsize = 10
epochs = 0
warmup = 0
noaugment = true

[grid]
optim = ['sgd', 'adam']

[random]
draws = 2
alpha = [0.001, 0.1]
"""


def write_toml(folder, datasets):
    path = folder / 'sweep.toml'
    path.write_text(SWEEP.format(datasets=datasets))
    return path


@pytest.fixture
def toml(datasets, tmp_path):
    return write_toml(tmp_path, datasets)


@pytest.fixture(scope='module')
def one_of_four(forked_jobs, datasets, tmp_path_factory):
    """Returns the output folder of a sweep whose first run is trained, and evaluated with one sample."""
    folder = tmp_path_factory.mktemp('sweep')
    sweep.main([str(write_toml(folder, datasets)), f'--output={folder / "sweep"}', '--testmc=1', '--part=0/4'])
    return folder / 'sweep'


@pytest.fixture
def output(one_of_four, tmp_path):
    return shutil.copytree(one_of_four, tmp_path / 'sweep')


def test_runs_of_a_sweep(toml):
    """Every combination has the same draws, within the bounds."""
    fixed, runs = sweep.read(toml)
    assert fixed['noaugment'] is True and [run['optim'] for run in runs] == ['sgd', 'sgd', 'adam', 'adam']
    alphas = [run['alpha'] for run in runs]
    assert alphas[:2] == alphas[2:] and len(set(alphas)) == 2 and all(0.001 <= a <= 0.1 for a in alphas)
    assert sweep.read(toml)[1] == runs
    assert '--noaugment' in training_flags.command_line(fixed) and '--validation=0.25' in training_flags.command_line(
        fixed
    )


def test_whole_numbers_are_drawn_whole(toml):
    toml.write_text(toml.read_text() + 'batchsize = [10, 30]\n')
    assert all(isinstance(run['batchsize'], int) and 10 <= run['batchsize'] <= 30 for run in sweep.read(toml)[1])


def test_parts_and_going_on(toml, output, capsys):
    """Trains half of a sweep, then the rest. Complete runs stay as they are."""
    first = evaluated(output)
    sweep.main([str(toml), f'--output={output}', '--part=0/2', '--testmc=1'])
    assert '2 of 4 runs' in capsys.readouterr().out
    half = evaluated(output)
    sweep.main([str(toml), f'--output={output}', '--testmc=1', '--jobs=2'])
    assert '4 of 4 runs' in capsys.readouterr().out
    assert first.items() < half.items() < evaluated(output).items()
    header, *rows = csv.reader((output / 'summary.csv').read_text().splitlines())
    assert header == ['run', 'optim', 'alpha', 'nll', 'accuracy', 'ece']
    assert sorted(row[0] for row in rows) == ['0000', '0001', '0002', '0003']
    assert [float(row[3]) for row in rows] == sorted(float(row[3]) for row in rows)


def evaluated(output):
    """Returns when each run of a sweep was evaluated, {path: nanoseconds}."""
    return {path: path.stat().st_mtime_ns for path in output.rglob('metrics-validation.json')}


def test_another_number_of_samples_evaluates_again(toml, output, capsys):
    """All ranked runs have the same number of samples. Runs evaluated with another number are not in the table."""
    sweep.main([str(toml), f'--output={output}', '--testmc=2', '--part=1/4'])
    assert '1 of 4 runs' in capsys.readouterr().out
    sweep.main([str(toml), f'--output={output}', '--testmc=2', '--part=0/4'])
    assert '2 of 4 runs' in capsys.readouterr().out


def test_an_evaluation_by_hand_is_not_the_sweep_s(toml, output, capsys):
    """All ranked runs are evaluated with the same flags. A run evaluated with other flags is evaluated again."""
    arguments = [str(toml), f'--output={output}', '--testmc=1', '--part=0/4']
    (run,) = output.glob('0000/*/*/run_*')
    summary = (output / 'summary.md').read_text()
    for flag in ('--bins=7', '--testimages=3'):
        evaluate.main([f'--resultsfolder={run}', '--split=validation', '--testmc=1', flag])
        capsys.readouterr()
        sweep.main([*arguments, '--summary'])
        assert '0 of 4 runs' in capsys.readouterr().out and (output / 'summary.md').read_text() == summary
        sweep.main(arguments)
        assert '1 of 4 runs' in capsys.readouterr().out


def test_a_sweep_that_is_stopped_saves_and_goes_on(toml, tmp_path):
    """After SIGTERM to sweep.py alone, the run saves, and the next run does not start."""
    toml.write_text(toml.read_text().replace('epochs = 0', 'epochs = 100_000'))
    output = tmp_path / 'sweep'
    command = [sys.executable, processes.SCRIPTS / 'sweep.py', toml, f'--output={output}']
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        said = output / '0000' / 'output.txt'
        until = time.monotonic() + 60
        while not (said.exists() and 'epoch 2/' in said.read_text()) and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and 'Traceback' not in error
    assert 'saved; resume with' in said.read_text() and not list(output.glob('0001/*/'))
    (run,) = output.glob('0000/*/*/run_*')
    assert processes.begun_run(output / '0000') == run and len(folders.read_log(run)) >= 2


def test_a_run_that_fails(toml, tmp_path, capsys):
    """The other runs are trained, and sweep.py ends with status 1."""
    head = toml.read_text().split('[grid]')[0]
    toml.write_text(head + "[grid]\noptim = ['sgd']\nalpha = [0.01, 1e30]\n")
    with pytest.raises(SystemExit) as stop:
        sweep.main([str(toml), f'--output={tmp_path / "sweep"}', '--testmc=1'])
    out, error = capsys.readouterr()
    assert (
        stop.value.code == 1 and '0001: train.py ended with status 1, see output.txt' in error and '1 of 2 runs' in out
    )
    assert 'try a run with a smaller --alpha' in (tmp_path / 'sweep' / '0001' / 'output.txt').read_text()


@pytest.mark.parametrize(
    ('old', 'new', 'message'),
    [
        ('[grid]', '[grids]', 'has an unknown table [grids]'),
        ('validation = 0.25', '', 'holds out no images to rank the runs by'),
        ("['sgd', 'adam']", "'sgd'", 'each flag in [grid] needs a list of values'),
        ('[0.001, 0.1]', '[0.1, 0.001]', 'two numbers, 0 < low < high'),
        ('[0.001, 0.1]', '[0.1, inf]', 'two numbers, 0 < low < high'),
        ('alpha = [0.001, 0.1]', '', '[random] draws nothing'),
        ('[flags]', '[flags', 'cannot be read'),
        ("optim = ['sgd', 'adam']", 'rho = [0.1]', '--rho does not apply to --optim sgd'),
        ('epochs = 0', 'epoch = 0', 'unknown flag: --epoch=0; use --epochs'),
        ('epochs = 0', "resume = 'run_0'", '--resume cannot be set in a sweep'),
        ('epochs = 0', 'devices = 2', '--devices cannot be set in a sweep'),
        ('epochs = 0', 'help = true', '--help cannot be set in a sweep'),
        ('epochs = 0', f'epochs = {2**31}', 'is not a whole number of 0 or more and less than 2147483648'),
        ('draws = 2', 'draws = 300_000_000', 'asks for 600000000 runs'),
        ('alpha = [', 'optim = [', 'optim is both in [grid] and in [random]: remove one'),
    ],
)
def test_what_is_refused(old, new, message, toml, tmp_path, capsys):
    toml.write_text(toml.read_text().replace(old, new))
    with pytest.raises(SystemExit) as stop:
        sweep.main([str(toml), f'--output={tmp_path / "sweep"}'])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and message in error
    assert not (tmp_path / 'sweep').exists()


def test_a_number_in_place_of_a_table(tmp_path, capsys):
    (tmp_path / 'sweep.toml').write_text('grid = 3')
    with pytest.raises(SystemExit) as stop:
        sweep.main([str(tmp_path / 'sweep.toml'), f'--output={tmp_path / "sweep"}'])
    assert stop.value.code == 2 and 'flags, grid and random must be tables' in capsys.readouterr().err


def test_a_file_in_place_of_the_folder(toml, capsys):
    with pytest.raises(SystemExit) as stop:
        sweep.main([str(toml), f'--output={toml}'])
    assert stop.value.code == 2 and f'--output {toml} cannot be written' in capsys.readouterr().err


def test_a_folder_of_others(toml, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('os.access', lambda path, mode: path != tmp_path)
    with pytest.raises(SystemExit) as stop:
        sweep.main([str(toml), f'--output={tmp_path}'])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f'--output {tmp_path} cannot be written: permission denied' in error


def test_changed_file_is_refused(toml, output, capsys):
    """Otherwise the table would show earlier runs with the new flags."""
    toml.write_text(toml.read_text().replace("['sgd', 'adam']", "['adam', 'sgd']"))
    with pytest.raises(SystemExit) as stop:
        sweep.main([str(toml), f'--output={output}', '--testmc=1', '--summary'])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1
    assert 'began with --optim sgd, not adam: use another folder' in error


def test_flag_that_is_left_out_is_a_change(toml, output, capsys):
    """Flags that may change when a run resumes, such as --checkpointevery, are exempt."""
    toml.write_text(toml.read_text().replace('epochs = 0', 'epochs = 0\ncheckpointevery = 5'))
    sweep.main([str(toml), f'--output={output}', '--testmc=1', '--part=0/4'])
    toml.write_text(toml.read_text().replace('noaugment = true\n', ''))
    with pytest.raises(SystemExit) as stop:
        sweep.main([str(toml), f'--output={output}', '--testmc=1', '--part=0/4'])
    assert stop.value.code == 2 and 'began with --noaugment True, not False' in capsys.readouterr().err
