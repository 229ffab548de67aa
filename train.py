"""Train an image classifier with SGD, SAM, bSAM or a related optimizer, and leave a run folder for test.py.

python train.py --dataset cifar10 --model resnet18 --optim bsam --alpha 0.5 --priorprec 40 --rho 0.01 --dafactor 4
python train.py --resume results/cifar10_resnet18/bsam/run_0
"""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))  # PYTHONSAFEPATH=1 leaves this folder out

from runs import launch

# isort: split
import argparse
import collections
import contextlib
import math
import shlex
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import data
import errors
import experiment
import metrics
from evaluation import posteriors, trained
from ops import sharding
from readers import python_files
from runs import checkpoints, devices, folders, hosts, processes, provenance, signals, training_flags
from runs.report import Report

LESS_MEMORY = '--stream, --atonce 1, a smaller --batchsize or --precision bfloat16 need less'


class DivergenceError(errors.UserError):
    """Raised when the loss or the weights of a run are no longer finite."""

    status = 1


@launch.script('train.py')
def main(argv: list[str] | None = None) -> Path:
    args, given = training_flags.parse(argv)
    if args.seeds:
        sys.exit(processes.train_seeds({name: given[name] for name in given if name != 'seeds'}, args.seeds))
    launch.use_compilecache(args.compilecache)
    start = argparse.Namespace(**{name: vars(args).pop(name) for name in training_flags.OF_START})
    python_files.allow(start.code)
    if not start.resume:
        python_files.allow(python_files.files_of((args.dataset, args.model)))
    advice = {'after_an_end': 'resume with --resume in all processes', 'less_memory': LESS_MEMORY}
    with signals.Stop() as stop, hosts.joined('train.py', start, **advice, stops_by_step=True) as stack:
        args.datasetfolder = os.path.abspath(args.datasetfolder)  # test.py may be run elsewhere
        if start.resume:
            given['compilecache'] = (
                args.compilecache
            )  # never the run's own folder, because its machine code is executed
            training = resume(start.resume, start.checkpoint, given, stack)
        else:
            training = begin(args, stack)
        announce(training)
        if hosts.is_first() and not start.resume:
            for warning in training_flags.poor_settings(args, given):
                print(f'train.py: warning: {warning}', file=sys.stderr)
        with contextlib.closing(Report(training)) as report:
            stop.begin()
            all_saved = train(training, stop, report)
        exit_unless_complete(training, stop, all_saved)
        samples = '' if training.experiment.optimizer.is_point else ' --testmc 32'
        run, code = shlex.quote(str(training.run)), training_flags.code_of(vars(training.args))
        print(f'evaluate it with: python test.py --resultsfolder {run}{samples} {shlex.join(code)}'.rstrip())
    return training.run


class Training(NamedTuple):
    """A run that is ready to train.

    Attributes:
        run: the run folder.
        args: the flags of the run.
        mesh: the devices.
        experiment: the network, loss, optimizer and step.
        train: training images uint8 [N, H, W, C] and labels int32 [N].
        evaluated: images and labels on which every epoch is evaluated, of the same types.
        augmented: whether training images are cropped and flipped at random.
        state: the state of the optimizer.
        progress: the epoch and step that `state` has reached.
    """

    run: Path
    args: argparse.Namespace
    mesh: jax.sharding.Mesh
    experiment: experiment.Experiment
    train: tuple[np.ndarray, np.ndarray]
    evaluated: tuple[np.ndarray, np.ndarray]
    augmented: bool
    state: Any
    progress: checkpoints.Progress

    @property
    def split(self) -> str:
        """Returns the name of the images on which epochs are evaluated: 'test' or 'validation'."""
        return 'validation' if self.args.validation else 'test'

    @property
    def steps(self) -> int:
        """Returns the number of steps per epoch."""
        return len(self.train[0]) // self.args.batchsize


