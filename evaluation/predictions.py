"""The file predictions.npz: the predictions of an evaluation. The metrics can be recomputed from it."""

import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import errors
import experiment
import metrics
from evaluation import comparison, corruptions, posteriors
from evaluation.request import Request
from readers import npy
from runs import checkpoints, folders, json_files


def write(
    path: Path, prediction: posteriors.Prediction, labels: np.ndarray, num_samples: int, progress: checkpoints.Progress
) -> None:
    """Writes predictions.npz. docs/evaluation.md documents the format. Raises RunError.

    Args:
        path: the file.
        prediction: the Prediction for N images.
        labels: int [N].
        num_samples: the number of samples of the Prediction.
        progress: the training progress of the evaluated checkpoint.
    """
    with np.errstate(divide='ignore'):
        log_probs = np.log(prediction.probs)
    arrays = {
        'labels': labels.astype(np.int32),
        'logits': prediction.logits.astype(np.float32),
        'probs': prediction.probs.astype(np.float32),
        'log_probs': log_probs.astype(np.float32),
        'entropy': prediction.entropy.astype(np.float32),
        'expected_entropy': prediction.expected_entropy.astype(np.float32),
        'votes': prediction.votes,
        'num_samples': np.int32(num_samples),
        'trained': np.int32([progress.epoch, progress.step]),
    }
    known = {name: getattr(prediction, name) for name in _OF_LATER_VERSIONS}
    arrays |= {name: values.astype(np.float32) for name, values in known.items() if values is not None}
    with io.BytesIO() as file:
        np.savez_compressed(file, **arrays)
        json_files.write_bytes(path, file.getvalue())


def read(path: Path) -> tuple[np.ndarray, posteriors.Prediction, int, checkpoints.Progress]:
    """Reads predictions.npz. Returns (labels int [N], Prediction, num_samples, Progress). Raises RunError."""
    try:
        arrays = npy.load_npz(path)
        held = {name: arrays[name] for name in _TYPES}
        later = {name: arrays[name] for name in _OF_LATER_VERSIONS if name in arrays}
    except (errors.UserError, KeyError) as error:
        raise folders.RunError(f'{path} is missing or damaged ({error}): evaluate the run without --reuse') from error
    n, k = held['logits'].shape if held['logits'].ndim == 2 else (0, 0)
    shapes = {'labels': (n,), 'logits': (n, k), 'log_probs': (n, k), 'expected_entropy': (n,), 'votes': (n, k)}
    shapes['trained'] = (2,)
    fits = all(
        held[name].shape == shapes.get(name, ()) and held[name].dtype.kind == kind for name, kind in _TYPES.items()
    )
    fits = fits and all(values.shape == (n,) and values.dtype.kind == 'f' for values in later.values())
    fits = fits and n and 0 <= held['labels'].min() <= held['labels'].max() < k
    fits = fits and held['trained'].min() >= 0 and held['votes'].min() >= 0 and held['num_samples'] > 0
    if not fits or (held['votes'].sum(axis=1) != held['num_samples']).any():
        raise folders.RunError(f'{path} does not have the format of test.py: evaluate the run without --reuse')
    probs = metrics.softmax(held['log_probs'])
    prediction = posteriors.Prediction(held['logits'], probs, held['expected_entropy'], held['votes'], **later)
    return held['labels'], prediction, int(held['num_samples']), checkpoints.Progress(*held['trained'].tolist())


def results_of(run: Path, config: dict, asked: Request) -> Iterator[tuple[checkpoints.Progress, comparison.Result]]:
    """Yields the saved predictions of a run, with its own posterior and with a Laplace approximation if asked.

    Both files hold the predictions at the mean. So predictions.npz may be missing if the other file is read.

    Args:
        run: the run folder.
        config: the run's configuration.
        asked: says which images, and whether to read predictions-laplace.npz. The file is read for point estimates
            only, because other runs have none.

    Raises:
        RunError: a file is missing or damaged, or the saved approximation is not the one that was asked for.
    """
    with_laplace = bool(asked.laplace) and experiment.is_point(config['flags']['optim'])
    usual = Request(asked.split)
    if usual.predictions_file(run).exists() or not with_laplace:
        yield _saved(run, usual, config, False)
    if with_laplace:
        approximation = Request(asked.split, laplace=asked.laplace, laplaceprior=asked.laplaceprior)
        _require_approximation(run, approximation)
        yield _saved(run, approximation, config, True)


def _require_approximation(run, asked):
    """Raises a RunError if metrics-laplace.json describes another approximation. The file may be missing."""
    try:
        saved = json_files.read_json(asked.metrics_file(run))['laplace']
        found = {name: saved[name] for name in asked.recorded()['laplace']}
    except (OSError, ValueError, LookupError, TypeError):
        return
    if found != asked.recorded()['laplace']:
        flags = errors.printable(f'--laplace {found["structure"]} --laplaceprior {found["prior"]}')
        raise folders.RunError(f'{asked.predictions_file(run)} was made with {flags}: give these flags')


def _saved(run, request, config, with_laplace):
    labels, prediction, num_samples, progress = read(request.predictions_file(run))
    probs = prediction.probs_at_mean, prediction.probs
    measured = _measured(request.metrics_file(run), num_samples, progress)
    return progress, comparison.Result(config['flags'], labels, *probs, num_samples, with_laplace, measured=measured)


def _measured(path, num_samples, progress):
    """Returns the entries of metrics.json that pictures draw.

    Returns None if the file is missing or damaged, or belongs to another evaluation than the predictions. The tables do
    not need it.
    """
    try:
        found = json_files.read_json(path)
        if (found['testmc'], found['trained']) != (num_samples, progress.trained()):
            return None
        drawn = {name: found[name] for name in ('mean', 'average', 'samples', 'corruptions') if name in found}
        points = [drawn['mean'], drawn['average'], *drawn.get('samples', [])]
        for severities in drawn.get('corruptions', {}).values():
            points += [severities[i][at] for i in range(len(corruptions.SEVERITIES)) for at in ('mean', 'average')]
        for point in points:
            json_files.require_numbers(point, metrics.SHORT)
            point.update({name: math.nan for name in metrics.SHORT if point[name] is None})
        in_order = all(type(point['testmc']) is int and point['testmc'] > 0 for point in drawn.get('samples', []))
        return drawn if in_order else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


_TYPES = {
    'labels': 'i', 'logits': 'f', 'log_probs': 'f', 'expected_entropy': 'f', 'votes': 'i', 'num_samples': 'i',
    'trained': 'i',
}  # fmt: skip
_OF_LATER_VERSIONS = ('energy', 'max_logit')  # float [N], which files of older versions lack
