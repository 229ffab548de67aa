"""The optimizers against closed forms, their equations in NumPy, optax, ivon-opt and the reference's own numbers."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import tree

import experiment
import optimizers
import reference

GOLDEN = np.load(Path(__file__).parent / 'golden' / 'optimizers.npz')
SETTINGS = {
    'sgd': {'learning_rate': 0.3, 'beta1': 0.9, 'weight_decay': 0.01},
    'sam': {'learning_rate': 0.3, 'beta1': 0.9, 'weight_decay': 0.01, 'rho': 0.05, 'num_sub_batches': 4},
    'bsam': {
        'learning_rate': 0.5,
        'beta1': 0.9,
        'beta2': 0.99,
        'weight_decay': 0.002,
        'rho': 0.02,
        'num_sub_batches': 4,
        'num_data': 200,
        'initial_precision': 1.0,
        'damping': 0.1,
    },
    'adam': {'learning_rate': 0.1, 'beta1': 0.8, 'beta2': 0.9, 'weight_decay': 0.03},
    'adamw': {'learning_rate': 0.1, 'beta1': 0.8, 'beta2': 0.9, 'weight_decay': 0.03},
    'samadam': {
        'learning_rate': 0.1,
        'beta1': 0.8,
        'beta2': 0.9,
        'weight_decay': 0.03,
        'rho': 0.2,
        'num_sub_batches': 4,
    },
    'asam': {'learning_rate': 0.3, 'beta1': 0.9, 'weight_decay': 0.01, 'rho': 0.5, 'eta': 0.01, 'num_sub_batches': 4},
    'swag': {'learning_rate': 0.3, 'beta1': 0.9, 'weight_decay': 0.01, 'swagstart': 2, 'swagevery': 1, 'swagrank': 3},
    'ivon': {
        'learning_rate': 0.4,
        'beta1': 0.8,
        'beta2': 0.9,
        'weight_decay': 0.03,
        'num_data': 60,
        'initial_hessian': 0.5,
        'num_sub_batches': 4,
        'num_samples': 2,
    },
}
IVON = np.load(Path(__file__).parent / 'golden' / 'ivon.npz')


def toy_loss(params, batch_stats, batch):
    """Returns the loss and the new batch statistics of the golden values' network."""
    x, y = batch
    hidden = jnp.tanh(x @ params['W1'] + params['b1'][None])
    logits = hidden @ params['W2'] + params['b2'][None]
    stats = {'mean': 0.9 * batch_stats['mean'] + 0.1 * hidden.mean(axis=0)}
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), stats


def logistic_loss(params, batch_stats, batch):
    """Returns the loss and stats of `reference.logistic_gradient`, in JAX."""
    x, y = batch
    score = x @ params
    return optax.sigmoid_binary_cross_entropy(score, y).mean(), 0.9 * batch_stats + 0.1 * score.mean()


def quadratic_loss(params, batch_stats, batch):
    """Returns |w|²/2 for any batch, and unchanged batch statistics."""
    return sum(jnp.sum(w**2) for w in tree.leaves(params)) / 2, batch_stats


def draw_known_noise(monkeypatch, key, noise):
    """Makes optimizers use this noise instead of random draws.

    Keys are derived as in the optimizers, and each draw is found by its key.

    Args:
        monkeypatch: pytest's fixture.
        key: the key of the initial state.
        noise: arrays [steps, draws per step, ...].
    """
    steps, draws = tree.leaves(noise)[0].shape[:2]
    keys = []
    for _ in range(steps):
        key, step_key = jax.random.split(key)
        keys.append(jax.random.key_data(jax.random.split(step_key, draws)))
    known = jnp.stack(keys)

    def lookup(key, params):
        matches = (known == jax.random.key_data(key)[None, None]).all(axis=2)
        drawn = jnp.unravel_index(jnp.argmax(matches), matches.shape)
        return tree.map(lambda n: jnp.asarray(n)[drawn], noise)

    monkeypatch.setattr(optimizers, '_normal_like', lookup)


