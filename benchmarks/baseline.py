"""bSAM as the published scripts formulate it, rewritten as the yardstick of benchmarks/run.py and benchmarks/peers.py.

- bSAM uses `vmap` over sub-batches, and draws noise for every leaf separately.
- The loss is fetched after every step.
- Images are augmented on the host, and each batch is sent to the device.
- Evaluation runs without `jit`.
- AUROC is a loop over thresholds.

The networks are plain Flax. This module runs on JAX 0.5.3 too, the last version that ran the published code:

    OTHER_PYTHON benchmarks/baseline.py MODEL IMAGES SUB_BATCHES DESCRIPTOR

takes a step each time the other end of a pipe asks for it. `peers.Elsewhere` starts it.
"""

import contextlib
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import plain


def bsam_step(loss, *, alpha, beta1, beta2, weight_decay, rho, batchsplit, num_data, damping):
    """Returns a jitted step(params, momentum, precision, batch_stats, key, batch).

    The step returns the new params, momentum, precision, batch_stats and key, and the loss.

    Args:
        loss: a function (params, batch_stats, batch) -> (loss, batch_stats).
        alpha: the learning rate α.
        beta1: decay of the momentum.
        beta2: decay of the precision.
        weight_decay: δ = prior precision / N.
        rho: the size ρ of the perturbation.
        batchsplit: number of sub-batches.
        num_data: N.
        damping: γ.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def noise_like(key, params):
        leaves, structure = tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        return tree.unflatten(
            structure, [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
        )

    @jax.jit
    def step(params, momentum, precision, batch_stats, key, batch):
        def of_sub_batch(key, sub_batch):
            noise = noise_like(key, params)
            sampled = tree.map(lambda w, e, s: w + e / jnp.sqrt(num_data * s), params, noise, precision)
            (_, stats), g = value_and_grad(sampled, batch_stats, sub_batch)
            perturbed = tree.map(lambda w, g, s: w + rho * g / s, params, g, precision)
            (value, stats), g_perturbed = value_and_grad(perturbed, stats, sub_batch)
            return value, stats, g_perturbed, tree.map(lambda s, g: jnp.sqrt(s) * jnp.abs(g), precision, g)

        key, noise_key = jax.random.split(key)
        sub_batches = tree.map(lambda x: x.reshape(batchsplit, -1, *x.shape[1:]), batch)
        results = jax.vmap(of_sub_batch)(jax.random.split(noise_key, batchsplit), sub_batches)
        value, g, magnitude = (tree.map(lambda x: x.mean(axis=0), results[i]) for i in (0, 2, 3))
        stats = tree.map(lambda x: x[0], results[1])
        momentum = tree.map(lambda m, g, w: beta1 * m + (1 - beta1) * (g + weight_decay * w), momentum, g, params)
        params = tree.map(lambda w, m, s: w - alpha * m / s, params, momentum, precision)
        precision = tree.map(lambda s, h: beta2 * s + (1 - beta2) * (h + damping + weight_decay), precision, magnitude)
        return params, momentum, precision, stats, key, value

    return step


def stepper(model, batch_size, batchsplit):
    """Returns a function that takes bSAM's step of the first state on one synthetic batch, and returns the loss.

    Args:
        model: a name in plain.NETWORKS.
        batch_size: images in the batch.
        batchsplit: number of sub-batches.
    """
    rng = np.random.default_rng(0)
    batch = jax.device_put(
        (rng.normal(size=(batch_size, 32, 32, 3)).astype(np.float32), rng.integers(0, 10, batch_size))
    )
    network = plain.NETWORKS[model](10)
    params, batch_stats = plain.init(network, batch[0])
    step = bsam_step(
        plain.loss_function(network), alpha=0.01, beta1=0.9, beta2=0.999, weight_decay=5e-4, rho=0.01,
        batchsplit=batchsplit, num_data=50_000, damping=0.1,
    )  # fmt: skip
    zeros, ones = tree.map(jnp.zeros_like, params), tree.map(jnp.ones_like, params)
    return lambda: float(step(params, zeros, ones, batch_stats, jax.random.key(0), batch)[-1])


def host_batch(rng, images, labels, batch_size, mean, std):
    """Draws a random batch, augments and normalises its images one by one on the host, and sends it to the device.

    Args:
        rng: a NumPy generator.
        images: uint8 [N, H, W, C].
        labels: int [N].
        batch_size: number of images to draw.
        mean, std: [C], to normalise by.

    Returns:
        images float [batch_size, H, W, C] and labels [batch_size], on the device.
    """
    chosen = rng.choice(len(images), batch_size, replace=False)
    batch = np.empty((batch_size, *images.shape[1:]), np.float32)
    for i, image in enumerate(images[chosen]):
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
        y, x = rng.integers(0, 9, 2)
        crop = padded[y : y + image.shape[0], x : x + image.shape[1]]
        batch[i] = crop[:, ::-1] if rng.random() < 0.5 else crop
    return jax.device_put(((batch / 255 - mean) / std, labels[chosen]))


def logits(model, variables, images, batch_size):
    """Returns logits [N, classes] of images float [N, H, W, C]. Computes them in batches, without `jit`."""
    batches = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    return np.concatenate([model.apply(variables, batch, train=False) for batch in batches])


def auroc(probs, labels):
    """Returns the grid AUROC of probs [N, classes], by a loop over 2,499 thresholds.

    The arrays have another shape at each threshold.
    """
    confidence, correct = jnp.max(probs, axis=1), jnp.argmax(probs, axis=1) == labels
    points = [(0.0, 0.0)]
    for threshold in np.arange(2499, 0, -1) / 2500:
        chosen = correct[confidence >= threshold]
        points.append((float((~chosen).sum()), float(chosen.sum())))
    false_positives, true_positives = np.array(points).T
    return np.trapezoid([*(true_positives / correct.sum()), 1], [*(false_positives / (~correct).sum()), 1])


def serve(model, batch_size, batchsplit, connection):
    """Sends the version of JAX, then the loss of a step whenever the other end sends a message."""
    step = stepper(model, batch_size, batchsplit)
    connection.send(jax.__version__)
    with contextlib.suppress(EOFError):  # at the end of the other process
        while True:
            connection.recv()
            connection.send(step())


if __name__ == '__main__':
    batch_size, batchsplit, descriptor = map(int, sys.argv[2:])
    serve(sys.argv[1], batch_size, batchsplit, Connection(descriptor))
