"""Predictions at the mean and over samples, and re-estimated batch statistics."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import metrics
from evaluation import posteriors

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 2, 2, 1), np.uint8)


def apply(params, batch_stats, images):
    return images.reshape(len(images), -1) / 255 @ params + jnp.reshape(batch_stats, (1, -1))


def update(params, batch_stats, images):
    """Returns running averages after the first batch. As in BatchNorm, the first value replaces the initial value."""
    del batch_stats
    return apply(params, 0.0, images).mean(axis=0)


def sample(key):
    return jax.random.normal(key, (4, 3))


def posterior(sample=sample, refresh=None):
    arrays = jnp.ones((4, 3)), jnp.arange(3.0), jax.random.key(1)
    return posteriors.Posterior(
        apply, Partial(sample), *arrays, 4, is_point=False, refresh=refresh and Partial(refresh)
    )


def probs_of(params, batch_stats):
    return metrics.softmax(IMAGES.reshape(7, 4) / 255 @ np.asarray(params) + np.asarray(batch_stats))


def test_averages_over_samples():
    """Probabilities, entropies, energies and votes equal a loop over the samples, after two and after five samples."""
    drawn = [sample(jax.random.fold_in(jax.random.key(1), i)) for i in range(5)]
    probs = np.stack([probs_of(params, np.arange(3)) for params in drawn])
    logits = np.stack([IMAGES.reshape(7, 4) / 255 @ np.asarray(params) + np.arange(3) for params in drawn])
    for n, prediction in zip((2, 5), posterior().predict(IMAGES, [2, 5]), strict=True):
        np.testing.assert_allclose(prediction.probs_at_mean, probs_of(np.ones((4, 3)), np.arange(3)), rtol=1e-5)
        np.testing.assert_allclose(prediction.probs, probs[:n].mean(axis=0), rtol=1e-5)
        entropies = [metrics.entropy(p) for p in probs[:n]]
        np.testing.assert_allclose(prediction.expected_entropy, np.mean(entropies, axis=0), rtol=1e-5)
        energies = -np.log(np.exp(logits[:n]).sum(axis=2))
        np.testing.assert_allclose(prediction.energy, energies.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(prediction.max_logit, logits[:n].max(axis=2).mean(axis=0), rtol=1e-5)
        votes = np.eye(3)[probs[:n].argmax(axis=2)].sum(axis=0)
        np.testing.assert_array_equal(prediction.votes, votes)


def test_more_samples_begin_with_the_same():
    few = list(posterior().predict(IMAGES, [1, 3]))[1]
    (many,) = posterior().predict(IMAGES, [3])
    np.testing.assert_array_equal(few.probs, many.probs)


def test_a_point_is_run_once():
    """Every sample of a point estimate equals the mean, so one forward pass is enough."""
    calls = []

    def counted(params, batch_stats, images):
        jax.debug.callback(lambda: calls.append(1))
        return apply(params, batch_stats, images)

    sample = Partial(lambda key: jnp.ones((4, 3)))
    point = posteriors.Posterior(counted, sample, jnp.ones((4, 3)), 0.0, jax.random.key(0), 7, is_point=True)
    (prediction,) = point.predict(IMAGES, [5])
    jax.effects_barrier()
    assert len(calls) == 1
    np.testing.assert_allclose(prediction.probs, prediction.probs_at_mean, rtol=1e-12)
    np.testing.assert_allclose(prediction.mutual_information, 0, atol=1e-12)


def test_batch_statistics_are_estimated_again():
    """Mean and samples each have their own statistics: the statistics of single batches, averaged over batches."""
    batches = jnp.asarray(IMAGES[:6].reshape(3, 2, 2, 2, 1))

    def refresh(params):
        return posteriors.batch_statistics(update, jnp.arange(3.0), batches, params)

    drawn = sample(jax.random.fold_in(jax.random.key(1), 0))
    expected = np.mean([IMAGES[i : i + 2].reshape(2, 4) / 255 @ np.asarray(drawn) for i in (0, 2, 4)], axis=(0, 1))
    np.testing.assert_allclose(refresh(drawn), expected, rtol=1e-5)
    (prediction,) = posterior(refresh=refresh).predict(IMAGES, [1])
    np.testing.assert_allclose(prediction.probs, probs_of(drawn, expected), rtol=1e-5)
    np.testing.assert_allclose(
        prediction.probs_at_mean, probs_of(np.ones((4, 3)), refresh(jnp.ones((4, 3)))), rtol=1e-5
    )
