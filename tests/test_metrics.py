"""The metrics against the reference's numbers, scikit-learn, torchmetrics, torch-uncertainty and counts by hand.

record_metrics.py has recorded the numbers of torchmetrics and torch-uncertainty.
"""

import itertools
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    log_loss,
    roc_auc_score,
    roc_curve,
    top_k_accuracy_score,
)

import metrics

GOLDEN = json.loads((Path(__file__).parent / 'golden' / 'metrics.json').read_text())
RECORDED = json.loads((Path(__file__).parent / 'golden' / 'torch_metrics.json').read_text())


def predictions(seed, n, num_classes, temperature):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, n)
    logits = rng.normal(size=(n, num_classes))
    logits[np.arange(n), labels] += 2.5
    return metrics.softmax(temperature * logits), labels


def test_reliability_has_the_bins_of_ece():
    probs, labels = predictions(5, 300, 6, 2)
    bins = metrics.reliability(probs, labels, num_bins=12)
    confidence, correct = probs.max(axis=1), probs.argmax(axis=1) == labels
    for i in range(12):
        inside = (confidence > i / 12) & (confidence <= (i + 1) / 12)
        assert bins['counts'][i] == inside.sum()
        if inside.any():
            np.testing.assert_allclose(bins['accuracy'][i], correct[inside].mean())
            np.testing.assert_allclose(bins['confidence'][i], confidence[inside].mean())
    assert bins['counts'][0] == 0 and np.isnan(bins['accuracy'][0])
    held = bins['counts'] > 0
    gaps = bins['counts'][held] * np.abs(bins['accuracy'] - bins['confidence'])[held]
    np.testing.assert_allclose(gaps.sum() / 300, metrics.ece(probs, labels, num_bins=12))


@pytest.mark.parametrize('entry', GOLDEN, ids=lambda entry: f'seed{entry["seed"]}')
def test_golden_values(entry):
    probs, labels = predictions(entry['seed'], entry['n'], entry['num_classes'], entry['temperature'])
    golden = [entry[name] for name in ('accuracy', 'nll', 'ece_20_bins', 'auroc_grid_2500', 'auroc_exact')]
    summary = metrics.summary(probs, labels)
    ours = [summary[name] for name in ('accuracy', 'nll', 'ece', 'auroc_grid', 'auroc')]
    np.testing.assert_allclose(ours, golden, rtol=1e-12)


def tied_predictions():
    """Returns coarse probabilities, with many tied confidences, and labels."""
    rng = np.random.default_rng(3)
    counts = rng.integers(1, 6, size=(500, 4))
    return counts / counts.sum(axis=1, keepdims=True), rng.integers(0, 4, 500)


def test_scikit_learn_agrees():
    probs, labels = tied_predictions()
    correct = probs.argmax(axis=1) == labels
    brier = brier_score_loss(labels, probs, scale_by_half=False)
    np.testing.assert_allclose(metrics.brier(probs, labels), brier, rtol=1e-12)
    assert metrics.accuracy(probs, labels) == accuracy_score(labels, probs.argmax(axis=1))
    np.testing.assert_allclose(metrics.nll(probs, labels), log_loss(labels, probs), rtol=1e-12)
    np.testing.assert_allclose(metrics.auroc(probs, labels), roc_auc_score(correct, probs.max(axis=1)), rtol=1e-12)


def test_scikit_learn_agrees_on_top5():
    probs, labels = predictions(5, 300, 20, 0.7)
    np.testing.assert_allclose(metrics.top5(probs, labels), top_k_accuracy_score(labels, probs, k=5), rtol=1e-12)


def test_scikit_learn_agrees_on_unknown_images():
    rng = np.random.default_rng(6)
    scores, positive = rng.integers(0, 30, 400) / 30, rng.random(400) < 0.3
    scores = scores + 0.2 * positive
    np.testing.assert_allclose(metrics.area_under_roc(scores, positive), roc_auc_score(positive, scores), rtol=1e-12)
    np.testing.assert_allclose(
        metrics.area_under_precision_recall(scores, positive), average_precision_score(positive, scores), rtol=1e-12
    )
    false_positives, true_positives, _ = roc_curve(positive, scores, drop_intermediate=False)
    at_95 = false_positives[np.argmax(true_positives >= 0.95)]
    np.testing.assert_allclose(metrics.fpr_at_95_tpr(scores, positive), at_95, rtol=1e-12)


