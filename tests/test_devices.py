"""Training and evaluation give the same on several devices as on one, up to rounding. The devices are virtual CPUs."""

import collections
import json
import os
import re

import jax
import jax.numpy as jnp
import pytest

import children
import conftest
import experiment
import optimizers
import train
from ops import sharding
from runs import devices, training_flags

# Takes 20 steps with every optimizer on 1 and on 8 devices, and evaluates the weights there. Prints the relative
# differences of weights, batch statistics and probabilities as JSON.
SCRIPT = """if True:
    import json, sys
    import jax, jax.numpy as jnp, numpy as np
    sys.path[:0] = ['tests', '.']
    import conftest, data, experiment, models, optimizers
    from evaluation import posteriors
    from ops import sharding
    from readers import python_files
    from runs import devices, launch, training_flags
    launch.use_compilecache(sys.argv[1])
    python_files.allow(['docs/examples/own_network.py'])
    models.MODELS |= {'resnet18': conftest.SmallResNet, 'resnet20': conftest.SmallResNet20}
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (160, 16, 16, 3), np.uint8), rng.integers(0, 10, 160)
    dataset = {'num_train': 160, 'num_classes': 10, 'image_shape': [16, 16, 3], 'mean': [0.5], 'std': [0.2]}
    inits = {}  # compiled once for all numbers of devices

    def run(optim, model, number, sub_batches=8):
        split = [f'--batchsplit={sub_batches}', f'--atonce={2 if number == 8 else 1}']
        split = [] if optim in ('sgd', 'adam', 'adamw', 'swag') else split
        arguments = [f'--optim={optim}', f'--model={model}', '--alpha=0.01', '--batchsize=16', '--epochs=3', *split]
        functions = experiment.create({'flags': vars(training_flags.parse_args(arguments)), 'dataset': dataset})
        mesh = devices.create_mesh(number)
        is_shared = bool(split) and number > 1
        start = inits.setdefault((optim, model), jax.jit(functions.init))(jax.random.key(0))
        with jax.set_mesh(mesh):
            state, one, key = sharding.replicate((start, jnp.float32(1), jax.random.key(1)), mesh)
            feeds = [
                data.Feed(images, labels, 16, key, mesh, functions.normalise, augmented=False, streamed=streamed,
                          with_seeds=functions.has_dropout)
                for streamed in (False, True)
            ]
            of_kernels = sum(leaf.ndim == 4 for leaf in jax.tree.leaves(state.params))
            for epoch in (0, 1):
                for batch, sent in zip(*(feed.batches(epoch) for feed in feeds), strict=True):
                    for x, y in zip(batch, sent, strict=True):
                        assert np.array_equal(x, y) and x.sharding.is_equivalent_to(y.sharding, x.ndim)
                    if epoch == 0:
                        reductions = functions.step.lower(state, batch, one).as_text().count('stablehlo.all_reduce')
                        assert reductions == (is_shared if split else of_kernels * (mesh.size > 1))
                    state, _ = functions.step(state, batch, one)
            held = posteriors.parts(images, 40)
            probs = posteriors.probs_at(functions.apply, state.params, state.batch_stats, held, 40)
        return [np.concatenate([np.ravel(x) for x in jax.tree.leaves(part)] or [[1.0]])
                for part in (state.params, state.batch_stats, probs)]

    def difference(one, other):
        return float(np.linalg.norm(one - other) / np.linalg.norm(one))

    assert len(jax.devices()) == 8
    print(json.dumps({
        ' '.join(map(str, case)): [difference(*pair) for pair in zip(*(run(*case[:2], n, *case[2:]) for n in (1, 8)))]
        for case in json.loads(sys.argv[2])
    }))
"""


def run_on_devices(number, script, *arguments):
    """Runs a script with N virtual CPU devices, and returns the finished process."""
    flags = f'{conftest.XLA_FLAGS_OF_FEW_STEPS} --xla_force_host_platform_device_count={number}'
    environment = os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}
    return children.run(['-c', script, *arguments], environment)