def train(training: Training, stop: signals.Stop, report: Report) -> bool:
    """Trains for the remaining epochs, or until a signal. Returns whether the last state and the log are saved.

    Raises DivergenceError, unless --keepgoing.
    """
    args, step = training.args, training.experiment.step
    state, progress = sharding.replicate(training.state, training.mesh), training.progress
    log = folders.Log(training.run, report.warn)
    writer = checkpoints.Writer(training.run, training.steps, progress, args.keepbest, report.warn)
    with jax.set_mesh(training.mesh), contextlib.closing(writer):
        feed = data.Feed(
            *training.train, args.batchsize, experiment.keys(args.randomseed).batches, training.mesh,
            training.experiment.normalise, augmented=training.augmented,
            streamed=args.stream or hosts.must_stream(training.train[0]), with_seeds=training.experiment.has_dropout,
        )  # fmt: skip
        evaluated = posteriors.parts(training.evaluated[0], args.testbatchsize, args.stream)
        stopped = False
        while progress.epoch <= args.epochs and not stopped:  # epochs + 1 epochs, as in the published scripts
            epoch = Epoch(training, progress, writer)
            for batch in feed.batches(progress.epoch, progress.step):
                state, loss = step(state, batch, epoch.lr_factor)
                epoch.add(loss)
                report.step(epoch.done, epoch.mean_loss)
                stopped = hosts.reached_stop(stop)
                if epoch.done == training.steps or stopped or epoch.due(epoch.done):
                    progress = epoch.checked_progress(state)
                    writer.save(state, progress)
                if stopped:
                    break
            else:
                record = evaluate(training, state, progress, evaluated)
                progress = checkpoints.Progress(progress.epoch + 1, log=(*progress.log, record))
                log.write(progress.log)
                report.epoch(record)
    if log.failed:  # tries once more, because an unfinished checkpoint may have filled the disk
        log.write(progress.log)
    return hosts.from_first(lambda: not (writer.failed or log.failed))


class Epoch:
    """The current epoch: its learning rate, its time, and the losses of its steps. Devices may still compute losses."""

    def __init__(self, training: Training, progress: checkpoints.Progress, writer: checkpoints.Writer) -> None:
        if progress.lr_factor is None:
            progress = progress._replace(lr_factor=experiment.lr_factor_of(vars(training.args), progress.epoch))
        self._training, self._progress, self._writer = training, progress, writer
        self._began = time.perf_counter() - progress.seconds
        self._in_flight = collections.deque()
        self.lr_factor = sharding.replicate(np.float32(progress.lr_factor), training.mesh)
        self.due = checkpoints.Due(training.args.checkpointevery)
        self.done, self.loss = progress.step, progress.loss

    @property
    def mean_loss(self) -> float:
        """Returns the mean loss of the steps that have finished."""
        return self.loss / max(1, self.done - len(self._in_flight))

    def add(self, loss: jax.Array) -> None:
        """Records a step. Waits for an earlier loss if more than two steps are in flight, so that a stop is quick."""
        self.done += 1
        self._in_flight.append((self.done, loss))
        if len(self._in_flight) > 2:
            self._take_loss()

    def checked_progress(self, state: Any) -> checkpoints.Progress:
        """Waits for all steps and returns the progress after them. Raises DivergenceError, unless --keepgoing."""
        while self._in_flight:
            self._take_loss()
        if not jax.device_get(experiment.all_finite(state)):  # weights can overflow after a finite loss
            self._diverged(self.done, 'weights or optimizer state are not finite')
        seconds = time.perf_counter() - self._began
        return self._progress._replace(step=self.done, loss=self.loss, seconds=seconds)

    def _take_loss(self):
        step, loss = self._in_flight.popleft()
        loss = float(jax.device_get(loss))
        self.loss += loss
        if not math.isfinite(loss):
            self._diverged(step, f'the loss is {loss}')

    def _diverged(self, step, what):
        args, progress = self._training.args, self._progress
        if args.keepgoing:
            return
        self._writer.wait()  # until the last checkpoint is on the disk
        has_saved = checkpoints.all_steps(self._training.run / 'checkpoints')
        saved = 'earlier checkpoints remain' if has_saved else 'there is no checkpoint'
        smaller = '--alpha' if args.rho is None else '--alpha or --rho'
        raise DivergenceError(
            f'{what} after step {progress.epoch * self._training.steps + step} (epoch {progress.epoch + 1}), learning '
            f'rate {args.alpha * progress.lr_factor:g}: try a run with a smaller {smaller}, or more --warmup; '
            f'{saved} in {self._training.run}; --keepgoing continues in spite of it'
        )


