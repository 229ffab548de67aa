"""Train and evaluate the runs of results/README.md, and write a record of each run to results/studies/.

    python studies/study.py cifar10_tuning cifar10 --folder /tmp/runs --datasetfolder datasets --jobs 2

A study is an entry of STUDIES: variants of flags, the number of seeds, and the evaluations of the runs. Runs are
ordinary run folders under --folder. A record is a JSON file with the commands, the log and the metrics of a run,
including the bins of the reliability diagram. It contains no weights and no predictions. A run with a record is not
trained again. An interrupted run is resumed. report.py makes tables and pictures from the records.
"""

import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import experiment
from evaluation import comparison, predictions, tables
from evaluation.request import Request
from runs import folders, json_files, launch, parsing, processes, training_flags

ROOT = Path(__file__).parent.parent
KEPT = ROOT / 'results' / 'studies'
COMPARISON = ('comparison.csv', 'comparison.md')  # the means of all metrics, and test.py's tables


class Study(NamedTuple):
    """Runs that are compared with each other.

    Attributes:
        flags: the flags of train.py for all runs.
        variants: {name: further flags}. The flag init names a run of another study, such as source/sgd_0.
        seeds: the number of runs of each variant.
        evaluations: {name: (N, Request)}, for the first N seeds of each variant.
        tuned_by: the study that gives the missing flags of a variant. They are the flags of its variant with the same
            optimizer and the lowest NLL on the held-out images.
        compared: whether all runs and their ensembles are compared once the study is complete.
    """

    flags: dict
    variants: dict
    seeds: int
    evaluations: dict
    tuned_by: str | None = None
    compared: bool = False


# The published settings for CIFAR-10, and for IVON the settings of its authors, with three exceptions: A batch has 25
# images, as one published sub-batch. N is four times the number of images. The learning rate is tuned: the published
# one, a third and a tenth of it.
_CIFAR10 = {
    'dataset': 'cifar10', 'model': 'resnet20', 'trainimages': 5000, 'validation': 0.1, 'batchsize': 25, 'warmup': 1,
    'dafactor': 4,
}  # fmt: skip
_METHODS = {
    'bsam': {'optim': 'bsam', 'priorprec': 40, 'rho': 0.01, 'batchsplit': 1},
    'sgd': {'optim': 'sgd', 'priorprec': 25},
    'sam': {'optim': 'sam', 'priorprec': 25, 'rho': 0.05, 'batchsplit': 1},
    'ivon': {'optim': 'ivon', 'priorprec': 10, 'hessinit': 0.5},
}
_ALPHAS = {'bsam': (0.05, 0.15, 0.5), 'sgd': (0.003, 0.01, 0.03), 'sam': (0.003, 0.01, 0.03), 'ivon': (0.02, 0.06, 0.2)}

_FASHION = {
    'dataset': 'fashion', 'model': 'lenet', 'trainimages': 2000, 'batchsize': 64, 'epochs': 19, 'warmup': 1,
}  # fmt: skip
# The settings that methods.py chose with the same budget on all of Fashion-MNIST in batches of 200, see
# results/fashion_lenet.json. A third of each learning rate is tried too.
_TUNED = {
    'bsam': {'optim': 'bsam', 'priorprec': 8.63, 'rho': 0.0122, 'batchsplit': 8},
    'sgd': {'optim': 'sgd', 'priorprec': 1.04},
    'sam': {'optim': 'sam', 'priorprec': 8.63, 'rho': 0.0635, 'batchsplit': 8},
    'ivon': {'optim': 'ivon', 'priorprec': 8.63, 'hessinit': 0.635},
    'adam': {'optim': 'adam', 'priorprec': 20.1},
    'adamw': {'optim': 'adamw', 'priorprec': 20.1},
    'samadam': {'optim': 'samadam', 'priorprec': 12.8, 'rho': 0.0101, 'batchsplit': 8},
    'asam': {'optim': 'asam', 'priorprec': 1.04, 'rho': 0.113, 'batchsplit': 8},
    'swag': {'optim': 'swag', 'priorprec': 1.04},
}
_TUNED_ALPHAS = {
    'bsam': (0.103, 0.308), 'sgd': (0.0188, 0.0564), 'sam': (0.0163, 0.049), 'ivon': (0.084, 0.252),
    'adam': (0.00141, 0.00423), 'adamw': (0.00141, 0.00423), 'samadam': (0.00247, 0.00742), 'asam': (0.0188, 0.0564),
    'swag': (0.0188, 0.0564),
}  # fmt: skip
# The published settings, with learning rates near the ones that methods.py chose on all of Fashion-MNIST.
_BSAM = {'optim': 'bsam', 'alpha': 0.3, 'priorprec': 40, 'rho': 0.01, 'batchsplit': 8, 'dafactor': 4}
_SAM = {'optim': 'sam', 'alpha': 0.05, 'priorprec': 25, 'rho': 0.05, 'batchsplit': 8}
_TEST = {'test': (3, Request(testmc=(32,)))}

