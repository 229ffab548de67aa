"""Evaluate runs: how good their predictions are, and how sure, at the mean of the posterior and averaged over samples.

python test.py --resultsfolder results/cifar10_resnet18/bsam/run_0 --testmc 32
python test.py --resultsfolder results/cifar10_resnet18/*/run_* --testmc 32
"""

import contextlib
import glob
import math
import os
import sys
from pathlib import Path

import flags
from settings import DATASETS, flags_of

# Flags that may differ between the processes of one evaluation.
OF_PROCESS = (
    'resultsfolder', 'output', 'datasetfolder', 'corruptions', 'compilecache', 'coordinator', 'processid',
    'jointimeout',
)  # fmt: skip


def parse_args(argv=None):
    parser = create_parser()
    args = parser.parse_args(argv)
    flags.require_whole_address(parser, args)
    args.testmc = sorted(set(args.testmc))
    args.resultsfolder = _expanded(args.resultsfolder)
    try:
        _require_consistency(args, parser.given(argv))
    except ValueError as error:
        parser.error(str(error))
    return args


def create_parser():
    parser = flags.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    help = 'run folders run_K that train.py printed; several are also compared with each other'
    add('--resultsfolder', nargs='+', required=True, metavar='RUN', help=help)
    help = 'samples from the posterior over which probabilities are averaged; several numbers give a curve'
    add('--testmc', type=flags.integer(1), nargs='+', default=[1], metavar='N', help=help)
    add('--testbatchsize', type=flags.integer(1), default=200, help='images per batch, on each device')
    add('--datasetfolder', help='folder of the data sets, where it is not the one of the training')
    help = 'the checkpoint after so many steps, instead of the newest'
    add('--checkpoint', type=flags.integer(0), metavar='STEP', help=help)
    help = 'evaluate on the test set, or on what train.py --validation kept out of training'
    parser.add_choice('--split', ('test', 'validation'), default='test', help=help)
    help = 'evaluate so many images of each set, a random part that is the same for all runs; all by default'
    add('--testimages', type=flags.integer(1), metavar='N', help=help)
    add('--bins', type=flags.integer(1, below=10_001), default=20, help='bins of ECE, MCE and the reliability diagram')
    help = 'estimate batch statistics of the mean and of every sample again, over K training batches'
    add('--bnrefresh', type=flags.integer(1), metavar='K', help=help)
    help = 'also the metrics at the temperature that is best for what train.py --validation kept out of training'
    add('--temperature', action='store_true', help=help)
    help = 'test sets of other data, to be told from the known'
    parser.add_choice('--ood', DATASETS, also='tfds/', nargs='+', default=[], help=help)
    help = 'evaluate corrupted test images: built-in corruptions, or those of a folder CIFAR-10-C or CIFAR-100-C'
    add('--corruptions', nargs='?', const='', metavar='FOLDER', help=help)
    help = 'sample from a Laplace approximation of the last layer, of runs whose optimizer has no posterior'
    add('--laplace', action='store_true', help=help)
    add('--plots', action='store_true', help='pictures, as PNG and PDF in the folder plots of a run')
    add('--ensemble', action='store_true', help='also the averages over the runs of each method and over all')
    add('--reuse', action='store_true', help='compare what was predicted before, without evaluating the runs again')
    help = 'folder of the tables of several runs; without it the one that all of them are in'
    add('--output', type=Path, help=help)
    help = 'devices that share the samples, or the images of a batch; all that there are by default'
    add('--devices', type=flags.integer(1), help=help)
    flags.add_coordinator(parser)
    flags.add_compilecache(parser)
    return parser


def _require_consistency(args, given):
    """Raises a ValueError for flags that do not go together; given: those of the command line."""
    several = len(args.resultsfolder) > 1
    if args.split == 'validation' and args.temperature:
        raise ValueError('--temperature is fitted on the images of --split validation: evaluate it on others')
    if args.split == 'validation' and args.corruptions:
        raise ValueError(
            '--split validation goes without a folder of corrupted images, which are those of the test set'
        )
    if args.testimages and args.corruptions:
        raise ValueError('--testimages goes without a folder of corrupted images, which are those of all test images')
    for flag in ('ensemble', 'reuse', 'output'):
        if getattr(args, flag) and not several:
            raise ValueError(f'--{flag} goes with several run folders')
    if args.checkpoint is not None and several:
        raise ValueError('--checkpoint goes with one run folder')
    effective = {'resultsfolder', 'reuse', 'ensemble', 'output', 'split', 'bins', 'compilecache', 'devices'}
    if args.reuse and given.keys() - effective:
        raise ValueError(f'--reuse evaluates nothing, so --{min(given.keys() - effective)} goes without it')


