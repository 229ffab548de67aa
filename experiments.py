"""What a run's configuration means: its network, its optimizer, its first state, its predictions.

Here the flags of the reference are translated into the field's terms.
"""

import inspect
import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

import data
import feeds
import metrics
import models
import optimizers
import training
from evaluation import posteriors
from runs import training_flags


class Experiment(NamedTuple):
    """The parts of a run.

    init(key) returns the optimizer's first state, normalise(images uint8 [B, H, W, C]) what the network takes,
    apply(params, batch_stats, images uint8 [B, H, W, C]) its logits [B, K], and update, of the same arguments, the
    batch statistics after a batch in training.
    """

    optimizer: optimizers.Optimizer
    num_data: float
    init: Callable
    normalise: Callable
    apply: Callable
    update: Callable

    def state_shapes(self):
        """What `init` returns, as jax.ShapeDtypeStructs."""
        return jax.eval_shape(self.init, jax.random.key(0, impl='threefry2x32'))

    def probs(self, params, batch_stats, parts, batch_size):
        """Class probabilities, float64 [N, K] on the host, of images in parts as from feeds.parts."""

        def logits(images):
            return posteriors.logits(self.apply, params, batch_stats, images, batch_size)

        return metrics.softmax(feeds.over_parts(logits, parts))


class Keys(NamedTuple):
    """The independent keys of a run's first state, of its batches and of test.py's posterior samples."""

    init: jax.Array
    batches: jax.Array
    samples: jax.Array


@partial(jax.jit, static_argnames='seed')
def keys(seed):
    """The Keys of --randomseed. Compiled with it, as no transfer to a device is to be implicit."""
    return Keys(*jax.random.split(jax.random.key(seed, impl='threefry2x32'), 3))


def create(config):
    """The Experiment of a configuration {'flags': ..., 'dataset': data.describe(...)}. Raises models.ModelError.

    Those that differ in nothing that it depends on, as in seeds, have the same one, which is compiled once.
    """
    flags, dataset = config['flags'], config['dataset']
    num_data = dataset['num_train'] * flags['dafactor']
    model = models.create(flags['model'], dataset['num_classes'])
    arguments = tuple(_arguments(flags, num_data, dataset['num_train']).items())
    shape, mean, std = (tuple(dataset[name]) for name in ('image_shape', 'mean', 'std'))
    return _create(model, flags['precision'], flags['optim'], arguments, num_data, shape, mean, std)


@cache
def _create(model, precision, optim, arguments, num_data, image_shape, mean, std):
    dtype = jnp.dtype(precision)
    optimizer = optimizers.OPTIMIZERS[optim](training.loss_function(model, dtype), **dict(arguments))
    normalise = partial(data.normalise, mean=mean, std=std)

    def init(key):
        weights_key, state_key = jax.random.split(key)
        variables = model.init(weights_key, jnp.zeros((1, *image_shape)), train=False)
        return optimizer.init(variables['params'], variables.get('batch_stats', {}), state_key)

    def apply(params, batch_stats, images):
        logits, _ = models.apply(model, params, batch_stats, normalise(images), train=False, dtype=dtype)
        return logits

    def update(params, batch_stats, images):
        _, batch_stats = models.apply(model, params, batch_stats, normalise(images), train=True, dtype=dtype)
        return batch_stats

    return Experiment(optimizer, num_data, init, normalise, apply, update)


# Arguments of optimizers whose flags have the names of the reference.
FLAGS_OF_ARGUMENTS = {
    'learning_rate': 'alpha',
    'num_sub_batches': 'batchsplit',
    'num_samples': 'trainmc',
    'initial_precision': 'custominit',
    'initial_hessian': 'hessinit',
}


def _arguments(flags, num_data, num_train):
    """Those of the row of optimizers.OPTIMIZERS that the flags name, but for the loss."""
    steps = num_train // flags['batchsize']
    values = flags | {argument: flags[flag] for argument, flag in FLAGS_OF_ARGUMENTS.items()}
    values |= {
        'weight_decay': flags['priorprec'] / num_data,
        'num_data': num_data,
        'atonce': at_once(flags),
        'clip': math.inf if flags['clip'] is None else flags['clip'],
        'swagstart': steps * (_first_constant_epoch(flags) + 1),
        'swagevery': steps,
    }
    names = inspect.signature(optimizers.OPTIMIZERS[flags['optim']]).parameters
    return {name: values[name] for name in names if name != 'loss'}


def at_once(flags):
    """How many sub-batches are computed together: by default all, but one on CPUs, whose caches hold no more."""
    sub_batches = (flags['batchsplit'] or 1) * (flags['trainmc'] or 1)
    return flags['atonce'] or (1 if jax.default_backend() == 'cpu' else sub_batches)


def lr_factor(flags, epoch):
    """The learning rate of an epoch, relative to alpha; SWAG's is constant in its last epochs."""
    if flags['swagstart'] is not None and epoch >= _first_constant_epoch(flags):
        return flags['swagrate']
    return optimizers.lr_factor(epoch, flags['epochs'], flags['warmup'])


def _first_constant_epoch(flags):
    return training_flags.first_constant_epoch(flags['epochs'], flags['swagstart'] or 0)
