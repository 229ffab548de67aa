"""test.py on small runs: all flags, the files that it writes, and the errors for wrong flags."""

import errno
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

import children
import data
import metrics
import test as evaluate
import train
from evaluation import comparison, corruptions, measures, plots, posteriors, predictions, tables
from runs import checkpoints, folders

PICTURES = ('reliability', 'risk_coverage', 'samples', 'severities', 'training', 'images', 'confusion')


@pytest.fixture
def trained(flags_of):
    return lambda **changes: train.main(flags_of(validation=0.25, batchsize=10, **changes))


def results_of(run, name='metrics'):
    return json.loads((run / f'{name}.json').read_text())


def error_of(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1, error
    return error


def test_everything_at_once(trained, capsys):
    run = trained()
    (run / 'plots').mkdir()
    (run / 'plots' / 'mine.png').touch()
    flags = ['--testmc', '1', '2', '4', '--temperature', '--ood', 'digits', '--corruptions', '--plots', '--bins', '10']
    evaluate.main([f'--resultsfolder={run}', *flags])
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if line.startswith('|')) <= 100
    results = results_of(run)
    assert [point['testmc'] for point in results['samples']] == [1, 2, 4] and results['testmc'] == 4
    assert results['samples'][-1]['nll'] == results['average']['nll']
    assert results['temperature']['mean']['accuracy'] == results['mean']['accuracy']
    assert results['ood']['digits']['num_images'] == 360 and results['ood']['digits']['shape'] == [32, 32, 1]
    assert 0 <= results['ood']['digits']['average']['mutual_information']['auroc'] <= 1
    assert len(results['corruptions']) == 9 and all(len(points) == 5 for points in results['corruptions'].values())
    low, high = results['intervals']['average']['nll']
    assert low < results['average']['nll'] < high
    for name in PICTURES:
        assert (run / 'plots' / f'{name}.pdf').read_bytes().startswith(b'%PDF')
        with Image.open(run / 'plots' / f'{name}.png') as image:
            assert image.width > 500 and len(np.unique(np.asarray(image))) > 10

    evaluate.main([f'--resultsfolder={run}', '--plots'])
    left = {path.stem for path in (run / 'plots').iterdir()}
    assert left == {'mine', *PICTURES} - {'samples', 'severities'}, 'removes earlier pictures, and no file of the user'


ALL_PARTS = ['--testmc', '1', '2', '--temperature', '--ood=digits', '--corruptions', '--plots']
PARTS = {
    'samples': 'evaluation.measures.curve',
    'temperature': 'evaluation.measures.tempered',
    'ood': 'evaluation.measures.all_ood',
    'corruptions': 'evaluation.measures.all_corrupted',
    'pictures': 'evaluation.plots.save',
}
SHORT = dict.fromkeys(metrics.SHORT, 0.5)


@pytest.mark.parametrize('failing', PARTS)
def test_a_part_that_fails_loses_none_of_those_before(failing, trained, monkeypatch, capsys):
    run = trained()

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(measures, 'all_corrupted', lambda *args: {'fog': [dict.fromkeys(('mean', 'average'), SHORT)]})
    monkeypatch.setattr(PARTS[failing], fail)
    with pytest.raises(SystemExit) as stop:
        evaluate.main([f'--resultsfolder={run}', *ALL_PARTS])
    assert stop.value.code == 130
    results = results_of(run)
    assert [part for part in PARTS if part in results] == list(PARTS)[: list(PARTS).index(failing)]
    assert results['average']['nll'] > 0 and results['versions']
    labels, prediction, num_samples, _ = predictions.read(run / 'predictions.npz')
    assert num_samples == 2
    np.testing.assert_allclose(metrics.nll(prediction.probs, labels), results['average']['nll'], rtol=1e-5)
    assert 'results at mean of distribution:' in capsys.readouterr().out


def test_what_is_measured_is_in_a_file_before_the_next_part(trained, monkeypatch, capsys):
    """The file is written first. The tables are printed after the last part."""
    run, found, parts = trained(), [], evaluate.measurements

    def watched(*args):
        for part in parts(*args):
            found.append(results_of(run) if (run / 'metrics.json').exists() else {})
            yield part
        assert not capsys.readouterr().out

    monkeypatch.setattr(evaluate, 'measurements', watched)
    capsys.readouterr()
    evaluate.main([f'--resultsfolder={run}', '--testmc', '1', '2', '--temperature'])
    assert ['mean' in results for results in found] == [False, True, True]
    assert ['samples' in results for results in found] == [False, False, True]
    assert {'mean', 'samples', 'temperature'} <= results_of(run).keys() and capsys.readouterr().out.count('| nll') == 1


