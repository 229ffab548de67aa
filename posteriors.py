"""What a posterior over a network's weights predicts for images, at its mean and averaged over samples of it."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import devices
import metrics


@partial(jax.jit, static_argnames=('apply', 'batch_size'))
def logits(apply, params, batch_stats, images, batch_size):
    """float32 [N, K] for images uint8 [N, H, W, C], in batches; the last may be smaller, and every image counts once.

    apply(params, batch_stats, images uint8 [B, H, W, C]) normalises the images and returns logits [B, K].
    """
    batch_size = min(batch_size, len(images))
    full = len(images) // batch_size * batch_size
    batches = devices.spread(images[:full].reshape(-1, batch_size, *images.shape[1:]), axis=1)
    whole = jax.lax.map(partial(apply, params, batch_stats), batches)
    parts = [whole.reshape(full, -1)]
    if full < len(images):
        parts.append(apply(params, batch_stats, images[full:]))
    return devices.gather(jnp.concatenate(parts))


class Prediction(NamedTuple):
    """What a posterior predicts for N images, and how much its samples agree.

    logits: float32 [N, K] at the mean; probs: float64 [N, K], averaged over samples; expected_entropy: float64 [N],
    the mean entropy of the samples in nats; votes: int32 [N, K], of how many samples a class is the most probable.
    """

    logits: np.ndarray
    probs: np.ndarray
    expected_entropy: np.ndarray
    votes: np.ndarray

    @property
    def probs_at_mean(self):
        return metrics.softmax(self.logits)

    @property
    def entropy(self):
        """The predictive entropy in nats, [N]."""
        return metrics.entropy(self.probs)

    @property
    def mutual_information(self):
        return metrics.mutual_information(self.entropy, self.expected_entropy)

    @property
    def disagreement(self):
        return metrics.disagreement(self.votes)


class Posterior:
    """A posterior over a network's weights: the mean, and samples that are the same whenever they are asked for.

    apply: as for `logits`; sample(key) returns params. refresh(params) returns the batch statistics of weights; without
    it all have those of the mean.
    """

    def __init__(self, apply, sample, params, batch_stats, key, batch_size, refresh=None):
        self._apply, self._draw, self._key, self._batch_size = apply, sample, key, batch_size
        self._refresh = refresh or (lambda params: batch_stats)
        self._mean = params, self._refresh(params)
        self._batch_stats = {}

    def predict(self, images, numbers):
        """Yields the Prediction for images uint8 [N, H, W, C] after each of `numbers` samples, which rise."""
        images = jax.device_put(images)
        logits_at_mean = self._logits(self._mean, images)
        total, entropy, votes = 0, 0, np.zeros(logits_at_mean.shape, np.int32)
        for i in range(numbers[-1]):
            weights = self._sample(i)
            probs = metrics.softmax(logits_at_mean if weights is self._mean else self._logits(weights, images))
            total, entropy = total + probs, entropy + metrics.entropy(probs)
            votes[np.arange(len(votes)), probs.argmax(axis=1)] += 1
            if i + 1 in numbers:
                yield Prediction(logits_at_mean, total / (i + 1), entropy / (i + 1), votes.copy())

    def _logits(self, weights, images):
        return jax.device_get(logits(self._apply, *weights, images, self._batch_size))

    def _sample(self, i):
        """The i-th sample, or the mean itself where the posterior is a point, so that it need not be run again."""
        params = self._draw(jax.random.fold_in(self._key, i))
        if jax.device_get(_equal(params, self._mean[0])):
            return self._mean
        if i not in self._batch_stats:
            self._batch_stats[i] = self._refresh(params)
        return params, self._batch_stats[i]


@jax.jit
def _equal(one, other):
    return jnp.stack(
        [jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)]
    ).all()


@partial(jax.jit, static_argnames='update')
def batch_statistics(update, params, batch_stats, batches):
    """Batch statistics of weights: the averages of those of every batch, uint8 [K, B, H, W, C], on its own.

    update(params, batch_stats, images uint8 [B, H, W, C]) returns the batch statistics after one training batch.
    """
    before = jax.tree.map(jnp.zeros_like, batch_stats)
    return jax.tree.map(lambda x: x.mean(axis=0), jax.lax.map(partial(update, params, before), batches))
