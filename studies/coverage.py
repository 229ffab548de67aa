"""Measure how often the 95 % intervals of metrics contain the true value, over many made data sets.

python studies/coverage.py --output results/coverage.json

A data set has N images with known class probabilities, from which labels are drawn. Networks know the probabilities, or
distort them: a network can be overconfident or underconfident. The true value of a metric is its value on a million
images, with the class probabilities in place of labels. So an ideal network has a true ECE of 0.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import special

sys.path.insert(0, str(Path(__file__).parent.parent))

import metrics
from evaluation import tables
from runs import json_files, launch, parsing, provenance

NUM_CLASSES = 10
NUM_BINS = 20


class Regime(NamedTuple):
    """A kind of data set and a network.

    Attributes:
        margin: added to the logit of one class of each image. A larger margin makes the data easier.
        spread: the standard deviation of logits.
        sharpness: the network's logits are the true logits times this number. Above 1 it is overconfident.
        noise: the standard deviation of noise in the network's logits, which makes it less accurate.
        is_coarse: whether the network tells pairs of classes apart, but not the classes of a pair. It is then less
            accurate and stays calibrated.
    """

    margin: float
    spread: float
    sharpness: float = 1.0
    noise: float = 0.0
    is_coarse: bool = False


REGIMES = {
    'calibrated': Regime(0, 6),
    'overconfident': Regime(0, 6, 2),
    'underconfident': Regime(0, 6, 0.6),
    'hard, calibrated': Regime(0, 1.5),
    'accurate, calibrated': Regime(9, 2),
    'accurate, overconfident': Regime(9, 2, 1.7),
    'nearly perfect, calibrated': Regime(12, 2),
    'nearly perfect, overconfident': Regime(12, 2, 1.7),
}
# Two networks for the same images.
PAIRS = {
    'overconfident − calibrated': ('calibrated', 'overconfident'),
    'less accurate − calibrated': ('calibrated', Regime(0, 6, 1, 2)),
    'coarse, calibrated − calibrated': ('calibrated', Regime(0, 6, is_coarse=True)),
    'underconfident − overconfident': ('overconfident', 'underconfident'),
    'accurate: overconfident − calibrated': ('accurate, calibrated', 'accurate, overconfident'),
}


def truth_of_images(rng: np.random.Generator, regime: Regime, num_images: int) -> np.ndarray:
    """Returns true logits, float64 [N, K]."""
    logits = regime.spread * rng.normal(size=(num_images, NUM_CLASSES))
    logits[np.arange(num_images), rng.integers(0, NUM_CLASSES, num_images)] += regime.margin
    return logits


def predict(rng: np.random.Generator, regime: Regime, logits: np.ndarray) -> np.ndarray:
    """Returns the network's probabilities, float64 [N, K], for images with these true logits [N, K]."""
    probs = metrics.softmax(regime.sharpness * (logits + regime.noise * rng.normal(size=logits.shape)))
    return probs.reshape(len(probs), -1, 2).mean(axis=2).repeat(2, axis=1) if regime.is_coarse else probs


def draw_labels(rng: np.random.Generator, logits: np.ndarray) -> np.ndarray:
    """Returns labels, int [N], drawn from the true probabilities."""
    return np.argmax(logits + rng.gumbel(size=logits.shape), axis=1)


