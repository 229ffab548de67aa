"""The optimizers in somebody else's loop: losses, schedules, dtypes and transformations of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimizers
from conftest import slow_except

COMMON = {'learning_rate': 0.05, 'weight_decay': 0.01}
SETTINGS = {
    'sgd': {},
    'sam': {'rho': 0.05, 'num_sub_batches': 2},
    'bsam': {'rho': 0.01, 'num_sub_batches': 2, 'num_data': 100},
    'adam': {},
    'adamw': {},
    'samadam': {'rho': 0.05, 'num_sub_batches': 2},
    'asam': {'rho': 0.05, 'eta': 0.01, 'num_sub_batches': 2},
    'swag': {'swagstart': 2, 'swagevery': 1, 'swagrank': 2},
    'ivon': {'num_data': 100, 'initial_hessian': 0.5, 'num_sub_batches': 2},
}
BATCH = jnp.linspace(-1, 1, 24).reshape(8, 3), jnp.arange(8.0)
ALL = pytest.mark.parametrize('name', optimizers.OPTIMIZERS)
SOME = pytest.mark.parametrize('name', slow_except(optimizers.OPTIMIZERS, 'sam', 'bsam', 'swag', 'ivon'))


def linear_loss(params, batch):
    x, y = batch
    return jnp.mean((x @ params['w'] + params['b'] - y) ** 2)


def create(name, loss=linear_loss, **changes):
    return optimizers.OPTIMIZERS[name](loss, **COMMON | SETTINGS[name] | changes)


def weights(dtype=jnp.float32):
    return {'w': jnp.array([0.5, -0.3, 0.1], dtype), 'b': jnp.array(0.2, dtype)}


def trained(optimizer, params=None, steps=4, batch=BATCH, batch_stats=None):
    state, step = optimizer.init(params or weights(), batch_stats, jax.random.key(0)), jax.jit(optimizer.step)
    for _ in range(steps):
        state, _ = step(state, batch)
    return state


def assert_equal(one, other, **tolerance):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), **tolerance)


@ALL
def test_loss_with_and_without_batch_statistics(name):
    """A loss that carries nothing gives the same weights as a loss with empty batch statistics."""
    with_statistics = create(name, lambda params, batch_stats, batch: (linear_loss(params, batch), batch_stats))
    assert_equal(trained(create(name)).params, trained(with_statistics, batch_stats={}).params, rtol=1e-6)


@ALL
def test_other_outputs_of_the_loss(name):
    """They are in the state, from the first sub-batch."""

    def loss(params, outputs, batch):
        return linear_loss(params, batch), {'largest': batch[1].max()}

    optimizer = create(name, loss)
    state, _ = optimizer.step(optimizer.init(weights(), {'largest': 0.0}, jax.random.key(0)), BATCH)
    assert state.batch_stats['largest'] == (3 if 'num_sub_batches' in SETTINGS[name] else 7)


@pytest.mark.parametrize(
    ('loss', 'batch_stats', 'message'),
    [
        (lambda params, batch: (0.0, {}), None, 'returned a tuple: pass batch_stats to init'),
        (lambda params, batch_stats, batch: 0.0, {}, r'must return \(value, batch_stats\)'),
    ],
)
def test_losses_that_do_not_fit(loss, batch_stats, message):
    optimizer = create('bsam', loss)
    with pytest.raises(TypeError, match=message):
        optimizer.step(optimizer.init(weights(), batch_stats, jax.random.key(0)), BATCH)


@ALL
def test_schedule_of_optax(name):
    """A schedule gives the weights of a loop that passes the same rates as factors."""
    schedule = optax.cosine_decay_schedule(0.05, 6)
    by_schedule = trained(create(name, learning_rate=schedule))
    assert by_schedule.count == 4
    optimizer = create(name, learning_rate=1.0)
    state = optimizer.init(weights(), key=jax.random.key(0))
    for i in range(4):
        state, _ = optimizer.step(state, BATCH, schedule(i))
    assert_equal(by_schedule.params, state.params, rtol=1e-5)


@ALL
def test_weights_of_low_precision(name):
    """Weights stay bfloat16, the optimizer's state is float32, and training is close to training in float32."""
    state = trained(create(name), weights(jnp.bfloat16))
    stepped = state.iterate if name == 'swag' else state.params
    assert {leaf.dtype.name for leaf in jax.tree.leaves(stepped)} == {'bfloat16'}
    others = state._replace(**{'iterate' if name == 'swag' else 'params': None}, key=None)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(others)} <= {'float32', 'int32'}
    assert_equal(state.params, trained(create(name)).params, atol=0.05)
    sampled = create(name).sample(state, jax.random.key(1))
    assert [leaf.dtype for leaf in jax.tree.leaves(sampled)] == [leaf.dtype for leaf in jax.tree.leaves(state.params)]


