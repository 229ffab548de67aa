"""All optimizers on one data set, each tuned with the same budget, then trained with several seeds.

python benchmarks/methods.py --dataset digits --model lenet --folder /tmp/digits --output results/digits_lenet

Each optimizer draws the same number of settings from its ranges below (log-uniform, seeded), trains each with a part of
the training images kept out, and takes the one of least NLL there, averaged over 8 posterior samples. With it, all
training images and a seed each it is trained again, and test.py compares the runs over 32 samples on the test images,
which nothing was chosen by. What was drawn and chosen goes to OUTPUT.json, the tables to OUTPUT.md and .csv.
"""

import argparse
import contextlib
import io
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import jobs
import runs
import settings
import test as evaluate
import train

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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--dataset', default='digits')
    parser.add_argument('--model', default='lenet')
    parser.add_argument('--datasetfolder', default='datasets')
    parser.add_argument('--batchsize', type=int, default=50)
    parser.add_argument('--batchsplit', type=int, default=5, help='of optimizers with several sub-batches')
    parser.add_argument('--draws', type=int, default=8, help='settings tried for each optimizer')
    parser.add_argument('--tuneepochs', type=int, default=10)
    parser.add_argument('--epochs', type=int, default=30)
    parser.add_argument('--validation', type=float, default=0.2, help='fraction kept out for tuning')
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--optimizers', nargs='+', choices=list(RANGES), default=list(RANGES))
    parser.add_argument('--folder', type=Path, required=True, help='of the runs')
    parser.add_argument('--output', type=Path, required=True, help='results/NAME, without a suffix')
    args = parser.parse_args(argv)

    record = {'command': sys.argv[1:] if argv is None else argv, **runs.environment(), 'optimizers': {}}
    for optim in args.optimizers:
        record['optimizers'][optim] = tuned_and_trained(args, optim)
        runs.write_json(args.output.with_suffix('.json'), record)
    folders = [run for chosen in record['optimizers'].values() for run in chosen.pop('runs')]
    arguments = ['--reuse', f'--output={args.folder}', '--resultsfolder', *folders]
    tables = said(evaluate.main, arguments)
    runs.write_json(args.output.with_suffix('.json'), record)
    args.output.with_suffix('.md').write_text(tables[: tables.index('written:')].strip() + '\n')
    shutil.copy(args.folder / 'comparison.csv', args.output.with_suffix('.csv'))
    print(tables)


def common_flags(args):
    return [f'--datasetfolder={args.datasetfolder}']


def tuned_and_trained(args, optim):
    """Tries the draws, trains the best with all seeds and evaluates it; returns what came out."""
    began = time.monotonic()
    tried = []
    for drawn in draws(RANGES[optim], args.draws):
        flags = [f'--validation={args.validation}', f'--epochs={args.tuneepochs - 1}', '--keepgoing']
        run = trained(args, optim, drawn, seed=0, folder=args.folder / 'tuning', flags=flags)
        tried.append({'settings': drawn, 'nll': validation_nll(args, run)})
        print(optim, tried[-1], flush=True)
    best = min(tried, key=lambda t: t['nll'])['settings']
    flags = [f'--epochs={args.epochs - 1}', '--keepgoing']
    folders = [trained(args, optim, best, seed, args.folder / 'final', flags) for seed in range(args.seeds)]
    for run in folders:
        said(evaluate.main, [f'--resultsfolder={run}', '--testmc=32', *common_flags(args)])
    minutes = round((time.monotonic() - began) / 60, 1)
    print(optim, 'took', best, f'{minutes} min', flush=True)
    return {'tried': tried, 'chosen': best, 'minutes': minutes, 'runs': [str(run) for run in folders]}


def draws(ranges, number):
    rng = np.random.default_rng(0)
    return [
        {name: float(f'{np.exp(rng.uniform(*np.log(bounds))):.3g}') for name, bounds in ranges.items()}
        for _ in range(number)
    ]


def trained(args, optim, drawn, seed, folder, flags):
    own = {'batchsplit': args.batchsplit} if 'rho' in settings.OPTIMIZERS[optim] else {}
    given = {
        'dataset': args.dataset, 'model': args.model, 'optim': optim, 'batchsize': args.batchsize, 'randomseed': seed,
        'warmup': 1, 'resultsfolder': folder,
    } | own | drawn  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        return train.main([*common_flags(args), *flags, *jobs.arguments(given)])


def validation_nll(args, run):
    said(evaluate.main, [f'--resultsfolder={run}', '--split=validation', '--testmc=8', *common_flags(args)])
    nll = json.loads((run / 'metrics-validation.json').read_text())['average']['nll']
    return float('inf') if nll is None else nll


def said(function, *arguments):
    """What a function prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        function(*arguments)
    return out.getvalue()


if __name__ == '__main__':
    main()
