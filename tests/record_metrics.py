"""Writes golden/torch_metrics.json: metrics computed by torchmetrics and torch-uncertainty.

The test environment has neither of them: pip install torch torchmetrics torch-uncertainty, then
python tests/record_metrics.py. test_metrics.predictions makes the same predictions.
"""

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import torch
from torch_uncertainty import metrics as uncertain
from torchmetrics import classification

PREDICTIONS = {'seed': 11, 'n': 500, 'num_classes': 10, 'temperature': 1.5}


def predictions(seed, n, num_classes, temperature):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, n)
    logits = rng.normal(size=(n, num_classes))
    logits[np.arange(n), labels] += 2.5
    exponentials = np.exp(temperature * logits)
    return torch.tensor(exponentials / exponentials.sum(axis=1, keepdims=True)), torch.tensor(labels)


def sampled_probs():
    """Returns the predictions of five samples, float64 [N, S, K]."""
    members = [predictions(seed, 40, 4, 1.0)[0] for seed in range(5)]
    return torch.stack(members, dim=1)


def value(metric, *args):
    metric.update(*args)
    return float(metric.compute())


def main():
    probs, labels = predictions(**PREDICTIONS)
    k = PREDICTIONS['num_classes']
    unknown = predictions(12, 300, k, 0.4)[0]
    scores = -torch.cat([probs.max(1).values, unknown.max(1).values])
    is_unknown = torch.cat([torch.zeros(len(probs)), torch.ones(len(unknown))]).long()
    members = sampled_probs()
    recorded = {
        'accuracy': value(classification.MulticlassAccuracy(k, average='micro'), probs, labels),
        'top5': value(classification.MulticlassAccuracy(k, top_k=5, average='micro'), probs, labels),
        'nll': value(uncertain.CategoricalNLL(), probs, labels),
        'brier': value(uncertain.BrierScore(k), probs, labels),
        'ece': value(classification.MulticlassCalibrationError(k, n_bins=20, norm='l1'), probs, labels),
        'ece_15': value(classification.MulticlassCalibrationError(k, n_bins=15, norm='l1'), probs, labels),
        'mce': value(classification.MulticlassCalibrationError(k, n_bins=20, norm='max'), probs, labels),
        'adaptive_ece': value(
            uncertain.AdaptiveCalibrationError('multiclass', num_classes=k, num_bins=15), probs, labels
        ),
        'aurc': value(uncertain.AURC(), probs, labels),
        'risk_at_80': value(uncertain.RiskAt80Cov(), probs, labels),
        'unknown_auroc': value(classification.BinaryAUROC(), 1 + scores, is_unknown),
        'unknown_aupr': value(classification.BinaryAveragePrecision(), 1 + scores, is_unknown),
        'unknown_fpr95': value(uncertain.FPR95(pos_label=1), 1 + scores, is_unknown),
        'mutual_information': value(uncertain.MutualInformation(), members),
        'disagreement': value(uncertain.Disagreement(), members),
    }
    versions = {name: importlib.metadata.version(name) for name in ('torch', 'torchmetrics', 'torch-uncertainty')}
    path = Path(__file__).parent / 'golden' / 'torch_metrics.json'
    path.write_text(json.dumps({'versions': versions, 'predictions': PREDICTIONS, 'values': recorded}, indent=2) + '\n')


if __name__ == '__main__':
    main()
