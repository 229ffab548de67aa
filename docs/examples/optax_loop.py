"""Trains a convolutional network on scikit-learn's digits, with Flax linen and Optax."""

import jax
import numpy as np
import optax
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


@jax.jit
def step(params, batch_stats, opt_state, batch):
    (value, batch_stats), grads = jax.value_and_grad(loss, has_aux=True)(params, batch_stats, batch)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), batch_stats, opt_state, value


x, y = datasets.load_digits(return_X_y=True)
x, test_x, y, test_y = model_selection.train_test_split(x.reshape(-1, 8, 8, 1) / 16, y, test_size=360, random_state=0)
network = Network()
variables = network.init(jax.random.key(0), x[:1], train=True)
params, batch_stats = variables['params'], variables['batch_stats']
optimizer = optax.sgd(0.05, momentum=0.9)
opt_state = optimizer.init(params)
for epoch in range(10):
    for rows in np.random.default_rng(epoch).permutation(len(x))[:1400].reshape(-1, 50):
        params, batch_stats, opt_state, value = step(params, batch_stats, opt_state, (x[rows], y[rows]))
logits = network.apply({'params': params, 'batch_stats': batch_stats}, test_x, train=False)
print(f'{np.mean(logits.argmax(axis=1) == test_y):.1%} of the test images are correct')