@pytest.mark.parametrize(
    ('name', 'label', 'settings'),
    [
        ('sgd', 'sgd_m1', {}),
        *((name, f'{name}_m4', {'atonce': number}) for name in ('sam', 'bsam') for number in (1, 3, 4)),
    ],
)
def test_golden_values(name, label, settings, x64, monkeypatch):
    """Twelve steps equal the reference's update functions: weights, momentum, precision, statistics, losses.

    The number of sub-batches that are computed together does not matter.
    """
    steps, key = len(GOLDEN['lr']), jax.random.key(0)
    draw_known_noise(monkeypatch, key, {name: GOLDEN[f'noise_{name}'] for name in ('W1', 'b1', 'W2', 'b2')})
    optimizer = optimizers.OPTIMIZERS[name](toy_loss, **SETTINGS[name] | settings)
    params = {name: jnp.asarray(GOLDEN[f'w0_{name}']) for name in ('W1', 'b1', 'W2', 'b2')}
    state = optimizer.init(params, {'mean': jnp.zeros(5)}, key)
    step = jax.jit(optimizer.step)
    for t in range(steps):
        batch = jnp.asarray(GOLDEN['data_X'][t]), jnp.asarray(GOLDEN['data_y'][t])
        state, loss = step(state, batch, GOLDEN['lr'][t])
        for leaf in params:
            np.testing.assert_allclose(state.params[leaf], GOLDEN[f'{label}_w_{leaf}'][t], rtol=1e-10, atol=1e-14)
            np.testing.assert_allclose(state.momentum[leaf], GOLDEN[f'{label}_gm_{leaf}'][t], rtol=1e-9, atol=1e-13)
            if name == 'bsam':
                np.testing.assert_allclose(state.precision[leaf], GOLDEN[f'{label}_s_{leaf}'][t], rtol=1e-10)
        np.testing.assert_allclose(state.batch_stats['mean'], GOLDEN[f'{label}_netstate'][t], rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(loss, GOLDEN[f'{label}_loss'][t], rtol=1e-10)


@pytest.fixture
def problem():
    """Returns x [5, 12, 3], y [5, 12] and initial weights [3] of a logistic regression in float64."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 12, 3)), rng.integers(0, 2, size=(5, 12)).astype(float)
    return x, y, rng.normal(size=3)


def sub_batches(x, y, num_sub_batches):
    return list(zip(np.split(x, num_sub_batches), np.split(y, num_sub_batches), strict=True))


def test_sgd_equals_the_equations(problem, x64):
    x, y, w = problem
    optimizer = optimizers.sgd(logistic_loss, learning_rate=0.4, beta1=0.8, weight_decay=0.03)
    state = optimizer.init(jnp.asarray(w), jnp.zeros(()), jax.random.key(0))
    step = jax.jit(optimizer.step)
    m, stats = np.zeros(3), 0.0
    for t in range(5):
        state, loss = step(state, (x[t], y[t]), 0.5)
        w, m, stats, expected = reference.sgd_step(
            w, m, stats, (x[t], y[t]), reference.logistic_gradient, 0.2, 0.8, 0.03
        )
        np.testing.assert_allclose(state.params, w, rtol=1e-12)
        np.testing.assert_allclose([loss, state.batch_stats], [expected, stats], rtol=1e-12)


@pytest.mark.parametrize('num_sub_batches', [1, 3])
def test_sam_equals_the_equations(num_sub_batches, problem, x64):
    x, y, w = problem
    optimizer = optimizers.sam(
        logistic_loss, learning_rate=0.4, beta1=0.8, weight_decay=0.03, rho=0.2, num_sub_batches=num_sub_batches
    )
    state = optimizer.init(jnp.asarray(w), jnp.zeros(()), jax.random.key(0))
    step = jax.jit(optimizer.step)
    m, stats = np.zeros(3), 0.0
    for t in range(5):
        state, loss = step(state, (x[t], y[t]), 0.5)
        parts = sub_batches(x[t], y[t], num_sub_batches)
        w, m, stats, expected = reference.sam_step(
            w, m, stats, parts, reference.logistic_gradient, 0.2, 0.8, 0.03, rho=0.2
        )
        np.testing.assert_allclose(state.params, w, rtol=1e-12)
        np.testing.assert_allclose([loss, state.batch_stats], [expected, stats], rtol=1e-12)


@pytest.mark.parametrize('num_sub_batches', [1, 3])
def test_bsam_equals_the_equations(num_sub_batches, problem, x64):
    """The equations get the noise that the optimizer draws with the keys of the sub-batches."""
    x, y, w = problem
    settings = {'rho': 0.1, 'damping': 0.05, 'num_data': 60}
    optimizer = optimizers.bsam(
        logistic_loss,
        learning_rate=0.4,
        beta1=0.8,
        beta2=0.9,
        weight_decay=0.03,
        initial_precision=2.0,
        num_sub_batches=num_sub_batches,
        **settings,
    )
    state = optimizer.init(jnp.asarray(w), jnp.zeros(()), jax.random.key(7))
    step, draw = jax.jit(optimizer.step), jax.jit(optimizers._normal_like)
    m, s, stats = np.zeros(3), np.full(3, 2.0), 0.0
    for t in range(5):
        keys = jax.random.split(jax.random.split(state.key)[1], num_sub_batches)
        noises = [np.asarray(draw(key, state.params)) for key in keys]
        state, loss = step(state, (x[t], y[t]), 0.5)
        parts = sub_batches(x[t], y[t], num_sub_batches)
        w, m, s, stats, expected = reference.bsam_step(
            w, m, s, stats, parts, noises, reference.logistic_gradient, 0.2, 0.8, 0.9, 0.03, **settings
        )
        np.testing.assert_allclose(state.params, w, rtol=1e-12)
        np.testing.assert_allclose(state.precision, s, rtol=1e-12)
        np.testing.assert_allclose([loss, state.batch_stats], [expected, stats], rtol=1e-12)


@pytest.mark.parametrize('bnupdate', ['both', 'first', 'second'])
@pytest.mark.parametrize(('optim', 'perturbed'), [('sam', 1 + 0.1 / np.sqrt(2)), ('bsam', 1.1)])
def test_batch_statistics_move_where_they_should(optim, perturbed, bnupdate):
    """Each gradient doubles the statistics and adds the first weight.

    The weight is 1 at the first gradient, with hardly any noise, and `perturbed` at the second.
    """

    def loss(params, batch_stats, batch):
        return quadratic_loss(params, batch_stats, batch)[0], 2 * batch_stats + params[0]

    settings = {
        'learning_rate': 0.1,
        'beta1': 0.9,
        'weight_decay': 0.0,
        'rho': 0.1,
        'num_sub_batches': 1,
        'bnupdate': bnupdate,
    }
    if optim == 'bsam':
        settings |= {'beta2': 0.9, 'num_data': 1e20}
    optimizer = optimizers.OPTIMIZERS[optim](loss, **settings)
    state = optimizer.init(jnp.ones(2), jnp.zeros(()), jax.random.key(0))
    state, _ = jax.jit(optimizer.step)(state, jnp.zeros((2, 1)))
    expected = {'both': 2 + perturbed, 'first': 1, 'second': perturbed}[bnupdate]
    np.testing.assert_allclose(state.batch_stats, expected, rtol=1e-6)


def test_sam_gradient_of_a_quadratic(x64):
    """|w|²/2 has gradient w, so SAM's is w + ρ w/‖w‖ = (3, 4)·1.02. The norm is over both leaves."""
    optimizer = optimizers.sam(
        quadratic_loss, learning_rate=1.0, beta1=0.0, weight_decay=0.0, rho=0.1, num_sub_batches=2
    )
    state = optimizer.init({'a': jnp.array([3.0]), 'b': jnp.array(4.0)}, {}, jax.random.key(0))
    state, loss = jax.jit(optimizer.step)(state, jnp.zeros(4))
    np.testing.assert_allclose(state.momentum['a'], [3.06], rtol=1e-12)
    np.testing.assert_allclose(state.momentum['b'], 4.08, rtol=1e-12)
    np.testing.assert_allclose(loss, 25 * 1.02**2 / 2, rtol=1e-12)


@pytest.mark.parametrize('rho', [0.1, 5.0])
def test_sam_at_a_minimum_stays_there(rho):
    """The gradient is 0, and the equation of the perturbation gives 0/0."""
    optimizer = optimizers.sam(
        quadratic_loss, learning_rate=1.0, beta1=0.9, weight_decay=0.0, rho=rho, num_sub_batches=1
    )
    state, loss = jax.jit(optimizer.step)(optimizer.init(jnp.zeros(3), {}, jax.random.key(0)), jnp.zeros(1))
    assert np.array_equal(state.params, np.zeros(3)) and loss == 0


def test_bsam_precision_of_a_constant_gradient(x64):
    """ℓ = c·w has |g| = c everywhere, so s tends to the root of s = √s c + γ + δ from any initial value."""
    c = jnp.array([0.5, 2.0])
    optimizer = optimizers.bsam(
        lambda params, batch_stats, batch: (params @ c, batch_stats),
        learning_rate=0.0, beta1=0.9, beta2=0.9, weight_decay=0.02, rho=0.1, num_sub_batches=1, num_data=10,
        initial_precision=5.0,
    )  # fmt: skip
    state = optimizer.init(jnp.ones(2), {}, jax.random.key(0))
    step = jax.jit(optimizer.step)
    for _ in range(600):
        state, _ = step(state, jnp.zeros(1))
    root = (c + jnp.sqrt(c**2 + 4 * (0.1 + 0.02))) / 2
    np.testing.assert_allclose(state.precision, root**2, rtol=1e-9)


@pytest.mark.parametrize('name', ['sgd', 'sam'])
def test_sample_of_a_point_estimate_is_the_mean(name):
    optimizer = optimizers.OPTIMIZERS[name](toy_loss, **SETTINGS[name])
    params = {'W1': jnp.ones((4, 5))}
    state = optimizer.init(params, {}, jax.random.key(0))
    assert optimizer.sample(state, jax.random.key(1)) is state.params


@pytest.mark.parametrize('noise_block', [1, 2, optimizers._NOISE_BLOCK])
def test_moments_of_bsam_samples(noise_block, monkeypatch):
    """Samples follow N(w, 1/(N s)), independent between leaves, elements and blocks, within five standard errors."""
    monkeypatch.setattr(optimizers, '_NOISE_BLOCK', noise_block)
    optimizer = optimizers.bsam(quadratic_loss, **SETTINGS['bsam'])
    state = optimizer.init({'a': jnp.array([1.0, -2.0]), 'b': jnp.array(0.5)}, {}, jax.random.key(0))
    state = state._replace(precision={'a': jnp.array([0.5, 4.0]), 'b': jnp.array(2.0)})
    sample = jax.jit(jax.vmap(optimizer.sample, (None, 0)))
    draws = sample(state, jax.random.split(jax.random.key(1), 40_000))
    draws = np.column_stack([draws['a'], draws['b']])
    variance = 1 / (200 * np.array([0.5, 4.0, 2.0]))
    assert np.all(np.abs(draws.mean(axis=0) - [1, -2, 0.5]) < 5 * np.sqrt(variance / 40_000))
    assert np.all(np.abs(draws.var(axis=0) / variance - 1) < 5 * np.sqrt(2 / 40_000))
    assert np.all(np.abs(np.corrcoef(draws.T) - np.eye(3)) < 5 / np.sqrt(40_000))


@pytest.mark.parametrize(('elements', 'blocks'), [(130, 1), (3000, 2), (7000, 4)])
def test_noise_is_that_of_jax(elements, blocks, platform, monkeypatch):
    """The noise equals JAX's with a key for each block, bit for bit, whatever the leaves are."""
    monkeypatch.setattr(optimizers, '_NOISE_BLOCK', 2000)
    params = {'a': jnp.zeros((elements - 65, 1)), 'b': jnp.zeros(65)}
    noise = jax.jit(optimizers._normal_like)(jax.random.key(3), params)
    size = 128 * -(-elements // (128 * blocks))
    drawn = [jax.random.normal(key, (size,)) for key in jax.random.split(jax.random.key(3), blocks)]
    found = np.concatenate([noise['a'].reshape(-1), noise['b']])
    np.testing.assert_array_equal(found, np.concatenate(drawn)[:elements])


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='elsewhere a loop draws block after block')
def test_noise_is_drawn_in_one_operation(monkeypatch):
    """One operation draws all blocks for all leaves. XLA would run a loop in one thread, or draw anew for each leaf."""
    monkeypatch.setattr(optimizers, '_NOISE_BLOCK', 2000)
    params = {name: jnp.zeros(1500) for name in 'abc'}
    compiled = jax.jit(optimizers._normal_like).lower(jax.random.key(0), params).compile()
    assert re.findall(r'= (f32\[\S*\])\S* log-plus-one\(', compiled.as_text()) == ['f32[3,1536]']


@pytest.mark.parametrize('name', optimizers.OPTIMIZERS)
def test_second_step_neither_recompiles_nor_repeats_noise(name):
    """Both steps share one compilation, and SAM's two gradients share one trace.

    The state can be donated. The key changes if the optimizer uses it.
    """
    traces = []

    def loss(params, batch_stats, batch):
        traces.append(1)
        return toy_loss(params, batch_stats, batch)

    optimizer = optimizers.OPTIMIZERS[name](loss, **SETTINGS[name])
    step = jax.jit(optimizer.step, donate_argnums=0)
    params = {'W1': jnp.ones((4, 5)), 'b1': jnp.zeros(5), 'W2': jnp.ones((5, 3)), 'b2': jnp.zeros(3)}
    first = optimizer.init(params, {'mean': jnp.zeros(5)}, jax.random.key(0))
    key_before = jax.random.key_data(first.key).tolist()
    batch = jnp.ones((8, 4)), jnp.zeros(8, jnp.int32)
    state, _ = step(first, batch, jnp.float32(1.0))
    assert first.params['W1'].is_deleted() and first.momentum['W1'].is_deleted()
    state, _ = step(state, batch, jnp.float32(0.5))
    assert len(traces) == 1
    draws_nothing = name in ('sgd', 'adam', 'adamw', 'swag')
    assert (jax.random.key_data(state.key).tolist() == key_before) == draws_nothing


@pytest.mark.parametrize('name', optimizers.OPTIMIZERS)
def test_step_keeps_dtypes(name):
    """bfloat16 weights stay bfloat16 under a float32 learning rate. Otherwise a second step would compile again."""
    optimizer = optimizers.OPTIMIZERS[name](quadratic_loss, **SETTINGS[name])
    state = optimizer.init({'w': jnp.ones(3, jnp.bfloat16)}, {}, jax.random.key(0))
    stepped, _ = jax.jit(optimizer.step)(state, jnp.zeros(4), jnp.float32(0.5))
    assert [leaf.dtype for leaf in jax.tree.leaves(stepped)] == [leaf.dtype for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize('name', ['sgd', 'adam', 'adamw', 'swag'])
def test_pieces_have_the_gradient_of_the_batch(name, problem, x64):
    """Without batch statistics the gradient is the same in pieces. With batch statistics the batch stays whole."""
    x, y, w = problem

    def states(loss, batch_stats, num_pieces):
        optimizer = optimizers.OPTIMIZERS[name](loss, **SETTINGS[name], num_pieces=num_pieces)
        state, step = optimizer.init(jnp.asarray(w), batch_stats, jax.random.key(0)), jax.jit(optimizer.step)
        for t in range(5):
            state, value = step(state, (x[t], y[t]))
        return state._replace(key=None), value

    def plain_loss(params, batch):
        return logistic_loss(params, jnp.zeros(()), batch)[0]

    for whole, pieces in zip(*(tree.leaves(states(plain_loss, None, n)) for n in (1, 4)), strict=True):
        np.testing.assert_allclose(pieces, whole, rtol=1e-12, atol=1e-15)
    for whole, pieces in zip(*(tree.leaves(states(logistic_loss, jnp.zeros(()), n)) for n in (1, 4)), strict=True):
        np.testing.assert_array_equal(pieces, whole)
    with pytest.raises(ValueError, match='12 examples cannot be cut into 5 equal sub-batches'):
        states(plain_loss, None, 5)


@pytest.mark.parametrize(
    ('name', 'transform'),
    [
        ('adam', optax.chain(optax.add_decayed_weights(0.03), optax.adam(0.05, 0.8, 0.9))),
        ('adamw', optax.adamw(0.05, 0.8, 0.9, weight_decay=0.03)),
    ],
)
def test_adam_equals_optax(name, transform, problem, x64):
    x, y, w = problem
    optimizer = optimizers.OPTIMIZERS[name](logistic_loss, **SETTINGS[name])
    state, theirs = optimizer.init(jnp.asarray(w), jnp.zeros(()), jax.random.key(0)), jnp.asarray(w)
    opt_state = transform.init(theirs)
    step = jax.jit(optimizer.step)

    @jax.jit
    def their_step(params, opt_state, batch):
        grads, _ = jax.grad(logistic_loss, has_aux=True)(params, jnp.zeros(()), batch)
        updates, opt_state = transform.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for t in range(5):
        state, _ = step(state, (x[t], y[t]), 0.5)
        theirs, opt_state = their_step(theirs, opt_state, (x[t], y[t]))
        np.testing.assert_allclose(state.params, theirs, rtol=1e-12)


def test_samadam_is_sam_into_adam(problem, x64):
    """SAM's gradient over sub-batches, in NumPy, and optax's Adam give the same weights."""
    x, y, w = problem
    optimizer = optimizers.samadam(logistic_loss, **SETTINGS['samadam'])
    state, theirs = optimizer.init(jnp.asarray(w), jnp.zeros(()), jax.random.key(0)), w
    transform = optax.chain(optax.add_decayed_weights(0.03), optax.adam(0.05, 0.8, 0.9))
    opt_state = transform.init(jnp.asarray(w))
    step, update = jax.jit(optimizer.step), jax.jit(transform.update)
    for t in range(5):
        state, _ = step(state, (x[t], y[t]), 0.5)
        moved, *_ = reference.sam_step(
            theirs, np.zeros(3), 0.0, sub_batches(x[t], y[t], 4), reference.logistic_gradient, 1.0, 0.0, 0.0, rho=0.2
        )
        updates, opt_state = update(theirs - moved, opt_state, theirs)
        theirs = theirs + np.asarray(updates)
        np.testing.assert_allclose(state.params, theirs, rtol=1e-12)


def test_asam_equals_the_equations(problem, x64):
    """The perturbation is scaled by |w| + η for weights, and by 1 for a bias."""
    x, y, w = problem

    def loss(params, batch_stats, batch):
        return logistic_loss(jnp.append(params['kernel'], params['bias']), batch_stats, batch)

    optimizer = optimizers.asam(loss, **SETTINGS['asam'])
    state = optimizer.init({'kernel': jnp.asarray(w[:2]), 'bias': jnp.asarray(w[2])}, jnp.zeros(()), jax.random.key(0))
    step = jax.jit(optimizer.step)
    m = np.zeros(3)
    for t in range(5):
        state, _ = step(state, (x[t], y[t]), 0.5)
        parts = sub_batches(x[t], y[t], 4)
        w, m = reference.asam_step(
            w, m, parts, reference.logistic_gradient, 0.15, 0.9, 0.01, rho=0.5, eta=0.01, is_bias=np.arange(3) == 2
        )
        np.testing.assert_allclose([*state.params['kernel'], state.params['bias']], w, rtol=1e-12)


def test_biases_by_name():
    """In Flax, Equinox, NNX (whose paths end in `value`) and Haiku. Nothing else is a bias."""
    named = {
        'head': {'bias': 0, 'kernel': 1},
        'conv': {'b': 0, 'w': 1},
        'norm': {'threshold': 0},
        'a': {'bias': {'value': 0}},
    }
    leaves = jax.tree_util.tree_leaves_with_path(named)
    assert [optimizers._is_bias(path) for path, _ in leaves] == [leaf == 0 for _, leaf in leaves]
    assert not optimizers._is_bias(())


def test_swag_records_what_sgd_passes(problem, x64):
    """SWAG holds the mean and variance of SGD's weights after steps 2, 4, ... 10, and the last three deviations."""
    x, y, w = problem
    common = {'learning_rate': 0.4, 'beta1': 0.8, 'weight_decay': 0.03}
    swag = optimizers.swag(logistic_loss, **common, swagstart=2, swagevery=2, swagrank=3)
    sgd = optimizers.sgd(logistic_loss, **common)
    state = swag.init(jnp.asarray(w), jnp.zeros(()), jax.random.key(0))
    iterate = sgd.init(jnp.asarray(w), jnp.zeros(()), jax.random.key(0))
    swag_step, sgd_step = jax.jit(swag.step), jax.jit(sgd.step)
    snapshots, deviations = [], []
    for t in range(10):
        batch = x[t % 5], y[t % 5]
        state, loss = swag_step(state, batch)
        iterate, expected = sgd_step(iterate, batch)
        np.testing.assert_allclose(loss, expected, rtol=1e-12)
        np.testing.assert_allclose(state.iterate, iterate.params, rtol=1e-12)
        if t % 2:
            snapshots.append(np.asarray(iterate.params))
            deviations.append(snapshots[-1] - np.mean(snapshots, axis=0))
        np.testing.assert_allclose(
            state.params, np.mean(snapshots, axis=0) if snapshots else iterate.params, rtol=1e-12
        )
    np.testing.assert_allclose(state.variance, np.var(snapshots, axis=0), rtol=1e-12)
    np.testing.assert_allclose(
        sorted(state.deviations.tolist()), sorted(np.array(deviations[-3:]).tolist()), atol=1e-14
    )
    assert state.num_snapshots == 5


def test_variance_of_swag_in_float32():
    """The weights are near 1 and move by 1e-4 per step. Their squares differ by no more than float32's rounding."""

    def loss(params, batch_stats, batch):
        return (params * batch).sum(), batch_stats

    common = {'learning_rate': 1e-4, 'beta1': 0.0, 'weight_decay': 0.0}
    swag = optimizers.swag(loss, **common, swagstart=1, swagevery=1, swagrank=2)
    state, step = swag.init(jnp.ones(3), {}, jax.random.key(0)), jax.jit(swag.step)
    for _ in range(9):
        state, _ = step(state, jnp.array([1.0, -1.0, 2.0]))
    np.testing.assert_allclose(state.variance, np.var(1e-4 * np.arange(9)) * np.array([1, 1, 4]), rtol=0.01)


def test_moments_of_swag_samples(x64):
    """The samples have the mean, and half of the diagonal plus half of the low-rank covariance."""
    swag = optimizers.swag(quadratic_loss, **SETTINGS['swag'])
    mean, deviations = np.array([1.0, -2.0]), np.array([[1.0, 1.0], [0.5, -1.0], [-2.0, 0.0]])
    state = swag.init(mean, {}, jax.random.key(0))
    state = state._replace(variance=np.array([0.5, 2.0]), deviations=deviations, num_snapshots=jnp.int32(7))
    sample = jax.jit(jax.vmap(swag.sample, (None, 0)))
    drawn = np.asarray(sample(state, jax.random.split(jax.random.key(1), 40_000)))
    covariance = np.diag([0.25, 1.0]) + deviations.T @ deviations / 4
    np.testing.assert_allclose(drawn.mean(axis=0), mean, atol=0.03)
    np.testing.assert_allclose(np.cov(drawn.T), covariance, atol=0.05)
    few = state._replace(num_snapshots=jnp.int32(1))
    np.testing.assert_array_equal(jax.jit(swag.sample)(few, jax.random.key(1)), mean)


@pytest.mark.parametrize(('case', 'clip', 'num_samples'), [('plain', np.inf, 1), ('clipped', 0.1, 2)])
def test_ivon_equals_the_package_of_its_authors(case, clip, num_samples, monkeypatch, x64):
    """record_ivon.py has recorded ivon-opt with the same noise."""
    settings = SETTINGS['ivon'] | {'num_sub_batches': 1, 'num_samples': num_samples, 'clip': clip}
    optimizer = optimizers.ivon(logistic_loss, **settings)
    state = optimizer.init(jnp.asarray(IVON['w']), jnp.zeros(()), jax.random.key(0))
    draw_known_noise(monkeypatch, state.key, IVON['noise'][:, :num_samples])
    step = jax.jit(optimizer.step)
    for t in range(5):
        state, _ = step(state, (IVON['x'][t], IVON['y'][t]))
        np.testing.assert_allclose(state.params, IVON[f'{case}_params'][t], rtol=1e-10)
        np.testing.assert_allclose(state.hessian, IVON[f'{case}_hessian'][t], rtol=1e-10)


def test_precision_of_ivon_stays_positive():
    """The precision stays positive for any gradients. Here they are large, random and of either sign."""

    def wild_loss(params, batch_stats, batch):
        return (params * batch.mean(axis=0)).sum(), batch_stats

    optimizer = optimizers.ivon(wild_loss, **SETTINGS['ivon'] | {'num_sub_batches': 1, 'beta2': 0.5})
    state = optimizer.init(jnp.ones(50), {}, jax.random.key(0))
    step = jax.jit(optimizer.step)
    for batch in 1e3 * np.random.default_rng(0).standard_normal((30, 2, 50), np.float32):
        state, _ = step(state, batch)
        precision = np.asarray(state.hessian) + 0.03
        assert (precision > 0).all() and np.isfinite(state.params).all()


def test_sub_batches_and_samples_of_ivon_average(x64):
    """A quadratic has the gradient θ: over many samples the average of θ is w, and the estimated Hessian is 1."""
    settings = SETTINGS['ivon'] | {
        'num_sub_batches': 2,
        'num_samples': 4000,
        'beta1': 0.0,
        'beta2': 0.0,
        'weight_decay': 0.0,
    }
    optimizer = optimizers.ivon(quadratic_loss, **settings)
    state = optimizer.init(jnp.array([0.2, -0.1]), {}, jax.random.key(0))
    state, _ = jax.jit(optimizer.step)(state, jnp.zeros((4, 1)))
    np.testing.assert_allclose(state.momentum, [0.2, -0.1], atol=0.02)
    h = np.array([1.0, 1.0])
    np.testing.assert_allclose(state.hessian, h + 0.5 * (0.5 - h) ** 2 / 0.5, atol=0.1)


def test_batch_that_does_not_divide():
    optimizer = optimizers.sam(quadratic_loss, **SETTINGS['sam'])
    state = optimizer.init(jnp.ones(2), {}, jax.random.key(0))
    with pytest.raises(ValueError, match='a batch of 10 examples cannot be cut into 4 equal sub-batches'):
        optimizer.step(state, jnp.zeros(10))


def test_lr_factor():
    """The 181 epochs of the reference are five of warm-up, then half a cosine over the other 176."""
    factors = [optimizers.lr_factor(epoch, epochs=180, warmup=5) for epoch in range(181)]
    np.testing.assert_allclose(factors[:6], [0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    np.testing.assert_allclose(factors[5 + 88], 0.5, atol=1e-12)
    e = np.arange(5, 181)
    np.testing.assert_allclose(factors[5:], 0.5 * (1 + np.cos(np.pi * (e - 5) / 176)), rtol=1e-12)
    assert optimizers.lr_factor(0, epochs=0, warmup=0) == 1


def test_lr_factor_against_optax():
    schedule = optax.join_schedules([optax.linear_schedule(0.2, 1, 4), optax.cosine_decay_schedule(1, 176)], [5])
    for epoch in (0, 3, 4, 5, 50, 180):
        np.testing.assert_allclose(optimizers.lr_factor(epoch, 180, 5), schedule(epoch), atol=1e-7)


def test_which_optimizers_have_a_posterior():
    made = {name: make(quadratic_loss, **SETTINGS[name]) for name, make in optimizers.OPTIMIZERS.items()}
    assert {name for name, optimizer in made.items() if not optimizer.is_point} == {'bsam', 'swag', 'ivon'}
    assert {name for name in made if not experiment.is_point(name)} == {'bsam', 'swag', 'ivon'}


@pytest.mark.parametrize(('atonce', 'rounds'), [(1, 4), (2, 2), (3, 2), (4, 1), (10**9, 1)])
def test_sub_batches_are_taken_in_rounds(atonce, rounds):
    """Groups have equal sizes: with four sub-batches, three at once become two."""
    optimizer = optimizers.sam(toy_loss, **SETTINGS['sam'], atonce=atonce)
    params = {name: jnp.asarray(GOLDEN[f'w0_{name}'], jnp.float32) for name in ('W1', 'b1', 'W2', 'b2')}
    state = optimizer.init(params, {'mean': jnp.zeros(5)}, jax.random.key(0))
    batch = jnp.zeros((24, 4)), jnp.zeros(24, jnp.int32)
    lengths = [
        equation.params['length']
        for equation in jax.make_jaxpr(optimizer.step)(state, batch).eqns
        if equation.primitive.name == 'scan'
    ]
    assert lengths == [rounds]
