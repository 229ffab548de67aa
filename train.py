"""Train an image classifier with SGD, SAM or bSAM and leave a run folder for test.py.

python train.py --dataset cifar10 --model resnet18 --optim bsam --alpha 0.5 --priorprec 40 --rho 0.01 --dafactor 4
python train.py --resume results/cifar10_resnet18/bsam/run_0
"""

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path

import flags
import signals

DATASETS = ('cifar10', 'cifar100', 'tinyimagenet', 'svhn', 'mnist', 'fashion', 'digits')
MODELS = ('resnet18', 'resnet20', 'mlp', 'lenet')
OPTIMIZERS = ('sgd', 'sam', 'bsam')
PRECISIONS = ('float32', 'bfloat16')
BNUPDATES = ('both', 'first', 'second')

# Flags that may be given with --resume and another value than the run has.
MAY_CHANGE = ('epochs', 'datasetfolder', 'compilecache', 'checkpointevery', 'keepbest', 'keepgoing', 'testbatchsize')


def parse_args(argv=None):
    """The flags of the reference, with its defaults. Needs neither JAX nor the tables that it lists the names of."""
    parser = create_parser()
    args = parser.parse_args(argv)
    if args.checkpoint is not None and args.resume is None:
        parser.error('--checkpoint goes with --resume')
    if args.optim != 'sgd' and args.batchsize % args.batchsplit:
        parser.error(f'--batchsize {args.batchsize} does not divide into --batchsplit {args.batchsplit} sub-batches')
    if args.optim == 'bsam' and args.damping == args.priorprec == 0:
        parser.error('bsam needs --damping or --priorprec above 0: without both, the precision can decay to 0')
    return args


def flags_of(config, run):
    """The flags of a run from its configuration, held to the same bounds as on the command line. Raises RunError."""
    import runs

    try:
        return create_parser().from_values(config['flags'], without=('resume', 'checkpoint'))
    except (ValueError, KeyError, TypeError) as error:
        raise runs.RunError(f'{run}/config.json has flags that train.py would not take: {error}') from error


def continued(args, given, run):
    """The flags `args` of a run, with those that were given now, if they may differ. Raises RunError."""
    import runs

    given = {name: value for name, value in given.items() if name not in ('resume', 'checkpoint')}
    if 'datasetfolder' in given:
        given['datasetfolder'] = os.path.abspath(given['datasetfolder'])
    for name, value in given.items():
        held = getattr(args, name)
        if value != held and name not in MAY_CHANGE:
            raise runs.RunError(f'--{name} {value}: {run} was begun with {held}; leave it out, or begin another run')
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
    parser.add_choice('--optim', OPTIMIZERS, default='sgd', help='optimizer')
    add('--alpha', type=flags.number(above=0), default=1.0, help='learning rate α, before the schedule')
    add('--rho', type=flags.number(minimum=0), default=0.1, help='ρ: sam evaluates at w + ρ g/‖g‖, bsam at w + ρ g/s')
    beta = flags.number(minimum=0, below=1)
    add('--beta1', type=beta, default=0.9, help='β₁: m ← β₁m + g + δw (sgd, sam), m ← β₁m + (1−β₁)(g + δw) (bsam)')
    add('--beta2', type=beta, default=0.999, help='β₂: s ← β₂s + (1−β₂)(√s|g| + γ + δ) (bsam)')
    help = 'prior precision: the weight decay is δ = priorprec / N'
    add('--priorprec', type=flags.number(minimum=0), default=25.0, help=help)
    help = 'data augmentation factor: N = training images × dafactor'
    add('--dafactor', type=flags.number(above=0), default=1.0, help=help)
    add('--batchsize', type=flags.integer(1), default=200, help='images per training step')
    add('--testbatchsize', type=flags.integer(1), default=200, help='images per batch of the test set')
    add('--epochs', type=flags.integer(0), default=180, help='epochs; as in the reference one more is run')
    help = 'epochs e with learning rate α (e+1)/warmup; then α ½(1 + cos(π (e−warmup)/(epochs+1−warmup)))'
    add('--warmup', type=flags.integer(0), default=5, help=help)
    help = 'data set; tfds/NAME is one that TensorFlow Datasets prepared in the folder of the data sets'
    parser.add_choice('--dataset', DATASETS, also='tfds/', default='cifar10', help=help)
    help = 'sub-batches m of a batch, each with a perturbation of its own (sam, bsam)'
    add('--batchsplit', type=flags.integer(1), default=8, help=help)
    help = 'which of the two gradients moves batch statistics (sam, bsam)'
    parser.add_choice('--bnupdate', BNUPDATES, default='both', help=help)
    help = 'keep this fraction of the training images out, and evaluate epochs on it instead of the test set'
    add('--validation', type=flags.number(minimum=0, below=1), default=0.0, metavar='FRACTION', help=help)
    add('--noaugment', action='store_true', help='no random crops and flips')
    parser.add_choice('--model', MODELS, default='resnet18', help='network')
    add('--datasetfolder', default='datasets', help='folder of the data sets')
    help = 'the run is kept in RESULTSFOLDER/DATASET_MODEL/OPTIM/run_K'
    add('--resultsfolder', default='results', help=help)
    help = 'what networks compute in; weights, optimizer state, statistics and loss are float32'
    parser.add_choice('--precision', PRECISIONS, default='float32', help=help)
    flags.add_compilecache(parser)
    help = 'save within epochs too, every so many steps (500) or minutes (30min); after each epoch it is done anyway'
    add('--checkpointevery', type=flags.steps_or_minutes, metavar='STEPS', help=help)
    help = 'keep the checkpoint of best test accuracy besides the last two; not for choosing what you report'
    add('--keepbest', action='store_true', help=help)
    add('--keepgoing', action='store_true', help='train on where the loss is not finite, instead of stopping')
    add('--custominit', type=flags.number(above=0), default=1.0, help='initial precision s (bsam)')
    add('--damping', type=flags.number(minimum=0), default=0.1, help='damping γ of the precision (bsam)')
    return parser


