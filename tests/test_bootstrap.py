"""Confidence intervals against closed forms, and their coverage."""

import numpy as np

import metrics


def coin_predictions(rng, n, share):
    """Returns binary predictions and labels. A prediction is right with probability `share`."""
    right = rng.random(n) < share
    confidence = rng.uniform(0.5, 1, n)
    return np.column_stack([confidence, 1 - confidence]), np.where(right, 0, 1)


def test_interval_of_an_accuracy_is_that_of_a_binomial():
    probs, labels = coin_predictions(np.random.default_rng(0), 2000, 0.8)
    accuracy = metrics.accuracy(probs, labels)
    low, high = metrics.interval(metrics.resampled({'a': metrics.accuracy}, probs, labels)['a'])
    deviation = np.sqrt(accuracy * (1 - accuracy) / 2000)
    np.testing.assert_allclose([low, high], accuracy + deviation * np.array([-1.96, 1.96]), atol=0.2 * deviation)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """95 % of the intervals of 120 test sets hold the true accuracy of 0.9, within four standard deviations."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(120):
        probs, labels = coin_predictions(rng, 300, 0.9)
        low, high = metrics.interval(metrics.resampled({'a': metrics.accuracy}, probs, labels)['a'])
        hits += low <= 0.9 <= high
    assert abs(hits / 120 - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 120)


def test_differences_are_paired():
    """Two predictors that are wrong on nearly the same images differ clearly, although their own intervals overlap."""
    rng = np.random.default_rng(2)
    probs, labels = coin_predictions(rng, 1000, 0.8)
    wrong = np.flatnonzero(labels == 1)
    better = labels.copy()
    better[wrong[:20]] = 0
    values = metrics.resampled({'a': metrics.accuracy}, probs, labels)['a']
    others = metrics.resampled({'a': metrics.accuracy}, probs, better)['a']
    observed = metrics.accuracy(probs, labels) - metrics.accuracy(probs, better)
    low, high, p = metrics.difference(observed, values - others)
    assert -0.03 < low < high < -0.01 and p == 2 / 1001
    (one, two), (three, four) = metrics.interval(values), metrics.interval(others)
    assert one < four and three < two
    assert metrics.difference(0, values - values)[2] == 1


def calibrated(rng, n, gap):
    """Returns binary predictions and labels. Their ECE is `gap` in the limit of infinitely many images."""
    confidence = rng.uniform(0.6, 0.9, n)
    right = rng.random(n) < confidence - gap
    return np.column_stack([confidence, 1 - confidence]), np.where(right, 0, 1)


def test_intervals_of_differences_of_calibration_errors_hold_the_truth():
    """For most of 40 pairs of test sets, the interval holds the true difference. Percentile intervals often miss it."""
    rng = np.random.default_rng(3)
    hits = percentile_hits = 0
    for _ in range(40):
        pair = calibrated(rng, 1000, 0), calibrated(rng, 1000, 0.1)
        first, second = (metrics.resampled({'ece': metrics.ece}, *one)['ece'] for one in pair)
        low, high, _ = metrics.difference(metrics.ece(*pair[1]) - metrics.ece(*pair[0]), second - first)
        hits += low <= 0.1 <= high
        low, high = metrics.interval(second - first)
        percentile_hits += low <= 0.1 <= high
    assert hits >= 30 and percentile_hits <= 24
