"""The flags of a run: what train.py takes, and what a run's configuration holds.

Needs neither JAX nor the tables that it lists the names of, so that --help and usage errors answer at once.
"""

import argparse
import math
import os

from runs import folders, parsing

DATASETS = ('cifar10', 'cifar100', 'tinyimagenet', 'svhn', 'mnist', 'fashion', 'digits')
MODELS = ('resnet18', 'resnet20', 'mlp', 'lenet')

# The flags of each optimizer, with its defaults; those of sgd, sam and bsam are the reference's.
_SGD = {'alpha': 1.0, 'beta1': 0.9, 'priorprec': 25.0}
_ADAM = {'alpha': 0.001, 'beta1': 0.9, 'beta2': 0.999, 'priorprec': 25.0}
_SHARP = {'rho': 0.1, 'batchsplit': 8, 'bnupdate': 'both', 'atonce': None}
OPTIMIZERS = {
    'sgd': _SGD,
    'sam': _SGD | _SHARP,
    'bsam': _SGD | _SHARP | {'beta2': 0.999, 'custominit': 1.0, 'damping': 0.1},
    'adam': _ADAM,
    'adamw': _ADAM,
    'samadam': _ADAM | _SHARP,
    'asam': _SGD | _SHARP | {'rho': 0.5, 'eta': 0.01},
    'swag': _SGD | {'swagstart': 0.5, 'swagrate': 0.2, 'swagrank': 20},
    'ivon': {
        'alpha': 0.2, 'beta1': 0.9, 'beta2': 0.99999, 'priorprec': 10.0, 'hessinit': 0.5, 'clip': None, 'batchsplit': 1,
        'trainmc': 1, 'atonce': None,
    },
}  # fmt: skip
WITH_POSTERIOR = ('bsam', 'swag', 'ivon')  # whose samples are others than the mean
PRECISIONS = ('float32', 'bfloat16')
BNUPDATES = ('both', 'first', 'second')

# Flags of a start, which are not kept with the run.
OF_START = ('resume', 'checkpoint', 'coordinator', 'processes', 'processid', 'jointimeout', 'seeds')

# Flags that may be given with --resume and another value than the run has.
MAY_CHANGE = (
    'epochs', 'datasetfolder', 'compilecache', 'checkpointevery', 'keepbest', 'keepgoing', 'testbatchsize', 'devices',
    'stream', 'atonce',
)  # fmt: skip


def parse_args(argv=None):
    """The flags of argv. Those of the reference have its defaults.

    Those of the optimizer are set but with --resume, where the run has them.
    """
    parser = create_parser()
    args = parser.parse_args(argv)
    if args.checkpoint is not None and args.resume is None:
        parser.error('--checkpoint goes with --resume')
    parsing.require_whole_address(parser, args)
    _require_own_seeds(parser, args, argv)
    if args.resume is None:
        _choose_own_flags(parser, args)
        try:
            _require_consistency(args)
        except ValueError as error:
            parser.error(str(error))
    return args


def _require_own_seeds(parser, args, argv):
    given = parser.given(argv) if args.seeds else {}
    for name in ('resume', 'randomseed', 'coordinator', 'devices'):
        if name in given:
            parser.error(f'--seeds does not go with --{name}')
    if len(set(args.seeds)) < len(args.seeds):
        parser.error('--seeds names a seed twice')


def first_constant_epoch(epochs, swagstart):
    """SWAG's first epoch, from 0, with a constant rate, of epochs + 1."""
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


def _choose_own_flags(parser, args):
    """Sets the optimizer's defaults where no flag was given; an error for flags of other optimizers."""
    for name in _OWN_FLAGS - OPTIMIZERS[args.optim].keys():
        if getattr(args, name) is not None:
            takes = ', '.join(f'--{other}' for other in OPTIMIZERS[args.optim])
            parser.error(f'--{name} is no flag of {args.optim}, which takes {takes}')
    _set_defaults(args)


def _set_defaults(args):
    """The optimizer's defaults where there is no value; None for flags of other optimizers."""
    own = OPTIMIZERS[args.optim]
    for name in _OWN_FLAGS:
        if name not in own or getattr(args, name) is None:
            setattr(args, name, own.get(name))


