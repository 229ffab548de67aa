"""How good and how sure: metrics of predicted class probabilities, in float64 NumPy.

    probs    float [N, K], rows that sum to 1
    labels   int [N]
    weights  how often every image counts: [N], or [R, N] for R resamples of the images at once; once each by default

A metric is a float, or float [R] with weights [R, N]. METRICS lists them all. Each is nan if a probability is nan or
infinite, because a diverged network must not look like a result. Confidence is the largest probability of an image.
Where confidences are tied, no metric depends on the order of the images.
"""

import functools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np


def softmax(logits):
    """Returns probabilities in float64 from logits [N, K] of any precision. A row with nan or inf becomes nan."""
    logits = np.asarray(logits, dtype=np.float64)
    with np.errstate(invalid='ignore'):
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def _nan_unless_finite(metric):
    """Makes a metric return nan, for each resample, if any probability is nan or infinite."""

    @functools.wraps(metric)
    def checked(probs, labels, weights=None, **options):
        if not np.isfinite(probs).all():
            return _scalar(np.full(np.shape(weights)[:-1], np.nan))
        return metric(probs, labels, **options if weights is None else {'weights': weights} | options)

    return checked


@_nan_unless_finite
def accuracy(probs, labels, weights=None):
    """Share of images whose most probable class is the true one, in [0, 1]."""
    return _mean(_correct(probs, labels), weights)


@_nan_unless_finite
def top5(probs, labels, weights=None):
    """Share of images with fewer than five classes that are more probable than the true one, in [0, 1]."""
    probs = np.asarray(probs)
    true_probs = probs[np.arange(len(labels)), labels]
    return _mean((probs > true_probs[:, None]).sum(axis=1) < 5, weights)


@_nan_unless_finite
def nll(probs, labels, weights=None):
    """Mean negative log-likelihood in nats; infinite where a true class has probability 0."""
    true_probs = np.asarray(probs, dtype=np.float64)[np.arange(len(labels)), labels]
    with np.errstate(divide='ignore', invalid='ignore'):
        return _mean(-np.log(true_probs), weights)


@_nan_unless_finite
def brier(probs, labels, weights=None):
    """Brier score (Brier, 1950): mean of Σ_k (p_k − y_k)² with the one-hot label y, in [0, 2]."""
    probs = np.asarray(probs, dtype=np.float64)
    true_probs = probs[np.arange(len(labels)), labels]
    return _mean(np.square(probs).sum(axis=1) + 1 - 2 * true_probs, weights)


@_nan_unless_finite
def ece(probs, labels, weights=None, num_bins=20):
    """Expected calibration error (Guo et al., 2017): the gap between accuracy and confidence, averaged over images.

    The gap is taken in each of `num_bins` equally wide bins (lower, upper] of the confidence. In [0, 1].
    """
    gaps, _ = _top_label_bins(probs, labels, weights, num_bins)
    return _scalar(np.abs(gaps).sum(axis=-1) / _total(labels, weights))


@_nan_unless_finite
def mce(probs, labels, weights=None, num_bins=20):
    """Maximum calibration error (Guo et al., 2017): the largest gap of the bins of `ece` that are not empty."""
    gaps, counts = _top_label_bins(probs, labels, weights, num_bins)
    return _scalar((np.abs(gaps) / np.where(counts > 0, counts, 1)).max(axis=-1))


def reliability(probs, labels, num_bins=20):
    """The bins of `ece`, from the lowest: how many images each holds, their accuracy and their mean confidence.

    {'counts': int [num_bins], 'accuracy': float [num_bins], 'confidence': ...}; nan where a bin is empty. All
    accuracies are nan if a probability is not finite.
    """
    confidence = _confidence(probs)
    correct, counts = _bins(confidence, _where_finite(_correct(probs, labels), probs), None, num_bins)
    confident, _ = _bins(confidence, confidence, None, num_bins)
    return {'counts': counts, 'accuracy': _ratio(correct, counts), 'confidence': _ratio(confident, counts)}


