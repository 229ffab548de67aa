"""The Laplace approximation of a trained network's last layer, a posterior after the fact (Daxberger et al., 2021).

The Hessian of the loss by the last layer's weights is approximated by Kronecker factors A ⊗ B (Ritter et al., 2018):
A is the mean of φφᵀ over the features φ that enter the layer, 1 for its bias appended, B that of diag(p) − ppᵀ over the
predicted probabilities p. The posterior is N(w, (N A ⊗ B + τ I)⁻¹) with the prior precision τ of the training.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ops import sharding


class Factors(NamedTuple):
    """Eigenvectors of A and B, [F + 1, F + 1] and [K, K], and the standard deviations along them, [F + 1, K]."""

    features: jax.Array
    classes: jax.Array
    deviations: jax.Array


def fit(outputs, images, batch_size, num_data, prior_precision):
    """The Factors of a last layer over images uint8 [M, H, W, C].

    outputs(images) -> (logits [B, K], features [B, F]) of the trained network, a jax.tree_util.Partial of its weights.
    """
    batch_size = sharding.shareable(batch_size)
    totals = [_products(outputs, images[i : i + batch_size]) for i in range(0, len(images), batch_size)]
    a, b = (np.sum(jax.device_get(part), axis=0, dtype=np.float64) / len(images) for part in zip(*totals, strict=True))
    (of_a, features), (of_b, classes) = np.linalg.eigh(a), np.linalg.eigh(b)
    curvature = num_data * np.outer(np.maximum(of_a, 0), np.maximum(of_b, 0))
    deviations = 1 / np.sqrt(curvature + prior_precision)
    return Factors(*sharding.send([x.astype(np.float32) for x in (features, classes, deviations)]))


@jax.jit
def _products(outputs, images):
    logits, features = outputs(sharding.shard(images))
    probs = jax.nn.softmax(logits)
    features = jnp.concatenate([features, jnp.ones((len(features), 1))], axis=1)
    return sharding.gather((features.T @ features, jnp.diag(probs.sum(axis=0)) - probs.T @ probs))


@partial(jax.jit, static_argnames='layer')
def sample(layer, factors, params, key):
    """Returns `params` with noise added to the kernel [F, K] and the bias [K] of the dense layer at the path `layer`.

    The noise is multiplied by the symmetric root of the covariance, whichever eigenvectors equal eigenvalues have.
    """
    noise = jax.random.normal(key, factors.deviations.shape)
    along = factors.deviations * (factors.features.T @ noise @ factors.classes)
    noise = factors.features @ along @ factors.classes.T
    return _with_noise(params, layer, noise)


def _with_noise(params, path, noise):
    if path:
        return params | {path[0]: _with_noise(params[path[0]], path[1:], noise)}
    return {'kernel': params['kernel'] + noise[:-1], 'bias': params['bias'] + noise[-1]}
