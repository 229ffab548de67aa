"""Checkpoints of a run: written atomically, and checked against checksums when read.

    RUN/checkpoints/STEP/       after STEP training steps
        state.npz               weights and optimizer state, one named array each
        progress.json           progress of training, and the log so far
        checksums.json          SHA-256 of the other files

A checkpoint is written under a temporary name, read back, flushed to the disk and renamed. Therefore a run that is
killed at any moment leaves only complete checkpoints. A process that reads a checkpoint locks it. Training does not
remove locked checkpoints.
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

EXPORT = 'posterior.safetensors'  # holds the mean and the posterior in an export of test.py


class Progress(NamedTuple):
    """The progress of training.

    Attributes:
        epoch: the index of the epoch, from 0.
        step: the number of steps done in this epoch.
        loss: the sum of the losses of these steps.
        seconds: the time that these steps took.
        lr_factor: the factor of the learning rate in this epoch, None before the epoch begins.
        log: the records of earlier epochs, as in log.jsonl.
    """

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    lr_factor: float | None = None
    log: tuple = ()

    def trained(self) -> dict:
        """Returns the entry 'trained' of metrics.json for a run with this progress."""
        return {'epoch': self.epoch, 'steps_of_epoch': self.step}


class Writer:
    """Saves the checkpoints of a run in the background, one at a time.

    Keeps the newest two checkpoints, and with `keep_best` also the checkpoint of the most accurate epoch. Training
    resumes from `progress`. Checkpoints after `progress` are removed once the first new one is saved. A failed save is
    reported once, and the next checkpoint is another try. `failed` says whether the last save failed.

    Every process of a run makes a Writer. Only the first process writes, because the state is the same in all of them.
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
        """Waits until the last save has ended, and stops the thread that saves."""
        self.wait()
        self._thread.shutdown()

    def save(self, state: Any, progress: Progress) -> None:
        """Copies a state, which the caller may then donate. The first process writes the copy in the background."""
        self.wait()
        copied = _copy(state)  # in every process, because all must run the same programs
        if hosts.is_first():
            self._saving = self._thread.submit(self._write, copied, progress)

    def wait(self) -> None:
        """Waits until the last save has ended. Warns if this save failed and the previous save did not."""
        if self._saving is None:
            return
        error, self._saving = self._saving.exception(), None
        if error and not self.failed:
            what = f'a checkpoint could not be saved in {self.folder} ({errors.reason(error)})'
            self.warn(f'{what}; training continues and tries again at the next checkpoint')
        self.failed = error is not None

    def _write(self, state, progress):
        arrays = {name: np.asarray(x.addressable_data(0)) for name, x in named(state).items()}
        partial = self.folder / f'{self._step(progress)}.partial'
        try:
            self.folder.mkdir(exist_ok=True)
            _discard_leftovers(self.folder)
            partial.mkdir()
            np.savez(partial / 'state.npz', **arrays)
            held = npy.load_npz(partial / 'state.npz')
            if any(held[name].tobytes() != array.tobytes() for name, array in arrays.items()):
                raise OSError('the file read back differs from the state')
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
                if is_free:  # otherwise the next save tries again
                    _discard(self.folder / str(old))

    def _step(self, progress):
        return progress.epoch * self.steps_per_epoch + progress.step

    def _best(self, log, steps):
        """Returns [step] of the most accurate epoch that has a checkpoint. Returns [] if there is none to keep."""
        accuracies = {(record['epoch'] + 1) * self.steps_per_epoch: _accuracy(record) for record in log}
        held = [step for step in accuracies if step in steps] if self.keep_best else []
        return [max(held, key=accuracies.get)] if held else []


class Due:
    """Says when a checkpoint within an epoch is due: every N steps, every N minutes ('30min'), or never (None)."""

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
    """Locks a checkpoint until the context ends. Yields whether the checkpoint exists and no other process locks it.

    On a file system without locks, yields whether the checkpoint exists.
    how: fcntl.LOCK_SH to read the checkpoint, fcntl.LOCK_EX | fcntl.LOCK_NB to remove it.
    """
    try:
        file = errors.opened(checkpoint / 'checksums.json')
    except OSError:
        yield False  # not a checkpoint of train.py, or damaged
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
    """Returns the accuracy of an epoch, or −1 for NaN or None, as after a divergence."""
    accuracy = record['validation_accuracy'] if 'validation_accuracy' in record else record['test_accuracy']
    return -1.0 if accuracy is None or math.isnan(accuracy) else accuracy


@jax.jit
def _copy(state):
    return jax.tree.map(lambda x: jnp.copy(sharding.key_data(x)), state)


def all_steps(folder: str | Path) -> list[int]:
    """Returns the steps of all checkpoints in a folder `checkpoints`, in ascending order. The folder may be missing."""
    folder = Path(folder)
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch('0|[1-9][0-9]*', name))


def restore(run: Path, like: Any, step: int | None = None) -> tuple[int, Any, Progress]:
    """Reads a checkpoint in the first process, and returns it in every process.

    Args:
        run: the run folder.
        like: the jax.ShapeDtypeStructs of the state.
        step: the step of the checkpoint. None means the newest checkpoint.

    Returns:
        (step, state, progress). The arrays are on the first device of the process. In a run of several processes they
        are on the host.

    Raises:
        RunError: the checkpoint is missing, damaged or of another state. If it is damaged, the message names the newest
            intact checkpoint before it.
    """
    state = like

    def read(checkpoint):
        nonlocal state
        state = _read_state(checkpoint, like)
        return int(checkpoint.name), _read_progress(checkpoint)._asdict()

    found, progress = hosts.from_first(lambda: _of_whole(run, step, read))
    return found, hosts.arrays_from_first(state), Progress(**progress)


