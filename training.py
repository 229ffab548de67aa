"""Training: the loss of a network, the jitted step, an epoch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class Progress(NamedTuple):
    """How far an epoch is, on the device: the number of steps done and the sum of their losses."""

    step: jax.Array
    loss: jax.Array


def loss_function(model):
    """An optimizer's loss: the mean negative log-likelihood of a batch (images float [B, H, W, C], labels int [B])."""

    def loss(params, batch_stats, batch):
        images, labels = batch
        variables = {'params': params, 'batch_stats': batch_stats}
        logits, updates = model.apply(variables, images, train=True, mutable=['batch_stats'])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updates.get('batch_stats', {})

    return loss


def step_function(optimizer, prepare):
    """One training step, jitted; the state and the progress are donated.

    prepare(key, images uint8 [B, H, W, C]) augments and normalises. A step picks its batch from all images by its
    number, so that nothing is sent to the device for it.
    """

    def step(state, progress, images, labels, batches, key, lr_factor):
        indices = batches[progress.step]
        batch = prepare(jax.random.fold_in(key, progress.step), images[indices]), labels[indices]
        state, loss = optimizer.step(state, batch, lr_factor)
        return state, Progress(progress.step + 1, progress.loss + loss)

    return jax.jit(step, donate_argnums=(0, 1))


def train_epoch(step, state, images, labels, batches, key, lr_factor, report):
    """Goes through `batches`, int [steps, B]; report(steps done, progress) is called after every step.

    Returns the new state and the mean loss of the steps, a float.
    """
    progress = Progress(jnp.zeros((), jnp.int32), jnp.zeros(()))
    lr_factor = jax.device_put(jnp.float32(lr_factor))
    for i in range(len(batches)):
        state, progress = step(state, progress, images, labels, batches, key, lr_factor)
        report(i + 1, progress)
    mean_loss = float(progress.loss) / len(batches)  # waits until the device has done the epoch
    return state, mean_loss
