"""SGD, SAM and bSAM, each a triple of pure functions over an immutable state.

    loss(params, batch_stats, batch) -> (scalar, new batch_stats)     the caller's
    optimizer = bsam(loss, alpha=0.5, ...)
    state = optimizer.init(params, batch_stats, key)
    state, value = optimizer.step(state, batch, lr_factor)            jittable; the state may be donated
    params = optimizer.sample(state, key)                             a draw from the posterior

`params` and `batch_stats` are any pytrees of arrays (`{}` for a network without batch statistics),
`batch` any pytree of arrays [B, ...]. SAM and bSAM cut a batch into `batchsplit` consecutive
sub-batches, perturb the weights for each of them on its own (m-sharpness) and go through them one
after another. `bnupdate` is 'both', 'first' or 'second': at which of the two gradients batch statistics move.

Symbols of Möllenhoff & Khan, "SAM as an Optimal Relaxation of Bayes" (ICLR 2023, arXiv 2210.01620):
    w  params         weights, the mean of the posterior
    m  momentum
    s  precision      the posterior is N(w, 1 / (N s))
    g  grads          gradients of the loss, without weight decay
    α  alpha          learning rate, times the schedule's `lr_factor`
    β₁ beta1          decay of the momentum
    β₂ beta2          decay of the precision
    δ  weight_decay   prior precision / N, coupled (L2)
    ρ  rho            size of the perturbation
    γ  damping        added to the precision
    N  num_data       number of training examples, times the augmentation factor
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import tree
from jax.flatten_util import ravel_pytree


class Optimizer(NamedTuple):
    """The three functions of an algorithm; their use stands at the top of this module."""

    init: Callable
    step: Callable
    sample: Callable


class MomentumState(NamedTuple):
    """State of SGD and SAM; `momentum` has the structure of `params`."""

    params: Any
    momentum: Any
    batch_stats: Any
    key: jax.Array


class BSAMState(NamedTuple):
    """State of bSAM; `momentum` and `precision` have the structure of `params`."""

    params: Any
    momentum: Any
    precision: Any
    batch_stats: Any
    key: jax.Array


def lr_factor(epoch, epochs, warmup):
    """Learning rate of an epoch relative to alpha: linear warm-up, then half a cosine down to almost 0.

    epoch: 0, 1, ..., epochs (the reference runs epochs + 1 of them); warmup: epochs of warm-up.
    """
    if epoch < warmup:
        return (epoch + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs + 1 - warmup)))


def sgd(loss, *, alpha, beta1, weight_decay):
    """Stochastic gradient descent with heavy-ball momentum and coupled weight decay.

    m ← β₁m + g + δw;  w ← w − αm. The momentum is a sum of gradients, not their average.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def step(state, batch, lr_factor=1.0):
        (value, batch_stats), grads = value_and_grad(state.params, state.batch_stats, batch)
        state = _momentum_step(state, grads, alpha * lr_factor, beta1, weight_decay)
        return state._replace(batch_stats=batch_stats), value

    return Optimizer(_init_momentum, step, _mean)


