"""Checkpoints of a run: written whole or not at all, and checked when they are read.

    RUN/checkpoints/STEP/       after STEP training steps
        state/                  weights and the optimizer's other arrays (Orbax)
        progress.json           how far training was, and its log up to there
        checksums.json          SHA-256 of the other files

A checkpoint is written under another name, read back, flushed to the disk and renamed, so a run that is killed at any
moment leaves whole ones only. A process that reads one keeps a lock on it, so that the process that trains does not
remove it meanwhile.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import errors
from ops import sharding
from runs import folders, hosts, json_files

logging.getLogger('absl').setLevel(logging.CRITICAL)  # Orbax logs what it also raises, with tracebacks


class Progress(NamedTuple):
    """How far training is: in epoch `epoch` (from 0) `step` steps are done, in `seconds`, with `loss` as their sum.

    `lr_factor` is the epoch's, once it has begun; `log` holds the records of the epochs before, as in log.jsonl.
    """

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    lr_factor: float | None = None
    log: tuple = ()

    def trained(self) -> dict:
        """Returns what metrics.json says of a run that has come so far."""
        return {'epoch': self.epoch, 'steps_of_epoch': self.step}


class Writer:
    """Saves the checkpoints of a run in the background, one at a time; a context manager that waits for the last.

    The newest two are kept, and with `keep_best` the checkpoint of the epoch of best accuracy. Checkpoints later than
    `progress`, from which training resumes, are removed when the first new one is there. A failure is reported once and
    the next checkpoint is another try. `failed` tells whether the last try failed.

    All processes of a run make a Writer. The first one writes, because the state is the same in every process.
    """

    def __init__(
        self, run: Path, steps_per_epoch: int, progress: Progress, keep_best: bool, warn: Callable[[str], None]
    ) -> None:
        self.folder = Path(run).absolute() / 'checkpoints'
        self.steps_per_epoch, self.keep_best, self.warn, self.failed = steps_per_epoch, keep_best, warn, False
        with _literal(self.folder):  # raises a RunError now, and not when the first is written
            self._steps = []
        if hosts.is_first():
            _discard_leftovers(self.folder)
            self._steps = [step for step in all_steps(self.folder) if step <= self._step(progress)]
        self._saving = None
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> 'Writer':
        return self

    def __exit__(self, *exception: object) -> None:
        self.wait()
        self._thread.shutdown()

    def save(self, state: Any, progress: Progress) -> None:
        """Copies a state, so that it may be donated at once. The first process writes it while training goes on."""
        self.wait()
        copied = _copy(state)  # in all processes, because they have to run the same programs
        if hosts.is_first():
            self._saving = self._thread.submit(self._write, copied, progress)

    def wait(self) -> None:
        """Waits until the last save has ended. Warns if it failed and the save before had not."""
        if self._saving is None:
            return
        error, self._saving = self._saving.exception(), None
        if error and not self.failed:
            what = f'a checkpoint could not be saved in {self.folder} ({errors.reason(error)})'
            self.warn(f'{what}; training goes on to the next one')
        self.failed = error is not None

    def _write(self, state, progress):
        arrays = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), state)
        partial = self.folder / f'{self._step(progress)}.partial'
        try:
            self.folder.mkdir(exist_ok=True)
            _discard_leftovers(self.folder)
            partial.mkdir()
            _require_room(partial, arrays)
            with _checkpointer() as checkpointer, _literal(partial) as folder:
                checkpointer.save(folder / 'state', args=ocp.args.StandardSave(arrays))
            _require_same_arrays(_held_arrays(partial), arrays)
            self._complete(partial, progress)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _complete(self, partial, progress):
        (partial / 'progress.json').write_text(json.dumps(json_files.finite(progress._asdict())))
        (partial / 'checksums.json').write_text(json.dumps(_checksums(partial), indent=0))
        _flush(partial)
        checkpoint = partial.with_suffix('')
        if checkpoint.exists():  # a resumed run saves the same step again
            _discard(checkpoint)
        os.replace(partial, checkpoint)
        errors.flush(self.folder)
        steps = [*self._steps, int(checkpoint.name)]
        self._steps = sorted({*steps[-2:], *self._best(progress.log, steps)})
        for old in set(all_steps(self.folder)) - set(self._steps):
            with _locked(self.folder / str(old), fcntl.LOCK_EX | fcntl.LOCK_NB) as is_free:
                if is_free:  # else it is tried again at the next save
                    _discard(self.folder / str(old))

    def _step(self, progress):
        return progress.epoch * self.steps_per_epoch + progress.step

    def _best(self, log, steps):
        """The step of the epoch of best accuracy, of those that have a checkpoint, in a list; empty without any."""
        accuracies = {(record['epoch'] + 1) * self.steps_per_epoch: _accuracy(record) for record in log}
        held = [step for step in accuracies if step in steps] if self.keep_best else []
        return [max(held, key=accuracies.get)] if held else []


class Due:
    """Whether it is time for a checkpoint within an epoch: every N steps, or every N minutes ('30min'), or never."""

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


@contextlib.contextmanager
def _literal(folder):
    """Yields a path of a folder that Orbax takes literally: it globs paths, and TensorStore wants them in UTF-8."""
    if _is_literal(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix='bayesian-sam-', dir=_literal_place(folder)) as beside:
        link = Path(beside) / folder.name
        link.symlink_to(folder)
        yield link


def _is_literal(path):
    return re.fullmatch(r'[\w/.,:+=@%~ -]+', str(path))


def _literal_place(folder):
    """Returns a folder for temporary links that Orbax takes literally. Raises folders.RunError."""
    for place in (os.environ.get('TMPDIR', '/tmp'), '/tmp', '/var/tmp'):
        if _is_literal(place) and os.access(place, os.W_OK | os.X_OK):
            return place
    raise folders.RunError(
        f'checkpoints cannot be kept in {folder}: Orbax does not take its path, and no link to it can be made in /tmp: '
        'take another --resultsfolder'
    )


@contextlib.contextmanager
def _locked(checkpoint, how):
    """Locks a checkpoint until the context ends, where the file system has locks. Yields whether it is there and free.

    how: fcntl.LOCK_SH to read it, fcntl.LOCK_EX | fcntl.LOCK_NB to remove it.
    """
    try:
        file = errors.opened(checkpoint / 'checksums.json')
    except OSError:
        yield False  # it is none of ours, or damaged
        return
    with file:
        try:
            fcntl.flock(file, how)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        yield checkpoint.exists()


def _checkpointer():
    """Returns a checkpointer of Orbax for the first process."""
    options = ocp.options.MultiprocessingOptions(active_processes={0})
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _accuracy(record):
    """An epoch's accuracy, the lowest of all if it is no number, as after a divergence."""
    accuracy = record['validation_accuracy'] if 'validation_accuracy' in record else record['test_accuracy']
    return -1.0 if accuracy is None or math.isnan(accuracy) else accuracy