def test_what_a_full_disk_does_not_take_is_printed(trained, monkeypatch, capsys):
    run = trained()

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr('errors.write_bytes', full)
    with pytest.raises(SystemExit) as stop:
        evaluate.main([f'--resultsfolder={run}'])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and 'metrics.json cannot be written: No space left on device' in captured.err
    assert 'results at model average (1 sample):' in captured.out


def test_pictures_do_not_follow_a_link(trained, tmp_path, capsys):
    run = Path(shutil.copytree(trained(), tmp_path / 'run'))
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'samples.png').touch()
    (run / 'plots').symlink_to(other)
    with pytest.raises(SystemExit) as stop:
        evaluate.main([f'--resultsfolder={run}', '--plots'])
    assert stop.value.code == 2 and 'is a link to another folder' in capsys.readouterr().err
    assert [path.name for path in other.iterdir()] == ['samples.png']


def test_a_picture_stays_until_the_new_one_is_whole(trained, monkeypatch, capsys):
    run = trained()
    evaluate.main([f'--resultsfolder={run}', '--plots'])
    before = {path.name: path.read_bytes() for path in (run / 'plots').iterdir()}

    def half(figure, path, **options):
        Path(path).write_bytes(b'half')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(plots.Figure, 'savefig', half)
    error = error_of([f'--resultsfolder={run}', '--plots', '--bins=3'], capsys)
    assert f'{run}/plots cannot be written: No space left on device' in error
    assert {path.name: path.read_bytes() for path in (run / 'plots').iterdir()} == before
    assert results_of(run)['bins'] == 3


PICTURE = """import sys
sys.path.insert(0, sys.argv[1])
from evaluation import plots
log = [{'epoch': epoch, 'loss': 1.0, 'test_accuracy': 0.5, 'learning_rate': 0.1} for epoch in (0, 1)]
plots.save(plots.training(log), sys.argv[2], 'picture')
"""
LOG = [{'epoch': epoch, 'loss': 1.0, 'test_accuracy': 0.5, 'learning_rate': 0.1} for epoch in (0, 1)]
OF_A_USER = {'text.usetex': True, 'font.size': 20, 'lines.linewidth': 9, 'savefig.dpi': 20, 'pdf.compression': 0}


@pytest.fixture(scope='module')
def picture(tmp_path_factory):
    """Returns the bytes of a picture that is drawn without settings of a user."""
    folder = tmp_path_factory.mktemp('pictures')
    plots.save(plots.training(LOG), folder, 'picture')
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ('environment', 'settings'),
    [
        ({'MPLBACKEND': 'module://matplotlib_inline.backend_inline'}, b''),
        ({}, '\n'.join(f'{name}: {value}' for name, value in OF_A_USER.items()).encode()),
        ({'MATPLOTLIBRC': 'elsewhere'}, b'text.usetex: True'),
    ],
    ids=['backend', 'settings', 'in another folder'],
)
def test_pictures_whatever_the_configuration_of_matplotlib(environment, settings, picture, tmp_path):
    folder = tmp_path / environment.get('MATPLOTLIBRC', '.')
    folder.mkdir(exist_ok=True)
    (folder / 'matplotlibrc').write_bytes(settings)
    command = [sys.executable, '-c', PICTURE, str(children.ROOT), 'pictures']
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')
    assert {path.name: path.read_bytes() for path in (tmp_path / 'pictures').iterdir()} == picture


def test_pictures_whatever_was_set_in_this_process(picture, tmp_path):
    with matplotlib.rc_context(OF_A_USER):
        plots.save(plots.training(LOG), tmp_path, 'picture')
        assert matplotlib.rcParams['font.size'] == 20
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == picture


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_images_of_any_channels_are_drawn(channels):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (3, 6, 5, channels), np.uint8), np.array([0, 1, 2])
    figure = plots.image_sheet(images, labels, np.full((3, 3), 1 / 3))
    figure.draw_without_rendering()
    ((shown,), *_) = [axes.images for axes in figure.axes if axes.images]
    np.testing.assert_array_equal(shown.get_array(), images[1, ..., 0] if channels < 3 else images[1])
    if channels == 2:
        np.testing.assert_array_equal(shown.get_alpha(), images[1, ..., 1] / 255)


