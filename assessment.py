"""Runs assessed in this process, as the arguments of test.py say: evaluated, compared, printed and drawn."""

import math
import os
import sys
from pathlib import Path

import jax

import data
import experiments
import metrics
from evaluation import comparison, corruptions, measures, tables
from runs import checkpoints, folders, hosts, json_files, provenance, training_flags


def assess(args):
    """Prints and writes all that the arguments of test.py ask for. Raises DataError, RunError and others."""
    several = len(args.resultsfolder) > 1
    configs = hosts.from_first(lambda: [training_flags.read_config(run) for run in args.resultsfolder])
    for run, config in zip(args.resultsfolder, configs, strict=True):
        data.check_description(config.get('dataset'), run / 'config.json')
        if not args.reuse:
            require_possible(run, config, args)
    if several:
        require_comparable(configs, args)
        if not args.reuse:
            hosts.from_first(lambda: [checkpoints.require_whole(run).name for run in args.resultsfolder])
    results = []
    for run in args.resultsfolder:
        if several and not args.reuse:
            print(f'\n{run}')
        results += read_again(run, args) if args.reuse else [evaluate(run, args)]
    if several:
        compare(results, args)


def require_comparable(configs, args):
    """Raises a ComparisonError for runs that are not to be compared, a RunError if their tables have no place."""
    if hosts.is_first():
        if args.output and not os.path.isdir(args.output):
            raise folders.RunError(f'--output {args.output} is no folder: make it first')
        if not os.access(_common_folder(args), os.W_OK):
            raise folders.RunError(f'{_common_folder(args)} cannot be written: name another --output')
    comparison.check_flags([config['flags'] for config in configs], args.split)


def require_possible(run, config, args):
    """Raises a DataError, ModelError or RunError for what cannot be asked of a run with this configuration."""
    flags = config['flags']
    if hosts.is_first():
        if not os.access(run, os.W_OK):
            raise folders.RunError(f'{run} cannot be written, so metrics.json has no place')
        if args.plots:
            folders.read_log(run)
    if flags['dataset'] in args.ood:
        raise data.DataError(f'--ood {flags["dataset"]}: these are the images that the run knows')
    if args.laplace and flags['optim'] in training_flags.WITH_POSTERIOR:
        raise folders.RunError(f'--laplace: {flags["optim"]} has a posterior of its own')
    if args.laplace and flags['priorprec'] == 0:
        raise folders.RunError('--laplace: a run with --priorprec 0 has no prior, and its posterior no bounds')
    if (args.temperature or args.split == 'validation') and not flags['validation']:
        raise folders.RunError(f'{run} kept no training images out: train with --validation 0.1')
    if args.bnrefresh:
        batches = config['dataset']['num_train'] // flags['batchsize']
        if args.bnrefresh > batches:
            what = f'the training images are {batches} batches of {flags["batchsize"]}'
            raise folders.RunError(f'--bnrefresh {args.bnrefresh}: {what}')
        if not jax.tree.leaves(experiments.create(config).state_shapes().batch_stats):
            raise folders.RunError(f'--bnrefresh {args.bnrefresh}: {flags["model"]} has no batch normalisation')


def _common_folder(args):
    return args.output or Path(os.path.commonpath(map(os.path.realpath, args.resultsfolder)))


def evaluate(run, args):
    """Prints and writes all that the flags ask for of one run; returns its comparison.Result.

    Each part is written and printed before the next part begins, because the next may fail or be stopped.
    """
    subject = measures.load(
        run,
        split=args.split,
        with_held_out=args.temperature,
        num_images=args.testimages,
        step=args.checkpoint,
        dataset_folder=args.datasetfolder,
        batch_size=args.testbatchsize,
        bn_refresh=args.bnrefresh,
        with_laplace=args.laplace,
    )
    if hosts.is_first():
        warn_if_incomplete(run, subject.config, subject.progress)
        warn_of_batch_statistics(subject, args.bnrefresh)
    ood = {name: measures.read_ood(subject, name, args.testimages) for name in args.ood}
    corrupted = None if args.corruptions is None else measures.read_corrupted(subject, args.corruptions or None)
    predictions = list(subject.posterior.predict(subject.images, args.testmc))
    prediction, num_samples = predictions[-1], args.testmc[-1]
    mark, environment = folders.mark(args.split, args.laplace, args.checkpoint), provenance.environment()
    results = {'trained': _trained(subject.progress), 'num_images': len(subject.labels), **folders.asked(args)}
    for i, (part, show) in enumerate(measure(subject, args, predictions, ood, corrupted)):
        results |= part
        try:
            if hosts.is_first():
                json_files.write_json(folders.metrics_file(run, args), results | environment)
                if i == 0:
                    measures.write_predictions(run / f'predictions{mark}.npz', prediction, subject, num_samples)
        finally:
            show(results)  # on a full disk too
    if args.plots and hosts.is_first():
        print(f'\npictures: {draw(run / f"plots{mark}", subject, prediction, results)}')
    probs = prediction.probs_at_mean, prediction.probs
    return comparison.Result(subject.flags, subject.labels, *probs, num_samples, args.laplace)