@_nan_unless_finite
def adaptive_ece(probs, labels, weights=None, num_bins=15):
    """ECE whose bins hold equally many images each (Nguyen & O'Connor, 2015), tied confidences in one bin."""
    confidence = _confidence(probs)
    gaps, counts = _by_threshold(confidence, _correct(probs, labels) - confidence, weights)
    upper = np.cumsum(counts, axis=-1)
    total = upper[..., -1:]
    bins = np.minimum((upper - counts) * num_bins // total, num_bins - 1).astype(int)
    bins += num_bins * np.arange(total.size).reshape(total.shape)
    sums = np.bincount(bins.ravel(), gaps.ravel(), num_bins * total.size).reshape(*total.shape[:-1], num_bins)
    return _scalar(np.abs(sums).sum(axis=-1) / total[..., 0])


@_nan_unless_finite
def classwise_ece(probs, labels, weights=None, num_bins=15):
    """Classwise ECE (Kull et al., 2019): the ECE of each class's probability as that of a binary event, their mean."""
    probs = np.asarray(probs, dtype=np.float64)
    total = 0
    for k, column in enumerate(probs.T):
        gaps, _ = _bins(column, (labels == k) - column, weights, num_bins)
        total = total + np.abs(gaps).sum(axis=-1)
    return _scalar(total / probs.shape[1] / _total(labels, weights))


@_nan_unless_finite
def auroc(probs, labels, weights=None):
    """Probability that a right prediction is more confident than a wrong one (Mann-Whitney), ties counted half.

    In [0, 1]; nan where all predictions are right, or all wrong.
    """
    return area_under_roc(_confidence(probs), _correct(probs, labels), weights)


@_nan_unless_finite
def auroc_grid(probs, labels):
    """`auroc` as the reference approximates it, comparable with the published numbers.

    2,499 thresholds 0.9996, 0.9992, ..., 0.0004 and the trapezoid rule from (0, 0) to (1, 1): predictions more
    confident than 0.9996 all count as ties, so a network that is sure of most images is judged too low.
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
def aurc(probs, labels, weights=None):
    """Area under the risk-coverage curve (Geifman & El-Yaniv, 2017), in [0, 1]; lower is better.

    The error rate among the images that are at least as confident as an image, averaged over all images.
    """
    coverage, risk = risk_coverage(probs, labels, weights)
    return _scalar((np.diff(coverage, prepend=0, axis=-1) * risk).sum(axis=-1))


@_nan_unless_finite
def risk_at_80(probs, labels, weights=None):
    """Error rate of the most confident 80 % of the images, in [0, 1]; of tied ones in between, a share of each."""
    wrong, counts = _errors_by_confidence(probs, labels, weights)
    covered = np.cumsum(counts, axis=-1)
    wanted = 0.8 * covered[..., -1:]
    taken = np.clip(wanted - (covered - counts), 0, counts)
    return _scalar((wrong * taken / np.maximum(counts, 1)).sum(axis=-1) / wanted[..., 0])


def risk_coverage(probs, labels, weights=None):
    """The risk-coverage curve: for every confidence, from the highest, the share of images at least as confident, and
    their error rate, nan if a probability is not finite. Both [T], or [R, T]."""
    wrong, counts = _errors_by_confidence(probs, labels, weights)
    covered = np.cumsum(counts, axis=-1)
    return covered / covered[..., -1:], np.cumsum(wrong, axis=-1) / np.maximum(covered, 1)


def _errors_by_confidence(probs, labels, weights):
    """How many images each confidence has, from the highest, and how many of these are wrong: (wrong, counts)."""
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


SHORT = ('accuracy', 'nll', 'ece')  # what tables with many rows show


def scale_and_digits(name):
    """What tables show a metric times, and to how many digits: accuracy in per cent."""
    return (100, 2) if name == 'accuracy' else (1, 4)


# Those without weights, or whose percentile interval lies above the metric itself: with many classes most of what a
# resample's classwise ECE measures is the resample's own noise.
_NOT_RESAMPLED = ('auroc_grid', 'classwise_ece')


def with_intervals(num_bins):
    """The metrics that bootstrap intervals are given for."""
    return {name: metric for name, metric in with_bins(num_bins).items() if name not in _NOT_RESAMPLED}


def with_bins(num_bins):
    """METRICS with as many bins in `ece` and `mce`."""
    return METRICS | {name: partial(METRICS[name], num_bins=num_bins) for name in ('ece', 'mce')}


def summary(probs, labels, num_bins=20):
    """Returns all metrics by name."""
    return {name: metric(probs, labels) for name, metric in with_bins(num_bins).items()}


# Of the posterior: how much its samples differ.


def entropy(probs):
    """Entropy of every row of [N, K] in nats, [N]. Of averaged probabilities it is the predictive entropy."""
    probs = np.asarray(probs, dtype=np.float64)
    return -(probs * np.log(np.where(probs > 0, probs, 1))).sum(axis=1)


def mutual_information(predictive_entropy, expected_entropy):
    """What the label would tell about the weights (Houlsby et al., 2011): the predictive entropy minus the mean
    entropy of the samples, of every image in nats, [N]; never negative."""
    return np.maximum(np.subtract(predictive_entropy, expected_entropy), 0)


def disagreement(votes):
    """Share of the pairs of samples that predict different classes (Fort et al., 2019), of every image, [N].

    votes: int [N, K], of how many samples a class is the most probable. nan where there is one sample only.
    """
    votes = np.asarray(votes, dtype=np.float64)
    pairs = votes.sum(axis=1) * (votes.sum(axis=1) - 1)
    return 1 - _ratio((votes * (votes - 1)).sum(axis=1), pairs)


# Temperature, the usual way to calibrate a network after training.


def temper(probs, temperature):
    """Probabilities [N, K] at a temperature (Guo et al., 2017): softmax(log probs / temperature)."""
    return softmax(_log(probs) / temperature)


def _log(probs):
    """Returns logarithms, -10,000 for a probability of 0."""
    with np.errstate(divide='ignore'):
        return np.maximum(np.log(probs), -1e4)


def fit_temperature(probs, labels):
    """Returns the temperature, between 0.05 and 20, at which the NLL of `temper(probs, temperature)` is least.

    Returns nan if a probability is not finite, as after a divergence.
    """
    if not np.isfinite(probs).all():
        return float('nan')
    import scipy.optimize  # a third of a second that no start of a training should wait for
    import scipy.special

    log_probs = _log(probs)

    def loss(log_temperature):  # by logarithms, because a tempered probability of 1e-5000 has an NLL too
        scaled = log_probs / np.exp(log_temperature)
        return np.mean(scipy.special.logsumexp(scaled, axis=1) - scaled[np.arange(len(labels)), labels])

    bounds = np.log([0.05, 20])
    return float(np.exp(scipy.optimize.minimize_scalar(loss, bounds=bounds, method='bounded').x))


# Telling two kinds of images apart by a score, such as known and unknown ones. All are nan if a score is nan.


def area_under_roc(scores, positive, weights=None):
    """Probability that a positive has a higher score than a negative, ties counted half; nan without one of them.

    scores: float [N]; positive: bool [N].
    """
    positives, counts = _by_threshold(scores, positive, weights)
    negatives = counts - positives
    below = np.cumsum(negatives, axis=-1) - negatives
    pairs = positives.sum(axis=-1) * negatives.sum(axis=-1)
    return _scalar(_ratio((positives * (below + negatives / 2)).sum(axis=-1), pairs))


def area_under_precision_recall(scores, positive):
    """Average precision, Σ (recall_t − recall_t₋₁) precision_t over falling thresholds t (Davis & Goadrich, 2006).

    The positives are those with high scores. nan without any.
    """
    positives, counts = _by_threshold(-np.asarray(scores), positive)
    precision = np.cumsum(positives) / np.cumsum(counts)
    return _scalar(_ratio((positives * precision).sum(), positives.sum()))


def fpr_at_95_tpr(scores, positive):
    """Share of negatives above the highest threshold that leaves at least 95 % of the positives above (Liang et al.,
    2018); nan without one of both."""
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
    """Returns values [N], one an image; all nan if a probability is not finite."""
    return values if np.isfinite(probs).all() else np.full(len(values), np.nan)


def _mean(values, weights):
    if weights is None:
        return _scalar(values.mean())
    infinite = np.isinf(values)
    sums = weights @ np.where(infinite, 0, values).astype(np.float64)
    if infinite.any():  # of an image that was not drawn it does not count
        sums = np.where(weights @ infinite > 0, np.inf, sums)
    return _scalar(sums / np.sum(weights, axis=-1))


def _total(labels, weights):
    return len(labels) if weights is None else np.sum(weights, axis=-1)


def _top_label_bins(probs, labels, weights, num_bins):
    confidence = _confidence(probs)
    return _bins(confidence, _correct(probs, labels) - confidence, weights, num_bins)


def _bins(positions, values, weights, num_bins):
    """Sums of values, and counts, in equally wide bins (lower, upper] of positions in [0, 1]; [B] or [R, B]."""
    bins = np.searchsorted(np.linspace(0, 1, num_bins + 1)[1:-1], positions, side='left')
    if weights is None:
        return np.bincount(bins, values, num_bins), np.bincount(bins, minlength=num_bins)
    members = (bins[:, None] == np.arange(num_bins)).astype(np.float64)
    return weights @ (members * values[:, None]), weights @ members


def _ranked(scores):
    """The order of rising scores, and where in it each distinct score begins."""
    order = np.argsort(scores, kind='stable')
    ranked = np.asarray(scores)[order]
    return order, np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))


def _by_threshold(scores, counted, weights=None):
    """For each distinct score, rising: the sum of `counted`, [N], of the images that have it, and their weight; [T] or
    [R, T] each. All sums are nan if a score is nan, because it has no rank."""
    order, starts = _ranked(scores)
    weights = np.ones(len(order)) if weights is None else np.take(weights, order, axis=-1)
    counted = weights * np.where(np.isnan(scores).any(), np.nan, counted)[order]
    if len(starts) == len(order):  # no ties, and half of the time saved
        return counted, weights
    return np.add.reduceat(counted, starts, axis=-1), np.add.reduceat(weights, starts, axis=-1)


def _ratio(numerator, denominator):
    """Their quotient; nan for 0/0."""
    with np.errstate(divide='ignore', invalid='ignore'):
        return np.divide(numerator, denominator)


def _scalar(values):
    return float(values) if np.ndim(values) == 0 else values


# How far numbers on a test set are luck: confidence intervals and paired tests by the bootstrap (Efron, 1979).
# The images are resampled, not the training: intervals tell what other test images would have given, not other seeds.
# Percentile intervals of calibration errors lie high, because each resample adds noise of its own to every bin.

NUM_RESAMPLES = 1000
LEVEL = 0.95

# Resamples that a thread takes at once; the weights of all, [R, N] in float64, lie in memory together.
_BLOCK = 250


def resampled(metrics, probs, labels):
    """Each metric(probs, labels, weights) on the same 1,000 resamples of the images at every call, {name: [R]}."""

    def of_block(weights):
        return {name: metric(probs, labels, weights) for name, metric in metrics.items()}

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy computes outside of Python's lock
        blocks = list(pool.map(of_block, _resamples(len(labels))))
    return {name: np.concatenate([block[name] for block in blocks]) for name in metrics}


def intervals(probs, labels, num_bins):
    """Returns the 95 % interval of each metric that has one, {name: (low, high)}."""
    tested = with_intervals(num_bins)
    if not np.isfinite(probs).all():
        return dict.fromkeys(tested, (math.nan, math.nan))
    return {name: interval(values) for name, values in resampled(tested, probs, labels).items()}


def interval(values):
    """The percentile interval (low, high) of a metric's values [R]; nan if one is, as an AUROC without errors."""
    return tuple(float(x) for x in np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method='inverted_cdf'))


