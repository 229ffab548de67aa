"""Train an image classifier with SGD, SAM, bSAM or one of their kin and leave a run folder for test.py.

python train.py --dataset cifar10 --model resnet18 --optim bsam --alpha 0.5 --priorprec 40 --rho 0.01 --dafactor 4
python train.py --resume results/cifar10_resnet18/bsam/run_0
"""

import argparse
import contextlib
import math
import os
import sys
import time
from pathlib import Path

import flags
import jobs
import signals

DATASETS = ('cifar10', 'cifar100', 'tinyimagenet', 'svhn', 'mnist', 'fashion', 'digits')
MODELS = ('resnet18', 'resnet20', 'mlp', 'lenet')

# The flags of each optimizer, with its defaults; those of sgd, sam and bsam are the reference's.
_SGD = {'alpha': 1.0, 'beta1': 0.9, 'priorprec': 25.0}
_ADAM = {'alpha': 0.001, 'beta1': 0.9, 'beta2': 0.999, 'priorprec': 25.0}
_SHARP = {'rho': 0.1, 'batchsplit': 8, 'bnupdate': 'both'}
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
        'trainmc': 1,
    },
}  # fmt: skip
PRECISIONS = ('float32', 'bfloat16')
BNUPDATES = ('both', 'first', 'second')

# Flags of a start, which are not kept with the run.
OF_START = ('resume', 'checkpoint', 'coordinator', 'processes', 'processid', 'seeds')

# Flags that may be given with --resume and another value than the run has.
MAY_CHANGE = (
    'epochs', 'datasetfolder', 'compilecache', 'checkpointevery', 'keepbest', 'keepgoing', 'testbatchsize', 'devices',
    'stream',
)  # fmt: skip


def parse_args(argv=None):
    """The flags of argv. Needs neither JAX nor the tables that it lists the names of.

    Those of the reference have its defaults; those of the optimizer are set but with --resume, where the run has them.
    """
    parser = create_parser()
    args = parser.parse_args(argv)
    if args.checkpoint is not None and args.resume is None:
        parser.error('--checkpoint goes with --resume')
    flags.require_whole_address(parser, args)
    _require_own_seeds(parser, args, argv)
    if args.resume is None:
        _choose_own_flags(parser, args)
        _require_consistency(parser, args)
    return args


def _require_own_seeds(parser, args, argv):
    given = parser.given(argv) if args.seeds else {}
    for name in ('resume', 'randomseed', 'coordinator'):
        if name in given:
            parser.error(f'--seeds does not go with --{name}')
    if len(set(args.seeds)) < len(args.seeds):
        parser.error('--seeds names a seed twice')


def _require_consistency(parser, args):
    if args.batchsplit and args.batchsize % args.batchsplit:
        parser.error(f'--batchsize {args.batchsize} does not divide into --batchsplit {args.batchsplit} sub-batches')
    if args.optim == 'bsam' and args.damping == args.priorprec == 0:
        parser.error('bsam needs --damping or --priorprec above 0: without both, the precision can decay to 0')
    if args.optim == 'swag' and args.epochs + 1 - math.floor(args.swagstart * (args.epochs + 1)) < 2:
        parser.error(f'swag needs two epochs or more after --swagstart {args.swagstart} of {args.epochs + 1}')


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
    import runs

    try:
        args = create_parser().from_values(config['flags'], without=OF_START)
    except (ValueError, KeyError, TypeError) as error:
        raise runs.RunError(f'{run}/config.json has flags that train.py would not take: {error}') from error
    _set_defaults(args)
    return args


def continued(args, given, run):
    """The flags `args` of a run, with those that were given now, if they may differ. Raises RunError."""
    import runs

    given = {name: value for name, value in given.items() if name not in OF_START}
    if 'datasetfolder' in given:
        given['datasetfolder'] = os.path.abspath(given['datasetfolder'])
    for name, value in given.items():
        held = getattr(args, name)
        if value != held and name not in MAY_CHANGE:
            raise runs.RunError(f'--{name} {value}: {run} was begun with {held}; leave it out, or begin another run')
        if name == 'epochs' and value != held and args.optim == 'swag':
            raise runs.RunError(f'--epochs {value}: {run} records weights by a schedule of {held}; begin another run')
        if name == 'epochs' and value < held:
            raise runs.RunError(f'--epochs {value}: {run} was begun with {held}; only more are possible')
    return argparse.Namespace(**vars(args) | given)


