"""A run in this process: begun or resumed, its epochs with their checkpoints, evaluation and log."""

import argparse
import collections
import itertools
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import data
import errors
import experiments
import feeds
import metrics
import training
from ops import sharding
from runs import checkpoints, devices, folders, hosts, provenance


class DivergenceError(errors.UserError):
    """A run whose loss or weights are no longer finite."""

    status = 1


class Images(NamedTuple):
    """What is trained on, and what epochs are evaluated on: uint8 [N, H, W, C] and int32 [N]."""

    train: Any
    train_labels: Any
    held_out: Any
    held_out_labels: Any


class Session(NamedTuple):
    """A run and all that it needs."""

    run: Path
    args: argparse.Namespace
    mesh: jax.sharding.Mesh
    experiment: experiments.Experiment
    images: Images
    augmented: bool
    state: Any
    progress: checkpoints.Progress

    @property
    def split(self):
        """What epochs are evaluated on, 'test' or 'validation'."""
        return 'validation' if self.args.validation else 'test'


def begin(args, held):
    """A Session of a new run folder, which is locked while `held`, a contextlib.ExitStack, lasts.

    Raises DataError, DeviceError, ModelError and RunError.
    """
    mesh = create_mesh(args)
    if hosts.is_first():
        folders.require_place(args.resultsfolder, args.dataset, args.model, args.optim)
    config, augmented, images = _read(args)
    experiment = experiments.create(config)
    state = jax.jit(experiment.init)(experiments.keys(args.randomseed).init)

    def create():
        run = folders.create(args.resultsfolder, args.dataset, args.model, args.optim)
        held.enter_context(folders.locked(run))
        folders.write_config(run, config | {'num_data': experiment.num_data} | provenance.environment())
        return str(run)

    run = Path(hosts.from_first(create))
    return Session(run, args, mesh, experiment, images, augmented, state, checkpoints.Progress())


def resume(run, args, before, held, step=None):
    """A Session that goes on from a run's newest checkpoint, or that of `step`; locked as by `begin`.

    before: the run's configuration; args may have other paths and other epochs.
    Raises DataError, DeviceError, ModelError and RunError.
    """
    if hosts.is_first():
        held.enter_context(folders.locked(run))
    mesh = create_mesh(args, flags_hold=True)
    _require_same_precision(run, before)
    data.check_description(before.get('dataset'), Path(run) / 'config.json')
    config, augmented, images = _read(args)
    data.require_same(config['dataset'], before['dataset'], args.datasetfolder, run)
    experiment = experiments.create(config)
    _, state, progress = checkpoints.restore(run, experiment.state_shapes(), step)
    least = progress.epoch if step is None else before['flags']['epochs']  # later checkpoints may be there
    if args.epochs < least:
        raise folders.RunError(f'--epochs {args.epochs} is too few to go on with {run}: take {least} or more')
    if hosts.is_first():
        folders.write_config(run, before | config)
        folders.write_log(run, progress.log)
    return Session(run, args, mesh, experiment, images, augmented, state, progress)


def _require_same_precision(run, before):
    """Raises a RunError if matrices are multiplied in another precision than before. Warns of other XLA_FLAGS.

    before: the run's configuration; one from before these were recorded is taken for the same.
    """
    now = provenance.environment()
    precision, flags = before.get('matmul_precision'), before.get('xla_flags', now['xla_flags'])
    if 'matmul_precision' in before and precision != now['matmul_precision']:
        begun, given = precision or 'unset', now['matmul_precision'] or 'unset'
        raise folders.RunError(f'JAX_DEFAULT_MATMUL_PRECISION is {given}, and {run} was begun with {begun}: set it so')
    if flags != now['xla_flags'] and hosts.is_first():
        what = f'XLA_FLAGS is {now["xla_flags"]!r}, and {run} was begun with {flags!r}'
        print(f'train.py: warning: {errors.printable(what)}: numbers may differ by rounding', file=sys.stderr)


def create_mesh(args, flags_hold=False):
    """The mesh of devices, if each of them can have an equal share of a batch. Raises DeviceError.

    flags_hold: the run is resumed, so that no other flags are offered than those of devices.
    """
    mesh = devices.create_mesh(args.devices)
    if isinstance(args.checkpointevery, str) and jax.process_count() > 1:
        raise devices.DeviceError(f'--checkpointevery {args.checkpointevery}: of several processes, give steps')
    what, number = ('--batchsize', args.batchsize) if args.batchsplit is None else ('--batchsplit', args.batchsplit)
    if number * (args.trainmc or 1) % mesh.size:
        offers = [] if flags_hold else _shareable(args.batchsize, args.batchsplit, mesh.size)
        raise devices.unequal_shares(what, number, offers, mesh)
    return mesh


