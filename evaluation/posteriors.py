"""Predictions of a posterior over a network's weights: at the mean, and averaged over samples.

Several devices run one sample each, or share the images of one sample.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import metrics
from ops import sharding
from runs import hosts


@partial(jax.jit, static_argnames=('apply', 'batch_size', 'where'))
def logits(
    apply: Callable, params: Any, batch_stats: Any, images: jax.Array, batch_size: int,
    where: Callable = sharding.on_all,
) -> jax.Array:  # fmt: skip
    """Returns the logits of images, computed in batches. The last batch may be smaller, because nothing is padded.

    Args:
        apply: apply(params, batch_stats, images uint8 [B, H, W, C]) normalises the images and returns logits [B, K].
        params: the weights.
        batch_stats: the batch statistics of the weights.
        images: uint8 [N, H, W, C].
        batch_size: rounded up until the devices can share a batch equally.
        where: sharding.on_all, or sharding.on_each for weights [D, ...] that differ between the D devices.

    Returns:
        float32 [N, K], or [D, N, K] with sharding.on_each.
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


PART = 1 << 28  # bytes of images in a part that is sent from the host


def parts(images: np.ndarray, batch_size: int, stream: bool = False) -> list:
    """Splits images into a list of parts for `over_parts`. The list can be used several times.

    By default, all images are one part on the devices of the current mesh. If `stream` is set or the images would fill
    a device, the parts stay on the host. Then every part but the last holds whole batches.

    Args:
        images: uint8 [N, H, W, C].
        batch_size: the number of images in a batch.
        stream: whether to leave the images on the host.
    """
    if not (stream or hosts.must_stream(images)):
        return [sharding.send(images)]
    batch_size = sharding.shareable(batch_size)
    rows = max(PART // images[:1].nbytes // batch_size, 1) * batch_size
    return [images[i : i + rows] for i in range(0, len(images), rows)]


def over_parts(function: Callable, parts: list) -> np.ndarray:
    """Applies a function of images to each part on the devices. Returns the results [..., N, K] on the host.

    Sends a part from the host to the devices just before the function needs it.
    """
    sent = (part if isinstance(part, jax.Array) else sharding.send(part) for part in parts)
    return np.concatenate([jax.device_get(function(part)) for part in sent], axis=-2)


def probs_at(apply: Callable, params: Any, batch_stats: Any, parts: list, batch_size: int) -> np.ndarray:
    """Returns class probabilities, float64 [N, K] on the host.

    Args:
        apply: as for `logits`.
        params: the weights.
        batch_stats: the batch statistics of the weights.
        parts: N images, as from `parts`.
        batch_size: as for `logits`.
    """
    return metrics.softmax(over_parts(lambda part: logits(apply, params, batch_stats, part, batch_size), parts))


@partial(jax.jit, static_argnames='where')
def _draw_samples(index, draw, key, where):
    return where(Partial(_draw_at, draw, key), index)


def _draw_at(draw, key, i):
    return draw(jax.random.fold_in(key, i))


@partial(jax.jit, static_argnames='where')
def _refreshed(params, refresh, where):
    return where(refresh, params)


class Prediction(NamedTuple):
    """The prediction of a posterior for N images, and how much the samples agree.

    Attributes:
        logits: float32 [N, K], at the posterior mean.
        probs: float64 [N, K], averaged over samples.
        expected_entropy: float64 [N], the entropy of each sample in nats, averaged over samples.
        votes: int32 [N, K], the number of samples that predict class k.
        energy: float64 [N], `metrics.energy` of each sample, averaged over samples. None if it is not known.
        max_logit: float64 [N], the largest logit of each sample, averaged over samples. None if it is not known.
    """

    logits: np.ndarray
    probs: np.ndarray
    expected_entropy: np.ndarray
    votes: np.ndarray
    energy: np.ndarray | None = None
    max_logit: np.ndarray | None = None

    @property
    def probs_at_mean(self) -> np.ndarray:
        """Returns the class probabilities at the posterior mean, float64 [N, K]."""
        return metrics.softmax(self.logits)

    @property
    def entropy(self) -> np.ndarray:
        """Returns the predictive entropy in nats, float64 [N]."""
        return metrics.entropy(self.probs)

    @property
    def mutual_information(self) -> np.ndarray:
        """Returns the mutual information between label and weights in nats, float64 [N]."""
        return metrics.mutual_information(self.entropy, self.expected_entropy)

    @property
    def disagreement(self) -> np.ndarray:
        """Returns the share of pairs of samples that predict different classes, float64 [N]."""
        return metrics.disagreement(self.votes)

    def measure(self, labels: np.ndarray, num_bins: int) -> dict[str, dict]:
        """Returns all metrics at the posterior mean and averaged over samples.

        Args:
            labels: int [N].
            num_bins: the number of bins of ECE, MCE and the reliability diagram.

        Returns:
            {'mean': {name: value}, 'average': ..., 'intervals': {'mean': {name: (low, high)}, 'average': ...},
            'reliability': {'mean': {name: list}, 'average': ...}}. 'mean' and 'average' include the entropy, averaged
            over images. 'average' also includes mutual information and disagreement, averaged over images.
        """
        probs = {'mean': self.probs_at_mean, 'average': self.probs}
        measured = {at: metrics.summary(p, labels, num_bins) for at, p in probs.items()}
        measured['mean']['entropy'] = float(metrics.entropy(probs['mean']).mean())
        diverged = not np.isfinite(self.probs).all()  # the votes of a diverged network mean nothing
        for name in ('entropy', 'mutual_information', 'disagreement'):
            measured['average'][name] = math.nan if diverged else float(getattr(self, name).mean())
        measured['intervals'] = {at: metrics.intervals(p, labels, num_bins) for at, p in probs.items()}
        measured['reliability'] = {
            at: {name: values.tolist() for name, values in metrics.reliability(p, labels, num_bins).items()}
            for at, p in probs.items()
        }
        return measured


class Posterior:
    """A posterior over a network's weights: the mean and samples. Each call of `predict` uses the same samples.

    Args:
        apply: as for `logits`.
        sample: sample(key) -> params. It is a jax.tree_util.Partial that holds the arrays it needs.
        params: the posterior mean.
        batch_stats: the batch statistics of the mean.
        key: the key of the samples.
        batch_size: as for `logits`.
        is_point: whether every sample equals the mean. If so, only the mean is run.
        refresh: refresh(params) -> re-estimated batch statistics of these weights. It is a jax.tree_util.Partial that
            holds the arrays it needs. If it is None, all samples use the batch statistics of the mean.
    """

    def __init__(
        self, apply: Callable, sample: Callable, params: Any, batch_stats: Any, key: jax.Array, batch_size: int,
        *, is_point: bool, refresh: Callable | None = None,
    ) -> None:  # fmt: skip
        self._apply, self._sample, self._batch_size, self._is_point = apply, sample, batch_size, is_point
        self._refresh = refresh or Partial(_same_for_all, batch_stats)
        self._key = sharding.send(key)
        self._mean = params, _refreshed(params, self._refresh, sharding.on_all)
        self._batch_stats = {}

    def predict(self, images: np.ndarray, numbers: Sequence[int]) -> Iterator[Prediction]:
        """Yields the Prediction for images after each number of samples.

        Args:
            images: uint8 [N, H, W, C].
            numbers: the numbers of samples, in increasing order.
        """
        hosts.require_same_arrays('images', images)
        sent = parts(images, self._batch_size)
        logits_at_mean = self._logits(self._mean, sent, sharding.on_all)
        samples = itertools.repeat(logits_at_mean) if self._is_point else self._logits_of_samples(sent, numbers[-1])
        total, entropy, energy, max_logit, votes = 0, 0, 0, 0, np.zeros(logits_at_mean.shape, np.int32)
        for i, sampled in enumerate(itertools.islice(samples, numbers[-1]), start=1):
            probs = metrics.softmax(sampled)
            total, entropy = total + probs, entropy + metrics.entropy(probs)
            energy, max_logit = energy + metrics.energy(sampled), max_logit + sampled.max(axis=1).astype(np.float64)
            votes[np.arange(len(votes)), probs.argmax(axis=1)] += 1
            if i in numbers:
                yield Prediction(logits_at_mean, total / i, entropy / i, votes.copy(), energy / i, max_logit / i)

    def _logits_of_samples(self, parts, num_samples):
        """Yields the logits of each sample.

        Samples run in groups, one sample on each device. Samples that do not fill a group run one after another, each
        on all devices.
        """
        size = sharding.num_devices()
        left = num_samples if size == 1 else num_samples % size
        for first in range(0, num_samples - left, size):
            weights = self._sampled_weights(np.arange(first, first + size, dtype=np.int32), sharding.on_each)
            yield from self._logits(weights, parts, sharding.on_each)
        for i in range(num_samples - left, num_samples):
            yield self._logits(self._sampled_weights(np.int32(i), sharding.on_all), parts, sharding.on_all)

    def _logits(self, weights, parts, where):
        """Returns the logits of all images, float32 [N, K], or [D, N, K] for weights that differ between devices."""
        return over_parts(lambda part: logits(self._apply, *weights, part, self._batch_size, where), parts)

    def _sampled_weights(self, index, where):
        """Returns (weights, batch statistics) of the sample at `index`, or of one sample per device for index [D]."""
        params = _draw_samples(index, self._sample, self._key, where)
        held = where, int(np.min(index))
        if held not in self._batch_stats:
            self._batch_stats[held] = _refreshed(params, self._refresh, where)
        return params, self._batch_stats[held]


def _same_for_all(batch_stats, params):
    del params
    return batch_stats


@partial(jax.jit, static_argnames='update')
def batch_statistics(update: Callable, batch_stats: Any, batches: jax.Array, params: Any) -> Any:
    """Returns re-estimated batch statistics of weights: the statistics of single batches, averaged over batches.

    Args:
        update: update(params, batch_stats, images uint8 [B, H, W, C]) -> the batch statistics after a training batch.
        batch_stats: a pytree with the shapes of the batch statistics.
        batches: uint8 [K, B, H, W, C].
        params: the weights.
    """
    before = jax.tree.map(jnp.zeros_like, batch_stats)
    return jax.tree.map(lambda x: x.mean(axis=0), jax.lax.map(partial(update, params, before), batches))
