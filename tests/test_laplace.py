"""The Laplace approximation of a last layer: its samples against the Hessian from JAX, and the features it reads."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.tree_util import Partial

import models
from evaluation import laplace

FEATURES = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)


def outputs_of(head):
    def outputs(head, images):
        features = jnp.asarray(FEATURES)[images]
        return features @ head['kernel'] + head['bias'][None], features

    return Partial(outputs, head)


def test_covariance_is_that_of_the_hessian_where_it_factorises(x64):
    """With zero weights, all images have the same probabilities. Then A ⊗ B equals the Hessian."""
    head = {'kernel': jnp.zeros((2, 3)), 'bias': jnp.zeros(3)}
    factors = laplace.fit(outputs_of(head), np.arange(6), batch_size=4, num_data=60, prior_precision=2.0)

    def loss(weights):
        head = {'kernel': weights[:-1], 'bias': weights[-1]}
        logits, _ = outputs_of(head)(np.arange(6))
        return -60 * jax.nn.log_softmax(logits)[:, 0].mean() + jnp.square(weights).sum()

    hessian = jax.jit(jax.hessian(loss))(jnp.zeros((3, 3))).reshape(9, 9)
    draw = jax.jit(jax.vmap(partial(laplace.sample, ('head',), factors, {'head': head, 'other': jnp.ones(1)})))
    drawn = draw(jax.random.split(jax.random.key(0), 60_000))
    weights = np.concatenate([drawn['head']['kernel'], drawn['head']['bias'][:, None]], axis=1).reshape(-1, 9)
    expected = np.linalg.inv(hessian)
    np.testing.assert_allclose(np.cov(weights.T), expected, atol=0.02 * np.abs(expected).max())
    assert (drawn['other'] == 1).all()


def test_draws_do_not_depend_on_eigenvectors_of_equal_eigenvalues():
    """Two Factors describe the same covariance. Their last three eigenvectors, with equal deviations, are rotated."""
    rng = np.random.default_rng(0)
    features, classes, turn = (np.linalg.qr(rng.normal(size=(n, n)))[0].astype(np.float32) for n in (5, 3, 3))
    deviations = rng.uniform(0.1, 1, (5, 3)).astype(np.float32)
    deviations[2:] = deviations[2]
    turned = np.concatenate([features[:, :2], features[:, 2:] @ turn], axis=1)
    params = {'head': {'kernel': jnp.zeros((4, 3)), 'bias': jnp.zeros(3)}}
    draws = [
        laplace.sample(('head',), laplace.Factors(vectors, classes, deviations), params, jax.random.key(0))['head']
        for vectors in (features, turned)
    ]
    for name in ('kernel', 'bias'):
        np.testing.assert_allclose(draws[0][name], draws[1][name], atol=1e-5)
    assert np.abs(draws[0]['kernel']).max() > 0.1


@pytest.mark.parametrize('name', ['mlp', 'lenet', 'resnet18'])
def test_features_enter_the_last_layer(name, small_resnet18):
    model = models.create(name, 10)
    images = np.random.default_rng(0).standard_normal((3, 32, 32, 1), np.float32)
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(1), images)
    run = lambda images: model.apply(variables, images, train=False)  # noqa: E731
    apply, (layer,) = models.with_features(run), models.last_layer(run, images)
    logits, features = jax.jit(apply)(images)
    head = variables['params'][layer]
    np.testing.assert_allclose(features @ head['kernel'] + head['bias'][None], logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('layers', [0, 1])
def test_networks_without_a_last_layer_that_has_a_bias(layers):
    dense = nn.Dense(2, use_bias=False)
    variables = dense.init(jax.random.key(0), jnp.ones((1, 3)))
    run = (lambda x: dense.apply(variables, x)) if layers else (lambda x: x)
    with pytest.raises(models.ModelError, match=r'last layer is an nn\.Dense with a bias'):
        models.last_layer(run, jnp.ones((1, 3)))
