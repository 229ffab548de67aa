"""Evaluate runs: accuracy and uncertainty, at the posterior mean and averaged over posterior samples.

examples:
  python test.py --resultsfolder results/cifar10_resnet18/bsam/run_0 --testmc 32
  python test.py --resultsfolder results/cifar10_resnet18/*/run_* --testmc 32
"""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))  # PYTHONSAFEPATH=1 leaves this folder out

from runs import launch

# isort: split
import argparse
import glob
from collections.abc import Iterator
from pathlib import Path

import jax

from evaluation import cards, comparison, exported, laplace, measures, posteriors, predictions, request, tables, trained
from evaluation.request import Request
from readers import python_files
from runs import checkpoints, devices, folders, hosts, json_files, parsing, provenance, training_flags

# Flags that may differ between the processes of one evaluation. --corruptions must be given to all or to none.
OF_PROCESS = (
    'resultsfolder', 'output', 'export', 'datasetfolder', 'code', 'corruptions', 'compilecache', 'coordinator',
    'processid', 'jointimeout',
)  # fmt: skip


@launch.script('test.py')
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    launch.use_compilecache(args.compilecache)
    python_files.allow([*args.code, *python_files.files_of(args.ood)])
    advice = {'after_an_end': 'start all processes again', 'less_memory': 'a smaller --testbatchsize takes less'}
    with hosts.joined('test.py', args, **advice):
        same = {name: value for name, value in vars(args).items() if name not in OF_PROCESS}
        same['corruptions'] = args.corruptions is not None
        hosts.require_same({'flags': same, 'number of runs': len(args.resultsfolder)})
        with jax.set_mesh(devices.create_mesh(args.devices)):
            evaluate_all(args, Request.of(args))
        hosts.wait_for_all()  # until the first process has written its files


def evaluate_all(args: argparse.Namespace, asked: Request) -> None:
    """Evaluates each run, or reads its saved predictions with --reuse. Compares several runs. Raises UserErrors."""
    several = len(args.resultsfolder) > 1
    configs = hosts.from_first(lambda: [training_flags.checked_config(run) for run in args.resultsfolder])
    runs = dict(zip(args.resultsfolder, configs, strict=True))
    require_possible(runs, args, asked)
    results = []
    for run, config in runs.items():
        if args.reuse:
            for progress, result in predictions.results_of(saved_in(run, args), config, asked):
                warn_if_incomplete(run, config, progress)
                results.append(result)
            continue
        results.append(evaluate(run, config, args, asked))
    if several:
        compare(results, args, asked)


def evaluate(run: Path, config: dict, args: argparse.Namespace, asked: Request) -> comparison.Result:
    """Restores a run, predicts, measures part by part and prints all parts. Writes each part before the next begins."""
    restored, folder = trained.restore(run, asked.checkpoint, config), folder_of(run, args)
    if hosts.is_first():
        json_files.make_folder(folder)
    warn(restored, asked)
    images = trained.read_images(restored, asked, args.datasetfolder)
    approximation = trained.fit_laplace(restored, images, asked, args.testbatchsize) if asked.laplace else None
    posterior = trained.posterior(restored, images, asked, args.testbatchsize, approximation)
    predicted = list(posterior.predict(images.images, asked.testmc))
    prediction, results = predicted[-1], {'trained': restored.progress.trained(), 'num_images': len(images.labels)}
    results |= asked.recorded()
    try:
        for part in measurements(posterior, images, predicted, asked, approximation):
            results |= part
            if hosts.is_first():
                json_files.write_json(asked.metrics_file(folder), results | provenance.environment())
                if 'mean' in part:
                    path, progress = asked.predictions_file(folder), restored.progress
                    predictions.write(path, prediction, images.labels, asked.num_samples, progress)
    finally:  # on a full disk too
        title = f'\n{run}\n' if len(args.resultsfolder) > 1 else ''
        is_point = restored.experiment.optimizer.is_point and not (asked.laplace or asked.dropout)
        text = tables.evaluation(results, is_point, args.all)
        if args.all:
            predicts, names = 'mean' if is_point else tables.samples(asked.num_samples), class_names_of(config)
            text += tables.classes(prediction.probs, images.labels, names, predicts)
        print(title + text, end='', flush=True)
    if args.output:
        print(f'\nwritten: {folder}')
    probs = prediction.probs_at_mean, prediction.probs
    result = comparison.Result(
        restored.flags, images.labels, *probs, asked.num_samples, bool(asked.laplace), measured=results
    )
    if args.plots and hosts.is_first():
        print(f'\npictures: {draw(restored, images, result, asked, folder)}')
    if args.export and hosts.is_first():
        exported.write(args.export, restored, cards.text(restored, asked, results))
        print(f'\nexported: {args.export}')
    return result


