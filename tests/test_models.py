"""The networks against the reference's own logits, parameter counts, initial distributions and running averages."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

import experiment
import models
import numpy_networks
import optimizers
from conftest import slow_except
from ops import normalisation, pooling

GOLDEN = {entry['model']: entry for entry in json.loads((Path(__file__).parent / 'golden' / 'models.json').read_text())}


def golden_images(entry):
    shape = (entry['batch'], entry['image_size'], entry['image_size'], entry['channels'])
    return np.sin(0.37 * np.arange(np.prod(shape))).reshape(shape).astype(np.float32)


def golden_params(entry):
    """Draws parameter i with seed i from a normal z: kernels z·√(2/fan_in), scales 1 + 0.1 z, all others 0.1 z."""
    params = {}
    for i, (name, shape) in enumerate(entry['parameters']):
        z = np.random.default_rng(i).standard_normal(shape)
        kind = name.rsplit('/', 1)[1]
        value = {'kernel': z * np.sqrt(2 / np.prod(shape[:-1])), 'scale': 1 + 0.1 * z}.get(kind, 0.1 * z)
        params[name] = value.astype(np.float32)
    return unflatten_dict(params, sep='/')


def abstract_variables(model, shape):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(shape), train=False))


@pytest.mark.parametrize('name', GOLDEN)
def test_golden_logits(name):
    entry = GOLDEN[name]
    model, images = models.create(name, entry['num_classes']), golden_images(entry)
    variables = abstract_variables(model, images.shape)
    shapes = {name: list(leaf.shape) for name, leaf in flatten_dict(variables['params'], sep='/').items()}
    assert shapes == dict(entry['parameters'])
    assert sum(np.prod(shape) for shape in shapes.values()) == entry['num_parameters']

    running = {'mean': 0.05, 'var': 1.2, 'count': 1}
    batch_stats = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full(leaf.shape, running[path[-1].key]), variables.get('batch_stats', {})
    )
    variables = {'params': golden_params(entry), 'batch_stats': batch_stats}
    train, _ = jax.jit(lambda v: model.apply(v, images, train=True, mutable=['batch_stats']))(variables)
    np.testing.assert_allclose(train, entry['logits_train'], atol=5e-5)
    evaluated = jax.jit(partial(model.apply, train=False))(variables, images)
    np.testing.assert_allclose(evaluated, entry['logits_eval'], atol=5e-5)


@pytest.mark.parametrize(
    ('name', 'shape', 'num_classes', 'count'),
    [
        ('resnet18', (1, 32, 32, 3), 10, 11_173_962),
        ('preactresnet18', (1, 32, 32, 3), 10, 11_172_170),
        ('wrn28x10', (1, 32, 32, 3), 10, 36_479_194),
        ('wrn28x10', (1, 32, 32, 3), 100, 36_536_884),
        ('wrn16x8', (1, 32, 32, 3), 10, 10_961_370),
        ('wrn40x2', (1, 32, 32, 3), 10, 2_243_546),
        ('resnet20', (1, 32, 32, 3), 10, 274_042),
        ('resnet20', (1, 64, 64, 3), 200, 324_792),
        ('lenet', (1, 28, 28, 1), 10, 6 * 26 + 16 * 151 + 120 * 401 + (3 * 3 // 9 * 2 * 2 * 120 + 1) * 64 + 650),
        ('mlp', (1, 28, 28, 1), 10, 545_810),
    ],
)
def test_parameter_counts(name, shape, num_classes, count):
    """Zagoruyko & Komodakis (2016) give 36.5 million for WRN-28-10, 11.0 for WRN-16-8 and 2.2 for WRN-40-2."""
    variables = abstract_variables(models.create(name, num_classes), shape)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables['params'])) == count


@pytest.fixture(scope='module')
def initial():
    """Returns the networks' initial parameters, {network: {path: array}}."""
    shapes = {'resnet18': (1, 32, 32, 3), 'resnet20': (1, 32, 32, 3), 'lenet': (1, 32, 32, 1), 'mlp': (1, 32, 32, 3)}
    shapes['wrn10x1'] = (1, 8, 8, 3)
    flat = {}
    for name, shape in shapes.items():
        init = jax.jit(partial(models.create(name, 10).init, train=False))
        variables = init(jax.random.key(1), jnp.zeros(shape))
        flat[name] = flatten_dict(variables['params'], sep='/')
    return flat


