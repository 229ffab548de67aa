"""Evaluation: a network's logits over a whole image set, at given weights and averaged over a posterior."""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.jit, static_argnames=('model', 'prepare', 'batch_size'))
def logits(model, variables, images, prepare, batch_size):
    """float32 [N, K] for images uint8 [N, H, W, C], in batches; the last may be smaller, and every image counts once.

    prepare(images) normalises. Batch normalisation uses the statistics in `variables`.
    """

    def apply(batch):
        return model.apply(variables, prepare(batch), train=False)

    batch_size = min(batch_size, len(images))
    full = len(images) // batch_size * batch_size
    whole = jax.lax.map(apply, images[:full].reshape(-1, batch_size, *images.shape[1:]))
    parts = [whole.reshape(full, -1)]
    if full < len(images):
        parts.append(apply(images[full:]))
    return jnp.concatenate(parts)


def posterior_probs(predict, sample, key, num_samples):
    """[N, K]: class probabilities averaged over `num_samples` weights, each used for all images.

    predict(params) returns probabilities [N, K]; sample(key) returns params.
    """
    return sum(predict(sample(k)) for k in jax.random.split(key, num_samples)) / num_samples
