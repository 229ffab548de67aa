"""Compare all optimizers on one data set, each tuned with the same budget and then trained with several seeds.

python studies/methods.py --dataset digits --model lenet --folder /tmp/digits --output results/digits_lenet

1. Each optimizer draws the same number of settings, log-uniformly from its ranges in RANGES. The draws are seeded.
2. It trains with each setting, with a part of the training images held out. The setting with the lowest NLL on the
   held-out images is chosen. The NLL is averaged over 8 posterior samples.
3. It trains again with the chosen setting on all training images, once per seed.
4. The runs are compared on the test images, which no choice has used. The comparison averages over 32 samples, and
   includes ensembles, and Laplace approximations of optimizers without a posterior.

The drawn and chosen settings go to OUTPUT.json, the tables to OUTPUT.md and OUTPUT.csv.
"""

import math
import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import experiment
from evaluation.request import Request
from runs import json_files, launch, parsing, processes, provenance, training_flags
from studies import study

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
            training_flags.parse_args(training_flags.command_line(values))  # ends the script if a flag is invalid
    nlls = complete(args, [partial(tune, args, number, *draw) for number, draw in enumerate(drawn)])
    tried = {optim: [] for optim in args.optimizers}
    for (optim, values), nll in zip(drawn, nlls, strict=True):
        tried[optim].append({'settings': values, 'nll': nll})
    chosen = {optim: min(of_optim, key=lambda t: t['nll'])['settings'] for optim, of_optim in tried.items()}
    final = [partial(train, args, optim, chosen[optim], seed) for optim in chosen for seed in range(args.seeds)]
    trained = complete(args, final)
    record = provenance.of_command('studies/methods.py', argv)
    record['optimizers'] = {optim: {'tried': tried[optim], 'chosen': chosen[optim]} for optim in chosen}
    asked = Request(laplace='kron')
    json_files.write_json(args.output.with_suffix('.json'), record)
    print(study.keep_comparison(trained, asked, args.output))


def parse_args(argv):
    parser = parsing.Parser(__doc__)
    parser.add_argument('--dataset', default='digits', help='data set, as for train.py')
    parser.add_argument('--model', default='lenet', help='network, as for train.py')
    parser.add_argument('--datasetfolder', type=parsing.folder, default='datasets', help='folder of the data sets')
    parser.add_argument('--batchsize', type=parsing.integer(1), default=50, help='images per training step')
    help = 'sub-batches of the optimizers with --rho'
    parser.add_argument('--batchsplit', type=parsing.integer(1), default=5, help=help)
    parser.add_argument('--draws', type=parsing.integer(1), default=8, help='settings tried for each optimizer')
    parser.add_argument('--tuneepochs', type=parsing.integer(1), default=10, help='epochs of each setting')
    parser.add_argument('--epochs', type=parsing.integer(1), default=30, help='epochs with the chosen setting')
    fraction = parsing.number(above=0, below=1)
    parser.add_argument('--validation', type=fraction, default=0.2, help='fraction held out for tuning')
    parser.add_argument('--seeds', type=parsing.integer(1), default=5, help='runs with the chosen setting, a seed each')
    help = 'optimizers to compare'
    parser.add_argument('--optimizers', nargs='+', choices=list(RANGES), default=list(RANGES), help=help)
    help = 'folder of the runs; runs that it already has are resumed'
    parser.add_argument('--folder', type=parsing.path, required=True, help=help)
    parser.add_argument('--output', type=parsing.new_file, required=True, help='path of the results, without a suffix')
    parsing.add_jobs(parser)
    args = parser.parse_args(argv)
    if args.seeds * len(set(args.optimizers)) == 1:
        parser.error('a single run cannot be compared: give more --seeds or --optimizers')
    return args


def draws(ranges, number):
    """Draws settings {flag: value} log-uniformly from ranges {flag: (low, high)}. Every call draws the same."""
    rng = np.random.default_rng(0)
    return [
        {name: float(f'{np.exp(rng.uniform(*np.log(bounds))):.3g}') for name, bounds in ranges.items()}
        for _ in range(number)
    ]


def complete(args, tasks):
    """Returns the results of the tasks. Ends the script with status 1 if a task failed."""
    results = processes.on_devices(tasks, args.jobs)
    if None in results:
        sys.exit(1)
    return results


def tune(args, number, optim, drawn, run):
    """Trains with drawn settings. Returns the NLL on the held-out images, averaged over 8 posterior samples.

    Args:
        args: the flags of this script.
        number: names the folder of the run.
        optim: the optimizer.
        drawn: {flag: value}.
        run: runs a process, from processes.on_devices.
    """
    values = tuning_flags(args, optim, drawn)
    requests = [Request(split='validation', testmc=(8,))]
    _, (measured,) = processes.trained_and_tested(run, args.folder / 'tuning' / f'{number:03}', values, requests)
    nll = measured['average']['nll']
    print(optim, drawn, nll, flush=True)
    return math.inf if nll is None else nll


def train(args, optim, chosen, seed, run):
    """Trains and evaluates a run with the chosen settings. Returns the run folder.

    Args:
        args: the flags of this script.
        optim: the optimizer.
        chosen: {flag: value}.
        seed: the seed.
        run: runs a process, from processes.on_devices.
    """
    values = final_flags(args, optim, chosen, seed)
    requests = [Request(testmc=(32,))] + [Request(testmc=(32,), laplace='kron')] * experiment.is_point(optim)
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
