"""Exports of test.py: they evaluate like their runs, their model cards work, and damaged ones are refused."""

import json
import os
import re
import resource
import shlex
import shutil
import stat
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import models
import optimizers
import test as evaluate
import train
from conftest import SmallResNet, slow_except
from evaluation import exported, trained
from runs import checkpoints, folders, training_flags

PARTS = ('mean', 'average', 'intervals', 'reliability', 'num_images', 'trained')


@pytest.fixture(scope='module')
def small(module_patch):
    """Replaces ResNet-18 by a small network with batch normalisation, for all tests of this file."""
    module_patch.setitem(models.MODELS, 'resnet18', SmallResNet)


@pytest.fixture(scope='module')
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope='module')
def run_of(small, datasets, tmp_path_factory):
    """Returns a function that trains a run of an optimizer, once for all tests of this file."""
    folder, runs = tmp_path_factory.mktemp('runs'), {}

    def run_of(optim):
        if optim not in runs:
            flags = ['--dataset=cifar10', '--model=resnet18', f'--optim={optim}', '--alpha=0.1', '--batchsize=10']
            flags += ['--epochs=3', '--warmup=0', '--validation=0.25', f'--datasetfolder={datasets}']
            flags += ['--swagstart=0'] if optim == 'swag' else []
            flags += ['--batchsplit=2'] if optim in ('sam', 'bsam', 'samadam', 'asam', 'ivon') else []
            runs[optim] = train.main([*flags, f'--resultsfolder={folder}'])
        return runs[optim]

    return run_of


def results_of(folder, name='metrics'):
    results = json.loads((folder / f'{name}.json').read_text())
    return {part: results[part] for part in (*PARTS, 'temperature') if part in results}


def export(run, folder, *flags):
    evaluate.main([f'--resultsfolder={run}', f'--export={folder}', *flags])
    return folder