def _require_room(folder, state):
    """Raises the OSError of a full disk, a quota or a limit of file sizes; Orbax would not report it in one line."""
    if not hasattr(os, 'posix_fallocate'):
        return
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes + num_bytes // 20 + (1 << 18))
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # as some network shares answer
                raise


@jax.jit
def _copy(state):
    return jax.tree.map(lambda x: jnp.copy(sharding.key_data(x)), state)


def all_steps(folder):
    """The steps of the checkpoints in a folder `checkpoints`, which need not be there, the newest last."""
    folder = Path(folder)
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch('0|[1-9][0-9]*', name))


def restore(run, like, step=None):
    """A checkpoint, the newest or that of `step`, as (step, state, Progress).

    Of several processes the first alone reads it. The state's arrays are on this machine's first device, of several
    processes on the host. like: their jax.ShapeDtypeStructs. Raises folders.RunError; for a damaged checkpoint it names
    the newest whole one before it.
    """
    state = like

    def read():
        nonlocal state
        found, state, progress = _read(run, like, step)
        return found, progress._asdict()

    found, progress = hosts.from_first(read)
    return found, hosts.arrays_from_first(state), Progress(**progress)


def _read(run, like, step):
    def read(checkpoint):
        return int(checkpoint.name), _read_state(checkpoint, like), _read_progress(checkpoint)

    return _of_whole(run, step, read)


def require_whole(run, step=None):
    """Returns the folder of a run's newest checkpoint, or of the checkpoint of `step`.

    Raises folders.RunError if there is none, or its files are not as they were written.
    """
    return _of_whole(run, step, lambda checkpoint: checkpoint)


def _of_whole(run, step, function):
    """Returns function(checkpoint) of a whole checkpoint, which is not removed meanwhile."""
    while True:
        checkpoint = _folder_of(run, step)
        with _locked(checkpoint, fcntl.LOCK_SH):
            try:
                _require_whole(checkpoint)
                return function(checkpoint)
            except folders.RunError:
                if checkpoint.exists():
                    raise  # else training removed it before it was locked: take the newest of now


def _folder_of(run, step):
    folder = Path(run).absolute() / 'checkpoints'
    try:
        steps = all_steps(folder)
    except OSError as error:
        raise folders.RunError(f'{folder} cannot be read: {error.strerror}') from error
    if not steps:
        raise folders.RunError(f'{run} holds no checkpoint: no epoch of it was completed')
    if step is not None and step not in steps:
        raise folders.RunError(f'{folder} holds no checkpoint {step}; there are {", ".join(map(str, steps))}')
    return folder / str(steps[-1] if step is None else step)


