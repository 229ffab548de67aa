"""Confidence intervals against closed forms, and their coverage."""

import json
import math
import subprocess
import sys
import timeit
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import metrics
from conftest import slow_except
from studies import coverage

ROOT = Path(__file__).parent.parent


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


@pytest.mark.parametrize('num_right', [0, 1, 37, 59, 60])
def test_interval_of_a_share_by_the_binomial_distribution(num_right):
    """At each limit, P(more) + P(as many)/2 is 2.5 % or 97.5 %, if the limit is not 0 or 1."""
    probs, labels = np.tile([0.6, 0.4], (60, 1)), np.repeat([0, 1], [num_right, 60 - num_right])
    low, high = metrics.intervals(probs, labels)['accuracy']
    tails = [stats.binom(60, p).sf(num_right) + stats.binom(60, p).pmf(num_right) / 2 for p in (low, high)]
    expected = [0.5 if num_right == 0 else 0.025, 0.5 if num_right == 60 else 0.975]
    np.testing.assert_allclose(tails, expected, rtol=1e-6)


def test_interval_of_a_mean_is_that_of_a_normal_distribution_without_skewness():
    values = np.concatenate([np.linspace(-1, 1, 400), np.zeros(100)]) + 3
    error = 1.96 * values.std() / np.sqrt(500)
    np.testing.assert_allclose(metrics._skewed_interval(values, 1.96), [3 - error, 3 + error], rtol=1e-9)


@pytest.mark.parametrize('ties', [False, True])
@pytest.mark.parametrize('name', ['auroc', 'aurc'])
def test_pseudo_values_are_influences(name, ties):
    """A pseudo-value is the metric plus the derivative in the image's share of all images."""
    rng = np.random.default_rng(4)
    probs, labels = coin_predictions(rng, 60, 0.7)
    if ties:
        probs = np.round(probs, 1)
    confidence, correct = probs.max(axis=1), probs.argmax(axis=1) == labels
    value, tiny = metrics.METRICS[name](probs, labels), 1e-6
    changed = metrics.METRICS[name](probs, labels, np.ones(60) + 60 * tiny * np.eye(60))
    found = getattr(metrics, f'_{name}_values')(confidence, correct)
    np.testing.assert_allclose(found.mean(), value, rtol=1e-12)
    np.testing.assert_allclose(np.sort(found), np.sort(value + (changed - value) / tiny), rtol=1e-3, atol=1e-4)


def test_intervals_of_unusual_sets():
    """An interval contains the metric and stays within its range."""
    rng = np.random.default_rng(5)
    for n, share in ((1, 1), (2, 0.5), (3, 0), (40, 1), (40, 0), (40, 0.5), (300, 0.98)):
        probs, labels = coin_predictions(rng, n, share)
        sure = np.eye(2)[probs.argmax(axis=1)]
        for made in (probs, np.round(probs, 1), sure, np.full((n, 2), 0.5)):
            summary = metrics.summary(made, labels)
            for name, (low, high) in metrics.intervals(made, labels).items():
                least, most = sorted(metrics.RANGES[name])
                undefined = name in ('auroc', 'aurc') or summary[name] == math.inf
                assert least <= low <= summary[name] <= high <= most or (math.isnan(low) and undefined), name
    probs, labels = coin_predictions(rng, 300, 0.8)
    assert np.isfinite(list(metrics.intervals(probs, labels).values())).all()
    assert np.isnan(list(metrics.intervals(np.full((20, 2), np.nan), np.zeros(20, int)).values())).all()


def test_ranks_of_few_errors_have_no_interval():
    probs, labels = coin_predictions(np.random.default_rng(6), 100, 1)
    for errors, undefined in ((9, True), (10, False)):
        found = metrics.intervals(probs, np.where(np.arange(100) < errors, 1, labels))
        assert np.isnan(found['auroc']).all() == np.isnan(found['aurc']).all() == undefined


def test_intervals_of_ece_have_the_bins_of_ece():
    probs, labels = coverage.predict(RNG(7), coverage.Regime(0, 6, 3), LOGITS), coverage.draw_labels(RNG(8), LOGITS)
    few, many = (metrics.intervals(probs, labels, num_bins) for num_bins in (2, 15))
    assert few['ece'] != many['ece'] == many['ece_15'] == few['ece_15']


RNG = np.random.default_rng
LOGITS = coverage.truth_of_images(RNG(0), coverage.Regime(0, 6), 500)


@pytest.mark.parametrize('kind', slow_except(coverage.REGIMES, 'calibrated', 'accurate, overconfident'))
def test_coverage_of_intervals(kind):
    """Of few intervals, most contain the true value."""
    for name, found in coverage.of_intervals(coverage.REGIMES[kind], 300, 25, 50_000).items():
        assert found['given'] < 0.2 or found['coverage'] >= 0.8, name