# The settings of the short training on CIFAR-10, not tuned for CIFAR-100.
_TRANSFER = {
    'sgd': _METHODS['sgd'] | {'alpha': 0.03},
    'bsam': _METHODS['bsam'] | {'alpha': 0.15, 'batchsplit': 2},
}

# The published commands for ResNet-18, in float32 and in bfloat16. They need a GPU.
_SGD_AS_PUBLISHED = {'dataset': 'cifar10', 'optim': 'sgd', 'alpha': 0.03, 'beta1': 0.9, 'priorprec': 25}
_BSAM_AS_PUBLISHED = {
    'dataset': 'cifar10', 'optim': 'bsam', 'alpha': 0.5, 'beta1': 0.9, 'beta2': 0.999, 'priorprec': 40, 'rho': 0.01,
    'batchsplit': 8, 'dafactor': 4,
}  # fmt: skip
_AS_PUBLISHED = {
    'cifar10_sgd': _SGD_AS_PUBLISHED,
    'cifar10_sam': _SGD_AS_PUBLISHED | {'optim': 'sam', 'rho': 0.05, 'batchsplit': 8},
    'cifar10_bsam': _BSAM_AS_PUBLISHED,
    'cifar100_bsam': _BSAM_AS_PUBLISHED | {'dataset': 'cifar100'},
}
_PUBLISHED = _AS_PUBLISHED | {
    f'{name}_bfloat16': flags | {'precision': 'bfloat16'} for name, flags in _AS_PUBLISHED.items()
}

# All 50,000 images with the published settings, except for the network, the number of epochs and, in short runs, one
# epoch of warm-up instead of five.
_ALL = {name: _AS_PUBLISHED[f'cifar10_{name}'] for name in ('sgd', 'bsam', 'sam')}
_ALL_EVALUATIONS = {
    'corrupted': (1, Request(testmc=(8,), testimages=500, corruptions='')),
    'ood': (3, Request(testmc=(32,), testimages=2500, ood=('cifar100', 'fashion'))),
    'test': (3, Request(testmc=(1, 2, 4, 8, 16, 32))),
}

_VALIDATION = {'validation': (1, Request(split='validation', testmc=(8,)))}


def _each_alpha(methods, alphas):
    return {f'{name}_{alpha:g}': flags | {'alpha': alpha} for name, flags in methods.items() for alpha in alphas[name]}


def _wide(numbers):
    """Returns a Request with out-of-distribution images and the best temperature, over numbers of samples."""
    return Request(testmc=numbers, testimages=2500, ood=('cifar100',), temperature=True)


