"""How good and how sure: metrics of predicted class probabilities, in float64 NumPy.

The metrics take these arguments:

    probs    float [N, K], rows that sum to 1
    labels   int [N]
    weights  how often every image counts, once by default: [N], or [R, N] for R resamples of the images at once

A metric is a float, or float [R] with weights [R, N]. METRICS lists all metrics. A metric is nan if a probability is
nan or infinite, because a diverged network must not look like a result. Confidence is the largest probability of an
image. No metric depends on the order of images with tied confidences.
"""

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from scipy import special


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns probabilities, float64 [N, K], of logits [N, K] of any precision. A row with nan or inf becomes nan."""
    with np.errstate(invalid='ignore'):
        return special.softmax(np.asarray(logits, dtype=np.float64), axis=1)


def _nan_unless_finite(metric):
    """Makes a metric return nan if any probability is nan or infinite, one nan for each resample."""

    @functools.wraps(metric)
    def checked(probs, labels, weights=None, **options):
        if not np.isfinite(probs).all():
            return _scalar(np.full(np.shape(weights)[:-1], np.nan))
        return metric(probs, labels, **options if weights is None else {'weights': weights} | options)

    return checked


@_nan_unless_finite
def accuracy(probs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float | np.ndarray:
    """Returns the share of images whose most probable class is the true class, in [0, 1]."""
    return _mean(_correct(probs, labels), weights)


@_nan_unless_finite
def top5(probs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float | np.ndarray:
    """Returns the share of images with fewer than five classes more probable than the true class, in [0, 1]."""
    probs = np.asarray(probs)
    true_probs = probs[np.arange(len(labels)), labels]
    return _mean((probs > true_probs[:, None]).sum(axis=1) < 5, weights)


@_nan_unless_finite
def nll(probs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float | np.ndarray:
    """Returns the mean negative log-likelihood in nats. The NLL is infinite if a true class has probability 0."""
    true_probs = np.asarray(probs, dtype=np.float64)[np.arange(len(labels)), labels]
    with np.errstate(divide='ignore', invalid='ignore'):
        return _mean(-np.log(true_probs), weights)


@_nan_unless_finite
def brier(probs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float | np.ndarray:
    """Returns the Brier score (Brier, 1950), in [0, 2]: the mean of Σ_k (p_k − y_k)² with the one-hot label y."""
    probs = np.asarray(probs, dtype=np.float64)
    true_probs = probs[np.arange(len(labels)), labels]
    return _mean(np.square(probs).sum(axis=1) + 1 - 2 * true_probs, weights)


@_nan_unless_finite
def ece(
    probs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None, num_bins: int = 20
) -> float | np.ndarray:
    """Returns the expected calibration error (Guo et al., 2017), in [0, 1].

    The confidence is divided into `num_bins` equally wide bins (lower, upper]. The gap of a bin is the absolute
    difference between accuracy and mean confidence. The ECE is the gap, averaged over images.
    """
    gaps, _ = _top_label_bins(probs, labels, weights, num_bins)
    return _scalar(np.abs(gaps).sum(axis=-1) / _total(labels, weights))


@_nan_unless_finite
def mce(
    probs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None, num_bins: int = 20
) -> float | np.ndarray:
    """Returns the maximum calibration error (Guo et al., 2017): the largest gap of any non-empty bin of `ece`."""
    gaps, counts = _top_label_bins(probs, labels, weights, num_bins)
    return _scalar((np.abs(gaps) / np.where(counts > 0, counts, 1)).max(axis=-1))


def reliability(probs: np.ndarray, labels: np.ndarray, num_bins: int = 20) -> dict[str, np.ndarray]:
    """Returns the bins of `ece`, from the lowest confidence to the highest.

    Returns:
        'counts': int [num_bins], the number of images in each bin.
        'accuracy': float [num_bins], the accuracy in each bin, nan for an empty bin. All accuracies are nan if a
            probability is not finite.
        'confidence': float [num_bins], the mean confidence in each bin, nan for an empty bin.
    """
    confidence = _confidence(probs)
    correct, counts = _bins(confidence, _where_finite(_correct(probs, labels), probs), None, num_bins)
    confident, _ = _bins(confidence, confidence, None, num_bins)
    return {'counts': counts, 'accuracy': _ratio(correct, counts), 'confidence': _ratio(confident, counts)}


@_nan_unless_finite
def adaptive_ece(
    probs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None, num_bins: int = 15
) -> float | np.ndarray:
    """Returns the ECE over bins with equally many images (Nguyen & O'Connor, 2015). Tied confidences share a bin."""
    confidence = _confidence(probs)
    gaps, counts = _by_threshold(confidence, _correct(probs, labels) - confidence, weights)
    upper = np.cumsum(counts, axis=-1)
    total = upper[..., -1:]
    bins = np.minimum((upper - counts) * num_bins // total, num_bins - 1).astype(int)
    bins += num_bins * np.arange(total.size).reshape(total.shape)
    sums = np.bincount(bins.ravel(), gaps.ravel(), num_bins * total.size).reshape(*total.shape[:-1], num_bins)
    return _scalar(np.abs(sums).sum(axis=-1) / total[..., 0])


@_nan_unless_finite
def classwise_ece(
    probs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None, num_bins: int = 15
) -> float | np.ndarray:
    """Returns the classwise ECE (Kull et al., 2019).

    Each class is a binary event: an image belongs to the class or not. The ECE of a class compares the probability of
    the class with the frequency of the event. The classwise ECE is the mean over the classes.
    """
    probs = np.asarray(probs, dtype=np.float64)
    total = 0
    for k, column in enumerate(probs.T):
        gaps, _ = _bins(column, (labels == k) - column, weights, num_bins)
        total = total + np.abs(gaps).sum(axis=-1)
    return _scalar(total / probs.shape[1] / _total(labels, weights))


@_nan_unless_finite
def auroc(probs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float | np.ndarray:
    """Returns the probability that a right prediction is more confident than a wrong prediction (Mann-Whitney).

    The AUROC is in [0, 1]. Ties count half. Returns nan if all predictions are right, or all are wrong.
    """
    return area_under_roc(_confidence(probs), _correct(probs, labels), weights)


@_nan_unless_finite
def auroc_grid(probs: np.ndarray, labels: np.ndarray) -> float:
    """Returns `auroc` as the reference code approximates it, comparable with the published numbers.

    The reference takes 2,499 thresholds 0.9996, 0.9992, ..., 0.0004 and the trapezoid rule from (0, 0) to (1, 1).
    Predictions more confident than 0.9996 all count as ties. So a network that is sure of most images is judged too
    low.
    """
    confidence, correct = _confidence(probs), _correct(probs, labels)
    right, wrong = np.sort(confidence[correct]), np.sort(confidence[~correct])
    if not len(right) or not len(wrong):
        return float('nan')
    thresholds = np.arange(2499, 0, -1) / 2500
    true_positives = 1 - np.searchsorted(right, thresholds, side='left') / len(right)
    false_positives = 1 - np.searchsorted(wrong, thresholds, side='left') / len(wrong)
    return float(np.trapezoid([0, *true_positives, 1], [0, *false_positives, 1]))


@_nan_unless_finite
def aurc(probs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float | np.ndarray:
    """Returns the area under the risk-coverage curve (Geifman & El-Yaniv, 2017), in [0, 1]. Lower is better.

    The risk of an image is the error rate among all images that are at least as confident. The AURC is the mean risk.
    """
    coverage, risk = risk_coverage(probs, labels, weights)
    return _scalar((np.diff(coverage, prepend=0, axis=-1) * risk).sum(axis=-1))


@_nan_unless_finite
def risk_at_80(probs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float | np.ndarray:
    """Returns the error rate of the most confident 80 % of the images, in [0, 1].

    If the limit falls among images with tied confidences, the same share of each of these images counts.
    """
    wrong, counts = _errors_by_confidence(probs, labels, weights)
    covered = np.cumsum(counts, axis=-1)
    wanted = 0.8 * covered[..., -1:]
    taken = np.clip(wanted - (covered - counts), 0, counts)
    return _scalar((wrong * taken / np.maximum(counts, 1)).sum(axis=-1) / wanted[..., 0])


def risk_coverage(
    probs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the risk-coverage curve, (coverage, risk) for every distinct confidence, from the highest.

    Returns:
        coverage: float [T] or [R, T], the share of images that are at least as confident.
        risk: float [T] or [R, T], the error rate of these images, nan if a probability is not finite.
    """
    wrong, counts = _errors_by_confidence(probs, labels, weights)
    covered = np.cumsum(counts, axis=-1)
    return covered / covered[..., -1:], np.cumsum(wrong, axis=-1) / np.maximum(covered, 1)


def _errors_by_confidence(probs, labels, weights):
    """Returns (wrong, counts): wrong images and all images with each distinct confidence, from the highest."""
    return _by_threshold(-_confidence(probs), _where_finite(~_correct(probs, labels), probs), weights)


METRICS = {
    'accuracy': accuracy,
    'top5': top5,
    'nll': nll,
    'brier': brier,
    'ece': ece,
    'ece_15': partial(ece, num_bins=15),
    'adaptive_ece': adaptive_ece,
    'classwise_ece': classwise_ece,
    'mce': mce,
    'auroc': auroc,
    'auroc_grid': auroc_grid,
    'aurc': aurc,
    'risk_at_80': risk_at_80,
}


SHORT = ('accuracy', 'nll', 'ece')  # the metrics in tables with many rows


def scale_and_digits(name: str) -> tuple[int, int]:
    """Returns the factor and the number of decimals with which tables show a metric. Accuracy is in per cent."""
    return (100, 2) if name == 'accuracy' else (1, 4)


# auroc_grid takes no weights. The percentile interval of classwise_ece lies above the metric itself: with many classes
# the classwise ECE of a resample measures mostly the resample's own noise.
_NOT_RESAMPLED = ('auroc_grid', 'classwise_ece')


def with_intervals(num_bins: int) -> dict[str, Callable]:
    """Returns the metrics that have bootstrap intervals, by name, with `num_bins` bins in `ece` and `mce`."""
    return {name: metric for name, metric in with_bins(num_bins).items() if name not in _NOT_RESAMPLED}


def with_bins(num_bins: int) -> dict[str, Callable]:
    """Returns METRICS with `num_bins` bins in `ece` and `mce`."""
    return METRICS | {name: partial(METRICS[name], num_bins=num_bins) for name in ('ece', 'mce')}


def summary(probs: np.ndarray, labels: np.ndarray, num_bins: int = 20) -> dict[str, float]:
    """Returns all metrics by name, with `num_bins` bins in `ece` and `mce`."""
    return {name: metric(probs, labels) for name, metric in with_bins(num_bins).items()}


# How much the samples of a posterior differ.


def entropy(probs: np.ndarray) -> np.ndarray:
    """Returns the entropy of every row of `probs`, float64 [N], in nats.

    The entropy of averaged probabilities is the predictive entropy.
    """
    return special.entr(np.asarray(probs, dtype=np.float64)).sum(axis=1)


def mutual_information(predictive_entropy: np.ndarray, expected_entropy: np.ndarray) -> np.ndarray:
    """Returns what the label of each image would tell about the weights (Houlsby et al., 2011), float [N] in nats.

    The mutual information is the predictive entropy minus the expected entropy. It is never negative.

    Args:
        predictive_entropy: float [N], the entropy of the averaged probabilities.
        expected_entropy: float [N], the mean entropy of the samples.
    """
    return np.maximum(np.subtract(predictive_entropy, expected_entropy), 0)


def disagreement(votes: np.ndarray) -> np.ndarray:
    """Returns the share of pairs of samples that predict different classes (Fort et al., 2019), float [N].

    The disagreement of a single sample is nan.

    Args:
        votes: int [N, K], the number of samples that give class k the largest probability.
    """
    votes = np.asarray(votes, dtype=np.float64)
    pairs = votes.sum(axis=1) * (votes.sum(axis=1) - 1)
    return 1 - _ratio((votes * (votes - 1)).sum(axis=1), pairs)


# Temperature scaling, the usual way to calibrate a network after training.


def temper(probs: np.ndarray, temperature: float) -> np.ndarray:
    """Returns probabilities [N, K] at a temperature (Guo et al., 2017): softmax(log probs / temperature)."""
    return softmax(_log(probs) / temperature)


def _log(probs):
    """Returns the logarithms of probabilities, or -10,000 for a probability of 0."""
    with np.errstate(divide='ignore'):
        return np.maximum(np.log(probs), -1e4)


def fit_temperature(probs: np.ndarray, labels: np.ndarray) -> float:
    """Returns the temperature, between 0.05 and 20, that minimises the NLL of `temper(probs, temperature)`.

    Returns nan if a probability is not finite, as after a divergence.
    """
    if not np.isfinite(probs).all():
        return float('nan')
    import scipy.optimize  # imported late because it takes a third of a second and training does not need it

    log_probs = _log(probs)

    def loss(log_temperature):  # in logarithms, because a tempered probability of 1e-5000 has a finite NLL
        scaled = log_probs / np.exp(log_temperature)
        return np.mean(special.logsumexp(scaled, axis=1) - scaled[np.arange(len(labels)), labels])

    bounds = np.log([0.05, 20])
    return float(np.exp(scipy.optimize.minimize_scalar(loss, bounds=bounds, method='bounded').x))


# Separating two kinds of images by a score, such as known and unknown images. All measures are nan if a score is nan.


def area_under_roc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray | None = None) -> float | np.ndarray:
    """Returns the probability that a positive has a higher score than a negative. Ties count half.

    Returns nan without positives or without negatives.

    Args:
        scores: float [N].
        positive: bool [N].
        weights: as for the metrics.
    """
    positives, counts = _by_threshold(scores, positive, weights)
    negatives = counts - positives
    below = np.cumsum(negatives, axis=-1) - negatives
    pairs = positives.sum(axis=-1) * negatives.sum(axis=-1)
    return _scalar(_ratio((positives * (below + negatives / 2)).sum(axis=-1), pairs))


def area_under_precision_recall(scores: np.ndarray, positive: np.ndarray) -> float:
    """Returns the average precision (Davis & Goadrich, 2006), or nan without positives.

    The average precision is Σ (recall_t − recall_t₋₁) precision_t over falling thresholds t. Images with a score of t
    or higher are predicted to be positive.

    Args:
        scores: float [N].
        positive: bool [N].
    """
    positives, counts = _by_threshold(-np.asarray(scores), positive)
    precision = np.cumsum(positives) / np.cumsum(counts)
    return _scalar(_ratio((positives * precision).sum(), positives.sum()))


def fpr_at_95_tpr(scores: np.ndarray, positive: np.ndarray) -> float:
    """Returns the false positive rate where the true positive rate is 95 % (Liang et al., 2018).

    The threshold is the highest threshold that leaves at least 95 % of the positives above it. The false positive rate
    is the share of negatives above the threshold. Returns nan without positives or without negatives.

    Args:
        scores: float [N].
        positive: bool [N].
    """
    positives, counts = _by_threshold(-np.asarray(scores), positive)
    negatives = counts - positives
    if not positives.sum() or not negatives.sum():
        return float('nan')
    threshold = np.argmax(np.cumsum(positives) >= 0.95 * positives.sum())
    return float(np.cumsum(negatives)[threshold] / negatives.sum())


def _confidence(probs):
    return np.asarray(probs, dtype=np.float64).max(axis=1)


def _correct(probs, labels):
    return np.argmax(probs, axis=1) == np.asarray(labels)


def _where_finite(values, probs):
    """Returns values [N], one for each image, or all nan if a probability is not finite."""
    return values if np.isfinite(probs).all() else np.full(len(values), np.nan)


def _mean(values, weights):
    if weights is None:
        return _scalar(values.mean())
    infinite = np.isinf(values)
    sums = weights @ np.where(infinite, 0, values).astype(np.float64)
    if infinite.any():  # an infinite value counts only if its image was drawn
        sums = np.where(weights @ infinite > 0, np.inf, sums)
    return _scalar(sums / np.sum(weights, axis=-1))


def _total(labels, weights):
    return len(labels) if weights is None else np.sum(weights, axis=-1)


def _top_label_bins(probs, labels, weights, num_bins):
    confidence = _confidence(probs)
    return _bins(confidence, _correct(probs, labels) - confidence, weights, num_bins)


def _bins(positions, values, weights, num_bins):
    """Returns sums of values and counts, [B] or [R, B], in equally wide bins (lower, upper] of positions in [0, 1]."""
    bins = np.searchsorted(np.linspace(0, 1, num_bins + 1)[1:-1], positions, side='left')
    if weights is None:
        return np.bincount(bins, values, num_bins), np.bincount(bins, minlength=num_bins)
    members = (bins[:, None] == np.arange(num_bins)).astype(np.float64)
    return weights @ (members * values[:, None]), weights @ members


def _ranked(scores):
    """Returns the order that sorts scores, and the index at which each distinct score begins in this order."""
    order = np.argsort(scores, kind='stable')
    ranked = np.asarray(scores)[order]
    return order, np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))


def _by_threshold(scores, counted, weights=None):
    """Returns (sums, weights) for each distinct score, rising, [T] or [R, T] each.

    Over the images with this score, `sums` adds up `counted` [N] times the weight, and `weights` adds up the weights.
    All sums are nan if a score is nan, because nan has no rank.
    """
    order, starts = _ranked(scores)
    weights = np.ones(len(order)) if weights is None else np.take(weights, order, axis=-1)
    counted = weights * np.where(np.isnan(scores).any(), np.nan, counted)[order]
    if len(starts) == len(order):  # without ties there is nothing to add up, which saves half of the time
        return counted, weights
    return np.add.reduceat(counted, starts, axis=-1), np.add.reduceat(weights, starts, axis=-1)


def _ratio(numerator, denominator):
    """Returns numerator / denominator, or nan for 0/0."""
    with np.errstate(divide='ignore', invalid='ignore'):
        return np.divide(numerator, denominator)


def _scalar(values):
    return float(values) if np.ndim(values) == 0 else values


# How much of a number on a test set is chance: confidence intervals and paired tests by the bootstrap (Efron, 1979).
# The images are resampled, not the training. So intervals say what other test images would have given, not other seeds.
# Percentile intervals of calibration errors lie high, because each resample adds noise of its own to every bin.

NUM_RESAMPLES = 1000
LEVEL = 0.95

# Resamples per thread at once. The weights of all resamples, float64 [R, N], are in memory together.
_BLOCK = 250


def resampled(metrics: dict[str, Callable], probs: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Returns each metric on 1,000 resamples of the images, {name: float [R]}. Every call takes the same resamples.

    Args:
        metrics: {name: metric(probs, labels, weights)}.
        probs: float [N, K].
        labels: int [N].
    """

    def of_block(weights):
        return {name: metric(probs, labels, weights) for name, metric in metrics.items()}

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads, because NumPy releases the GIL
        blocks = list(pool.map(of_block, _resamples(len(labels))))
    return {name: np.concatenate([block[name] for block in blocks]) for name in metrics}


def intervals(probs: np.ndarray, labels: np.ndarray, num_bins: int) -> dict[str, tuple[float, float]]:
    """Returns the 95 % intervals of the metrics of `with_intervals(num_bins)`, {name: (low, high)}.

    All bounds are nan if a probability is not finite.
    """
    tested = with_intervals(num_bins)
    if not np.isfinite(probs).all():
        return dict.fromkeys(tested, (math.nan, math.nan))
    return {name: interval(values) for name, values in resampled(tested, probs, labels).items()}


def interval(values: np.ndarray) -> tuple[float, float]:
    """Returns the percentile interval (low, high) of a metric's values [R].

    Both bounds are nan if a value is nan, such as the AUROC of a resample without errors.
    """
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method='inverted_cdf')
    return float(low), float(high)


def difference(observed: float, resampled: np.ndarray) -> tuple[float, float, float]:
    """Returns (low, high, p) for a metric's difference between two methods: the interval and the two-sided p-value.

    The interval is the basic interval: the percentile interval of 2 · observed − resampled (Davison & Hinkley, 1997,
    section 5.2.1). This interval removes most of the bias that finite sets and resampling cause. A smaller calibration
    error has more of this bias, so two calibration errors seem nearer than they are. The p-value is for no difference:
    twice the share on the rarer side of 0, and at least 2/(R + 1). All three are nan if a metric is infinite, such as
    the NLL of an impossible class.

    Args:
        observed: the difference on the images themselves.
        resampled: float [R], the difference on each resample. Both methods need the same resamples.
    """
    if not (np.isfinite(observed) and np.isfinite(resampled).all()):
        return math.nan, math.nan, math.nan
    differences = 2 * observed - resampled
    rarer = min((differences <= 0).sum(), (differences >= 0).sum())
    return *interval(differences), float(min(1, 2 * (rarer + 1) / (len(differences) + 1)))


def _resamples(num_images):
    """Yields blocks of weights [_BLOCK, N]: how often each image was drawn, with replacement."""
    rng = np.random.default_rng(0)
    for _ in range(0, NUM_RESAMPLES, _BLOCK):
        drawn = rng.integers(0, num_images, (_BLOCK, num_images)) + num_images * np.arange(_BLOCK)[:, None]
        yield np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)