def evaluate(training: Training, state: Any, progress: checkpoints.Progress, evaluated: list) -> dict:
    """Evaluates an epoch at the posterior mean. Returns the epoch's record for the log."""
    args = training.args
    apply, params, batch_stats = training.experiment.apply, state.params, state.batch_stats
    probs = posteriors.probs_at(apply, params, batch_stats, evaluated, args.testbatchsize)
    labels, calibration = training.evaluated[1], {}
    if args.logcalibration:
        calibration = {
            f'{training.split}_nll': metrics.nll(probs, labels),
            f'{training.split}_ece': metrics.ece(probs, labels),
        }
    return {
        'epoch': progress.epoch,
        'loss': progress.loss / training.steps,
        f'{training.split}_accuracy': metrics.accuracy(probs, labels),
        **calibration,
        'learning_rate': args.alpha * progress.lr_factor,
        'seconds': round(progress.seconds, 3),
        'images_per_second': round(training.steps * args.batchsize / progress.seconds, 1),
    }


def begin(args: argparse.Namespace, stack: contextlib.ExitStack) -> Training:
    """Creates a run folder, locks it until `stack` is closed, and returns its Training.

    Raises DataError, DeviceError, ModelError and RunError.
    """
    mesh = devices.mesh_of_training(args)
    if hosts.is_first():
        folders.require_place(args.resultsfolder, args.dataset, args.model, args.optim)
    config, augmented, *images = configure(args)
    functions = experiment.create(config)
    weights = trained.initial_weights(args.init, functions, config['dataset']) if args.init else {}
    state = jax.jit(functions.init)(experiment.keys(args.randomseed).init, weights)

    def create():
        run = folders.create(args.resultsfolder, args.dataset, args.model, args.optim)
        stack.enter_context(folders.locked(run))
        folders.write_config(run, config | {'num_data': functions.num_data} | provenance.environment())
        return str(run)

    run = Path(hosts.from_first(create))
    return Training(run, args, mesh, functions, *images, augmented, state, checkpoints.Progress())


def resume(run: Path, step: int | None, given: dict, stack: contextlib.ExitStack) -> Training:
    """Restores a run, locks its folder until `stack` is closed, and returns its Training.

    Args:
        run: the run folder.
        step: the checkpoint to restore, None for the newest.
        given: {name: value} of the flags that replace the run's own, such as other paths or other epochs.
        stack: holds the lock.

    Raises:
        DataError, DeviceError, ModelError, RunError.
    """
    before = hosts.from_first(lambda: training_flags.checked_config(run))
    if 'coordinator' in given:
        given.setdefault('devices', None)
    args = training_flags.continued(argparse.Namespace(**before['flags']), given, run)
    hosts.from_first(lambda: checkpoints.folder_of(run, step).name)
    if hosts.is_first():
        stack.enter_context(folders.locked(run))
    mesh = devices.mesh_of_training(args, flags_hold=True)
    provenance.require_same_precision(run, before)
    config, augmented, *images = configure(args)
    data.require_images_of_run(config['dataset'], before['dataset'], args.datasetfolder, run)
    functions = experiment.create(config)
    _, state, progress = checkpoints.restore(run, functions.state_shapes(), step)
    # A run that is shortened at an older checkpoint would leave later checkpoints behind.
    least = progress.epoch if step is None else before['flags']['epochs']
    if args.epochs < least:
        raise folders.RunError(f'--epochs {args.epochs} is too few to resume {run}: use {least} or more')
    if hosts.is_first():
        folders.write_config(run, before | config)
        folders.write_log(run, progress.log)
    return Training(run, args, mesh, functions, *images, augmented, state, progress)


