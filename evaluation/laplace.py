"""The Laplace approximation of a trained network's last layer, a post-hoc posterior (Daxberger et al., 2021).

The posterior is N(w, (H + τ I)⁻¹). H is the generalised Gauss-Newton matrix (GGN) of the loss, summed over N examples.
The features φ enter the layer, with 1 appended for the bias. The network predicts the probabilities p. The Hessian of
the loss with respect to the logits is Λ = diag(p) − ppᵀ. H is N times the mean of Λ ⊗ φφᵀ, in one of three structures:

    kron: N B ⊗ A, where A is the mean of φφᵀ and B is the mean of Λ (Ritter et al., 2018)
    full: all of H
    diag: the diagonal of H

τ is the prior precision, and λ are the eigenvalues of H. The log marginal likelihood (Immer et al., 2021) is

    log p(D | τ) = log p(D | w) − ½ Σ log(1 + λ/τ) − ½ τ |w|²
"""

import math
import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

import metrics
from ops import sharding
from runs import folders

MOST_ENTRIES = 10**8  # of H with the structure full. The fit then takes about 5 GB.


# Each structure is a class with the same functions. `products` sums a batch's contributions to H in float32.
# `decompose` takes their means over all images in float64 and returns the eigenvalues and eigenvectors of H / N.
# `of` makes the posterior of eigenvectors, standard deviations and the number of classes. `noise` draws weights
# [F + 1, K] around 0. `variances` returns the variances [B, K] of the logits of features [B, F + 1].


class Kron(NamedTuple):
    """The posterior with the structure kron.

    Attributes:
        features: float32 [F + 1, F + 1], the eigenvectors of A.
        classes: float32 [K, K], the eigenvectors of B.
        deviations: float32 [F + 1, K], the standard deviations along the eigenvectors.
    """

    features: jax.Array
    classes: jax.Array
    deviations: jax.Array

    @staticmethod
    def products(features: jax.Array, probs: jax.Array) -> tuple:
        covariances = probs.T @ probs * _others(probs)
        return features.T @ features, jnp.diag(covariances.sum(axis=1)) - covariances

    @staticmethod
    def decompose(means: list[np.ndarray]) -> tuple[np.ndarray, tuple]:
        (values_a, features), (values_b, classes) = map(np.linalg.eigh, means)
        return np.outer(np.maximum(values_a, 0), np.maximum(values_b, 0)), (features, classes)

    @classmethod
    def of(cls, vectors: tuple, deviations: np.ndarray, num_classes: int) -> 'Kron':
        return cls(*vectors, deviations)

    def noise(self, key: jax.Array) -> jax.Array:
        # The symmetric root of the covariance does not depend on the choice of eigenvectors for equal eigenvalues.
        noise = jax.random.normal(key, self.deviations.shape)
        along = self.deviations * (self.features.T @ noise @ self.classes)
        return self.features @ along @ self.classes.T

    def variances(self, features: jax.Array) -> jax.Array:
        return jnp.square(features @ self.features) @ jnp.square(self.deviations) @ jnp.square(self.classes).T


class Full(NamedTuple):
    """The posterior with the structure full. Its D = K (F + 1) weights have the order of an array [K, F + 1].

    Attributes:
        vectors: float32 [D, D], the eigenvectors of H.
        deviations: float32 [D], the standard deviations along the eigenvectors.
        covariances: float32 [K, F + 1, F + 1], the covariances of the weights of each class.
    """

    vectors: jax.Array
    deviations: jax.Array
    covariances: jax.Array

    @staticmethod
    def products(features: jax.Array, probs: jax.Array) -> tuple:
        def of_class(row):
            p, rest, is_own = (x[None] for x in row)
            hessians = p.T * jnp.where(is_own, rest.T, -probs)
            return features.T @ (hessians[:, :, None] * features[:, None]).reshape(len(probs), -1)

        others = _others(probs)
        rows = jax.lax.map(of_class, (probs.T, (probs @ others).T, others == 0))
        return (rows.reshape(probs.shape[1] * features.shape[1], -1),)

    @staticmethod
    def decompose(means: list[np.ndarray]) -> tuple[np.ndarray, tuple]:
        values, vectors = np.linalg.eigh(*means)
        return np.maximum(values, 0), (vectors,)

    @classmethod
    def of(cls, vectors: tuple, deviations: np.ndarray, num_classes: int) -> 'Full':
        scaled = (vectors[0] * deviations).reshape(num_classes, -1, len(deviations))
        return cls(*vectors, deviations, np.stack([of_class @ of_class.T for of_class in scaled]))

    def noise(self, key: jax.Array) -> jax.Array:
        along = self.deviations * (jax.random.normal(key, self.deviations.shape) @ self.vectors)
        return (self.vectors @ along).reshape(self.covariances.shape[:2]).T

    def variances(self, features: jax.Array) -> jax.Array:
        return jnp.einsum('nf,kfg,ng->nk', features, self.covariances, features)