_OWN_FLAGS = {name for own in OPTIMIZERS.values() for name in own}


def flags_of(config, run):
    """The flags of a run from its configuration, held to the same bounds as on the command line. Raises RunError."""
    if not isinstance(config.get('flags'), dict):
        raise folders.RunError(f'{run}/config.json holds no flags')
    try:
        args = create_parser().from_values(config['flags'], without=OF_START)
        _set_defaults(args)
        _require_consistency(args)
    except (ValueError, KeyError, TypeError) as error:
        raise folders.RunError(f'{run}/config.json has flags that train.py would not take: {error}') from error
    return args


def read_config(run):
    """A run's configuration, whose flags are those of flags_of. Raises RunError."""
    config = folders.read_config(run)
    return config | {'flags': vars(flags_of(config, run))}


def folder_there(dataset_folder):
    """Returns the folder of a run's data sets, or the default one if that is not there, as on another machine."""
    return dataset_folder if os.path.isdir(dataset_folder) else os.path.abspath('datasets')


def continued(args, given, run):
    """The flags `args` of a run, with those that were given now, if they may differ. Raises RunError."""
    given = {name: value for name, value in given.items() if name not in OF_START}
    if 'datasetfolder' in given:
        given['datasetfolder'] = os.path.abspath(given['datasetfolder'])
    for name, value in given.items():
        held = getattr(args, name)
        if name in _OWN_FLAGS - OPTIMIZERS[args.optim].keys():
            raise folders.RunError(f'--{name} is no flag of {args.optim}, with which {run} was begun: leave it out')
        if value != held and name not in MAY_CHANGE:
            raise folders.RunError(f'--{name} {value}: {run} was begun with {held}; leave it out, or begin another run')
        if name == 'epochs' and value != held and args.optim == 'swag':
            raise folders.RunError(
                f'--epochs {value}: {run} records weights by a schedule of {held}; begin another run'
            )
    return argparse.Namespace(**vars(args) | {'datasetfolder': folder_there(args.datasetfolder)} | given)


