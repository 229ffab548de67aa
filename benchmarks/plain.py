"""ResNet-18 and ResNet-20-FRN in plain Flax, as a reader of Flax's documentation would write them.

The layers and numbers of weights are those of models.py. Runs on every JAX since 0.5.3, so this module imports nothing
of ours.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn


class ResNet18(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images, train):
        conv = partial(nn.Conv, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.relu(norm()(conv(64, (3, 3))(images)))
        for features in (64, 128, 256, 512):
            for block in range(2):
                stride = 2 if block == 0 and features > 64 else 1
                y = nn.relu(norm()(conv(features, (3, 3), stride)(x)))
                y = norm()(conv(features, (3, 3))(y))
                if x.shape != y.shape:
                    x = norm()(conv(features, (1, 1), stride)(x))
                x = nn.relu(x + y)
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))


class ConvFRN(nn.Module):
    features: int
    size: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.features, (self.size, self.size), self.stride)(x)
        shape = 1, 1, 1, self.features
        scale = self.param('scale', nn.initializers.ones, shape)
        bias, threshold = (self.param(name, nn.initializers.zeros, shape) for name in ('bias', 'threshold'))
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=(1, 2), keepdims=True) + 1e-6)
        return jnp.maximum(scale * x + bias, threshold)


class ResNet20(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images, train):
        x = ConvFRN(16)(images)
        for features in (16, 32, 64):
            for block in range(3):
                stride = 2 if block == 0 and features > 16 else 1
                y = ConvFRN(features)(ConvFRN(features, stride=stride)(x))
                x = (x if x.shape == y.shape else ConvFRN(features, size=1, stride=stride)(x)) + y
        x = nn.avg_pool(x, (8, 8), (8, 8))
        return nn.Dense(self.num_classes)(x.reshape(len(x), -1))


NETWORKS = {'resnet18': ResNet18, 'resnet20': ResNet20}


def init(network, images):
    """Returns the initial params and batch statistics, {} without batch normalisation, for images [B, H, W, C]."""
    variables = jax.jit(lambda x: network.init(jax.random.key(0), x, train=False))(images[:1])
    return variables['params'], variables.get('batch_stats', {})


def loss_function(network):
    """Returns loss(params, batch_stats, batch) -> (mean negative log-likelihood, new batch statistics)."""

    def loss(params, batch_stats, batch):
        images, labels = batch
        variables = {'params': params, 'batch_stats': batch_stats}
        logits, updates = network.apply(variables, images, train=True, mutable=['batch_stats'])
        value = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return value, updates.get('batch_stats', batch_stats)

    return loss
