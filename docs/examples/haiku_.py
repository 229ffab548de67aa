"""Trains a convolutional network on scikit-learn's digits, with Haiku and bSAM."""

import haiku as hk
import jax
import numpy as np
import optax
from bayesian_sam import bsam
from sklearn import datasets, model_selection


@hk.without_apply_rng
@hk.transform_with_state
def network(x, train):
    x = hk.Conv2D(16, 3)(x)
    x = jax.nn.relu(hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, train))
    return hk.Linear(10)(hk.max_pool(x, (2, 2, 1), (2, 2, 1), 'VALID').reshape(len(x), -1))


def loss(params, batch_stats, batch):
    x, y = batch
    logits, batch_stats = network.apply(params, batch_stats, x, train=True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), batch_stats


x, y = datasets.load_digits(return_X_y=True)
x, test_x, y, test_y = model_selection.train_test_split(x.reshape(-1, 8, 8, 1) / 16, y, test_size=360, random_state=0)
params, batch_stats = network.init(jax.random.key(0), x[:1], train=True)
optimizer = bsam(loss, learning_rate=0.5, weight_decay=1e-3, rho=0.01, num_data=len(x), num_sub_batches=5)
state = optimizer.init(params, batch_stats, key=jax.random.key(1))
step, sample = jax.jit(optimizer.step, donate_argnums=0), jax.jit(optimizer.sample)
for epoch in range(10):
    for rows in np.random.default_rng(epoch).permutation(len(x))[:1400].reshape(-1, 50):
        state, value = step(state, (x[rows], y[rows]))
draws = [state.params, *(sample(state, key) for key in jax.random.split(jax.random.key(2), 8))]
logits = [network.apply(draw, state.batch_stats, test_x, train=False)[0] for draw in draws]
mean, *samples = jax.nn.softmax(np.stack(logits))
for name, probs in {'mean': mean, 'average of 8 samples': np.mean(samples, axis=0)}.items():
    print(f'{name}: {np.mean(probs.argmax(axis=1) == test_y):.1%} of the test images are correct')
