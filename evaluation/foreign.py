"""Predictions that any program saved: an .npz file with the labels and the probabilities or logits of N images.

Reading executes nothing. This module needs no JAX.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

import errors
import metrics
from evaluation import comparison, tables
from readers import files, npy
from readers.files import DataError

EXAMPLE = "np.savez('predictions.npz', labels=labels, probs=probs)"
TOLERANCE = 0.01  # how far the probabilities of an image may sum from 1, because some programs compute in 16 bits

# The arrays that are read, with their dimensions and the kinds of their dtypes.
_ARRAYS = {
    'labels': ('N', 'iu'), 'logits': ('NK', 'f'), 'probs': ('NK', 'f'), 'log_probs': ('NK', 'f'),
    'samples': ('SNK', 'f'), 'expected_entropy': ('N', 'f'), 'votes': ('NK', 'iu'), 'num_samples': ('', 'iu'),
    'class_names': ('K', 'U'),
}  # fmt: skip
_KINDS = {'iu': 'whole numbers', 'f': 'floating-point numbers', 'U': 'text'}
_FEWEST = {'N': (1, 'images'), 'K': (2, 'classes'), 'S': (1, 'samples')}


class Saved(NamedTuple):
    """The predictions of a file for N images.

    Attributes:
        labels: int32 [N].
        probs: {'mean': float64 [N, K] at the posterior mean, 'average': float64 [N, K] averaged over samples}. Has no
            'mean' if the file holds a single prediction for each image.
        num_samples: the number of posterior samples, 0 for a single prediction, None if the file does not say it.
        expected_entropy: float64 [N], the mean entropy of the samples in nats, or None.
        votes: int [N, K], the number of samples that predict class k, or None.
        class_names: the name of each class, or None.
    """

    labels: np.ndarray
    probs: dict[str, np.ndarray]
    num_samples: int | None
    expected_entropy: np.ndarray | None
    votes: np.ndarray | None
    class_names: list[str] | None

    @property
    def title(self) -> str:
        """Returns what predicts besides the mean, such as 'prediction' or '8 samples'."""
        return 'prediction' if self.num_samples == 0 else tables.samples(self.num_samples)

    def measure(self, num_bins: int) -> dict:
        """Returns the entries of metrics.json about these predictions, with names as in test.py.

        Args:
            num_bins: the number of bins of ECE, MCE and the reliability diagram.
        """
        results = {'num_images': len(self.labels), 'testmc': self.num_samples, 'bins': num_bins}
        for at, probs in self.probs.items():
            results[at] = metrics.summary(probs, self.labels, num_bins)
            results[at]['entropy'] = float(metrics.entropy(probs).mean())
        if self.expected_entropy is not None:
            entropy = metrics.entropy(self.probs['average'])
            information = metrics.mutual_information(entropy, self.expected_entropy)
            results['average']['mutual_information'] = float(information.mean())
            results['average']['disagreement'] = float(metrics.disagreement(self.votes).mean())
        results['intervals'] = {at: metrics.intervals(p, self.labels, num_bins) for at, p in self.probs.items()}
        bins = {at: metrics.reliability(p, self.labels, num_bins) for at, p in self.probs.items()}
        results['reliability'] = {at: {name: x.tolist() for name, x in of.items()} for at, of in bins.items()}
        return results

    def result(self, name: str) -> comparison.Result:
        """Returns the Result of a method with this name. Without a mean, the method has a single row in comparisons."""
        average = self.probs['average']
        at_mean, number = (self.probs['mean'], self.num_samples) if 'mean' in self.probs else (average, 0)
        return comparison.Result({'optim': name}, self.labels, at_mean, average, number)


def read(path: Path) -> Saved:
    """Reads the predictions of any program. docs/evaluation.md documents the format.

    Raises a DataError that says which array is wrong, and what it must be.
    """
    try:
        arrays = npy.load_npz(path, _ARRAYS)
    except DataError as error:
        hint = f'; save plain arrays, such as {EXAMPLE}' if os.path.isfile(path) else ''
        raise DataError(f'{error}{hint}') from error
    if 'labels' not in arrays or not arrays.keys() & {'probs', 'log_probs', 'logits', 'samples'}:
        needed = f'labels, and probs, logits or samples, such as {EXAMPLE}'
        raise DataError(f'{path} holds no {"predictions" if "labels" in arrays else "labels"}: save {needed}')
    sizes = _checked_sizes(path, arrays)
    labels = files.checked_labels(arrays['labels'], sizes['K'], path)
    names = None
    if 'class_names' in arrays:
        with files.one_error(path):  # damaged text may hold numbers that are no characters
            names = [errors.printable(name) for name in arrays['class_names']]
    return Saved(labels, *_predictions(path, arrays), names)


def _checked_sizes(path, arrays):
    """Returns {'N': number of images, 'K': number of classes, ...}. Raises DataError for a wrong dtype or shape."""
    sizes = {}
    for name, (dimensions, kinds) in _ARRAYS.items():
        if name not in arrays:
            continue
        array = arrays[name]
        if array.dtype.kind not in kinds or array.ndim != len(dimensions):
            needed = f'{_KINDS[kinds]} [{", ".join(dimensions)}]'
            raise DataError(f'{path}: {name} is {array.dtype} {list(array.shape)}, but must be {needed}')
        for dimension, size in zip(dimensions, array.shape, strict=True):
            fewest, noun = _FEWEST[dimension]
            known, of = sizes.setdefault(dimension, (size, name))
            if size != known:
                raise DataError(f'{path}: {name} has {size} {noun}, but {of} has {known}')
            if size < fewest:
                raise DataError(f'{path}: {name} has {size} {noun}, but at least {fewest} are needed')
    return {dimension: size for dimension, (size, _) in sizes.items()}


def _predictions(path, arrays):
    """Returns the fields of Saved from `probs` to `votes`. Raises DataError."""
    found = {name: _probs(path, name, arrays[name]) for name in ('logits', 'probs', 'log_probs') if name in arrays}
    at_mean, average = found.get('logits'), found.get('log_probs', found.get('probs'))
    if 'samples' in arrays:
        of_samples, *spread = _averages(path, arrays['samples'])
        if average is not None and np.abs(average - of_samples).max() > TOLERANCE:
            what = 'probs is not the average of samples'
            raise DataError(f'{path}: {what}: save only samples, and the prediction without samples as logits')
        average = of_samples
    else:
        spread = _saved_spread(path, arrays)
    if average is None or (at_mean is not None and np.allclose(at_mean, average, atol=1e-6 if spread[0] else 1e-3)):
        return {'average': at_mean}, 0, None, None
    if at_mean is None:
        return {'average': average}, spread[0] or 0, *spread[1:]
    return {'mean': at_mean, 'average': average}, *spread


def _probs(path, name, values):
    """Returns probabilities, float64 [N, K] with rows that sum to 1. Raises DataError."""
    with np.errstate(invalid='ignore', over='ignore'):
        values = values.astype(np.float64)
    if name == 'logits':
        highest = values.max(axis=1)  # nan if any logit is nan
        _require(np.isfinite(highest), path, name, 'are not finite')
        return metrics.softmax(values)
    if name == 'log_probs':
        with np.errstate(over='ignore'):
            name, values = 'exp(log_probs)', np.exp(values)
    _require(np.isfinite(values).all(axis=1), path, name, 'are not finite')
    _require((values >= 0).all(axis=1), path, name, 'are negative; save these numbers as logits')
    sums = values.sum(axis=1)
    problem = 'add up to {:.4g}, not 1; save the output of softmax, or save logits'
    _require(np.abs(sums - 1) <= TOLERANCE, path, name, problem, sums)
    return values / sums[:, None]


def _require(fits, path, name, problem, values=None):
    """Raises a DataError that names the first image that does not fit, and its value if there are values."""
    if not fits.all():
        i = fits.argmin()
        raise DataError(f'{path}: {name} of image {i} {problem if values is None else problem.format(values[i])}')


def _averages(path, samples):
    """Returns the average of samples [S, N, K], S, the mean entropy of the samples, and votes. Raises DataError."""
    total, entropy, votes = 0, 0, np.zeros(samples.shape[1:], np.int32)
    for i, sample in enumerate(samples):
        probs = _probs(path, f'samples[{i}]', sample)
        total, entropy = total + probs, entropy + metrics.entropy(probs)
        votes[np.arange(len(votes)), probs.argmax(axis=1)] += 1
    return total / len(samples), len(samples), entropy / len(samples), votes


def _saved_spread(path, arrays):
    """Returns the number of samples, their mean entropy and votes, as test.py saves them. Raises DataError."""
    number = int(arrays['num_samples']) if 'num_samples' in arrays else None
    if number is not None and number < 1:
        raise DataError(f'{path}: num_samples is {number}, but must be 1 or more')
    if not {'expected_entropy', 'votes'} <= arrays.keys():
        return number, None, None
    entropy, votes = arrays['expected_entropy'].astype(np.float64), arrays['votes']
    _require(np.isfinite(entropy), path, 'expected_entropy', 'is not finite')
    number = int(votes[0].sum()) if number is None else number
    _require((votes.min(axis=1) >= 0) & (votes.sum(axis=1) == number), path, 'votes', f'do not add up to {number}')
    return number, entropy, votes