def configure(args: argparse.Namespace) -> tuple[dict, bool, tuple, tuple]:
    """Reads the images of a run. Returns (configuration, augmented, train, evaluated), see `Training`.

    Raises DataError and DeviceError.
    """
    dataset = data.dataset(args.dataset, args.datasetfolder, args.imagesize)
    train, held_out = data.read_train(dataset, vars(args))
    evaluated = held_out or dataset.read('test')
    images, labels = train
    if args.batchsize > len(images):
        raise data.DataError(f'--batchsize {args.batchsize} exceeds the {len(images)} training images')
    data.require_shape(evaluated[0], 'validation' if held_out else 'test', images.shape[1:])
    config = {'flags': vars(args), 'dataset': data.describe(dataset, images, labels)}
    same = {name: value for name, value in vars(args).items() if not name.endswith(('folder', 'cache'))}
    hosts.require_same({'flags': same, 'data set': config['dataset']})
    some = images[:: len(images) // 16 + 1]  # about 16, because to compare all images would take long
    hosts.require_same_arrays('images', some, labels, evaluated[1])
    return config, dataset.augment and not args.noaugment, train, evaluated


def announce(training: Training) -> None:
    """Prints what is about to run."""
    args, optim = training.args, training.args.optim
    images, evaluated = len(training.train[0]), len(training.evaluated[0])
    shape = '×'.join(map(str, training.train[0].shape[1:]))
    weights = sum(leaf.size for leaf in jax.tree.leaves(training.state.params))
    flags = [(f'--{row.name}', getattr(args, row.name)) for row in training_flags.rows_of(optim)]
    flags = ' '.join(f'{name} {value}' for name, value in flags if value is not None)
    device = training.mesh.devices.flat[0]
    epoch, step = training.progress.epoch, training.progress.step
    resumed = f'; resumed in epoch {epoch + 1} after step {step}' if epoch or step else ''
    what_next = 'compiling the first step, which can take a minute'
    if (epoch, step) == (args.epochs, training.steps):
        what_next = 'training is complete: only the last epoch is evaluated again'
    print(
        f'{training.run}: {images} training and {evaluated} {training.split} images\n'
        f'  network    {folders.short_name(args.model)}, {weights:,} weights, {args.precision}; '
        f'{folders.short_name(args.dataset)} images {shape}{", augmented" if training.augmented else ""}\n'
        f'  optimizer  {optim} {flags}, N = {training.experiment.num_data:,.0f}\n'
        f'  training   {args.epochs + 1} epochs of {training.steps} steps, {args.batchsize} images per step{resumed}\n'
        f'  devices    {training.mesh.size} × {device.device_kind}\n{what_next}',
        flush=True,
    )


def exit_unless_complete(training: Training, stop: signals.Stop, all_saved: bool) -> None:
    """Exits with an error status if a signal stopped the run or its end could not be saved.

    After a signal, prints the command that resumes the run.
    """
    if not all_saved:
        print(f'train.py: error: the last state or log of {training.run} could not be saved', file=sys.stderr)
        sys.exit(128 + stop.signal if stop.signal else 1)
    if stop.signal:
        if hosts.is_first():
            resume = ['--resume', str(training.run), *training_flags.code_of(vars(training.args))]
            print(f'saved; resume with: python train.py {shlex.join(resume)}', file=sys.stderr)
        sys.exit(128 + stop.signal)


if __name__ == '__main__':
    main()
