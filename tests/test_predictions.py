"""python -m evaluation: predictions that any program saved, and what is wrong with them."""

import collections
import json
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from scipy import special

import metrics
from children import ROOT
from evaluation import __main__ as program
from evaluation import comparison, foreign, posteriors, predictions, tables
from runs import checkpoints

N, K, S = 60, 4, 3
LABELS = np.arange(N) % K
_RNG = np.random.default_rng(0)
LOGITS = _RNG.normal(size=(N, K)) + 2 * np.eye(K)[LABELS]
PROBS = special.softmax(LOGITS, axis=1)
SAMPLES = special.softmax(LOGITS + _RNG.normal(size=(S, N, K)), axis=2)
NAMES = np.array(['cat', 'dog', 'horse', 'ship'])


@pytest.fixture
def saved(tmp_path):
    """Returns a function that saves arrays to an .npz file, by default labels and probabilities."""

    def save(name='a', **arrays):
        np.savez(tmp_path / f'{name}.npz', **{'labels': LABELS} | (arrays or {'probs': PROBS}))
        return tmp_path / f'{name}.npz'

    return save


def error_of(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.err.count('\n') == 1 and not captured.out, captured
    return captured.err.removeprefix('evaluation: error: ').strip()


@pytest.mark.parametrize(
    ('arrays', 'expected'),
    [
        ({'probs': PROBS}, PROBS),
        ({'probs': PROBS.astype(np.float16)}, PROBS),
        ({'logits': LOGITS.astype('>f4')}, PROBS),
        ({'log_probs': np.log(PROBS)}, PROBS),
        ({'logits': LOGITS, 'probs': PROBS.astype(np.float16)}, PROBS),
        ({'logits': np.asfortranarray(np.where(np.eye(K)[LABELS], 0, -np.inf))}, np.eye(K)[LABELS]),
        ({'probs': 0.995 * PROBS, 'labels': LABELS.astype(np.uint8), 'ids': np.array(['a'])}, PROBS),
    ],
    ids=['probs', 'float16', 'logits', 'log_probs', 'logits and probs', 'infinite logits', 'other arrays'],
)
def test_a_single_prediction(arrays, expected, saved):
    found = foreign.read(saved(**arrays))
    assert found.probs.keys() == {'average'} and found.num_samples == 0 and found.class_names is None
    np.testing.assert_allclose(found.probs['average'], expected, atol=5e-4)
    np.testing.assert_allclose(found.probs['average'].sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_array_equal(found.labels, LABELS)


def test_metrics_of_a_single_prediction(saved, tmp_path, capsys):
    """The table has one column of numbers and nothing about samples. metrics.json has every metric."""
    path = saved()
    program.main([str(path), '--bins=7', f'--output={tmp_path}/new/output'])
    header, _, *rows = [line.split('|') for line in capsys.readouterr().out.splitlines() if line.startswith('|')]
    assert [cell.strip() for cell in header[1:-1]] == ['', 'prediction', '95 % interval']
    assert [row[1].strip() for row in rows] == [name for name in tables.REPORTED if name != 'mutual_information']
    measured = json.loads((tmp_path / 'new' / 'output' / 'metrics.json').read_text())
    entropy = special.entr(PROBS).sum(axis=1).mean()
    assert measured['average'] == pytest.approx(metrics.summary(PROBS, LABELS, 7) | {'entropy': entropy})
    assert measured['intervals']['average']['nll'] == pytest.approx(metrics.intervals(PROBS, LABELS, 7)['nll'])
    assert sum(measured['reliability']['average']['counts']) == measured['num_images'] == N
    assert measured['file'] == str(path) and 'mean' not in measured
    program.main([str(saved(probs=PROBS, class_names=NAMES)), '--all'])
    out = capsys.readouterr().out
    assert all(f'| {name} ' in out for name in [*metrics.METRICS, 'class, prediction', *NAMES])


@pytest.mark.parametrize('with_logits', [True, False])
def test_samples(with_logits, saved, capsys):
    """The average of the samples, their mutual information and disagreement, beside the prediction of the logits."""
    found = foreign.read(saved(samples=SAMPLES, **({'logits': LOGITS} if with_logits else {})))
    assert found.num_samples == S and list(found.probs) == (['mean', 'average'] if with_logits else ['average'])
    average = SAMPLES.mean(axis=0)
    np.testing.assert_allclose(found.probs['average'], average)
    measured = found.measure(20)['average']
    information = special.entr(average).sum(axis=1).mean() - special.entr(SAMPLES).sum(axis=2).mean()
    assert measured['mutual_information'] == pytest.approx(information)
    classes = SAMPLES.argmax(axis=2)
    pairs = [(classes[i] != classes[j]).mean() for i in range(S) for j in range(i)]
    assert measured['disagreement'] == pytest.approx(np.mean(pairs)) and np.mean(pairs) > 0
    names = [row.name for row in comparison.rows([found.result('mine')])]
    assert names == (['mine, mean', f'mine, {S} samples'] if with_logits else ['mine'])
    again = foreign.read(saved(samples=SAMPLES, probs=average.astype(np.float32)))
    np.testing.assert_array_equal(again.probs['average'], found.probs['average'])


def test_predictions_of_test_py(tmp_path):
    """The metrics equal the metrics of test.py, up to the float32 of the file."""
    votes = np.eye(K, dtype=np.int32)[SAMPLES.argmax(axis=2)].sum(axis=0)
    entropy = special.entr(SAMPLES).sum(axis=2).mean(axis=0)
    prediction = posteriors.Prediction(LOGITS, SAMPLES.mean(axis=0), expected_entropy=entropy, votes=votes)
    predictions.write(tmp_path / 'predictions.npz', prediction, LABELS, S, checkpoints.Progress(1, 2))
    found, expected = foreign.read(tmp_path / 'predictions.npz').measure(20), prediction.measure(LABELS, 20)
    assert found['testmc'] == S
    for at in ('mean', 'average'):
        assert found[at] == pytest.approx(expected[at], rel=1e-5)
    assert found['reliability']['mean']['counts'] == expected['reliability']['mean']['counts']


def test_an_unknown_number_of_samples(saved):
    found = foreign.read(saved(logits=LOGITS, probs=SAMPLES.mean(axis=0)))
    assert found.num_samples is None and [row.name for row in comparison.rows([found.result('a')])] == [
        'a, mean',
        'a, average',
    ]
    assert found.title == 'average' and '| average |' in tables.of_predictions(found.measure(20), found.title, False)


def changed(array, value, row=7):
    array = np.array(array)
    array[row] = value
    return array


OBJECTS = np.array([{}], object)


@pytest.mark.parametrize(
    ('arrays', 'line'),
    [
        ({}, 'holds no labels: save labels, and probs, logits or samples, such as np.savez('),
        ({'y': LABELS, 'probs': PROBS}, 'holds no labels: save labels'),
        ({'labels': LABELS}, 'holds no predictions: save labels, and probs, logits or samples, such as np.savez('),
        ({'labels': OBJECTS, 'probs': PROBS}, 'labels.npy is not an .npy file of numbers or text; save plain arrays'),
        ({'probs': PROBS[1:]}, f'probs has {N - 1} images, but labels has {N}'),
        ({'probs': PROBS, 'logits': LOGITS[:, 1:]}, f'probs has {K} classes, but logits has {K - 1}'),
        ({'samples': SAMPLES[0]}, f'samples is float64 [{N}, {K}], but must be floating-point numbers [S, N, K]'),
        ({'samples': SAMPLES[:0]}, 'samples has 0 samples, but at least 1 are needed'),
        ({'probs': PROBS[:, 0]}, f'probs is float64 [{N}], but must be floating-point numbers [N, K]'),
        ({'probs': np.ones((N, 1))}, 'probs has 1 classes, but at least 2 are needed'),
        ({'labels': LABELS[:0], 'probs': PROBS[:0]}, 'labels has 0 images, but at least 1 are needed'),
        ({'probs': PROBS.round().astype(int)}, f'probs is int64 [{N}, {K}], but must be floating-point numbers'),
        ({'labels': np.eye(K)[LABELS], 'probs': PROBS}, f'labels is float64 [{N}, {K}], but must be whole numbers [N]'),
        ({'labels': LABELS + 1, 'probs': PROBS}, 'has labels from 1 to 4, not 0 to 3'),
        ({'labels': LABELS - 1, 'probs': PROBS}, 'has labels from -1 to 2, not 0 to 3'),
        ({'probs': changed(PROBS, np.nan)}, 'probs of image 7 are not finite'),
        ({'probs': changed(PROBS, [1.5, -0.5, 0, 0])}, 'probs of image 7 are negative; save these numbers as logits'),
        ({'probs': changed(PROBS, 0.5)}, 'probs of image 7 add up to 2, not 1; save the output of softmax, or save'),
        ({'logits': changed(LOGITS, np.inf)}, 'logits of image 7 are not finite'),
        ({'logits': changed(LOGITS, -np.inf)}, 'logits of image 7 are not finite'),
        ({'logits': changed(LOGITS, [np.nan, 0, 0, 0])}, 'logits of image 7 are not finite'),
        ({'log_probs': LOGITS}, 'exp(log_probs) of image 0 add up to'),
        ({'log_probs': changed(LOGITS, 1000)}, 'exp(log_probs) of image 7 are not finite'),
        ({'samples': changed(SAMPLES, 0.5, (1, 7))}, 'samples[1] of image 7 add up to 2, not 1'),
        ({'samples': SAMPLES, 'probs': PROBS}, 'probs is not the average of samples: save only samples, and the'),
        ({'probs': PROBS, 'class_names': NAMES[1:]}, f'class_names has {K - 1} classes, but probs has {K}'),
        ({'probs': PROBS, 'class_names': np.arange(K)}, 'class_names is int64 [4], but must be text [K]'),
        ({'probs': PROBS, 'num_samples': 0}, 'num_samples is 0, but must be 1 or more'),
        (
            {'probs': PROBS, 'votes': changed(np.eye(K, dtype=int)[LABELS], 1), 'expected_entropy': np.zeros(N)},
            'votes of image 7 do not add up to 1',
        ),
        (
            {'probs': PROBS, 'votes': np.eye(K, dtype=int)[LABELS], 'expected_entropy': np.full(N, np.nan)},
            'expected_entropy of image 0 is not finite',
        ),
    ],
)
def test_what_is_refused(arrays, line, tmp_path, capsys):
    path = tmp_path / 'a.npz'
    complete = arrays if not arrays or arrays.keys() & {'labels', 'y'} else {'labels': LABELS} | arrays
    np.savez(path, **complete)
    error = error_of([path], capsys)
    assert error.startswith(str(path)) and line in error, error


def test_files_that_are_no_arrays(tmp_path, capsys):
    (tmp_path / 'text.npz').write_text('0.1, 0.9')
    with zipfile.ZipFile(tmp_path / 'model.pt', 'w') as file:
        file.writestr('model/data.pkl', b'')
    np.save(tmp_path / 'a.npy', PROBS)
    for name, line in [
        ('text.npz', 'is damaged (File is not a zip file); save plain arrays, such as np.savez('),
        ('model.pt', 'holds no labels: save labels'),
        ('a.npy', 'is damaged (File is not a zip file); save plain arrays'),
        ('none.npz', 'none.npz cannot be read: No such file or directory'),
        ('.', 'cannot be read: '),
    ]:
        error = error_of([tmp_path / name], capsys)
        assert error.startswith(str(tmp_path)) and line in error and (name != 'none.npz' or error.endswith(line))


def test_several_files(saved, tmp_path, capsys):
    """Files of one method are its runs. The tables are the tables of test.py."""
    probs = {name: special.softmax(scale * LOGITS, axis=1) for name, scale in (('a', 1), ('b', 2), ('c', 0.1))}
    files = [str(saved(name, probs=p)) for name, p in probs.items()]
    program.main([*files, '--names', 'one', 'one', 'two', '--ensemble', f'--output={tmp_path}/new'])
    out = capsys.readouterr().out
    results = [
        comparison.Result({'optim': name}, LABELS, p, p, 0)
        for name, p in zip(('one', 'one', 'two'), probs.values(), strict=True)
    ]
    text, rows, values = comparison.report(results, num_bins=20, with_ensembles=True)
    assert text in out and 'paired bootstrap over images' in out
    assert {row.name for row in rows} == {'one', 'two', 'one ensemble of 2', 'ensemble of all 3 runs'}
    comparison.write(tmp_path, rows, values)
    for suffix in ('md', 'csv', 'tex'):
        name = f'comparison.{suffix}'
        assert (tmp_path / 'new' / name).read_bytes() == (tmp_path / name).read_bytes()
    for file in files:
        own = comparison.own_folder(tmp_path / 'new', file)
        assert own.name.rpartition('-')[0].endswith(f'-{Path(file).stem}') and f'written: {own}\n' in out
        assert json.loads((own / 'metrics.json').read_text())['file'] == file


def test_names_of_methods(tmp_path):
    assert program.parse_args(['x/a.npz', 'b.npz']).names == ['a', 'b']
    assert program.parse_args(['x/a.npz', 'y/a.npz']).names == ['x/a.npz', 'y/a.npz']
    assert program.parse_args(['x/a.npz', 'y/a.npz', '--names', 'm', 'm']).names == ['m', 'm']


def test_what_cannot_be_compared(saved, tmp_path, capsys):
    first = saved()
    for other, line in [
        (saved('shorter', labels=LABELS[1:], probs=PROBS[1:]), f'N and K are ({N - 1}, {K}) and ({N}, {K})'),
        (saved('order', labels=LABELS[::-1], probs=PROBS), 'the labels differ'),
    ]:
        error = error_of([first, other], capsys)
        assert error == f'{other} and {first} are of different images, or in another order: {line}'


@pytest.mark.parametrize(
    ('flags', 'line'),
    [
        (['--names', 'x', 'y'], '--names has 2 names for 1 files: name every file'),
        (['--names', '\033'], "'\\x1b' is not a name"),
        (['--ensemble'], '--ensemble needs several files'),
        (['--plots'], '--plots needs --output FOLDER'),
        (['./a.npz'], 'a.npz is given twice: leave out one of them'),
        (['--output=a.npz'], '--output a.npz: '),
        (['--bin=3'], 'unknown flag: --bin=3; use --bins'),
        (['--bins=0'], "--bins: '0' is not a whole number of 1 or more"),
    ],
)
def test_wrong_flags(flags, line, saved, monkeypatch, capsys):
    monkeypatch.chdir(saved().parent)
    assert line in error_of(['a.npz', *flags], capsys)


WITHOUT_JAX = """import runpy, sys
sys.path[:] = [path for path in sys.path if path]
sys.argv = [sys.argv[1], 'a.npz', 'b.npz']
runpy.run_path(sys.argv[0], run_name='__main__')
assert not {'jax', 'flax', 'PIL', 'matplotlib', 'scipy.stats'} & sys.modules.keys()
"""


def test_a_start_from_another_folder_needs_no_jax(saved, tmp_path):
    saved('a'), saved('b', logits=2 * LOGITS)
    command = [sys.executable, '-P', '-c', WITHOUT_JAX, str(ROOT / 'evaluation')]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '') and '| against ' in done.stdout


def test_pictures_without_matplotlib(saved, monkeypatch, capsys):
    """The error comes before anything is measured."""
    monkeypatch.setitem(sys.modules, 'evaluation.plots', None)
    monkeypatch.delattr('evaluation.plots', raising=False)
    assert '--plots needs evaluation.plots: pip install -r' in error_of([saved(), '--plots', '--output=new'], capsys)


def test_a_start_as_a_module():
    done = subprocess.run([sys.executable, '-m', 'evaluation', '--help'], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '') and done.stdout.startswith('usage: python -m evaluation FILE')


SECTION = (
    (ROOT / 'docs/evaluation.md').read_text().partition('## Predictions of other programs')[2].partition('\n## ')[0]
)
EXAMPLES = re.findall(r'```python\n(.*?)```', SECTION, re.DOTALL)


def test_example_in_numpy(tmp_path, monkeypatch):
    """Runs the commands that follow the example, too. They draw pictures of each file and of both."""
    monkeypatch.chdir(tmp_path)
    of_numpy, _ = EXAMPLES
    drawn = collections.defaultdict(set)
    monkeypatch.setattr('evaluation.plots.save', lambda figure, folder, name: drawn[folder].add(name))
    exec(of_numpy, {'labels': LABELS, 'logits': LOGITS, 'samples': SAMPLES})
    np.testing.assert_allclose(foreign.read(Path('network.npz')).probs['average'], PROBS)
    np.testing.assert_allclose(foreign.read(Path('samples.npz')).probs['average'], SAMPLES.mean(axis=0))
    commands = re.findall(r'^    python -m (.*)', SECTION, re.MULTILINE)
    for command in commands:
        program.main(shlex.split(command)[1:])
    assert len(commands) == 2 and Path('measured/comparison.md').exists()
    pictures = {'reliability', 'risk_coverage'}
    assert drawn.pop(Path('measured/plots')) == pictures
    assert list(drawn.values()) == [pictures | {'confusion'}] * 2


def test_example_in_pytorch(tmp_path, monkeypatch):
    torch = pytest.importorskip('torch')
    monkeypatch.chdir(tmp_path)
    _, of_torch = EXAMPLES
    assert of_torch.count('\n') <= 7
    model = torch.nn.Sequential(torch.nn.Linear(K, K), torch.nn.Dropout(0.5))
    loader = [
        (torch.tensor(LOGITS[i : i + 7], dtype=torch.float32), torch.tensor(LABELS[i : i + 7])) for i in range(0, N, 7)
    ]
    exec(of_torch, {'model': model, 'loader': loader})
    (path,) = tmp_path.iterdir()
    found = foreign.read(path)
    with torch.no_grad():
        expected = model.eval()(torch.tensor(LOGITS, dtype=torch.float32)).softmax(1)
    np.testing.assert_allclose(found.probs['average'], expected, rtol=1e-5)
    np.testing.assert_array_equal(found.labels, LABELS)