@ALL
def test_none_among_the_weights(name):
    params = weights() | {'absent': None}
    state = trained(create(name), params)
    assert state.params['absent'] is None
    assert_equal(state.params, trained(create(name)).params | {'absent': None}, rtol=1e-6)


@pytest.mark.parametrize('leaf', [jnp.arange(3), jnp.ones(3, jnp.complex64), True])
def test_weights_that_are_not_floats(leaf):
    with pytest.raises(
        TypeError, match=r"parameter \['w'\] is (int32|complex64|bool): params take real floating-point"
    ):
        create('bsam').init({'w': leaf}, key=jax.random.key(0))


@pytest.mark.parametrize('arguments', [(), (jax.random.key(0),), ({}, 0)])
def test_key_is_required(arguments):
    """The second argument is batch_stats, so a key in its place is an error too."""
    with pytest.raises(TypeError, match=r'key=jax\.random\.key\(seed\)'):
        create('bsam').init(weights(), *arguments)


@SOME
def test_vmap_over_seeds(name):
    """Three runs at once have the weights of three runs one after another."""
    optimizer = create(name)
    keys = jax.random.split(jax.random.key(3), 3)
    states = jax.vmap(lambda key: optimizer.init(weights(), key=key))(keys)
    step = jax.jit(jax.vmap(optimizer.step, in_axes=(0, None)))
    for _ in range(3):
        states, _ = step(states, BATCH)
    alone = jax.jit(optimizer.step)
    for i, key in enumerate(keys):
        state = optimizer.init(weights(), key=key)
        for _ in range(3):
            state, _ = alone(state, BATCH)
        assert_equal(jax.tree.map(lambda x, i=i: x[i], states.params), state.params, rtol=1e-4, atol=1e-5)


@SOME
@pytest.mark.parametrize('learning_rate', [0.05, optax.cosine_decay_schedule(0.05, 6)])
def test_scan_over_steps(name, learning_rate):
    optimizer = create(name, learning_rate=learning_rate)
    batches = jax.tree.map(lambda x: jnp.broadcast_to(x, (4, *x.shape)), BATCH)
    state, values = jax.lax.scan(optimizer.step, optimizer.init(weights(), key=jax.random.key(0)), batches)
    assert values.shape == (4,)
    assert_equal(state.params, trained(optimizer).params, rtol=1e-5, atol=1e-6)


@SOME
@pytest.mark.parametrize('as_data', [False, True], ids=['keys', 'data of keys'])
def test_keys_of_dropout_in_the_batch(name, as_data):
    """Each sub-batch gets its own keys. Other keys give other weights."""

    def loss(params, batch):
        x, y, keys = batch
        key = jax.random.wrap_key_data(keys[0]) if as_data else keys[0]
        return linear_loss(params, (x * jax.random.bernoulli(key, 0.5, x.shape), y))

    optimizer = create(name, loss)
    results = []
    for seed in (0, 0, 1):
        keys = jax.random.split(jax.random.key(seed), 8)
        batch = (*BATCH, jax.random.key_data(keys) if as_data else keys)
        results.append(trained(optimizer, batch=batch).params['w'].tolist())
    assert results[0] == results[1] != results[2]


def test_norm_is_that_of_optax():
    """Bit for bit, on leaves of several sizes."""
    rng = np.random.default_rng(0)
    grads = {'a': rng.normal(size=(300, 7)), 'b': [rng.normal(size=5), rng.normal(size=())]}
    grads = jax.tree.map(jnp.float32, grads)
    for function in (lambda norm: norm, jax.jit):
        assert function(optimizers._norm)(grads) == function(optax.tree.norm)(grads)


def test_public_names():
    assert set(optimizers.OPTIMIZERS) < set(optimizers.__all__)
    assert all(hasattr(optimizers, name) for name in optimizers.__all__)
