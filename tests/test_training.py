"""The training step on the device: what it holds in memory, what it reuses, what it waits for."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import conftest
import experiment
import models
import optimizers
from runs import training_flags


def create(optim, num_images=40, more=()):
    """Returns a training step of an MLP and its arguments. The 1.7 million parameters take most of its memory."""
    flags = vars(training_flags.parse_args(['--model=mlp', f'--optim={optim}', '--batchsize=8', *more]))
    flags['batchsplit'] = flags['batchsplit'] and 4
    dataset = {'num_train': num_images, 'num_classes': 10, 'image_shape': [32, 32, 3], 'mean': [0.5], 'std': [0.2]}
    functions = experiment.create({'flags': flags, 'dataset': dataset})
    state = jax.jit(functions.init)(jax.random.key(0))
    batch = jnp.zeros((8, 32, 32, 3)), jnp.zeros(8, jnp.int32)
    return functions.step, (state, batch, jnp.float32(1))


def peak_bytes(function, *arguments):
    memory = function.lower(*arguments).compile().memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes


@pytest.mark.parametrize(
    ('optim', 'most'), [('sgd', 2), ('sam', 5), ('bsam', 6), ('adam', 3), ('samadam', 6), ('asam', 6), ('ivon', 7)]
)
def test_memory_of_a_step(optim, most):
    """A step holds a sub-batch's gradient and `most` copies of the parameters, if sub-batches are computed one by one.

    bSAM's copies are momentum, precision, two sums over sub-batches, and sampled or perturbed weights. The sixth is
    another precision, because XLA does not update it in place on CPUs.
    """
    step, arguments = create(optim, more=[] if optim in ('sgd', 'adam') else ['--atonce=1'])
    loss = experiment.loss_function(models.create('mlp', 10), jnp.dtype('float32'))
    sub_batch = jnp.zeros((2, 32, 32, 3)), jnp.zeros(2, jnp.int32)
    state = arguments[0]
    of_gradient = peak_bytes(jax.jit(jax.grad(loss, has_aux=True)), state.params, state.batch_stats, sub_batch)
    one_copy = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    assert (peak_bytes(step, *arguments) - of_gradient) / one_copy < most + 0.2


@pytest.mark.parametrize(('optim', 'flags', 'gradients'), [('sgd', [], 1), ('bsam', ['--atonce=1'], 2)])
def test_step_for_gpus(optim, flags, gradients, monkeypatch):
    """The step can be lowered for GPUs, with plain convolutions instead of tiles, and noise drawn in a loop.

    Each of two layers has three convolutions per gradient.
    """
    monkeypatch.setitem(models.MODELS, 'resnet20', conftest.TwoConvolutions)
    step, arguments = create(optim, more=['--model=resnet20', *flags])
    lowered = step.trace(*arguments).lower(lowering_platforms=('cuda',)).as_text()
    assert lowered.count('stablehlo.convolution(') == 2 * 3 * gradients and 'inlineable' not in lowered


@pytest.mark.parametrize(
    ('backend', 'flags', 'number'),
    [
        ('cpu', ['--optim=bsam'], 1),
        ('gpu', ['--optim=bsam'], 8),
        ('gpu', ['--optim=ivon', '--batchsplit=4', '--trainmc=3'], 12),
        ('gpu', ['--optim=sam', '--atonce=2'], 2),
    ],
)
def test_default_of_sub_batches_at_once(backend, flags, number, monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    assert experiment.at_once(vars(training_flags.parse_args(flags))) == number


def test_runs_of_one_kind_share_what_is_compiled():
    """Runs that differ in seeds and folders share a step. Flags that a step depends on make another step."""

    def step_of(*more):
        return create('bsam', more=more)[0]

    assert step_of() is step_of('--randomseed=1', '--resultsfolder=elsewhere', '--epochs=7')
    for changed in ('--alpha=0.25', '--precision=bfloat16', '--dafactor=4', '--atonce=2'):
        assert step_of(changed) is not step_of()


@pytest.mark.parametrize(('optim', 'model'), [('bsam', 'resnet18'), ('sam', 'resnet20')])
def test_sub_batches_at_once(optim, model, monkeypatch):
    """Five steps with all sub-batches at once equal five steps one by one, with both kinds of normalisation."""
    monkeypatch.setitem(models.MODELS, 'resnet18', conftest.SmallResNet)
    monkeypatch.setitem(models.MODELS, 'resnet20', conftest.SmallResNet20)
    dataset = {'num_train': 80, 'num_classes': 10, 'image_shape': [16, 16, 3], 'mean': [0.5], 'std': [0.2]}
    images = np.random.default_rng(0).integers(0, 256, (80, 16, 16, 3), np.uint8)
    arguments = [f'--optim={optim}', f'--model={model}', '--alpha=0.01', '--batchsize=16', '--batchsplit=4']

    def run(number):
        functions = experiment.create(
            {'flags': vars(training_flags.parse_args([*arguments, f'--atonce={number}'])), 'dataset': dataset}
        )
        state, losses = jax.jit(functions.init)(jax.random.key(0)), []
        step = jax.jit(functions.optimizer.step)
        for batch in functions.normalise(images).reshape(5, 16, 16, 16, 3):
            state, loss = step(state, (batch, jnp.arange(16) % 10))
            losses.append(loss)
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves((state.params, state.batch_stats, losses))])

    one, other = run(1), run(4)
    assert np.linalg.norm(other - one) < 1e-6 * np.linalg.norm(one)


@pytest.mark.parametrize('optim', optimizers.OPTIMIZERS)
def test_step_reuses_the_state(optim):
    """All arrays of the state are donated, and none is copied for the result."""
    step, (state, *others) = create(optim)
    donated = [leaf for leaf in jax.tree.leaves(state) if leaf.size]
    step(state, *others)
    assert all(leaf.is_deleted() for leaf in donated)


@pytest.mark.parametrize('size', [12, 100_000])
@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_all_finite(value, size):
    """XLA's maximum of a large array on CPUs can be a number although one of the values is NaN."""
    arrays = {'weights': np.ones(size, np.float32), 'none': np.ones(0, np.float32), 'key': jax.random.key(0)}
    assert experiment.all_finite(arrays)
    arrays['weights'][7] = value
    assert not experiment.all_finite(arrays)