def _shareable(batch_size, batchsplit, num_devices):
    """Flags with the nearest batches that so many devices can share, or sub-batches of optimizers that have them."""
    multiples = range(num_devices, batch_size + num_devices + 1, num_devices)
    if batchsplit is None:
        return [f'--batchsize {size}' for size in _nearest(batch_size, multiples)]
    splits = [n for n in multiples if batch_size % n == 0]
    if splits:
        return [f'--batchsplit {split}' for split in _nearest(batchsplit, splits)]
    offers = []
    for size in _nearest(batch_size, multiples):
        split = min((n for n in multiples if size % n == 0), key=lambda n: abs(n - batchsplit))
        offers.append(f'--batchsize {size} --batchsplit {split}')
    return offers


def _nearest(number, possible):
    """The nearest of the possible numbers, which rise, below and above a number that is none of them."""
    return [n for n in possible if n < number][-1:] + [n for n in possible if n > number][:1]


def _read(args):
    """A run's configuration, whether its images are augmented, and its images."""
    dataset = data.dataset(args.dataset, args.datasetfolder)
    train, held_out = data.read_train(dataset, vars(args))
    images = Images(*train, *(held_out or dataset.read('test')))
    if args.batchsize > len(images.train):
        raise data.DataError(f'--batchsize {args.batchsize} exceeds the {len(images.train)} training images')
    config = {'flags': vars(args), 'dataset': data.describe(dataset, images.train, images.train_labels)}
    trained = {name: value for name, value in vars(args).items() if not name.endswith(('folder', 'cache'))}
    hosts.require_same({'flags': trained, 'data set': config['dataset']})
    some = images.train[:: len(images.train) // 16 + 1]
    hosts.require_same_arrays('images', some, images.train_labels, images.held_out_labels)
    return config, dataset.augment and not args.noaugment, images


class Trainer:
    """The epochs of a session. `stop.signal` ends them early; a report has step, epoch and warn."""

    def __init__(self, session, stop, report):
        self.session, self.stop, self.report = session, stop, report
        self.args, self.experiment = session.args, session.experiment
        images = session.images
        self.feed = feeds.create(images.train, images.train_labels, session.mesh, self.args.stream)
        self.data_key = sharding.replicate(experiments.keys(self.args.randomseed).batches, session.mesh)
        with jax.set_mesh(session.mesh):
            self.held_out = feeds.parts(images.held_out, self.args.testbatchsize, self.args.stream)
        self.steps = len(images.train) // self.args.batchsize
        optimizer, normalise = self.experiment.optimizer, self.experiment.normalise
        self.step = training.step_function(optimizer, normalise, session.augmented, self.feed.choose)
        self.stopped = self.log_failed = False
        self.calls = itertools.count(1)

    def run(self):
        """Returns whether the last state and the log are on the disk. Raises DivergenceError, unless --keepgoing."""
        run, progress = self.session.run, self.session.progress
        writer = checkpoints.Writer(run, self.steps, progress, self.args.keepbest, self.report.warn)
        with jax.set_mesh(self.session.mesh), writer:
            try:
                progress = self._take_epochs(writer)
            except DivergenceError:
                writer.wait()  # in all processes, as all of them diverge
                raise
        if self.log_failed:  # as long as a checkpoint was being written, the disk may have been fuller than it is now
            self._write_log(progress.log)
        return hosts.from_first(lambda: not (writer.failed or self.log_failed))

    def _take_epochs(self, writer):
        """Returns the progress up to the last epoch or a signal."""
        state, progress = sharding.replicate(self.session.state, self.session.mesh), self.session.progress
        while progress.epoch <= self.args.epochs and not self.stopped:
            state, progress = self._take_steps(state, progress, writer)
            if self.stopped:
                break
            record = self._evaluate(state, progress)
            progress = checkpoints.Progress(progress.epoch + 1, log=(*progress.log, record))
            self._write_log(progress.log)
            self.report.epoch(record)
        return progress

    def _take_steps(self, state, progress, writer):
        """The steps that are left of an epoch, or those up to a signal; saves the state where they end."""
        if progress.lr_factor is None:
            lr_factor = experiments.lr_factor(vars(self.args), progress.epoch)
            progress = progress._replace(lr_factor=lr_factor)
        began = time.perf_counter() - progress.seconds
        epoch, lr_factor = self._start_epoch(progress)
        due = _Due(self.args.checkpointevery)
        in_flight = collections.deque()
        batches = self.feed.of_epoch(epoch, progress.step)
        for done, batch in enumerate(batches, start=progress.step + 1):
            state, epoch, loss = self.step(state, epoch, *batch, lr_factor)
            in_flight.append((done, loss))
            if len(in_flight) > 2:
                self._check_loss(progress, *in_flight.popleft())
            self.report.step(done, epoch.loss)
            self.stopped = hosts.reached_stop(self.stop, next(self.calls))
            if done == self.steps or self.stopped or due(done):
                while in_flight:
                    self._check_loss(progress, *in_flight.popleft())
                self._check_state(progress, done, state)
                loss = float(jax.device_get(epoch.loss))
                progress = progress._replace(step=done, loss=loss, seconds=time.perf_counter() - began)
                writer.save(state, progress)
            if self.stopped:
                break
        return state, progress

    def _check_loss(self, progress, step, loss):
        """Waits for the loss of an earlier step, so that at most two steps are under way when a signal comes."""
        loss = float(jax.device_get(loss))
        if not math.isfinite(loss):
            self._diverged(progress, step, f'the loss is {loss}')

    def _check_state(self, progress, step, state):
        """A finite loss can leave weights behind that are not."""
        if not jax.device_get(training.all_finite(state)):
            self._diverged(progress, step, 'weights or optimizer state are not finite')

    def _diverged(self, progress, step, what):
        if self.args.keepgoing:
            return
        saved = 'checkpoints before it stay' if progress.epoch or progress.step else 'there is no checkpoint'
        smaller = '--alpha' if self.args.rho is None else '--alpha or --rho'
        raise DivergenceError(
            f'{what} after step {progress.epoch * self.steps + step} (epoch {progress.epoch + 1}), learning rate '
            f'{self.args.alpha * progress.lr_factor:g}: try a run with a smaller {smaller}, or more --warmup; '
            f'{saved} in {self.session.run}; --keepgoing trains on all the same'
        )

    def _start_epoch(self, progress):
        """The epoch on the device, as it was after progress.step steps, and its lr_factor there."""
        numbers = {
            'epoch': np.int32(progress.epoch),
            'step': np.int32(progress.step),
            'loss': np.float32(progress.loss),
            'lr_factor': np.float32(progress.lr_factor),
        }
        sent = sharding.replicate(numbers, self.session.mesh)
        num_images = len(self.session.images.train)
        epoch = training.start_epoch(self.data_key, sent['epoch'], num_images, self.args.batchsize)
        return epoch._replace(step=sent['step'], loss=sent['loss']), sent['lr_factor']

    def _evaluate(self, state, progress):
        """The log's record of an epoch."""
        probs = self.experiment.probs(state.params, state.batch_stats, self.held_out, self.args.testbatchsize)
        return {
            'epoch': progress.epoch,
            'loss': progress.loss / self.steps,
            f'{self.session.split}_accuracy': metrics.accuracy(probs, self.session.images.held_out_labels),
            'learning_rate': self.args.alpha * progress.lr_factor,
            'seconds': round(progress.seconds, 3),
            'images_per_second': round(self.steps * self.args.batchsize / progress.seconds, 1),
        }

    def _write_log(self, log):
        if not hosts.is_first():
            return
        try:
            folders.write_log(self.session.run, log)
            self.log_failed = False
        except folders.RunError as error:
            if not self.log_failed:
                self.report.warn(f'{error}; training goes on, and the log is tried again after the next epoch')
            self.log_failed = True


class _Due:
    """Whether it is time for a checkpoint within an epoch: every so many steps, or minutes ('30min'), or never."""

    def __init__(self, every):
        self.steps = every if isinstance(every, int) else None
        self.seconds = 60 * float(every.removesuffix('min')) if isinstance(every, str) else None
        self.last = time.monotonic()

    def __call__(self, steps_done):
        if self.steps is not None:
            return steps_done % self.steps == 0
        if self.seconds is None or time.monotonic() - self.last < self.seconds:
            return False
        self.last = time.monotonic()
        return True
