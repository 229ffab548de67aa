"""The flags of a run: what train.py takes, and what a run's configuration holds."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import data
import models
from optimizers import OPTIMIZERS
from runs import folders, parsing
from runs.parsing import integer, number

PRECISIONS = ('float32', 'bfloat16')
BNUPDATES = ('both', 'first', 'second')


class OptimizerFlag(NamedTuple):
    """A flag that some optimizers take.

    Attributes:
        name: of the flag.
        argument: the name of its value in optimizers.py; None if the schedule of the learning rate takes it.
        type: what argparse calls with the text.
        defaults: {optimizer: default} of all optimizers that take the flag.
        help: without the defaults.
    """

    name: str
    argument: str | None
    type: Callable
    defaults: dict
    help: str


def _each(names, default):
    return dict.fromkeys(names, default)


_LIKE_SGD = ('sgd', 'sam', 'bsam', 'asam', 'swag')
_LIKE_ADAM = ('adam', 'adamw', 'samadam')
_SHARPNESS_AWARE = ('sam', 'bsam', 'samadam', 'asam')

# Defaults of sgd, sam and bsam are the reference's. experiment.py converts what an optimizer takes in another form.
OPTIMIZER_FLAGS = (
    OptimizerFlag(
        'alpha', 'learning_rate', number(above=0), _each(_LIKE_SGD, 1.0) | _each(_LIKE_ADAM, 0.001) | {'ivon': 0.2},
        'learning rate α, before the schedule',
    ),
    OptimizerFlag(
        'rho', 'rho', number(minimum=0), _each(_SHARPNESS_AWARE, 0.1) | {'asam': 0.5},
        'ρ: evaluate at w + ρ g/‖g‖ (sam, samadam), w + ρ g/s (bsam), w + ρ T²g/‖Tg‖ (asam)',
    ),
    OptimizerFlag(
        'beta1', 'beta1', number(minimum=0, below=1), _each((*_LIKE_SGD, *_LIKE_ADAM, 'ivon'), 0.9),
        'β₁: m ← β₁m + g + δw (sgd, sam, asam, swag), m ← β₁m + (1−β₁)(g + δw) (others, adamw and ivon without δw)',
    ),
    OptimizerFlag(
        'beta2', 'beta2', number(minimum=0, below=1), _each(('bsam', *_LIKE_ADAM), 0.999) | {'ivon': 0.99999},
        'β₂: s ← β₂s + (1−β₂)(√s|g| + γ + δ) (bsam); decay of g² (Adam and its kin) or of h (ivon)',
    ),
    OptimizerFlag(
        'priorprec', 'prior_precision', number(minimum=0), _each((*_LIKE_SGD, *_LIKE_ADAM), 25.0) | {'ivon': 10.0},
        'prior precision: the weight decay is δ = priorprec / N',
    ),
    OptimizerFlag(
        'batchsplit', 'num_sub_batches', integer(1), _each(_SHARPNESS_AWARE, 8) | {'ivon': 1},
        'sub-batches M of a batch, each with a perturbation or noise of its own',
    ),
    OptimizerFlag(
        'atonce', 'atonce', integer(1), _each((*_SHARPNESS_AWARE, 'ivon'), None),
        'sub-batches that are computed together, at most: they fill a GPU, and each takes memory; none: all, on CPUs 1',
    ),
    OptimizerFlag(
        'bnupdate', 'bnupdate', parsing.choice(BNUPDATES), _each(_SHARPNESS_AWARE, 'both'),
        'which of the two gradients moves batch statistics',
    ),
    OptimizerFlag('custominit', 'initial_precision', number(above=0), {'bsam': 1.0}, 'initial precision s'),
    OptimizerFlag('damping', 'damping', number(minimum=0), {'bsam': 0.1}, 'damping γ of the precision'),
    OptimizerFlag('eta', 'eta', number(minimum=0), {'asam': 0.01}, 'η: T = |w| + η'),
    OptimizerFlag(
        'swagstart', 'swagstart', number(minimum=0, below=1), {'swag': 0.5},
        'fraction of the epochs after which weights are recorded, once an epoch',
    ),
    OptimizerFlag('swagrate', None, number(above=0), {'swag': 0.2}, 'learning rate from there on, relative to alpha'),
    OptimizerFlag(
        'swagrank', 'swagrank', integer(2, below=1001), {'swag': 20}, 'deviations that are kept for the covariance'
    ),
    OptimizerFlag('hessinit', 'initial_hessian', number(above=0), {'ivon': 0.5}, 'initial Hessian h₀'),
    OptimizerFlag(
        'clip', 'clip', number(above=0), {'ivon': None}, 'bound of an update before the learning rate'
    ),
    OptimizerFlag('trainmc', 'num_samples', integer(1), {'ivon': 1}, 'samples of the weights a sub-batch'),
)  # fmt: skip


def rows_of(optim: str) -> list[OptimizerFlag]:
    """Returns the rows of the flags that an optimizer takes."""
    return [row for row in OPTIMIZER_FLAGS if optim in row.defaults]


# Flags of a start, which are not kept with the run.
OF_START = ('resume', 'checkpoint', 'coordinator', 'processes', 'processid', 'jointimeout', 'seeds')

# Flags that may be given with --resume and another value than the run has.
MAY_CHANGE = (
    'epochs', 'datasetfolder', 'compilecache', 'checkpointevery', 'keepbest', 'keepgoing', 'testbatchsize', 'devices',
    'stream', 'atonce',
)  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the flags of a command line. See `parse`."""
    return parse(argv)[0]