def arrays(run: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a run's newest checkpoint by name, on the host. Raises RunError."""
    return _of_whole(run, None, lambda checkpoint: npy.load_npz(checkpoint / 'state.npz'))


def is_export(folder: str | Path) -> bool:
    """Returns whether a folder is an export of test.py. The module `evaluation.exported` reads it."""
    return os.path.lexists(Path(folder) / EXPORT)


def require_whole(run: Path, step: int | None = None) -> Path:
    """Returns the folder of a run's newest checkpoint, or of the checkpoint of `step`.

    Raises folders.RunError if the checkpoint is missing or damaged.
    """
    return _of_whole(run, step, lambda checkpoint: checkpoint)


def _of_whole(run, step, function):
    """Returns function(checkpoint) for an intact checkpoint. Training cannot remove the checkpoint during the call."""
    while True:
        checkpoint = folder_of(run, step)
        with _locked(checkpoint, fcntl.LOCK_SH):
            try:
                _require_whole(checkpoint)
                return function(checkpoint)
            except folders.RunError:
                if checkpoint.exists():
                    raise
                # Training removed the checkpoint before this process locked it: try again.


def folder_of(run: Path, step: int | None = None) -> Path:
    """Returns the folder of a run's newest checkpoint, or of the checkpoint of `step`. Does not check its content.

    Raises folders.RunError if the checkpoint is missing.
    """
    folder = Path(run).absolute() / 'checkpoints'
    try:
        steps = all_steps(folder)
    except OSError as error:
        raise folders.RunError(f'{folder} cannot be read: {error.strerror}') from error
    if not steps and is_export(run):
        raise folders.RunError(
            f'{run} is an export of test.py, which holds no momentum and no random keys: resume the run that it is from'
        )
    if not steps:
        raise folders.RunError(f'{run} holds no checkpoint: training has not saved one yet')
    if step is not None and step not in steps:
        raise folders.RunError(f'{folder} holds no checkpoint {step}; choose from {", ".join(map(str, steps))}')
    return folder / str(steps[-1] if step is None else step)


def _require_whole(checkpoint):
    damage = find_damage(checkpoint)
    if damage:
        before = [step for step in all_steps(checkpoint.parent) if step < int(checkpoint.name)]
        whole = [step for step in before if not find_damage(checkpoint.with_name(str(step)))]
        offer = 'no earlier checkpoint is intact'
        if whole:
            offer = f'checkpoint {whole[-1]} is intact: use --checkpoint {whole[-1]} with this run folder only'
        raise folders.RunError(f'{checkpoint} is damaged: {damage}; {offer}')


def find_damage(checkpoint: Path) -> str | None:
    """Returns what is damaged in a checkpoint, or None if all checksums match."""
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
            raise ValueError(f'{path.name} is not a regular file')
        if path.name != 'checksums.json':
            with errors.opened(path) as file:
                checksums[path.name] = hashlib.file_digest(file, 'sha256').hexdigest()
    return checksums


def _read_state(checkpoint, like):
    needed = named(jax.eval_shape(lambda state: jax.tree.map(sharding.key_data, state), like))
    try:
        held = npy.load_npz(checkpoint / 'state.npz')
        require_types(held, needed)
    except errors.UserError as error:
        raise folders.RunError(f'{checkpoint} does not fit the model and optimizer of config.json: {error}') from error
    leaves = jax.device_put([held[name] for name in needed], jax.local_devices()[0])
    return jax.tree.map(sharding.like_key, jax.tree.unflatten(jax.tree.structure(like), leaves), like)


def require_types(held: dict, needed: dict) -> None:
    """Raises a UserError if arrays by name differ from the needed arrays in their names, dtypes or shapes."""
    for name in sorted({*held, *needed}):
        is_there, should_be = _type(held.get(name)), _type(needed.get(name))
        if is_there != should_be:
            raise errors.UserError(f'{name}: found {is_there}, expected {should_be}')


def named(arrays: Any) -> dict[str, Any]:
    """Returns the leaves of a pytree by name, such as params.head.kernel, in order."""
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    return {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in leaves}


def _type(array):
    return 'nothing' if array is None else f'{array.dtype} {list(array.shape)}'


def _read_progress(checkpoint):
    path = checkpoint / 'progress.json'
    try:
        held = Progress(**json_files.read_json(path))
        if not all(type(n) is int and 0 <= n < 2**31 for n in held[:2]) or not isinstance(held.log, list):
            raise ValueError('epoch or step is not a whole number, or log is not a list')
        json_files.require_numbers(held._asdict(), ('loss', 'seconds', 'lr_factor'))
        for record in held.log:
            folders.require_record_of_epoch(record)
        loss = math.nan if held.loss is None else float(held.loss)
        floats = {'loss': loss, 'seconds': float(held.seconds), 'lr_factor': float(held.lr_factor)}
        return held._replace(**floats, log=tuple(held.log))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise folders.RunError(f'{path} is not what train.py writes: {error}') from error


def _discard(checkpoint):
    """Removes a checkpoint. Renames it first, so that an interruption leaves no incomplete checkpoint."""
    removed = checkpoint.with_name(f'{checkpoint.name}.removed')
    errors.remove(removed)
    os.replace(checkpoint, removed)
    errors.remove(removed)


def _discard_leftovers(folder):
    for path in folder.iterdir() if folder.is_dir() else ():
        if folders.LEFTOVER_CHECKPOINT.fullmatch(path.name):
            errors.remove(path)
