"""test.py on small runs: every flag, its files, what it refuses."""

import io
import itertools
import json
import os
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

import assessment
import checkpoints
import data
import evaluation
import metrics
import plots
import runs
import test as evaluate
import train

PICTURES = ('reliability', 'risk_coverage', 'training', 'images', 'samples', 'severities')


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
    assert left == {'mine', *PICTURES} - {'samples', 'severities'}, 'a curve of before, or what is not ours'


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
    """30 of 40 images are trained on; the log and --split validation speak of the others; N counts the 30."""
    run = trained(dafactor=1)
    log = [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()]
    evaluate.main([f'--resultsfolder={run}', '--split=validation'])
    results = results_of(run, 'metrics-validation')
    assert results['num_images'] == 10 and results['mean']['accuracy'] == log[-1]['validation_accuracy']
    assert 'test_accuracy' not in log[-1] and results_of(run, 'config')['num_data'] == 30
    assert train.main([f'--resume={run}']) == run


def test_some_images(trained, capsys):
    """12 of 40 images are trained on and 4 kept out; 8 of 20 are evaluated, and as many unknown ones."""
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
        (['--testimages=21'], '--testimages 21 exceeds the 20 images that there are'),
        (['--split=validation', '--corruptions=/nowhere'], '--split validation goes without a folder'),
        (['--laplace', '--bnrefresh=1'], '--laplace goes without --bnrefresh'),
        (['--testimages=8', '--corruptions=/nowhere'], '--testimages goes without a folder of corrupted images'),
    ]:
        assert message in error_of([f'--resultsfolder={run}', *flags], capsys)


def test_what_is_refused(trained, flags_of, capsys):
    run = train.main(flags_of())
    for flags, message in [
        (['--temperature'], 'kept no training images out: train with --validation 0.1'),
        (['--split=validation'], 'kept no training images out'),
        (['--bnrefresh=1'], '--bnrefresh 1: mlp has no batch normalisation'),
        (['--corruptions=/nowhere'], '/nowhere holds no corruptions: unpack CIFAR-10-C.tar'),
        (['--ood=mnist'], '--ood mnist: these are the images that the run knows'),
        (['--split=validation', '--temperature'], '--temperature is fitted on the images of --split validation'),
        (['--ood=cifar100'], 'could not be fetched'),
    ]:
        assert message in error_of([f'--resultsfolder={run}', *flags], capsys)
    assert not (run / 'metrics.json').exists()
    with pytest.raises(SystemExit):
        train.main(flags_of(validation=0.001))
    assert '--validation 0.001 of 40 training images leaves none' in capsys.readouterr().err


def test_images_in_another_order(flags_of, monkeypatch, capsys):
    """Others would be held out of training than were; the test set is read without training images."""
    run = train.main(flags_of(validation=0.25, batchsize=10))
    row = data.DATASETS['mnist']

    def backwards(folder, split):
        images, labels = row.read(folder, split)
        return images[::-1], labels[::-1]

    monkeypatch.setitem(data.DATASETS, 'mnist', row._replace(read=backwards))
    for flag in ('--split=validation', '--temperature'):
        assert 'holds other images than those that' in error_of([f'--resultsfolder={run}', flag], capsys)
    with pytest.raises(SystemExit) as stop:
        train.main([f'--resume={run}'])
    assert stop.value.code == 2 and 'holds other images than those that' in capsys.readouterr().err
    monkeypatch.setattr('data.read_train', None)
    evaluate.main([f'--resultsfolder={run}'])


@pytest.mark.parametrize('optim', ['bsam', 'swag'])
def test_batch_statistics_over_training_batches(optim, flags_of, small_resnet18, capsys):
    """Without them, only SWAG's weights have those of others."""
    run = train.main(flags_of(model='resnet18', optim=optim))
    evaluate.main([f'--resultsfolder={run}', '--testmc=2'])
    before = results_of(run)
    assert ('--bnrefresh 10 or more' in capsys.readouterr().err) == (optim == 'swag')
    evaluate.main([f'--resultsfolder={run}', '--testmc=2', '--bnrefresh=2'])
    after = results_of(run)
    assert 'warning' not in capsys.readouterr().err
    assert after['bnrefresh'] == 2 and after['mean']['nll'] != before['mean']['nll']
    assert '--bnrefresh 3: the training images are 2 batches of 20' in error_of(
        [f'--resultsfolder={run}', '--bnrefresh=3'], capsys
    )