def measurements(
    posterior: posteriors.Posterior, images: trained.Images, predicted: list[posteriors.Prediction], asked: Request,
    approximation: laplace.Approximation | None = None,
) -> Iterator[dict]:  # fmt: skip
    """Measures what the request asks for. Yields new entries of metrics.json, part by part."""
    prediction, samples, bins = predicted[-1], asked.num_samples, asked.bins
    yield prediction.measure(images.labels, bins)
    if len(predicted) > 1:
        yield {'samples': measures.curve(predicted, asked.testmc, images.labels, bins)}
    if approximation:
        measured = approximation.measure(images.images, images.labels, bins)
        yield {'laplace': asked.recorded()['laplace'] | measured}
    if asked.temperature:
        tempered = measures.tempered(posterior, prediction, images.labels, images.held_out, samples, bins)
        yield {'temperature': tempered}
    if images.ood:
        yield {'ood': measures.all_ood(posterior, prediction, images.ood, samples)}
    if images.corrupted:
        yield {'corruptions': measures.all_corrupted(posterior, images.corrupted, images.labels, samples, bins)}


def require_possible(runs: dict, args: argparse.Namespace, asked: Request) -> None:
    """Raises a UserError for a run that cannot be evaluated or compared as asked, before any run is evaluated."""
    for run, config in runs.items():
        if args.reuse:
            continue
        if hosts.is_first():
            if args.output:
                json_files.require_place(folder_of(run, args), '--output')
            elif not os.access(run, os.W_OK):
                raise folders.RunError(f'{run} is not writable: name another folder for metrics.json with --output')
            if args.plots:
                folders.read_log(run)
            if args.export:
                exported.require_place(args.export)
        request.require_possible(asked, run, config)
    if len(runs) == 1:
        return
    if hosts.is_first():
        if args.output:
            json_files.require_place(args.output, '--output')
        elif not os.access(folder_of_tables(args), os.W_OK):
            raise folders.RunError(f'{folder_of_tables(args)} is not writable: name another folder with --output')
    comparison.check_flags([config['flags'] for config in runs.values()], asked.split)
    if not args.reuse:
        hosts.from_first(lambda: [trained.require_whole(run, config) for run, config in runs.items()])


def folder_of(run: Path, args: argparse.Namespace) -> Path:
    """Returns the folder for a run's metrics, predictions and pictures: the run folder, or a folder of --output."""
    if not args.output:
        return run
    return comparison.own_folder(args.output, run) if len(args.resultsfolder) > 1 else args.output


def saved_in(run: Path, args: argparse.Namespace) -> Path:
    """Returns the folder of a run's saved predictions: `folder_of` if it holds any, otherwise the run folder."""
    folder = folder_of(run, args)
    return folder if any(folder.glob('predictions*.npz')) else run


def folder_of_tables(args: argparse.Namespace) -> Path:
    """Returns --output, or the folder that holds all runs."""
    return args.output or Path(os.path.commonpath(map(os.path.realpath, args.resultsfolder)))


def warn(restored: trained.Trained, asked: Request) -> None:
    """Warns of an incomplete run, and of batch statistics that do not fit the weights."""
    if not hosts.is_first():
        return
    warn_if_incomplete(restored.run, restored.config, restored.progress)
    batch_stats = jax.tree.leaves(restored.state.batch_stats)
    if restored.flags['optim'] == 'swag' and batch_stats and not asked.bnrefresh:
        what = f"{restored.run} is evaluated with the batch statistics of SGD's last weights"
        print(f'test.py: warning: {what}: re-estimate them with --bnrefresh 10 or more', file=sys.stderr)


def warn_if_incomplete(run: Path, config: dict, progress: checkpoints.Progress) -> None:
    """Warns of a run whose training is not complete."""
    epochs = config['flags']['epochs']
    if progress.trained() != folders.end_of_training(config, epochs):
        where = f'epoch {progress.epoch + 1} of {epochs + 1}'
        print(f'test.py: warning: {run} is not fully trained: it is in {where}', file=sys.stderr)


def compare(results: list[comparison.Result], args: argparse.Namespace, asked: Request) -> None:
    """Prints the comparison of several runs and writes it to files."""
    comparison.check_labels(results)
    text, rows, values = comparison.report(results, asked.bins, with_ensembles=args.ensemble)
    print(text, end='')
    if hosts.is_first():
        json_files.make_folder(folder_of_tables(args))
        written = comparison.write(folder_of_tables(args), rows, values)
        print('written: ' + ', '.join(str(path) for path in written))
        if args.plots:
            print(f'pictures: {draw_comparison(rows, results, args, asked)}')


def draw(
    restored: trained.Trained, images: trained.Images, result: comparison.Result, asked: Request, folder: Path
) -> Path:
    """Writes the pictures of a run to a folder within `folder` and returns it. Raises RunError."""
    from evaluation import plots  # imported late because Matplotlib takes most of a second

    flags = restored.flags
    run = f'{restored.run.name} of {flags["optim"]} on {flags["dataset"]}, {flags["model"]}'
    evaluated = f'{len(result.labels)} {asked.split} images'
    log, names = folders.read_log(restored.run), class_names_of(restored.config)
    pictures = asked.plots_folder(folder)
    plots.write(pictures, plots.of_run(result, images.images, log, asked.bins, run, evaluated, names))
    return pictures


