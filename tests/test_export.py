"""Networks that jax.export stores with a symbolic batch size, against the jitted networks."""

import math
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import experiment
import models
import record_format
from conftest import slow_except
from evaluation import trained
from runs import training_flags

SHAPE = 32, 32, 3
PLATFORMS = 'cpu', 'cuda'
NETWORKS = ['wrn10x1' if name == 'wrn28x10' else name for name in models.MODELS]  # WRN-28-10 would take minutes


def network(name, precision):
    """Returns `apply` of an Experiment, random weights and random batch statistics."""
    flags = vars(training_flags.parse_args([f'--model={name}', f'--precision={precision}']))
    dataset = {'num_classes': 10, 'num_train': 100, 'image_shape': SHAPE, 'mean': (0.5,) * 3, 'std': (0.2,) * 3}
    functions, rng = experiment.create({'flags': flags, 'dataset': dataset}), np.random.default_rng(0)

    def draw(path, leaf):
        z, name = rng.standard_normal(leaf.shape, np.float32), path[-1].key
        if name == 'kernel':
            return z * np.float32(math.sqrt(2 / math.prod(leaf.shape[:-1])))
        return np.exp(0.1 * z) if name in ('scale', 'var') else 0.1 * z

    shapes = functions.state_shapes()
    return functions.apply, *jax.tree_util.tree_map_with_path(draw, (shapes.params, shapes.batch_stats))


def seven_images(height, width, channels):
    """Returns images of random patches of 8×8 pixels, uint8 [7, height, width, channels]."""
    patches = np.random.default_rng(1).integers(0, 256, (7, height // 8, width // 8, channels), np.uint8)
    return patches.repeat(8, axis=1).repeat(8, axis=2)


def any_number(shape):
    """Returns a jax.ShapeDtypeStruct of images, uint8 [b, *shape] with a symbolic b."""
    return jax.ShapeDtypeStruct(jax.export.symbolic_shape(f'b, {", ".join(map(str, shape))}'), np.uint8)


# The bounds are relative to the largest difference between two images in a logit.
@pytest.mark.parametrize(
    ('precision', 'batch_sizes', 'bound'),
    [('float32', (1, 3, 7), 3e-5), pytest.param('bfloat16', (3,), 0.25, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize('name', slow_except(NETWORKS, 'resnet20', 'lenet', 'mlp'))
def test_exported_network(name, precision, batch_sizes, bound):
    """A stored network takes any batch size. Its logits equal the jitted network's up to rounding."""
    apply, *variables = network(name, precision)
    jitted, images = jax.jit(apply), seven_images(*SHAPE)
    stored = jax.export.export(jitted, platforms=PLATFORMS)(*variables, any_number(SHAPE)).serialize()
    exported = jax.export.deserialize(stored)
    assert exported.platforms == PLATFORMS

    expected = np.asarray(jitted(*variables, images))
    spread = np.ptp(expected, axis=0).max()
    for n in batch_sizes:
        found = exported.call(*variables, images[:n])
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected[:n], rtol=0, atol=bound * spread)


@pytest.mark.parametrize('mapped', ['images', 'weights'])
def test_exported_vmap(mapped):
    """A network takes any batch size under `vmap` over images, or over weights such as posterior samples."""
    (apply, params, batch_stats), images = network('lenet', 'float32'), seven_images(*SHAPE)
    if mapped == 'images':
        function = jax.vmap(lambda params, batch_stats, image: apply(params, batch_stats, image[None]), (None, None, 0))
    else:
        function = jax.vmap(apply, (0, None, None))
        params = jax.tree.map(lambda x: np.stack([x, 1.1 * x, 0.9 * x]), params)
    exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(params, batch_stats, any_number(SHAPE))
    expected = np.asarray(jax.jit(function)(params, batch_stats, images))
    found = exported.call(params, batch_stats, images)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6 * np.abs(expected).max())


def test_example_of_the_documentation(tmp_path, monkeypatch):
    """A file holds the network and the weights of a run. Its logits are the logits of the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.MODELS, 'mlp', record_format.FourFeatures)

    run = trained.restore(str(record_format.RUNS / 'format_1'))
    logits = jax.jit(partial(run.experiment.apply, run.state.params, run.state.batch_stats))
    images = jax.ShapeDtypeStruct(jax.export.symbolic_shape('b, 32, 32, 1'), 'uint8')
    exported = jax.export.export(logits, platforms=('cpu', 'cuda'))(images)
    Path('network.bin').write_bytes(exported.serialize())

    network = jax.export.deserialize(Path('network.bin').read_bytes())
    images = seven_images(32, 32, 1)
    expected = run.experiment.apply(run.state.params, run.state.batch_stats, images)
    np.testing.assert_allclose(network.call(images), expected, rtol=1e-5, atol=1e-5)