def measure(subject, args, predictions, ood, corrupted):
    """Measures part by part. Yields the entries of metrics.json that are new, and the function that prints them.

    Args:
        predictions: posteriors.Predictions for the subject's images, one for each number of args.testmc.
        ood: {name: measures.read_ood(...)}, empty for none.
        corrupted: measures.read_corrupted(...), None for none.

    Yields:
        ({name: value}, function of all entries so far).
    """
    prediction, num_samples, num_bins = predictions[-1], args.testmc[-1], args.bins
    yield measures.measure(prediction, subject.labels, num_bins), print_metrics
    if len(predictions) > 1:
        yield {'samples': measures.curve(predictions, args.testmc, subject.labels, num_bins)}, print_curve
    if args.temperature:
        yield {'temperature': measures.tempered(subject, prediction, num_samples, num_bins)}, print_temperature
    if ood:
        yield {'ood': measures.all_ood(subject, prediction, ood, num_samples)}, print_ood
    if corrupted:
        yield {'corruptions': measures.all_corrupted(subject, corrupted, num_samples, num_bins)}, print_corruptions


def _trained(progress):
    return {'epoch': progress.epoch, 'steps_of_epoch': progress.step}


def warn_if_incomplete(run, config, progress):
    epochs = config['flags']['epochs']
    if _trained(progress) != folders.end_of_training(config, epochs):
        where = f'epoch {progress.epoch + 1} of {epochs + 1}'
        print(f'test.py: warning: {run} is evaluated in {where}', file=sys.stderr)


def warn_of_batch_statistics(subject, bn_refresh):
    """Those of a SWAG run belong to SGD's weights, of which neither the mean nor a sample is one."""
    if subject.flags['optim'] == 'swag' and subject.posterior.has_batch_stats and not bn_refresh:
        what = f"{subject.run} is evaluated with the batch statistics of SGD's last weights"
        print(f'test.py: warning: {what}: estimate them again with --bnrefresh 10 or more', file=sys.stderr)


def read_again(run, args):
    """The comparison.Results of a run that was evaluated before, with its own posterior, Laplace's or both."""
    config = training_flags.read_config(run)
    files = {laplace: run / f'predictions{folders.mark(args.split, laplace)}.npz' for laplace in (False, True)}
    results = []
    for laplace, path in files.items():
        if path.exists() or not any(other.exists() for other in files.values()):
            labels, prediction, num_samples, progress = measures.read_predictions(path)
            warn_if_incomplete(run, config, progress)
            probs = prediction.probs_at_mean, prediction.probs
            results.append(comparison.Result(config['flags'], labels, *probs, num_samples, laplace))
    return results


def compare(results, args):
    """Prints the tables of several runs, and writes them."""
    comparison.check_labels(results)
    rows = comparison.rows([*results, *comparison.ensembles(results)] if args.ensemble else results)
    values = comparison.values(rows, results[0].labels, args.bins)
    order = comparison.order(values)
    rows, values = [rows[i] for i in order], [values[i] for i in order]
    print('\nmean ± standard deviation over runs; the lowest NLL first\n')
    print(tables.markdown(*comparison.main_table(rows, values, bold=False)))
    if len(rows) > 1:
        print('difference to the first: 95 % interval and p-value over resampled test images (paired bootstrap)\n')
        print(tables.markdown(*comparison.test_table(rows, results[0].labels, args.bins)))
    header, over_seeds = comparison.seeds_table(rows, values)
    if over_seeds:
        print("difference to the first of several runs: 95 % interval and p-value over seeds (Welch's t-test)\n")
        print(tables.markdown(header, over_seeds))
    if hosts.is_first():
        print('written: ' + ', '.join(str(path) for path in comparison.write(_common_folder(args), rows, values)))