def test_laplace(trained, flags_of, tmp_path, capsys):
    """Samples around SGD's weights; its files stand beside the others, and --reuse compares both."""
    run = trained(optim='sgd')
    evaluate.main([f'--resultsfolder={run}', '--testmc=4'])
    evaluate.main([f'--resultsfolder={run}', '--testmc=4', '--laplace'])
    usual, with_laplace = results_of(run), results_of(run, 'metrics-laplace')
    assert usual['mean'] == with_laplace['mean'] and usual['average']['mutual_information'] < 1e-9
    assert with_laplace['average']['mutual_information'] > 1e-4
    other = trained(optim='bsam')
    assert '--laplace: bsam has a posterior of its own' in error_of([f'--resultsfolder={other}', '--laplace'], capsys)
    evaluate.main([f'--resultsfolder={other}', '--testmc=4'])
    capsys.readouterr()
    evaluate.main(['--resultsfolder', str(run), str(other), '--reuse'])
    out = capsys.readouterr().out
    assert 'sgd, mean' in out and 'sgd laplace, 4 samples' in out and 'bsam, 4 samples' in out


def test_several_runs(trained, tmp_path, capsys):
    """Two methods, one with two seeds; the same tables from the predictions alone."""
    for optim, seed in (('sgd', 0), ('bsam', 0), ('bsam', 1)):
        trained(optim=optim, randomseed=seed)
    pattern, folder = str(tmp_path / 'results' / '*' / '*' / 'run_*'), tmp_path / 'results' / 'mnist_mlp'
    evaluate.main([f'--resultsfolder={pattern}', '--testmc=4', '--ensemble'])
    out = capsys.readouterr().out
    tables = out[out.index('mean ± standard deviation') :]
    for name in (
        'sgd, mean',
        'bsam, mean',
        'bsam, 4 samples',
        'bsam ensemble of 2, 4 samples',
        'all as an ensemble of 3',
    ):
        assert name in tables
    written = {path.suffix: path.read_text() for path in folder.glob('comparison.*')}
    assert set(written) == {'.md', '.csv', '.tex'} and '**' in written['.md'] and r'\textbf' in written['.tex']
    (folder / 'bsam' / 'run_0' / 'metrics.json').unlink()
    evaluate.main([f'--resultsfolder={pattern}', '--reuse', '--ensemble', f'--output={tmp_path}'])
    again = capsys.readouterr().out
    assert again.split('written')[0].strip() == tables.split('written')[0].strip()
    assert (tmp_path / 'comparison.md').read_text() == written['.md']
    error = error_of([f'--resultsfolder={pattern}', '--reuse', f'--output={tmp_path}/absent'], capsys)
    assert 'absent is no folder: make it first' in error
    assert '--reuse evaluates nothing, so --testmc goes without it' in error_of(
        [f'--resultsfolder={pattern}', '--reuse', '--testmc=8'], capsys
    )
    predictions = folder / 'sgd' / 'run_0' / 'predictions.npz'
    for damaged in (b'damaged', predictions.read_bytes()[:1000]):
        predictions.write_bytes(damaged)
        assert 'predictions.npz is missing or damaged' in error_of([f'--resultsfolder={pattern}', '--reuse'], capsys)


@pytest.mark.parametrize(
    ('flags', 'line'),
    [
        (['--laplace'], '--laplace: bsam has a posterior of its own'),
        (['--bnrefresh=1'], '--bnrefresh 1: mlp has no batch normalisation'),
        (['--temperature'], 'kept no training images out: train with --validation 0.1'),
        (['--ood=mnist'], '--ood mnist: these are the images that the run knows'),
    ],
)
def test_what_one_of_several_runs_cannot_do(flags, line, flags_of, monkeypatch, capsys):
    """It is said before the first of them is evaluated."""
    runs = [str(train.main(flags_of(optim=optim))) for optim in ('sgd', 'bsam')]
    monkeypatch.setattr(assessment, 'evaluate', lambda run, args: pytest.fail('evaluated'))
    assert line in error_of(['--resultsfolder', *runs, *flags], capsys)


@pytest.mark.parametrize('flags', [[], ['--reuse']])
def test_one_of_several_runs_without_a_description(flags, flags_of, monkeypatch, capsys):
    """It is found before the first of them is evaluated."""
    first, second = (train.main(flags_of(optim=optim)) for optim in ('sgd', 'bsam'))
    config = runs.read_config(second)
    del config['dataset']
    runs.write_config(second, config)
    monkeypatch.setattr(assessment, 'evaluate', lambda run, args: pytest.fail('evaluated'))
    assert 'does not describe images' in error_of(['--resultsfolder', str(first), str(second), *flags], capsys)


def test_a_damaged_log_is_found_before_a_run_is_evaluated_for_its_picture(trained, monkeypatch, capsys):
    run = trained()
    (run / 'log.jsonl').write_text('{')
    monkeypatch.setattr(assessment, 'evaluate', lambda run, args: pytest.fail('evaluated'))
    assert 'log.jsonl is damaged' in error_of([f'--resultsfolder={run}', '--plots'], capsys)


