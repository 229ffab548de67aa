"""How fast is it: the step, its parts, evaluation, start and memory, against the published formulation and the machine.

    python benchmarks/run.py --json results/benchmark.json

Everything is measured in this process, in turns, on synthetic images; a figure is the median of its repeats.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import baseline  # noqa: E402

import data  # noqa: E402
import evaluation  # noqa: E402
import experiments  # noqa: E402
import metrics  # noqa: E402
import optimizers  # noqa: E402
import runs  # noqa: E402
import training  # noqa: E402

BATCH, SPLIT = 200, 8
# Forward pass of an image at 32×32 in multiply-adds, convolutions and head; a gradient costs three forward passes.
MULTIPLY_ADDS = {'resnet18': 0.5554e9, 'resnet20': 0.0408e9}


def main(argv=None):
    args = parse_args(argv)
    results = {'environment': runs.environment(), 'machine': machine()}
    for model in args.models:
        results[model] = {
            **step_times(model, args.precision, args.repeats, args.baseline),
            **evaluation_times(model, args.precision, args.testimages),
            'memory': step_memory(model, args.precision),
        }
    results['metrics'] = metric_times(args.baseline)
    if args.start:
        results['start'] = {model: start_times(model) for model in args.models}
    print_table(results, args.precision)
    if args.json:
        runs.write_json(args.json, results)


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('--models', nargs='+', choices=MULTIPLY_ADDS, default=list(MULTIPLY_ADDS), help='networks')
    parser.add_argument('--precision', choices=('float32', 'bfloat16'), default='float32', help='see train.py')
    parser.add_argument('--repeats', type=int, default=5, help='repeats of a step')
    parser.add_argument('--testimages', type=int, default=1000, help='images that are evaluated')
    help = 'measure the published formulation too: minutes for ResNet-18 on a CPU'
    parser.add_argument('--baseline', action=argparse.BooleanOptionalAction, default=True, help=help)
    help = 'measure train.py from the command to the end of its first step, without and with compiled functions'
    parser.add_argument('--start', action=argparse.BooleanOptionalAction, default=True, help=help)
    parser.add_argument('--json', type=Path, help='write all figures here')
    return parser.parse_args(argv)


def seconds(function, *args):
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def medians(repeats, **functions):
    """Median seconds of each function of no arguments, called in turns after a first call of each that compiles."""
    first = {name: seconds(function) for name, function in functions.items()}
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return {name: statistics.median(t) for name, t in times.items()}, first


def machine():
    """The bounds of the machine: a large matrix product and a large copy, both at their best of five."""
    x = jnp.ones((3000, 3000))
    product = jax.jit(lambda x: x @ x)
    large = jnp.ones(100_000_000)
    copy = jax.jit(lambda x: x + 1)
    seconds(product, x), seconds(copy, large)
    return {
        'matrix_gflops': 2 * 3000**3 / min(seconds(product, x) for _ in range(5)) / 1e9,
        'copy_gbytes_per_second': 2 * large.nbytes / min(seconds(copy, large) for _ in range(5)) / 1e9,
    }


def configuration(model, optim, precision):
    flags = {
        'model': model, 'optim': optim, 'precision': precision, 'alpha': 0.01, 'beta1': 0.9, 'beta2': 0.999,
        'priorprec': 25.0, 'dafactor': 1.0, 'rho': 0.01, 'batchsplit': SPLIT, 'custominit': 1.0, 'damping': 0.1,
    }  # fmt: skip
    row = data.DATASETS['cifar10']
    dataset = {'num_train': 50_000, 'num_classes': 10, 'image_shape': [32, 32, 3], 'mean': row.mean, 'std': row.std}
    return {'flags': flags, 'dataset': dataset}


def synthetic_images(n):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, n).astype(np.int32)


class Stepper:
    """train.py's step of one optimizer on synthetic images; a call does the next step and returns its state."""

    def __init__(self, model, optim, precision):
        experiment = experiments.create(configuration(model, optim, precision))

        def prepare(key, batch):
            return experiment.normalise(data.augment(key, batch))

        self.step = training.step_function(experiment.optimizer, prepare)
        self.images, self.labels = jax.device_put(synthetic_images(1000))
        self.state = jax.jit(experiment.init)(jax.random.key(0))
        self.epoch = training.start_epoch(jax.random.key(1), jnp.int32(0), 1000, BATCH)
        self.lr_factor = jnp.float32(1)

    def arguments(self):
        return self.state, self.epoch, self.images, self.labels, self.lr_factor

    def __call__(self):
        self.state, epoch = self.step(*self.arguments())
        self.epoch = epoch._replace(step=epoch.step % 5)
        return self.state