def test_torchmetrics_and_torch_uncertainty_agree():
    """Both compute in float32. torch-uncertainty's AURC is the area of trapezoids between the coverages 1/N and 1."""
    probs, labels = predictions(**RECORDED['predictions'])
    summary = metrics.summary(probs, labels)
    shared = RECORDED['values'].keys() & summary.keys() - {'aurc'}
    assert len(shared) == 9
    for name in shared:
        np.testing.assert_allclose(summary[name], RECORDED['values'][name], rtol=1e-6, err_msg=name)
    coverage, risk = metrics.risk_coverage(probs, labels)
    trapezoids = np.trapezoid(risk, coverage) / (1 - coverage[0])
    np.testing.assert_allclose(trapezoids, RECORDED['values']['aurc'], rtol=1e-6)
    np.testing.assert_allclose(summary['aurc'], RECORDED['values']['aurc'], atol=1 / len(labels))

    unknown, _ = predictions(12, 300, 10, 0.4)
    scores = -np.concatenate([probs.max(axis=1), unknown.max(axis=1)])
    is_unknown = np.repeat([False, True], [len(probs), len(unknown)])
    ours = {
        'unknown_auroc': metrics.area_under_roc(scores, is_unknown),
        'unknown_aupr': metrics.area_under_precision_recall(scores, is_unknown),
        'unknown_fpr95': metrics.fpr_at_95_tpr(scores, is_unknown),
    }
    samples = np.stack([predictions(seed, 40, 4, 1.0)[0] for seed in range(5)])
    expected_entropy = np.mean([metrics.entropy(p) for p in samples], axis=0)
    ours['mutual_information'] = metrics.mutual_information(
        metrics.entropy(samples.mean(axis=0)), expected_entropy
    ).mean()
    votes = np.sum([np.eye(4, dtype=int)[p.argmax(axis=1)] for p in samples], axis=0)
    ours['disagreement'] = metrics.disagreement(votes).mean()
    for name, value in ours.items():
        np.testing.assert_allclose(value, RECORDED['values'][name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize('made', [tied_predictions, partial(predictions, 7, 500, 10, 1.0)], ids=['ties', 'distinct'])
def test_weights_count_images(made):
    """A weighted metric equals the metric over as many copies of each image, in any order."""
    probs, labels = made()
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 4, (3, len(labels)))
    for name, metric in metrics.METRICS.items():
        if name == 'auroc_grid':
            continue
        together = metric(probs, labels, weights)
        assert together.shape == (3,)
        for row, value in zip(weights, together, strict=True):
            copies = rng.permutation(np.repeat(np.arange(len(labels)), row))
            np.testing.assert_allclose(value, metric(probs[copies], labels[copies]), rtol=1e-9, err_msg=name)
            np.testing.assert_allclose(value, metric(probs, labels, row), rtol=1e-9, err_msg=name)


def test_adaptive_ece_by_hand():
    """Two bins, {0.6, 0.7} with one right and {0.8, 0.9} with both right, give (|1 − 1.3| + |2 − 1.7|)/4."""
    probs, labels = binary([0.9, 0.6, 0.8, 0.7]), np.array([0, 0, 0, 1])
    np.testing.assert_allclose(metrics.adaptive_ece(probs, labels, num_bins=2), 0.6 / 4)


def test_classwise_ece_by_hand():
    """Both columns have the bins {0.2, 0.4} and {0.6, 0.8}, with the gaps 0.4 and 0.6 in one order or the other."""
    probs, labels = binary([0.6, 0.8, 0.4, 0.2]), np.array([0, 1, 1, 1])
    np.testing.assert_allclose(metrics.classwise_ece(probs, labels, num_bins=2), (0.4 + 0.6) / 4)


def test_classwise_ece_by_brute_force():
    """The mean over classes and sum over bins of |observed − expected images of the class|, over N."""
    probs, labels = predictions(4, 400, 6, 0.8)
    gaps = [
        abs(sum((labels[i] == k) - probs[i, k] for i in range(400) if b / 15 < probs[i, k] <= (b + 1) / 15))
        for k in range(6)
        for b in range(15)
    ]
    np.testing.assert_allclose(metrics.classwise_ece(probs, labels), sum(gaps) / 6 / 400, rtol=1e-12)


def test_auroc_grid_by_brute_force():
    """The trapezoid rule over the shares of right and wrong predictions above each threshold."""
    probs, labels = predictions(4, 300, 6, 0.8)
    confidence, correct = probs.max(axis=1), probs.argmax(axis=1) == labels
    points = [
        (np.mean(confidence[~correct] >= t), np.mean(confidence[correct] >= t)) for t in np.arange(1, 2500) / 2500
    ]
    points = [(0, 0), *points[::-1], (1, 1)]
    area = sum((x - last_x) * (y + last_y) / 2 for (last_x, last_y), (x, y) in itertools.pairwise(points))
    np.testing.assert_allclose(metrics.auroc_grid(probs, labels), area, rtol=1e-10)


def test_reliability_and_risk_by_brute_force_with_ties():
    probs, labels = tied_predictions()
    confidence, correct = probs.max(axis=1), probs.argmax(axis=1) == labels
    coverage, risk = metrics.risk_coverage(probs, labels)
    for threshold, share, error in zip(sorted(set(confidence))[::-1], coverage, risk, strict=True):
        kept = confidence >= threshold
        np.testing.assert_allclose([share, error], [kept.mean(), 1 - correct[kept].mean()], rtol=1e-12)


def test_every_metric_has_a_range():
    """Sure and right predictions have the best value of a metric. Sure and wrong predictions have a worse one."""
    assert metrics.RANGES.keys() == metrics.METRICS.keys()
    labels = np.arange(60) % 6
    wrong = np.stack([np.roll([0, 0.98, 0.008, 0.006, 0.004, 0.002], label) for label in labels])
    best, worse = metrics.summary(np.eye(6)[labels], labels), metrics.summary(wrong, labels)
    unsure_if_wrong, sure_if_wrong = np.eye(6)[labels], 0.9 * np.eye(6)[labels] + 0.1 / 6
    unsure_if_wrong[:9], sure_if_wrong[:9] = metrics.temper(wrong[:9], 3), wrong[:9]
    for name in ('auroc', 'auroc_grid'):
        best[name], worse[name] = (metrics.METRICS[name](probs, labels) for probs in (unsure_if_wrong, sure_if_wrong))
    for name, (_, limit) in metrics.RANGES.items():
        np.testing.assert_allclose(best[name], limit, atol=1e-12, err_msg=name)
        assert worse[name] < limit if metrics.higher_is_better(name) else worse[name] > limit, name


def test_mce_by_hand():
    """Two of ten bins are filled: 0.62 and 0.68, one right, gap |0.5 − 0.65|; and 0.95, right, gap 0.05."""
    np.testing.assert_allclose(metrics.mce(binary([0.62, 0.68, 0.95]), np.array([0, 1, 0]), num_bins=10), 0.15)


def test_risk_and_coverage_by_hand():
    """In order of confidence: right, wrong, {right, wrong} tied, right.

    The risks are 0, 1/2, 2/4 twice, and 2/5. At 80 % coverage the risk is 2/4.
    """
    probs, labels = binary([0.95, 0.9, 0.8, 0.8, 0.6]), np.array([0, 1, 0, 1, 0])
    np.testing.assert_allclose(metrics.aurc(probs, labels), (0 + 1 / 2 + 1 / 2 + 1 / 2 + 2 / 5) / 5)
    np.testing.assert_allclose(metrics.risk_at_80(probs, labels), 2 / 4)


def test_risk_of_ties_that_are_more_than_the_share():
    """All images are tied, so any share of them has the same risk."""
    probs = binary([1.0] * 10)
    assert metrics.risk_at_80(probs, np.ones(10, int)) == 1
    np.testing.assert_allclose(metrics.risk_at_80(probs, np.arange(10) % 2), 0.5)
    np.testing.assert_allclose(metrics.risk_at_80(probs, np.arange(10) % 2, np.ones((2, 10))), 0.5)


def test_impossible_classes_count_where_they_are_drawn():
    probs, labels = np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([1, 0])
    np.testing.assert_allclose(metrics.nll(probs, labels, np.array([[0, 2], [1, 1]])), [np.log(2), np.inf])


def test_entropies_by_hand():
    """Two samples are sure of different classes, so all of the uncertainty is about the weights."""
    samples = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    predictive, expected = metrics.entropy(samples.mean(axis=0)), metrics.entropy(samples[0])
    np.testing.assert_allclose(predictive, np.log(2))
    np.testing.assert_allclose(metrics.mutual_information(predictive, expected), np.log(2))
    assert metrics.disagreement([[1, 1], [2, 0]]).tolist() == [1, 0]
    assert np.isnan(metrics.disagreement([[1, 0]])).all()


def test_temperature_of_scaled_logits():
    """Labels are drawn from probabilities whose logits are then tripled. The temperature is 3, and mends the ECE."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 5))
    labels = (metrics.softmax(logits).cumsum(axis=1) < rng.random((20_000, 1))).sum(axis=1)
    probs = metrics.softmax(3 * logits)
    temperature = metrics.fit_temperature(probs, labels)
    np.testing.assert_allclose(temperature, 3, rtol=0.05)
    assert metrics.ece(metrics.temper(probs, temperature), labels) < 0.02 < 0.1 < metrics.ece(probs, labels)
    np.testing.assert_allclose(metrics.temper(np.array([[1.0, 0.0]]), 2.0), [[1, 0]])


def test_temperature_is_the_best_of_a_grid():
    """The NLL is computed with scikit-learn."""
    probs, labels = predictions(9, 300, 5, 3.0)
    grid = np.geomspace(0.1, 10, 2001)
    losses = [log_loss(labels, metrics.softmax(np.log(probs) / t)) for t in grid[::20]]
    coarse = 20 * np.argmin(losses)
    near = grid[coarse - 20 : coarse + 21]
    best = near[np.argmin([log_loss(labels, metrics.softmax(np.log(probs) / t)) for t in near])]
    np.testing.assert_allclose(metrics.fit_temperature(probs, labels), best, rtol=0.003)


def test_energy_by_brute_force():
    """−log Σ exp(logit), with exact sums. Large logits do not overflow."""
    logits = np.random.default_rng(0).normal(0, 5, (20, 7))
    expected = [-math.log(math.fsum(map(math.exp, row))) for row in logits]
    np.testing.assert_allclose(metrics.energy(logits), expected, rtol=1e-12)
    np.testing.assert_allclose(metrics.energy(logits + 1e4), np.array(expected) - 1e4, rtol=1e-12)
    assert np.isnan(metrics.energy(np.array([[np.nan, 1.0]]))).all()


def binary(confidences):
    return np.column_stack([confidences, 1 - np.asarray(confidences)])


def test_ece_by_hand():
    """Two of ten bins are filled: 0.62 and 0.68, one of them right, and 0.95, right: (|1 − 1.3| + |1 − 0.95|)/3."""
    probs, labels = binary([0.62, 0.68, 0.95]), np.array([0, 1, 0])
    np.testing.assert_allclose(metrics.ece(probs, labels, num_bins=10), (0.3 + 0.05) / 3)


def test_ece_counts_a_confidence_on_an_edge_once():
    """0.75 shares the bin (0.5, 0.75] with 0.7. One is right, so the gap is |1 − 1.45|/2. 1 is in the last bin."""
    np.testing.assert_allclose(metrics.ece(binary([0.75, 0.7]), np.array([1, 0]), num_bins=4), 0.45 / 2)
    assert metrics.ece(binary([1.0, 1.0]), np.array([0, 0])) == 0


def test_auroc_by_hand():
    """0.9 and 0.7 are right, 0.7 and 0.6 are wrong. Three of four pairs are in order, and one is a tie."""
    probs, labels = binary([0.9, 0.7, 0.7, 0.6]), np.array([0, 0, 1, 1])
    assert metrics.auroc(probs, labels) == 3.5 / 4


def test_auroc_grid_is_blind_above_its_last_threshold():
    """The grid ties all confidences above 0.9996 and gives ½. Their exact order is perfect."""
    probs, labels = binary([0.99999, 0.99998, 0.9998, 0.9997]), np.array([0, 0, 1, 1])
    assert metrics.auroc(probs, labels) == 1
    assert metrics.auroc_grid(probs, labels) == 0.5


@pytest.mark.parametrize('label', [0, 1])
def test_auroc_without_two_kinds(label):
    """If all predictions are right, or all are wrong, no pair can be compared."""
    probs, labels = binary([0.9, 0.8]), np.full(2, label)
    assert np.isnan(metrics.auroc(probs, labels)) and np.isnan(metrics.auroc_grid(probs, labels))


def test_nll_of_an_impossible_class():
    assert metrics.nll(np.array([[1.0, 0.0]]), np.array([1])) == np.inf


def test_summary_of_a_diverged_network():
    """The argmax of NaN is class 0, and an accuracy of a tenth would look like a result."""
    summary = metrics.summary(np.full((4, 10), np.nan), np.zeros(4, int))
    assert len(summary) == 13 and np.isnan(list(summary.values())).all()
    assert np.isnan(metrics.fit_temperature(np.full((4, 10), np.nan), np.zeros(4, int)))


@pytest.mark.parametrize('wrong', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('whole_row', [False, True])
@pytest.mark.parametrize('name', metrics.METRICS)
def test_no_metric_is_a_number_if_a_probability_is_not(name, whole_row, wrong):
    """This holds with weights too, and for a right prediction if only another class's probability is not finite."""
    probs, labels = predictions(5, 50, 6, 2)
    probs[7, slice(None) if whole_row else (labels[7] + 1) % 6] = wrong
    metric = metrics.METRICS[name]
    assert np.isnan(metric(probs, labels)) and isinstance(metric(probs, labels), float)
    if name != 'auroc_grid':
        weights = np.ones((3, 50))
        np.testing.assert_array_equal(metric(probs, labels, weights), [np.nan] * 3)
        assert np.isnan(metric(probs, labels, weights[0]))


def test_curves_of_probabilities_that_are_not_finite():
    probs, labels = predictions(5, 50, 6, 2)
    probs[7] = np.nan
    bins = metrics.reliability(probs, labels)
    assert np.isnan(bins['accuracy']).all() and bins['counts'].sum() == 50
    assert np.isnan(metrics.risk_coverage(probs, labels)[1]).all()


@pytest.mark.parametrize(
    'measure', [metrics.area_under_roc, metrics.area_under_precision_recall, metrics.fpr_at_95_tpr]
)
def test_separation_by_scores_that_are_nan_or_infinite(measure):
    """NaN has no rank. Infinite scores have a rank."""
    scores, positive = np.arange(10.0), np.arange(10) % 3 > 0
    expected = measure(scores, positive)
    np.testing.assert_equal(measure(np.array([-np.inf, *scores[1:9], np.inf]), positive), expected)
    assert np.isfinite(expected) and np.isnan(measure(np.array([np.nan, *scores[1:]]), positive))
    np.testing.assert_array_equal(metrics.area_under_roc(np.full(10, np.nan), positive, np.ones((2, 10))), [np.nan] * 2)


def test_temperatures_at_the_bounds():
    """A bound is returned exactly. In logarithms the NLL is finite, even if a true class has probability 0."""
    lowest, highest = metrics.TEMPERATURES
    assert metrics.fit_temperature(np.eye(2)[[0, 0, 0, 0]], np.array([0, 1, 0, 1])) == highest
    assert metrics.fit_temperature(binary([0.9, 0.7]), np.array([0, 0])) == lowest
    assert metrics.fit_temperature(binary([0.5, 0.5]), np.array([0, 1])) == 1


@pytest.mark.parametrize('row', [[np.inf, 0], [np.nan, 0], [-np.inf, -np.inf]])
def test_softmax_of_logits_that_are_not_finite(row):
    np.testing.assert_array_equal(metrics.softmax([row, [1, 1]]), [[np.nan, np.nan], [0.5, 0.5]])


def test_softmax_of_large_logits():
    np.testing.assert_allclose(metrics.softmax([[1000, 999]]), [[1 / (1 + np.exp(-1)), 1 / (1 + np.e)]])