@pytest.mark.parametrize(
    ('name', 'kernel', 'fan_in'),
    [
        ('resnet18', 'stage3/block2/layer1/conv/kernel', 2304),
        ('lenet', 'conv3/kernel', 400),
        ('mlp', 'dense1/kernel', 3072),
    ],
)
def test_truncated_kernels(name, kernel, fan_in, initial):
    """Kernels are cut at two standard deviations without correction, so their standard deviation is 0.8796/√fan_in."""
    z = np.asarray(initial[name][kernel]).ravel() * np.sqrt(fan_in)
    assert np.abs(z).max() <= 2 and np.abs(z).max() > 1.99
    np.testing.assert_allclose(z.std(), 0.8796, rtol=0.01)


@pytest.mark.parametrize('shape', [(3, 3, 4, 5), (64, 10)])
def test_kernels_drawn_flat_are_those_of_their_shape(shape):
    key = jax.random.key(0)
    cut = jax.random.truncated_normal(key, -2, 2, shape)
    np.testing.assert_array_equal(models.truncated_fan_in(key, shape), cut / np.sqrt(np.prod(shape[:-1])))
    np.testing.assert_array_equal(models.he_normal(key, shape), nn.initializers.he_normal()(key, shape))
    fan_out = nn.initializers.variance_scaling(2, 'fan_out', 'normal')
    np.testing.assert_allclose(models.fan_out_normal(key, shape), fan_out(key, shape), rtol=1e-6)


def test_he_kernels(initial):
    """ResNet-20's kernels are cut too, but corrected: their standard deviation is √(2/fan_in)."""
    kernel = np.asarray(initial['resnet20']['stage3/block2/layer1/conv/kernel'])
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / 576), rtol=0.02)
    np.testing.assert_allclose(np.abs(kernel).max(), 2 * np.sqrt(2 / 576) / 0.8796, rtol=0.01)


@pytest.mark.parametrize(
    ('kernel', 'fan_out'), [('stage3/block1/conv1', 9 * 64), ('stage3/block1/shortcut', 64), ('stem', 9 * 16)]
)
def test_kernels_of_pre_activation(kernel, fan_out, initial):
    """Kernels are normal with the standard deviation √(2/fan_out), not cut at two standard deviations."""
    z = np.asarray(initial['wrn10x1'][f'{kernel}/kernel']).ravel() * np.sqrt(fan_out / 2)
    np.testing.assert_allclose(z.std(), 1, atol=3 / np.sqrt(2 * z.size))
    assert np.abs(z).max() > 2.5


def test_other_initial_weights_of_pre_activation(initial):
    """Weights of the head are uniform between ±1/√64. Scales are 1, and all biases 0."""
    weights = initial['wrn10x1']
    head = np.sqrt(64) * np.asarray(weights['head/kernel'])
    assert 0.99 < np.abs(head).max() <= 1
    np.testing.assert_allclose(head.std(), 1 / np.sqrt(3), rtol=0.05)
    constants = {name: value for name, value in weights.items() if not name.endswith('kernel')}
    assert len(constants) == 1 + 2 * 7
    assert all(np.all(value == name.endswith('scale')) for name, value in constants.items())


def test_initial_constants(initial):
    assert not np.any(initial['resnet18']['head/kernel'])
    assert np.all(initial['mlp']['dense2/bias'] == np.float32(0.05))
    assert not np.any(initial['resnet20']['stage1/block1/layer1/conv/bias'])
    assert np.all(initial['resnet20']['stem/frn/scale'] == 1) and not np.any(initial['resnet20']['stem/frn/threshold'])


