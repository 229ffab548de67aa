"""Training: the loss of a network, an epoch on the device, the jitted step."""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import data
import feeds
import models
from ops import sharding


class Epoch(NamedTuple):
    """An epoch on the device: its batches, int [steps, B], its key, the steps done and the sum of their losses."""

    batches: jax.Array
    key: jax.Array
    step: jax.Array
    loss: jax.Array


@partial(jax.jit, static_argnames=('num_images', 'batch_size'))
def start_epoch(key, epoch, num_images, batch_size):
    """Epoch number `epoch` of a run: the same key and number give the same batches and augmentation."""
    order_key, augment_key = jax.random.split(jax.random.fold_in(key, epoch))
    batches = data.shuffled_batches(order_key, num_images, batch_size)
    return Epoch(batches, augment_key, step=jnp.zeros((), jnp.int32), loss=jnp.zeros(()))


def loss_function(model, dtype):
    """An optimizer's loss: the mean negative log-likelihood of a batch (images float [B, H, W, C], labels int [B])."""

    def loss(params, batch_stats, batch):
        images, labels = batch
        logits, batch_stats = models.apply(model, params, batch_stats, images, train=True, dtype=dtype)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), batch_stats

    return loss


@jax.jit
def all_finite(arrays):
    """Whether every float in a pytree of arrays is a finite number; as one array, to compile sooner."""
    floats = [leaf for leaf in jax.tree.leaves(arrays) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.isfinite(ravel_pytree(floats)[0]).all()


@cache
def step_function(optimizer, normalise, augmented=False, choose=feeds.Resident.choose):
    """The jitted step(state, epoch, images, labels, lr_factor) -> (state, epoch, loss), which reuses the first two.

    choose(epoch, images, labels) returns the step's batch, images uint8 [B, H, W, C] and labels int [B]: of all images,
    which stay on the device, or what was sent for the step. normalise(images) returns what the network takes.
    """

    @partial(jax.jit, donate_argnames=('state', 'epoch'))
    def step(state, epoch, images, labels, lr_factor):
        images, labels = choose(epoch, images, labels)
        if augmented:
            images = data.augment(jax.random.fold_in(epoch.key, epoch.step), images)
        # Made once: XLA would augment them again for every window of the first convolution.
        batch = jax.lax.optimization_barrier((normalise(images), labels))
        state, loss = optimizer.step(state, batch, lr_factor)
        state = jax.tree.map(sharding.gather, state)
        return state, epoch._replace(step=epoch.step + 1, loss=epoch.loss + loss), loss

    return step