@pytest.mark.parametrize('optim', ['sgd', 'bsam'])
def test_columns_and_rows_of_the_table(optim, flags_of, capsys):
    """A point estimate has no column of samples. --all shows every metric, and then every class."""
    run = train.main(flags_of(optim=optim))
    for flags, is_all in (([], False), (['--all'], True)):
        capsys.readouterr()
        evaluate.main([f'--resultsfolder={run}', *flags])
        lines = capsys.readouterr().out.splitlines()
        header, *rows = [line.strip('|').split('|') for line in lines if line.startswith('|')]
        if is_all:
            rows, of_classes = rows[:-12], rows[-12:]
            assert of_classes[0][0].strip() == f'class, {"mean" if optim == "sgd" else "1 sample"}'
            assert sum(int(row[1]) for row in of_classes[2:]) == 20
        assert [cell.strip() for cell in header[1::2]] == (['mean'] if optim == 'sgd' else ['mean', '1 sample'])
        expected = set(results_of(run)['average'] if is_all else tables.REPORTED)
        of_samples = {'mutual_information', 'disagreement'} if optim == 'sgd' else set()
        assert {row[0].strip() for row in rows[1:]} == expected - of_samples


def test_means_over_official_corruptions():
    """The 15 corruptions of the benchmark have value 1, the four others 0. The mean of all would be 15/19."""
    names = sorted([*corruptions.BENCHMARK, 'speckle_noise', 'gaussian_blur', 'spatter', 'saturate'])
    corrupted = {
        name: [dict.fromkeys(('mean', 'average'), dict.fromkeys(metrics.SHORT, float(name in corruptions.BENCHMARK)))]
        * 5
        for name in names
    }
    assert measures.over_corruptions(corrupted, 'average') == [dict.fromkeys(metrics.SHORT, 1.0)] * 5
    results = {'testmc': 32, 'mean': SHORT, 'average': SHORT, 'corruptions': corrupted}
    text = tables._corruptions(results, {'mean': 'mean', 'average': '32 samples'})
    caption, *found = text.strip().split('\n| ')
    assert caption == "mean of the benchmark's 15 corruptions; MC: average over 32 samples"
    rows = [line.split(' | ')[0].strip('| ') for line in '\n'.join(found).splitlines() if line.strip()]
    extra = rows.index('not in the mean')
    assert rows[rows.index('corruption') + 2 : extra] == sorted(corruptions.BENCHMARK)
    assert rows[extra + 2 :] == ['gaussian_blur', 'saturate', 'spatter', 'speckle_noise']


def test_unknown_images_of_a_diverged_network():
    """All scores are present, and all are nan."""
    wrong = posteriors.Prediction(
        np.full((4, 3), np.nan), np.full((4, 3), np.nan), np.full(4, np.nan), np.zeros((4, 3))
    )
    fine = wrong._replace(logits=np.eye(4, 3), probs=metrics.softmax(np.eye(4, 3)), expected_entropy=np.arange(4.0))
    for known, unknown in ((wrong, fine), (fine, wrong), (wrong, wrong)):
        found = measures.ood_detection(known, unknown)
        assert list(found['mean']) == ['max_prob', 'entropy', 'energy', 'max_logit']
        assert list(found['average']) == ['max_prob', 'entropy', 'mutual_information']  # the energy is not known
        scores = [*found['mean'].values(), *found['average'].values()]
        assert np.isnan([value for score in scores for value in score.values()]).all()


def test_unknown_images_by_energy_and_largest_logit():
    """Two images with small logits are unknown. Their probabilities are those of the known images."""
    known = np.array([[9.0, 5.0, 5.0], [6.0, 2.0, 2.0], [1.0, -3.0, -3.0]])
    unknown = known[:2] - [[10.0], [4.5]]

    def prediction(logits):
        probs = metrics.softmax(logits)
        votes = np.full(probs.shape, 1)
        of_samples = {'energy': metrics.energy(logits), 'max_logit': logits.max(axis=1)}
        return posteriors.Prediction(logits, probs, metrics.entropy(probs), votes, **of_samples)

    found = measures.ood_detection(prediction(known), prediction(unknown))
    assert found['mean'] == found['average'] and list(found['mean']) == ['energy', 'max_logit']
    for score in found['mean'].values():
        assert score['auroc'] == 5 / 6  # only the known 1 and the unknown 1.5 are in the wrong order
        assert score['fpr95'] == 1 / 2


def test_temperature_at_a_bound():
    at_bound = dict.fromkeys((*metrics.SHORT, 'brier'), 0.5) | {'temperature': 100.0, 'at_bound': True}
    inside = at_bound | {'temperature': 1.5, 'at_bound': False}
    untempered = {'mean': at_bound, 'average': at_bound}
    for tempered, shown, expected in (
        ({'mean': at_bound, 'average': inside}, {'mean': 'mean', 'average': '2 samples'}, ['1', '> 100', '1', '1.500']),
        ({'mean': at_bound | {'temperature': 0.01}}, {'mean': 'mean'}, ['1', '< 0.01']),
        ({'mean': inside}, {'mean': 'mean'}, ['1', '1.500']),
    ):
        text = tables._temperature(untempered | {'temperature': tempered}, shown)
        *rows, last = text.strip().splitlines()[2:]
        assert (
            last == 'A temperature with < or > is at the end of its range: the best temperature is further out.'
        ) == (expected != ['1', '1.500'])
        assert [row.split('|')[2].strip() for row in (*rows, last) if row.startswith('|')] == expected


