"""Optimizers that train the weights of a network, or a posterior over the weights.

    loss(params, batch) -> value                                yours: the mean negative log-likelihood
    optimizer = bsam(loss, learning_rate=0.5, ...)
    state = optimizer.init(params, key=key)
    state, value = optimizer.step(state, batch)                 jittable; the state may be donated
    params = optimizer.sample(state, key)                       a draw from the posterior

Each optimizer is a triple of pure functions over an immutable state. `state.params` is the mean of the posterior.
`params` is any pytree of floating-point arrays, and `batch` any pytree of arrays [B, ...].

A network with batch statistics, or a loss with other outputs, has one more pytree. The optimizer keeps it in the state:

    loss(params, batch_stats, batch) -> (value, new batch_stats)
    state = optimizer.init(params, batch_stats, key)

`learning_rate` is a number or a function of the number of steps, such as a schedule of optax. `step` takes a factor on
it, as in `step(state, batch, lr_factor)`. Weights may be bfloat16 or float16. The rest of the state is then float32,
except the key and `batch_stats`.

SAM, bSAM, SAM-Adam, ASAM and IVON cut a batch into `num_sub_batches` consecutive sub-batches. Each sub-batch has its
own perturbation (m-sharpness) or noise. Sub-batches are computed one after another, or in groups of equal size with at
most `atonce` sub-batches. Groups use a GPU better, but each sub-batch of a group takes memory.

SGD, Adam, AdamW and SWAG can take the gradient of a batch in `num_pieces` consecutive pieces. For a mean over examples
without dropout, the gradient is the same except for rounding. On CPUs, small pieces stay in the cache. A network with
batch statistics always gets the whole batch.

SAM, bSAM, SAM-Adam and ASAM take two gradients per step. `bnupdate` is 'both', 'first' or 'second', and says which of
the two gradients updates the batch statistics.

Symbols of Möllenhoff & Khan, "SAM as an Optimal Relaxation of Bayes" (ICLR 2023, arXiv 2210.01620):
    w  params         weights, the mean of the posterior
    m  momentum
    s  precision      the posterior is N(w, 1 / (N s))
    g  grads          gradients of the loss, without weight decay
    α  learning_rate  times the `lr_factor` of `step`
    β₁ beta1          decay of the momentum
    β₂ beta2          decay of the precision, or of squared gradients
    δ  weight_decay   prior precision / N, coupled (L2) unless an optimizer says otherwise
    ρ  rho            size of the perturbation
    γ  damping        added to the precision
    N  num_data       number of training examples, times the augmentation factor
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree
from jax.experimental.xla_metadata import set_xla_metadata
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P

__all__ = [
    'OPTIMIZERS', 'AdamState', 'BSAMState', 'IVONState', 'MomentumState', 'Optimizer', 'Rate', 'SWAGState', 'adam',
    'adamw', 'asam', 'bsam', 'ivon', 'lr_factor', 'over_sub_batches', 'sam', 'samadam', 'sgd', 'swag',
]  # fmt: skip

# A learning rate, or a schedule: schedule(number of steps) -> learning rate.
Rate = float | Callable[[jax.Array], Any]


class Optimizer(NamedTuple):
    """The three functions of an algorithm. The top of this module shows how to use them.

    Attributes:
        init: init(params, batch_stats=None, key=None) -> state. The key is required.
        step: step(state, batch, lr_factor=1.0) -> (state, value).
        sample: sample(state, key) -> params.
    """

    init: Callable[..., Any]
    step: Callable[..., tuple[Any, jax.Array]]
    sample: Callable[[Any, jax.Array], Any]

    @property
    def is_point(self) -> bool:
        """Returns whether the posterior is a point. Every sample then equals the mean."""
        return self.sample is _mean


class MomentumState(NamedTuple):
    """State of SGD, SAM and ASAM. `momentum` has the structure of `params`.

    `count` is the number of steps if the learning rate is a schedule, otherwise None.
    """

    params: Any
    momentum: Any
    batch_stats: Any
    key: jax.Array
    count: jax.Array | None = None  # type: ignore[assignment]


class BSAMState(NamedTuple):
    """State of bSAM. `momentum` and `precision` have the structure of `params`.

    `count` is the number of steps if the learning rate is a schedule, otherwise None.
    """

    params: Any
    momentum: Any
    precision: Any
    batch_stats: Any
    key: jax.Array
    count: jax.Array | None = None  # type: ignore[assignment]


class AdamState(NamedTuple):
    """State of Adam, AdamW and SAM-Adam after `count` steps.

    `momentum` and `squares` have the structure of `params`.
    """

    params: Any
    momentum: Any
    squares: Any
    count: jax.Array  # type: ignore[assignment]
    batch_stats: Any
    key: jax.Array


class SWAGState(NamedTuple):
    """State of SWAG after `count` steps and `num_snapshots` snapshots.

    Attributes:
        params: the mean of the snapshots. Before the first snapshot: SGD's weights.
        iterate: SGD's weights.
        momentum: SGD's momentum.
        variance: the variance of the snapshots, per weight.
        deviations: [swagrank, ...], the last snapshots, each minus the mean of all snapshots up to it.
        batch_stats: the batch statistics of SGD's weights.
    """

    params: Any
    iterate: Any
    momentum: Any
    variance: Any
    deviations: Any
    num_snapshots: jax.Array
    count: jax.Array  # type: ignore[assignment]
    batch_stats: Any
    key: jax.Array


class IVONState(NamedTuple):
    """State of IVON after `count` steps. `momentum` and `hessian` have the structure of `params`."""

    params: Any
    momentum: Any
    hessian: Any
    count: jax.Array  # type: ignore[assignment]
    batch_stats: Any
    key: jax.Array


def lr_factor(epoch: int, epochs: int, warmup: int) -> float:
    """Returns the factor on the learning rate in an epoch: linear warm-up, then half a cosine to almost 0.

    Args:
        epoch: 0, 1, ..., epochs.
        epochs: the last epoch. The reference code runs epochs + 1 epochs.
        warmup: the number of warm-up epochs.
    """
    if epoch < warmup:
        return (epoch + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs + 1 - warmup)))


def sgd(
    loss: Callable, *, learning_rate: Rate, beta1: float = 0.9, weight_decay: float, num_pieces: int = 1
) -> Optimizer:
    """Returns stochastic gradient descent with heavy-ball momentum and coupled weight decay.

        m ← β₁m + g + δw
        w ← w − αm

    The momentum is a sum of gradients, not an average.

    Args:
        loss: the mean negative log-likelihood, as at the top of this module.
        learning_rate: α, or a schedule: a function of the number of steps that returns α.
        beta1: β₁ in [0, 1), decay of the momentum per step.
        weight_decay: δ, the prior precision divided by N.
        num_pieces: pieces of a batch, whose gradients are averaged. Must divide the batch size B, or `step` raises a
            ValueError.

    Returns:
        An Optimizer whose state is a MomentumState. `sample` returns the weights.

    References:
        Polyak, "Some methods of speeding up the convergence of iteration methods", 1964 (heavy ball).
        The code of Möllenhoff & Khan (2023), which has the same update.
    """
    value_and_grad = _in_pieces(_value_and_grad(loss), num_pieces)

    def step(state, batch, rate):
        (value, batch_stats), grads = value_and_grad(state.params, state.batch_stats, batch)
        state = _momentum_step(state, grads, rate, beta1, weight_decay)
        return state._replace(batch_stats=batch_stats), value

    return _optimizer(_init_momentum, step, _mean, learning_rate)


def sam(
    loss: Callable, *, learning_rate: Rate, beta1: float = 0.9, weight_decay: float, rho: float,
    num_sub_batches: int = 1, bnupdate: str = 'both', atonce: int = 1,
) -> Optimizer:  # fmt: skip
    """Returns sharpness-aware minimisation (SAM) with m-sharpness over `num_sub_batches` sub-batches.

    For each sub-batch, with the norm over all parameters:

        g = ∇ℓ(w)
        g' = ∇ℓ(w + ρ g/‖g‖)

    Then SGD's update, with g' averaged over the sub-batches:

        m ← β₁m + g' + δw
        w ← w − αm

    `step` returns the loss at the perturbed weights. The new batch statistics are from the first sub-batch.

    Args:
        loss: the mean negative log-likelihood, as at the top of this module.
        learning_rate: α, or a schedule: a function of the number of steps that returns α.
        beta1: β₁ in [0, 1), decay of the momentum per step.
        weight_decay: δ, the prior precision divided by N.
        rho: ρ, the Euclidean length of the perturbation, in units of the weights.
        num_sub_batches: sub-batches per batch. Must divide the batch size B, or `step` raises a ValueError.
        bnupdate: 'both', 'first' or 'second', the gradients that update the batch statistics.
        atonce: the most sub-batches that are computed together.

    Returns:
        An Optimizer whose state is a MomentumState. `sample` returns the weights.

    References:
        Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021.
    """
    gradient = _sharpness_aware_gradient(loss, _in_direction_of_gradient(rho), num_sub_batches, bnupdate, atonce)

    def step(state, batch, rate):
        state, grads, value = gradient(state, batch)
        return _momentum_step(state, grads, rate, beta1, weight_decay), value

    return _optimizer(_init_momentum, step, _mean, learning_rate)


def bsam(
    loss: Callable, *, learning_rate: Rate, beta1: float = 0.9, beta2: float = 0.999, weight_decay: float, rho: float,
    num_sub_batches: int = 1, num_data: float, initial_precision: float = 1.0, damping: float = 0.1,
    bnupdate: str = 'both', atonce: int = 1,
) -> Optimizer:  # fmt: skip
    """Returns Bayesian SAM (bSAM) with a diagonal Gaussian posterior N(w, 1/(N s)).

    For each sub-batch, with its own noise ε ~ N(0, I):

        g = ∇ℓ(w + ε/√(N s))
        g' = ∇ℓ(w + ρ g/s)

    The perturbation moves the mean, not the sampled weights. Nothing is normalised. Then, with g' and |g| averaged over
    the sub-batches:

        m ← β₁m + (1−β₁)(g' + δw)
        w ← w − α m/s
        s ← β₂s + (1−β₂)(√s|g| + γ + δ)

    The updates run in this order, as in the published code. The mean therefore moves with the old precision. `step`
    returns the loss at the perturbed mean. The new batch statistics are from the first sub-batch.

    Args:
        loss: the mean negative log-likelihood, as at the top of this module.
        learning_rate: α, or a schedule: a function of the number of steps that returns α.
        beta1: β₁ in [0, 1), decay of the momentum per step.
        beta2: β₂ in [0, 1), decay of the precision per step.
        weight_decay: δ, the prior precision divided by N.
        rho: ρ, the factor on the perturbation g/s.
        num_sub_batches: sub-batches per batch. Must divide the batch size B, or `step` raises a ValueError.
        num_data: N, training examples times the augmentation factor.
        initial_precision: the first s, the posterior precision divided by N.
        damping: γ, in units of s.
        bnupdate: 'both', 'first' or 'second', the gradients that update the batch statistics.
        atonce: the most sub-batches that are computed together.

    Returns:
        An Optimizer whose state is a BSAMState. `sample` draws from the posterior.

    References:
        Möllenhoff & Khan, "SAM as an Optimal Relaxation of Bayes", ICLR 2023, Algorithm 1.
    """
    value_and_grad = _value_and_grad(loss)

    def init(params, batch_stats, key):
        precision = tree.map(lambda m: jnp.full_like(m, initial_precision), _zeros(params))
        return BSAMState(params, _zeros(params), precision, batch_stats, key)

    def sample(state, key):
        noise = _normal_like(key, state.precision)
        return _moved(state.params, tree.map(lambda e, s: _deviation(e, num_data, s), noise, state.precision))

    def step(state, batch, rate):
        def sharpness_aware_gradient(state, sub_batch, key):
            (_, first), grads = value_and_grad(sample(state, key), state.batch_stats, sub_batch)
            magnitude = tree.map(jnp.abs, grads)
            perturbed = _moved(state.params, tree.map(lambda g, s: rho * g / s, grads, state.precision))
            before = state.batch_stats if bnupdate == 'second' else first
            (value, second), grads = value_and_grad(perturbed, before, sub_batch)
            return (grads, magnitude), value, first if bnupdate == 'first' else second

        key, step_key = jax.random.split(state.key)
        averages, value, batch_stats = over_sub_batches(
            sharpness_aware_gradient, state, batch, num_sub_batches, step_key, atonce=atonce
        )
        state = update(state, *averages, rate)
        return state._replace(batch_stats=batch_stats, key=key), value

    def update(state, grads, magnitude, rate):
        """Updates the weights with the old precision, and the precision last."""
        momentum = tree.map(
            lambda m, g, w: beta1 * m + (1 - beta1) * (g + weight_decay * w), state.momentum, grads, state.params
        )
        params = tree.map(lambda w, m, s: (w - rate * m / s).astype(w.dtype), state.params, momentum, state.precision)
        precision = tree.map(
            lambda s, h: beta2 * s + (1 - beta2) * (jnp.sqrt(s) * h + damping + weight_decay),
            state.precision,
            magnitude,
        )
        return state._replace(params=params, momentum=momentum, precision=precision)

    return _optimizer(init, step, sample, learning_rate)


def adam(
    loss: Callable, *, learning_rate: Rate, beta1: float = 0.9, beta2: float = 0.999, weight_decay: float,
    num_pieces: int = 1,
) -> Optimizer:  # fmt: skip
    """Returns Adam with coupled weight decay, a baseline of Möllenhoff & Khan (2023).

    In step t = 1, 2, ...:

        g ← g + δw
        m ← β₁m + (1−β₁)g
        v ← β₂v + (1−β₂)g²
        w ← w − α (m/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + 10⁻⁸)

    Args:
        loss: the mean negative log-likelihood, as at the top of this module.
        learning_rate: α, or a schedule: a function of the number of steps that returns α.
        beta1: β₁ in [0, 1), decay of the momentum per step.
        beta2: β₂ in [0, 1), decay of the squared gradients per step.
        weight_decay: δ, the prior precision divided by N.
        num_pieces: pieces of a batch, whose gradients are averaged. Must divide the batch size B, or `step` raises a
            ValueError.

    Returns:
        An Optimizer whose state is an AdamState. `sample` returns the weights.

    References:
        Kingma & Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015.
    """
    return _adam(loss, learning_rate, beta1, beta2, num_pieces, coupled=weight_decay)


def adamw(
    loss: Callable, *, learning_rate: Rate, beta1: float = 0.9, beta2: float = 0.999, weight_decay: float,
    num_pieces: int = 1,
) -> Optimizer:  # fmt: skip
    """Returns AdamW: Adam with decoupled weight decay, which subtracts α δ w from the weights directly.

    In step t = 1, 2, ...:

        m ← β₁m + (1−β₁)g
        v ← β₂v + (1−β₂)g²
        w ← w − α ((m/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + 10⁻⁸) + δw)

    Args:
        loss: the mean negative log-likelihood, as at the top of this module.
        learning_rate: α, or a schedule: a function of the number of steps that returns α.
        beta1: β₁ in [0, 1), decay of the momentum per step.
        beta2: β₂ in [0, 1), decay of the squared gradients per step.
        weight_decay: δ. Each step subtracts the fraction α δ of every weight.
        num_pieces: pieces of a batch, whose gradients are averaged. Must divide the batch size B, or `step` raises a
            ValueError.

    Returns:
        An Optimizer whose state is an AdamState. `sample` returns the weights.

    References:
        Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
    """
    return _adam(loss, learning_rate, beta1, beta2, num_pieces, decoupled=weight_decay)


def samadam(
    loss: Callable, *, learning_rate: Rate, beta1: float = 0.9, beta2: float = 0.999, weight_decay: float, rho: float,
    num_sub_batches: int = 1, bnupdate: str = 'both', atonce: int = 1,
) -> Optimizer:  # fmt: skip
    """Returns SAM-Adam: SAM's gradient in Adam's update, with coupled weight decay.

    For each sub-batch, with the norm over all parameters:

        g = ∇ℓ(w)
        g' = ∇ℓ(w + ρ g/‖g‖)

    Then, in step t = 1, 2, ..., with g' averaged over the sub-batches:

        g' ← g' + δw
        m ← β₁m + (1−β₁)g'
        v ← β₂v + (1−β₂)g'²
        w ← w − α (m/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + 10⁻⁸)

    `step` returns the loss at the perturbed weights. The new batch statistics are from the first sub-batch.

    Args:
        loss: the mean negative log-likelihood, as at the top of this module.
        learning_rate: α, or a schedule: a function of the number of steps that returns α.
        beta1: β₁ in [0, 1), decay of the momentum per step.
        beta2: β₂ in [0, 1), decay of the squared gradients per step.
        weight_decay: δ, the prior precision divided by N.
        rho: ρ, the Euclidean length of the perturbation, in units of the weights.
        num_sub_batches: sub-batches per batch. Must divide the batch size B, or `step` raises a ValueError.
        bnupdate: 'both', 'first' or 'second', the gradients that update the batch statistics.
        atonce: the most sub-batches that are computed together.

    Returns:
        An Optimizer whose state is an AdamState. `sample` returns the weights.

    References:
        Möllenhoff & Khan, "SAM as an Optimal Relaxation of Bayes", ICLR 2023 (SAM-Adam).
    """
    gradient = _sharpness_aware_gradient(loss, _in_direction_of_gradient(rho), num_sub_batches, bnupdate, atonce)

    def step(state, batch, rate):
        state, grads, value = gradient(state, batch)
        return _adam_step(state, grads, rate, beta1, beta2, coupled=weight_decay), value

    return _optimizer(_init_adam, step, _mean, learning_rate)


def asam(
    loss: Callable, *, learning_rate: Rate, beta1: float = 0.9, weight_decay: float, rho: float, eta: float,
    num_sub_batches: int = 1, bnupdate: str = 'both', atonce: int = 1,
) -> Optimizer:  # fmt: skip
    """Returns adaptive SAM (ASAM): SAM with each weight measured relative to its size, T = |w| + η.

    For each sub-batch, with the norm over all parameters:

        g = ∇ℓ(w)
        g' = ∇ℓ(w + ρ T²g/‖Tg‖)

    Then SGD's update, with g' averaged over the sub-batches:

        m ← β₁m + g' + δw
        w ← w − αm

    As published, T is 1 for biases. A parameter is a bias if its name is `b`, or begins with `bias` or `threshold`. The
    last is for filter response normalisation. `step` returns the loss at the perturbed weights. The new batch
    statistics are from the first sub-batch.

    Args:
        loss: the mean negative log-likelihood, as at the top of this module.
        learning_rate: α, or a schedule: a function of the number of steps that returns α.
        beta1: β₁ in [0, 1), decay of the momentum per step.
        weight_decay: δ, the prior precision divided by N.
        rho: ρ, the Euclidean length of the perturbation divided by T, dimensionless.
        eta: η, in units of the weights.
        num_sub_batches: sub-batches per batch. Must divide the batch size B, or `step` raises a ValueError.
        bnupdate: 'both', 'first' or 'second', the gradients that update the batch statistics.
        atonce: the most sub-batches that are computed together.

    Returns:
        An Optimizer whose state is a MomentumState. `sample` returns the weights.

    References:
        Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks",
        ICML 2021.
    """

    def perturb(params, grads):
        sizes = tree.map_with_path(lambda path, w: jnp.ones_like(w) if _is_bias(path) else jnp.abs(w) + eta, params)
        scaled = tree.map(jnp.multiply, sizes, grads)
        scale = _over(rho, _norm(scaled))
        return _moved(params, tree.map(lambda t, g: scale * t * g, sizes, scaled))

    gradient = _sharpness_aware_gradient(loss, perturb, num_sub_batches, bnupdate, atonce)

    def step(state, batch, rate):
        state, grads, value = gradient(state, batch)
        return _momentum_step(state, grads, rate, beta1, weight_decay), value

    return _optimizer(_init_momentum, step, _mean, learning_rate)


def swag(
    loss: Callable, *, learning_rate: Rate, beta1: float = 0.9, weight_decay: float, swagstart: int, swagevery: int,
    swagrank: int = 20, num_pieces: int = 1,
) -> Optimizer:  # fmt: skip
    """Returns SWAG: SGD, and a Gaussian posterior fitted to snapshots of SGD's weights θ.

        m ← β₁m + g + δθ
        θ ← θ − αm

    The first snapshot is taken after step `swagstart`, then one every `swagevery` steps. The state holds the mean
    θ̄ of the snapshots (SWA) and the variance. It also holds the last K ≤ `swagrank` deviations D = θ − θ̄. The
    posterior has the mean θ̄ and half of the covariance

        diag(mean θ² − θ̄²) + DDᵀ/(K − 1)

    Samples equal the mean until the second snapshot. The variance is updated as by Welford (1962), because
    mean θ² − θ̄² would lose its digits in float32. The batch statistics belong to SGD's weights. Re-estimate them for
    the mean and for samples.

    Args:
        loss: the mean negative log-likelihood, as at the top of this module.
        learning_rate: α, or a schedule: a function of the number of steps that returns α.
        beta1: β₁ in [0, 1), decay of the momentum per step.
        weight_decay: δ, the prior precision divided by N.
        swagstart: the step of the first snapshot, counted from 1.
        swagevery: steps from one snapshot to the next.
        swagrank: the most deviations that are kept. Each takes as much memory as the weights.
        num_pieces: pieces of a batch, whose gradients are averaged. Must divide the batch size B, or `step` raises a
            ValueError.

    Returns:
        An Optimizer whose state is a SWAGState. `sample` draws from the posterior.

    References:
        Maddox et al., "A Simple Baseline for Bayesian Uncertainty in Deep Learning", NeurIPS 2019.
    """
    value_and_grad = _in_pieces(_value_and_grad(loss), num_pieces)

    def init(params, batch_stats, key):
        momentum, variance = _zeros(params), _zeros(params)
        mean = tree.map(lambda w, m: jnp.copy(w).astype(m.dtype), params, momentum)
        deviations = tree.map(lambda m: jnp.zeros((swagrank, *m.shape), m.dtype), momentum)
        num_snapshots, count = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        return SWAGState(mean, params, momentum, variance, deviations, num_snapshots, count, batch_stats, key)

    def step(state, batch, rate):
        (value, batch_stats), grads = value_and_grad(state.iterate, state.batch_stats, batch)
        iterate, momentum = _heavy_ball(state.iterate, state.momentum, grads, rate, beta1, weight_decay)
        count = state.count + 1
        state = state._replace(iterate=iterate, momentum=momentum, count=count, batch_stats=batch_stats)
        due = (count >= swagstart) & ((count - swagstart) % swagevery == 0)
        state = jax.lax.cond(due, record, lambda state: state, state)
        before = state.num_snapshots == 0
        return state._replace(params=tree.map(lambda m, w: jnp.where(before, w, m), state.params, iterate)), value

    def record(state):
        n = state.num_snapshots
        params = tree.map(lambda m, w: (n * m + w) / (n + 1), state.params, state.iterate)
        variance = tree.map(
            lambda v, w, before, m: (n * v + (w - before) * (w - m)) / (n + 1),
            state.variance,
            state.iterate,
            state.params,
            params,
        )
        deviations = tree.map(lambda d, w, m: d.at[n % swagrank].set(w - m), state.deviations, state.iterate, params)
        return state._replace(params=params, variance=variance, deviations=deviations, num_snapshots=n + 1)

    def sample(state, key):
        diagonal_key, low_rank_key = jax.random.split(key)
        noise = _normal_like(diagonal_key, state.params)
        weights = jax.random.normal(low_rank_key, (swagrank,))
        weights /= jnp.sqrt(2 * jnp.maximum(jnp.minimum(state.num_snapshots, swagrank) - 1, 1))

        def draw(w, v, d, e):
            return w + jnp.sqrt(jnp.maximum(v, 0) / 2) * e + jnp.tensordot(weights, d, 1)

        drawn = tree.map(draw, state.params, state.variance, state.deviations, noise)
        return tree.map(lambda x, w: jnp.where(state.num_snapshots > 1, x, w), drawn, state.params)

    return _optimizer(init, step, sample, learning_rate)


def ivon(
    loss: Callable, *, learning_rate: Rate, beta1: float = 0.9, beta2: float = 0.99999, weight_decay: float,
    num_data: float, initial_hessian: float, clip: float = math.inf, num_sub_batches: int = 1, num_samples: int = 1,
    atonce: int = 1,
) -> Optimizer:  # fmt: skip
    """Returns IVON: variational inference with a diagonal Gaussian posterior N(w, 1/(N (h + δ))).

    For each sub-batch and each of `num_samples` samples, with ε ~ N(0, I):

        θ = w + ε/√(N (h + δ))
        ĝ = ∇ℓ(θ)
        ĥ = N (h + δ) (θ − w) ĝ

    ĥ estimates the diagonal of the Hessian. Then, in step t = 1, 2, ..., with averages of ĝ and ĥ:

        m ← β₁m + (1−β₁)ĝ
        h ← β₂h + (1−β₂)ĥ + ½(1−β₂)²(h − ĥ)²/(h + δ)
        w ← w − α (h₀ + δ) clip((m/(1−β₁ᵗ) + δw)/(h + δ))

    h stays above −δ. The first h is h₀. `step` returns the mean loss at the sampled weights. The new batch statistics
    are from the first sample of the first sub-batch.

    Args:
        loss: the mean negative log-likelihood, as at the top of this module.
        learning_rate: α, or a schedule: a function of the number of steps that returns α.
        beta1: β₁ in [0, 1), decay of the momentum per step.
        beta2: β₂ in [0, 1), decay of the Hessian per step.
        weight_decay: δ, the prior precision divided by N.
        num_data: N, training examples times the augmentation factor.
        initial_hessian: h₀, in units of δ.
        clip: the bound of the clipped term, which is limited to [−`clip`, `clip`]. It has the units of the weights.
        num_sub_batches: sub-batches per batch. Must divide the batch size B, or `step` raises a ValueError.
        num_samples: samples of the weights per sub-batch.
        atonce: the most samples, over all sub-batches, that are computed together.

    Returns:
        An Optimizer whose state is an IVONState. `sample` draws from the posterior.

    References:
        Shen et al., "Variational Learning is Effective for Large Deep Networks", ICML 2024, Algorithm 1.
    """
    value_and_grad = _value_and_grad(loss)

    def init(params, batch_stats, key):
        hessian = tree.map(lambda m: jnp.full_like(m, initial_hessian), _zeros(params))
        return IVONState(params, _zeros(params), hessian, jnp.zeros((), jnp.int32), batch_stats, key)

    def deviation(state, key):
        noise = _normal_like(key, state.hessian)
        return tree.map(lambda e, h: e / jnp.sqrt(num_data * (h + weight_decay)), noise, state.hessian)

    def sample(state, key):
        return _moved(state.params, deviation(state, key))

    def step(state, batch, rate):
        def gradient(state, sub_batch, key):
            moved = deviation(state, key)
            (value, batch_stats), grads = value_and_grad(_moved(state.params, moved), state.batch_stats, sub_batch)
            return (grads, tree.map(jnp.multiply, moved, grads)), value, batch_stats

        key, step_key = jax.random.split(state.key)
        arguments = gradient, state, batch, num_sub_batches, step_key, num_samples, atonce
        averages, value, batch_stats = over_sub_batches(*arguments)
        return update(state, *averages, rate)._replace(batch_stats=batch_stats, key=key), value

    def update(state, grads, products, rate):
        count = state.count + 1
        momentum = tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.momentum, grads)
        estimate = tree.map(lambda h, p: num_data * (h + weight_decay) * p, state.hessian, products)
        hessian = tree.map(
            lambda h, f: beta2 * h + (1 - beta2) * f + 0.5 * (1 - beta2) ** 2 * jnp.square(h - f) / (h + weight_decay),
            state.hessian,
            estimate,
        )
        debias = 1 - beta1**count
        rate = rate * (initial_hessian + weight_decay)
        params = tree.map(
            lambda w, m, h: (
                w - rate * jnp.clip((m / debias + weight_decay * w) / (h + weight_decay), -clip, clip)
            ).astype(w.dtype),
            state.params,
            momentum,
            hessian,
        )
        return state._replace(params=params, momentum=momentum, hessian=hessian, count=count)

    return _optimizer(init, step, sample, learning_rate)


OPTIMIZERS = {
    'sgd': sgd,
    'sam': sam,
    'bsam': bsam,
    'adam': adam,
    'adamw': adamw,
    'samadam': samadam,
    'asam': asam,
    'swag': swag,
    'ivon': ivon,
}


def _optimizer(init, step, sample, learning_rate):
    """Returns an Optimizer from init(params, batch_stats, key), step(state, batch, rate) and sample(state, key).

    Its `init` checks the arguments. Its `step` turns a schedule into a rate.
    """

    def checked_init(params, batch_stats=None, key=None):
        if key is None or not jnp.issubdtype(getattr(key, 'dtype', None), jax.dtypes.prng_key):
            raise TypeError('init needs a key by name or in the third place: key=jax.random.key(seed)')
        for path, leaf in tree.leaves_with_path(params):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                what = f'parameter {jax.tree_util.keystr(path)} is {jnp.result_type(leaf)}'
                raise TypeError(f'{what}: params take real floating-point arrays only')
        state = init(tree.map(jnp.asarray, params), batch_stats, key)
        return state._replace(count=jnp.zeros((), jnp.int32)) if callable(learning_rate) else state

    def scheduled_step(state, batch, lr_factor=1.0):
        if not callable(learning_rate):
            return step(state, batch, learning_rate * lr_factor)
        stepped, value = step(state, batch, learning_rate(state.count) * lr_factor)
        return stepped._replace(count=state.count + 1), value

    return Optimizer(checked_init, scheduled_step, sample)


def _zeros(params):
    """Returns zeros with the structure of `params`, in float32 for weights of lower precision."""
    return tree.map(lambda w: jnp.zeros(w.shape, _float32_or_more(w)), params)


def _float32_or_more(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _moved(params, distances):
    """Returns params + distances in the dtype of `params`."""
    return tree.map(lambda w, d: (w + d).astype(w.dtype), params, distances)


def _init_momentum(params, batch_stats, key):
    return MomentumState(params, _zeros(params), batch_stats, key)


def _momentum_step(state, grads, rate, beta1, weight_decay):
    params, momentum = _heavy_ball(state.params, state.momentum, grads, rate, beta1, weight_decay)
    return state._replace(params=params, momentum=momentum)


def _heavy_ball(params, momentum, grads, rate, beta1, weight_decay):
    momentum = tree.map(lambda m, g, w: beta1 * m + g + weight_decay * w, momentum, grads, params)
    return tree.map(lambda w, m: (w - rate * m).astype(w.dtype), params, momentum), momentum


def _init_adam(params, batch_stats, key):
    return AdamState(params, _zeros(params), _zeros(params), jnp.zeros((), jnp.int32), batch_stats, key)


def _adam(loss, learning_rate, beta1, beta2, num_pieces, **weight_decay):
    value_and_grad = _in_pieces(_value_and_grad(loss), num_pieces)

    def step(state, batch, rate):
        (value, batch_stats), grads = value_and_grad(state.params, state.batch_stats, batch)
        state = _adam_step(state, grads, rate, beta1, beta2, **weight_decay)
        return state._replace(batch_stats=batch_stats), value

    return _optimizer(_init_adam, step, _mean, learning_rate)


def _adam_step(state, grads, rate, beta1, beta2, coupled=0.0, decoupled=0.0):
    """Applies Adam's update. Adds coupled · w to the gradient, and subtracts rate · decoupled · w from the weights."""
    count = state.count + 1
    grads = tree.map(lambda g, w: g + coupled * w, grads, state.params)
    momentum = tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.momentum, grads)
    squares = tree.map(lambda v, g: beta2 * v + (1 - beta2) * jnp.square(g), state.squares, grads)

    def moved(w, m, v):
        direction = (m / (1 - beta1**count)) / (jnp.sqrt(v / (1 - beta2**count)) + 1e-8)
        return (w - rate * (direction + decoupled * w)).astype(w.dtype)

    params = tree.map(moved, state.params, momentum, squares)
    return state._replace(params=params, momentum=momentum, squares=squares, count=count)


