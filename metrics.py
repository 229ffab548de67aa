"""How good and how sure: accuracy, NLL, ECE and AUROC of predicted class probabilities.

Every function takes `probs`, float [N, K] with rows that sum to 1, and `labels`, int [N], and returns a
float over all N images. They are plain NumPy in float64.
"""

import numpy as np


def softmax(logits):
    """Probabilities in float64 from logits [N, K] of any precision."""
    logits = np.asarray(logits, dtype=np.float64)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def accuracy(probs, labels):
    """Share of images whose most probable class is the true one, in [0, 1]."""
    return float(np.mean(_correct(probs, labels)))


def nll(probs, labels):
    """Mean negative log-likelihood in nats; infinite where a true class has probability 0."""
    true_probs = np.asarray(probs, dtype=np.float64)[np.arange(len(labels)), labels]
    with np.errstate(divide='ignore'):
        return float(-np.mean(np.log(true_probs)))


def ece(probs, labels, num_bins=20):
    """Expected calibration error (Guo et al., 2017): the gap between accuracy and confidence, averaged over images.

    The gap is taken in each of `num_bins` equally wide bins (lower, upper] of the top probability. In [0, 1].
    """
    confidence, correct = _confidence(probs), _correct(probs, labels)
    inner_edges = np.linspace(0, 1, num_bins + 1)[1:-1]
    bins = np.searchsorted(inner_edges, confidence, side='left')
    gaps = np.bincount(bins, weights=correct - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(labels))


def auroc(probs, labels):
    """Probability that a right prediction is more confident than a wrong one (Mann-Whitney), ties counted half.

    In [0, 1]; nan where all predictions are right, or all wrong.
    """
    right, wrong = _split_by_correctness(probs, labels)
    if not len(right) or not len(wrong):
        return float('nan')
    below = np.searchsorted(wrong, right, side='left')
    not_above = np.searchsorted(wrong, right, side='right')
    return float((below + not_above).mean() / 2 / len(wrong))


def auroc_grid(probs, labels):
    """`auroc` as the reference approximates it, comparable with the published numbers.

    2,499 thresholds 0.9996, 0.9992, ..., 0.0004 and the trapezoid rule from (0, 0) to (1, 1): predictions more
    confident than 0.9996 all count as ties, so a network that is sure of most images is judged too low.
    """
    right, wrong = _split_by_correctness(probs, labels)
    if not len(right) or not len(wrong):
        return float('nan')
    thresholds = np.arange(2499, 0, -1) / 2500
    true_positives = 1 - np.searchsorted(right, thresholds, side='left') / len(right)
    false_positives = 1 - np.searchsorted(wrong, thresholds, side='left') / len(wrong)
    return float(np.trapezoid([0, *true_positives, 1], [0, *false_positives, 1]))


def summary(probs, labels):
    """The metrics that test.py prints, by name; all are nan if a probability is, as after a divergence."""
    diverged = not np.isfinite(probs).all()
    metrics = (accuracy, nll, ece, auroc_grid, auroc)
    return {metric.__name__: float('nan') if diverged else metric(probs, labels) for metric in metrics}


def _confidence(probs):
    return np.asarray(probs, dtype=np.float64).max(axis=1)


def _correct(probs, labels):
    return np.argmax(probs, axis=1) == np.asarray(labels)


def _split_by_correctness(probs, labels):
    """Sorted confidences of the right and of the wrong predictions."""
    confidence, correct = _confidence(probs), _correct(probs, labels)
    return np.sort(confidence[correct]), np.sort(confidence[~correct])