def create_parser():
    parser = parsing.Parser('Train an image classifier and leave a run folder for test.py.')
    add = parser.add_argument
    help = 'go on with the run in this folder; its flags hold, but for --epochs and some others'
    add('--resume', type=parsing.path, metavar='RUN', help=help)
    help = 'with --resume: go on from this checkpoint, a number of steps, instead of the newest'
    add('--checkpoint', type=parsing.integer(0), metavar='STEP', help=help)
    add('--randomseed', type=parsing.integer(0, below=2**32), default=0, help='seed of everything that is random')
    help = 'train with each of these seeds, a run each: on a GPU each, or one after another'
    add('--seeds', type=parsing.integer(0, below=2**32), nargs='+', default=[], metavar='SEED', help=help)
    parser.add_choice('--optim', OPTIMIZERS, default='sgd', help=_OPTIMIZER_HELP)
    beta = parsing.number(minimum=0, below=1)
    _add_own(parser, 'alpha', parsing.number(above=0), 'learning rate α, before the schedule')
    help = 'ρ: evaluate at w + ρ g/‖g‖ (sam, samadam), w + ρ g/s (bsam), w + ρ T²g/‖Tg‖ (asam)'
    _add_own(parser, 'rho', parsing.number(minimum=0), help)
    help = 'β₁: m ← β₁m + g + δw (sgd, sam, asam, swag), m ← β₁m + (1−β₁)(g + δw) (others, adamw and ivon without δw)'
    _add_own(parser, 'beta1', beta, help)
    help = 'β₂: s ← β₂s + (1−β₂)(√s|g| + γ + δ) (bsam); decay of g² (Adam and its kin) or of h (ivon)'
    _add_own(parser, 'beta2', beta, help)
    help = 'prior precision: the weight decay is δ = priorprec / N'
    _add_own(parser, 'priorprec', parsing.number(minimum=0), help)
    help = 'data augmentation factor: N = training images × dafactor'
    add('--dafactor', type=parsing.number(above=0), default=1.0, help=help)
    add('--batchsize', type=parsing.integer(1), default=200, help='images per training step')
    add('--testbatchsize', type=parsing.integer(1), default=200, help='images per batch of the test set')
    add('--epochs', type=parsing.integer(0), default=180, help='epochs; as in the reference one more is run')
    help = 'epochs e with learning rate α (e+1)/warmup; then α ½(1 + cos(π (e−warmup)/(epochs+1−warmup)))'
    add('--warmup', type=parsing.integer(0), default=5, help=help)
    help = 'data set; tfds/NAME is one that TensorFlow Datasets prepared in the folder of the data sets'
    parser.add_choice('--dataset', DATASETS, also='tfds/', default='cifar10', help=help)
    help = 'sub-batches M of a batch, each with a perturbation or noise of its own'
    _add_own(parser, 'batchsplit', parsing.integer(1), help)
    help = 'sub-batches that are computed together, at most: they fill a GPU, and each takes memory (all; on CPUs 1)'
    _add_own(parser, 'atonce', parsing.integer(1), help)
    help = 'which of the two gradients moves batch statistics'
    parser.add_choice('--bnupdate', BNUPDATES, help=help + _defaults('bnupdate'))
    help = 'train on so many of the training images, a random part that is the same for all seeds; all by default'
    add('--trainimages', type=parsing.integer(1), metavar='N', help=help)
    help = 'keep this fraction of the training images out, and evaluate epochs on it instead of the test set'
    add('--validation', type=parsing.number(minimum=0, below=1), default=0.0, metavar='FRACTION', help=help)
    add('--noaugment', action='store_true', help='no random crops and flips')
    parser.add_choice('--model', MODELS, default='resnet18', help='network')
    add('--datasetfolder', type=parsing.folder, default='datasets', help='folder of the data sets')
    help = 'the run is kept in RESULTSFOLDER/DATASET_MODEL/OPTIM/run_K'
    add('--resultsfolder', type=parsing.folder, default='results', help=help)
    help = 'devices that share batches, or the sub-batches of optimizers that have them; all that there are by default'
    add('--devices', type=parsing.integer(1), help=help)
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
    _add_own(parser, 'custominit', parsing.number(above=0), 'initial precision s')
    _add_own(parser, 'damping', parsing.number(minimum=0), 'damping γ of the precision')
    _add_own(parser, 'eta', parsing.number(minimum=0), 'η: T = |w| + η')
    help = 'fraction of the epochs after which weights are recorded, once an epoch'
    _add_own(parser, 'swagstart', parsing.number(minimum=0, below=1), help)
    _add_own(parser, 'swagrate', parsing.number(above=0), 'learning rate from there on, relative to alpha')
    _add_own(parser, 'swagrank', parsing.integer(2, below=1001), 'deviations that are kept for the covariance')
    _add_own(parser, 'hessinit', parsing.number(above=0), 'initial Hessian h₀')
    _add_own(parser, 'clip', parsing.number(above=0), 'bound of an update before the learning rate, none by default')
    _add_own(parser, 'trainmc', parsing.integer(1), 'samples of the weights a sub-batch')
    return parser


_OPTIMIZER_HELP = (
    'optimizer: sgd; sam (Foret et al., 2021); bsam (Möllenhoff & Khan, 2023); adam (Kingma & Ba, 2015); adamw '
    '(Loshchilov & Hutter, 2019); samadam, SAM with Adam; asam (Kwon et al., 2021); swag (Maddox et al., 2019); ivon '
    '(Shen et al., 2024)'
)


def _add_own(parser, name, type, help):
    """A flag that some optimizers take, each with its own default."""
    parser.add_argument(f'--{name}', type=type, help=help + _defaults(name))


def _defaults(name):
    """For --help: the default, or which optimizers have which."""
    optimizers_of = {}
    for optim, own in OPTIMIZERS.items():
        if own.get(name) is not None:
            optimizers_of.setdefault(own[name], []).append(optim)
    texts = [f'{value} for {", ".join(names)}' for value, names in optimizers_of.items()]
    return f' (default: {"; ".join(texts)})' if texts else ''