def test_predictions_of_older_versions_are_read(trained):
    """They have no energies."""
    run = trained()
    evaluate.main([f'--resultsfolder={run}', '--testmc=2'])
    path = run / 'predictions.npz'
    _, prediction, *_ = predictions.read(path)
    assert prediction.energy.shape == prediction.max_logit.shape == (20,)
    with np.load(path) as file:
        older = {name: file[name] for name in file if name not in ('energy', 'max_logit')}
        wrong = dict(file) | {'energy': np.zeros(3, np.float32)}
    np.savez(path, **older)
    _, found, *_ = predictions.read(path)
    assert found.energy is None and found.max_logit is None
    np.testing.assert_array_equal(found.probs, prediction.probs)
    np.savez(path, **wrong)
    with pytest.raises(folders.RunError, match='does not have the format'):
        predictions.read(path)


def test_figures_can_be_computed_again_from_the_predictions(trained):
    run = trained()
    evaluate.main([f'--resultsfolder={run}', '--testmc=3'])
    results = results_of(run)
    with np.load(run / 'predictions.npz') as file:
        held = dict(file)
    assert held['probs'].dtype == held['logits'].dtype == np.float32 and held['labels'].shape == (20,)
    for at, probs in (('mean', metrics.softmax(held['logits'])), ('average', held['probs'])):
        for name, value in metrics.summary(probs, held['labels']).items():
            np.testing.assert_allclose(
                value, results[at][name] or np.nan if value != value else results[at][name], rtol=1e-5
            )
    information = metrics.mutual_information(held['entropy'], held['expected_entropy']).mean()
    np.testing.assert_allclose(information, results['average']['mutual_information'], rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(metrics.disagreement(held['votes']).mean(), results['average']['disagreement'])
    np.testing.assert_allclose(held['log_probs'], np.log(held['probs']), rtol=1e-5, atol=1e-6)
    assert held['num_samples'] == 3 and (held['votes'].sum(axis=1) == 3).all()


def test_validation_images_are_held_out(trained, flags_of):
    """Trains on 30 of 40 images, so N is 30. The log and --split validation evaluate the other 10."""
    run = trained(dafactor=1)
    log = [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()]
    evaluate.main([f'--resultsfolder={run}', '--split=validation'])
    results = results_of(run, 'metrics-validation')
    assert results['num_images'] == 10 and results['mean']['accuracy'] == log[-1]['validation_accuracy']
    assert 'test_accuracy' not in log[-1] and results_of(run, 'config')['num_data'] == 30
    assert train.main([f'--resume={run}']) == run


def test_some_images(trained, capsys):
    """Trains on 12 of 40 images and holds out 4. Evaluates 8 of 20 test images and 8 unknown images."""
    run = trained(trainimages=16, dafactor=1)
    assert results_of(run, 'config')['num_data'] == 12
    evaluate.main([f'--resultsfolder={run}', '--testimages=8', '--ood=digits', '--temperature', '--corruptions'])
    results = results_of(run)
    assert results['num_images'] == results['ood']['digits']['num_images'] == 8
    for at in ('mean', 'average'):
        bins = results['reliability'][at]
        assert sum(bins['counts']) == 8 and len(bins['counts']) == 20
        right = sum(n * accuracy for n, accuracy in zip(bins['counts'], bins['accuracy'], strict=True) if n)
        np.testing.assert_allclose(right / 8, results[at]['accuracy'])
    for flags, message in [
        (['--testimages=21'], '--testimages 21 exceeds the 20 available images'),
        (['--split=validation', '--corruptions=/nowhere'], '--split validation cannot be combined with --corr'),
        (['--laplace', '--bnrefresh=1'], '--laplace cannot be combined with --bnrefresh'),
        (['--testimages=8', '--corruptions=/nowhere'], '--testimages cannot be combined with --corruptions FOLDER'),
    ]:
        assert message in error_of([f'--resultsfolder={run}', *flags], capsys)


def test_what_is_refused(trained, flags_of, capsys):
    run = train.main(flags_of())
    for flags, message in [
        (['--temperature'], 'held out no training images: train with --validation 0.1'),
        (['--split=validation'], 'held out no training images'),
        (['--bnrefresh=1'], '--bnrefresh 1: mlp has no batch normalisation'),
        (['--corruptions=/nowhere'], '/nowhere holds no corruptions: unpack CIFAR-10-C.tar'),
        (['--ood=mnist'], 'was trained on this data set; name another'),
        (['--split=validation', '--temperature'], '--temperature cannot be combined with --split validation'),
        (['--ood=cifar100'], 'could not be downloaded'),
    ]:
        assert message in error_of([f'--resultsfolder={run}', *flags], capsys)
    assert not (run / 'metrics.json').exists()
    with pytest.raises(SystemExit):
        train.main(flags_of(validation=0.001))
    assert '--validation 0.001 holds out 0 of 40 training images' in capsys.readouterr().err


def test_images_in_another_order(flags_of, monkeypatch, capsys):
    """Other images would be held out than in training, so they are refused. The test set needs no training images."""
    run = train.main(flags_of(validation=0.25, batchsize=10))
    row = data.DATASETS['mnist']

    def backwards(folder, split):
        images, labels = row.read(folder, split)
        return images[::-1], labels[::-1]

    monkeypatch.setitem(data.DATASETS, 'mnist', row._replace(read=backwards))
    for flag in ('--split=validation', '--temperature'):
        assert 'does not hold the images that' in error_of([f'--resultsfolder={run}', flag], capsys)
    with pytest.raises(SystemExit) as stop:
        train.main([f'--resume={run}'])
    assert stop.value.code == 2 and 'does not hold the images that' in capsys.readouterr().err
    monkeypatch.setattr('data.read_train', None)
    evaluate.main([f'--resultsfolder={run}'])


@pytest.mark.parametrize('optim', ['bsam', 'swag'])
def test_batch_statistics_over_training_batches(optim, flags_of, small_resnet18, capsys):
    """Without --bnrefresh, only SWAG uses the batch statistics of other weights, and warns."""
    run = train.main(flags_of(model='resnet18', optim=optim))
    evaluate.main([f'--resultsfolder={run}', '--testmc=2'])
    before = results_of(run)
    assert ('--bnrefresh 10 or more' in capsys.readouterr().err) == (optim == 'swag')
    evaluate.main([f'--resultsfolder={run}', '--testmc=2', '--bnrefresh=2'])
    after = results_of(run)
    assert 'warning' not in capsys.readouterr().err
    assert after['bnrefresh'] == 2 and after['mean']['nll'] != before['mean']['nll']
    assert '--bnrefresh 3: the training images make only 2 batches of 20' in error_of(
        [f'--resultsfolder={run}', '--bnrefresh=3'], capsys
    )


def test_laplace_of_two_seeds(flags_of, capsys):
    """The second run shares the traced network of the first."""
    runs = [train.main(flags_of(optim='sgd', randomseed=seed)) for seed in (0, 1)]
    evaluate.main(['--laplace', '--testmc=2', '--resultsfolder', *map(str, runs)])
    assert '| sgd laplace, 2 samples |    2 |' in capsys.readouterr().out


def test_laplace(trained, flags_of, tmp_path, capsys):
    """Draws samples around the weights of SGD. Has its own files, which --reuse reads only with --laplace."""
    run = trained(optim='sgd')
    evaluate.main([f'--resultsfolder={run}', '--testmc=4'])
    evaluate.main([f'--resultsfolder={run}', '--testmc=4', '--laplace'])
    usual, with_laplace = results_of(run), results_of(run, 'metrics-laplace')
    assert usual['mean'] == with_laplace['mean'] and usual['average']['mutual_information'] < 1e-9
    assert with_laplace['average']['mutual_information'] > 1e-4
    other = trained(optim='bsam')
    assert 'bsam has a posterior of its own' in error_of([f'--resultsfolder={other}', '--laplace'], capsys)
    evaluate.main([f'--resultsfolder={other}', '--testmc=4'])
    capsys.readouterr()
    reuse = ['--resultsfolder', str(run), str(other), '--reuse']
    for flags, is_shown in ([], False), (['--laplace'], True):
        evaluate.main([*reuse, *flags])
        out = capsys.readouterr().out
        assert 'sgd, mean' in out and 'bsam, 4 samples' in out and ('sgd laplace, 4 samples' in out) == is_shown
    error = error_of([*reuse, '--laplace=diag'], capsys)
    assert 'was made with --laplace kron --laplaceprior marglik: give these flags' in error
    (run / 'predictions.npz').unlink()
    evaluate.main([*reuse, '--laplace'])
    assert 'sgd, mean' in capsys.readouterr().out
    assert 'predictions.npz is missing or damaged' in error_of(reuse, capsys)
    (run / 'predictions-laplace.npz').unlink()
    assert 'predictions-laplace.npz is missing or damaged' in error_of([*reuse, '--laplace'], capsys)


def test_several_runs(trained, tmp_path, monkeypatch, capsys):
    """Two methods, one of them with two seeds. --reuse prints the same tables from the saved predictions."""
    drawn = {}
    monkeypatch.setattr(plots, 'write', drawn.__setitem__)
    for optim, seed in (('sgd', 0), ('bsam', 0), ('bsam', 1)):
        trained(optim=optim, randomseed=seed)
    pattern, folder = str(tmp_path / 'results' / '*' / '*' / 'run_*'), tmp_path / 'results' / 'mnist_mlp'
    evaluate.main([f'--resultsfolder={pattern}', '--testmc', '1', '4', '--ensemble', '--plots'])
    out = capsys.readouterr().out
    tables = out[out.index('mean ± standard deviation') :]
    assert f'\npictures: {folder}/plots\n' in tables
    titles = {figures['reliability'].get_suptitle() for figures in drawn.values()}
    of_runs = ('run_0 of sgd', 'run_0 of bsam', 'run_1 of bsam')
    assert titles == {'Reliability: 20 test images of mnist'} | {
        f'Reliability: {run} on mnist, mlp, 20 test images' for run in of_runs
    }
    curves = drawn[folder / 'plots']['samples'].legends[0].get_texts()
    assert {text.get_text() for text in curves[:-1]} == {'bsam, samples', 'bsam, mean', 'sgd, mean'}
    for name in (
        'sgd, mean',
        'bsam, mean',
        'bsam, 4 samples',
        'bsam ensemble of 2, 4 samples',
        'ensemble of all 3 runs',
    ):
        assert name in tables
    written = {path.suffix: path.read_text() for path in folder.glob('comparison.*')}
    assert set(written) == {'.md', '.csv', '.tex'} and '**' in written['.md'] and r'\textbf' in written['.tex']
    (folder / 'bsam' / 'run_0' / 'metrics.json').unlink()
    drawn.clear()
    evaluate.main([f'--resultsfolder={pattern}', '--reuse', '--ensemble', '--plots', f'--output={tmp_path}'])
    ((place, figures),) = drawn.items()
    assert place == tmp_path / 'plots' and figures['reliability'] and not figures['samples']
    again = capsys.readouterr().out
    assert again.split('written')[0].strip() == tables.split('written')[0].strip()
    assert (tmp_path / 'comparison.md').read_text() == written['.md']
    error = error_of([f'--resultsfolder={pattern}', '--reuse', f'--output={tmp_path}/comparison.md/a'], capsys)
    assert f'{tmp_path}/comparison.md is not a folder, or is read-only: name another folder' in error
    assert '--reuse cannot be combined with --testmc' in error_of(
        [f'--resultsfolder={pattern}', '--reuse', '--testmc=8'], capsys
    )
    predictions = folder / 'sgd' / 'run_0' / 'predictions.npz'
    for damaged in (b'damaged', predictions.read_bytes()[:1000]):
        predictions.write_bytes(damaged)
        assert 'predictions.npz is missing or damaged' in error_of([f'--resultsfolder={pattern}', '--reuse'], capsys)


@pytest.mark.parametrize(
    ('flags', 'line'),
    [
        (['--laplace'], 'bsam has a posterior of its own'),
        (['--bnrefresh=1'], '--bnrefresh 1: mlp has no batch normalisation'),
        (['--temperature'], 'held out no training images: train with --validation 0.1'),
        (['--ood=mnist'], 'was trained on this data set; name another'),
    ],
)
def test_what_one_of_several_runs_cannot_do(flags, line, flags_of, monkeypatch, capsys):
    """The error comes before the first run is evaluated."""
    runs = [str(train.main(flags_of(optim=optim))) for optim in ('sgd', 'bsam')]
    monkeypatch.setattr(evaluate, 'evaluate', lambda *args: pytest.fail('evaluated'))
    assert line in error_of(['--resultsfolder', *runs, *flags], capsys)


@pytest.mark.parametrize('flags', [[], ['--reuse']])
def test_one_of_several_runs_without_a_description(flags, flags_of, monkeypatch, capsys):
    """The error comes before the first run is evaluated."""
    first, second = (train.main(flags_of(optim=optim)) for optim in ('sgd', 'bsam'))
    config = folders.read_config(second)
    del config['dataset']
    folders.write_config(second, config)
    monkeypatch.setattr(evaluate, 'evaluate', lambda *args: pytest.fail('evaluated'))
    assert 'does not describe images' in error_of(['--resultsfolder', str(first), str(second), *flags], capsys)


def test_a_damaged_log_is_found_before_a_run_is_evaluated_for_its_picture(trained, monkeypatch, capsys):
    run = trained()
    (run / 'log.jsonl').write_text('{')
    monkeypatch.setattr(evaluate, 'evaluate', lambda *args: pytest.fail('evaluated'))
    assert 'log.jsonl is damaged' in error_of([f'--resultsfolder={run}', '--plots'], capsys)


@pytest.mark.parametrize('numbers', [[1, 2, 4, 8], [1, 2, 3, 4, 5, 30, 31, 32], range(33, 61)])
def test_labels_of_a_curve_do_not_overlap(numbers):
    points = [{'testmc': n, 'accuracy': 0.5, 'nll': 1.0, 'ece': 0.1} for n in numbers]
    figure = plots.samples([comparison.Row('bsam, 60 samples', [], measured=[{'samples': points}])])
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
        assert boxes and all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_a_diverged_run(flags_of, monkeypatch, capsys):
    """Pictures and temperature show nan, and a Laplace approximation is refused."""
    run = train.main([*flags_of(optim='sgd', alpha=1e30, validation=0.25), '--keepgoing'])
    drawn = []
    monkeypatch.setattr('evaluation.plots.save', lambda figure, folder, name: drawn.append(figure))
    evaluate.main([f'--resultsfolder={run}', '--plots', '--temperature'])
    reliability, risk_coverage, *_ = drawn
    (title,) = {axes.get_title().splitlines()[1] for axes in reliability.axes[:2]}
    legend = {text.get_text().split()[-1] for text in risk_coverage.legends[0].get_texts()}
    results = results_of(run)
    assert title == 'ECE –' and legend == {'–'} and results['temperature']['mean']['temperature'] is None
    assert set(results['average'].values()) == {None}, 'the votes of a diverged network mean nothing'
    assert 'weights of the run are not finite' in error_of([f'--resultsfolder={run}', '--laplace'], capsys)


def test_an_earlier_checkpoint(trained, capsys):
    """Writes its results to files of its own. A warning names the epoch of the checkpoint."""
    run = trained()
    evaluate.main([f'--resultsfolder={run}'])
    before = (run / 'metrics.json').read_text()
    assert 'warning' not in capsys.readouterr().err
    evaluate.main([f'--resultsfolder={run}', '--checkpoint=3'])
    assert f'{run} is not fully trained: it is in epoch 1 of 2' in capsys.readouterr().err
    assert results_of(run, 'metrics-3')['trained'] == {'epoch': 0, 'steps_of_epoch': 3}
    assert (run / 'metrics.json').read_text() == before


def test_one_of_several_runs_that_is_damaged_or_read_only(flags_of, monkeypatch, capsys):
    """The error comes before the first run is evaluated."""
    first, second = (train.main(flags_of(randomseed=seed)) for seed in (0, 1))
    both = ['--resultsfolder', str(first), str(second)]
    monkeypatch.setattr(evaluate, 'evaluate', lambda *args: pytest.fail('evaluated'))
    monkeypatch.setattr(os, 'access', lambda path, mode: path != second)  # the superuser could write it
    assert f'{second} is not writable' in error_of(both, capsys)
    monkeypatch.undo()
    newest = second / 'checkpoints' / str(checkpoints.all_steps(second / 'checkpoints')[-1])
    (newest / 'progress.json').unlink()
    error = error_of(both, capsys)
    assert 'progress.json is missing; ' in error and error.endswith(' with this run folder only\n')
    assert not (first / 'metrics.json').exists()


@pytest.fixture
def read_only(monkeypatch):
    """Returns a function that makes folders look read-only. The superuser, who may run tests, can write all folders."""

    def make(*paths):
        monkeypatch.setattr(os, 'access', lambda path, mode: not any(Path(path).is_relative_to(p) for p in paths))

    return make


def content(folder):
    """Returns the time of the last change of a folder and of everything in it."""
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob('*')]}


