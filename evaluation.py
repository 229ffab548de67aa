"""Evaluation: a network's logits over a whole image set, at given weights and averaged over a posterior."""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.jit, static_argnames=('apply', 'batch_size'))
def logits(apply, params, batch_stats, images, batch_size):
    """float32 [N, K] for images uint8 [N, H, W, C], in batches; the last may be smaller, and every image counts once.

    apply(params, batch_stats, images uint8 [B, H, W, C]) normalises the images and returns logits [B, K].
    """
    batch_size = min(batch_size, len(images))
    full = len(images) // batch_size * batch_size
    whole = jax.lax.map(partial(apply, params, batch_stats), images[:full].reshape(-1, batch_size, *images.shape[1:]))
    parts = [whole.reshape(full, -1)]
    if full < len(images):
        parts.append(apply(params, batch_stats, images[full:]))
    return jnp.concatenate(parts)


def posterior_probs(predict, sample, key, num_samples):
    """[N, K]: class probabilities averaged over `num_samples` weights, each used for all images.

    predict(params) returns probabilities [N, K]; sample(key) returns params.
    """
    return sum(predict(sample(k)) for k in jax.random.split(key, num_samples)) / num_samples
