"""Trains a convolutional network on scikit-learn's digits, with Equinox and bSAM."""

import equinox as eqx
import jax
import numpy as np
import optax
from bayesian_sam import bsam
from sklearn import datasets, model_selection

layers = [
    eqx.nn.Conv2d(1, 16, 3, padding='SAME', key=jax.random.key(0)),
    eqx.nn.BatchNorm(16, axis_name='batch', momentum=0.9, mode='batch'),
    eqx.nn.Lambda(lambda x: eqx.nn.MaxPool2d(2, 2)(jax.nn.relu(x)).ravel()),
    eqx.nn.Linear(256, 10, key=jax.random.key(1)),
]
network, batch_stats = eqx.nn.make_with_state(eqx.nn.Sequential)(layers)
params, static = eqx.partition(network, eqx.is_inexact_array)


def loss(params, batch_stats, batch):
    x, y = batch
    logits, batch_stats = jax.vmap(eqx.combine(params, static), (0, None), (0, None), axis_name='batch')(x, batch_stats)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), batch_stats


x, y = datasets.load_digits(return_X_y=True)
x, test_x, y, test_y = model_selection.train_test_split(x.reshape(-1, 1, 8, 8) / 16, y, test_size=360, random_state=0)
optimizer = bsam(loss, learning_rate=0.5, weight_decay=1e-3, rho=0.01, num_data=len(x), num_sub_batches=5)
state = optimizer.init(params, batch_stats, key=jax.random.key(2))
step, sample = jax.jit(optimizer.step, donate_argnums=0), jax.jit(optimizer.sample)
for epoch in range(10):
    for rows in np.random.default_rng(epoch).permutation(len(x))[:1400].reshape(-1, 50):
        state, value = step(state, (x[rows], y[rows]))
draws = [state.params, *(sample(state, key) for key in jax.random.split(jax.random.key(3), 8))]
networks = [eqx.nn.inference_mode(eqx.combine(draw, static)) for draw in draws]
logits = [jax.vmap(network, (0, None))(test_x, state.batch_stats)[0] for network in networks]
mean, *samples = jax.nn.softmax(np.stack(logits))
for name, probs in {'mean': mean, 'average of 8 samples': np.mean(samples, axis=0)}.items():
    print(f'{name}: {np.mean(probs.argmax(axis=1) == test_y):.1%} of the test images are correct')
