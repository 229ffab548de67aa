"""The file predictions.npz: the predictions of an evaluation. The metrics can be recomputed from it."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import errors
import metrics
from evaluation import comparison, posteriors
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
    with io.BytesIO() as file:
        np.savez_compressed(file, **arrays)
        json_files.write_bytes(path, file.getvalue())


def read(path: Path) -> tuple[np.ndarray, posteriors.Prediction, int, checkpoints.Progress]:
    """Reads predictions.npz. Returns (labels int [N], Prediction, num_samples, Progress). Raises RunError."""
    try:
        arrays = npy.load_npz(path)
        held = {name: arrays[name] for name in _TYPES}
    except (errors.UserError, KeyError) as error:
        raise folders.RunError(f'{path} is missing or damaged ({error}): evaluate the run without --reuse') from error
    n, k = held['logits'].shape if held['logits'].ndim == 2 else (0, 0)
    shapes = {'labels': (n,), 'logits': (n, k), 'log_probs': (n, k), 'expected_entropy': (n,), 'votes': (n, k)}
    shapes['trained'] = (2,)
    fits = all(
        held[name].shape == shapes.get(name, ()) and held[name].dtype.kind == kind for name, kind in _TYPES.items()
    )
    fits = fits and n and 0 <= held['labels'].min() <= held['labels'].max() < k
    fits = fits and held['trained'].min() >= 0 and held['votes'].min() >= 0 and held['num_samples'] > 0
    if not fits or (held['votes'].sum(axis=1) != held['num_samples']).any():
        raise folders.RunError(f'{path} does not have the format of test.py: evaluate the run without --reuse')
    probs = metrics.softmax(held['log_probs'])
    prediction = posteriors.Prediction(held['logits'], probs, held['expected_entropy'], held['votes'])
    return held['labels'], prediction, int(held['num_samples']), checkpoints.Progress(*held['trained'].tolist())


def results_of(
    run: Path, config: dict, split: str = 'test'
) -> Iterator[tuple[checkpoints.Progress, comparison.Result]]:
    """Yields the saved predictions of a run: with its own posterior, with a Laplace approximation, or with both.

    Raises RunError if neither file exists, or if one is damaged.
    """
    files = {laplace: Request(split, laplace=laplace).predictions_file(run) for laplace in (False, True)}
    for laplace, path in files.items():
        if path.exists() or not any(other.exists() for other in files.values()):
            labels, prediction, num_samples, progress = read(path)
            probs = prediction.probs_at_mean, prediction.probs
            yield progress, comparison.Result(config['flags'], labels, *probs, num_samples, laplace)


_TYPES = {
    'labels': 'i', 'logits': 'f', 'log_probs': 'f', 'expected_entropy': 'f', 'votes': 'i', 'num_samples': 'i',
    'trained': 'i',
}  # fmt: skip