def sam(loss, *, alpha, beta1, weight_decay, rho, batchsplit, bnupdate='both'):
    """Sharpness-aware minimisation (Foret et al., 2021) with m-sharpness over `batchsplit` sub-batches.

    For each sub-batch g = ∇ℓ(w), g' = ∇ℓ(w + ρ g/‖g‖) with the norm over all parameters; then SGD's
    update with the average g'. `step` returns the loss at the perturbed weights. Batch statistics are
    updated at `bnupdate` of the two points, and those of the first sub-batch are kept.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def step(state, batch, lr_factor=1.0):
        def sharpness_aware_gradient(sub_batch, _):
            (_, first), grads = value_and_grad(state.params, state.batch_stats, sub_batch)
            norm = optax.tree.norm(grads)
            scale = jnp.where(norm > 0, rho / norm, 0)
            perturbed = tree.map(lambda w, g: w + scale * g, state.params, grads)
            before = state.batch_stats if bnupdate == 'second' else first
            (value, second), grads = value_and_grad(perturbed, before, sub_batch)
            return grads, value, first if bnupdate == 'first' else second

        key, step_key = jax.random.split(state.key)
        grads, value, batch_stats = _over_sub_batches(sharpness_aware_gradient, batch, batchsplit, step_key)
        state = _momentum_step(state, grads, alpha * lr_factor, beta1, weight_decay)
        return state._replace(batch_stats=batch_stats, key=key), value

    return Optimizer(_init_momentum, step, _mean)


def bsam(
    loss, *, alpha, beta1, beta2, weight_decay, rho, batchsplit, num_data, custominit=1.0, damping=0.1, bnupdate='both'
):
    """Bayesian SAM (Möllenhoff & Khan, 2023, Algorithm 1) with a diagonal Gaussian posterior N(w, 1/(N s)).

    For each sub-batch, with noise ε ~ N(0, I) of its own: g = ∇ℓ(w + ε/√(N s)), g' = ∇ℓ(w + ρ g/s).
    The mean is perturbed, not the sampled weights, and nothing is normalised. `step` returns the loss at
    the perturbed mean. Batch statistics are updated at `bnupdate` of the two points, and those of the first
    sub-batch are kept. The precision starts at `custominit`.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def init(params, batch_stats, key):
        momentum = tree.map(jnp.zeros_like, params)
        precision = tree.map(lambda w: jnp.full_like(w, custominit), params)
        return BSAMState(params, momentum, precision, batch_stats, key)

    def sample(state, key):
        noise = _normal_like(key, state.params)
        return tree.map(lambda w, e, s: w + e / jnp.sqrt(num_data * s), state.params, noise, state.precision)

    def step(state, batch, lr_factor=1.0):
        def sharpness_aware_gradient(sub_batch, key):
            (_, first), grads = value_and_grad(sample(state, key), state.batch_stats, sub_batch)
            magnitude = tree.map(jnp.abs, grads)
            perturbed = tree.map(lambda w, g, s: w + rho * g / s, state.params, grads, state.precision)
            before = state.batch_stats if bnupdate == 'second' else first
            (value, second), grads = value_and_grad(perturbed, before, sub_batch)
            return (grads, magnitude), value, first if bnupdate == 'first' else second

        key, step_key = jax.random.split(state.key)
        averages, value, batch_stats = _over_sub_batches(sharpness_aware_gradient, batch, batchsplit, step_key)
        state = update(state, *averages, alpha * lr_factor)
        return state._replace(batch_stats=batch_stats, key=key), value

    def update(state, grads, magnitude, rate):
        """The weights move with the old precision, which is updated last."""
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

    return Optimizer(init, step, sample)


OPTIMIZERS = {'sgd': sgd, 'sam': sam, 'bsam': bsam}

# Numbers of noise drawn at once: few enough for a core's cache, enough to occupy all cores.
_NOISE_BLOCK = 1 << 18


def _init_momentum(params, batch_stats, key):
    return MomentumState(params, tree.map(jnp.zeros_like, params), batch_stats, key)


def _momentum_step(state, grads, rate, beta1, weight_decay):
    momentum = tree.map(lambda m, g, w: beta1 * m + g + weight_decay * w, state.momentum, grads, state.params)
    params = tree.map(lambda w, m: (w - rate * m).astype(w.dtype), state.params, momentum)
    return state._replace(params=params, momentum=momentum)


def _mean(state, key):
    """SGD's and SAM's `sample`: their posterior is a point."""
    del key
    return state.params


def _normal_like(key, params):
    """Standard normal noise like `params`, drawn in equal blocks whatever the leaves are.

    A draw for every leaf takes far longer to compile, and one of all has six times its size in temporary arrays.
    """
    flat, unravel = ravel_pytree(params)
    num_blocks = -(-flat.size // _NOISE_BLOCK)
    block = 128 * -(-flat.size // (128 * num_blocks))  # an odd length takes three times as long
    keys = jax.random.split(key, num_blocks)
    noise = jax.lax.map(lambda k: jax.random.normal(k, (block,), flat.dtype), keys)
    return unravel(noise.reshape(-1)[: flat.size])


def _over_sub_batches(gradient, batch, batchsplit, key):
    """Calls gradient(sub_batch, key) -> (grads, value, batch_stats) for consecutive sub-batches, one after another.

    Returns the averages of grads and value, and the batch statistics of the first sub-batch. `vmap` over
    sub-batches would give every one its own weights and turn convolutions into slow grouped ones.
    """
    sub_batches = tree.map(lambda x: _split(x, batchsplit), batch)
    keys = jax.random.split(key, batchsplit)
    grads, _, _ = jax.eval_shape(gradient, *tree.map(lambda x: x[0], (sub_batches, keys)))

    def accumulate(total, inputs):
        grads, value, batch_stats = gradient(*inputs)
        return tree.map(jnp.add, total, grads), (value, batch_stats)

    zeros = tree.map(lambda g: jnp.zeros(g.shape, g.dtype), grads)
    total, (values, batch_stats) = jax.lax.scan(accumulate, zeros, (sub_batches, keys))
    grads = tree.map(lambda g: g / batchsplit, total)
    return grads, values.mean(), tree.map(lambda x: x[0], batch_stats)


def _split(x, batchsplit):
    if x.shape[0] % batchsplit:
        raise ValueError(f'a batch of {x.shape[0]} examples cannot be cut into {batchsplit} equal sub-batches')
    return x.reshape(batchsplit, x.shape[0] // batchsplit, *x.shape[1:])