def _require_whole(checkpoint):
    damage = find_damage(checkpoint)
    if damage:
        before = [step for step in all_steps(checkpoint.parent) if step < int(checkpoint.name)]
        whole = [step for step in before if not find_damage(checkpoint.with_name(str(step)))]
        offer = 'there is no whole one before'
        if whole:
            offer = f'{whole[-1]} is whole: take it with --checkpoint {whole[-1]}, of this run alone'
        raise folders.RunError(f'{checkpoint} is damaged: {damage}; {offer}')


def find_damage(checkpoint):
    """What is wrong with the files of a checkpoint, or None if they are as they were written."""
    try:
        expected = json_files.read_json(checkpoint / 'checksums.json')
        found = _checksums(checkpoint)
    except FileNotFoundError:
        return 'checksums.json is missing'
    except (ValueError, OSError) as error:
        return f'checksums.json cannot be read ({error})'
    if not expected:
        return 'checksums.json lists no files'
    for name in sorted({*expected, *found}):
        if name not in found:
            return f'{name} is missing'
        if expected.get(name) != found[name]:
            return f'{name} has the SHA-256 {found[name]}, not {expected.get(name)}'
    return None


def _checksums(checkpoint):
    """SHA-256 of the files below a folder, by relative name, but for checksums.json itself."""
    checksums = {}
    for path in sorted(checkpoint.rglob('*')):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f'{path.name} is neither a file nor a folder')
        if path.is_file() and path != checkpoint / 'checksums.json':
            with open(path, 'rb') as file:
                checksums[str(path.relative_to(checkpoint))] = hashlib.file_digest(file, 'sha256').hexdigest()
    return checksums


def _read_state(checkpoint, like):
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    types = jax.eval_shape(lambda state: jax.tree.map(sharding.key_data, state), like)
    types = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), types)
    try:
        _require_same_arrays(_held_arrays(checkpoint), types)
        with _checkpointer() as checkpointer, _literal(checkpoint) as folder:
            held = checkpointer.restore(folder / 'state', args=ocp.args.StandardRestore(types))
            return jax.tree.map(sharding.like_key, held, like)
    except Exception as error:  # what Orbax raises for files that it does not understand is not documented
        reason = errors.first_line(error)
        raise folders.RunError(f'{checkpoint} does not fit the model and optimizer of config.json: {reason}') from error


def _held_arrays(checkpoint):
    """Returns what a checkpoint's metadata say of its arrays."""
    with _checkpointer() as checkpointer, _literal(checkpoint) as folder:
        return checkpointer.metadata(folder / 'state').item_metadata.tree


def _require_same_arrays(held, like):
    """Raises a ValueError if a checkpoint's arrays are not those of `like`."""
    held, needed = _array_types(held), _array_types(like)
    for name in sorted({*held, *needed}):
        if held.get(name) != needed.get(name):
            raise ValueError(f'{name} is {held.get(name, "missing")} and should be {needed.get(name, "missing")}')


def _array_types(arrays):
    types = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        types[jax.tree_util.keystr(path, simple=True, separator='.')] = f'{leaf.dtype} {list(leaf.shape)}'
    return types


def _read_progress(checkpoint):
    path = checkpoint / 'progress.json'
    try:
        held = Progress(**json_files.read_json(path))
        if not all(type(n) is int and 0 <= n < 2**31 for n in held[:2]) or not isinstance(held.log, list):
            raise ValueError('its epoch or step is no whole number, or its log no list')
        json_files.require_numbers(held._asdict(), ('loss', 'seconds', 'lr_factor'))
        for record in held.log:
            folders.require_record_of_epoch(record)
        loss = math.nan if held.loss is None else float(held.loss)
        return held._replace(
            loss=loss, seconds=float(held.seconds), lr_factor=float(held.lr_factor), log=tuple(held.log)
        )
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise folders.RunError(f'{path} is not what train.py writes: {error}') from error


def _discard(checkpoint):
    """Removes a checkpoint so that at no moment half of it is in its place."""
    removed = checkpoint.with_name(f'{checkpoint.name}.removed')
    errors.remove(removed)
    os.replace(checkpoint, removed)
    errors.remove(removed)


def _discard_leftovers(folder):
    for path in folder.iterdir() if folder.is_dir() else ():
        if folders.LEFTOVER_CHECKPOINT.fullmatch(path.name):
            errors.remove(path)


def _flush(folder):
    for path in (*folder.rglob('*'), folder):
        errors.flush(path)