STUDIES = {
    'cifar10_tuning': Study(_CIFAR10 | {'epochs': 2}, _each_alpha(_METHODS, _ALPHAS), 1, _VALIDATION),
    'cifar10': Study(
        _CIFAR10 | {'epochs': 11},
        _METHODS,
        3,
        {
            'corrupted': (1, Request(testmc=(8,), testimages=500, corruptions='')),
            'test': (3, _wide((1, 2, 4, 8, 16))),
        },
        tuned_by='cifar10_tuning',
    ),
    # dafactor 50, and 200 for bSAM, give 1,000 images the N and the weight decay of the published runs.
    'cifar10_few': Study(
        _CIFAR10 | {'trainimages': 1250, 'validation': 0.2, 'noaugment': True, 'epochs': 35},
        {name: flags | {'dafactor': 200 if name == 'bsam' else 50} for name, flags in _METHODS.items()},
        5,
        {
            'corrupted': (1, Request(testmc=(8,), testimages=500, corruptions='')),
            'test': (5, _wide((1, 2, 4, 8))),
        },
        tuned_by='cifar10_tuning',
    ),
    'fashion_tuning': Study(_FASHION | {'validation': 0.2}, _each_alpha(_TUNED, _TUNED_ALPHAS), 1, _VALIDATION),
    'fashion': Study(
        _FASHION,
        _TUNED,
        5,
        {
            'laplace': (5, Request(testmc=(32,), laplace='kron', laplaceprior='training')),
            'test': (5, Request(testmc=(1, 2, 4, 8, 16, 32))),
        },
        tuned_by='fashion_tuning',
        compared=True,
    ),
    'rho': Study(
        _FASHION,
        {f'bsam_{rho:g}': _BSAM | {'rho': rho} for rho in (0.001, 0.003, 0.01, 0.03, 0.1)}
        | {f'sam_{rho:g}': _SAM | {'rho': rho} for rho in (0.005, 0.05, 0.5)},
        3,
        _TEST,
    ),
    'ablations': Study(
        _FASHION,
        {
            f'{name}_{value:g}': _BSAM | {name: value}
            for name, values in {
                'priorprec': (10,),
                'dafactor': (1,),
                'custominit': (0.1, 10),
                'damping': (0.01, 1),
                'batchsplit': (1, 2, 4, 16, 32),
            }.items()
            for value in values
        },
        3,
        _TEST,
    ),
    'bnupdate': Study(
        _FASHION | {'model': 'resnet18', 'trainimages': 625, 'validation': 0.2, 'batchsize': 25, 'epochs': 7},
        {f'bnupdate_{which}': _BSAM | {'bnupdate': which, 'batchsplit': 1} for which in training_flags.BNUPDATES},
        3,
        {
            'refreshed': (3, Request(testmc=(4,), testimages=1000, bnrefresh=20)),
            'test': (3, Request(testmc=(4,), testimages=1000)),
        },
    ),
    'laplace': Study(
        {'dataset': 'digits', 'model': 'lenet', 'batchsize': 50, 'warmup': 1, 'epochs': 19},
        {
            'sgd': {'optim': 'sgd', 'alpha': 0.0367, 'priorprec': 22.2},
            'sam': {'optim': 'sam', 'alpha': 0.0119, 'priorprec': 2.1, 'rho': 0.011, 'batchsplit': 5},
        },
        3,
        {
            'test': (3, Request()),
            'training': (3, Request(testmc=(32,), laplace='kron', laplaceprior='training')),
            'kron': (3, Request(testmc=(32,), laplace='kron')),
            'full': (3, Request(testmc=(32,), laplace='full')),
            'diag': (3, Request(testmc=(32,), laplace='diag')),
        },
    ),
    'source': Study(
        {'dataset': 'cifar10', 'model': 'resnet20', 'trainimages': 20_000, 'batchsize': 50, 'warmup': 1, 'epochs': 9},
        {'sgd': _METHODS['sgd'] | {'alpha': 0.03}},
        1,
        {'test': (1, Request())},
    ),
    'transfer': Study(
        {'dataset': 'cifar100', 'model': 'resnet20', 'trainimages': 5000, 'batchsize': 50, 'warmup': 1, 'epochs': 2,
         'dafactor': 10},
        {
            f'{name}_{start}': flags | ({'init': 'source/sgd_0'} if start == 'trained' else {})
            for name, flags in _TRANSFER.items()
            for start in ('random', 'trained')
        },
        2,
        {'test': (2, Request(testmc=(8,), testimages=2500))},
    ),
    'cifar10_all': Study(
        {'model': 'resnet20', 'warmup': 1, 'epochs': 5}, _ALL, 1, _ALL_EVALUATIONS, compared=True
    ),
    'cifar10_all_60': Study(
        {'model': 'resnet20', 'epochs': 59},
        _ALL | {'ivon': _METHODS['ivon'] | {'dataset': 'cifar10', 'alpha': 0.2}},
        3,
        _ALL_EVALUATIONS,
        compared=True,
    ),
    'published': Study({'model': 'resnet18'}, _PUBLISHED, 1, {'test': (1, Request(testmc=(32,)))}),
}  # fmt: skip


