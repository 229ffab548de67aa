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
import math
import os
import platform
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import errors

LEFTOVER_CHECKPOINT = re.compile('[0-9]+[.](partial|removed)')  # what a process was writing or removing


class RunError(errors.UserError):
    """A run folder that cannot be made, or is not what it should be."""


def create(results_folder, dataset, model, optim):
    """A new folder run_K with the first free K, made by this process and no other. Raises RunError."""
    parent = _folder_of_runs(results_folder, dataset, model, optim)
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
    parent = _folder_of_runs(results_folder, dataset, model, optim)
    nearest = next(path for path in (parent.absolute(), *parent.absolute().parents) if os.path.exists(path))
    if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f'no run folder can be made in {parent}: {nearest} is no folder, or read-only')


def _folder_of_runs(results_folder, dataset, model, optim):
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
    os.pwrite(descriptor, f'process {os.getpid()} on {socket.gethostname()}\n'.encode(), 0)


def write_json(path, content):
    """Writes JSON, whole. Raises RunError."""
    _write_text(path, json.dumps(finite(content), indent=2) + '\n')


def write_log(run, records):
    """Writes log.jsonl, a line an epoch, whole. Raises RunError; the old log stays then."""
    _write_text(Path(run) / 'log.jsonl', ''.join(json.dumps(finite(record)) + '\n' for record in records))


def read_log(run):
    """The records of log.jsonl, an empty list if there is none; RunError if it is damaged."""
    path = Path(run) / 'log.jsonl'
    if not path.exists():
        return []
    try:
        records = [_parse_json(line) for line in read_text(path).splitlines()]
        for record in records:
            require_record_of_epoch(record)
        return records
    except (ValueError, OSError) as error:
        raise RunError(f'{path} is damaged or cannot be read: {errors.reason(error)}') from error


def _write_text(path, text):
    write_bytes(path, text.encode())


def require_record_of_epoch(record):
    """Raises a ValueError unless a line of the log is what train.py writes: null stands for what is not finite."""
    accuracies = {'test_accuracy', 'validation_accuracy'} & record.keys() if isinstance(record, dict) else ()
    numbers = ('loss', 'learning_rate', *accuracies)
    if not accuracies or type(record.get('epoch')) is not int or record['epoch'] < 0:
        raise ValueError('a line is no record of an epoch')
    require_numbers(record, numbers)


def require_numbers(record, names):
    """Raises a ValueError unless a dict has numbers of these names: null stands for what is not finite."""
    for name in names:
        if name not in record or not isinstance(record[name], int | float | None) or isinstance(record[name], bool):
            raise ValueError(f'{name} is {str(record.get(name))[:50]}, no number')


def write_bytes(path, content):
    """Writes a file so that a reader sees the old one or the new one, never a part. Raises RunError."""
    try:
        errors.write_bytes(path, content)
    except OSError as error:
        raise RunError(f'{path} cannot be written: {error.strerror}') from error


def read_json(path):
    """The object of a JSON file of ours. Raises OSError, and ValueError for anything else or what is far too large."""
    content = _parse_json(read_text(path))
    if not isinstance(content, dict):
        raise ValueError('it holds no object')
    return content


def read_record(path):
    """The object of a JSON file of measured figures. Raises RunError."""
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise RunError(f'{path} is damaged or cannot be read: {errors.reason(error)}') from error


def read_text(path, limit=1 << 24):
    """Returns the text of a regular file in UTF-8, with or without a byte order mark. Raises OSError and ValueError."""
    with errors.opened(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f'it is larger than {limit} bytes')
    return content.decode('utf-8-sig')


def _parse_json(text):
    """Parses JSON without NaN, infinity or numbers that no float64 holds. Raises ValueError."""
    try:
        content = json.loads(text, parse_constant=_number, parse_float=_number, parse_int=_whole_number)
    except RecursionError as error:
        raise ValueError('it is nested too deeply') from error
    _require_shallow(content)
    return content