def test_output_of_a_read_only_run(flags_of, read_only, tmp_path, monkeypatch, capsys):
    """Nothing changes in the run folder."""
    drawn = []
    monkeypatch.setattr('evaluation.plots.of_run', lambda *args: {})
    monkeypatch.setattr('evaluation.plots.write', lambda folder, figures: drawn.append(folder))
    run = train.main(flags_of())
    before = content(run)
    read_only(run)
    error = error_of([f'--resultsfolder={run}'], capsys)
    assert f'{run} is not writable: name another folder for metrics.json with --output' in error
    output = tmp_path / 'new' / 'output'
    evaluate.main([f'--resultsfolder={run}', f'--output={output}', '--plots'])
    assert f'written: {output}\n' in capsys.readouterr().out
    assert {path.name for path in output.iterdir()} == {'metrics.json', 'predictions.npz'}
    assert results_of(output)['mean'] and drawn == [output / 'plots']
    error = error_of([f'--resultsfolder={run}', f'--output={run}/new'], capsys)
    assert f'--output {run}/new: {run} is not a folder, or is read-only: name another folder' in error
    assert content(run) == before


def test_output_of_several_read_only_runs(flags_of, read_only, tmp_path, capsys):
    """Each run has a folder, whose name does not depend on the other runs. --reuse finds it."""
    runs = [train.main(flags_of(optim=optim, randomseed=i)) for optim, i in (('sgd', 0), ('bsam', 0), ('bsam', 1))]
    results, output = tmp_path / 'results', tmp_path / 'output'
    before = content(results)
    read_only(results)
    both, of_all = [['--resultsfolder', *map(str, some)] for some in (runs[1:], runs)]
    assert 'with --output' in error_of(both, capsys)
    evaluate.main([*both, f'--output={output}'])
    evaluate.main([*of_all, f'--output={output}'])
    out = capsys.readouterr().out
    found = [path.parent for path in output.glob('*/metrics.json')]
    assert len(found) == 3 and all((folder / 'predictions.npz').exists() for folder in found)
    assert {folder.name.rpartition('-')[0] for folder in found} == {
        'mnist_mlp-sgd-run_0', 'mnist_mlp-bsam-run_0', 'mnist_mlp-bsam-run_1',
    }  # fmt: skip
    assert all(f'written: {folder}\n' in out for folder in found)
    table = (output / 'comparison.csv').read_text()
    evaluate.main([*of_all, '--reuse', f'--output={output}'])
    assert (output / 'comparison.csv').read_text() == table
    evaluate.main([*both, '--reuse', f'--output={output}'])
    assert 'sgd' not in (output / 'comparison.csv').read_text()
    assert 'predictions.npz is missing or damaged' in error_of([*both, '--reuse', f'--output={output}/new'], capsys)
    assert content(results) == before


