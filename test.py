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

from evaluation import cards, comparison, exported, measures, posteriors, predictions, request, tables, trained
from evaluation.request import Request
from runs import checkpoints, devices, folders, hosts, json_files, parsing, provenance, training_flags

# Flags that may differ between the processes of one evaluation. --corruptions must be given to all or to none.
OF_PROCESS = (
    'resultsfolder', 'output', 'export', 'datasetfolder', 'corruptions', 'compilecache', 'coordinator', 'processid',
    'jointimeout',
)  # fmt: skip


@launch.script('test.py')
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    launch.use_compilecache(args.compilecache)
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
            for progress, result in predictions.results_of(run, config, asked.split):
                warn_if_incomplete(run, config, progress)
                results.append(result)
            continue
        results.append(evaluate(run, config, args, asked))
    if several:
        compare(results, args, asked)


def evaluate(run: Path, config: dict, args: argparse.Namespace, asked: Request) -> comparison.Result:
    """Restores a run, predicts, measures part by part and prints all parts. Writes each part before the next begins."""
    restored = trained.restore(run, asked.checkpoint, config)
    warn(restored, asked)
    images = trained.read_images(restored, asked, args.datasetfolder)
    posterior = trained.posterior(restored, images, asked, args.testbatchsize)
    predicted = list(posterior.predict(images.images, asked.testmc))
    prediction, results = predicted[-1], {'trained': restored.progress.trained(), 'num_images': len(images.labels)}
    results |= asked.recorded()
    try:
        for part in measurements(posterior, images, predicted, asked):
            results |= part
            if hosts.is_first():
                json_files.write_json(asked.metrics_file(run), results | provenance.environment())
                if 'mean' in part:
                    path, progress = asked.predictions_file(run), restored.progress
                    predictions.write(path, prediction, images.labels, asked.num_samples, progress)
    finally:  # on a full disk too
        title = f'\n{run}\n' if len(args.resultsfolder) > 1 else ''
        is_point = restored.experiment.optimizer.is_point and not asked.laplace
        print(title + tables.evaluation(results, is_point, args.all), end='', flush=True)
    if args.plots and hosts.is_first():
        print(f'\npictures: {draw(restored, images, prediction, results, asked)}')
    if args.export and hosts.is_first():
        exported.write(args.export, restored, cards.text(restored, asked, results))
        print(f'\nexported: {args.export}')
    probs = prediction.probs_at_mean, prediction.probs
    return comparison.Result(restored.flags, images.labels, *probs, asked.num_samples, asked.laplace)


def measurements(
    posterior: posteriors.Posterior, images: trained.Images, predicted: list[posteriors.Prediction], asked: Request
) -> Iterator[dict]:
    """Measures what the request asks for. Yields new entries of metrics.json, part by part."""
    prediction, samples, bins = predicted[-1], asked.num_samples, asked.bins
    yield prediction.measure(images.labels, bins)
    if len(predicted) > 1:
        yield {'samples': measures.curve(predicted, asked.testmc, images.labels, bins)}
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
            if not os.access(run, os.W_OK):
                raise folders.RunError(f'{run} is not writable, so metrics.json cannot be saved')
            if args.plots:
                folders.read_log(run)
            if args.export:
                exported.require_place(args.export)
        request.require_possible(asked, run, config)
    if len(runs) == 1:
        return
    if hosts.is_first():
        if args.output and not os.path.isdir(args.output):
            raise folders.RunError(f'--output {args.output} is not a folder: create it first')
        if not os.access(folder_of_tables(args), os.W_OK):
            raise folders.RunError(f'{folder_of_tables(args)} is not writable: choose another --output')
    comparison.check_flags([config['flags'] for config in runs.values()], asked.split)
    if not args.reuse:
        hosts.from_first(lambda: [trained.require_whole(run, config) for run, config in runs.items()])


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
        written = comparison.write(folder_of_tables(args), rows, values)
        print('written: ' + ', '.join(str(path) for path in written))


def draw(
    restored: trained.Trained, images: trained.Images, prediction: posteriors.Prediction, results: dict, asked: Request
) -> Path:
    """Writes the pictures of a run and returns their folder. Raises RunError."""
    from evaluation import plots  # imported late because Matplotlib takes most of a second

    folder, log = asked.plots_folder(restored.run), folders.read_log(restored.run)
    plots.write(folder, plots.of_evaluation(images, prediction, results, log))
    return folder


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
    add = parser.add_argument_group('runs').add_argument
    help = 'run folders run_K that train.py printed, or exports; several runs are also compared with each other'
    add('--resultsfolder', type=parsing.folder, nargs='+', default=[], metavar='RUN', help=help)
    add('--datasetfolder', type=parsing.folder, help='folder of the data sets (default: the folder that training used)')
    request.add_flags(parser)
    add = parser.add_argument_group('what to show').add_argument
    help = f'show all metrics of a run instead of the usual {len(tables.REPORTED)}; metrics.json always has all'
    add('--all', action='store_true', help=help)
    add('--plots', action='store_true', help='draw pictures into the folder plots of a run, as PNG and PDF')
    help = 'also write the mean and the posterior of the run to FOLDER, as safetensors with a model card'
    add('--export', type=parsing.path, metavar='FOLDER', help=help)
    add(
        '--ensemble',
        action='store_true',
        help='with several runs: also evaluate ensembles, per method and over all runs',
    )
    add('--reuse', action='store_true', help='with several runs: compare saved predictions instead of evaluating again')
    help = 'with several runs: folder of the tables (default: the folder that holds all runs)'
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
    for flag in ('ensemble', 'reuse', 'output'):
        if getattr(args, flag) and not several:
            raise ValueError(f'--{flag} needs several run folders')
    if args.export and several:
        raise ValueError('--export cannot be combined with several run folders: export them one by one')
    if args.export and args.laplace:
        raise ValueError('--export cannot be combined with --laplace: an export holds no Laplace approximation')
    if args.checkpoint is not None and several:
        raise ValueError('--checkpoint cannot be combined with several run folders')
    effective = {'resultsfolder', 'reuse', 'ensemble', 'output', 'split', 'bins', 'compilecache', 'devices'}
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