def error_of(main, arguments, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and 'Traceback' not in error, error
    return error


# An export and its run.


@pytest.mark.parametrize('optim', slow_except(optimizers.OPTIMIZERS, 'sgd', 'bsam', 'swag', 'ivon'))
def test_an_export_evaluates_like_its_run(optim, run_of, tmp_path):
    run = run_of(optim)
    folder = export(run, tmp_path / 'made' / 'on the way', '--testmc=3')
    assert {path.name for path in folder.iterdir()} == {'README.md', 'config.json', 'posterior.safetensors'}
    assert (folder / 'config.json').read_bytes() == (run / 'config.json').read_bytes()
    evaluate.main([f'--resultsfolder={folder}', '--testmc=3'])
    assert results_of(folder) == results_of(run)
    with np.load(folder / 'predictions.npz') as one, np.load(run / 'predictions.npz') as two:
        assert set(one) == set(two) and all(one[name].tobytes() == two[name].tobytes() for name in two)

    of_run, of_export = trained.restore(run), trained.restore(str(folder))
    assert of_export.progress[:2] == of_run.progress[:2] and of_export.config == of_run.config
    for seed in range(3):
        one, two = (
            restored.experiment.optimizer.sample(restored.state, jax.random.key(seed))
            for restored in (of_run, of_export)
        )
        assert_same(one, two)
    for field in of_run.state._fields:
        expected = getattr(of_run.state, field) if field in exported.FIELDS else None
        assert_same(getattr(of_export.state, field), expected)
    params, batch_stats = exported.weights(folder)
    assert_same((of_run.state.params, of_run.state.batch_stats), (params, batch_stats))


def assert_same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize(
    ('optim', 'flags', 'name'),
    [
        ('sgd', ['--laplace', '--temperature'], 'metrics-laplace'),
        ('swag', ['--bnrefresh=2', '--temperature'], 'metrics'),
        ('bsam', ['--split=validation'], 'metrics-validation'),
    ],
)
def test_everything_that_is_measured_of_a_run_is_measured_of_its_export(optim, flags, name, run_of, tmp_path):
    run = run_of(optim)
    folder = export(run, tmp_path / 'export')
    for where in (run, folder):
        evaluate.main([f'--resultsfolder={where}', '--testmc=2', *flags])
    assert results_of(folder, name) == results_of(run, name)


def test_an_export_of_an_export_and_of_an_earlier_checkpoint(run_of, tmp_path, capsys):
    run = run_of('bsam')
    first = export(run, tmp_path / 'first')
    (tmp_path / 'second').mkdir()
    second = export(first, tmp_path / 'second')
    assert contents(first / 'posterior.safetensors') == contents(second / 'posterior.safetensors')
    step = checkpoints.all_steps(run / 'checkpoints')[0]
    earlier = export(run, tmp_path / 'earlier', f'--checkpoint={step}')
    assert contents(earlier / 'posterior.safetensors') != contents(first / 'posterior.safetensors')
    assert 'training is not complete: it is in epoch 3 after step' in (earlier / 'README.md').read_text()
    capsys.readouterr()
    evaluate.main([f'--resultsfolder={earlier}'])
    assert f'{earlier} is not fully trained: it is in epoch 3 of 4' in capsys.readouterr().err
    assert results_of(earlier) == results_of(run, f'metrics-{step}')


def contents(path):
    """Returns the tensors and the settings of a file, as bytes and text."""
    with safe_open(path, 'np') as file:
        return file.metadata(), {name: tensor.tobytes() for name, tensor in file.get_tensors().items()}


def test_what_is_in_the_file(run_of, tmp_path):
    """Other programs rely on these names."""
    for optim, fields in [
        ('ivon', {'hessian'}),
        ('swag', {'variance', 'deviations', 'num_snapshots'}),
        ('adam', set()),
    ]:
        folder = export(run_of(optim), tmp_path / optim)
        metadata, tensors = contents(folder / 'posterior.safetensors')
        assert {name.partition('.')[0] for name in tensors} == {'params', 'batch_stats', *fields}
        assert {'params.head.kernel', 'batch_stats.stem.norm.mean'} < tensors.keys()
        num_data, weight_decay = float(metadata['num_data']), float(metadata['weight_decay'])
        assert metadata['optimizer'] == optim and metadata['format'] == '1' and num_data == 30
        assert weight_decay == folders.read_config(folder)['flags']['priorprec'] / 30
        modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
        assert modes == {stat.S_IMODE((run_of(optim) / 'config.json').stat().st_mode)}


# The model card.


def of_card(folder):
    """Returns the model card, its commands as lists of flags, and its lines of Python."""
    card = (folder / 'README.md').read_text()
    assert '$' not in card and max(map(len, re.findall('^[^`\n]*$', card, re.MULTILINE))) < 250
    commands = dict(re.findall(r'^    python (\w+)\.py ((?:[^\n]*\\\n)*[^\n]*)', card, re.MULTILINE))
    (code,) = re.findall(r'```python\n(.*?)```', card, re.DOTALL)
    return card, {name: shlex.split(text.replace('\\\n', ' ')) for name, text in commands.items()}, code


@pytest.mark.parametrize('optim', ['bsam', 'ivon', 'swag'])
def test_lines_of_the_card_draw_from_the_posterior(optim, run_of, tmp_path, monkeypatch):
    """Moments of 4,000 draws agree with 4,000 draws of the optimizer, within five standard errors."""
    folder, n = export(run_of(optim), tmp_path / 'export'), 4000
    *_, code = of_card(folder)
    assert code.count('\n') == 5 and code.count('default_rng(0)') == 1
    monkeypatch.chdir(folder)
    names, by_seed = {}, compile(code.replace('default_rng(0)', 'default_rng(seed)'), 'README.md', 'exec')
    drawn = []
    for seed in range(n):
        names = {'seed': seed}
        exec(by_seed, names)
        drawn.append(few(names['sample']))
    assert {name: x.shape for name, x in names['sample'].items()} == {
        name: x.shape for name, x in checkpoints.named(exported.weights(folder)[0]).items()
    }
    assert {x.dtype for x in names['sample'].values()} == {np.dtype(np.float32)}

    restored = trained.restore(folder)
    sample = jax.jit(lambda key: checkpoints.named(restored.experiment.optimizer.sample(restored.state, key)))
    expected = np.stack([few(sample(jax.random.key(seed))) for seed in range(n)])
    drawn = np.stack(drawn)
    std = expected.std(axis=0)
    assert (std > 1e-6).all()
    np.testing.assert_array_less(abs(drawn.mean(axis=0) - expected.mean(axis=0)), 5 * std * np.sqrt(2 / n))
    np.testing.assert_array_less(abs(drawn.std(axis=0) / std - 1), 5 / np.sqrt(n))
    correlation = np.corrcoef(expected, rowvar=False)
    np.testing.assert_allclose(np.corrcoef(drawn, rowvar=False), correlation, atol=5 * np.sqrt(2 / n))
    of_others = abs(correlation - np.eye(len(correlation))).max()
    assert (of_others > 0.3) == (optim == 'swag'), 'only SWAG has a covariance'


def few(sample):
    return np.concatenate(
        [np.asarray(sample[name]).ravel()[:4] for name in ('head.bias', 'head.kernel', 'stem.conv.kernel')]
    )


@pytest.mark.parametrize('optim', ['sam', 'adamw'])
def test_lines_of_the_card_read_a_point_estimate(optim, run_of, tmp_path, monkeypatch):
    folder, names = export(run_of(optim), tmp_path / 'export'), {}
    card, _, code = of_card(folder)
    monkeypatch.chdir(folder)
    exec(code, names)
    expected = checkpoints.named(trained.restore(run_of(optim)).state.params)
    assert names['weights'].keys() == expected.keys() and 'samples' not in card
    assert all(np.array_equal(names['weights'][name], x) for name, x in expected.items())


@pytest.mark.parametrize('optim', ['bsam', 'swag', 'sgd'])
def test_commands_and_numbers_of_the_card(optim, run_of, tmp_path):
    run = run_of(optim)
    folder = export(run, tmp_path / 'export', '--testmc', '1', '3', '--split=validation', '--bins=10', '--bnrefresh=2')
    card, commands, _ = of_card(folder)
    flags = vars(training_flags.parse_args(commands['train']))
    held = folders.read_config(run)['flags']
    elsewhere = {'datasetfolder', 'resultsfolder', 'compilecache'}
    assert {name for name in held if flags[name] != held[name]} <= elsewhere
    assert not any(str(value) in card for name, value in held.items() if name in elsewhere)

    evaluate.main([flag.replace('FOLDER', str(folder)) for flag in commands['test']])
    results = results_of(folder, 'metrics-validation')
    assert results == results_of(run, 'metrics-validation')
    for at in ('mean', 'average') if optim != 'sgd' else ('mean',):
        low, high = results['intervals'][at]['nll']
        assert f'| {results[at]["nll"]:.4f} | {low:.4f} to {high:.4f} |' in re.sub(' +', ' ', card)
    assert 'Measured on 10 images that were held out of training' in card and 'from `--bnrefresh 2`' in card
    assert f'jax {jax.__version__}' in card and 'Cite the method:\n\n> ' in card and 'see the references' not in card


# Damaged and hostile exports.


@pytest.fixture(scope='module')
def intact(run_of, tmp_path_factory):
    return {optim: export(run_of(optim), tmp_path_factory.mktemp('exports') / optim) for optim in ('bsam', 'sgd')}


@pytest.fixture
def folder(intact, tmp_path):
    return Path(shutil.copytree(intact['bsam'], tmp_path / 'export'))


def forge(path, change):
    """Changes tensors and settings, and records the right checksum of them."""
    with safe_open(path, 'np') as file:
        metadata, tensors = file.metadata(), file.get_tensors()
    metadata.pop('sha256')
    change(tensors, metadata)
    exported._save(path, tensors, metadata)


def enlarge(path):
    with open(path, 'r+b') as file:
        file.truncate(1 << 40)  # takes no room on the disk


def flip(path):
    payload = bytearray(path.read_bytes())
    payload[-5] ^= 1
    path.write_bytes(payload)


def replaced(path, function):
    path.unlink()
    function(path)


AGAIN = 'copy all files of the export again, or export the run again'
DAMAGES = {
    'missing': (lambda path: replaced(path, lambda path: path.symlink_to('nowhere')), 'cannot be read: No such file'),
    'pipe': (lambda path: replaced(path, os.mkfifo), 'cannot be read: it is not a regular file'),
    'folder': (lambda path: replaced(path, os.mkdir), 'cannot be read: Is a directory'),
    'empty': (lambda path: path.write_bytes(b''), 'is damaged (Error while deserializing header: header too small'),
    'pickle': (lambda path: path.write_bytes(b'\x80\x04cos\nsystem\n(S"touch x"\ntR.'), 'is damaged (Error'),
    'long header': (lambda path: path.write_bytes(b'\xff' * 100), 'is damaged (Error'),
    'truncated': (lambda path: path.write_bytes(path.read_bytes()[:-1]), 'is damaged (Error'),
    'huge': (enlarge, f'has {1 << 40} bytes, but config.json needs'),
    'flipped': (flip, 'is damaged: its SHA-256 is'),
}  # fmt: skip
FORGERIES = {
    'of other programs': (lambda tensors, metadata: metadata.clear(), 'has format None, but this version'),
    'newer': (lambda tensors, metadata: metadata.update(format='2'), 'has format 2, but this version reads'),
    'N': (lambda tensors, metadata: metadata.update(num_data='1'), 'has num_data 1, but config.json beside it has 30'),
    'optimizer': (lambda tensors, metadata: metadata.update(optimizer='\x1b[31m'), r'has optimizer \x1b[31m, but'),
    'steps': (lambda tensors, metadata: metadata.update(epoch='-1'), "does not say how long the run was trained: ['-1"),
    'no steps': (lambda tensors, metadata: metadata.pop('steps_of_epoch'), 'does not say how long'),
    'one more': (lambda tensors, metadata: tensors.update(x=np.zeros(2)), 'x: found float64 [2], expected nothing'),
    'one less': (lambda tensors, metadata: tensors.pop('precision.head.bias'), 'precision.head.bias: found nothing'),
    'dtype': (
        lambda tensors, metadata: tensors.update({'params.head.bias': np.zeros(10, np.float16)}),
        'params.head.bias: found float16 [10], expected float32 [10]',
    ),
    'shape': (
        lambda tensors, metadata: tensors.update({'params.head.bias': np.zeros((0, 1 << 40), np.float32)}),
        f'params.head.bias: found float32 [0, {1 << 40}], expected float32 [10]',
    ),
    'name': (
        lambda tensors, metadata: tensors.update({'\x1b[31m\n' * 500: np.zeros(1, np.float32)}),
        r'does not fit config.json: \x1b[31m\n\x1b',
    ),
}  # fmt: skip


@pytest.mark.parametrize('damage', [*DAMAGES, *FORGERIES])
def test_a_damaged_export_is_refused_in_one_line(damage, folder, capsys):
    path = folder / 'posterior.safetensors'
    if damage in DAMAGES:
        change, message = DAMAGES[damage]
        change(path)
    else:
        change, message = FORGERIES[damage]
        forge(path, change)
    error = error_of(evaluate.main, [f'--resultsfolder={folder}'], capsys)
    assert f'{path} ' in error and message in error and len(error) < 1700
    assert {path.name for path in folder.iterdir()} == {'README.md', 'config.json', 'posterior.safetensors'}
    with pytest.raises(folders.RunError if AGAIN in error or 'format' in error else exported.files.DataError):
        exported.weights(folder)


def test_a_forged_export_that_fits_is_read(folder):
    """The forgeries above fail because of what they change, not because of how."""
    forge(
        folder / 'posterior.safetensors',
        lambda tensors, metadata: tensors.update({'params.head.bias': np.ones(10, np.float32)}),
    )
    np.testing.assert_array_equal(trained.restore(folder).state.params['head']['bias'], np.ones(10))


def test_files_of_different_exports(intact, folder, capsys):
    shutil.copy(intact['sgd'] / 'posterior.safetensors', folder)
    error = error_of(evaluate.main, [f'--resultsfolder={folder}'], capsys)
    assert 'has optimizer sgd, but config.json beside it has bsam' in error and AGAIN in error
    config = folders.read_config(folder)
    shutil.copy(intact['bsam'] / 'posterior.safetensors', folder)
    folders.write_config(folder, config | {'flags': config['flags'] | {'randomseed': 1}})
    assert 'posterior.safetensors has config ' in error_of(evaluate.main, [f'--resultsfolder={folder}'], capsys)


def test_what_an_export_cannot_do(intact, folder, run_of, monkeypatch, capsys):
    error = error_of(train.main, [f'--resume={folder}'], capsys)
    assert f'{folder} is an export of test.py, which holds no momentum and no random keys: resume the run' in error
    error = error_of(evaluate.main, [f'--resultsfolder={folder}', '--checkpoint=3'], capsys)
    assert f'--checkpoint 3 does not apply to {folder}: an export holds a single state' in error
    flip(folder / 'posterior.safetensors')
    monkeypatch.setattr(evaluate, 'evaluate', lambda *args: pytest.fail('evaluated'))
    error = error_of(evaluate.main, ['--resultsfolder', str(intact['sgd']), str(folder)], capsys)
    assert f'{folder}/posterior.safetensors is damaged' in error


def test_exports_are_compared_with_runs(intact, run_of, tmp_path):
    (tmp_path / 'tables').mkdir()
    both = ['--resultsfolder', str(intact['bsam']), str(run_of('sam')), '--output', str(tmp_path / 'tables')]
    evaluate.main(both)
    assert {'bsam, mean', 'sam, mean'} <= set(
        re.findall(r'^\| (\w+, mean)', (tmp_path / 'tables/comparison.md').read_text(), re.M)
    )


# The folder.


def test_a_folder_that_cannot_be_written(run_of, folder, tmp_path, monkeypatch, capsys):
    """The error comes before the run is evaluated, and nothing changes."""
    run = run_of('bsam')
    (tmp_path / 'file').touch()
    (tmp_path / 'link').symlink_to(tmp_path / 'empty')
    (tmp_path / 'empty').mkdir()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(evaluate, 'evaluate', lambda *args: pytest.fail('evaluated'))
    for name, message in {
        'export': 'is not empty: name a new or an empty folder',
        'file': 'is a file: name a new folder',
        'link': 'is a link to another folder: name the folder itself',
        'file/new': f'{tmp_path}/file is not a folder, or is read-only: name another folder',
    }.items():
        error = error_of(evaluate.main, [f'--resultsfolder={run}', f'--export={tmp_path}/{name}'], capsys)
        assert f'--export {tmp_path}/{name}' in error and message in error
    monkeypatch.setattr(os, 'access', lambda path, mode: Path(path) != tmp_path)  # the superuser could write it
    assert 'is read-only' in error_of(evaluate.main, [f'--resultsfolder={run}', f'--export={tmp_path}/new'], capsys)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before and not any((tmp_path / 'empty').iterdir())


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--laplace'], '--export cannot be combined with --laplace'),
        (['--resultsfolder', 'a', 'b'], '--export cannot be combined with several run folders'),
        (['--resultsfolder', 'a', 'b', '--reuse'], '--export cannot be combined with several run folders'),
    ],
)
def test_flags_that_cannot_be_combined(flags, message, capsys):
    assert message in error_of(evaluate.parse_args, ['--resultsfolder=a', '--export=e', *flags], capsys)


@pytest.mark.parametrize('limit', [100, 5000])
@pytest.mark.parametrize('exists', [False, True])
def test_full_disk(limit, exists, run_of, tmp_path, monkeypatch, capsys):
    """Not even the model card fits, or all but the tensors. Metrics are printed, and no part of the export stays."""
    if exists:
        (tmp_path / 'export').mkdir()
    text, before = evaluate.cards.text, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(*args):
        card = text(*args)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        return card

    monkeypatch.setattr(evaluate.cards, 'text', fill)
    try:
        with pytest.raises(SystemExit) as stop:
            export(run_of('swag'), tmp_path / 'export')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and f'--export {tmp_path}/export cannot be written: ' in captured.err
    assert 'File too large' in captured.err and captured.err.count('\n') == 2, (
        'a warning of batch statistics, and the error'
    )
    assert 'results at mean of distribution:' in captured.out and 'exported' not in captured.out
    assert [path.name for path in tmp_path.iterdir()] == ['export'] * exists
    assert not exists or not any((tmp_path / 'export').iterdir())
    monkeypatch.undo()
    export(run_of('swag'), tmp_path / 'export')
    assert load_file(tmp_path / 'export' / 'posterior.safetensors')