class Diag(NamedTuple):
    """The posterior with the structure diag.

    Attributes:
        deviations: float32 [F + 1, K], the standard deviations of the weights.
    """

    deviations: jax.Array

    @staticmethod
    def products(features: jax.Array, probs: jax.Array) -> tuple:
        return (jnp.square(features).T @ (probs * (probs @ _others(probs))),)

    @staticmethod
    def decompose(means: list[np.ndarray]) -> tuple[np.ndarray, tuple]:
        return means[0], ()

    @classmethod
    def of(cls, vectors: tuple, deviations: np.ndarray, num_classes: int) -> 'Diag':
        return cls(deviations)

    def noise(self, key: jax.Array) -> jax.Array:
        return self.deviations * jax.random.normal(key, self.deviations.shape)

    def variances(self, features: jax.Array) -> jax.Array:
        return jnp.square(features) @ jnp.square(self.deviations)


STRUCTURES = {'kron': Kron, 'full': Full, 'diag': Diag}
PRIORS = ('marglik', 'training')


def _others(probs):
    """Returns 1 − I, float32 [K, K]. Sums over other classes give 1 − p to full precision, also if p rounds to 1."""
    return 1 - jnp.eye(probs.shape[1])


class Fit(NamedTuple):
    """A fitted posterior.

    Attributes:
        posterior: a Kron, Full or Diag on the devices.
        prior_precision: τ.
        log_marginal_likelihood: of N examples, in nats.
    """

    posterior: Kron | Full | Diag
    prior_precision: float
    log_marginal_likelihood: float


def fit(
    outputs: Callable, weights: np.ndarray, images: np.ndarray, labels: np.ndarray, batch_size: int, num_data: float,
    structure: str = 'kron', prior_precision: float | None = None,
) -> Fit:  # fmt: skip
    """Fits the posterior of a network's last layer to images.

    Args:
        outputs: outputs(images) -> (logits [B, K], features [B, F]) of the trained network. It is a
            jax.tree_util.Partial that holds the weights.
        weights: float [F + 1, K], the kernel and the bias of the last layer.
        images: uint8 [M, H, W, C].
        labels: int [M].
        batch_size: rounded up until the devices can share a batch equally.
        num_data: N, the number of training examples times the augmentation factor.
        structure: a name in STRUCTURES.
        prior_precision: τ. By default, τ maximises the marginal likelihood.

    Raises:
        RunError: H is too large, or the marginal likelihood has no maximum.
    """
    require_small(structure, *weights.shape)
    batch_size, kind = sharding.shareable(batch_size), STRUCTURES[structure]
    totals = None
    for i in range(0, len(images), batch_size):
        at = slice(i, i + batch_size)
        sums = jax.device_get(_sums(outputs, images[at], labels[at], kind))
        totals = totals or [np.zeros(x.shape) for x in sums]
        for total, x in zip(totals, sums, strict=True):
            total += x
    log_likelihood, *means = (total * (1 / len(images)) for total in totals)
    eigenvalues, vectors = kind.decompose(means)
    eigenvalues, square = num_data * eigenvalues, np.square(weights, dtype=np.float64).sum()
    tau = tuned_prior_precision(eigenvalues, square) if prior_precision is None else prior_precision
    posterior = kind.of(vectors, 1 / np.sqrt(eigenvalues + tau), weights.shape[1])
    posterior = sharding.send(jax.tree.map(lambda x: x.astype(np.float32), posterior))
    evidence = num_data * log_likelihood - np.log1p(eigenvalues / tau).sum() / 2 - tau * square / 2
    return Fit(posterior, float(tau), float(evidence))


def require_small(structure: str, num_inputs: int, num_classes: int) -> None:
    """Raises a RunError if H of the structure full has more than MOST_ENTRIES.

    Args:
        structure: a name in STRUCTURES.
        num_inputs: F + 1.
        num_classes: K.
    """
    size = num_inputs * num_classes
    if structure == 'full' and size**2 > MOST_ENTRIES:
        raise folders.RunError(
            f'--laplace full needs a matrix of {size:,} × {size:,} numbers for the last layer, more than '
            f'{MOST_ENTRIES:,}: use --laplace kron or --laplace diag'
        )


