"""Builds the network, loss, optimizer and jitted step of a run from the configuration.

Converts flags into the arguments of optimizers: prior precision → weight decay, epochs → steps.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.flatten_util import ravel_pytree

import data
import models
import optimizers
from ops import sharding
from readers import python_files
from runs import checkpoints, training_flags


class Experiment(NamedTuple):
    """The functions of a run. `step` takes normalised images. All other functions of images take uint8 images.

    Attributes:
        optimizer: the optimizer, with `init`, `step` and `sample`.
        num_data: N, the number of training examples times the augmentation factor.
        init: init(key, weights=None) -> the optimizer's first state. `weights` replaces initial weights and batch
            statistics, {name: array}, with the names of checkpoints such as params.head.kernel.
        normalise: normalise(images uint8 [B, H, W, C]) -> the network's inputs, float32 [B, H, W, C].
        step: step(state, batch, lr_factor) -> (state, loss), jitted. Donates the state. `data.Feed` yields the batches:
            normalised images float32 [B, H, W, C], labels int32 [B] and, for dropout, seeds uint32 [B].
        apply: apply(params, batch_stats, images uint8 [B, H, W, C]) -> logits [B, K]. `params` may be a Thinned.
        update_batch_stats: update_batch_stats(params, batch_stats, images uint8 [B, H, W, C]) -> the batch statistics,
            updated with these images as in training.
        has_dropout: whether the network has dropout.
    """

    optimizer: optimizers.Optimizer
    num_data: float
    init: Callable
    normalise: Callable
    step: Callable
    apply: Callable
    update_batch_stats: Callable
    has_dropout: bool = False

    def state_shapes(self) -> Any:
        """Returns the shapes of the optimizer's state, as jax.ShapeDtypeStructs."""
        return jax.eval_shape(self.init, jax.random.key(0, impl='threefry2x32'))


class Thinned(NamedTuple):
    """The weights of a network, and the uint32 [] seed of the dropout that thins it (Gal & Ghahramani, 2016)."""

    params: Any
    dropout_seed: jax.Array


def create(config: dict) -> Experiment:
    """Returns the Experiment of a configuration {'flags': ..., 'dataset': data.describe(...)}.

    Raises CodeError and ModelError.

    Configurations share one Experiment if they differ only in values that the functions do not use, such as the seed.
    A shared Experiment compiles once.
    """
    flags, dataset = config['flags'], config['dataset']
    model = models.create(flags['model'], dataset['num_classes'])
    num_data = dataset['num_train'] * flags['dafactor']
    arguments = tuple(optimizer_arguments(flags, dataset['num_train']).items())
    shape, mean, std = (tuple(dataset[name]) for name in ('image_shape', 'mean', 'std'))
    return _create(
        flags['model'], model, flags['precision'], flags['optim'], arguments, num_data, shape, mean, std,
        dataset['num_classes'],
    )  # fmt: skip


@cache
def _create(name, model, precision, optim, arguments, num_data, image_shape, mean, std, num_classes):
    dtype = jnp.dtype(precision)
    has_dropout = python_files.is_name(name) and models.require_fits(name, model, image_shape, num_classes)
    optimizer = optimizers.OPTIMIZERS[optim](loss_function(model, dtype), **dict(arguments))
    normalise = partial(data.normalise, mean=mean, std=std)

    def init(key, weights=None):
        weights_key, state_key = jax.random.split(key)
        variables = model.init(weights_key, jnp.zeros((1, *image_shape)), train=False)
        variables = {'params': variables['params'], 'batch_stats': variables.get('batch_stats', {})}
        leaves = [(weights or {}).get(name, initial) for name, initial in checkpoints.named(variables).items()]
        variables = jax.tree.unflatten(jax.tree.structure(variables), leaves)
        return optimizer.init(variables['params'], variables['batch_stats'], state_key)

    @partial(jax.jit, donate_argnames='state')
    def step(state, batch, lr_factor):
        state, loss = optimizer.step(state, batch, lr_factor)
        return jax.tree.map(sharding.gather, state), loss

    def apply(params, batch_stats, images):
        params, seed = params if isinstance(params, Thinned) else (params, None)
        return models.apply(model, params, batch_stats, normalise(images), False, dtype, seed)[0]

    def update_batch_stats(params, batch_stats, images):
        seed = jnp.uint32(0) if has_dropout else None
        return models.apply(model, params, batch_stats, normalise(images), True, dtype, seed)[1]

    return Experiment(optimizer, num_data, init, normalise, step, apply, update_batch_stats, has_dropout)