def _require_shallow(content, depth=50):
    """Raises a ValueError for what is nested so deeply that a function which calls itself might not get to its end."""
    if isinstance(content, dict | list):
        if not depth:
            raise ValueError('it is nested too deeply')
        for part in content.values() if isinstance(content, dict) else content:
            _require_shallow(part, depth - 1)


def _number(text):
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f'{text[:30]} is no finite number')
    return value


def _whole_number(text):
    _number(text)
    return int(text)


def finite(content):
    """NaN and infinity as null: JSON has no numbers for them."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_config(run, content):
    """Writes config.json with a checksum of itself. Raises RunError."""
    content = json.loads(json.dumps(finite(content)))
    write_json(Path(run) / 'config.json', content | {'sha256': _digest(content)})


def read_config(run):
    """The configuration that train.py wrote, a dict. Raises RunError."""
    path = Path(run) / 'config.json'
    if not os.path.lexists(path):
        raise RunError(
            f'{run} is not a run folder: it holds no config.json (name the folder run_K that train.py printed)'
        )
    config = read_record(path)
    sha256 = config.pop('sha256', None)
    if sha256 is None:
        raise RunError(f'{path} lacks its checksum: it is incomplete, or of another version of train.py')
    if sha256 != _digest(config):
        raise RunError(f'{path} is damaged: its SHA-256 is {_digest(config)}, not {sha256} as it was written')
    return config


def _digest(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def asked(args):
    """What an evaluation with these arguments says of itself in metrics.json."""
    return {
        'split': args.split,
        'testimages': args.testimages,
        'testmc': args.testmc[-1],
        'bins': args.bins,
        'bnrefresh': args.bnrefresh,
        'laplace': args.laplace,
    }


def metrics_file(run, args):
    """Where an evaluation with these arguments puts what it measures."""
    return run / f'metrics{mark(args.split, args.laplace, args.checkpoint)}.json'


def mark(split, laplace, checkpoint=None):
    """What tells the files of an evaluation from those of the usual one."""
    marks = [split] * (split != 'test') + ['laplace'] * laplace + [str(checkpoint)] * (checkpoint is not None)
    return ''.join(f'-{mark}' for mark in marks)


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


def environment():
    """Versions, git commit and device of this process, for the record."""
    from importlib import metadata

    import jax  # takes most of a second

    packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
    device = jax.devices()[0]
    return {
        'python': platform.python_version(),
        'versions': {package: metadata.version(package) for package in packages},
        'matmul_precision': jax.config.jax_default_matmul_precision,
        'xla_flags': os.environ.get('XLA_FLAGS', ''),
        'git_commit': _git_commit(),
        'device': f'{device.platform}: {device.device_kind}, {os.cpu_count()} CPU cores',
        'cpu': _cpu_name(),
    }


def _cpu_name():
    """Where Linux tells it; else the architecture."""
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.machine()


def provenance(script, argv=None):
    """How the figures of a script come about: its command, argv or that of this process, and the environment."""
    command = ' '.join(['python', script, *(sys.argv[1:] if argv is None else argv)])
    return {'command': command, 'environment': environment()}


def _git_commit():
    """Returns the commit of the repository whose top folder is this file's, None if there is none."""
    top = os.path.dirname(os.path.realpath(__file__))
    if _git(top, 'rev-parse', '--show-prefix') != '':  # the folder lies inside another repository
        return None
    return _git(top, 'describe', '--always', '--dirty', '--abbrev=40', '--match=')


def _git(folder, *arguments):
    """Returns what a command of git says of a folder, None if it fails."""
    elsewhere = ('GIT_DIR', 'GIT_WORK_TREE', 'GIT_INDEX_FILE', 'GIT_COMMON_DIR', 'GIT_OBJECT_DIRECTORY')
    environment = {name: value for name, value in os.environ.items() if name not in elsewhere}
    try:
        command = ['git', *arguments]
        said = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        return said.stdout.strip()
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None