def test_running_averages_are_zero_debiased():
    """After the updates x₁, x₂ the running mean is (0.9·x₁ + x₂)/(0.9 + 1), without a trace of the initial 0."""
    norm = models.BatchNorm()
    x = np.random.default_rng(0).normal(5, 1, (2, 4, 3, 3, 2)).astype(np.float32)
    variables = norm.init(jax.random.key(0), x[0], train=True)
    assert variables['batch_stats']['count'] == 0
    for batch in x:
        _, updates = norm.apply(variables, batch, train=True, mutable=['batch_stats'])
        variables = variables | updates
    means, variances = x.mean(axis=(1, 2, 3)), x.var(axis=(1, 2, 3))
    np.testing.assert_allclose(variables['batch_stats']['mean'], (0.9 * means[0] + means[1]) / 1.9, rtol=1e-5)
    np.testing.assert_allclose(variables['batch_stats']['var'], (0.9 * variances[0] + variances[1]) / 1.9, rtol=1e-4)
    normalised = norm.apply(variables, x[1], train=True, mutable=['batch_stats'])[0]
    np.testing.assert_allclose(normalised.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(normalised.std(axis=(0, 1, 2)), 1, rtol=1e-4)


def plain_batch_norm(x, scale, bias, relu):
    scale, bias = (v.reshape(1, 1, 1, -1) for v in (scale, bias))
    mean, var = (f(x, axis=(0, 1, 2), keepdims=True) for f in (jnp.mean, jnp.var))
    y = scale * (x - mean) / jnp.sqrt(var + 1e-5) + bias
    return jnp.where(y > 0, y, 0) if relu else y


@pytest.mark.parametrize('relu', [False, True])
def test_gradient_of_batch_norm(relu, x64):
    """Value and gradient equal JAX's for the plain equations, under `vmap` over images and parameters."""
    rng = np.random.default_rng(0)
    x = rng.normal(2, 1, (2, 3, 5, 6, 4))
    scale, bias = rng.standard_normal((2, 2, 4))

    def results(function):
        def of_images(*arrays):
            value, gradient = jax.vjp(lambda *arrays: function(*arrays, relu), *arrays)
            return value, gradient(jnp.cos(3 * value))

        return jax.jit(jax.vmap(of_images))(x, scale, bias)

    expected, found = results(plain_batch_norm), results(lambda *args: normalisation.batch_norm(*args)[0])
    for ours, jaxs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, jaxs, rtol=1e-9, atol=1e-12)


def test_batch_norm_in_bfloat16():
    """Sums and normalised values are float32, so outputs and gradients have only their own rounding error."""
    x = np.random.default_rng(0).normal(3, 1, (50, 8, 8, 3)).astype(jnp.bfloat16)
    scale, bias = np.array([0.5, 1, 2], jnp.bfloat16), np.array([-1, 0.25, 1], jnp.bfloat16)

    @jax.jit
    def results(*arrays):
        value, gradient = jax.vjp(lambda *arrays: normalisation.batch_norm(*arrays, True)[0], *arrays)
        return value, *gradient(jnp.ones_like(value).at[::2].set(-2))

    found = results(x, scale, bias)
    expected = results(*(array.astype(np.float32) for array in (x, scale, bias)))
    for ours, wide in zip(found, expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(jnp.float32), wide, rtol=2**-8, atol=1e-5)


