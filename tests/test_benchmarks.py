"""The benchmarks run, with a small network in place of ResNet-20. Measured times are not checked."""

import importlib
import json
import math
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import conftest
import models
import optimizers
from benchmarks import plain
from children import ROOT

FOLDERS = ('benchmarks', 'studies')
MODULES = {'benchmarks.baseline', 'benchmarks.plain', 'benchmarks.peers_torch'}
SCRIPTS = [f'{path.parent.name}.{path.stem}' for name in FOLDERS for path in (ROOT / name).glob('*.py')]


@pytest.fixture
def benchmark(monkeypatch):
    """Returns a function that imports a benchmark, and makes the network and the batches small."""
    monkeypatch.setitem(models.MODELS, 'resnet20', conftest.SmallResNet20)
    monkeypatch.setitem(plain.NETWORKS, 'resnet20', conftest.SmallResNet20)
    before = set(sys.modules)
    run = importlib.import_module('benchmarks.run')
    monkeypatch.setattr(run, 'BATCH', 8)
    monkeypatch.setattr(run, 'SPLIT', 2)
    monkeypatch.setattr(run, 'machine', lambda: {'matrix_gflops': 1.0, 'copy_gbytes_per_second': 1.0})
    monkeypatch.setattr(
        run,
        'metric_times',
        lambda: dict.fromkeys(('all_seconds', 'auroc_of_100_seconds', 'baseline_auroc_of_100_seconds'), 1),
    )
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name.startswith(FOLDERS):
            del sys.modules[name]


def numbers(results):
    if isinstance(results, dict):
        return [number for value in results.values() for number in numbers(value)]
    return [results] if isinstance(results, int | float) else []


def test_run(benchmark, tmp_path, capsys):
    """Measures the published formulation too, and prints tables with and without it."""
    path = tmp_path / 'benchmark.json'
    flags = ['--models=resnet20', '--repeats=1', '--seconds=0', '--testimages=12', '--testmc=2', '--baselinerepeats=1']
    run = benchmark('benchmarks.run')
    run.main([*flags, f'--json={path}'])
    assert 'as published' in capsys.readouterr().out
    results = json.loads(path.read_text())
    measured = results['resnet20']
    assert all(math.isfinite(number) for number in numbers(measured)) and measured['seconds']['bsam'] > 0
    assert measured.pop('baseline')['step_seconds'] > 0
    measured['turns']['bsam'] = {'own': [3, 5], 'reference': [1, 2]}
    run.print_table(results, 'float32')
    table = capsys.readouterr().out
    assert 'as published' not in table and '2.50 to 3.00' in table


@pytest.mark.parametrize('name', sorted({*SCRIPTS} - MODULES))
def test_help(benchmark, capsys, name):
    with pytest.raises(SystemExit) as stop:
        benchmark(name).main(['--help'])
    assert not stop.value.code and 'usage' in capsys.readouterr().out


def sizes_of_weights(network):
    images = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), images, train=False))
    return sorted(leaf.size for leaf in jax.tree.leaves(variables['params']))


@pytest.mark.parametrize('model', plain.NETWORKS)
def test_peers_have_the_weights_of_the_networks(model):
    expected = sizes_of_weights(models.create(model, 10))
    assert sizes_of_weights(plain.NETWORKS[model](10)) == expected
    peers_torch = pytest.importorskip('benchmarks.peers_torch', exc_type=ImportError)
    assert sorted(p.numel() for p in peers_torch.NETWORKS[model]().parameters()) == expected


