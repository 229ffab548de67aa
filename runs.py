"""Run folders: configuration, log, checkpoints, metrics.

    RESULTSFOLDER/DATASET_MODEL/OPTIM/run_K/
        config.json     all flags, the data set's properties, versions, git commit, device
        log.jsonl       a line an epoch
        checkpoints/    the state after the last two epochs (Orbax)
        metrics.json    what test.py measured

Nothing in it is a pickle.
"""

import itertools
import json
import logging
import math
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import jax
import orbax.checkpoint as ocp

logging.getLogger('absl').setLevel(logging.ERROR)  # Orbax warns of the options that it was given


class RunError(Exception):
    """A run folder that cannot be made, or is not what it should be, in one line for the user."""


def create(results_folder, dataset, model, optim):
    """A new folder run_K with the first free K, made by this process and no other. Raises RunError."""
    parent = Path(results_folder) / f'{dataset}_{model}'.replace('/', '_') / optim
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


def write_json(path, content):
    """Writes JSON so that a reader sees the old file or the new one, never a part. Raises RunError."""
    partial = path.with_name(f'{path.name}.{os.getpid()}.partial')
    try:
        partial.write_text(json.dumps(_finite(content), indent=2) + '\n')
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunError(f'{path} cannot be written: {error.strerror}') from error


def append_log(run, record):
    """Adds an epoch's line to log.jsonl."""
    with open(run / 'log.jsonl', 'a') as file:
        file.write(json.dumps(_finite(record)) + '\n')


def _finite(content):
    """NaN and infinity as null: JSON has no numbers for them."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_config(run):
    """The configuration that train.py wrote, a dict. Raises RunError."""
    path = Path(run) / 'config.json'
    if not path.exists():
        raise RunError(
            f'{run} is not a run folder: it holds no config.json (name the folder run_K that train.py printed)'
        )
    try:
        config = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise RunError(f'{path} is damaged or cannot be read: {error}') from error
    needed = {'flags': _NEEDED_FLAGS, 'dataset': ('num_train', 'num_classes', 'image_shape', 'mean', 'std')}
    for part, names in needed.items():
        held = config.get(part) if isinstance(config, dict) else None
        missing = [name for name in names if not isinstance(held, dict) or name not in held]
        if missing:
            raise RunError(f'{path} lacks {part}.{missing[0]}: it is incomplete, or of another version of train.py')
    return config


_NEEDED_FLAGS = (
    'alpha', 'batchsplit', 'beta1', 'beta2', 'custominit', 'dafactor', 'damping', 'dataset', 'datasetfolder', 'model',
    'optim', 'precision', 'priorprec', 'randomseed', 'rho',
)  # fmt: skip


def environment():
    """Versions, git commit and device of this process, for the record."""
    packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
    device = jax.devices()[0]
    return {
        'python': platform.python_version(),
        'versions': {package: metadata.version(package) for package in packages},
        'git_commit': _git_commit(),
        'device': f'{device.platform}: {device.device_kind}, {os.cpu_count()} CPU cores',
    }


def _git_commit():
    try:
        describe = ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--match=']
        folder = Path(__file__).parent
        return subprocess.run(describe, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def open_checkpoints(run):
    """An Orbax manager of the run's checkpoints, a context manager; it keeps the last two."""
    folder = Path(run).absolute() / 'checkpoints'
    return ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2))


def save(checkpoints, epoch, state):
    """Copies the state and writes it in the background, so that the state may be donated at once."""
    checkpoints.save(epoch, args=ocp.args.StandardSave(state))


def restore(run, like):
    """The newest checkpoint as (epoch, state) on this machine's first device, in the structure of `like`.

    like: jax.ShapeDtypeStructs. Raises RunError.
    """
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), like)
    folder = Path(run).absolute() / 'checkpoints'
    if not folder.is_dir():
        raise RunError(f'{run} holds no checkpoint: no epoch of it was completed')
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(read_only=True)) as checkpoints:
        epoch = checkpoints.latest_step()
        if epoch is None:
            raise RunError(f'{run} holds no checkpoint: no epoch of it was completed')
        try:
            return epoch, checkpoints.restore(epoch, args=ocp.args.StandardRestore(like))
        except Exception as error:  # what Orbax raises for damaged files is not documented
            lines = str(error).splitlines() or [type(error).__name__]
            where = f'{folder / str(epoch)} is damaged, or does not fit the model and optimizer of config.json'
            raise RunError(f'{where}: {lines[0].split(". ")[0][:200]}') from error