def main(argv=None):
    args = parse_args(argv)
    with signals.Stop() as stop, contextlib.ExitStack() as held:
        # Not before the flags are read: JAX takes most of a second, and --help and usage errors should not.
        import data
        import models
        import runs
        import sessions

        flags.use_compilecache(args.compilecache)
        with flags.one_line_errors('train.py', data.DataError, models.ModelError, runs.RunError):
            run, step = args.resume, args.checkpoint
            del args.resume, args.checkpoint
            args.datasetfolder = os.path.abspath(args.datasetfolder)  # test.py may be run elsewhere
            if run:
                config = runs.read_config(run)
                args = continued(flags_of(config, run), create_parser().given(argv), run)
                session = sessions.resume(run, args, config, held, step)
            else:
                session = sessions.begin(args, held)
        images = session.images
        sizes = f'{len(images.train)} training and {len(images.held_out)} {session.split} images'
        print(f'{session.run}: {sizes}', flush=True)
        with Report(session) as report, flags.one_line_errors('train.py', sessions.DivergenceError, status=1):
            trainer = sessions.Trainer(session, stop, report)
            stop.begin()
            all_saved = trainer.run()
    if not all_saved:
        print(f'train.py: error: the last state or log of {session.run} could not be saved', file=sys.stderr)
        sys.exit(128 + stop.signal if stop.signal else 1)
    if stop.signal:
        print(f'saved; go on with: python train.py --resume {session.run}', file=sys.stderr)
        sys.exit(128 + stop.signal)
    print(f'evaluate it with: python test.py --resultsfolder {session.run} --testmc 32')
    return session.run


class Report:
    """Progress of a run: a bar on a terminal, a line an epoch elsewhere."""

    def __init__(self, session):
        from tqdm import tqdm

        self.num_epochs, self.batch_size = session.args.epochs + 1, session.args.batchsize
        self.split = session.split
        self.steps = len(session.images.train) // self.batch_size
        self.steps_before = session.progress.epoch * self.steps
        total = self.num_epochs * self.steps * self.batch_size
        begun = (self.steps_before + session.progress.step) * self.batch_size
        hidden = not sys.stderr.isatty()
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
