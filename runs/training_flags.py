"""The flags of train.py, which a run's config.json keeps."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import data
import models
from optimizers import OPTIMIZERS
from readers import python_files
from runs import folders, parsing
from runs.parsing import integer, number

PRECISIONS = ('float32', 'bfloat16')
BNUPDATES = ('both', 'first', 'second')


# What users of other programs type, and the flag of train.py that they look for.
HABITS = {
    'lr': '--alpha',
    'learning-rate': '--alpha',
    'momentum': '--beta1',
    'wd': '--priorprec: weight decay × N, so 5e-4 × 50,000 images is --priorprec 25',
    'weight-decay': '--priorprec: weight decay × N, so 5e-4 × 50,000 images is --priorprec 25',
    'seed': '--randomseed',
    'optimizer': '--optim',
    'arch': '--model',
    'data-dir': '--datasetfolder',
    'root': '--datasetfolder',
    'output': '--resultsfolder',
    'amp': '--precision bfloat16',
}

# What the paper's runs on CIFAR-10 with ResNet-18 used.
PUBLISHED = {
    'sgd': '--alpha 0.03 --priorprec 25',
    'sam': '--alpha 0.03 --priorprec 25 --rho 0.05',
    'bsam': '--alpha 0.5 --priorprec 40 --rho 0.01 --dafactor 4',
}


dataset_name = parsing.choice(
    data.DATASETS,
    {
        'folder:PATH': parsing.after('folder:'),
        'npz:FILE': parsing.after('npz:'),
        'FILE.py:FUNCTION': parsing.python_name,
        'tfds/NAME': lambda text: text if text.startswith('tfds/') and text != 'tfds/' else None,
    },
)


class OptimizerFlag(NamedTuple):
    """A flag that some optimizers take.

    Attributes:
        name: the flag's name, without dashes.
        argument: the argument of optimizers.py that gets the value, None for a flag of the learning-rate schedule.
        type: the function that argparse calls with the text.
        defaults: {optimizer: default}, for every optimizer that takes the flag.
        help: the text of --help without the defaults.
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