def test_percentile_intervals_of_ece_do_not_contain_the_truth():
    """The true ECE is 0. This is why the intervals are not percentiles of resamples."""
    probs, labels = metrics.softmax(LOGITS), coverage.draw_labels(RNG(1), LOGITS)
    assert metrics.interval(metrics.resampled({'ece': metrics.ece}, probs, labels)['ece'])[0] > 0.02
    assert metrics.intervals(probs, labels)['ece'][0] == 0


@pytest.mark.slow
@pytest.mark.parametrize('kind', coverage.REGIMES)
def test_coverage_of_intervals_is_what_the_record_says(kind):
    record = json.loads((ROOT / 'results' / 'coverage.json').read_text())['intervals'][f'{kind}, 500']
    for name, found in coverage.of_intervals(coverage.REGIMES[kind], 500, 300).items():
        expected = record[name]['coverage']
        assert found['given'] < 0.2 or abs(found['coverage'] - expected) < 4 * math.sqrt(0.05 / 300), name


def test_recorded_coverage():
    """At least 90 % of all recorded intervals of one network contain the true value.

    At most 99 % do, except for shares that are often 0 % or 100 % because less than one image is expected.
    """
    record = json.loads((ROOT / 'results' / 'coverage.json').read_text())
    assert record['intervals'].keys() == {f'{kind}, {number}' for number in (500, 2000) for kind in coverage.REGIMES}
    for kind, cells in record['intervals'].items():
        assert cells.keys() == metrics.intervals(np.eye(2), np.arange(2)).keys()
        for name, found in cells.items():
            most = 1 if name in ('top5', 'risk_at_80') else 0.99
            assert found['coverage'] is None or 0.9 <= found['coverage'] <= most, (kind, name)
    page = (ROOT / 'docs' / 'evaluation.md').read_text()
    shown = ('accuracy', 'nll', 'brier', 'ece', 'auroc', 'aurc')
    assert coverage.short_table(record['intervals'], coverage.REGIMES, shown) in page
    assert coverage.short_table(record['differences'], coverage.PAIRS, metrics.SHORT) in page


def test_resamples_do_not_depend_on_memory(monkeypatch):
    probs, labels = coin_predictions(RNG(9), 50, 0.8)
    whole = metrics.resampled({'a': metrics.accuracy}, probs, labels)['a']
    monkeypatch.setattr(metrics, '_BLOCK', 150)
    np.testing.assert_array_equal(metrics.resampled({'a': metrics.accuracy}, probs, labels)['a'], whole)
    assert len(whole) == 1000 and len(set(whole)) > 10


@pytest.mark.slow
def test_a_million_images_take_less_than_2_gb():
    """Peak memory of summary, intervals and resamples, with NumPy and SciPy."""
    script = """if True:
        import resource, sys
        import numpy as np
        import metrics

        rng = np.random.default_rng(0)
        probs, labels = rng.random((1_000_000, 10)), rng.integers(0, 10, 1_000_000)
        probs /= probs.sum(axis=1, keepdims=True)
        metrics.summary(probs, labels), metrics.intervals(probs, labels)
        metrics.NUM_RESAMPLES = 100
        metrics.resampled({name: metrics.METRICS[name] for name in metrics.SHORT}, probs, labels)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024))
    """
    peak = subprocess.run([sys.executable, '-c', script], cwd=ROOT, check=True, capture_output=True, text=True)
    assert int(peak.stdout) < 2e9


@pytest.mark.slow
def test_metrics_of_200_classes_take_less_than_half_a_second():
    probs, labels = metrics.softmax(3 * RNG(0).normal(size=(10_000, 200))), RNG(1).integers(0, 200, 10_000)
    assert min(timeit.repeat(lambda: metrics.summary(probs, labels), number=1, repeat=7)) < 0.5


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
    """For most of 24 pairs of test sets, the interval holds the true difference. Percentile intervals often miss it."""
    rng = np.random.default_rng(3)
    hits = percentile_hits = 0
    for _ in range(24):
        pair = calibrated(rng, 600, 0), calibrated(rng, 600, 0.1)
        first, second = (metrics.resampled({'ece': metrics.ece}, *one)['ece'] for one in pair)
        low, high, _ = metrics.difference(metrics.ece(*pair[1]) - metrics.ece(*pair[0]), second - first)
        hits += low <= 0.1 <= high
        low, high = metrics.interval(second - first)
        percentile_hits += low <= 0.1 <= high
    assert hits >= 17 and percentile_hits <= 14


def test_coverage_of_differences():
    """Of few intervals, most contain the true difference of accuracy and NLL."""
    found = coverage.of_differences(coverage.PAIRS['less accurate − calibrated'], 200, 12, 50_000)
    assert found['accuracy']['truth'] < 0 < found['nll']['truth'] and found['ece']['truth'] > 0
    assert found['accuracy']['coverage'] >= 9 / 12 and found['nll']['coverage'] >= 9 / 12