QUICK = [(optim, 'resnet20') for optim in optimizers.OPTIMIZERS] + [('sgd', 'resnet18'), ('bsam', 'resnet18')]
SLOW = [(optim, 'resnet18') for optim in optimizers.OPTIMIZERS if optim not in ('sgd', 'bsam')]
WITH_DROPOUT = ('bsam', 'docs/examples/own_network.py:Small')
TWO_ON_EACH = ('bsam', 'resnet18', 16)  # two sub-batches on each of eight devices, which computes them together


@pytest.mark.parametrize(
    ('cases', 'differing'),
    [
        ([*QUICK, WITH_DROPOUT, TWO_ON_EACH], ('bsam resnet18 16', 'sgd resnet18')),
        pytest.param(SLOW, ('adam resnet18', 'adam resnet18'), marks=pytest.mark.slow),
    ],
)
def test_eight_devices_train_as_one(cases, differing, compilecache):
    """After 20 steps, weights, batch statistics and probabilities agree to 1e-5, with both kinds of normalisation."""
    done = run_on_devices(8, SCRIPT, compilecache, json.dumps(cases))
    assert done.returncode == 0, done.stderr[-2000:]
    differences = json.loads(done.stdout)
    assert len(differences) == len(cases)
    for case, parts in differences.items():
        assert max(parts) < 1e-5, (case, parts)
    # Eight devices add up in another order than one device. Without any difference, all would have run on one device.
    assert differences[differing[0]][0] > 0 < differences[differing[1]][1]


# Compares the gradients of images and a kernel on four devices and on one. Each device has more than two blocks.
GRADIENTS = """if True:
    import re, sys
    sys.path[:0] = ['.']
    import jax, jax.numpy as jnp, numpy as np
    from ops import convolution, sharding
    from runs import devices
    channels, features = map(int, sys.argv[1:])
    images = jax.random.normal(jax.random.key(0), (212, 6, 6, channels))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, channels, features))

    @jax.jit
    def gradients(images, kernel):
        def loss(images, kernel):
            return jnp.square(convolution.convolve(images, kernel, (1, 1), 'SAME')).sum()
        of_images, of_kernel = jax.grad(loss, (0, 1))(sharding.shard(images), kernel)
        return sharding.shard(of_images), sharding.gather(of_kernel)

    mesh = devices.create_mesh()
    with jax.set_mesh(mesh):
        compiled = gradients.lower(*sharding.replicate((images, kernel), mesh)).compile()
        shared = compiled(*sharding.replicate((images, kernel), mesh))
    for ours, alone in zip(shared, gradients(images, kernel)):
        np.testing.assert_allclose(ours, alone, rtol=1e-4, atol=1e-6 * np.abs(alone).max())
    print(*re.findall(' (all-gather|all-reduce|all-to-all|collective-permute|while)\\(', compiled.as_text()))
"""


@pytest.mark.parametrize(('channels', 'features', 'loops'), [(2, 4, 1), (64, 4, 1), (32, 32, 3)])
def test_blocks_of_images_stay_on_their_devices(channels, features, loops):
    """Each device loops over blocks of its own images, and one sum is taken over devices.

    The kernel gradient is a loop. In tiles, the value and the gradient of the images are loops, too.
    """
    done = run_on_devices(4, GRADIENTS, str(channels), str(features))
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(done.stdout.split()) == ['all-reduce', *['while'] * loops]


# Trains a run on four devices, evaluates it on four and on one, then resumes it on one. The first four of six samples
# have a device each. The other two are sharded over all devices, in batches of 8, because 4 does not divide 6.
COMMANDS = """if True:
    import sys
    sys.path[:0] = ['.']
    import numpy as np
    import test, train
    folder, data = sys.argv[1:]
    flags = ['--optim=bsam', '--model=mlp', '--dataset=mnist', '--batchsize=16', '--batchsplit=4', '--warmup=0']
    run = train.main([*flags, '--alpha=0.01', '--epochs=0', f'--datasetfolder={data}', f'--resultsfolder={folder}'])
    evaluations = []
    for number in (4, 1):
        test.main([f'--resultsfolder={run}', '--testmc=6', '--testbatchsize=6', f'--devices={number}'])
        with np.load(run / 'predictions.npz') as file:
            evaluations.append([file[name] for name in ('logits', 'probs', 'expected_entropy')])
    for four, one in zip(*evaluations):
        np.testing.assert_allclose(four, one, rtol=1e-4)
    train.main([f'--resume={run}', '--epochs=1', '--devices=1'])
    try:
        train.main([*flags, '--batchsplit=2', f'--datasetfolder={data}'])
    except SystemExit as stop:
        assert stop.code == 2
"""


