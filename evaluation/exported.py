"""Exports: the mean and the posterior of a run, in a folder that other programs can read.

    FOLDER/
        posterior.safetensors   weights, batch statistics and the posterior; the header holds settings and a SHA-256
        config.json             the configuration of the run
        README.md               a model card, from evaluation.cards

Tensors have the names of checkpoints, such as params.head.kernel. The momentum, counters and random keys are left out,
because only training needs them. `evaluation.trained.restore` reads an export like a run folder.
"""

import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

import errors
import experiment
from readers import files
from runs import checkpoints, folders, hosts, json_files, training_flags

FORMAT = '1'  # raise it when older versions would misread a new export

# The fields of the optimizers' states that predictions and samples need.
FIELDS = ('params', 'batch_stats', 'precision', 'hessian', 'variance', 'deviations', 'num_snapshots')


def restore(folder: Path, config: dict) -> tuple[Any, checkpoints.Progress]:
    """Reads an export in the first process, and returns it in every process.

    Args:
        folder: the folder of the export.
        config: the configuration in the folder, as from training_flags.checked_config.

    Returns:
        (state, progress). Arrays are on the host. Fields of the state that are not in FIELDS are None.

    Raises:
        DataError, RunError: the export is missing, damaged or of another configuration.
    """
    state = _of_posterior(experiment.create(config).state_shapes())

    def read():
        nonlocal state
        state, progress = _read_state(folder, config)
        return progress._asdict()

    progress = hosts.from_first(read)
    return hosts.arrays_from_first(state), checkpoints.Progress(**progress)