# The defaults of sgd, sam and bsam are the published scripts' defaults. experiment.py converts units where needed.
OPTIMIZER_FLAGS = (
    OptimizerFlag(
        'alpha', 'learning_rate', number(above=0), _each(_LIKE_SGD, 1.0) | _each(_LIKE_ADAM, 0.001) | {'ivon': 0.2},
        'learning rate α, before the schedule',
    ),
    OptimizerFlag(
        'rho', 'rho', number(minimum=0), _each(_SHARPNESS_AWARE, 0.1) | {'asam': 0.5},
        'size ρ of the perturbation: w + ρ g/‖g‖ (sam, samadam), w + ρ g/s (bsam), w + ρ T²g/‖Tg‖ (asam)',
    ),
    OptimizerFlag(
        'beta1', 'beta1', number(minimum=0, below=1), _each((*_LIKE_SGD, *_LIKE_ADAM, 'ivon'), 0.9),
        'β₁: m ← β₁m + g + δw (sgd, sam, asam, swag), m ← β₁m + (1−β₁)(g + δw) (others; adamw and ivon omit δw)',
    ),
    OptimizerFlag(
        'beta2', 'beta2', number(minimum=0, below=1), _each(('bsam', *_LIKE_ADAM), 0.999) | {'ivon': 0.99999},
        'β₂: s ← β₂s + (1−β₂)(√s|g| + γ + δ) (bsam); decay of g² (adam, adamw, samadam); decay of h (ivon)',
    ),
    OptimizerFlag(
        'priorprec', 'prior_precision', number(minimum=0), _each((*_LIKE_SGD, *_LIKE_ADAM), 25.0) | {'ivon': 10.0},
        'prior precision: the weight decay is δ = priorprec / N',
    ),
    OptimizerFlag(
        'batchsplit', 'num_sub_batches', integer(1), _each(_SHARPNESS_AWARE, 8) | {'ivon': 1},
        'sub-batches M of a batch (m-sharpness), each with its own perturbation or noise; must divide --batchsize',
    ),
    OptimizerFlag(
        'atonce', 'atonce', integer(1), _each((*_SHARPNESS_AWARE, 'ivon'), None),
        'the most sub-batches computed together; more fill a GPU but take memory; none means all on GPUs, 1 on CPUs',
    ),
    OptimizerFlag(
        'bnupdate', 'bnupdate', parsing.choice(BNUPDATES), _each(_SHARPNESS_AWARE, 'both'),
        'which of the two gradients updates the batch statistics',
    ),
    OptimizerFlag('custominit', 'initial_precision', number(above=0), {'bsam': 1.0}, 'initial precision s'),
    OptimizerFlag('damping', 'damping', number(minimum=0), {'bsam': 0.1}, 'damping γ, added to the precision'),
    OptimizerFlag('eta', 'eta', number(minimum=0), {'asam': 0.01}, 'η: T = |w| + η'),
    OptimizerFlag(
        'swagstart', 'swagstart', number(minimum=0, below=1), {'swag': 0.5},
        'fraction of the epochs after which weights are recorded once per epoch',
    ),
    OptimizerFlag('swagrate', None, number(above=0), {'swag': 0.2}, 'learning rate after --swagstart, as factor of α'),
    OptimizerFlag(
        'swagrank', 'swagrank', integer(2, below=1001), {'swag': 20}, 'deviations kept for the low-rank covariance'
    ),
    OptimizerFlag('hessinit', 'initial_hessian', number(above=0), {'ivon': 0.5}, 'initial Hessian h₀'),
    OptimizerFlag(
        'clip', 'clip', number(above=0), {'ivon': None}, 'bound of an update, before the learning rate'
    ),
    OptimizerFlag('trainmc', 'num_samples', integer(1), {'ivon': 1}, 'weight samples per sub-batch'),
)  # fmt: skip


def _run_or_safetensors(text):
    return os.path.abspath(parsing.folder(text))


def rows_of(optim: str) -> list[OptimizerFlag]:
    """Returns the rows of OPTIMIZER_FLAGS that apply to an optimizer."""
    return [row for row in OPTIMIZER_FLAGS if optim in row.defaults]


# Flags of a single start, which config.json does not keep.
OF_START = ('resume', 'checkpoint', 'code', 'coordinator', 'processes', 'processid', 'jointimeout', 'seeds')

# Flags that --resume may change.
MAY_CHANGE = (
    'epochs', 'datasetfolder', 'compilecache', 'checkpointevery', 'keepbest', 'keepgoing', 'logcalibration',
    'testbatchsize', 'devices', 'stream', 'atonce',
)  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the flags of a command line. See `parse`."""
    return parse(argv)[0]


def parse(argv: list[str] | None = None, exits: bool = True) -> tuple[argparse.Namespace, dict]:
    """Returns all flags of a command line, and {name: value} of the flags that the command line gives.

    With --resume the optimizer's flags stay unset, because the run folder has them. Invalid flags end the script with
    status 2, or raise a ValueError if `exits` is False.
    """
    parser = create_parser(exits)
    args, given = parser.parse(argv)
    if args.checkpoint is not None and args.resume is None:
        parser.error('--checkpoint needs --resume')
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
            parser.error(f'--seeds cannot be combined with --{name}')
    if len(set(args.seeds)) < len(args.seeds):
        parser.error('--seeds names a seed twice')


def first_constant_epoch(epochs: int, swagstart: float) -> int:
    """Returns SWAG's first epoch with a constant learning rate. Counts from 0; a run has epochs + 1 epochs."""
    return math.floor(swagstart * (epochs + 1))