def test_commands_on_four_devices(datasets, tmp_path):
    done = run_on_devices(4, COMMANDS, tmp_path, datasets)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.strip().endswith('over 4 devices: use --batchsplit 4, or --devices 2')


@pytest.mark.parametrize(
    ('flags', 'number', 'offers'),
    [
        (['--optim=sgd', '--batchsize=12'], 8, '--batchsize 8, or --batchsize 16, or --devices 6'),
        (['--optim=sgd', '--batchsize=3'], 8, '--batchsize 8, or --devices 3'),
        (
            ['--optim=bsam', '--batchsize=200', '--batchsplit=8'],
            5,
            '--batchsplit 5, or --batchsplit 10, or --devices 4',
        ),
        (
            ['--optim=bsam', '--batchsize=200', '--batchsplit=8'],
            16,
            '--batchsize 192 --batchsplit 16, or --batchsize 208 --batchsplit 16, or --devices 8',
        ),
        (
            ['--optim=sam', '--batchsize=20', '--batchsplit=5'],
            8,
            '--batchsize 16 --batchsplit 8, or --batchsize 24 --batchsplit 8, or --devices 5',
        ),
    ],
)
def test_shares_that_are_not_equal(flags, number, offers, monkeypatch):
    """All suggested flags work. For a resumed run, whose other flags are fixed, the error suggests --devices only."""
    monkeypatch.setattr(devices, 'create_mesh', lambda n: jax.sharding.AbstractMesh((n or number,), (sharding.AXIS,)))
    args = training_flags.parse_args(flags)
    with pytest.raises(devices.DeviceError, match=f'cannot be sharded equally over {number} devices: use {offers}$'):
        devices.mesh_of_training(args)
    for offer in offers.split(', or '):
        devices.mesh_of_training(training_flags.parse_args([*flags, *offer.split()]))
    with pytest.raises(devices.DeviceError, match=f'devices: use {offers.split(", or ")[-1]}$'):
        devices.mesh_of_training(args, flags_hold=True)


def test_devices_that_are_not_there(flags_of, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(flags_of(devices=64))
    assert stop.value.code == 2 and '--devices 64 is too many: JAX finds' in capsys.readouterr().err


@pytest.mark.parametrize('optim', ['sgd', 'sam', 'bsam'])
def test_a_step_on_one_device_is_that_without_a_mesh(optim):
    """The same operations are compiled, so sharding costs nothing on one device."""
    of_run = vars(training_flags.parse_args([f'--optim={optim}', '--model=mlp', '--alpha=0.01', '--batchsize=16']))
    dataset = {'num_train': 32, 'num_classes': 10, 'image_shape': [8, 8, 3], 'mean': [0.5], 'std': [0.2]}
    functions = experiment.create({'flags': of_run, 'dataset': dataset})

    def operations():
        batch = jax.ShapeDtypeStruct((16, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((16,), jnp.int32)
        arguments = functions.state_shapes(), batch, jax.ShapeDtypeStruct((), jnp.float32)
        compiled = functions.step.lower(*arguments).compile().as_text()
        lines = [re.sub(r', metadata=\{[^}]*\}', '', line) for line in compiled.splitlines() if ' = ' in line]
        return collections.Counter(re.sub(r'%[\w.\-]+', '%', line) for line in lines)

    without_a_mesh = operations()
    with jax.set_mesh(devices.create_mesh(1)):
        assert operations() == without_a_mesh
