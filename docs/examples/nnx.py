"""Trains a convolutional network on scikit-learn's digits, with Flax NNX and bSAM."""

import jax
import numpy as np
import optax
from bayesian_sam import bsam
from flax import nnx
from sklearn import datasets, model_selection

rngs = nnx.Rngs(0)
network = nnx.Sequential(
    nnx.Conv(1, 16, (3, 3), rngs=rngs),
    nnx.BatchNorm(16, momentum=0.9, rngs=rngs),
    lambda x: nnx.max_pool(nnx.relu(x), (2, 2), (2, 2)).reshape(len(x), -1),
    nnx.Linear(256, 10, rngs=rngs),
)
graph, params, batch_stats = nnx.split(network, nnx.Param, nnx.BatchStat)


def loss(params, batch_stats, batch):
    x, y = batch
    network = nnx.merge(graph, params, batch_stats, copy=True)
    value = optax.softmax_cross_entropy_with_integer_labels(network(x), y).mean()
    return value, nnx.state(network, nnx.BatchStat)


x, y = datasets.load_digits(return_X_y=True)
x, test_x, y, test_y = model_selection.train_test_split(x.reshape(-1, 8, 8, 1) / 16, y, test_size=360, random_state=0)
optimizer = bsam(loss, learning_rate=0.5, weight_decay=1e-3, rho=0.01, num_data=len(x), num_sub_batches=5)
state = optimizer.init(params, batch_stats, key=jax.random.key(1))
step, sample = jax.jit(optimizer.step, donate_argnums=0), jax.jit(optimizer.sample)
for epoch in range(10):
    for rows in np.random.default_rng(epoch).permutation(len(x))[:1400].reshape(-1, 50):
        state, value = step(state, (x[rows], y[rows]))
draws = [state.params, *(sample(state, key) for key in jax.random.split(jax.random.key(2), 8))]
logits = [nnx.view(nnx.merge(graph, draw, state.batch_stats), use_running_average=True)(test_x) for draw in draws]
mean, *samples = jax.nn.softmax(np.stack(logits))
for name, probs in {'mean': mean, 'average of 8 samples': np.mean(samples, axis=0)}.items():
    print(f'{name}: {np.mean(probs.argmax(axis=1) == test_y):.1%} of the test images are correct')
