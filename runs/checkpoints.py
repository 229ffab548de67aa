"""Checkpoints of a run: written whole or not at all, and checked when they are read.

    RUN/checkpoints/STEP/       after STEP training steps
        state.npz               weights and the optimizer's other arrays, by name
        progress.json           how far training was, and its log up to there
        checksums.json          SHA-256 of the other files

A checkpoint is written under another name, read back, flushed to the disk and renamed, so a run that is killed at any
moment leaves whole ones only. A process that reads one keeps a lock on it, so that the process that trains does not
remove it meanwhile.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import errors
from ops import sharding
from readers import npy
from runs import folders, hosts, json_files


class Progress(NamedTuple):
    """How far training is.

    Attributes:
        epoch: from 0.
        step: how many steps of the epoch are done.
        loss: the sum of the losses of these steps.
        seconds: the time that these steps took.
        lr_factor: of the epoch, None before it begins.
        log: the records of earlier epochs, as in log.jsonl.
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
    """Saves the checkpoints of a run in the background, one at a time.

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
        self._steps = []
        if hosts.is_first():
            _discard_leftovers(self.folder)
            self._steps = [step for step in all_steps(self.folder) if step <= self._step(progress)]
        self._saving = None
        self._thread = ThreadPoolExecutor(1)

    def close(self) -> None:
        """Waits until the last save has ended."""
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
        arrays = {name: np.asarray(x.addressable_data(0)) for name, x in _named(state).items()}
        partial = self.folder / f'{self._step(progress)}.partial'
        try:
            self.folder.mkdir(exist_ok=True)
            _discard_leftovers(self.folder)
            partial.mkdir()
            np.savez(partial / 'state.npz', **arrays)
            held = npy.load_npz(partial / 'state.npz')
            if any(held[name].tobytes() != array.tobytes() for name, array in arrays.items()):
                raise OSError('it cannot be read back')
            self._complete(partial, progress)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _complete(self, partial, progress):
        (partial / 'progress.json').write_text(json.dumps(json_files.finite(progress._asdict())))
        (partial / 'checksums.json').write_text(json.dumps(_checksums(partial), indent=0))
        for path in (*partial.iterdir(), partial):
            errors.flush(path)
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
        """Returns, in a list, the step of the most accurate epoch that has a checkpoint, [] without any."""
        accuracies = {(record['epoch'] + 1) * self.steps_per_epoch: _accuracy(record) for record in log}
        held = [step for step in accuracies if step in steps] if self.keep_best else []
        return [max(held, key=accuracies.get)] if held else []


class Due:
    """Tells when a checkpoint within an epoch is due: every N steps, every N minutes ('30min'), or never."""

    def __init__(self, every: int | str | None) -> None:
        self.steps = every if isinstance(every, int) else None
        self.seconds = 60 * float(every.removesuffix('min')) if isinstance(every, str) else None
        self.last = time.monotonic()

    def __call__(self, steps_done: int) -> bool:
        if self.steps is not None:
            return steps_done % self.steps == 0
        if self.seconds is None or time.monotonic() - self.last < self.seconds:
            return False
        self.last = time.monotonic()
        return True


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


def _accuracy(record):
    """Returns the accuracy of an epoch, −1 if it is no number, as after a divergence."""
    accuracy = record['validation_accuracy'] if 'validation_accuracy' in record else record['test_accuracy']
    return -1.0 if accuracy is None or math.isnan(accuracy) else accuracy


@jax.jit
def _copy(state):
    return jax.tree.map(lambda x: jnp.copy(sharding.key_data(x)), state)


def all_steps(folder: str | Path) -> list[int]:
    """Returns the steps of the checkpoints in a folder `checkpoints`, the newest last. The folder may be missing."""
    folder = Path(folder)
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch('0|[1-9][0-9]*', name))


def restore(run: Path, like: Any, step: int | None = None) -> tuple[int, Any, Progress]:
    """Returns a checkpoint, the newest or the checkpoint of `step`, as (step, state, progress).

    Only the first process reads the checkpoint. The arrays are on the first device of the process, or on the host if
    there are several processes. like: the jax.ShapeDtypeStructs of the state. Raises a RunError, which names the newest
    whole checkpoint before a damaged one.
    """
    state = like

    def read(checkpoint):
        nonlocal state
        state = _read_state(checkpoint, like)
        return int(checkpoint.name), _read_progress(checkpoint)._asdict()

    found, progress = hosts.from_first(lambda: _of_whole(run, step, read))
    return found, hosts.arrays_from_first(state), Progress(**progress)


def require_whole(run: Path, step: int | None = None) -> Path:
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


def find_damage(checkpoint: Path) -> str | None:
    """Returns what is wrong with the files of a checkpoint, None if they are as they were written."""
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
    """Returns the SHA-256 of the files of a checkpoint, except checksums.json, by name."""
    checksums = {}
    for path in sorted(checkpoint.iterdir()):
        if path.is_symlink() or not path.is_file():
            raise ValueError(f'{path.name} is no regular file')
        if path.name != 'checksums.json':
            with errors.opened(path) as file:
                checksums[path.name] = hashlib.file_digest(file, 'sha256').hexdigest()
    return checksums


def _read_state(checkpoint, like):
    needed = _named(jax.eval_shape(lambda state: jax.tree.map(sharding.key_data, state), like))
    try:
        held = npy.load_npz(checkpoint / 'state.npz')
        for name in sorted({*held, *needed}):
            is_there, should_be = _type(held.get(name)), _type(needed.get(name))
            if is_there != should_be:
                raise errors.UserError(f'{name} is {is_there} and should be {should_be}')
    except errors.UserError as error:
        raise folders.RunError(f'{checkpoint} does not fit the model and optimizer of config.json: {error}') from error
    leaves = jax.device_put([held[name] for name in needed], jax.local_devices()[0])
    return jax.tree.map(sharding.like_key, jax.tree.unflatten(jax.tree.structure(like), leaves), like)


def _named(arrays):
    """Returns the leaves of a pytree by name, such as params.head.kernel, in order."""
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    return {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in leaves}


def _type(array):
    return 'missing' if array is None else f'{array.dtype} {list(array.shape)}'


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
        floats = {'loss': loss, 'seconds': float(held.seconds), 'lr_factor': float(held.lr_factor)}
        return held._replace(**floats, log=tuple(held.log))
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