def step_times(model, precision, repeats, with_baseline):
    """Seconds of a step of each optimizer, of one gradient over the same sub-batches, and of the baseline."""
    config = configuration(model, 'bsam', precision)
    experiment = experiments.create(config)
    network = experiments.models.create(model, 10)
    loss = training.loss_function(network, jnp.dtype(precision))
    state = jax.jit(experiment.init)(jax.random.key(0))
    images, labels = synthetic_images(BATCH)
    batch = experiment.normalise(jnp.asarray(images)), jnp.asarray(labels)

    @jax.jit
    def gradient(params, batch_stats, batch):
        def of_sub_batch(sub_batch, key):
            (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params, batch_stats, sub_batch)
            return grads, value, stats

        return optimizers._over_sub_batches(of_sub_batch, batch, SPLIT, jax.random.key(0))

    resident = jax.jit(experiment.optimizer.step, donate_argnums=0)
    states = {'resident': jax.tree.map(jnp.copy, state)}

    def step_on_resident_batch():
        states['resident'], _ = resident(states['resident'], batch, 1.0)
        return states['resident']

    functions = {
        'gradient': partial(gradient, state.params, state.batch_stats, batch),
        'sgd': Stepper(model, 'sgd', precision),
        'sam': Stepper(model, 'sam', precision),
        'bsam': Stepper(model, 'bsam', precision),
        'bsam_on_a_batch_at_hand': step_on_resident_batch,
    }
    times, first = medians(repeats, **functions)
    results = {
        'seconds': times,
        'compile_seconds': {name: first[name] - times[name] for name in ('sgd', 'sam', 'bsam')},
        'bsam_over_gradient': times['bsam'] / times['gradient'],
        'sam_over_gradient': times['sam'] / times['gradient'],
        'bsam_share_besides_gradients': 1 - 2 * times['gradient'] / times['bsam'],
        'data_share': times['bsam'] / times['bsam_on_a_batch_at_hand'] - 1,
        'gradient_gflops': 6 * MULTIPLY_ADDS[model] * BATCH / times['gradient'] / 1e9,
    }
    if with_baseline:
        results['baseline_seconds'], results['baseline_compile_seconds'] = baseline_times(config, loss, state)
        results['speed_up'] = results['baseline_seconds'] / times['bsam']
    return results


def baseline_times(config, loss, state):
    settings = {name: config['flags'][name] for name in ('alpha', 'beta1', 'beta2', 'rho', 'batchsplit', 'damping')}
    step = baseline.bsam_step(loss, **settings, weight_decay=25 / 50_000, num_data=50_000)
    images, labels = synthetic_images(1000)
    rng = np.random.default_rng(0)
    carried = (state.params, state.momentum, state.precision, state.batch_stats, state.key)

    def whole_step():
        batch = baseline.host_batch(rng, images, labels, BATCH, config['dataset']['mean'], config['dataset']['std'])
        *_, value = step(*carried, batch)
        return float(value)

    first = seconds(whole_step)
    again = seconds(whole_step)
    return again, first - again


def evaluation_times(model, precision, num_images):
    """33 passes as test.py makes them, 32 of them with sampled weights, over 33 plain forward passes."""
    experiment = experiments.create(configuration(model, 'bsam', precision))
    state = jax.jit(experiment.init)(jax.random.key(0))
    images = jax.device_put(synthetic_images(num_images)[0])
    sample = partial(jax.jit(experiment.optimizer.sample), state)

    def predict(params):
        return experiment.probs(params, state.batch_stats, images, BATCH)

    def evaluate():
        return predict(state.params) + evaluation.posterior_probs(predict, sample, jax.random.key(0), 32)

    def plain():
        forward = partial(evaluation.logits, experiment.apply, state.params, state.batch_stats, images, BATCH)
        return [forward() for _ in range(33)]

    times, _ = medians(3, evaluate=evaluate, plain=plain)
    return {
        'forward_images_per_second': 33 * num_images / times['plain'],
        'evaluation_over_forward': times['evaluate'] / times['plain'],
    }


def metric_times(with_baseline):
    """Seconds of all metrics over 10,000 × 200 probabilities; of the exact and the looped AUROC over 500 of them."""
    rng = np.random.default_rng(0)
    probs, labels = metrics.softmax(3 * rng.normal(size=(10_000, 200))), rng.integers(0, 200, 10_000)
    results = {
        'all_seconds': statistics.median(seconds(metrics.summary, probs, labels) for _ in range(5)),
        'auroc_of_500_seconds': statistics.median(
            seconds(metrics.auroc_grid, probs[:500], labels[:500]) for _ in range(5)
        ),
    }
    if with_baseline:
        few = jnp.asarray(probs[:500]), jnp.asarray(labels[:500])
        results['baseline_auroc_of_500_seconds'] = seconds(baseline.auroc, *few)
    return results