def loss_function(model: nn.Module, dtype: jnp.dtype) -> Callable:
    """Returns loss(params, batch_stats, batch) -> (mean negative log-likelihood in nats, new batch statistics).

    A batch is (images float [B, H, W, C], labels int [B]). For a network with dropout, it also has seeds, uint32 [B].
    Each sub-batch then has its own dropout, the same for both gradients of SAM. The network computes in `dtype`.
    """

    def loss(params, batch_stats, batch):
        images, labels, *seeds = batch
        seed = seeds[0][0] if seeds else None
        logits, batch_stats = models.apply(model, params, batch_stats, images, True, dtype, seed)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), batch_stats

    return loss


def optimizer_arguments(flags: dict, num_train: int) -> dict:
    """Returns the keyword arguments of the chosen optimizer, except the loss.

    Converts the flags that the optimizer takes in another form: δ = priorprec / N, epochs → steps.
    """
    arguments = {row.argument: flags[row.name] for row in training_flags.rows_of(flags['optim']) if row.argument}
    num_data = num_train * flags['dafactor']
    arguments['weight_decay'] = arguments.pop('prior_precision') / num_data
    if flags['optim'] in ('bsam', 'ivon'):
        arguments['num_data'] = num_data
    if 'atonce' in arguments:
        arguments['atonce'] = at_once(flags)
    if 'num_sub_batches' not in arguments:
        arguments['num_pieces'] = num_pieces(flags['model'], flags['batchsize'])
    if 'clip' in arguments and flags['clip'] is None:
        arguments['clip'] = math.inf
    if flags['optim'] == 'swag':
        steps = num_train // flags['batchsize']
        first = training_flags.first_constant_epoch(flags['epochs'], flags['swagstart'])
        arguments |= {'swagstart': steps * (first + 1), 'swagevery': steps}
    return arguments


def is_point(optim: str) -> bool:
    """Returns whether the posterior of an optimizer is a point. Every sample then equals the mean."""
    flags = vars(training_flags.parse_args([f'--optim={optim}']))
    return optimizers.OPTIMIZERS[optim](None, **optimizer_arguments(flags, num_train=flags['batchsize'])).is_point


def at_once(flags: dict) -> int:
    """Returns the most sub-batches that are computed together, over all samples of the weights.

    The default is 1 on CPUs, because CPU caches hold no more. Elsewhere the default is all.
    """
    sub_batches = (flags['batchsplit'] or 1) * (flags['trainmc'] or 1)
    return flags['atonce'] or (1 if jax.default_backend() == 'cpu' else sub_batches)


def num_pieces(model: str, batch_size: int) -> int:
    """Returns the number of pieces in which SGD, Adam, AdamW and SWAG take the gradient of a batch.

    On CPUs, ResNet-20 takes the smallest equal pieces of at least 10 images, because their activations stay in the
    cache. No other built-in network gains: they have batch statistics, or are small.
    """
    if model != 'resnet20' or jax.default_backend() != 'cpu':
        return 1
    return max(n for n in range(1, max(1, batch_size // 10) + 1) if batch_size % n == 0)


def lr_factor_of(flags: dict, epoch: int) -> float:
    """Returns the lr_factor of an epoch, learning rate / alpha. In the last epochs of SWAG the factor is constant."""
    if flags['optim'] == 'swag' and epoch >= training_flags.first_constant_epoch(flags['epochs'], flags['swagstart']):
        return flags['swagrate']
    return optimizers.lr_factor(epoch, flags['epochs'], flags['warmup'])


class Keys(NamedTuple):
    """The independent keys of a run: for the first state, the batches, and the samples that test.py draws."""

    init: jax.Array
    batches: jax.Array
    samples: jax.Array


@partial(jax.jit, static_argnames='seed')
def keys(seed: int) -> Keys:
    """Returns the Keys of --randomseed. Jitted because implicit transfers may be disallowed."""
    return Keys(*jax.random.split(jax.random.key(seed, impl='threefry2x32'), 3))


@jax.jit
def all_finite(arrays: Any) -> jax.Array:
    """Returns whether every float in a pytree is finite. Tests one flat array, which compiles faster."""
    floats = [leaf for leaf in jax.tree.leaves(arrays) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.isfinite(ravel_pytree(floats)[0]).all()