def _expanded(patterns):
    """Folders of names and patterns, those that a shell left alone; each once."""
    found = []
    for pattern in patterns:
        found += [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern)) or [pattern]
    return list({path.resolve(): path for path in map(Path, found)}.values())


def main(argv=None):
    args = parse_args(argv)

    # Not before the flags are read: JAX takes most of a second, and --help and usage errors should not.
    import jax

    import comparison
    import data
    import devices
    import models
    import runs

    flags.use_compilecache(args.compilecache)
    errors = data.DataError, models.ModelError, runs.RunError, devices.DeviceError, comparison.ComparisonError
    with contextlib.ExitStack() as held:
        held.enter_context(devices.ended_together('test.py', 'start them again'))
        held.enter_context(flags.one_line_errors('test.py', *errors))
        held.enter_context(devices.enough_memory('a smaller --testbatchsize takes less'))
        if args.coordinator:
            devices.join('test.py', args.coordinator, args.processes, args.processid, args.jointimeout)
        devices.require()
        if not devices.is_first():
            held.enter_context(contextlib.redirect_stdout(None))
        same = {name: value for name, value in vars(args).items() if name not in OF_PROCESS}
        same['corruptions'] = args.corruptions is not None
        devices.require_same({'flags': same, 'number of runs': len(args.resultsfolder)})
        several = len(args.resultsfolder) > 1
        results = []
        mesh = devices.create_mesh(args.devices)
        if several:
            require_comparable(args)
        for run in args.resultsfolder:
            if several and not args.reuse:
                print(f'\n{run}')
            with jax.set_mesh(mesh):
                results += read_again(run, args) if args.reuse else [evaluate(run, args)]
        if several:
            compare(results, args)
        devices.from_first(lambda: None)  # the first process has written its files, and all may end


def require_comparable(args):
    """Raises a ComparisonError or a RunError for what would otherwise be found out after some runs are evaluated."""
    import checkpoints
    import comparison
    import devices
    import evaluation
    import runs

    if args.output and devices.is_first() and not os.path.isdir(args.output):
        raise runs.RunError(f'--output {args.output} is no folder: make it first')
    if devices.is_first() and not os.access(_common_folder(args), os.W_OK):
        raise runs.RunError(f'{_common_folder(args)} cannot be written: name another --output')
    configs = devices.from_first(lambda: [runs.read_config(run) for run in args.resultsfolder])
    flags_of_runs = [vars(flags_of(config, run)) for config, run in zip(configs, args.resultsfolder, strict=True)]
    comparison.check_flags(flags_of_runs, args.split)
    for run, of_run in zip(args.resultsfolder, flags_of_runs, strict=True):
        if devices.is_first() and not args.reuse:
            checkpoints.require_any(run)
        for name in args.ood:
            evaluation.require_unknown(name, of_run)
        if args.laplace:
            evaluation.require_place_for_laplace(of_run)
        if args.temperature or args.split == 'validation':
            evaluation.require_held_out(run, of_run)


def _common_folder(args):
    return args.output or Path(os.path.commonpath([run.resolve() for run in args.resultsfolder]))


