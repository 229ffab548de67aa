"""All optimizers on one data set, each tuned with the same budget, then trained with several seeds.

python studies/methods.py --dataset digits --model lenet --folder /tmp/digits --output results/digits_lenet

Each optimizer draws the same number of settings from its ranges below (log-uniform, seeded), trains each with a part of
the training images kept out, and takes the one of least NLL there, averaged over 8 posterior samples. With it, all
training images and a seed each it is trained again, and test.py compares the runs over 32 samples on the test images,
which nothing was chosen by, with ensembles, and Laplace approximations where an optimizer has no posterior. What was
drawn and chosen goes to OUTPUT.json, the tables to OUTPUT.md and .csv.
"""

import math
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import experiment
from evaluation import comparison, predictions
from evaluation.request import Request
from runs import folders, json_files, launch, parsing, processes, provenance, training_flags

_SGD = {'alpha': (0.003, 0.3), 'priorprec': (0.3, 30)}
_ADAM = {'alpha': (1e-4, 1e-2), 'priorprec': (0.3, 30)}
RANGES = {
    'sgd': _SGD,
    'sam': _SGD | {'rho': (0.01, 0.3)},
    'bsam': {'alpha': (0.05, 1.0), 'priorprec': (0.3, 30), 'rho': (1e-3, 0.1)},
    'adam': _ADAM,
    'adamw': _ADAM,
    'samadam': _ADAM | {'rho': (0.01, 0.3)},
    'asam': _SGD | {'rho': (0.1, 2.0)},
    'swag': _SGD,
    'ivon': {'alpha': (0.03, 1.0), 'priorprec': (0.3, 30), 'hessinit': (0.1, 3.0)},
}


@launch.script('methods.py')
def main(argv=None):
    args = parse_args(argv)
    drawn = [(optim, values) for optim in args.optimizers for values in draws(RANGES[optim], args.draws)]
    for draw in drawn:
        for values in (tuning_flags(args, *draw), final_flags(args, *draw, seed=0)):
            training_flags.parse_args(
                training_flags.command_line(values)
            )  # ends the script if train.py would not take them
    nlls = complete(args, [partial(tune, args, number, *draw) for number, draw in enumerate(drawn)])
    tried = {optim: [] for optim in args.optimizers}
    for (optim, values), nll in zip(drawn, nlls, strict=True):
        tried[optim].append({'settings': values, 'nll': nll})
    chosen = {optim: min(of_optim, key=lambda t: t['nll'])['settings'] for optim, of_optim in tried.items()}
    final = [partial(train, args, optim, chosen[optim], seed) for optim in chosen for seed in range(args.seeds)]
    trained = complete(args, final)
    record = provenance.of_command('studies/methods.py', argv)
    record['optimizers'] = {optim: {'tried': tried[optim], 'chosen': chosen[optim]} for optim in chosen}
    results = [result for run in trained for _, result in predictions.results_of(run, folders.read_config(run))]
    text, rows, values = comparison.report(results, Request.bins, with_ensembles=True)
    json_files.write_json(args.output.with_suffix('.json'), record)
    args.output.with_suffix('.md').write_text(text.strip() + '\n')
    comparison.write(args.folder, rows, values)
    shutil.copy(args.folder / 'comparison.csv', args.output.with_suffix('.csv'))
    print(text)


def parse_args(argv):
    parser = parsing.Parser(__doc__)
    parser.add_argument('--dataset', default='digits', help='as of train.py')
    parser.add_argument('--model', default='lenet', help='as of train.py')
    parser.add_argument('--datasetfolder', type=parsing.folder, default='datasets', help='folder of the data sets')
    parser.add_argument('--batchsize', type=parsing.integer(1), default=50, help='images per training step')
    parser.add_argument(
        '--batchsplit', type=parsing.integer(1), default=5, help='of optimizers with several sub-batches'
    )
    parser.add_argument('--draws', type=parsing.integer(1), default=8, help='settings tried for each optimizer')
    parser.add_argument('--tuneepochs', type=parsing.integer(1), default=10, help='epochs of each setting')
    parser.add_argument('--epochs', type=parsing.integer(1), default=30, help='epochs with the setting chosen')
    fraction = parsing.number(above=0, below=1)
    parser.add_argument('--validation', type=fraction, default=0.2, help='fraction kept out for tuning')
    parser.add_argument('--seeds', type=parsing.integer(1), default=5, help='runs with the setting chosen')
    help = 'what is compared'
    parser.add_argument('--optimizers', nargs='+', choices=list(RANGES), default=list(RANGES), help=help)
    parser.add_argument(
        '--folder', type=parsing.path, required=True, help='of the runs; those that it has are gone on with'
    )
    parser.add_argument('--output', type=parsing.new_file, required=True, help='results/NAME, without a suffix')
    parsing.add_jobs(parser)
    args = parser.parse_args(argv)
    if args.seeds * len(set(args.optimizers)) == 1:
        parser.error('one run is no comparison: take more --seeds or --optimizers')
    return args


def draws(ranges, number):
    rng = np.random.default_rng(0)
    return [
        {name: float(f'{np.exp(rng.uniform(*np.log(bounds))):.3g}') for name, bounds in ranges.items()}
        for _ in range(number)
    ]


def complete(args, tasks):
    """What the tasks return; ends the script if one failed."""
    results = processes.on_devices(tasks, args.jobs)
    if None in results:
        sys.exit(1)
    return results


def tune(args, number, optim, drawn, run):
    """Trains with the settings drawn; returns the NLL over samples on the images that were kept out."""
    values = tuning_flags(args, optim, drawn)
    requests = [Request(split='validation', testmc=(8,))]
    _, (measured,) = processes.trained_and_tested(run, args.folder / 'tuning' / f'{number:03}', values, requests)
    nll = measured['average']['nll']
    print(optim, drawn, nll, flush=True)
    return math.inf if nll is None else nll


def train(args, optim, chosen, seed, run):
    """Trains with the settings chosen and evaluates; returns the run folder."""
    values = final_flags(args, optim, chosen, seed)
    requests = [Request(testmc=(32,))] + [Request(testmc=(32,), laplace=True)] * experiment.is_point(optim)
    trained, _ = processes.trained_and_tested(run, args.folder / f'{optim}_{seed}', values, requests)
    print(trained, flush=True)
    return trained


def tuning_flags(args, optim, drawn):
    return common_flags(args, optim, drawn) | {'validation': args.validation, 'epochs': args.tuneepochs - 1}


def final_flags(args, optim, chosen, seed):
    return common_flags(args, optim, chosen) | {'epochs': args.epochs - 1, 'randomseed': seed}


def common_flags(args, optim, chosen):
    values = {name: getattr(args, name) for name in ('dataset', 'model', 'datasetfolder', 'batchsize')}
    if any(row.name == 'rho' for row in training_flags.rows_of(optim)):
        values['batchsplit'] = args.batchsplit
    return values | {'optim': optim, 'warmup': 1, 'keepgoing': True} | chosen


if __name__ == '__main__':
    main()