def step_memory(model, precision):
    """Bytes of a compiled bSAM step, in units of one copy of the parameters."""
    stepper = Stepper(model, 'bsam', precision)
    analysis = stepper.step.lower(*stepper.arguments()).compile().memory_analysis()
    one_copy = sum(leaf.nbytes for leaf in jax.tree.leaves(stepper.state.params))
    return {
        'parameter_bytes': one_copy,
        'temporary_copies': analysis.temp_size_in_bytes / one_copy,
        'argument_copies': analysis.argument_size_in_bytes / one_copy,
        'output_copies_not_in_place': (analysis.output_size_in_bytes - analysis.alias_size_in_bytes) / one_copy,
        'temporary_bytes': analysis.temp_size_in_bytes,
    }


def start_times(model):
    """Seconds of a whole `train.py` run of one bSAM step, at first and with the compiled functions at hand."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        records = np.random.default_rng(0).integers(0, 10, (40, 3073), np.uint8)
        (folder / 'cifar-10-batches-bin').mkdir()
        for name in [*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch']:
            (folder / 'cifar-10-batches-bin' / f'{name}.bin').write_bytes(records.tobytes())
        flags = f'--model {model} --optim bsam --alpha 0.01 --epochs 0 --datasetfolder {folder}'.split()
        flags += ['--resultsfolder', str(folder / 'results'), '--compilecache', str(folder / 'compiled')]
        command = [sys.executable, str(ROOT / 'train.py'), *flags]
        run = partial(subprocess.run, command, check=True, capture_output=True)
        return {'first': seconds(run), 'second': seconds(run)}


def print_table(results, precision):
    environment, bounds = results['environment'], results['machine']
    versions = environment['versions']
    print(f'{environment["device"]}; Python {environment["python"]}, JAX {versions["jax"]}; {precision}')
    print(f'matrix product {bounds["matrix_gflops"]:.0f} GFLOP/s, copy {bounds["copy_gbytes_per_second"]:.0f} GB/s')
    models = [model for model in MULTIPLY_ADDS if model in results]
    print(f'{f"batch {BATCH} in {SPLIT} sub-batches":<58}' + ''.join(f'{model:>12}' for model in models))
    for label, pick in rows(results):
        cells = []
        for model in models:
            try:
                cells.append(f'{pick(results[model]):>12}')
            except KeyError:
                cells.append(f'{"-":>12}')
        print(f'{label:<58}' + ''.join(cells))
    print(f'all metrics, 10,000 × 200: {results["metrics"]["all_seconds"]:.3f} s')
    for model, times in results.get('start', {}).items():
        print(f'train.py, one bSAM step of {model}: {times["first"]:.1f} s, then {times["second"]:.1f} s')


def rows(results):
    rate = results['machine']['matrix_gflops']
    return [
        ('SGD step, s', lambda r: f'{r["seconds"]["sgd"]:.3f}'),
        ('SAM step, s', lambda r: f'{r["seconds"]["sam"]:.3f}'),
        ('bSAM step, s', lambda r: f'{r["seconds"]["bsam"]:.3f}'),
        ('bSAM, published formulation, s', lambda r: f'{r["baseline_seconds"]:.3f}'),
        ('bSAM, times faster than the published formulation', lambda r: f'{r["speed_up"]:.2f}'),
        ('SAM / one gradient over the same sub-batches', lambda r: f'{r["sam_over_gradient"]:.3f}'),
        ('bSAM / one gradient over the same sub-batches', lambda r: f'{r["bsam_over_gradient"]:.3f}'),
        ('bSAM, share besides the gradients', lambda r: f'{r["bsam_share_besides_gradients"]:.1%}'),
        ('slower than on a batch at hand', lambda r: f'{r["data_share"]:.1%}'),
        ('gradients, GFLOP/s', lambda r: f'{r["gradient_gflops"]:.0f}'),
        ('gradients, share of the matrix product', lambda r: f'{r["gradient_gflops"] / rate:.0%}'),
        ('forward pass, images/s', lambda r: f'{r["forward_images_per_second"]:.0f}'),
        ('test.py --testmc 32 / 33 forward passes', lambda r: f'{r["evaluation_over_forward"]:.3f}'),
        (
            'bSAM step, temporary memory, parameter copies',
            lambda r: f'{r["memory"]["temporary_copies"]:.1f}',
        ),
        ('compilation of a bSAM step, s', lambda r: f'{r["compile_seconds"]["bsam"]:.1f}'),
        ('compilation, published formulation, s', lambda r: f'{r["baseline_compile_seconds"]:.1f}'),
    ]


if __name__ == '__main__':
    main()
