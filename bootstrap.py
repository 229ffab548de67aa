"""How far numbers on a test set are luck: confidence intervals and paired tests by the bootstrap (Efron, 1979).

The images are resampled, not the training: intervals tell what other test images would have given, not other seeds.
Percentile intervals of calibration errors lie high, as each resample adds noise of its own to every bin.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

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