def test_gradient_of_batch_norm_of_a_variance_that_was_negative(x64):
    """Such a variance counts as 0 and does not depend on x, so the gradient is γ r (d − mean(d))."""
    rng = np.random.default_rng(0)
    x, grads = rng.standard_normal((2, 3, 5, 6, 4))
    scale = rng.standard_normal(4)
    residuals = x, x.mean(axis=(0, 1, 2)), np.zeros(4), scale, np.zeros(4)
    backward = jax.jit(partial(normalisation._batch_backward, False))
    x_grads, *_ = backward(residuals, (grads, None, None))
    expected = scale / np.sqrt(1e-5) * (grads - grads.mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(x_grads, expected, rtol=1e-9)


def plain_filter_response_norm(x, scale, bias, threshold):
    scale, bias, threshold = (v.reshape(1, 1, 1, -1) for v in (scale, bias, threshold))
    normalised = x / jnp.sqrt(jnp.mean(x**2, axis=(1, 2), keepdims=True) + 1e-6)
    return jnp.maximum(scale * normalised + bias, threshold)


@pytest.mark.parametrize('axes', [(0, None), (0, 0)])
def test_filter_response_norm(axes, x64):
    """Value and gradient equal JAX's for the plain equations, also at the threshold, and under `vmap`."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2, 5, 6, 4))
    x[:, 0, :2, :, 1] = x[:, 1, ..., 2] = 0
    scale, bias, threshold = rng.standard_normal((3, 3, 4))
    bias[:, 1:3] = threshold[:, 1:3]
    of_one = scale[0], bias[0], threshold[0]
    parameters = (scale, bias, threshold) if axes[1] == 0 else of_one

    def results(function):
        def of_images(x, parameters):
            value, gradient = jax.vjp(function, x, *parameters)
            return value, gradient(jnp.sin(3 * value))

        return jax.jit(jax.vmap(of_images, axes))(x, parameters)

    expected, found = results(plain_filter_response_norm), results(normalisation.filter_response_norm)
    assert np.any(expected[0] == parameters[2].reshape(-1, 1, 1, 1, 4))
    for ours, jaxs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, jaxs, rtol=1e-9, atol=1e-12)


def test_filter_response_norm_in_bfloat16():
    """Gradients are bfloat16 and equal the float32 gradients up to rounding."""
    rng = np.random.default_rng(0)
    x, grads = rng.standard_normal((2, 2, 8, 8, 4))
    parameters = rng.standard_normal((3, 4))

    @jax.jit
    def gradients(grads, *arrays):
        value, gradient = jax.vjp(normalisation.filter_response_norm, *arrays)
        return gradient(grads.astype(value.dtype))

    results = [gradients(*(a.astype(dtype) for a in (grads, x, *parameters))) for dtype in (np.float32, jnp.bfloat16)]
    for exact, rounded in zip(*results, strict=True):
        assert rounded.dtype == jnp.bfloat16
        assert 0 < np.linalg.norm(rounded - exact) < 0.02 * np.linalg.norm(exact)


@pytest.mark.parametrize(('pixels', 'size', 'stride'), [(9, 3, 2), (8, 3, 2), (7, 2, 2), (6, 3, 1)])
def test_max_pool(pixels, size, stride, x64):
    """Value and gradient equal Flax's window reduction if no two values are equal."""
    x = np.random.default_rng(0).standard_normal((2, pixels, pixels + 1, 3))

    @partial(jax.jit, static_argnums=0)
    def results(pool, x):
        value, gradient = jax.vjp(pool, x)
        return value, *gradient(jnp.sin(3 * value))

    value, gradient = results(partial(pooling.max_pool, size=size, stride=stride), x)
    expected, expected_gradient = results(partial(nn.max_pool, window_shape=(size, size), strides=(stride, stride)), x)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-12)


@pytest.mark.parametrize('name', ['resnet18', 'resnet20'])
def test_bfloat16(name):
    """Logits equal the float32 logits up to bfloat16's rounding. Logits and batch statistics come in float32."""
    entry = GOLDEN[name]
    model, images = models.create(name, entry['num_classes']), golden_images(entry)
    batch_stats = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), abstract_variables(model, images.shape).get('batch_stats', {})
    )
    params = golden_params(entry)
    apply = jax.jit(partial(models.apply, model, train=True), static_argnames='dtype')
    results = {dtype: apply(params, batch_stats, images, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16)}
    (logits, stats), (rounded, rounded_stats) = results.values()
    assert {leaf.dtype.name for leaf in jax.tree.leaves((rounded, rounded_stats))} == {'float32'}
    assert 0 < np.abs(rounded - logits).max() < 0.05 * np.abs(logits).max()
    for ours, exact in zip(jax.tree.leaves(rounded_stats), jax.tree.leaves(stats), strict=True):
        assert np.linalg.norm(ours - exact) <= 0.05 * np.linalg.norm(exact)


@pytest.mark.parametrize(('name', 'pixels'), [('resnet20', 29), ('lenet', 15)])
def test_smallest_image(name, pixels):
    model = models.create(name, 10)
    assert abstract_variables(model, (1, pixels, pixels, 1))
    with pytest.raises(models.ModelError, match=f'{name} needs images of {pixels}×{pixels} pixels or more'):
        abstract_variables(model, (1, pixels - 1, pixels, 1))


@pytest.mark.parametrize('name', ['resnet19', 'wrn16', 'wrn016x8', 'wrn16x0', 'wrn10x1\n'])
def test_unknown_model(name):
    with pytest.raises(models.ModelError, match=r'unknown model .*\(choose from resnet18, .*, wrnDxK\)'):
        models.create(name, 10)


@pytest.mark.parametrize('name', ['wrn29x10', 'wrn4x1', 'wrn12x2'])
def test_depths_of_wide_resnets(name):
    with pytest.raises(models.ModelError, match=f'^{name}: the depth of a wide ResNet is 6n \\+ 4, such as 28$'):
        models.create(name, 10)


