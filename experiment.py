"""What a run's configuration means: its network, its loss, its optimizer, its jitted step.

Flags are turned into the arguments of optimizers here: prior precision → weight decay, epochs → steps.
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
from runs import training_flags


class Experiment(NamedTuple):
    """The functions of a run. `step` takes what `data.Feed` yields, the others take images uint8 as they are read.

    Attributes:
        optimizer: with `init`, `step` and `sample`.
        num_data: N, the number of training examples times the augmentation factor.
        init: init(key) -> the optimizer's first state.
        normalise: normalise(images uint8 [B, H, W, C]) -> what the network takes, float32.
        step: step(state, batch, lr_factor) -> (state, loss), jitted. Donates the state. A batch is what `data.Feed`
            yields, normalised images float32 [B, H, W, C] and labels int32 [B].
        apply: apply(params, batch_stats, images uint8 [B, H, W, C]) -> logits [B, K].
        update_batch_stats: of params, batch_stats, images uint8 [B, H, W, C] -> the batch statistics after a batch of
            training.
    """

    optimizer: optimizers.Optimizer
    num_data: float
    init: Callable
    normalise: Callable
    step: Callable
    apply: Callable
    update_batch_stats: Callable

    def state_shapes(self) -> Any:
        """Returns the shapes of the optimizer's state, as jax.ShapeDtypeStructs."""
        return jax.eval_shape(self.init, jax.random.key(0, impl='threefry2x32'))


def create(config: dict) -> Experiment:
    """Returns the Experiment of a configuration {'flags': ..., 'dataset': data.describe(...)}. Raises ModelError.

    Configurations that differ in nothing that the functions depend on, such as the seed, share one Experiment, so that
    it is compiled once.
    """
    flags, dataset = config['flags'], config['dataset']
    model = models.create(flags['model'], dataset['num_classes'])
    num_data = dataset['num_train'] * flags['dafactor']
    arguments = tuple(optimizer_arguments(flags, dataset['num_train']).items())
    shape, mean, std = (tuple(dataset[name]) for name in ('image_shape', 'mean', 'std'))
    return _create(model, flags['precision'], flags['optim'], arguments, num_data, shape, mean, std)


@cache
def _create(model, precision, optim, arguments, num_data, image_shape, mean, std):
    dtype = jnp.dtype(precision)
    optimizer = optimizers.OPTIMIZERS[optim](loss_function(model, dtype), **dict(arguments))
    normalise = partial(data.normalise, mean=mean, std=std)

    def init(key):
        weights_key, state_key = jax.random.split(key)
        variables = model.init(weights_key, jnp.zeros((1, *image_shape)), train=False)
        return optimizer.init(variables['params'], variables.get('batch_stats', {}), state_key)

    @partial(jax.jit, donate_argnames='state')
    def step(state, batch, lr_factor):
        state, loss = optimizer.step(state, batch, lr_factor)
        return jax.tree.map(sharding.gather, state), loss

    def apply(params, batch_stats, images):
        logits, _ = models.apply(model, params, batch_stats, normalise(images), train=False, dtype=dtype)
        return logits

    def update_batch_stats(params, batch_stats, images):
        _, batch_stats = models.apply(model, params, batch_stats, normalise(images), train=True, dtype=dtype)
        return batch_stats

    return Experiment(optimizer, num_data, init, normalise, step, apply, update_batch_stats)


def loss_function(model: nn.Module, dtype: jnp.dtype) -> Callable:
    """Returns an optimizer's loss: the mean negative log-likelihood of a batch, float [B, H, W, C] and int [B]."""

    def loss(params, batch_stats, batch):
        images, labels = batch
        logits, batch_stats = models.apply(model, params, batch_stats, images, train=True, dtype=dtype)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), batch_stats

    return loss


def optimizer_arguments(flags: dict, num_train: int) -> dict:
    """Returns the keyword arguments of the optimizer that the flags of a run name, without its loss.

    Flags whose value the optimizer takes in another form are converted: δ = priorprec / N, epochs → steps.
    """
    arguments = {row.argument: flags[row.name] for row in training_flags.rows_of(flags['optim']) if row.argument}
    num_data = num_train * flags['dafactor']
    arguments['weight_decay'] = arguments.pop('prior_precision') / num_data
    if flags['optim'] in ('bsam', 'ivon'):
        arguments['num_data'] = num_data
    if 'atonce' in arguments:
        arguments['atonce'] = at_once(flags)
    if 'clip' in arguments and flags['clip'] is None:
        arguments['clip'] = math.inf
    if flags['optim'] == 'swag':
        steps = num_train // flags['batchsize']
        first = training_flags.first_constant_epoch(flags['epochs'], flags['swagstart'])
        arguments |= {'swagstart': steps * (first + 1), 'swagevery': steps}
    return arguments


def is_point(optim: str) -> bool:
    """Returns whether the posterior of an optimizer is a point, so that every sample is the mean."""
    flags = vars(training_flags.parse_args([f'--optim={optim}']))
    return optimizers.OPTIMIZERS[optim](None, **optimizer_arguments(flags, num_train=flags['batchsize'])).is_point


def at_once(flags: dict) -> int:
    """Returns how many sub-batches are computed together: by default all, one on CPUs, whose caches hold no more."""
    sub_batches = (flags['batchsplit'] or 1) * (flags['trainmc'] or 1)
    return flags['atonce'] or (1 if jax.default_backend() == 'cpu' else sub_batches)


def lr_factor_of(flags: dict, epoch: int) -> float:
    """Returns the lr_factor of an epoch, the learning rate over alpha. SWAG's is constant in its last epochs."""
    if flags['optim'] == 'swag' and epoch >= training_flags.first_constant_epoch(flags['epochs'], flags['swagstart']):
        return flags['swagrate']
    return optimizers.lr_factor(epoch, flags['epochs'], flags['warmup'])


class Keys(NamedTuple):
    """The independent keys of a run's first state, of its batches and of the samples that test.py draws."""

    init: jax.Array
    batches: jax.Array
    samples: jax.Array


@partial(jax.jit, static_argnames='seed')
def keys(seed: int) -> Keys:
    """Returns the Keys of --randomseed. Jitted, so that it also runs where implicit transfers are disallowed."""
    return Keys(*jax.random.split(jax.random.key(seed, impl='threefry2x32'), 3))


@jax.jit
def all_finite(arrays: Any) -> jax.Array:
    """Returns whether every float in a pytree is finite. Tests one flat array, which compiles sooner."""
    floats = [leaf for leaf in jax.tree.leaves(arrays) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.isfinite(ravel_pytree(floats)[0]).all()
