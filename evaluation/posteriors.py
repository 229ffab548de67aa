"""What a posterior over a network's weights predicts for images, at its mean and averaged over samples of it.

Several devices run a sample each, or share the images of one.
"""

import itertools
from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

import feeds
import metrics
from ops import sharding
from runs import hosts


@partial(jax.jit, static_argnames=('apply', 'batch_size', 'where'))
def logits(apply, params, batch_stats, images, batch_size, where=sharding.on_all):
    """float32 [N, K] for images uint8 [N, H, W, C], in batches; the last may be smaller, and every image counts once.

    Batches that devices are to share but cannot equally are made a little larger.
    apply(params, batch_stats, images uint8 [B, H, W, C]) normalises the images and returns logits [B, K].
    where: sharding.on_each for weights [D, ...] with an entry for each of D devices, and logits [D, N, K].
    """
    return sharding.gather(where(Partial(partial(_logits_at, apply, batch_size), images), (params, batch_stats)))


def _logits_at(apply, batch_size, images, weights):
    batch_size = min(sharding.shareable(batch_size), len(images))
    full = len(images) // batch_size * batch_size
    batches = sharding.shard(images[:full].reshape(-1, batch_size, *images.shape[1:]), axis=1)
    whole = jax.lax.map(partial(apply, *weights), batches)
    parts = [whole.reshape(full, -1)]
    if full < len(images):
        parts.append(apply(*weights, images[full:]))
    return jnp.concatenate(parts)


@partial(jax.jit, static_argnames='where')
def _samples_at(index, draw, key, where):
    return where(Partial(_draw_at, draw, key), index)


def _draw_at(draw, key, i):
    return draw(jax.random.fold_in(key, i))


@partial(jax.jit, static_argnames='where')
def _refreshed(params, refresh, where):
    return where(refresh, params)


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
    it all have those of the mean. Both are jax.tree_util.Partials of the arrays that they need.
    """

    def __init__(self, apply, sample, params, batch_stats, key, batch_size, refresh=None):
        self._apply, self._draw, self._batch_size = apply, sample, batch_size
        self._refresh = refresh or Partial(_same_for_all, batch_stats)
        self._key = sharding.send(key)
        self._mean = params, _refreshed(params, self._refresh, sharding.on_all)
        self._batch_stats = {}

    @property
    def has_batch_stats(self):
        return bool(jax.tree.leaves(self._mean[1]))

    def predict(self, images, numbers):
        """Yields the Prediction for images uint8 [N, H, W, C] after each of `numbers` samples, which rise."""
        hosts.require_same_arrays('images', images)
        parts = feeds.parts(images, self._batch_size)
        logits_at_mean = self._logits(self._mean, parts, sharding.on_all)
        samples = itertools.repeat(logits_at_mean) if self._is_point else self._samples(parts, numbers[-1])
        total, entropy, votes = 0, 0, np.zeros(logits_at_mean.shape, np.int32)
        for i, sampled in enumerate(itertools.islice(samples, numbers[-1]), start=1):
            probs = metrics.softmax(sampled)
            total, entropy = total + probs, entropy + metrics.entropy(probs)
            votes[np.arange(len(votes)), probs.argmax(axis=1)] += 1
            if i in numbers:
                yield Prediction(logits_at_mean, total / i, entropy / i, votes.copy())

    @cached_property
    def _is_point(self):
        """Whether samples are the mean, so that they need not be run."""
        params = _samples_at(np.int32(0), self._draw, self._key, sharding.on_all)
        return bool(jax.device_get(_equal(params, self._mean[0])))

    def _samples(self, parts, num_samples):
        """Yields the logits of samples: of those that make whole groups on a device each, of the others on all."""
        size = sharding.num_devices()
        left = num_samples if size == 1 else num_samples % size
        for first in range(0, num_samples - left, size):
            weights = self._weights(np.arange(first, first + size, dtype=np.int32), sharding.on_each)
            yield from self._logits(weights, parts, sharding.on_each)
        for i in range(num_samples - left, num_samples):
            yield self._logits(self._weights(np.int32(i), sharding.on_all), parts, sharding.on_all)

    def _logits(self, weights, parts, where):
        """float32 [N, K] of all parts' images, or [D, N, K] of weights on each device."""
        return feeds.over_parts(lambda part: logits(self._apply, *weights, part, self._batch_size, where), parts)

    def _weights(self, index, where):
        """The sample at an index, or those at int [D] on each device, with their batch statistics."""
        params = _samples_at(index, self._draw, self._key, where)
        held = where, int(np.min(index))
        if held not in self._batch_stats:
            self._batch_stats[held] = _refreshed(params, self._refresh, where)
        return params, self._batch_stats[held]


def _same_for_all(batch_stats, params):
    del params
    return batch_stats


@jax.jit
def _equal(one, other):
    return jnp.array_equal(ravel_pytree(one)[0], ravel_pytree(other)[0])


@partial(jax.jit, static_argnames='update')
def batch_statistics(update, batch_stats, batches, params):
    """Batch statistics of weights: the averages of those of every batch, uint8 [K, B, H, W, C], on its own.

    update(params, batch_stats, images uint8 [B, H, W, C]) returns the batch statistics after one training batch.
    """
    before = jax.tree.map(jnp.zeros_like, batch_stats)
    return jax.tree.map(lambda x: x.mean(axis=0), jax.lax.map(partial(update, params, before), batches))
