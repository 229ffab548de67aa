"""What a posterior over a network's weights predicts for images, at its mean and averaged over samples.

Several devices run a sample each, or shard the images of one sample.
"""

import itertools
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

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


PART = 1 << 28  # bytes of images that are sent at once where not all are


def parts(images, batch_size, stream=False):
    """Returns images uint8 [N, H, W, C] that are evaluated, once or several times, as a list for `over_parts`.

    Sends all to the devices of the mesh that is set. Leaves parts of whole batches on the host if `stream` asks for it
    or if the images would fill a device.
    """
    if not (stream or hosts.must_stream(images)):
        return [sharding.send(images)]
    batch_size = sharding.shareable(batch_size)
    rows = max(PART // images[:1].nbytes // batch_size, 1) * batch_size
    return [images[i : i + rows] for i in range(0, len(images), rows)]


def over_parts(function, parts):
    """Returns the results [..., N, K] of a function of images on the devices, put together on the host.

    Sends parts that are on the host when they are due.
    """
    sent = (part if isinstance(part, jax.Array) else sharding.send(part) for part in parts)
    return np.concatenate([jax.device_get(function(part)) for part in sent], axis=-2)


def probs_at(apply, params, batch_stats, parts, batch_size):
    """Returns class probabilities, float64 [N, K] on the host, of images as from `parts`."""
    return metrics.softmax(over_parts(lambda part: logits(apply, params, batch_stats, part, batch_size), parts))


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

    def metrics(self, labels, num_bins):
        """Returns all metrics at the mean and of the average over samples.

        Args:
            labels: int [N].
            num_bins: of ECE, MCE and the reliability diagram.

        Returns:
            {'mean': {name: value}, 'average': ..., 'intervals': {'mean': {name: (low, high)}, 'average': ...},
            'reliability': {'mean': {name: list}, 'average': ...}}. Both have the mean entropy over the images, the
            average also its mutual information and disagreement.
        """
        probs = {'mean': self.probs_at_mean, 'average': self.probs}
        measured = {at: metrics.summary(p, labels, num_bins) for at, p in probs.items()}
        measured['mean']['entropy'] = float(metrics.entropy(probs['mean']).mean())
        diverged = not np.isfinite(self.probs).all()  # the votes of such a network do not tell
        for name in ('entropy', 'mutual_information', 'disagreement'):
            measured['average'][name] = math.nan if diverged else float(getattr(self, name).mean())
        measured['intervals'] = {at: metrics.intervals(p, labels, num_bins) for at, p in probs.items()}
        measured['reliability'] = {
            at: {name: values.tolist() for name, values in metrics.reliability(p, labels, num_bins).items()}
            for at, p in probs.items()
        }
        return measured


class Posterior:
    """A posterior over a network's weights: the mean, and samples that are the same whenever they are asked for.

    apply: as for `logits`; sample(key) returns params. refresh(params) returns the batch statistics of weights; without
    it all have those of the mean. Both are jax.tree_util.Partials of the arrays that they need. If `is_point`, every
    sample is the mean and is not run.
    """

    def __init__(self, apply, sample, params, batch_stats, key, batch_size, *, is_point, refresh=None):
        self._apply, self._draw, self._batch_size, self._is_point = apply, sample, batch_size, is_point
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
        sent = parts(images, self._batch_size)
        logits_at_mean = self._logits(self._mean, sent, sharding.on_all)
        samples = itertools.repeat(logits_at_mean) if self._is_point else self._samples(sent, numbers[-1])
        total, entropy, votes = 0, 0, np.zeros(logits_at_mean.shape, np.int32)
        for i, sampled in enumerate(itertools.islice(samples, numbers[-1]), start=1):
            probs = metrics.softmax(sampled)
            total, entropy = total + probs, entropy + metrics.entropy(probs)
            votes[np.arange(len(votes)), probs.argmax(axis=1)] += 1
            if i in numbers:
                yield Prediction(logits_at_mean, total / i, entropy / i, votes.copy())

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
        return over_parts(lambda part: logits(self._apply, *weights, part, self._batch_size, where), parts)

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


@partial(jax.jit, static_argnames='update')
def batch_statistics(update, batch_stats, batches, params):
    """Batch statistics of weights: the averages of those of every batch, uint8 [K, B, H, W, C], on its own.

    update(params, batch_stats, images uint8 [B, H, W, C]) returns the batch statistics after one training batch.
    """
    before = jax.tree.map(jnp.zeros_like, batch_stats)
    return jax.tree.map(lambda x: x.mean(axis=0), jax.lax.map(partial(update, params, before), batches))
