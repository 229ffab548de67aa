"""Run folders: configuration, log and metrics. The module `checkpoints` saves and reads the states of training.

    RESULTSFOLDER/DATASET_MODEL/OPTIM/run_K/
        config.json     format, all flags, the data set's properties, versions, git commit, device
        log.jsonl       one line per epoch
        checkpoints/    the last two states, and with --keepbest the most accurate state
        metrics.json    the metrics of test.py
        predictions.npz the predictions behind the metrics
        plots/          plots of test.py --plots
        lock            locked by the process that trains

No file is a pickle.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import errors
from runs import hosts, json_files
from runs.json_files import RunError

# The format of run folders. Raise it when older versions would misread a new run. A new flag needs no new format,
# because older versions report an unknown flag.
FORMAT = 1
READABLE = (1,)  # formats; tests/runs holds a run of each
LEFTOVER_CHECKPOINT = re.compile('[0-9]+[.](partial|removed)')  # writing or removing it was interrupted


def create(results_folder: str | Path, dataset: str, model: str, optim: str) -> Path:
    """Makes a folder run_K with the first free K and returns it. No other process gets the same K. Raises RunError."""
    parent = parent_of(results_folder, dataset, model, optim)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for k in itertools.count():
            run = parent / f'run_{k}'
            try:
                run.mkdir()
            except FileExistsError:
                continue
            return run
    except OSError as error:
        raise RunError(f'cannot make a run folder in {parent}: {error.strerror}') from error


def require_place(results_folder: str | Path, dataset: str, model: str, optim: str) -> None:
    """Raises a RunError if `create` would fail. Checks only the nearest folder that exists, and writes nothing."""
    parent = parent_of(results_folder, dataset, model, optim)
    nearest = next(path for path in (parent.absolute(), *parent.absolute().parents) if os.path.exists(path))
    if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f'cannot make a run folder in {parent}: {nearest} is not a folder, or is read-only')


def parent_of(results_folder: str | Path, dataset: str, model: str, optim: str) -> Path:
    """Returns the folder of all runs of a data set, a model and an optimizer."""
    return Path(results_folder) / f'{short_name(dataset)}_{short_name(model)}' / optim


def short_name(name: str) -> str:
    """Returns the name of a data set or network without its path: flowers for folder:/data/flowers."""
    if name.startswith('tfds/'):
        return name.replace('/', '_')
    kind, _, rest = name.partition(':')
    last = os.path.basename(name.rpartition(':')[2] if '.py:' in name else rest or kind)
    return last.removesuffix('.npz') or 'data'


@contextlib.contextmanager
def locked(run: str | Path) -> Iterator[None]:
    """Locks a run folder until the context ends. Raises RunError if another process locks it or writing fails."""
    path = Path(run) / 'lock'
    try:
        if not path.parent.is_dir():
            raise RunError(f'{run} is not a run folder (name the folder run_K that train.py printed)')
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise RunError(f'{path} cannot be written: {error.strerror}') from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise RunError(f'{path} is not a regular file: remove it')
        with contextlib.suppress(OSError):  # some file systems have no locks
            _lock(descriptor, run)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor, run):
    """Locks a file and writes the name of the process into it. The system frees the lock when the process ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors='replace').strip() or 'another process'
        raise RunError(f'{run} is being trained by {holder}: wait for it, or stop it') from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, _holder(os.getpid()).encode(), 0)


def locked_by(parent: str | Path, process: int | None) -> list[Path]:
    """Returns the run folders in `parent` that the process with this number on this host locked last."""
    holder = _holder(process)
    return [path.parent for path in Path(parent).glob('run_*/lock') if path.is_file() and path.read_text() == holder]


def _holder(process):
    return f'process {process} on {socket.gethostname()}\n'


def has_checkpoint(run: str | Path) -> bool:
    """Returns whether a run has a checkpoint to resume from."""
    return any(path.name.isdecimal() for path in Path(run).glob('checkpoints/*'))


def write_log(run: str | Path, records: list[dict]) -> None:
    """Writes log.jsonl atomically, one line per epoch. Raises RunError if writing fails. Then the old log stays."""
    lines = [json.dumps(json_files.finite(record)) + '\n' for record in records]
    json_files.write_text(Path(run) / 'log.jsonl', ''.join(lines))


class Log:
    """Writes the log of a run during training, in the first process only.

    A failed write is reported once, by warn(text). The log is written again after the next epoch.

    Attributes:
        failed: whether the last write failed.
    """

    def __init__(self, run: str | Path, warn: Callable) -> None:
        self._run, self._warn, self.failed = run, warn, False

    def write(self, records: list[dict]) -> None:
        """Writes all records."""
        if not hosts.is_first():
            return
        try:
            write_log(self._run, records)
            self.failed = False
        except RunError as error:
            if not self.failed:
                self._warn(f'{error}; training continues and writes the log again after the next epoch')
            self.failed = True


def read_log(run: str | Path) -> list[dict]:
    """Returns the records of log.jsonl, or an empty list if there is no log. Raises RunError if the log is damaged."""
    path = Path(run) / 'log.jsonl'
    if not path.exists():
        return []
    try:
        records = [json_files.parse(line) for line in json_files.read_text(path).splitlines()]
        for record in records:
            require_record_of_epoch(record)
        return records
    except (ValueError, OSError) as error:
        raise RunError(f'{path} is damaged or cannot be read: {errors.reason(error)}') from error


def require_record_of_epoch(record: Any) -> None:
    """Raises a ValueError if a parsed line of the log is not what train.py writes. None stands for NaN or infinity."""
    accuracies = {'test_accuracy', 'validation_accuracy'} & record.keys() if isinstance(record, dict) else ()
    numbers = ('loss', 'learning_rate', *accuracies)
    if not accuracies or type(record.get('epoch')) is not int or record['epoch'] < 0:
        raise ValueError('a line is not the record of an epoch')
    json_files.require_numbers(record, numbers)


def write_config(run: str | Path, content: dict) -> None:
    """Writes config.json with the format of the run folder and a checksum of the content. Raises RunError."""
    content = json.loads(json.dumps(json_files.finite(content | {'format': FORMAT})))
    json_files.write_json(Path(run) / 'config.json', content | {'sha256': _digest(content)})


def read_config(run: str | Path) -> dict:
    """Returns the configuration that train.py wrote. Raises RunError."""
    path = Path(run) / 'config.json'
    if not os.path.lexists(path):
        raise RunError(
            f'{run} is not a run folder: it holds no config.json (name the folder run_K that train.py printed)'
        )
    config = json_files.read_record(path)
    sha256 = config.pop('sha256', None)
    if sha256 is None:
        raise RunError(f'{path} has no checksum: it is incomplete, or another version of train.py wrote it')
    if sha256 != _digest(config):
        raise RunError(
            f'{path} is damaged: its SHA-256 is {_digest(config)}, but train.py recorded {sha256}: train again'
        )
    if config.get('format') not in READABLE:
        raise RunError(
            f'{path} has format {config.get("format", 0)}, but this version reads format {READABLE[-1]}: '
            'use the version of train.py that wrote it, or train again'
        )
    return config


def _digest(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def end_of_training(config: dict, epochs: int) -> dict:
    """Returns the entry 'trained' of metrics.json for a complete run with this configuration. Raises RunError."""
    try:
        return {'epoch': epochs, 'steps_of_epoch': config['dataset']['num_train'] // config['flags']['batchsize']}
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise RunError('a config.json lacks the number of training images or the batch size: train again') from error
