"""Sweeps: which runs they make, how they resume, and the table of validation metrics."""

import argparse
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


def test_seed_of_the_draws(toml):
    """The draws of seed 0, the default, may never change: sweeps that began with them could not resume."""

    def alphas(seed):
        toml.write_text(text + seed)
        return [run['alpha'] for run in sweep.read(toml)[1][:2]]

    text = toml.read_text()
    assert alphas('') == alphas('seed = 0') == [0.04885, 0.0328]
    assert not {*alphas('seed = 0')} & {*alphas('seed = 1')} and alphas('seed = 1') == alphas('seed = 1')


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
    assert header == [
        'run', 'optim', 'alpha', 'runs', 'nll_mean', 'nll_sd', 'accuracy_percent_mean', 'accuracy_percent_sd',
        'ece_mean', 'ece_sd',
    ]  # fmt: skip
    assert sorted(row[0][:5] for row in rows) == ['0000/', '0001/', '0002/', '0003/']
    assert all((output / row[0] / 'metrics-validation.json').exists() for row in rows)
    assert [float(row[4]) for row in rows] == sorted(float(row[4]) for row in rows)


def summary(output, averages, monkeypatch):
    """Returns summary.md and the rows of summary.csv for metrics of runs: alpha 1, 2, 3, each with seeds 0 and 1.

    `averages` has (NLL, accuracy, ECE) for each run, or None for a run that is not complete.
    """

    def measured(args, number, values):
        if averages[number] is None:
            return None
        metrics = dict(zip(('nll', 'accuracy', 'ece'), averages[number], strict=True))
        return args.output / f'{number:04}' / 'mnist_mlp' / 'sgd' / 'run_0', sweep._numbers(metrics)

    monkeypatch.setattr(sweep, '_measured', measured)
    varied = [{'alpha': alpha, 'randomseed': seed} for seed in (0, 1) for alpha in (1, 2, 3)]
    args = argparse.Namespace(output=output)
    text = sweep.summarise(args, [{'optim': 'sgd'} | values for values in varied], varied)
    assert text == (output / 'summary.md').read_text()
    return text, list(csv.DictReader((output / 'summary.csv').read_text().splitlines()))


def test_seeds_are_averaged(tmp_path, monkeypatch):
    """Settings are ranked by mean NLL. A setting with a missing run says so."""
    averages = [(0.5, 0.75, 0.01), (0.2, 0.9, 0.02), (0.1, 0.8, 0.03), (0.3, 0.85, 0.02), None, (0.9, 0.6, 0.03)]
    text, rows = summary(tmp_path, averages, monkeypatch)
    assert text.startswith("""\
| run                             | alpha |   runs |             NLL |    accuracy % |             ECE |
| ------------------------------- | ----: | -----: | --------------: | ------------: | --------------: |
| 0001/mnist_mlp/sgd/run_0        |     2 | 1 of 2 |          0.2000 |         90.00 |          0.0200 |
| {0000,0003}/mnist_mlp/sgd/run_0 |     1 |      2 | 0.4000 ± 0.1414 |  80.00 ± 7.07 | 0.0150 ± 0.0071 |
| {0002,0005}/mnist_mlp/sgd/run_0 |     3 |      2 | 0.5000 ± 0.5657 | 70.00 ± 14.14 | 0.0300 ± 0.0000 |

5 of 6 runs, on validation images, lowest NLL first
""")
    assert [row['runs'] for row in rows] == ['1', '2', '2'] and rows[0]['nll_sd'] == ''
    assert rows[1]['accuracy_percent_mean'] == '80' and rows[1]['nll_sd'] == '0.141421'


def test_diverged_runs_are_last_and_marked(tmp_path, monkeypatch):
    """An infinite NLL is not a diverged run."""
    diverged = (None, None, None)
    averages = [diverged, diverged, (None, 0.5, 0.1), (0.1, 0.9, 0.01), diverged, (0.1, 0.9, 0.1)]
    text, rows = summary(tmp_path, averages, monkeypatch)
    assert [row['alpha'] for row in rows] == ['3', '1', '2']
    assert [row['nll_mean'] for row in rows] == ['inf', '', ''] and rows[2]['ece_sd'] == ''
    cells = [[cell.strip() for cell in line.split('|')[4:-1]] for line in text.splitlines()[2:5]]
    assert cells[0] == ['inf', '70.00 ± 28.28', '0.1000 ± 0.0000']
    assert cells[1:] == [['1 of 2 diverged', '–', '–'], ['2 of 2 diverged', '–', '–']]
    assert 'nan' not in text


def test_a_seed_counts_once(tmp_path):
    """A grid or whole-number draws may ask for the same run twice."""
    sweep_of = [{'alpha': alpha, 'randomseed': seed} for alpha, seed in ((1, 0), (1, 0), (1, 1), (2, 0))]
    assert sweep._settings(sweep_of) == [[0, 2], [3]]


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
    for flag in ('--bins=7', '--testimages=3'):
        summary = (output / 'summary.md').read_text()
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
        ('draws = 2', 'seed = -1', 'seed in [random] is of the draws, a whole number of 0 or more'),
        ('draws = 2', 'seed = [0, 5]', 'the seed of a run is randomseed'),
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