def difference(observed, resampled):
    """The interval of a metric's difference between two methods, and the two-sided p-value of none: (low, high, p).

    observed: on the images themselves; resampled: on each resample [R], the same for both methods. The interval is
    that of 2 · observed − resampled (the basic one; Davison & Hinkley, 1997, section 5.2.1), which takes away most of
    the bias of finite sets and of resampling them: a calibration error has more of it the smaller it is, so that two
    seem nearer than they are. p is twice the share on the rarer side of 0, and at least 2/(R + 1). All are nan where a
    metric is infinite, as the NLL of an impossible class.
    """
    if not (np.isfinite(observed) and np.isfinite(resampled).all()):
        return math.nan, math.nan, math.nan
    differences = 2 * observed - resampled
    rarer = min((differences <= 0).sum(), (differences >= 0).sum())
    return *interval(differences), float(min(1, 2 * (rarer + 1) / (len(differences) + 1)))


def _resamples(num_images):
    """Blocks of weights [R, N]: how often each image was drawn, with replacement."""
    rng = np.random.default_rng(0)
    for _ in range(0, NUM_RESAMPLES, _BLOCK):
        drawn = rng.integers(0, num_images, (_BLOCK, num_images)) + num_images * np.arange(_BLOCK)[:, None]
        yield np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)