def draw(folder, subject, prediction, results):
    """Writes the pictures of a run and returns their folder. Raises RunError.

    A picture of an earlier evaluation stays until the new one is whole. It is removed if this one does not draw it.
    """
    from evaluation import plots  # Matplotlib takes most of a second

    average = f'average of {results["testmc"]} samples'
    titles = {'mean': 'at the mean', 'average': average}
    predictions = {titles['mean']: prediction.probs_at_mean, average: prediction.probs}
    split = 'validation' if subject.flags['validation'] else 'test'
    figures = {
        'reliability': plots.reliability({title: results['reliability'][at] for at, title in titles.items()}),
        'risk_coverage': plots.risk_coverage(predictions, subject.labels),
        'training': plots.training(folders.read_log(subject.run), split),
        'images': plots.image_sheet(subject.images, subject.labels, prediction.probs),
        'samples': None,
        'severities': None,
    }
    if 'samples' in results:
        figures['samples'] = plots.samples(results['samples'], results['mean'])
    if 'corruptions' in results:
        curves = {
            title: [results[at], *measures.over_corruptions(results['corruptions'], at)] for at, title in titles.items()
        }
        figures['severities'] = plots.severities(curves)
    if os.path.islink(folder):
        raise folders.RunError(f'{folder} is a link to another folder, which may not be yours: remove it')
    try:
        for name, figure in figures.items():
            if figure:
                plots.save(figure, folder, name)
            else:
                plots.remove(folder, name)
    except OSError as error:
        raise folders.RunError(f'{folder} cannot be written: {error.strerror}') from error
    return folder


def print_metrics(results):
    """Prints the reference's lines, whose auroc is the grid's, then all metrics with their intervals."""
    num_samples = results['testmc']
    line = '  > testacc={accuracy:.2%}, nll={nll:.4f}, ece={ece:.4f}, auroc={auroc_grid:.4f} (exact {auroc:.4f})'
    print('results at mean of distribution:')
    print(line.format(**results['mean']))
    print(f'results at model average ({num_samples} samples):')
    print(line.format(**results['average']), flush=True)
    rows = []
    for name, value in results['average'].items():
        cells = [name]
        for at, shown in (('mean', results['mean'].get(name)), ('average', value)):
            interval = results['intervals'][at].get(name, (math.nan, math.nan))
            cells += [_cell(name, shown), ' to '.join(_cell(name, bound) for bound in interval if bound == bound)]
        rows.append(cells)
    print_table(['', 'mean', '95 % interval', f'{num_samples} samples', '95 % interval'], rows)


def print_curve(results):
    rows = [
        [str(point['testmc']), *(_cell(name, point[name]) for name in metrics.SHORT)] for point in results['samples']
    ]
    print_table(['samples', *metrics.SHORT], rows)


def print_temperature(results):
    tempered, rows = results['temperature'], []
    for at, title in (('mean', 'mean'), ('average', f'{results["testmc"]} samples')):
        for label, summary in (('1', results[at]), (f'{tempered[at]["temperature"]:.3f}', tempered[at])):
            rows.append([title, label, *(_cell(name, summary[name]) for name in (*metrics.SHORT, 'brier'))])
    print_table(['', 'temperature', *metrics.SHORT, 'brier'], rows)


def print_ood(results):
    names = ('auroc', 'aupr_unknown', 'aupr_known', 'fpr95')
    for dataset, result in results['ood'].items():
        rows = [
            [f'{at}: {score}', *(_cell(name, separation[name]) for name in names)]
            for at in ('mean', 'average')
            for score, separation in result[at].items()
        ]
        print_table([f'unknown: {dataset}', *names], rows)


def print_corruptions(results):
    """Prints means over corruptions at each severity, then means over severities of each corruption.

    Corruptions that the means leave out stand in a table of their own.
    """
    header = [f'{name} {at}' for name in metrics.SHORT for at in ('mean', f'{results["testmc"]}')]
    corrupted = results['corruptions']
    averaged = corruptions.in_mean(corrupted)

    def cells(points):
        return [_cell(name, points[at][name]) for name in metrics.SHORT for at in ('mean', 'average')]

    def print_severities_averaged(title, names):
        rows = [[name, *cells(measures.over_severities(corrupted[name]))] for name in names]
        print_table([title, *header], rows)

    of_severity = zip(*(measures.over_corruptions(corrupted, at) for at in ('mean', 'average')), strict=True)
    rows = [['0 (clean)', *cells(results)]]
    rows += [[str(i), *cells({'mean': m, 'average': a})] for i, (m, a) in enumerate(of_severity, start=1)]
    print(f'\n{corruptions.description(corrupted)}', end='')
    print_table(['severity', *header], rows)
    print_severities_averaged('corruption', averaged)
    if len(averaged) < len(corrupted):
        print_severities_averaged('not in the mean', [name for name in corrupted if name not in averaged])


def _cell(name, value):
    if value is None or value != value:
        return '–'
    return f'{value:.2%}' if name in ('accuracy', 'top5', 'risk_at_80', 'disagreement') else f'{value:.4f}'


def print_table(header, rows):
    print('\n' + tables.markdown(header, rows), end='', flush=True)