@pytest.mark.parametrize('name', slow_except(['resnet18', 'preactresnet18', 'wrn16x2'], 'wrn16x2'))
def test_evaluation_mode_against_numpy(name, x64):
    """Logits in float64 with random batch statistics. The last layer is the head."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 8, 9, 3))
    model = models.create(name, 10)
    shapes = flatten_dict(abstract_variables(model, images.shape), sep='/')

    def draw(name, leaf):
        z = rng.standard_normal(leaf.shape)
        if name.endswith('kernel'):
            return z * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        return np.exp(0.1 * z) if name.endswith(('scale', 'var')) else 0.1 * z

    drawn = {name: draw(name, leaf) for name, leaf in shapes.items()}
    apply, variables = partial(model.apply, train=False), unflatten_dict(drawn, sep='/')
    assert models.last_layer(apply, variables, images) == ('head',)
    logits = jax.jit(apply)(variables, images)
    expected = numpy_networks.NETWORKS[name](images, {name.partition('/')[2]: leaf for name, leaf in drawn.items()})
    np.testing.assert_allclose(logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['preactresnet18', 'wrn10x1'])
def test_all_initial_weights_have_a_gradient(name):
    """A step of bSAM changes them all. Without weight decay the momentum is a tenth of the gradient."""
    batch = np.random.default_rng(0).standard_normal((4, 32, 32, 3), np.float32), np.arange(4)
    model = models.create(name, 10)
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), batch[0])
    loss = experiment.loss_function(model, jnp.float32)
    optimizer = optimizers.bsam(loss, learning_rate=0.1, rho=0.01, weight_decay=0, num_data=100, num_sub_batches=2)
    state, _ = jax.jit(optimizer.step)(optimizer.init(**variables, key=jax.random.key(1)), batch)
    assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(state.momentum))


@pytest.mark.parametrize(
    ('name', 'shape'),
    [
        ('resnet18', (16, 16, 3)),
        pytest.param('preactresnet18', (16, 16, 3), marks=pytest.mark.slow),
        pytest.param('wrn10x1', (16, 16, 3), marks=pytest.mark.slow),
        ('resnet20', (32, 32, 3)),
        ('lenet', (28, 28, 1)),
        ('mlp', (28, 28, 1)),
    ],
)
def test_a_compiled_step_on_a_batch_of_200_against_numpy(name, shape):
    """Compiled sums over 32,769 rows and more have been wrong where sums over fewer were right.

    Some networks get 16×16 pixels, where the first stages have 51,200 rows. With 32×32 pixels NumPy would take a minute
    for ResNet-18.

    The slope of NumPy's loss (float64) is taken along the step's gradient. The gradient of each parameter is scaled to
    norm 1, so that no parameter outweighs the others.
    """
    images = np.random.default_rng(0).normal(size=(200, *shape)).astype(np.float32)
    labels = np.arange(200) % 10
    model = models.create(name, 10)
    variables = abstract_variables(model, (1, *shape))
    names = flatten_dict(variables['params'], sep='/')
    params = golden_params({'parameters': [(name, leaf.shape) for name, leaf in names.items()]})
    batch_stats = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), variables.get('batch_stats', {}))
    optimizer = optimizers.sgd(
        experiment.loss_function(model, jnp.float32), learning_rate=0.1, beta1=0.9, weight_decay=0
    )
    state, value = jax.jit(optimizer.step)(optimizer.init(params, batch_stats, jax.random.key(0)), (images, labels))

    weights = {name: np.float64(leaf) for name, leaf in flatten_dict(params, sep='/').items()}
    grads = {name: np.float64(leaf) for name, leaf in flatten_dict(state.momentum, sep='/').items()}
    norms = {name: np.linalg.norm(g) for name, g in grads.items()}

    def loss_along(distance):
        moved = {name: w + distance * grads[name] / norms[name] for name, w in weights.items()}
        return numpy_networks.loss(name, moved, np.float64(images), labels)

    distance = 1e-5
    ahead, behind = loss_along(distance), loss_along(-distance)
    np.testing.assert_allclose(value, (ahead + behind) / 2, rtol=2e-5)
    np.testing.assert_allclose(sum(norms.values()), (ahead - behind) / (2 * distance), rtol=1e-3)