def class_names_of(config: dict) -> list[str] | None:
    """Returns the names of the classes of a run, or None if its data set has none."""
    return config['dataset'].get('class_names')


def draw_comparison(
    rows: list[comparison.Row], results: list[comparison.Result], args: argparse.Namespace, asked: Request
) -> Path:
    """Writes the pictures that compare several runs to a folder beside the tables and returns it. Raises RunError."""
    from evaluation import plots

    first = results[0]
    heading = f'{len(first.labels)} {asked.split} images of {first.flags["dataset"]}'
    pictures = folder_of_tables(args) / 'plots'
    plots.write(pictures, plots.of_rows(rows, first.labels, asked.bins, heading))
    return pictures


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = create_parser()
    args, given = parser.parse(argv)
    parsing.require_whole_address(parser, args)
    if not args.resultsfolder:
        parser.error('--resultsfolder is required: name the run folder run_K that train.py printed')
    try:
        args.resultsfolder = _expanded(args.resultsfolder)
        _require_consistency(args, given)
    except ValueError as error:
        parser.error(str(error))
    return args


def create_parser() -> parsing.Parser:
    parser = parsing.Parser(
        __doc__, habits={'': '--resultsfolder RUN', 'samples': '--testmc', 'batch-size': '--testbatchsize'}
    )
    parser.usage = 'test.py --resultsfolder RUN [RUN ...] [flags]'
    runs = parser.add_argument_group('runs')
    add = runs.add_argument
    help = 'run folders run_K that train.py printed, or exports; several runs are also compared with each other'
    add('--resultsfolder', type=parsing.folder, nargs='+', default=[], metavar='RUN', help=help)
    add('--datasetfolder', type=parsing.folder, help='folder of the data sets (default: the folder that training used)')
    parsing.add_code(runs)
    request.add_flags(parser)
    add = parser.add_argument_group('what to show').add_argument
    help = f'show all metrics of a run instead of the usual {len(tables.REPORTED)}; metrics.json always has all'
    add('--all', action='store_true', help=help)
    help = 'draw pictures as PNG and PDF: of each run into its folder plots, of the comparison beside its tables'
    add('--plots', action='store_true', help=help)
    help = 'also write the mean and the posterior of the run to FOLDER, as safetensors with a model card'
    add('--export', type=parsing.path, metavar='FOLDER', help=help)
    add(
        '--ensemble',
        action='store_true',
        help='with several runs: also evaluate ensembles, per method and over all runs',
    )
    help = 'with several runs: compare saved predictions, evaluate nothing; --laplace adds saved approximations'
    add('--reuse', action='store_true', help=help)
    help = 'write everything here, not into run folders; with --reuse, also look here for saved predictions'
    add('--output', type=parsing.path, metavar='FOLDER', help=help)
    group = parser.add_argument_group('devices and hosts')
    group.add_argument('--testbatchsize', type=parsing.integer(1), default=200, help='images per batch on each device')
    help = 'devices that share the posterior samples, or the images of a batch (default: all)'
    group.add_argument('--devices', type=parsing.integer(1), help=help)
    parsing.add_compilecache(group)
    parsing.add_coordinator(group)
    return parser


def _require_consistency(args, given):
    """Raises a ValueError for flags that cannot be combined. `given` holds the flags of the command line."""
    several = len(args.resultsfolder) > 1
    request.require_consistency(Request.of(args))
    for flag in ('ensemble', 'reuse'):
        if getattr(args, flag) and not several:
            raise ValueError(f'--{flag} needs several run folders')
    if args.export and several:
        raise ValueError('--export cannot be combined with several run folders: export them one by one')
    if args.export and args.laplace:
        raise ValueError('--export cannot be combined with --laplace: an export holds no Laplace approximation')
    if 'laplaceprior' in given and not args.laplace:
        raise ValueError('--laplaceprior needs --laplace')
    if args.checkpoint is not None and several:
        raise ValueError('--checkpoint cannot be combined with several run folders')
    effective = {
        'resultsfolder', 'reuse', 'ensemble', 'output', 'plots', 'split', 'bins', 'laplace', 'laplaceprior',
        'compilecache', 'devices',
    }  # fmt: skip
    if args.reuse and given.keys() - effective:
        name = min(given.keys() - effective)
        raise ValueError(f'--reuse cannot be combined with --{name}, because it evaluates nothing again')


def _expanded(patterns):
    """Returns the folders that names and patterns match, each folder once. Raises ValueError if there is none.

    Skips files, because a pattern also matches the tables that an earlier comparison left beside its runs.
    """
    found = []
    for pattern in patterns:
        matches = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern))
        if not matches and set(pattern) & set('*?['):
            raise ValueError(f'--resultsfolder {pattern} matches no folder')
        found += matches or [pattern]
    names = [path for path in found if not os.path.isfile(path)]
    if not names:
        raise ValueError(f'--resultsfolder {found[0]} is a file: name the folder run_K that train.py printed')
    return list({os.path.realpath(folder): Path(folder) for folder in names}.values())


if __name__ == '__main__':
    main()