def parse(argv: list[str] | None = None, exits: bool = True) -> tuple[argparse.Namespace, dict]:
    """Returns all flags of a command line, and {name: value} of those that it gives.

    With --resume the optimizer's flags stay unset, because the run has them.
    Ends the script with status 2 for flags that cannot be, or raises a ValueError.
    """
    parser = create_parser(exits)
    args, given = parser.parse(argv)
    if args.checkpoint is not None and args.resume is None:
        parser.error('--checkpoint goes with --resume')
    parsing.require_whole_address(parser, args)
    _require_seeds_alone(parser, args, given)
    if args.resume is None:
        try:
            _choose_own_flags(args)
            _require_consistency(args)
        except ValueError as error:
            parser.error(str(error))
    return args, given


def _require_seeds_alone(parser, args, given):
    for name in ('resume', 'randomseed', 'coordinator', 'devices'):
        if args.seeds and name in given:
            parser.error(f'--seeds does not go with --{name}')
    if len(set(args.seeds)) < len(args.seeds):
        parser.error('--seeds names a seed twice')


def first_constant_epoch(epochs: int, swagstart: float) -> int:
    """Returns SWAG's first epoch, from 0, with a constant rate, of epochs + 1."""
    return math.floor(swagstart * (epochs + 1))


def _require_consistency(args):
    """Raises a ValueError for flags that do not go together."""
    batch, split = args.batchsize, args.batchsplit
    if split and batch % split:
        nearest = ' or '.join(f'{n}' for n in (batch // split * split, batch // split * split + split) if n)
        what = f'--batchsize {batch} does not divide into --batchsplit {split} sub-batches'
        raise ValueError(f'{what}: take --batchsize {nearest}')
    if args.optim == 'bsam' and args.damping == args.priorprec == 0:
        raise ValueError('bsam needs --damping or --priorprec above 0: without both, the precision can decay to 0')
    if args.optim == 'swag' and args.epochs + 1 - first_constant_epoch(args.epochs, args.swagstart) < 2:
        raise ValueError(f'swag needs two epochs or more after --swagstart {args.swagstart} of {args.epochs + 1}')


def _choose_own_flags(args):
    """Sets the optimizer's defaults where no flag was given. Raises a ValueError for flags of other optimizers."""
    for row in OPTIMIZER_FLAGS:
        if args.optim not in row.defaults and getattr(args, row.name) is not None:
            takes = ', '.join(f'--{other.name}' for other in rows_of(args.optim))
            raise ValueError(f'--{row.name} is no flag of {args.optim}, which takes {takes}')
        if getattr(args, row.name) is None:
            setattr(args, row.name, row.defaults.get(args.optim))


def command_line(values: dict) -> list[str]:
    """Returns the flags {name: value} as on a command line. A switch is given if it is true."""
    parser = create_parser()
    given = {name: value for name, value in values.items() if value is not False or not parser.is_switch(name)}
    return [f'--{name}' if value is True else f'--{name}={value}' for name, value in given.items()]


def flags_of(config: dict, run: Path) -> argparse.Namespace:
    """Returns the flags of a run from its configuration, held to the same bounds as on the command line.

    Raises RunError.
    """
    defaults = vars(create_parser().parse_args([]))
    held = config.get('flags')
    try:
        if not isinstance(held, dict):
            raise ValueError('they are no object')
        # None stands for a flag that was not given, unless the flag has a default.
        values = {name: value for name, value in held.items() if value is not None or defaults.get(name) is not None}
        for name in values.keys() - (defaults.keys() - {*OF_START}):
            raise ValueError(f'there is no --{name}')
        args, _ = parse(command_line(values), exits=False)
    except ValueError as error:
        raise folders.RunError(f'{run}/config.json has flags that train.py would not take: {error}') from error
    return argparse.Namespace(**{name: value for name, value in vars(args).items() if name not in OF_START})


def checked_config(run: Path) -> dict:
    """Returns the configuration of a run, with flags as from `flags_of`. Raises RunError.

    Raises DataError if the data set is none that train.py could have read.
    """
    config = folders.read_config(run)
    data.check_description(config.get('dataset'), Path(run) / 'config.json')
    return config | {'flags': vars(flags_of(config, run))}


def folder_or_default(dataset_folder: str) -> str:
    """Returns the folder of a run's data sets, or the default one if that is not there, as on another machine."""
    return dataset_folder if os.path.isdir(dataset_folder) else os.path.abspath('datasets')


def continued(args: argparse.Namespace, given: dict, run: Path) -> argparse.Namespace:
    """Returns the flags `args` of a run, with the flags that are given now, if these may differ. Raises RunError."""
    given = {name: value for name, value in given.items() if name not in OF_START}
    if 'datasetfolder' in given:
        given['datasetfolder'] = os.path.abspath(given['datasetfolder'])
    for name, value in given.items():
        held = getattr(args, name)
        if any(row.name == name and args.optim not in row.defaults for row in OPTIMIZER_FLAGS):
            raise folders.RunError(f'--{name} is no flag of {args.optim}, with which {run} was begun: leave it out')
        if value != held and name not in MAY_CHANGE:
            raise folders.RunError(f'--{name} {value}: {run} was begun with {held}; leave it out, or begin another run')
        if name == 'epochs' and value != held and args.optim == 'swag':
            raise folders.RunError(
                f'--epochs {value}: {run} records weights by a schedule of {held}; begin another run'
            )
    return argparse.Namespace(**vars(args) | {'datasetfolder': folder_or_default(args.datasetfolder)} | given)


def create_parser(exits: bool = True) -> parsing.Parser:
    """Returns the parser of train.py."""
    parser = parsing.Parser('Train an image classifier and leave a run folder for test.py.', exits)
    add = parser.add_argument
    help = 'go on with the run in this folder; its flags hold, but for --epochs and some others'
    add('--resume', type=parsing.path, metavar='RUN', help=help)
    help = 'with --resume: go on from this checkpoint, a number of steps, instead of the newest'
    add('--checkpoint', type=integer(0), metavar='STEP', help=help)
    add('--randomseed', type=integer(0, below=2**32), default=0, help='seed of everything that is random')
    help = 'train with each of these seeds, a run each: on a GPU each, or one after another'
    add('--seeds', type=integer(0, below=2**32), nargs='+', default=[], metavar='SEED', help=help)
    parser.add_choice('--optim', OPTIMIZERS, default='sgd', help=_OPTIMIZER_HELP)
    for row in OPTIMIZER_FLAGS:
        add(f'--{row.name}', type=row.type, metavar=getattr(row.type, 'metavar', None), help=row.help + _defaults(row))
    help = 'data augmentation factor: N = training images × dafactor'
    add('--dafactor', type=number(above=0), default=1.0, help=help)
    add('--batchsize', type=integer(1), default=200, help='images per training step')
    add('--testbatchsize', type=integer(1), default=200, help='images per batch of the test set')
    add('--epochs', type=integer(0), default=180, help='epochs; as in the reference one more is run')
    help = 'epochs e with learning rate α (e+1)/warmup; then α ½(1 + cos(π (e−warmup)/(epochs+1−warmup)))'
    add('--warmup', type=integer(0), default=5, help=help)
    help = 'data set; tfds/NAME is one that TensorFlow Datasets prepared in the folder of the data sets'
    parser.add_choice('--dataset', data.DATASETS, also='tfds/', default='cifar10', help=help)
    help = 'train on so many of the training images, a random part that is the same for all seeds; all by default'
    add('--trainimages', type=integer(1), metavar='N', help=help)
    help = 'keep this fraction of the training images out, and evaluate epochs on it instead of the test set'
    add('--validation', type=number(minimum=0, below=1), default=0.0, metavar='FRACTION', help=help)
    add('--noaugment', action='store_true', help='no random crops and flips')
    parser.add_choice('--model', models.MODELS, default='resnet18', help='network')
    add('--datasetfolder', type=parsing.folder, default='datasets', help='folder of the data sets')
    help = 'the run is kept in RESULTSFOLDER/DATASET_MODEL/OPTIM/run_K'
    add('--resultsfolder', type=parsing.folder, default='results', help=help)
    help = 'devices that share batches, or the sub-batches of optimizers that have them; all that there are by default'
    add('--devices', type=integer(1), help=help)
    help = 'send each batch when it is due, instead of all images at first; done anyway with images too large for that'
    add('--stream', action=argparse.BooleanOptionalAction, default=False, help=help)
    parsing.add_coordinator(parser)
    help = 'what networks compute in; weights, optimizer state, statistics and loss are float32'
    parser.add_choice('--precision', PRECISIONS, default='float32', help=help)
    parsing.add_compilecache(parser)
    help = 'save within epochs too, every so many steps (500) or minutes (30min); after each epoch it is done anyway'
    add('--checkpointevery', type=parsing.steps_or_minutes, metavar='STEPS', help=help)
    help = 'keep the checkpoint of best accuracy in the log besides the last two; not for choosing what you report'
    add('--keepbest', action='store_true', help=help)
    add('--keepgoing', action='store_true', help='train on where the loss or the state is not finite')
    return parser


_OPTIMIZER_HELP = (
    'optimizer: sgd; sam (Foret et al., 2021); bsam (Möllenhoff & Khan, 2023); adam (Kingma & Ba, 2015); adamw '
    '(Loshchilov & Hutter, 2019); samadam, SAM with Adam; asam (Kwon et al., 2021); swag (Maddox et al., 2019); ivon '
    '(Shen et al., 2024)'
)


def _defaults(row):
    """Returns, for --help, the default of each optimizer that takes the flag."""
    optimizers_of = {}
    for optim in (name for name in OPTIMIZERS if name in row.defaults):
        optimizers_of.setdefault(row.defaults[optim], []).append(optim)
    texts = [f'{"none" if value is None else value} for {", ".join(names)}' for value, names in optimizers_of.items()]
    return f' (default: {"; ".join(texts)})'