@partial(jax.jit, static_argnames='kind')
def _sums(outputs, images, labels, kind):
    """Returns the log-likelihood of a batch, and the batch's products of a structure."""
    logits, features = outputs(sharding.shard(images))
    log_probs = jax.nn.log_softmax(logits)
    log_likelihood = jnp.take_along_axis(log_probs, labels[:, None], axis=1).sum()
    with jax.default_matmul_precision('float32'):  # GPUs would round to 10 bits, more than τ is of H
        products = kind.products(_with_ones(features), jnp.exp(log_probs))
    return sharding.gather((log_likelihood, *products))


def _with_ones(features):
    return jnp.concatenate([features, jnp.ones((len(features), 1))], axis=1)


def tuned_prior_precision(eigenvalues: np.ndarray, square: float) -> float:
    """Returns the prior precision τ that maximises the log marginal likelihood. Raises RunError if there is none.

    The derivative with respect to log τ is (γ − τ |w|²) / 2, with the number of well-determined parameters
    γ = Σ λ / (λ + τ) (MacKay, "Bayesian interpolation", 1992). γ falls and τ |w|² rises, so there is one maximum.

    Args:
        eigenvalues: float64, the eigenvalues λ >= 0 of H.
        square: |w|².
    """
    largest = eigenvalues.max()
    if not (largest > 0 and square > 0):
        what = 'the network is certain of every training image' if square > 0 else 'all weights of the layer are 0'
        raise folders.RunError(
            f'--laplace: the marginal likelihood has no maximum because {what}: use --laplaceprior training'
        )

    def derivative(log_tau):
        tau = math.exp(log_tau)
        return (eigenvalues / (eigenvalues + tau)).sum() - tau * square

    # γ >= 1/2 at or below the largest eigenvalue, and γ is at most the number of eigenvalues.
    low, high = min(largest, 0.5 / square) / 2, 2 * eigenvalues.size / square
    return math.exp(optimize.brentq(derivative, math.log(low), math.log(high), xtol=1e-12))


@partial(jax.jit, static_argnames='layer')
def sample(layer: tuple[str, ...], posterior: Kron | Full | Diag, params: Any, key: jax.Array) -> Any:
    """Draws weights from the posterior: returns `params` with noise added to the kernel and bias of the last layer.

    Args:
        layer: the path of the last layer in `params`. The layer has a kernel [F, K] and a bias [K].
        posterior: as from `fit`.
        params: the trained weights.
        key: the key of the noise.
    """
    return _with_noise(params, layer, posterior.noise(key))


def layer_of(params: Any, path: tuple[str, ...]) -> Any:
    """Returns the parameters of the layer at a path, {'kernel': [F, K], 'bias': [K]}."""
    return reduce(operator.getitem, path, params)


def _with_noise(params, path, noise):
    if path:
        return params | {path[0]: _with_noise(params[path[0]], path[1:], noise)}
    return {'kernel': params['kernel'] + noise[:-1], 'bias': params['bias'] + noise[-1]}


def probit_logits(outputs: Callable, held: tuple, batch_stats: Any, images: jax.Array) -> jax.Array:
    """Returns logits whose softmax approximates the average over the posterior, float32 [B, K].

    Divides the logits f by √(1 + π v/8), where v are the variances of f (MacKay, "The evidence framework applied
    to classification networks", 1992). The covariances of the logits are neglected.

    Args:
        outputs: outputs(params, batch_stats, images) -> (logits [B, K], features [B, F]).
        held: (the trained weights, the posterior as from `fit`).
        batch_stats: the batch statistics.
        images: uint8 [B, H, W, C].
    """
    params, posterior = held
    logits, features = outputs(params, batch_stats, images)
    return logits / jnp.sqrt(1 + jnp.pi / 8 * posterior.variances(_with_ones(features)))


class Approximation(NamedTuple):
    """The Laplace approximation of a run.

    Attributes:
        fit: the Fit.
        sample: sample(key) -> params, a jax.tree_util.Partial.
        probit: probit(images uint8 [N, H, W, C]) -> class probabilities float64 [N, K], by the probit approximation.
    """

    fit: Fit
    sample: Callable
    probit: Callable

    def measure(self, images: np.ndarray, labels: np.ndarray, num_bins: int) -> dict:
        """Returns entries of metrics.json: τ, the log marginal likelihood and the metrics of the probit approximation.

        Args:
            images: uint8 [N, H, W, C].
            labels: int [N].
            num_bins: the number of bins of ECE and MCE.
        """
        return {
            'prior_precision': self.fit.prior_precision,
            'log_marginal_likelihood': self.fit.log_marginal_likelihood,
            'probit': metrics.summary(self.probit(images), labels, num_bins),
        }
