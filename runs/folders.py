"""Run folders: configuration, log, metrics; `checkpoints` has the states of training.

    RESULTSFOLDER/DATASET_MODEL/OPTIM/run_K/
        config.json     all flags, the data set's properties, versions, git commit, device
        log.jsonl       a line an epoch
        checkpoints/    the last two states, and that of best accuracy with --keepbest
        metrics.json    what test.py measured
        predictions.npz what it was measured from
        plots/          pictures of test.py --plots
        lock            held by the process that trains

Nothing in it is a pickle.
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
from pathlib import Path

import errors
from runs import hosts, json_files
from runs.json_files import RunError

LEFTOVER_CHECKPOINT = re.compile('[0-9]+[.](partial|removed)')  # what a process was writing or removing


def create(results_folder, dataset, model, optim):
    """A new folder run_K with the first free K, made by this process and no other. Raises RunError."""
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
        raise RunError(f'no run folder can be made in {parent}: {error.strerror}') from error


def require_place(results_folder, dataset, model, optim):
    """Raises a RunError if `create` would, as far as the nearest folder that exists tells."""
    parent = parent_of(results_folder, dataset, model, optim)
    nearest = next(path for path in (parent.absolute(), *parent.absolute().parents) if os.path.exists(path))
    if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f'no run folder can be made in {parent}: {nearest} is no folder, or read-only')


def parent_of(results_folder, dataset, model, optim):
    """Returns the folder of all runs of a data set, a model and an optimizer."""
    return Path(results_folder) / f'{dataset}_{model}'.replace('/', '_') / optim


@contextlib.contextmanager
def locked(run):
    """Keeps a run folder for this process. Raises RunError if another one has it, or it cannot be written."""
    path = Path(run) / 'lock'
    try:
        if not path.parent.is_dir():
            raise RunError(f'{run} is not a run folder (name the folder run_K that train.py printed)')
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise RunError(f'{path} cannot be written: {error.strerror}') from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise RunError(f'{path} is no regular file: remove it')
        with contextlib.suppress(OSError):  # of a file system without locks
            _lock(descriptor, run)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor, run):
    """The system frees the lock when its process ends, however it ends; the file names the process for people."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors='replace').strip() or 'another process'
        raise RunError(f'{run} is being trained by {holder}: wait for it, or stop it') from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, _holder(os.getpid()).encode(), 0)


def locked_by(parent, process):
    """Returns the run folders in a folder that a process of this host was the last to lock."""
    holder = _holder(process)
    return [path.parent for path in Path(parent).glob('run_*/lock') if path.is_file() and path.read_text() == holder]


def _holder(process):
    return f'process {process} on {socket.gethostname()}\n'


def has_checkpoint(run):
    """Returns whether a run has a checkpoint to resume from."""
    return any(path.name.isdecimal() for path in Path(run).glob('checkpoints/*'))


def write_log(run, records):
    """Writes log.jsonl, a line an epoch, whole. Raises RunError; the old log stays then."""
    json_files.write_text(
        Path(run) / 'log.jsonl', ''.join(json.dumps(json_files.finite(record)) + '\n' for record in records)
    )


class Log:
    """The log of a run that is trained, which the first process writes. Reports a failure once and tries again."""

    def __init__(self, run, warn):
        self._run, self._warn, self._records = run, warn, None
        self.failed = False

    def write(self, records):
        """Writes all records."""
        self._records = records
        if not hosts.is_first():
            return
        try:
            write_log(self._run, records)
            self.failed = False
        except RunError as error:
            if not self.failed:
                self._warn(f'{error}; training goes on, and the log is tried again after the next epoch')
            self.failed = True

    def retry(self):
        """Writes the log again if it could not be written."""
        if self.failed:
            self.write(self._records)


def read_log(run):
    """The records of log.jsonl, an empty list if there is none; RunError if it is damaged."""
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


def require_record_of_epoch(record):
    """Raises a ValueError unless a line of the log is what train.py writes: null stands for what is not finite."""
    accuracies = {'test_accuracy', 'validation_accuracy'} & record.keys() if isinstance(record, dict) else ()
    numbers = ('loss', 'learning_rate', *accuracies)
    if not accuracies or type(record.get('epoch')) is not int or record['epoch'] < 0:
        raise ValueError('a line is no record of an epoch')
    json_files.require_numbers(record, numbers)


def write_config(run, content):
    """Writes config.json with a checksum of itself. Raises RunError."""
    content = json.loads(json.dumps(json_files.finite(content)))
    json_files.write_json(Path(run) / 'config.json', content | {'sha256': _digest(content)})


def read_config(run):
    """The configuration that train.py wrote, a dict. Raises RunError."""
    path = Path(run) / 'config.json'
    if not os.path.lexists(path):
        raise RunError(
            f'{run} is not a run folder: it holds no config.json (name the folder run_K that train.py printed)'
        )
    config = json_files.read_record(path)
    sha256 = config.pop('sha256', None)
    if sha256 is None:
        raise RunError(f'{path} lacks its checksum: it is incomplete, or of another version of train.py')
    if sha256 != _digest(config):
        raise RunError(f'{path} is damaged: its SHA-256 is {_digest(config)}, not {sha256} as it was written')
    return config


def _digest(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def end_of_training(config, epochs):
    """Returns what metrics.json says as 'trained' for a run with this configuration that is complete.

    Raises RunError.
    """
    try:
        return {'epoch': epochs, 'steps_of_epoch': config['dataset']['num_train'] // config['flags']['batchsize']}
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise RunError(
            'a config.json does not say on how many images, in which batches, its run was trained'
        ) from error