def weights(folder: Path) -> tuple[Any, Any]:
    """Returns (params, batch_stats) of an export, two pytrees of arrays on the host. Raises DataError and RunError."""
    config = hosts.from_first(lambda: training_flags.checked_config(folder))
    state, _ = restore(folder, config)
    return state.params, state.batch_stats


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Returns all arrays of a safetensors file by name, on the host. Raises DataError."""
    with files.opened(path), files.one_error(path), safetensors.safe_open(path, 'np') as opened:
        metadata, found = opened.metadata() or {}, opened.get_tensors()
    if 'sha256' in metadata:
        _require_digest(path, metadata.pop('sha256'), metadata, found)
    return found


def require_whole(folder: Path, config: dict) -> None:
    """Raises a DataError or RunError if `restore` would fail."""
    _read_state(folder, config)


def require_place(folder: Path) -> None:
    """Raises a RunError if `write` would fail because of what is there. Writes nothing."""
    if os.path.islink(folder):
        raise folders.RunError(f'--export {folder} is a link to another folder: name the folder itself')
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise folders.RunError(f'--export {folder} is a file: name a new folder')
    parents = Path(os.path.abspath(folder)).parents
    nearest = next(path for path in parents if os.path.lexists(path))
    try:
        if os.path.isdir(folder) and os.listdir(folder):
            raise folders.RunError(f'--export {folder} is not empty: name a new or an empty folder')
    except OSError as error:
        raise folders.RunError(f'--export {folder} cannot be read: {error.strerror}') from error
    if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK | os.X_OK):
        raise folders.RunError(f'--export {folder}: {nearest} is not a folder, or is read-only: name another folder')


def write(folder: Path, restored: Any, card: str) -> None:
    """Writes an export whole or not at all, and reads it back. Raises RunError.

    Args:
        folder: the folder. It must not exist, or be empty.
        restored: the evaluation.trained.Trained.
        card: the model card, in Markdown.
    """
    folder = Path(os.path.abspath(folder))
    held = checkpoints.named(_of_posterior(restored.state))
    tensors = {name: np.asarray(x.addressable_data(0), order='C') for name, x in held.items()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with errors.replacing(folder) as partial:
            partial.mkdir()
            (partial / 'README.md').write_bytes(card.encode())
            (partial / 'config.json').write_bytes(json_files.read_text(restored.run / 'config.json').encode())
            settings = _settings(partial, restored.config)
            _save(partial / checkpoints.EXPORT, tensors, settings | _progress_text(restored.progress))
            shutil.copymode(partial / 'config.json', partial / checkpoints.EXPORT)  # the library hides it from others
            _read(partial / checkpoints.EXPORT, tensors, settings)
            for path in (*partial.iterdir(), partial):
                errors.flush(path)
        errors.flush(folder.parent)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise folders.RunError(f'--export {folder} cannot be written: {errors.reason(error)}') from error


def _of_posterior(state):
    """Returns a state without the arrays that only training needs."""
    return state._replace(**dict.fromkeys(set(state._fields) - {*FIELDS}))


def _read_state(folder, config):
    like = _of_posterior(experiment.create(config).state_shapes())
    needed = checkpoints.named(like)
    tensors, progress = _read(Path(folder) / checkpoints.EXPORT, needed, _settings(folder, config))
    return jax.tree.unflatten(jax.tree.structure(like), [tensors[name] for name in needed]), progress


def _settings(folder, config):
    """Returns the entries of the header that follow from config.json. Tensors of another run have other entries."""
    flags, num_train = config['flags'], config['dataset']['num_train']
    return {
        'format': FORMAT,
        'optimizer': flags['optim'],
        'num_data': repr(experiment.create(config).num_data),
        'weight_decay': repr(experiment.optimizer_arguments(flags, num_train)['weight_decay']),
        'config': str(json_files.read_record(Path(folder) / 'config.json').get('sha256')),
    }


def _progress_text(progress):
    return {name: str(number) for name, number in progress.trained().items()}


def _save(path, tensors, metadata):
    safetensors.numpy.save_file(tensors, path, metadata | {'sha256': _digest(tensors, metadata)})


def _read(path, needed, settings):
    """Returns the tensors of a file by name, and the progress of training. Raises DataError and RunError.

    Args:
        path: the file.
        needed: {name: what has the dtype and the shape of the tensor}.
        settings: the entries that the header must have.
    """
    with files.opened(path) as file, files.one_error(path):
        num_bytes = os.fstat(file.fileno()).st_size
        most = sum(math.prod(x.shape) * x.dtype.itemsize + 1024 for x in needed.values()) + (1 << 20)
        if num_bytes > most:
            raise folders.RunError(f'{path} has {num_bytes} bytes, but config.json needs {most} at most: {_AGAIN}')
        with safetensors.safe_open(path, 'np') as opened:
            metadata, tensors = opened.metadata() or {}, opened.get_tensors()
    if metadata.get('format') != settings['format']:
        what = f'{path} has format {metadata.get("format")}, but this version reads format {settings["format"]}'
        raise folders.RunError(f'{what}: use the version of test.py that wrote it, or export the run again')
    _require_digest(path, metadata.pop('sha256', None), metadata, tensors)
    for name, value in settings.items():
        if metadata.get(name) != value:
            what = f'{path} has {name} {metadata.get(name)}, but config.json beside it has {value}'
            raise folders.RunError(f'{what}: {_AGAIN}')
    try:
        checkpoints.require_types(tensors, needed)
    except errors.UserError as error:
        raise folders.RunError(f'{path} does not fit config.json: {error}: {_AGAIN}') from error
    return tensors, _progress(path, metadata)


def _require_digest(path, sha256, metadata, tensors):
    if sha256 != _digest(tensors, metadata):
        what = f'{path} is damaged: its SHA-256 is {_digest(tensors, metadata)}, but test.py recorded {sha256}'
        raise folders.RunError(f'{what}: {_AGAIN}')


_AGAIN = 'copy all files of the export again, or export the run again'


def _progress(path, metadata):
    numbers = [metadata.get(name, '') for name in checkpoints.Progress().trained()]
    if not all(re.fullmatch('[0-9]{1,9}', number) for number in numbers):
        raise folders.RunError(f'{path} does not say how long the run was trained: {numbers}: {_AGAIN}')
    return checkpoints.Progress(*map(int, numbers))


def _digest(tensors, metadata):
    """Returns the SHA-256 of tensors and metadata. It detects corruption, not tampering."""
    sha256 = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha256.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
        sha256.update(np.ascontiguousarray(tensor).data)
    return sha256.hexdigest()