def true_values(probs: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """Returns the metrics that have an interval, with true probabilities in place of labels.

    Args:
        probs: float64 [M, K], the network's probabilities.
        logits: float64 [M, K], the true logits.
    """
    truth = metrics.softmax(logits)
    order = np.argsort(-probs.max(axis=1), kind='stable')
    probs, truth = probs[order], truth[order]  # from the most confident image to the least confident
    confidence, right = probs.max(axis=1), np.take_along_axis(truth, probs.argmax(axis=1)[:, None], axis=1)[:, 0]
    gaps, risks = right - confidence, np.cumsum(1 - right) / np.arange(1, len(right) + 1)
    in_top5 = np.take_along_axis(truth, np.argpartition(-probs, 5, axis=1)[:, :5], axis=1).sum(axis=1)
    squares = np.square(probs).sum(axis=1) + 1 - 2 * (truth * probs).sum(axis=1)

    def ece(bins):
        return np.abs(np.bincount(bins, gaps)).sum() / len(bins)

    return {
        'accuracy': right.mean(),
        'top5': in_top5.mean(),
        'nll': -special.xlogy(truth, probs).sum(axis=1).mean(),
        'brier': squares.mean(),
        'ece': ece(np.ceil(NUM_BINS * confidence).astype(int)),
        'ece_15': ece(np.ceil(15 * confidence).astype(int)),
        'adaptive_ece': ece(np.arange(len(gaps)) * 15 // len(gaps)),
        'auroc': metrics.area_under_roc(confidence, right),
        'aurc': risks.mean(),
        'risk_at_80': risks[int(0.8 * len(risks)) - 1],
    }


def of_intervals(regime: Regime, num_images: int, num_sets: int, num_true: int = 1_000_000) -> dict[str, dict]:
    """Returns the coverage of the intervals of one network.

    Args:
        regime: the data and the network.
        num_images: the number of images in a data set.
        num_sets: the number of data sets.
        num_true: the number of images that true values are computed from.

    Returns:
        {metric: {'truth': its true value, 'coverage': the share of intervals that contain it, 'below', 'above': the
        shares of intervals that lie below or above it, 'given': the share of data sets with an interval, 'width': the
        median width}}. Shares of intervals are None if no data set has one.
    """
    rng = np.random.default_rng(1)
    logits = truth_of_images(rng, regime, num_true)
    truth = true_values(predict(rng, regime, logits), logits)
    found = {name: [] for name in truth}
    rng = np.random.default_rng(2)
    for _ in range(num_sets):
        logits = truth_of_images(rng, regime, num_images)
        probs = predict(rng, regime, logits)
        for name, bounds in metrics.intervals(probs, draw_labels(rng, logits), NUM_BINS).items():
            found[name].append(bounds)
    return {name: _coverage(np.array(bounds), truth[name]) for name, bounds in found.items()}


def _coverage(bounds, truth):
    given = np.isfinite(bounds).all(axis=1)
    below, above = bounds[given, 1] < truth - 1e-12, bounds[given, 0] > truth + 1e-12
    shares = (
        {'coverage': 1 - np.mean(below | above), 'below': below.mean(), 'above': above.mean()} if any(given) else {}
    )
    width = {'width': np.median(np.diff(bounds[given], axis=1))} if any(given) else {}
    found = dict.fromkeys(('coverage', 'below', 'above', 'width')) | shares | width
    numbers = {name: value if value is None else float(f'{value:.5g}') for name, value in found.items()}
    return {'truth': float(f'{truth:.5g}'), 'given': float(given.mean())} | numbers


def of_differences(pair: tuple, num_images: int, num_sets: int, num_true: int = 1_000_000) -> dict[str, dict]:
    """Returns the coverage of the intervals of paired tests, for accuracy, NLL and ECE, as `of_intervals` does.

    Args:
        pair: two networks, as Regimes or names in REGIMES. They see the images of the first one.
        num_images: the number of images in a data set.
        num_sets: the number of data sets.
        num_true: the number of images that true values are computed from.
    """
    pair = [REGIMES.get(regime, regime) for regime in pair]
    tested = {name: metric for name, metric in metrics.with_bins(NUM_BINS).items() if name in metrics.SHORT}

    def drawn(rng, number):
        logits = truth_of_images(rng, pair[0], number)
        return logits, [predict(rng, regime, logits) for regime in pair]

    rng = np.random.default_rng(1)
    logits, both = drawn(rng, num_true)
    first, second = (true_values(probs, logits) for probs in both)
    found = {name: [] for name in tested}
    rng = np.random.default_rng(2)
    for _ in range(num_sets):
        logits, both = drawn(rng, num_images)
        labels = draw_labels(rng, logits)
        a, b = (metrics.resampled(tested, probs, labels) for probs in both)
        for name, metric in tested.items():
            observed = metric(both[1], labels) - metric(both[0], labels)
            found[name].append(metrics.difference(observed, b[name] - a[name])[:2])
    return {name: _coverage(np.array(bounds), second[name] - first[name]) for name, bounds in found.items()}


def table(cells: dict[str, dict[str, dict]]) -> str:
    """Returns a Markdown table of coverages in per cent. In brackets: the share of data sets with an interval."""
    names = list(next(iter(cells.values())))
    rows = [[cell, *(_text(found[name]) for name in names)] for cell, found in cells.items()]
    return tables.markdown(['', *names], rows)


def short_table(cells: dict[str, dict[str, dict]], kinds: dict, names: Sequence[str]) -> str:
    """Returns a Markdown table of coverages in per cent, with '500 / 2,000 images' in a cell, for docs/evaluation.md.

    Args:
        cells: a part of the record.
        kinds: REGIMES or PAIRS.
        names: the metrics to show.
    """
    rows = [
        [kind, *(' / '.join(_text(cells[f'{kind}, {number}'][name]) for number in (500, 2000)) for name in names)]
        for kind in kinds
    ]
    return tables.markdown(['', *names], rows)


def _text(found):
    if found['coverage'] is None or found['width'] == 0:  # a width of 0: both networks predict the same classes
        return '–'
    given = f' ({100 * found["given"]:.0f})' if found['given'] < 1 else ''
    return f'{100 * found["coverage"]:.1f}{given}'


@launch.script('coverage.py')
def main(argv: list[str] | None = None) -> None:
    parser = parsing.Parser(__doc__)
    help = 'data sets of each kind, for the intervals of one network'
    parser.add_argument('--sets', type=parsing.integer(1), default=1000, help=help)
    help = 'data sets of each kind, for differences between two networks'
    parser.add_argument('--pairsets', type=parsing.integer(1), default=300, help=help)
    help = 'images in a data set'
    parser.add_argument('--images', type=parsing.integer(10), nargs='+', default=[500, 2000], help=help)
    parser.add_argument('--output', type=parsing.new_file, required=True, help='file of the results, as JSON')
    args = parser.parse_args(argv)
    record = provenance.of_command('studies/coverage.py', argv)
    parts = (
        ('intervals', of_intervals, REGIMES, args.sets),
        ('differences', of_differences, PAIRS, args.pairsets),
    )
    for part, measure, kinds, num_sets in parts:
        record[part] = {
            f'{kind}, {number}': measure(made, number, num_sets)
            for number in args.images
            for kind, made in kinds.items()
        }
        print(table(record[part]), flush=True)
    json_files.write_json(args.output, record)


if __name__ == '__main__':
    main()