def _require_consistency(args):
    """Raises a ValueError for flags that cannot be combined."""
    batch, split = args.batchsize, args.batchsplit
    if split and batch % split:
        nearest = ' or '.join(f'{n}' for n in (batch // split * split, batch // split * split + split) if n)
        what = f'--batchsize {batch} does not divide into --batchsplit {split} sub-batches'
        divisors = sorted((n for n in range(1, batch + 1) if batch % n == 0), key=lambda n: abs(n - split))
        raise ValueError(f'{what}: use --batchsize {nearest}, or --batchsplit {divisors[0]}')
    if args.imagesize and not args.dataset.startswith('folder:'):
        raise ValueError(f'--imagesize does not apply to --dataset {args.dataset}: it resizes images of folder:PATH')
    if args.optim == 'bsam' and args.damping == args.priorprec == 0:
        raise ValueError('bsam needs --damping or --priorprec above 0: without both, the precision can decay to 0')
    if args.optim == 'swag' and args.epochs + 1 - first_constant_epoch(args.epochs, args.swagstart) < 2:
        raise ValueError(f'swag needs two epochs or more after --swagstart {args.swagstart} of {args.epochs + 1}')


def _choose_own_flags(args):
    """Sets the optimizer's defaults for flags that are not given. Raises a ValueError for flags of other optimizers."""
    for row in OPTIMIZER_FLAGS:
        if args.optim not in row.defaults and getattr(args, row.name) is not None:
            takes = ', '.join(f'--{other.name}' for other in rows_of(args.optim))
            raise ValueError(f'--{row.name} does not apply to --optim {args.optim} ({args.optim} takes {takes})')
        if getattr(args, row.name) is None:
            setattr(args, row.name, row.defaults.get(args.optim))


def poor_settings(args: argparse.Namespace, given: dict) -> list[str]:
    """Returns a warning for every setting of a new run that is known to be poor.

    Args:
        args: all flags.
        given: {name: value} of the flags on the command line.
    """
    warnings = []
    if args.optim in PUBLISHED and 'alpha' not in given:
        advice = f"the paper's runs did not use it, but for CIFAR-10 and ResNet-18 {PUBLISHED[args.optim]}"
        warnings.append(f"--alpha {args.alpha} is the published scripts' default: {advice}")
    if args.warmup > max(args.epochs, 1):
        what = f'with --warmup {args.warmup} and --epochs {args.epochs} the learning rate only rises'
        warnings.append(f'{what}: try --warmup 1')
    return warnings


def command_line(values: dict) -> list[str]:
    """Returns the command line of the flags {name: value}. A switch that is False is left out."""
    parser = create_parser()
    given = {name: value for name, value in values.items() if value is not False or not parser.is_switch(name)}
    return [f'--{name}' if value is True else f'--{name}={value}' for name, value in given.items()]


def code_of(values: dict) -> list[str]:
    """Returns the flag --code for the user's own files among the flags {name: value}, or [] if there are none."""
    paths = python_files.files_of(str(values.get(name)) for name in ('dataset', 'model'))
    return ['--code', *paths] if paths else []


def flags_of(config: dict, run: Path) -> argparse.Namespace:
    """Returns the flags in a run's configuration, checked as on the command line. Raises RunError."""
    defaults = vars(create_parser().parse_args([]))
    held = config.get('flags')
    try:
        if not isinstance(held, dict):
            raise ValueError('they are not an object')
        # None means that the flag was not given, unless the flag has a default.
        values = {name: value for name, value in held.items() if value is not None or defaults.get(name) is not None}
        for name in values.keys() - (defaults.keys() - {*OF_START}):
            raise ValueError(f'there is no --{name}')
        args, _ = parse(command_line(values), exits=False)
    except ValueError as error:
        raise folders.RunError(f'{run}/config.json has flags that train.py would not take: {error}') from error
    return argparse.Namespace(**{name: value for name, value in vars(args).items() if name not in OF_START})


def checked_config(run: Path) -> dict:
    """Returns the configuration of a run, with flags as from `flags_of`. Raises RunError.

    Raises DataError if train.py could not have read the data set that it describes.
    """
    config = folders.read_config(run)
    data.check_description(config.get('dataset'), Path(run) / 'config.json')
    return config | {'flags': vars(flags_of(config, run))}


def folder_or_default(dataset_folder: str) -> str:
    """Returns the folder of a run's data sets, or the default folder if it is missing, as on another machine."""
    return dataset_folder if os.path.isdir(dataset_folder) else os.path.abspath('datasets')


def continued(args: argparse.Namespace, given: dict, run: Path) -> argparse.Namespace:
    """Returns the flags of a resumed run. Raises RunError if --resume may not change a flag.

    Args:
        args: the run's own flags.
        given: {name: value} of the flags on the command line of now.
        run: the run folder.
    """
    given = {name: value for name, value in given.items() if name not in OF_START}
    if 'datasetfolder' in given:
        given['datasetfolder'] = os.path.abspath(given['datasetfolder'])
    for name, value in given.items():
        held = getattr(args, name)
        if any(row.name == name and args.optim not in row.defaults for row in OPTIMIZER_FLAGS):
            raise folders.RunError(f'--{name} does not apply to --optim {args.optim} of {run}: omit it')
        if value != held and name not in MAY_CHANGE:
            raise folders.RunError(f'--{name} {value}: {run} began with {held}; omit the flag, or begin another run')
        if name == 'epochs' and value != held and args.optim == 'swag':
            raise folders.RunError(
                f'--epochs {value}: SWAG in {run} follows the schedule of --epochs {held}; begin another run'
            )
    return argparse.Namespace(**vars(args) | {'datasetfolder': folder_or_default(args.datasetfolder)} | given)


def create_parser(exits: bool = True) -> parsing.Parser:
    """Returns the parser of train.py."""
    parser = parsing.Parser(_DESCRIPTION, exits, HABITS)
    parser.usage = 'train.py [flags]'
    add = parser.add_argument_group('data and network').add_argument
    help = (
        'data set; folder:PATH holds train/CLASS/*.png; npz:FILE has x_train and y_train; FILE.py:FUNCTION is your own '
        'Python; tfds/NAME is a set that TensorFlow Datasets prepared in --datasetfolder'
    )
    add('--dataset', type=dataset_name, default='cifar10', help=help)
    add('--datasetfolder', type=parsing.folder, default='datasets', help='folder of the data sets')
    help = 'with folder:PATH: resize the shorter side of images to N pixels and crop the centre to N×N'
    add('--imagesize', type=integer(1, below=4097), help=help)
    help = 'train on N training images, the same images for every seed (default: all)'
    add('--trainimages', type=integer(1), help=help)
    help = 'hold out this fraction of the training images, and evaluate epochs on it instead of the test set'
    add('--validation', type=number(minimum=0, below=1), default=0.0, metavar='FRACTION', help=help)
    add('--noaugment', action='store_true', help='train without random crops and flips')
    network = parsing.choice(
        models.MODELS, {'wrnDxK': parsing.matching(models.WIDE_RESNET), 'FILE.py:CLASS': parsing.python_name}
    )
    help = 'network; wrnDxK is a wide ResNet of depth D and width factor K; FILE.py:CLASS is your own Flax module'
    add('--model', type=network, default='resnet18', help=help)
    help = 'dtype in which networks compute; weights, optimizer state, statistics and loss are float32'
    add('--precision', type=parsing.choice(PRECISIONS), default='float32', help=help)

    add = parser.add_argument_group('training').add_argument
    help = 'start from the weights of a run or of an export, all except the last layer if the classes differ'
    add('--init', type=_run_or_safetensors, metavar='RUN', help=help)
    add('--optim', type=parsing.choice(OPTIMIZERS), default='sgd', help=_OPTIMIZER_HELP)
    add('--epochs', type=integer(0), default=180, help='epochs; one more is run, as in the published scripts')
    help = 'warm-up epochs, with rate α (e+1)/warmup in epoch e; then rate α ½(1 + cos(π (e−warmup)/(epochs+1−warmup)))'
    add('--warmup', type=integer(0), default=5, help=help)
    add('--batchsize', type=integer(1), default=200, help='images per training step')
    add('--testbatchsize', type=integer(1), default=200, help='images per batch of the test set')
    help = 'data augmentation factor, which multiplies N and so divides the weight decay and the posterior variance'
    add('--dafactor', type=number(above=0), default=1.0, help=help)
    add(
        '--randomseed', type=integer(0, below=2**32), default=0, help='seed of weights, batches, augmentation and noise'
    )
    help = 'train one run per seed, at the same time on several GPUs, otherwise one after another'
    add('--seeds', type=integer(0, below=2**32), nargs='+', default=[], metavar='SEED', help=help)

    title = 'settings of the optimizer (a setting of another optimizer is refused)'
    add = parser.add_argument_group(title).add_argument
    for row in OPTIMIZER_FLAGS:
        add(f'--{row.name}', type=row.type, help=row.help + _defaults(row))

    group = parser.add_argument_group('run folder')
    add = group.add_argument
    help = 'folder of all runs; this run is written to FOLDER/DATASET_MODEL/OPTIM/run_K'
    add('--resultsfolder', type=parsing.folder, default='results', help=help)
    help = 'resume the run in this folder with its own flags; --epochs and a few others may change'
    add('--resume', type=parsing.path, metavar='RUN', help=help)
    parsing.add_code(group)
    help = 'with --resume: start from the checkpoint after STEP steps instead of the newest'
    add('--checkpoint', type=integer(0), metavar='STEP', help=help)
    help = 'save within epochs too, every N steps (500) or minutes (30min); every epoch is saved in any case'
    add('--checkpointevery', type=parsing.steps_or_minutes, metavar='N', help=help)
    help = 'also keep the checkpoint of the best accuracy; do not report that accuracy if it is on the test set'
    add('--keepbest', action='store_true', help=help)
    add('--logcalibration', action='store_true', help='also log the NLL and the ECE of every epoch')
    add('--keepgoing', action='store_true', help='train on although the loss or the state is not finite')

    group = parser.add_argument_group('devices and hosts')
    add = group.add_argument
    add('--devices', type=integer(1), help='devices that share each batch, or its sub-batches (default: all)')
    help = 'send each batch to the device when it is needed; by default all images are sent first if they fit'
    add('--stream', action=argparse.BooleanOptionalAction, default=False, help=help)
    parsing.add_compilecache(group)
    parsing.add_coordinator(group)
    return parser


_DESCRIPTION = """Train an image classifier and leave a run folder for test.py.

examples:
  python train.py --dataset digits --model lenet --optim bsam --alpha 0.5 --rho 0.01 --priorprec 1 --epochs 40
  python train.py --resume results/digits_lenet/bsam/run_0
"""

_OPTIMIZER_HELP = (
    'optimizer: sgd; sam (Foret et al., 2021); bsam (Möllenhoff & Khan, 2023); adam (Kingma & Ba, 2015); adamw '
    '(Loshchilov & Hutter, 2019); samadam (SAM with Adam); asam (Kwon et al., 2021); swag (Maddox et al., 2019); ivon '
    '(Shen et al., 2024)'
)


def _defaults(row):
    """Returns the text of --help about a flag's default for each optimizer."""
    optimizers_of = {}
    for optim in (name for name in OPTIMIZERS if name in row.defaults):
        optimizers_of.setdefault(row.defaults[optim], []).append(optim)
    if len(optimizers_of) == 1 and len(row.defaults) == len(OPTIMIZERS):
        return f' (default: {next(iter(optimizers_of))})'
    texts = [f'{"none" if value is None else value} for {", ".join(names)}' for value, names in optimizers_of.items()]
    return f' (default: {"; ".join(texts)})'