def test_folders_of_runs_with_long_or_equal_names(tmp_path):
    """The folder `a` of two different folders is not the same run. A link is the run that it names."""
    names = [comparison.own_folder(tmp_path, tmp_path / parent / 'a').name for parent in ('0/x/y/z', '1/x/y/z')]
    assert [name[:-8] for name in names] == ['y-z-a-'] * 2 and len({*names}) == 2
    (tmp_path / 'link').symlink_to(tmp_path / '0/x/y/z')
    assert comparison.own_folder(tmp_path, tmp_path / 'link/a').name == names[0]
    assert len(comparison.own_folder(tmp_path, Path('/', 'ä' * 120, 'ä' * 120)).name.encode()) < 255


def test_a_pattern_that_also_names_the_tables_of_before(flags_of, capsys):
    first, _ = (train.main(flags_of(randomseed=seed)) for seed in (0, 1))
    everything = f'--resultsfolder={first.parent}/*'
    evaluate.main([everything])
    assert (first.parent / 'comparison.csv').exists()
    evaluate.main([everything])
    assert 'comparison.csv is a file' in error_of([f'--resultsfolder={first.parent}/*.csv'], capsys)
    assert 'run_x* matches no folder' in error_of([f'--resultsfolder={first.parent}/run_x*'], capsys)