def evaluate(run, args):
    """Prints and writes all that the flags ask for of one run; returns its comparison.Result."""
    import comparison
    import devices
    import evaluation
    import runs

    subject = evaluation.load(
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
    if devices.is_first():
        warn_if_incomplete(run, subject.config, subject.progress)
        warn_of_batch_statistics(subject, args.bnrefresh)
    prediction, results = measure(subject, args)
    mark = _mark(args.split, args.laplace, args.checkpoint)
    num_samples = args.testmc[-1]
    if devices.is_first():
        evaluation.write_predictions(run / f'predictions{mark}.npz', prediction, subject, num_samples)
        runs.write_json(metrics_file(run, args), results | runs.environment())
        if args.plots:
            print(f'\npictures: {draw(run / f"plots{mark}", subject, prediction, results)}')
    return comparison.Result(
        subject.flags, subject.labels, prediction.probs_at_mean, prediction.probs, num_samples, args.laplace
    )


def measure(subject, args):
    """The posteriors.Prediction for the subject's images, and all results; each part is printed when it is there."""
    import evaluation

    num_samples = args.testmc[-1]
    ood = {name: evaluation.read_ood(subject, name, args.testimages) for name in args.ood}
    corrupted = None if args.corruptions is None else evaluation.read_corrupted(subject, args.corruptions or None)
    predictions = list(subject.posterior.predict(subject.images, args.testmc))
    prediction = predictions[-1]
    measured = evaluation.measure(prediction, subject.labels, args.bins)
    print_reference_lines(measured, num_samples)
    print_metrics(measured, num_samples)
    results = {
        'trained': _trained(subject.progress),
        'num_images': len(subject.labels),
        **asked(args),
        **measured,
    }
    if len(args.testmc) > 1:
        results['samples'] = evaluation.curve(predictions, args.testmc, subject.labels, args.bins)
        print_curve(results['samples'])
    if args.temperature:
        results['temperature'] = evaluation.tempered(subject, prediction, num_samples, args.bins)
        print_temperature(measured, results['temperature'], num_samples)
    if ood:
        results['ood'] = evaluation.all_ood(subject, prediction, ood, num_samples)
        print_ood(results['ood'])
    if corrupted:
        results['corruptions'] = evaluation.all_corrupted(subject, corrupted, num_samples, args.bins)
        print_corruptions(results['corruptions'], measured, num_samples)
    return prediction, results


def asked(args):
    """What an evaluation with these arguments says of itself in metrics.json."""
    return {
        'split': args.split,
        'testimages': args.testimages,
        'testmc': args.testmc[-1],
        'bins': args.bins,
        'bnrefresh': args.bnrefresh,
        'laplace': args.laplace,
    }


def metrics_file(run, args):
    """Where an evaluation with these arguments puts what it measures."""
    return run / f'metrics{_mark(args.split, args.laplace, args.checkpoint)}.json'


def _mark(split, laplace, checkpoint=None):
    """What tells the files of an evaluation from those of the usual one."""
    marks = [split] * (split != 'test') + ['laplace'] * laplace + [str(checkpoint)] * (checkpoint is not None)
    return ''.join(f'-{mark}' for mark in marks)


def _trained(progress):
    return {'epoch': progress.epoch, 'steps_of_epoch': progress.step}


def end_of_training(config, epochs):
    """What metrics.json has as 'trained' of a run with this configuration after so many epochs and one."""
    return {'epoch': epochs, 'steps_of_epoch': config['dataset']['num_train'] // config['flags']['batchsize']}


def warn_if_incomplete(run, config, progress):
    epochs = config['flags']['epochs']
    if _trained(progress) != end_of_training(config, epochs):
        where = f'epoch {progress.epoch + 1} of {epochs + 1}'
        print(f'test.py: warning: {run} is evaluated in {where}', file=sys.stderr)


def warn_of_batch_statistics(subject, bn_refresh):
    """Those of a SWAG run belong to SGD's weights, of which neither the mean nor a sample is one."""
    if subject.flags['optim'] == 'swag' and subject.posterior.has_batch_stats and not bn_refresh:
        what = f"{subject.run} is evaluated with the batch statistics of SGD's last weights"
        print(f'test.py: warning: {what}: estimate them again with --bnrefresh 10 or more', file=sys.stderr)


def read_again(run, args):
    """The comparison.Results of a run that was evaluated before, with its own posterior, Laplace's or both."""
    import comparison
    import evaluation
    import runs

    config = runs.read_config(run)
    config['flags'] = vars(flags_of(config, run))
    files = {laplace: run / f'predictions{_mark(args.split, laplace)}.npz' for laplace in (False, True)}
    results = []
    for laplace, path in files.items():
        if path.exists() or not any(other.exists() for other in files.values()):
            labels, prediction, num_samples, progress = evaluation.read_predictions(path)
            warn_if_incomplete(run, config, progress)
            probs = prediction.probs_at_mean, prediction.probs
            results.append(comparison.Result(config['flags'], labels, *probs, num_samples, laplace))
    return results


def compare(results, args):
    """Prints the tables of several runs, and writes them."""
    import comparison
    import devices
    import tables

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
    if devices.is_first():
        print('written: ' + ', '.join(str(path) for path in comparison.write(_common_folder(args), rows, values)))


def draw(folder, subject, prediction, results):
    """Writes the pictures of a run, in place of those that there were; returns their folder."""
    import evaluation
    import plots
    import runs

    average = f'average of {results["testmc"]} samples'
    titles = {'mean': 'at the mean', 'average': average}
    predictions = {titles['mean']: prediction.probs_at_mean, average: prediction.probs}
    split = 'validation' if subject.flags['validation'] else 'test'
    figures = {
        'reliability': plots.reliability({title: results['reliability'][at] for at, title in titles.items()}),
        'risk_coverage': plots.risk_coverage(predictions, subject.labels),
        'training': plots.training(runs.read_log(subject.run), split),
        'images': plots.image_sheet(subject.images, subject.labels, prediction.probs),
    }
    if 'samples' in results:
        figures['samples'] = plots.samples(results['samples'], results['mean'])
    if 'corruptions' in results:
        curves = {
            title: [results[at], *evaluation.over_corruptions(results['corruptions'], at)]
            for at, title in titles.items()
        }
        figures['severities'] = plots.severities(curves)
    try:
        for old in (*folder.glob('*.png'), *folder.glob('*.pdf')):
            old.unlink()
        for name, figure in figures.items():
            plots.save(figure, folder, name)
    except OSError as error:
        raise runs.RunError(f'{folder} cannot be written: {error.strerror}') from error
    return folder


def print_reference_lines(measured, num_samples):
    """The reference's lines, whose auroc is that of the grid, and the exact one."""
    line = '  > testacc={accuracy:.2%}, nll={nll:.4f}, ece={ece:.4f}, auroc={auroc_grid:.4f} (exact {auroc:.4f})'
    print('results at mean of distribution:')
    print(line.format(**measured['mean']))
    print(f'results at model average ({num_samples} samples):')
    print(line.format(**measured['average']), flush=True)


def print_metrics(measured, num_samples):
    rows = []
    for name, value in measured['average'].items():
        cells = [name]
        for at, shown in (('mean', measured['mean'].get(name)), ('average', value)):
            interval = measured['intervals'][at].get(name, (math.nan, math.nan))
            cells += [_cell(name, shown), ' to '.join(_cell(name, bound) for bound in interval if bound == bound)]
        rows.append(cells)
    print_table(['', 'mean', '95 % interval', f'{num_samples} samples', '95 % interval'], rows)


def print_curve(points):
    print_table(['samples', *_SHORT], [[str(p['testmc']), *(_cell(name, p[name]) for name in _SHORT)] for p in points])


def print_temperature(measured, tempered, num_samples):
    rows = []
    for at, title in (('mean', 'mean'), ('average', f'{num_samples} samples')):
        for label, summary in (('1', measured[at]), (f'{tempered[at]["temperature"]:.3f}', tempered[at])):
            rows.append([title, label, *(_cell(name, summary[name]) for name in (*_SHORT, 'brier'))])
    print_table(['', 'temperature', *_SHORT, 'brier'], rows)


def print_ood(results):
    names = ('auroc', 'aupr_unknown', 'aupr_known', 'fpr95')
    for dataset, result in results.items():
        rows = [
            [f'{at}: {score}', *(_cell(name, separation[name]) for name in names)]
            for at in ('mean', 'average')
            for score, separation in result[at].items()
        ]
        print_table([f'unknown: {dataset}', *names], rows)


def print_corruptions(results, measured, num_samples):
    import evaluation

    header = [f'{name} {at}' for name in _SHORT for at in ('mean', f'{num_samples}')]

    def cells(points):
        return [_cell(name, points[at][name]) for name in _SHORT for at in ('mean', 'average')]

    of_severity = zip(*(evaluation.over_corruptions(results, at) for at in ('mean', 'average')), strict=True)
    rows = [['0 (clean)', *cells(measured)]]
    rows += [[str(i), *cells({'mean': m, 'average': a})] for i, (m, a) in enumerate(of_severity, start=1)]
    print_table(['severity', *header], rows)
    rows = [[name, *cells(evaluation.over_severities(points))] for name, points in results.items()]
    print_table(['corruption', *header], rows)


_SHORT = ('accuracy', 'nll', 'ece')


def _cell(name, value):
    if value is None or value != value:
        return '–'
    return f'{value:.2%}' if name in ('accuracy', 'top5', 'risk_at_80', 'disagreement') else f'{value:.4f}'


def print_table(header, rows):
    import tables

    print('\n' + tables.markdown(header, rows), end='', flush=True)


if __name__ == '__main__':
    main()