def create_parser():
    parser = flags.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    help = 'go on with the run in this folder; its flags hold, and --epochs may be more'
    add('--resume', type=Path, metavar='RUN', help=help)
    help = 'with --resume: go on from this checkpoint, a number of steps, instead of the newest'
    add('--checkpoint', type=flags.integer(0), metavar='STEP', help=help)
    add('--randomseed', type=flags.integer(0, below=2**32), default=0, help='seed of everything that is random')
    help = 'train with each of these seeds, a run each: on a GPU each, or one after another'
    add('--seeds', type=flags.integer(0, below=2**32), nargs='+', default=[], metavar='SEED', help=help)
    parser.add_choice('--optim', OPTIMIZERS, default='sgd', help=_OPTIMIZER_HELP)
    beta = flags.number(minimum=0, below=1)
    _add_own(parser, 'alpha', flags.number(above=0), 'learning rate α, before the schedule')
    help = 'ρ: evaluate at w + ρ g/‖g‖ (sam, samadam), w + ρ g/s (bsam), w + ρ T²g/‖Tg‖ (asam)'
    _add_own(parser, 'rho', flags.number(minimum=0), help)
    help = 'β₁: m ← β₁m + g + δw (sgd, sam, asam, swag), m ← β₁m + (1−β₁)(g + δw) (bsam, Adam and its kin)'
    _add_own(parser, 'beta1', beta, help)
    help = 'β₂: s ← β₂s + (1−β₂)(√s|g| + γ + δ) (bsam); decay of g² (Adam and its kin) or of h (ivon)'
    _add_own(parser, 'beta2', beta, help)
    help = 'prior precision: the weight decay is δ = priorprec / N'
    _add_own(parser, 'priorprec', flags.number(minimum=0), help)
    help = 'data augmentation factor: N = training images × dafactor'
    add('--dafactor', type=flags.number(above=0), default=1.0, help=help)
    add('--batchsize', type=flags.integer(1), default=200, help='images per training step')
    add('--testbatchsize', type=flags.integer(1), default=200, help='images per batch of the test set')
    add('--epochs', type=flags.integer(0), default=180, help='epochs; as in the reference one more is run')
    help = 'epochs e with learning rate α (e+1)/warmup; then α ½(1 + cos(π (e−warmup)/(epochs+1−warmup)))'
    add('--warmup', type=flags.integer(0), default=5, help=help)
    help = 'data set; tfds/NAME is one that TensorFlow Datasets prepared in the folder of the data sets'
    parser.add_choice('--dataset', DATASETS, also='tfds/', default='cifar10', help=help)
    help = 'sub-batches m of a batch, each with a perturbation or noise of its own'
    _add_own(parser, 'batchsplit', flags.integer(1), help)
    help = 'which of the two gradients moves batch statistics'
    parser.add_choice('--bnupdate', BNUPDATES, help=help + _defaults('bnupdate'))
    help = 'train on so many of the training images, a random part that is the same for all seeds; all by default'
    add('--trainimages', type=flags.integer(1), metavar='N', help=help)
    help = 'keep this fraction of the training images out, and evaluate epochs on it instead of the test set'
    add('--validation', type=flags.number(minimum=0, below=1), default=0.0, metavar='FRACTION', help=help)
    add('--noaugment', action='store_true', help='no random crops and flips')
    parser.add_choice('--model', MODELS, default='resnet18', help='network')
    add('--datasetfolder', default='datasets', help='folder of the data sets')
    help = 'the run is kept in RESULTSFOLDER/DATASET_MODEL/OPTIM/run_K'
    add('--resultsfolder', default='results', help=help)
    help = 'devices that share batches, or the sub-batches of optimizers that have them; all that there are by default'
    add('--devices', type=flags.integer(1), help=help)
    help = 'send each batch when it is due, instead of all images at first; done anyway with images too large for that'
    add('--stream', action=argparse.BooleanOptionalAction, default=False, help=help)
    flags.add_coordinator(parser)
    help = 'what networks compute in; weights, optimizer state, statistics and loss are float32'
    parser.add_choice('--precision', PRECISIONS, default='float32', help=help)
    flags.add_compilecache(parser)
    help = 'save within epochs too, every so many steps (500) or minutes (30min); after each epoch it is done anyway'
    add('--checkpointevery', type=flags.steps_or_minutes, metavar='STEPS', help=help)
    help = 'keep the checkpoint of best accuracy in the log besides the last two; not for choosing what you report'
    add('--keepbest', action='store_true', help=help)
    add('--keepgoing', action='store_true', help='train on where the loss is not finite, instead of stopping')
    _add_own(parser, 'custominit', flags.number(above=0), 'initial precision s')
    _add_own(parser, 'damping', flags.number(minimum=0), 'damping γ of the precision')
    _add_own(parser, 'eta', flags.number(minimum=0), 'η: T = |w| + η')
    help = 'fraction of the epochs after which weights are recorded, once an epoch'
    _add_own(parser, 'swagstart', flags.number(minimum=0, below=1), help)
    _add_own(parser, 'swagrate', flags.number(above=0), 'learning rate from there on, relative to alpha')
    _add_own(parser, 'swagrank', flags.integer(2, below=1001), 'deviations that are kept for the covariance')
    _add_own(parser, 'hessinit', flags.number(above=0), 'initial Hessian h₀')
    _add_own(parser, 'clip', flags.number(above=0), 'bound of an update before the learning rate, none by default')
    _add_own(parser, 'trainmc', flags.integer(1), 'samples of the weights a sub-batch')
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


