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
    """Returns the share of images with fewer than five classes more probable than the true class, in [0, 1].

    One minus this share is the top-5 error of ImageNet (Russakovsky et al., 2015).
    """
    return _mean(_in_top5(probs, labels), weights)


@_nan_unless_finite
def nll(probs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float | np.ndarray:
    """Returns the mean negative log-likelihood (Good, 1952) in nats.

    The NLL is infinite if a true class has probability 0.
    """
    return _mean(_nlls(probs, labels), weights)


@_nan_unless_finite
def brier(probs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float | np.ndarray:
    """Returns the Brier score (Brier, 1950), in [0, 2]: the mean of Σ_k (p_k − y_k)² with the one-hot label y."""
    return _mean(_briers(probs, labels), weights)


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
    """Returns the factor and the number of decimals with which tables show a metric. Shares are in per cent."""
    return (100, 2) if name in ('accuracy', 'top5', 'risk_at_80', 'disagreement') else (1, 4)


# The worst and the best value of each metric.
RANGES = {
    'accuracy': (0, 1),
    'top5': (0, 1),
    'nll': (math.inf, 0),
    'brier': (2, 0),
    'ece': (1, 0),
    'ece_15': (1, 0),
    'adaptive_ece': (1, 0),
    'classwise_ece': (1, 0),
    'mce': (1, 0),
    'auroc': (0, 1),
    'auroc_grid': (0, 1),
    'aurc': (1, 0),
    'risk_at_80': (1, 0),
}


def higher_is_better(name: str) -> bool:
    """Returns whether a higher value of a metric is better."""
    worst, best = RANGES[name]
    return best > worst


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


TEMPERATURES = (0.01, 100.0)  # the lowest and the highest that `fit_temperature` returns


def fit_temperature(probs: np.ndarray, labels: np.ndarray) -> float:
    """Returns the temperature that minimises the NLL of `temper(probs, temperature)` (Guo et al., 2017).

    Returns a bound of TEMPERATURES if the best temperature is at the bound or beyond it. Returns 1 if no temperature is
    better, and nan if a probability is not finite, as after a divergence.
    """
    if not np.isfinite(probs).all():
        return float('nan')
    import scipy.optimize  # imported late because it takes a third of a second and training does not need it

    log_probs = _log(probs)

    def loss(temperature):  # in logarithms, because a tempered probability of 1e-5000 has a finite NLL
        scaled = log_probs / temperature
        return np.mean(special.logsumexp(scaled, axis=1) - _of_label(scaled, labels))

    found = scipy.optimize.minimize_scalar(lambda x: loss(np.exp(x)), bounds=np.log(TEMPERATURES), method='bounded')
    best = min(*TEMPERATURES, float(np.exp(found.x)), key=loss)
    return best if loss(best) < loss(1) - 1e-12 else 1.0


def energy(logits: np.ndarray) -> np.ndarray:
    """Returns the energy of every image, float64 [N]: −log Σ_k exp(logit_k) (Liu et al., 2020, equation 4, T = 1).

    A higher energy means a less certain prediction. The energy is nan for logits that are not finite.

    Args:
        logits: float [N, K].
    """
    with np.errstate(invalid='ignore'):
        return -special.logsumexp(np.asarray(logits, dtype=np.float64), axis=1)


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


def _in_top5(probs, labels):
    return (probs > _of_label(probs, labels)[:, None]).sum(axis=1) < 5


def _of_label(probs, labels):
    return np.asarray(probs)[np.arange(len(labels)), labels]


def _nlls(probs, labels):
    with np.errstate(divide='ignore'):
        return -np.log(_of_label(probs, labels).astype(np.float64))


def _briers(probs, labels):
    probs = np.asarray(probs, dtype=np.float64)
    return np.square(probs).sum(axis=1) + 1 - 2 * _of_label(probs, labels)


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
    bins = _bin_of(positions, num_bins)
    if weights is None:
        return np.bincount(bins, values, num_bins), np.bincount(bins, minlength=num_bins)
    shape = (*np.shape(weights)[:-1], num_bins)
    bins = (bins + num_bins * np.arange(math.prod(shape[:-1]))[:, None]).ravel()
    sums = (np.bincount(bins, np.ravel(added), math.prod(shape)) for added in (weights * values, weights))
    return tuple(x.reshape(shape) for x in sums)


def _bin_of(positions, num_bins):
    """Returns the bin of each position, int [N]. See `_bins`."""
    return np.searchsorted(np.linspace(0, 1, num_bins + 1)[1:-1], positions, side='left')


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


# How much of a metric is chance: 95 % intervals for the metric's value on infinitely many images. The images are
# random, the trained network is not. So intervals say what other test images would have given, not other seeds.
# docs/evaluation.md has their coverage, as studies/coverage.py measured it.

LEVEL = 0.95
NUM_RESAMPLES = 1000
FEWEST = 10  # right and wrong predictions that an interval of a ranking needs

_Z = special.ndtri((1 + LEVEL) / 2)


def intervals(probs: np.ndarray, labels: np.ndarray, num_bins: int = 20) -> dict[str, tuple[float, float]]:
    """Returns 95 % intervals of metrics, {name: (low, high)}. An interval contains the metric.

    MCE has no interval because bins of few images decide it. Classwise ECE has none because the interval of `ece` holds
    too rarely for it. `auroc_grid` has none either. Both bounds are nan if a probability is not finite, if the metric
    is infinite, and for `auroc` and `aurc` with fewer than 10 right or 10 wrong predictions.

    Args:
        probs: float [N, K].
        labels: int [N].
        num_bins: the number of bins of `ece`.
    """
    found = dict.fromkeys(_INTERVALS, (math.nan, math.nan))
    if not np.isfinite(probs).all():
        return found
    for name, metric in with_bins(num_bins).items():
        value = metric(probs, labels) if name in _INTERVALS else math.inf
        if math.isfinite(value):
            options = {'num_bins': num_bins} if name == 'ece' else {}
            low, high = _INTERVALS[name](probs, labels, **options)
            least, most = sorted(RANGES[name])
            found[name] = float(max(min(low, value), least)), float(min(max(high, value), most))
    return found


def _interval_of_share(counted, probs, labels):
    """Returns the interval of the mean of counted(probs, labels), bool [N]."""
    values = counted(probs, labels)
    return _mid_p(values.mean(), len(values))


def _mid_p(share, num_images):
    """Returns the mid-P interval of a share of images (Lancaster, 1961). It holds for shares near 0 and 1 too.

    A true share p is in the interval if P(more) + P(as many)/2 is from 2.5 % to 97.5 %, by the binomial distribution.
    """
    count, tiny = share * num_images, 1e-9
    limits = np.array([[0.0, 0.0], [1.0, 1.0]])
    for _ in range(50):
        middle = limits.mean(axis=0)
        as_many = special.betainc(max(count, tiny), num_images - count + 1, middle)
        more = special.betainc(count + 1, max(num_images - count, tiny), middle)
        is_low = (as_many + more) / 2 < [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
        limits = np.where([is_low, ~is_low], middle, limits)
    return limits.mean(axis=0)


def _interval_of_loss(losses, probs, labels):
    """Returns the interval of the mean of losses(probs, labels), float [N].

    Most of a loss comes from few wrong predictions. A small set may have none, so its losses would look as if they
    varied little. Therefore one more image counts, with the loss of a typical error: the true class has the second
    largest probability, and errors are as frequent as the confidences say.
    """
    values, confidence = losses(probs, labels), _confidence(probs)
    unsure = np.flatnonzero(confidence < 1)
    if len(unsure):
        second = np.argpartition(probs[unsure], -2, axis=1)[:, -2]
        error = np.average(losses(probs[unsure], second), weights=1 - confidence[unsure])
        values = np.append(values, error)
    return _skewed_interval(values, _Z)


def _skewed_interval(values, quantile):
    """Returns the interval of a mean of values [N], with a correction for their skewness (Hall, 1992, equation 2).

    Args:
        values: float [N].
        quantile: the upper quantile of the mean's error, in standard errors.
    """
    centred = values - values.mean()
    deviation = math.sqrt(np.mean(centred**2))
    if not deviation:
        return values.mean(), values.mean()
    skewness = np.mean(centred**3) / deviation**3 / math.sqrt(len(values))
    errors = np.array([quantile, -quantile])
    if abs(skewness) > 1e-6:  # the correction vanishes with the skewness, but the formula would lose all digits
        errors = 3 / skewness * (np.cbrt(1 + skewness * (errors - skewness / 6)) - 1)
    return values.mean() - errors * deviation / math.sqrt(len(values))


def _interval_of_ranking(pseudo_values, probs, labels):
    """Returns the interval of a metric that ranks right and wrong predictions, or nan for too few of them.

    The metric is the mean of pseudo-values, which say how much each image contributes (Tukey, 1958). They vary mostly
    among the rarer of right and wrong predictions, so Student's t has their number as degrees of freedom.
    """
    correct = _correct(probs, labels)
    rarer = min(correct.sum(), (~correct).sum())
    if rarer < FEWEST:
        return math.nan, math.nan
    quantile = special.stdtrit(rarer - 1, (1 + LEVEL) / 2)
    return _skewed_interval(pseudo_values(_confidence(probs), correct), quantile)


def _auroc_values(confidence, correct):
    """Returns pseudo-values [N] of the AUROC: the components of DeLong et al. (1988), scaled to have its mean."""
    order, _ = _ranked(confidence)
    right, counts = _by_threshold(confidence, correct)
    wrong = counts - right
    below, above = np.cumsum(wrong) - wrong / 2, right.sum() - np.cumsum(right) + right / 2
    shares = np.array([above / right.sum(), below / wrong.sum()])  # of the pairs that an image wins
    shares = np.repeat(shares, counts.astype(int), axis=1)
    area = (below * right).sum() / right.sum() / wrong.sum()
    frequency = np.where(correct[order], right.sum(), wrong.sum()) / len(order)
    return area + (np.where(correct[order], shares[1], shares[0]) - area) / frequency


def _aurc_values(confidence, correct):
    """Returns pseudo-values [N] of the AURC: the AURC plus its influence function at each image."""
    order, _ = _ranked(-confidence)
    wrong, counts = _by_threshold(-confidence, ~correct)
    covered = np.cumsum(counts)
    risk = np.cumsum(wrong) / covered
    longer = np.cumsum((counts / covered)[::-1])[::-1]  # sums over the thresholds that cover an image
    risks = np.cumsum((risk * counts / covered)[::-1])[::-1]
    risk, longer, risks = np.repeat([risk, longer, risks], counts.astype(int), axis=1)
    return risk + ~correct[order] * longer - risks


def _interval_of_risk(probs, labels, coverage=0.8):
    """Returns the interval of `risk_at_80`: the interval of a share of as many images as explain the standard error.

    The confidence at 80 % coverage is an estimate, which adds to the standard error if errors are more frequent there.
    """
    order = np.argsort(-_confidence(probs), kind='stable')
    wrong = ~_correct(probs, labels)[order]
    risk, num_images = risk_at_80(probs, labels), coverage * len(wrong)
    at_limit = wrong[int((coverage - 0.1) * len(wrong)) : math.ceil((coverage + 0.1) * len(wrong))].mean()
    spread = risk * (1 - risk) + (1 - coverage) * (at_limit - risk) ** 2
    return _mid_p(risk, num_images * risk * (1 - risk) / spread if 0 < risk < 1 else num_images)


def _interval_of_ece(probs, labels, num_bins):
    """Returns the interval of `ece`, from the bins that the confidences are in."""
    confidence = _confidence(probs)
    return _interval_of_gaps(confidence, _correct(probs, labels), _bin_of(confidence, num_bins), num_bins)


def _interval_of_adaptive_ece(probs, labels, num_bins=15):
    """Returns the interval of `adaptive_ece`, from the bins that the confidences are in."""
    confidence = _confidence(probs)
    order, starts = _ranked(confidence)
    bins = np.empty(len(order), int)
    bins[order] = np.repeat(starts * num_bins // len(order), np.diff(starts, append=len(order)))
    return _interval_of_gaps(confidence, _correct(probs, labels), bins, num_bins)


def _interval_of_gaps(confidence, correct, bins, num_bins):
    """Returns the interval of a calibration error: the sum of the absolute gaps of the bins, over N.

    The calibration error is too high by chance, because chance opens gaps in both directions. The lower limit is the
    smallest calibration error that explains the observed one: all gaps are multiplied by a number from 0 to 1, labels
    are drawn, and 2.5 % of the draws have at least the observed calibration error. The upper limit ignores the bias. It
    is the upper limit of a mean of signed gaps, if each further wrong prediction adds one to the sum and one to its
    variance, as in a Poisson distribution.

    Args:
        confidence: float [N].
        correct: bool [N].
        bins: int [N], the bin of each image.
        num_bins: the number of bins.
    """
    n = len(bins)
    counts, gaps, claimed = (np.bincount(bins, x, num_bins) for x in (np.ones(n), correct - confidence, confidence))
    observed, held = np.abs(gaps).sum(), counts > 0
    shares, rates, slopes = counts[held] / n, claimed[held] / counts[held], gaps[held] / counts[held]

    drawn = np.random.default_rng(0).multinomial(n, shares, NUM_RESAMPLES)

    def is_rare(scale):  # whether gaps of this scale rarely explain what was observed
        right = np.random.default_rng(1).binomial(drawn, np.clip(rates + scale * slopes, 0, 1))
        return np.mean(np.abs(right - drawn * rates).sum(axis=1) > observed - 1e-9) < (1 - LEVEL) / 2

    low, high = 0.0, float(is_rare(0))
    for _ in range(8 if high else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if is_rare(middle) else (low, middle)
    variance, shift = np.var(np.sign(gaps)[bins] * (correct - confidence)), _Z**2 / (2 * n)
    return low * observed / n, observed / n + shift + math.sqrt(_Z**2 * variance / n + shift**2)


_INTERVALS: dict[str, Callable] = {
    'accuracy': partial(_interval_of_share, _correct),
    'top5': partial(_interval_of_share, _in_top5),
    'nll': partial(_interval_of_loss, _nlls),
    'brier': partial(_interval_of_loss, _briers),
    'ece': _interval_of_ece,
    'ece_15': partial(_interval_of_ece, num_bins=15),
    'adaptive_ece': _interval_of_adaptive_ece,
    'auroc': partial(_interval_of_ranking, _auroc_values),
    'aurc': partial(_interval_of_ranking, _aurc_values),
    'risk_at_80': _interval_of_risk,
}


# Paired tests between methods by the bootstrap (Efron, 1979): the same images are resampled for both methods.

_BLOCK = 1 << 22  # weights that a thread holds at once, 32 MiB
_MOST_THREADS = 8


def resampled(metrics: dict[str, Callable], probs: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Returns each metric on 1,000 resamples of the images, {name: float [R]}. Every call takes the same resamples.

    Args:
        metrics: {name: metric(probs, labels, weights)}.
        probs: float [N, K].
        labels: int [N].
    """

    def of_block(resamples):
        weights = np.stack([_resample(i, len(labels)) for i in resamples])
        return {name: metric(probs, labels, weights) for name, metric in metrics.items()}

    size = min(max(_BLOCK // len(labels), 1), 250)
    blocks = [range(i, min(i + size, NUM_RESAMPLES)) for i in range(0, NUM_RESAMPLES, size)]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS)) as pool:  # threads, because NumPy releases the GIL
        found = list(pool.map(of_block, blocks))
    return {name: np.concatenate([block[name] for block in found]) for name in metrics}


def _resample(index, num_images):
    """Returns weights [N], how often each image was drawn in a resample, with replacement."""
    drawn = np.random.default_rng([0, index]).integers(0, num_images, num_images)
    return np.bincount(drawn, minlength=num_images).astype(np.float64)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Returns the percentile interval (low, high) of a metric's values [R].

    Both bounds are nan if a value is nan, such as the AUROC of a resample without errors.
    """
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method='inverted_cdf')
    return float(low), float(high)


def difference(observed: float, resampled: np.ndarray) -> tuple[float, float, float]:
    """Returns (low, high, p) for a metric's difference between two methods: the interval and the two-sided p-value.

    The interval is the basic interval: the percentile interval of 2 · observed − resampled (Davison & Hinkley, 1997,
    section 5.2.1). Do not use it for calibration errors: chance and resampling raise a small error more than a large
    one, so two errors seem nearer than they are. The p-value is for no difference: twice the share on the rarer side of
    0, and at least 2/(R + 1). All three are nan if a metric is infinite, such as the NLL of an impossible class.

    Args:
        observed: the difference on the images themselves.
        resampled: float [R], the difference on each resample. Both methods need the same resamples.
    """
    if not (np.isfinite(observed) and np.isfinite(resampled).all()):
        return math.nan, math.nan, math.nan
    differences = 2 * observed - resampled
    rarer = min((differences <= 0).sum(), (differences >= 0).sum())
    return *interval(differences), float(min(1, 2 * (rarer + 1) / (len(differences) + 1)))