@launch.script('study.py')
def main(argv=None):
    args = parse_args(argv)
    complete = True
    for name in args.studies:
        study = STUDIES[name]
        existing = sum(path.exists() for _, _, path in records(name))
        print(f'{name}: {KEPT / name} has {existing} of {len(records(name))} records; remove a record to run it again')
        tasks = [partial(keep, args, name, variant, seed, path) for variant, seed, path in records(name)]
        kept = all(processes.on_devices(tasks, args.jobs))
        if kept and study.compared:
            kept = all(processes.on_devices([lambda run, name=name: compare(args, name)]))
        complete = complete and bool(kept)
    sys.exit(0 if complete else 1)


def parse_args(argv):
    parser = parsing.Parser(__doc__)
    parser.add_argument(
        'studies', nargs='+', choices=STUDIES, metavar='STUDY', help=f'one or more of {", ".join(STUDIES)}'
    )
    parser.add_argument('--folder', type=parsing.path, required=True, help='folder of the runs')
    parser.add_argument('--datasetfolder', type=parsing.folder, default='datasets', help='folder of the data sets')
    parsing.add_jobs(parser)
    return parser.parse_args(argv)


def records(name):
    """Returns (variant, seed, path of the record) for every run of a study. Seed 0 of all variants comes first."""
    study = STUDIES[name]
    return [
        (variant, seed, KEPT / name / f'{variant}_{seed}.json')
        for seed in range(study.seeds)
        for variant in study.variants
    ]


def flags_of_run(study, variant, seed):
    """Returns the flags of train.py for a run."""
    return study.flags | tuned(study, study.variants[variant]) | {'randomseed': seed, 'keepgoing': True}


def keep(args, name, variant, seed, path, run):
    """Trains and evaluates a run and writes its record, unless the record exists. Returns True, or raises a RunError.

    Args:
        args: the flags of this script.
        name: the study.
        variant: the variant.
        seed: the seed.
        path: the file of the record.
        run: runs a process, from processes.on_devices.
    """
    study = STUDIES[name]
    flags = flags_of_run(study, variant, seed)
    evaluations = evaluations_of(study, flags)
    if path.exists():
        require_record(path, flags, evaluations)
        return True
    values = flags | {'datasetfolder': args.datasetfolder}
    if 'init' in flags:
        values['init'] = run_of(args, flags['init'])
    trained, measured = processes.trained_and_tested(
        run, folder_of(args, name, variant, seed), values, evaluations.values()
    )
    record = record_of(trained, flags, evaluations, measured)
    path.parent.mkdir(parents=True, exist_ok=True)
    json_files.write_json(path, record)
    for name_of_file in COMPARISON:  # because they compare the earlier runs
        (path.parent / name_of_file).unlink(missing_ok=True)
    print(f'{name}/{variant}_{seed}: {sum(epoch["seconds"] for epoch in record["log"]):.0f} s of training', flush=True)
    return True


def require_record(path, flags, evaluations):
    """Raises a RunError if a record has other flags or evaluations, because STUDIES has changed since."""
    record = json_files.read_record(path)
    same = set(record.get('command', '').split()) == set(command_of(flags).split())
    if not same or record.get('evaluations', {}).keys() != evaluations.keys():
        raise folders.RunError(f'{path} has other flags or evaluations than its study has now: remove it')