def _in_direction_of_gradient(rho):
    """Returns SAM's perturbation, perturb(w, g) = w + ρ g/‖g‖."""

    def perturb(params, grads):
        scale = _over(rho, _norm(grads))
        return _moved(params, tree.map(lambda g: scale * g, grads))

    return perturb


def _norm(grads):
    """Returns the Euclidean norm over all leaves."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in tree.leaves(grads)))


def _over(rho, norm):
    """Returns rho / norm, or 0 for a zero gradient."""
    return jnp.where(norm > 0, rho / norm, 0)


def _is_bias(path):
    """Returns whether a parameter has the name of a bias in Flax, Equinox or Haiku. NNX adds `value` to paths."""
    names = [jax.tree_util.keystr((part,), simple=True) for part in path]
    name = next((name for name in reversed(names) if name != 'value'), '')
    return name == 'b' or name.startswith(('bias', 'threshold'))


def _sharpness_aware_gradient(loss, perturb, num_sub_batches, bnupdate, atonce):
    """Returns gradient(state, batch) -> (new state, grads, value).

    `grads` and `value` are averages over sub-batches of ∇ℓ and ℓ at perturb(w, ∇ℓ(w)). The new state has new batch
    statistics and a new key.
    """
    value_and_grad = _value_and_grad(loss)

    def gradient(state, batch):
        def of_sub_batch(state, sub_batch, _):
            (_, first), grads = value_and_grad(state.params, state.batch_stats, sub_batch)
            before = state.batch_stats if bnupdate == 'second' else first
            (value, second), grads = value_and_grad(perturb(state.params, grads), before, sub_batch)
            return grads, value, first if bnupdate == 'first' else second

        key, step_key = jax.random.split(state.key)
        arguments = of_sub_batch, state, batch, num_sub_batches, step_key
        grads, value, batch_stats = over_sub_batches(*arguments, atonce=atonce)
        return state._replace(batch_stats=batch_stats, key=key), grads, value

    return gradient


def _value_and_grad(loss):
    """Returns value_and_grad(params, batch_stats, batch) -> ((value, batch_stats), grads), traced once for all calls.

    The barrier makes XLA compute the weights first. Both gradients of SAM are then the same operations to XLA, which
    compile faster.
    """

    def with_batch_stats(params, batch_stats, batch):
        returned = loss(params, batch) if batch_stats is None else loss(params, batch_stats, batch)
        if batch_stats is None:
            if isinstance(returned, tuple):
                raise TypeError('the loss returned a tuple: pass batch_stats to init, or return the value only')
            return returned, None
        if not isinstance(returned, tuple):
            raise TypeError('the loss must return (value, batch_stats), because init got batch_stats')
        return returned

    @jax.jit
    def value_and_grad(params, batch_stats, batch):
        params = jax.lax.optimization_barrier(params)
        return jax.value_and_grad(with_batch_stats, has_aux=True)(params, batch_stats, batch)

    return value_and_grad


def _in_pieces(value_and_grad, num_pieces):
    """Returns value_and_grad(params, batch_stats, batch), averaged over `num_pieces` pieces of the batch.

    With batch statistics the batch stays whole. With several devices it stays whole too, because they share its images.
    """

    def of_piece(arguments, piece, _):
        (value, batch_stats), grads = value_and_grad(*arguments, piece)
        return grads, value, batch_stats

    def averaged(params, batch_stats, batch):
        mesh = jax.sharding.get_abstract_mesh()
        if num_pieces == 1 or tree.leaves(batch_stats) or mesh.size > 1:
            return value_and_grad(params, batch_stats, batch)
        pieces = tree.map(lambda x: _split(x, num_pieces), batch)
        grads, value, batch_stats = _totals(of_piece, 1, (params, batch_stats), pieces, jnp.arange(num_pieces))
        return (value / num_pieces, batch_stats), tree.map(lambda g: g / num_pieces, grads)

    return averaged


def _mean(state, key):
    """Returns the mean. This is the `sample` of optimizers whose posterior is a point."""
    del key
    return state.params


def _normal_like(key, params):
    """Draws standard normal noise with the structure and dtype of `params`.

    The noise is drawn in float32, in blocks of equal size with one key each. The split into leaves does not change the
    numbers. XLA must not draw the noise again for every leaf, because that takes far longer to compile. CPUs call a
    function that XLA does not inline. All threads work for the function, but only one thread for a loop. Other devices
    run a loop of at least two iterations, because XLA removes a loop of one iteration.
    """
    flat, unravel = ravel_pytree(params)
    num_blocks = -(-flat.size // _NOISE_BLOCK)
    draw = partial(_normal, size=128 * -(-flat.size // (128 * num_blocks)))

    def on_cpus(key):
        keys = jax.random.split(key, num_blocks)
        with set_xla_metadata(inlineable='false'):
            return jax.jit(jax.vmap(draw))(keys)

    def elsewhere(key):
        return jax.lax.map(draw, jax.random.split(key, max(2, num_blocks)))[:num_blocks]

    noise = jax.lax.platform_dependent(key, cpu=on_cpus, default=elsewhere)
    return unravel(noise.reshape(-1)[: flat.size].astype(flat.dtype))


# The most values that are drawn from one key. Another number would change the noise of every seed.
_NOISE_BLOCK = 1 << 18


def _normal(key, size):
    """Returns jax.random.normal(key, (size,)) in float32, but faster on CPUs.

    On CPUs JAX runs the rounds of Threefry in a loop, and each iteration passes over memory.
    """
    key_data = jax.random.key_data(key)
    counts = jnp.arange(size, dtype=jnp.uint32)
    bits = jnp.bitwise_xor(*_threefry2x32(key_data[0], key_data[1], jnp.zeros_like(counts), counts))
    from_1_to_2 = jax.lax.bitcast_convert_type(bits >> 9 | np.float32(1).view(np.uint32), jnp.float32)
    low = np.nextafter(np.float32(-1), np.float32(0))
    uniform = jnp.maximum((from_1_to_2 - 1) * (1 - low) + low, low)
    return np.sqrt(np.float32(2)) * jax.lax.erf_inv(uniform)


def _threefry2x32(key0, key1, x0, x1):
    """Returns the two outputs of Threefry-2x32 with 20 rounds, in uint32 like all inputs.

    References:
        Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
    """
    keys = key0, key1, key0 ^ key1 ^ np.uint32(0x1BD11BDA)
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for injection in range(1, 6):
        for rotation in (17, 29, 16, 24) if injection % 2 == 0 else (13, 15, 26, 6):
            x0 = x0 + x1
            x1 = (x1 << rotation | x1 >> 32 - rotation) ^ x0
        x0, x1 = x0 + keys[injection % 3], x1 + keys[(injection + 1) % 3] + np.uint32(injection)
    return x0, x1


def _deviation(noise, num_data, precision):
    """Returns ε/√(N s), computed as ±√(ε²/(N s)).

    Otherwise XLA would keep one more array, 1/√(N s), through all sub-batches.
    """
    return jnp.copysign(jnp.sqrt(jnp.square(noise) / precision * (1 / num_data)), noise)


def over_sub_batches(
    gradient: Callable, state: Any, batch: Any, num_sub_batches: int, key: jax.Array, repeats: int = 1, atonce: int = 1
) -> tuple[Any, jax.Array, Any]:
    """Averages a gradient over consecutive sub-batches of a batch.

    Calls are computed one after another, or together in groups of equal size. The averages are the same. Under a mesh
    of several devices, each device computes its share of the calls.

    Args:
        gradient: gradient(state, sub_batch, key) -> (grads, value, batch_stats).
        state: the first argument of `gradient`.
        batch: a pytree of arrays [B, ...].
        num_sub_batches: sub-batches per batch. Must divide B. Under a mesh, the number of devices must divide
            num_sub_batches · repeats.
        key: gives each call of `gradient` its own key.
        repeats: calls of `gradient` per sub-batch.
        atonce: the most calls that are computed together.

    Returns:
        The averages of grads and value over all calls, and the batch statistics of the first call.

    Raises:
        ValueError: B is not divisible by `num_sub_batches`.
    """
    sub_batches = tree.map(lambda x: jnp.repeat(_split(x, num_sub_batches), repeats, axis=0), batch)
    keys = jax.random.split(key, num_sub_batches * repeats)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        totals = _totals(gradient, atonce, state, sub_batches, keys)
    else:
        axis = mesh.axis_names[0]
        share = jax.shard_map(
            lambda *shares: _over_devices(_totals(gradient, atonce, *shares), axis),
            in_specs=(P(), P(axis), P(axis)),
            out_specs=P(),
            check_vma=False,
        )
        totals = share(state, sub_batches, keys)
    grads, value, batch_stats = totals
    return *tree.map(lambda x: x / len(keys), (grads, value)), batch_stats


def _totals(gradient, atonce, state, sub_batches, keys):
    """Returns the sums of grads and value over sub-batches, and the batch statistics of the first sub-batch."""

    def of_several(sub_batches, keys):
        grads, values, batch_stats = jax.vmap(partial(gradient, state))(sub_batches, keys)
        grads = tree.map(lambda g: g.sum(axis=0, dtype=_float32_or_more(g)), grads)
        return grads, values.sum(), tree.map(lambda x: x[0], batch_stats)

    together = max(n for n in range(1, min(atonce, len(keys)) + 1) if len(keys) % n == 0)
    inputs = sub_batches, keys
    if together == 1:
        function = partial(gradient, state)
    else:
        function, inputs = of_several, tree.map(lambda x: x.reshape(-1, together, *x.shape[1:]), inputs)
    grads, _, _ = jax.eval_shape(function, *tree.map(lambda x: x[0], inputs))

    def accumulate(total, inputs):
        grads, value, batch_stats = function(*inputs)
        return tree.map(jnp.add, total, grads), (value, batch_stats)

    grads, (values, batch_stats) = jax.lax.scan(accumulate, _zeros(grads), inputs)
    return grads, values.sum(), tree.map(lambda x: x[0], batch_stats)


def _over_devices(totals, axis):
    """Returns the sums of grads and value over devices, and the batch statistics of the first device.

    Sums one flat array, because between processes on CPUs every array is a collective that takes milliseconds.
    """
    grads, value, batch_stats = totals
    of_first = tree.map(lambda x: jnp.where(jax.lax.axis_index(axis) == 0, x, jnp.zeros((), x.dtype)), batch_stats)
    flat, unravel = ravel_pytree((grads, value, of_first))
    return unravel(jax.lax.psum(flat, axis))


def _split(x, num_sub_batches):
    if x.shape[0] % num_sub_batches:
        raise ValueError(f'a batch of {x.shape[0]} examples cannot be cut into {num_sub_batches} equal sub-batches')
    return x.reshape(num_sub_batches, x.shape[0] // num_sub_batches, *x.shape[1:])