def test_one_of_several_runs_without_a_checkpoint(flags_of, capsys):
    complete, begun = (train.main(flags_of(randomseed=seed)) for seed in (0, 1))
    shutil.rmtree(begun / 'checkpoints')
    assert f'{begun} holds no checkpoint' in error_of([f'--resultsfolder={complete.parent}/*'], capsys)
    assert not (complete / 'metrics.json').exists()


def test_reused_predictions_of_an_earlier_state(flags_of, capsys):
    first, *_ = (train.main(flags_of(randomseed=seed)) for seed in (0, 1))
    both = [f'--resultsfolder={first.parent}/run_*']
    evaluate.main(both)
    train.main([f'--resume={first}', '--epochs=2'])
    capsys.readouterr()
    evaluate.main([*both, '--reuse'])
    assert capsys.readouterr().err == f'test.py: warning: {first} is not fully trained: it is in epoch 2 of 3\n'


def test_predictions_that_claim_to_be_large(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {'descr': '<f4', 'fortran_order': False, 'shape': (10**13, 10)})
    with zipfile.ZipFile(tmp_path / 'predictions.npz', 'w') as file:
        for name in ('labels', 'logits', 'log_probs', 'expected_entropy', 'votes', 'num_samples', 'trained'):
            file.writestr(f'{name}.npy', header.getvalue())
    with pytest.raises(folders.RunError, match='is missing or damaged'):
        predictions.read(tmp_path / 'predictions.npz')


def test_folders_whose_names_look_like_patterns(tmp_path):
    for name in ('lr[1]', 'lr1'):
        (tmp_path / name).mkdir()
    assert evaluate.parse_args([f'--resultsfolder={tmp_path}/lr[1]']).resultsfolder == [tmp_path / 'lr[1]']
    assert evaluate.parse_args([f'--resultsfolder={tmp_path}/lr[12]']).resultsfolder == [tmp_path / 'lr1']