def command_of(flags):
    """Returns the command of train.py with these flags."""
    return ' '.join(['python train.py', *training_flags.command_line(flags)])


def compare(args, name):
    """Compares the saved predictions of all runs of a study, and keeps the tables, unless they exist. Raises RunError.

    Args:
        args: the flags of this script.
        name: the study.

    Returns:
        True.
    """
    study, means = STUDIES[name], KEPT / name / COMPARISON[0]
    if means.exists():
        return True
    asked = next((request for _, request in study.evaluations.values() if request.laplace), Request())
    runs = [Path(run_of(args, f'{name}/{variant}_{seed}')) for variant, seed, _ in records(name)]
    keep_comparison(runs, asked, means.with_suffix(''))
    return True


def keep_comparison(runs, asked, path):
    """Writes the tables of test.py to path.md, and the means of all metrics to path.csv. Returns the tables.

    Args:
        runs: run folders with saved predictions.
        asked: the Request that says which predictions to read.
        path: without a suffix.
    """
    results = [result for run in runs for _, result in predictions.results_of(run, folders.read_config(run), asked)]
    report, rows, values = comparison.report(results, Request.bins, with_ensembles=True)
    path.with_suffix('.md').write_text(report.strip() + '\n')
    path.with_suffix('.csv').write_text(tables.comma_separated(*comparison.full_table(rows, values)))
    return report


def folder_of(args, name, variant, seed):
    return args.folder / name / f'{variant}_{seed}'


def run_of(args, name):
    """Returns the run folder of a run such as source/sgd_0. Raises RunError."""
    found = processes.begun_run(args.folder / name)
    if found is None:
        raise folders.RunError(f'{args.folder / name} holds no run: run `python studies/study.py {name.split("/")[0]}`')
    return str(found)


def evaluations_of(study, flags):
    """Returns the evaluations {name: Request} of a run. Only a point estimate gets a Laplace approximation."""
    return {
        name: request
        for name, (seeds, request) in study.evaluations.items()
        if flags['randomseed'] < seeds and (not request.laplace or experiment.is_point(flags['optim']))
    }


def tuned(study, flags):
    """Returns the flags, completed by the flags that the tuning study chose for the same optimizer."""
    if study.tuned_by is None:
        return flags
    tried = {
        name: tried for name, tried in STUDIES[study.tuned_by].variants.items() if tried['optim'] == flags['optim']
    }
    best = min(tried, key=lambda name: validation_nll(study.tuned_by, name))
    return tried[best] | flags


def validation_nll(study, variant):
    """Returns the NLL of a tuning run on its held-out images, infinite if it is not finite. Raises RunError."""
    path = KEPT / study / f'{variant}_0.json'
    if not path.exists():
        raise folders.RunError(f'{path} is missing: run `python studies/study.py {study}` first')
    try:
        nll = json_files.read_record(path)['evaluations']['validation']['average']['nll']
    except (KeyError, TypeError) as error:
        raise folders.RunError(f'{path} is not a record of the study {study}: remove it') from error
    return float('inf') if nll is None else nll


def record_of(trained, flags, evaluations, measured):
    """Returns the record of a run.

    Args:
        trained: the run folder.
        flags: the flags of train.py.
        evaluations: {name: Request}.
        measured: the metrics.json of each evaluation.
    """
    config = folders.read_config(trained)
    return {
        'command': command_of(flags),
        'num_data': config['num_data'],
        'environment': {name: config[name] for name in ('python', 'versions', 'git_commit', 'device')},
        'log': folders.read_log(trained),
        'evaluations': {
            name: metrics | {'command': ' '.join(['python test.py --resultsfolder RUN', *request.arguments()])}
            for (name, request), metrics in zip(evaluations.items(), measured, strict=True)
        },
    }


if __name__ == '__main__':
    main()