@pytest.mark.parametrize(('name', 'rho'), [('sgd', None), ('sam', 0.05)])
@pytest.mark.parametrize('num_sub_batches', [1, 2])
def test_peers_take_our_steps(benchmark, name, rho, num_sub_batches):
    """Plain Flax and Optax take our steps of SGD and SAM, on the whole batch and in sub-batches."""
    stepper = benchmark('benchmarks.peers').PlainStepper('resnet20', num_sub_batches, rho)
    settings = {} if rho is None else {'rho': rho, 'num_sub_batches': num_sub_batches}
    loss = plain.loss_function(plain.NETWORKS['resnet20'](10))
    optimizer = optimizers.OPTIMIZERS[name](loss, learning_rate=0.01, weight_decay=5e-4, **settings)
    params = jax.tree.map(lambda w: 5 * w, stepper.params)  # large weights, so that weight decay shows
    stepper.params = jax.tree.map(jnp.copy, params)
    state = optimizer.init(params, {}, jax.random.key(0))
    batch = jax.tree.map(lambda *parts: jnp.concatenate(parts), *stepper.sub_batches)
    for _ in range(3):
        state, _ = jax.jit(optimizer.step)(state, batch)
        theirs = stepper()
    for found, expected in zip(*map(jax.tree.leaves, (theirs, state.params)), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def cells_of(table, line):
    return [cell.strip() for cell in table.splitlines()[line].strip('|').split('|')]


def test_tables_of_peers(benchmark):
    """SGD is compared with the faster step of a peer, and ratios are medians over the turns."""
    peers = benchmark('benchmarks.peers')
    ours = {'sgd_in_pieces': [1, 2], 'sam': [3, 3], 'sam_in_8': [2, 2], 'bsam_in_8': [2, 2]}
    flax = {'sgd': [2, 6], 'sgd_in_pieces': [1, 3], 'sam': [6, 6], 'sam_in_8': [5, 5]}
    turns = {'ours': ours, 'flax': flax, 'published': {'bsam_in_8': [9, 11]}}
    assert peers.rates(turns) == {
        'flax': {'sgd': 2.5, 'sgd_in_pieces': 1.25, 'sam': 2, 'sam_in_8': 2.5},
        'published': {'bsam_in_8': 5},
    }
    results = {model: {'turns': turns | dict.fromkeys(('torch', 'compiled'), flax)} for model in plain.NETWORKS}
    assert cells_of(peers.short_table(results), 2) == ['plain Flax, Optax', '2.50', '2.50', '–', '1.25', '2.50', '–']
    assert cells_of(peers.table(results['resnet18']), 2) == [
        'these scripts',
        '–',
        '1.50 s',
        '3.00 s',
        '2.00 s',
        '2.00 s',
    ]


def test_published_steps_elsewhere(benchmark):
    """A process at the other end of a pipe starts, and names its JAX."""
    elsewhere = benchmark('benchmarks.peers').Elsewhere(sys.executable, 'resnet20')
    assert elsewhere.jax_version == jax.__version__
    elsewhere.close()


def test_figures_that_could_not_be_written(benchmark, tmp_path, capsys):
    """A path that cannot be written is refused before anything is measured."""
    for path, reason in ((tmp_path, 'is a folder: give the path of a file'), (tmp_path / 'a' / 'b', 'create it first')):
        with pytest.raises(SystemExit) as stop:
            benchmark('benchmarks.run').main([f'--json={path}'])
        assert stop.value.code == 2 and reason in capsys.readouterr().err


@pytest.mark.slow
def test_methods(benchmark, forked_jobs, datasets, tmp_path):
    """Two optimizers, with one draw and one seed each."""
    flags = ['--model=mlp', '--optimizers', 'sgd', 'sam', '--draws=1', '--tuneepochs=1', '--epochs=1', '--seeds=1']
    flags += ['--dataset=mnist', '--batchsize=20', '--batchsplit=2', f'--datasetfolder={datasets}']
    benchmark('studies.methods').main([*flags, f'--folder={tmp_path / "runs"}', f'--output={tmp_path / "mnist"}'])
    results = json.loads((tmp_path / 'mnist.json').read_text())['optimizers']
    assert all(found['chosen'] == found['tried'][0]['settings'] for found in results.values())
    assert '| sgd, mean' in (tmp_path / 'mnist.md').read_text() and (tmp_path / 'mnist.csv').exists()


@pytest.mark.parametrize(
    ('flags', 'reason'),
    [
        (['--dataset=moons'], "unknown: 'moons'"),
        (['--batchsize=51'], 'use --batchsize 50 or 55'),
        (['--optimizers', 'sgd', 'swag', '--epochs=1'], 'swag needs two epochs'),
        (['--optimizers', 'sgd', '--seeds=1'], 'a single run cannot be compared'),
    ],
)
def test_methods_that_would_fail_are_not_begun(benchmark, flags, reason, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark('studies.methods').main([*flags, f'--folder={tmp_path / "runs"}', f'--output={tmp_path / "mnist"}'])
    assert stop.value.code == 2 and reason in capsys.readouterr().err and not (tmp_path / 'runs').exists()


@pytest.mark.parametrize(
    ('text', 'name', 'reason'),
    [
        (None, 'growth.png', 'growth.json is damaged or cannot be read: '),
        ('{', 'growth.png', 'growth.json is damaged or cannot be read: '),
        ('[]', 'growth.png', 'growth.json is damaged or cannot be read: it is not a JSON object'),
        ('{"batch": {"seconds": {}}}', 'growth.png', 'growth.json lacks the panels sub_batches, samples, parameters'),
        ('{}', 'growth.txt', 'growth.txt: the name of the picture must end in .png'),
    ],
)
def test_figures_that_cannot_be_plotted(benchmark, text, name, reason, tmp_path, capsys):
    figures, picture = tmp_path / 'growth.json', tmp_path / name
    if text is not None:
        figures.write_text(text)
    with pytest.raises(SystemExit) as stop:
        benchmark('benchmarks.growth').main(['--plot', str(figures), str(picture)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and reason in error and not picture.exists()


def test_more_processes_than_cores(benchmark, monkeypatch, capsys):
    monkeypatch.setattr('os.cpu_count', lambda: 1)
    with pytest.raises(SystemExit) as stop:
        benchmark('benchmarks.scaling').main(['measure'])
    assert stop.value.code == 2 and '--processes 2 needs 2 CPU cores, and this machine has 1' in capsys.readouterr().err


@pytest.mark.slow
def test_growth(benchmark, tmp_path, monkeypatch):
    growth = benchmark('benchmarks.growth')
    monkeypatch.setattr(growth, 'TURNS', 1)
    for name, (make, optims, _) in growth.PANELS.items():
        monkeypatch.setitem(growth.PANELS, name, (make, optims[-1:], (25, 50) if name == 'batch' else (1, 2)))
    figures, picture = tmp_path / 'growth.json', tmp_path / 'growth.png'
    growth.main([f'--json={figures}'])
    assert set(json.loads(figures.read_text())) == set(growth.PANELS)
    growth.main(['--plot', str(figures), str(picture)])
    assert picture.read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
def test_loading(benchmark, tmp_path):
    """One training image per class, and an epoch of one batch, both resident and streamed."""
    path = tmp_path / 'loading.json'
    flags = ['--perclass=1', '--trained=1', '--epochs=1', '--turns=1']
    benchmark('benchmarks.loading').main([*flags, f'--json={path}'])
    figures = json.loads(path.read_text())
    assert len(figures['epoch_seconds']) == len(figures['streamed_epoch_seconds']) == 1
    assert figures['decoded_per_second'] > 0 and figures['setup_seconds'] > 0


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='a profile of CPUs')
def test_convolutions(benchmark, tmp_path, monkeypatch):
    """Each kind has 2·9·3·4 operations per pixel, for 25 images of 32×32 pixels, and takes some time."""
    path = tmp_path / 'convolutions.json'
    monkeypatch.setenv('PJRT_NPROC', '1')  # the benchmark sets it as well; monkeypatch undoes this
    benchmark('benchmarks.convolutions').main(['--model=resnet20', f'--json={path}'])
    table = json.loads(path.read_text())['milliseconds_and_gflop']
    assert set(table) == {'forward, stem', 'kernel gradient, stem'}
    for milliseconds, gflop in table.values():
        assert gflop == pytest.approx(2 * 9 * 3 * 4 * 25 * 32 * 32 / 1e9) and milliseconds > 0


@pytest.mark.parametrize(
    ('op_name', 'kind'),
    [
        ('jvp(ResNet18)/stage1/block1/layer1/conv/dot_general', 'forward, stage1'),
        ('transpose(jvp(ResNet18))/stage2/block1/shortcut/conv/input_gradient/dot_general', 'input gradient, stage2'),
        ('transpose(jvp(ResNet20))/stem/conv/kernel_gradient/while/body/add', 'kernel gradient, stem'),
        ('transpose(jvp(ResNet20))/stem/conv/reduce_sum', None),
        ('jvp(ResNet18)/stage1/block1/layer1/norm/reduce_sum', None),
        ('', None),
    ],
)
def test_kind_of_operation(benchmark, op_name, kind):
    """The gradient of a bias does not count as part of a convolution."""
    hlo = f'  %fusion.7 = f32[25,64] fusion(%a), metadata={{op_name="jit(gradient)/{op_name}" source_line=4}}\n'
    loop = '  %while.2 = (f32[1]) while(%b), metadata={op_name="jit(gradient)/stem/conv/while"}\n'
    assert benchmark('benchmarks.convolutions').kinds_of_operations(hlo + loop) == {'fusion.7': kind}


def test_convolutions_of_a_gpu(benchmark, monkeypatch, capsys):
    monkeypatch.setenv('PJRT_NPROC', '1')
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    with pytest.raises(SystemExit, match='2'):
        benchmark('benchmarks.convolutions').main([])
    assert 'set JAX_PLATFORMS=cpu' in capsys.readouterr().err


def test_throughput(benchmark, tmp_path, capsys):
    path = tmp_path / 'throughput.json'
    ways = ['sgd', 'bsam_on_a_mesh_of_one_device']
    flags = ['--model=resnet20', '--precisions=float32', '--ways', *ways, '--batchsize=8', '--steps=1', '--repeats=1']
    throughput = benchmark('benchmarks.throughput')
    throughput.main([*flags, '--matrix=32', '--compilecache=off', f'--json={path}'])
    measured = json.loads(path.read_text())['float32']
    assert list(measured) == ways and min(numbers(measured)) > 0
    assert '| bSAM on a mesh of one device ' in capsys.readouterr().out


def test_scaling_joins_processes(benchmark, monkeypatch):
    """hosts.join is called with the right arguments, and is not called for a single process."""
    scaling = benchmark('benchmarks.scaling')
    join = mock.create_autospec(scaling.hosts.join)
    monkeypatch.setattr(scaling.hosts, 'join', join)
    assert scaling.joined(1, 0, 'host:1').size == scaling.joined(2, 1, 'host:1').size
    join.assert_called_once_with('scaling.py', 'host:1', 2, 1)


def test_scaling_counts_convolutions_as_gpus_compute_them(benchmark, traced_anew, monkeypatch):
    """Two gradients over one sub-batch: forward, kernel gradients, and the second convolution's input gradient."""
    monkeypatch.setitem(models.MODELS, 'resnet20', conftest.TwoConvolutions)
    scaling = benchmark('benchmarks.scaling')
    weighted_pixels = (3 * 32 - 2) ** 2  # of a 3×3 kernel on 32×32 pixels, without those beyond the border
    flops = 2 * 2 * scaling.SUB_BATCH * weighted_pixels * 32 * (2 * 3 + 3 * 32)
    assert 1 < scaling.count('resnet20', 1)['flops'] / flops < 1.2