def main(argv=None):
    args = parse_args(argv)
    if args.seeds:
        values = {name: value for name, value in create_parser().given(argv).items() if name != 'seeds'}
        sys.exit(jobs.train_seeds(values, args.seeds))
    with signals.Stop() as stop, contextlib.ExitStack() as held:
        # Not before the flags are read: JAX takes most of a second, and --help and usage errors should not.
        import data
        import devices
        import models
        import runs
        import sessions

        flags.use_compilecache(args.compilecache)
        errors = data.DataError, models.ModelError, runs.RunError, devices.DeviceError
        held.enter_context(devices.ended_together('train.py', 'go on with --resume when all are back'))
        with flags.one_line_errors('train.py', *errors):
            of_start = {name: vars(args).pop(name) for name in OF_START}
            if of_start['coordinator']:
                address = of_start['coordinator'], of_start['processes'], of_start['processid']
                devices.join(*address, stops_by_step=True)
            if not devices.is_first():
                held.enter_context(contextlib.redirect_stdout(None))
            args.datasetfolder = os.path.abspath(args.datasetfolder)  # test.py may be run elsewhere
            if of_start['resume']:
                given = create_parser().given(argv)
                session = resumed(of_start['resume'], of_start['checkpoint'], given, held)
            else:
                session = sessions.begin(args, held)
        print_sizes(session, with_devices=bool(of_start['coordinator']))
        with Report(session) as report, flags.one_line_errors('train.py', sessions.DivergenceError, status=1):
            trainer = sessions.Trainer(session, stop, report)
            stop.begin()
            all_saved = trainer.run()
        exit_unless_complete(session, stop, all_saved)
        print(f'evaluate it with: python test.py --resultsfolder {session.run} --testmc 32')
    return session.run


def resumed(run, checkpoint, given, held):
    """The sessions.Session that goes on from a run's newest checkpoint, or the one named, with the flags given now."""
    import devices
    import runs
    import sessions

    config = devices.from_first(lambda: runs.read_config(run))
    if 'coordinator' in given:
        given.setdefault('devices', None)
    args = continued(flags_of(config, run), given, run)
    return sessions.resume(run, args, config, held, checkpoint)


def print_sizes(session, with_devices):
    images = session.images
    sizes = f'{len(images.train)} training and {len(images.held_out)} {session.split} images'
    if with_devices:
        sizes += f', {session.mesh.size} devices'
    print(f'{session.run}: {sizes}', flush=True)


def exit_unless_complete(session, stop, all_saved):
    """Ends the process of a run that a signal stopped, or whose end could not be saved, and says how to go on."""
    import devices

    if not all_saved:
        print(f'train.py: error: the last state or log of {session.run} could not be saved', file=sys.stderr)
        sys.exit(128 + stop.signal if stop.signal else 1)
    if stop.signal:
        if devices.is_first():
            print(f'saved; go on with: python train.py --resume {session.run}', file=sys.stderr)
        sys.exit(128 + stop.signal)


class Report:
    """Progress of a run: a bar on a terminal, a line an epoch elsewhere."""

    def __init__(self, session):
        from tqdm import tqdm

        import devices

        self.num_epochs, self.batch_size = session.args.epochs + 1, session.args.batchsize
        self.split = session.split
        self.steps = len(session.images.train) // self.batch_size
        self.steps_before = session.progress.epoch * self.steps
        total = self.num_epochs * self.steps * self.batch_size
        begun = (self.steps_before + session.progress.step) * self.batch_size
        hidden = not (sys.stderr.isatty() and devices.is_first())
        self.bar = tqdm(total=total, initial=begun, unit=' images', disable=hidden, dynamic_ncols=True)
        self.accuracy, self.refreshed = '', time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.bar.close()

    def step(self, steps_done, loss_sum):
        if self.bar.disable or time.monotonic() - self.refreshed < 1:
            return
        # Waits for the device, once a second, so that the bar tells the truth.
        self._show(steps_done, float(loss_sum) / steps_done)

    def epoch(self, record):
        self.accuracy = f', {self.split} accuracy {record[f"{self.split}_accuracy"]:.2%}'
        if self.bar.disable:
            print(
                f'epoch {record["epoch"] + 1}/{self.num_epochs}: loss {record["loss"]:.4f}{self.accuracy}, '
                f'{record["seconds"]:.1f} s, {record["images_per_second"]:.0f} images/s',
                flush=True,
            )
        else:
            self._show(self.steps, record['loss'])
        self.steps_before += self.steps

    def warn(self, message):
        self.bar.clear()
        print(f'train.py: warning: {message}', file=sys.stderr, flush=True)

    def _show(self, steps_done, loss):
        self.bar.set_postfix_str(f'loss {loss:.4f}{self.accuracy}', refresh=False)
        self.bar.update((self.steps_before + steps_done) * self.batch_size - self.bar.n)
        self.refreshed = time.monotonic()


if __name__ == '__main__':
    main()
