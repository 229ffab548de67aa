"""Trains a convolutional network on scikit-learn's digits, with Flax linen and bSAM."""

import jax
import numpy as np
import optax
from bayesian_sam import bsam
from flax import linen as nn
from sklearn import datasets, model_selection


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(16, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10)(nn.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1))


def loss(params, batch_stats, batch):
    x, y = batch
    logits, new = network.apply({'params': params, 'batch_stats': batch_stats}, x, train=True, mutable='batch_stats')
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new['batch_stats']


x, y = datasets.load_digits(return_X_y=True)
x, test_x, y, test_y = model_selection.train_test_split(x.reshape(-1, 8, 8, 1) / 16, y, test_size=360, random_state=0)
network = Network()
variables = network.init(jax.random.key(0), x[:1], train=True)
optimizer = bsam(loss, learning_rate=0.5, weight_decay=1e-3, rho=0.01, num_data=len(x), num_sub_batches=5)
state = optimizer.init(variables['params'], variables['batch_stats'], key=jax.random.key(1))
step, sample = jax.jit(optimizer.step, donate_argnums=0), jax.jit(optimizer.sample)
for epoch in range(10):
    for rows in np.random.default_rng(epoch).permutation(len(x))[:1400].reshape(-1, 50):
        state, value = step(state, (x[rows], y[rows]))
draws = [state.params, *(sample(state, key) for key in jax.random.split(jax.random.key(2), 8))]
logits = [network.apply({'params': draw, 'batch_stats': state.batch_stats}, test_x, train=False) for draw in draws]
mean, *samples = jax.nn.softmax(np.stack(logits))
for name, probs in {'mean': mean, 'average of 8 samples': np.mean(samples, axis=0)}.items():
    print(f'{name}: {np.mean(probs.argmax(axis=1) == test_y):.1%} of the test images are correct')
