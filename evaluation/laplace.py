"""The Laplace approximation of a trained network's last layer, a post-hoc posterior (Daxberger et al., 2021).

Kronecker factors A ⊗ B approximate the Hessian of the loss with respect to the last layer's weights (Ritter et al.,
2018). A is the mean of φφᵀ over the features φ that enter the layer, with 1 appended for the bias. B is the mean of
diag(p) − ppᵀ over the predicted probabilities p. The posterior is N(w, (N A ⊗ B + τ I)⁻¹). τ is the prior precision of
the training.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ops import sharding


class Factors(NamedTuple):
    """The posterior in terms of the eigenvectors of A and B.

    Attributes:
        features: float32 [F + 1, F + 1], the eigenvectors of A.
        classes: float32 [K, K], the eigenvectors of B.
        deviations: float32 [F + 1, K], the standard deviations along the eigenvectors.
    """

    features: jax.Array
    classes: jax.Array
    deviations: jax.Array


def fit(outputs: Callable, images: np.ndarray, batch_size: int, num_data: float, prior_precision: float) -> Factors:
    """Returns the Factors of a network's last layer, computed over images.

    Args:
        outputs: outputs(images) -> (logits [B, K], features [B, F]) of the trained network. It is a
            jax.tree_util.Partial that holds the weights.
        images: uint8 [M, H, W, C].
        batch_size: rounded up until the devices can share a batch equally.
        num_data: N, the number of training examples times the augmentation factor.
        prior_precision: τ.
    """
    batch_size = sharding.shareable(batch_size)
    totals = [_products(outputs, images[i : i + batch_size]) for i in range(0, len(images), batch_size)]
    a, b = (np.sum(jax.device_get(part), axis=0, dtype=np.float64) / len(images) for part in zip(*totals, strict=True))
    (values_a, features), (values_b, classes) = np.linalg.eigh(a), np.linalg.eigh(b)
    curvature = num_data * np.outer(np.maximum(values_a, 0), np.maximum(values_b, 0))
    deviations = 1 / np.sqrt(curvature + prior_precision)
    return Factors(*sharding.send([x.astype(np.float32) for x in (features, classes, deviations)]))


@jax.jit
def _products(outputs, images):
    logits, features = outputs(sharding.shard(images))
    probs = jax.nn.softmax(logits)
    features = jnp.concatenate([features, jnp.ones((len(features), 1))], axis=1)
    return sharding.gather((features.T @ features, jnp.diag(probs.sum(axis=0)) - probs.T @ probs))


@partial(jax.jit, static_argnames='layer')
def sample(layer: tuple[str, ...], factors: Factors, params: Any, key: jax.Array) -> Any:
    """Draws weights from the posterior: returns `params` with noise added to the kernel and bias of the last layer.

    Multiplies standard normal noise by the symmetric square root of the covariance. This root does not depend on the
    choice of eigenvectors for equal eigenvalues.

    Args:
        layer: the path of the last layer in `params`. The layer has a kernel [F, K] and a bias [K].
        factors: as from `fit`.
        params: the trained weights.
        key: the key of the noise.
    """
    noise = jax.random.normal(key, factors.deviations.shape)
    along = factors.deviations * (factors.features.T @ noise @ factors.classes)
    noise = factors.features @ along @ factors.classes.T
    return _with_noise(params, layer, noise)


def _with_noise(params, path, noise):
    if path:
        return params | {path[0]: _with_noise(params[path[0]], path[1:], noise)}
    return {'kernel': params['kernel'] + noise[:-1], 'bias': params['bias'] + noise[-1]}