@pytest.mark.parametrize('numbers', [[1, 2, 4, 8], [1, 2, 3, 4, 5, 30, 31, 32], range(33, 61)])
def test_labels_of_a_curve_do_not_overlap(numbers):
    points = [{'testmc': n, 'accuracy': 0.5, 'nll': 1.0, 'ece': 0.1} for n in numbers]
    figure = plots.samples(points, points[0])
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
        assert boxes and all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_a_diverged_run(flags_of, monkeypatch, capsys):
    """No picture, temperature or approximation of it looks like a result."""
    run = train.main([*flags_of(optim='sgd', alpha=1e30, validation=0.25), '--keepgoing'])
    drawn = []
    monkeypatch.setattr('plots.save', lambda figure, folder, name: drawn.append(figure))
    evaluate.main([f'--resultsfolder={run}', '--plots', '--temperature'])
    reliability, risk_coverage, *_ = drawn
    (title,) = {axes.get_title().splitlines()[1] for axes in reliability.axes[:2]}
    legend = {text.get_text().split()[-1] for text in risk_coverage.axes[0].get_legend().get_texts()}
    assert title == 'ECE nan' and legend == {'nan'} and results_of(run)['temperature']['mean']['temperature'] is None
    assert 'weights of the run are not finite' in error_of([f'--resultsfolder={run}', '--laplace'], capsys)


def test_an_earlier_checkpoint(trained, capsys):
    """Its results stand beside those of the end, and a warning says where it is."""
    run = trained()
    evaluate.main([f'--resultsfolder={run}'])
    before = (run / 'metrics.json').read_text()
    assert 'warning' not in capsys.readouterr().err
    evaluate.main([f'--resultsfolder={run}', '--checkpoint=3'])
    assert f'{run} is evaluated in epoch 1 of 2' in capsys.readouterr().err
    assert results_of(run, 'metrics-3')['trained'] == {'epoch': 0, 'steps_of_epoch': 3}
    assert (run / 'metrics.json').read_text() == before


def test_one_of_several_runs_that_is_damaged_or_read_only(flags_of, monkeypatch, capsys):
    """It is found before the first of them is evaluated."""
    first, second = (train.main(flags_of(randomseed=seed)) for seed in (0, 1))
    both = ['--resultsfolder', str(first), str(second)]
    monkeypatch.setattr(assessment, 'evaluate', lambda run, args: pytest.fail('evaluated'))
    monkeypatch.setattr(os, 'access', lambda path, mode: path != second)  # the superuser could write it
    assert f'{second} cannot be written' in error_of(both, capsys)
    monkeypatch.undo()
    newest = second / 'checkpoints' / str(checkpoints.all_steps(second / 'checkpoints')[-1])
    (newest / 'progress.json').unlink()
    error = error_of(both, capsys)
    assert 'progress.json is missing; ' in error and error.endswith(', of this run alone\n')
    assert not (first / 'metrics.json').exists()


def test_a_pattern_that_also_names_the_tables_of_before(flags_of, capsys):
    first, _ = (train.main(flags_of(randomseed=seed)) for seed in (0, 1))
    everything = f'--resultsfolder={first.parent}/*'
    evaluate.main([everything])
    assert (first.parent / 'comparison.csv').exists()
    evaluate.main([everything])
    assert 'comparison.csv is a file' in error_of([f'--resultsfolder={first.parent}/*.csv'], capsys)
    assert 'run_x* matches nothing' in error_of([f'--resultsfolder={first.parent}/run_x*'], capsys)


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
    assert capsys.readouterr().err == f'test.py: warning: {first} is evaluated in epoch 2 of 3\n'


def test_predictions_that_claim_to_be_large(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {'descr': '<f4', 'fortran_order': False, 'shape': (10**13, 10)})
    with zipfile.ZipFile(tmp_path / 'predictions.npz', 'w') as file:
        for name in ('labels', 'logits', 'log_probs', 'expected_entropy', 'votes', 'num_samples', 'trained'):
            file.writestr(f'{name}.npy', header.getvalue())
    with pytest.raises(runs.RunError, match='is missing or damaged'):
        evaluation.read_predictions(tmp_path / 'predictions.npz')


def test_folders_whose_names_look_like_patterns(tmp_path):
    for name in ('lr[1]', 'lr1'):
        (tmp_path / name).mkdir()
    assert evaluate.parse_args([f'--resultsfolder={tmp_path}/lr[1]']).resultsfolder == [tmp_path / 'lr[1]']
    assert evaluate.parse_args([f'--resultsfolder={tmp_path}/lr[12]']).resultsfolder == [tmp_path / 'lr1']
