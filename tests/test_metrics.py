"""The metrics against the reference's numbers, scikit-learn and cases that can be counted by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

import metrics

GOLDEN = json.loads((Path(__file__).parent / 'golden' / 'metrics.json').read_text())


def predictions(seed, n, num_classes, temperature):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, n)
    logits = rng.normal(size=(n, num_classes))
    logits[np.arange(n), labels] += 2.5
    return metrics.softmax(temperature * logits), labels


@pytest.mark.parametrize('entry', GOLDEN, ids=lambda entry: f'seed{entry["seed"]}')
def test_golden_values(entry):
    probs, labels = predictions(entry['seed'], entry['n'], entry['num_classes'], entry['temperature'])
    golden = [entry[name] for name in ('accuracy', 'nll', 'ece_20_bins', 'auroc_grid_2500', 'auroc_exact')]
    np.testing.assert_allclose(list(metrics.summary(probs, labels).values()), golden, rtol=1e-12)


def test_scikit_learn_agrees():
    """Coarse probabilities, so that many confidences are tied."""
    rng = np.random.default_rng(3)
    counts = rng.integers(1, 6, size=(500, 4))
    probs = counts / counts.sum(axis=1, keepdims=True)
    labels = rng.integers(0, 4, 500)
    correct = probs.argmax(axis=1) == labels
    assert metrics.accuracy(probs, labels) == accuracy_score(labels, probs.argmax(axis=1))
    np.testing.assert_allclose(metrics.nll(probs, labels), log_loss(labels, probs), rtol=1e-12)
    np.testing.assert_allclose(metrics.auroc(probs, labels), roc_auc_score(correct, probs.max(axis=1)), rtol=1e-12)


def binary(confidences):
    return np.column_stack([confidences, 1 - np.asarray(confidences)])


def test_ece_by_hand():
    """Two bins of ten: 0.62 and 0.68, one of them right, and 0.95, right: (|1 − 1.3| + |1 − 0.95|)/3."""
    probs, labels = binary([0.62, 0.68, 0.95]), np.array([0, 1, 0])
    np.testing.assert_allclose(metrics.ece(probs, labels, num_bins=10), (0.3 + 0.05) / 3)


def test_ece_counts_a_confidence_on_an_edge_once():
    """0.75 belongs to (0.5, 0.75], with 0.7: one right, one wrong: a gap of |1 − 1.45|/2. And 1 is in the last bin."""
    np.testing.assert_allclose(metrics.ece(binary([0.75, 0.7]), np.array([1, 0]), num_bins=4), 0.45 / 2)
    assert metrics.ece(binary([1.0, 1.0]), np.array([0, 0])) == 0


def test_auroc_by_hand():
    """Right: 0.9 and 0.7; wrong: 0.7 and 0.6. Of four pairs three are in order and one is a tie."""
    probs, labels = binary([0.9, 0.7, 0.7, 0.6]), np.array([0, 0, 1, 1])
    assert metrics.auroc(probs, labels) == 3.5 / 4


def test_auroc_grid_is_blind_above_its_last_threshold():
    """Confidences above 0.9996 are all tied for the grid, which gives ½, while the exact order is perfect."""
    probs, labels = binary([0.99999, 0.99998, 0.9998, 0.9997]), np.array([0, 0, 1, 1])
    assert metrics.auroc(probs, labels) == 1
    assert metrics.auroc_grid(probs, labels) == 0.5


@pytest.mark.parametrize('label', [0, 1])
def test_auroc_without_two_kinds(label):
    """All right, or all wrong: there is no pair to compare."""
    probs, labels = binary([0.9, 0.8]), np.full(2, label)
    assert np.isnan(metrics.auroc(probs, labels)) and np.isnan(metrics.auroc_grid(probs, labels))


def test_nll_of_an_impossible_class():
    assert metrics.nll(np.array([[1.0, 0.0]]), np.array([1])) == np.inf


def test_summary_of_a_diverged_network():
    """argmax of NaN is class 0: an accuracy of a tenth would look like a result."""
    summary = metrics.summary(np.full((4, 10), np.nan), np.zeros(4, int))
    assert len(summary) == 5 and np.isnan(list(summary.values())).all()


def test_softmax_of_large_logits():
    np.testing.assert_allclose(metrics.softmax([[1000, 999]]), [[1 / (1 + np.exp(-1)), 1 / (1 + np.e)]])
