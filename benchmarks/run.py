"""Times training steps and evaluation, and measures memory, against the published formulation and the machine.

    python benchmarks/run.py --json results/benchmark.json

Images are synthetic. Calls that are compared run in turns in this process. A step runs between two calls of the
gradient that it is compared with. Times are medians over the turns. Ratios are medians of each turn's ratio.
"""

import itertools
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import experiment
import metrics
import models
import optimizers
from benchmarks import baseline, plain
from evaluation import posteriors, tables
from ops import sharding
from runs import devices, json_files, launch, parsing, provenance, training_flags

BATCH, SPLIT = 200, 8
# Multiply-adds of a forward pass over one 32×32 image, in convolutions and head. A gradient costs three forward passes.
MULTIPLY_ADDS = {'resnet18': 0.5554e9, 'resnet20': 0.0408e9}
NAMES = {'resnet18': 'ResNet-18', 'resnet20': 'ResNet-20'}


@launch.script('run.py')
def main(argv=None):
    args = parse_args(argv)
    results = provenance.of_command('benchmarks/run.py', argv) | {'machine': machine()}
    for model in args.models:
        turns = partial(lasting, args.repeats, args.seconds)
        results[model] = step_times(model, args.precision, turns())
        results[model] |= evaluation_times(model, args.precision, turns(), args.testimages, args.testmc)
        results[model]['memory'] = step_memory(model, args.precision)
        if args.baselinerepeats:
            turns = lasting(args.baselinerepeats, args.seconds)
            results[model]['baseline'] = baseline_times(model, args.precision, turns)
        report(f'{model} is done')
    results['metrics'] = metric_times()
    print_table(results, args.precision)
    if args.json:
        json_files.write_json(args.json, results)


def parse_args(argv):
    parser = parsing.Parser(__doc__)
    add = parser.add_argument
    add('--models', nargs='+', choices=MULTIPLY_ADDS, default=list(MULTIPLY_ADDS), help='networks')
    add('--precision', choices=training_flags.PRECISIONS, default='float32', help='see train.py')
    add('--repeats', type=parsing.integer(1), default=5, help='minimum number of turns for steps and for evaluation')
    add(
        '--seconds',
        type=parsing.integer(0),
        default=60,
        help='minimum seconds for each comparison, which gets more turns until then',
    )
    add('--testimages', type=parsing.integer(1), default=1000, help='images to evaluate')
    add('--testmc', type=parsing.integer(1), default=8, help='posterior samples to average predictions over')
    help = 'minimum number of turns for the published formulation, minutes each on a CPU; 0 leaves it out'
    add('--baselinerepeats', type=parsing.integer(0), default=2, help=help)
    add('--json', type=parsing.new_file, help='write all figures to this JSON file')
    args = parser.parse_args(argv)
    if args.baselinerepeats and args.precision != 'float32':
        parser.error(
            f'the published formulation has float32 only: add --baselinerepeats 0 to --precision {args.precision}'
        )
    return args


def report(message):
    """Prints a message with the time to stderr."""
    print(f'{time.strftime("%H:%M:%S")} {message}', file=sys.stderr, flush=True)


def seconds(function, *args, calls=1):
    """Returns the seconds per call of a function. Sends all calls one after another, and waits for the last result."""
    start = time.perf_counter()
    for _ in range(calls):
        result = function(*args)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def lasting(repeats, least_seconds):
    """Yields turn numbers until there were `repeats` turns and `least_seconds` have passed."""
    began = time.perf_counter()
    for turn in itertools.count():
        if turn >= repeats and time.perf_counter() - began >= least_seconds:
            return
        yield turn


def in_turns(turns, functions, calls=1):
    """Times functions without arguments in turns.

    In each turn a function is called once without timing before its timed calls, because the function before it may
    still be freeing memory.

    Args:
        turns: an iterable, with one entry per turn.
        functions: {name: function}.
        calls: timed calls of each function in a turn.

    Returns:
        {name: [seconds per call, for each turn]}, and {name: seconds of the first call, which compiles}.
    """
    first = {name: seconds(function) for name, function in functions.items()}
    times = {name: [] for name in functions}
    for _ in turns:
        for name, function in functions.items():
            seconds(function)
            times[name].append(seconds(function, calls=calls))
    return times, first


def around(turns, reference, functions):
    """Times functions without arguments, each between two calls of a reference.

    Args:
        turns: an iterable, with one entry per turn.
        reference: the function that is called before and after each of the others.
        functions: {name: function}.

    Returns:
        {name: {'own': [seconds, for each turn], 'reference': [mean of the two reference calls, for each turn]}}, and
        {name: seconds of the first call, which compiles}.
    """
    first = {name: seconds(function) for name, function in functions.items()}
    times = {name: {'own': [], 'reference': []} for name in functions}
    seconds(reference)
    before = seconds(reference)
    for _ in turns:
        for name, function in functions.items():
            times[name]['own'].append(seconds(function))
            after = seconds(reference)
            times[name]['reference'].append((before + after) / 2)
            before = after
    return times, first


def ratio(numerators, denominators):
    """Returns the median of the ratios."""
    return statistics.median(ratios(numerators, denominators))


def ratios(numerators, denominators):
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def machine():
    """Returns the rates of a large matrix product and of a large copy on this machine, the best of five each."""
    return {'matrix_gflops': matrix_rate(3000, 'float32') / 1e9, 'copy_gbytes_per_second': copy_rate() / 1e9}


def matrix_rate(size, precision):
    """Returns operations per second in the product of two [size, size] matrices, the best of five."""
    x = jax.random.normal(jax.random.key(0), (size, size), precision)
    product = jax.jit(lambda x: x @ x)
    seconds(product, x)
    return 2 * size**3 / min(seconds(product, x) for _ in range(5))


def copy_rate():
    """Returns bytes per second that a large copy reads and writes, the best of five."""
    large = jnp.ones(100_000_000)
    copy = jax.jit(lambda x: x + 1)
    seconds(copy, large)
    return 2 * large.nbytes / min(seconds(copy, large) for _ in range(5))


def configuration(model, optim, precision, batchsplit=SPLIT, **given):
    """Returns a run's configuration for CIFAR-10. given: flags that differ from the defaults."""
    values = (
        vars(training_flags.parse_args([f'--model={model}', f'--optim={optim}', f'--precision={precision}']))
        | {'batchsize': BATCH}
        | given
    )
    values |= {'alpha': 0.01, 'rho': values['rho'] and 0.01, 'batchsplit': values['batchsplit'] and batchsplit}
    row = data.DATASETS['cifar10']
    dataset = {'num_train': 50_000, 'num_classes': 10, 'image_shape': [32, 32, 3], 'mean': row.mean, 'std': row.std}
    return {'flags': values, 'dataset': dataset}


def synthetic_images(n):
    """Returns random images uint8 [n, 32, 32, 3] and labels int32 [n] of 10 classes."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, n).astype(np.int32)


def batch_at_hand(functions, batch_size=BATCH):
    """Returns a normalised batch of synthetic images on the device."""
    images, labels = synthetic_images(batch_size)
    return functions.normalise(jnp.asarray(images)), jnp.asarray(labels)


def feed_of(functions, batch_size, mesh):
    """Returns train.py's data.Feed of synthetic images, with five batches per epoch."""
    arrays = *synthetic_images(5 * batch_size), batch_size, jax.random.key(1), mesh
    return data.Feed(*arrays, functions.normalise, augmented=True, streamed=False)


def posterior_of(model, optim, precision, batch_size):
    """Returns the Posterior of an initial state, and a function of `images` that returns logits at the mean."""
    functions = experiment.create(configuration(model, optim, precision))
    state = sharding.send(jax.jit(functions.init)(jax.random.key(0)))
    sample = Partial(functions.optimizer.sample, state)
    apply, params, batch_stats = functions.apply, state.params, state.batch_stats
    posterior = posteriors.Posterior(apply, sample, params, batch_stats, jax.random.key(0), batch_size, is_point=False)
    return posterior, partial(posteriors.logits, apply, params, batch_stats, batch_size=batch_size)


class Trainer:
    """Takes train.py's steps of one optimizer on synthetic images. Each call takes a step and returns the state."""

    def __init__(self, model, optim, precision, batch_size=BATCH, batchsplit=SPLIT, **given):
        config = configuration(model, optim, precision, batchsplit, batchsize=batch_size, **given)
        functions = experiment.create(config)
        self.step, self.state = functions.step, jax.jit(functions.init)(jax.random.key(0))
        feed = feed_of(functions, batch_size, devices.create_mesh(1))
        self.batches = itertools.chain.from_iterable(feed.batches(epoch) for epoch in itertools.count())
        self.lr_factor = jnp.float32(1)

    def arguments(self):
        return self.state, next(self.batches), self.lr_factor

    def __call__(self):
        self.state, _ = self.step(*self.arguments())
        return self.state


class TrainerOfOneBatch:
    """Takes steps over one batch that is on the device already, to time steps without making batches."""

    def __init__(self, model, optim, precision, batchsplit=SPLIT):
        functions = experiment.create(configuration(model, optim, precision, batchsplit))
        self.step = jax.jit(functions.optimizer.step, donate_argnums=0)
        self.state, self.batch = jax.jit(functions.init)(jax.random.key(0)), batch_at_hand(functions)

    def __call__(self):
        self.state, _ = self.step(self.state, self.batch, 1.0)
        return self.state


def gradient_over_sub_batches(model, precision, batch_size=BATCH, batchsplit=SPLIT):
    """Returns a jitted gradient(state, batch), averaged over the sub-batches of a batch, and arguments for it."""
    config = configuration(model, 'bsam', precision, batchsplit)
    functions = experiment.create(config)
    loss = experiment.loss_function(models.create(model, 10), jnp.dtype(precision))
    state = jax.jit(functions.init)(jax.random.key(0))

    @jax.jit
    def gradient(state, batch):
        def of_sub_batch(state, sub_batch, key):
            del key
            (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params, state.batch_stats, sub_batch)
            return grads, value, stats

        return optimizers.over_sub_batches(
            of_sub_batch, state, batch, batchsplit, jax.random.key(0), atonce=experiment.at_once(config['flags'])
        )

    return gradient, (state, batch_at_hand(functions, batch_size))


def step_times(model, precision, turns):
    """Times a step of each optimizer against one gradient over the same sub-batches."""
    gradient, arguments = gradient_over_sub_batches(model, precision)
    functions = {
        'sgd': Trainer(model, 'sgd', precision),
        'sam': Trainer(model, 'sam', precision),
        'bsam': Trainer(model, 'bsam', precision),
        'bsam_on_one_batch': TrainerOfOneBatch(model, 'bsam', precision),
    }
    times, first = around(turns, partial(gradient, *arguments), functions)
    median = {name: statistics.median(of['own']) for name, of in times.items()}
    median['gradient'] = statistics.median(itertools.chain(*(of['reference'] for of in times.values())))
    over_gradient = {name: ratio(of['own'], of['reference']) for name, of in times.items()}
    return {
        'turns': times,
        'seconds': median,
        'compile_seconds': {name: first[name] - median[name] for name in ('sgd', 'sam', 'bsam')},
        'over_gradient': over_gradient,
        'bsam_share_besides_gradients': 1 - 2 / over_gradient['bsam'],
        'data_share': over_gradient['bsam'] / over_gradient['bsam_on_one_batch'] - 1,
        'gradient_gflops': 6 * MULTIPLY_ADDS[model] * BATCH / median['gradient'] / 1e9,
    }


def baseline_times(model, precision, turns):
    """Times a bSAM step and a forward pass as the published scripts compute them, in float32, in turns with ours."""
    config = configuration(model, 'bsam', precision)
    functions = experiment.create(config)
    network = plain.NETWORKS[model](10)
    state = jax.jit(functions.init)(jax.random.key(0))
    images, labels = synthetic_images(5 * BATCH)
    few = jax.device_put(images[:BATCH])
    params, batch_stats = plain.init(network, functions.normalise(few))
    mean, std = config['dataset']['mean'], config['dataset']['std']
    given = {name: config['flags'][name] for name in ('alpha', 'beta1', 'beta2', 'rho', 'batchsplit', 'damping')}
    num_data = config['dataset']['num_train']
    weight_decay = config['flags']['priorprec'] / num_data
    step = baseline.bsam_step(plain.loss_function(network), **given, weight_decay=weight_decay, num_data=num_data)
    zeros, ones = jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.ones_like, params)
    carried = params, zeros, ones, batch_stats, state.key
    rng = np.random.default_rng(0)

    def published_step():
        *_, value = step(*carried, baseline.host_batch(rng, images, labels, BATCH, mean, std))
        return float(value)

    variables = {'params': params, 'batch_stats': batch_stats}
    functions = {
        'bsam': Trainer(model, 'bsam', precision),
        'published_bsam': published_step,
        'logits': partial(posteriors.logits, functions.apply, state.params, state.batch_stats, few, BATCH),
        'published_logits': partial(baseline.logits, network, variables, functions.normalise(few), BATCH),
    }
    times, first = in_turns(turns, functions)
    return {
        'turns': times,
        'step_seconds': statistics.median(times['published_bsam']),
        'compile_seconds': first['published_bsam'] - statistics.median(times['published_bsam']),
        'step_speed_up': ratio(times['published_bsam'], times['bsam']),
        'logits_speed_up': ratio(times['published_logits'], times['logits']),
    }


def evaluation_times(model, precision, turns, num_images, num_samples):
    """Times an evaluation with all metrics and intervals, as in test.py, against the same number of forward passes.

    The evaluation has `num_samples` + 1 parts: the mean and the first sample, each further sample, and the metrics. A
    forward pass is timed right after each part.
    """
    posterior, logits = posterior_of(model, 'bsam', precision, BATCH)
    images, labels = synthetic_images(num_images)
    images = jax.device_put(images)

    def samples_then_metrics():
        for prediction in posterior.predict(images, range(1, num_samples + 1)):
            yield prediction
        yield prediction.measure(labels, num_bins=20)

    forward = partial(logits, images=images)
    next(samples_then_metrics()), forward()  # compiles
    times = {'evaluate': [], 'plain': []}
    for _ in turns:
        evaluated = samples_then_metrics()
        pairs = [(seconds(next, evaluated), seconds(forward)) for _ in range(num_samples + 1)]
        for name, of_parts in zip(times, zip(*pairs, strict=True), strict=True):
            times[name].append(sum(of_parts))
    return {
        'testmc': num_samples,
        'evaluation_turns': times,
        'forward_images_per_second': (num_samples + 1) * num_images / statistics.median(times['plain']),
        'evaluation_over_forward': ratio(times['evaluate'], times['plain']),
    }


def metric_times():
    """Returns the seconds of all metrics over probabilities [10,000, 200].

    Also returns the seconds of our AUROC and of the published AUROC over the first 100 rows.
    """
    rng = np.random.default_rng(0)
    probs, labels = metrics.softmax(3 * rng.normal(size=(10_000, 200))), rng.integers(0, 200, 10_000)
    few = jnp.asarray(probs[:100]), jnp.asarray(labels[:100])
    return {
        'all_seconds': statistics.median(seconds(metrics.summary, probs, labels) for _ in range(5)),
        'auroc_of_100_seconds': statistics.median(seconds(metrics.auroc_grid, *few) for _ in range(5)),
        'baseline_auroc_of_100_seconds': seconds(baseline.auroc, *few),
    }


def step_memory(model, precision):
    """Returns the peak memory of a bSAM step and of one sub-batch's gradient, as multiples of the parameters' size.

    Arguments and results are included.
    """
    trainer = Trainer(model, 'bsam', precision)
    loss = experiment.loss_function(models.create(model, 10), jnp.dtype(precision))
    images, labels = synthetic_images(BATCH // SPLIT)
    sub_batch = jnp.asarray(images, jnp.float32), jnp.asarray(labels)
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    one_copy = sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.state.params))
    step_bytes = peak_bytes(trainer.step, *trainer.arguments())
    gradient_bytes = peak_bytes(gradient, trainer.state.params, trainer.state.batch_stats, sub_batch)
    return {
        'parameter_bytes': one_copy,
        'step_bytes': step_bytes,
        'step_copies': step_bytes / one_copy,
        'gradient_copies': gradient_bytes / one_copy,
        'copies_besides_one_gradient': (step_bytes - gradient_bytes) / one_copy,
    }


def peak_bytes(function, *arguments):
    """Returns the bytes of a jitted function's arguments, temporary arrays, and results that reuse no argument."""
    memory = function.lower(*arguments).compile().memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes


def print_table(results, precision):
    """Prints the command, the machine, the table and the times of the metrics, as Markdown."""
    environment, bounds = results['environment'], results['machine']
    versions = environment['versions']
    print(f'`{results["command"]}`: {environment["device"]}; Python {environment["python"]}, JAX {versions["jax"]}; ')
    print(f'{precision}; matrix product {bounds["matrix_gflops"]:.0f} GFLOP/s,', end=' ')
    print(f'copy {bounds["copy_gbytes_per_second"]:.0f} GB/s\n')
    print(table(results))
    times = results['metrics']
    print(
        f'All metrics over 10,000 × 200 probabilities: {times["all_seconds"]:.3f} s. AUROC over 100 of them: ', end=''
    )
    print(f'{times["auroc_of_100_seconds"]:.4f} s, published {times["baseline_auroc_of_100_seconds"]:.1f} s.')


def table(results):
    """Returns all figures as a Markdown table with a column for each network."""
    measured = [model for model in NAMES if model in results]
    has_baseline = all('baseline' in results[model] for model in measured)
    figures = rows(results['machine'], has_baseline)
    shown = [[label, *(pick(results[model]) for model in measured)] for label, pick in figures]
    return tables.markdown([f'batch {BATCH} in {SPLIT} sub-batches', *(NAMES[model] for model in measured)], shown)


def rows(bounds, has_baseline):
    """Returns the table's rows, each as (label, function of a network's results that returns the cell).

    Args:
        bounds: the rates that `machine` returned.
        has_baseline: whether to add rows for the published formulation.
    """
    rate = bounds['matrix_gflops']
    own = [
        ('SGD step, seconds', lambda r: f'{r["seconds"]["sgd"]:.2f}'),
        ('SAM step, seconds', lambda r: f'{r["seconds"]["sam"]:.2f}'),
        ('bSAM step, seconds', lambda r: f'{r["seconds"]["bsam"]:.2f}'),
        ('SAM step ÷ one gradient', lambda r: f'{r["over_gradient"]["sam"]:.3f}'),
        ('… range over the turns', lambda r: extremes(r['turns']['sam'], 'own', 'reference')),
        ('bSAM step ÷ one gradient', lambda r: f'{r["over_gradient"]["bsam"]:.3f}'),
        ('… range over the turns', lambda r: extremes(r['turns']['bsam'], 'own', 'reference')),
        ('bSAM step, share of time outside the gradients', lambda r: f'{r["bsam_share_besides_gradients"]:.1%}'),
        ('bSAM step, extra time for making the batch', lambda r: f'{r["data_share"]:.1%}'),
        ('gradient, GFLOP/s', lambda r: f'{r["gradient_gflops"]:.0f}'),
        ('gradient, share of the matrix product’s rate', lambda r: f'{r["gradient_gflops"] / rate:.0%}'),
        ('forward pass, images per second', lambda r: f'{r["forward_images_per_second"]:.0f}'),
        ('evaluation ÷ its forward passes', lambda r: f'{r["evaluation_over_forward"]:.3f}'),
        ('… range over the turns', lambda r: extremes(r['evaluation_turns'], 'evaluate', 'plain')),
        ('bSAM step, memory ÷ size of the parameters', lambda r: f'{r["memory"]["step_copies"]:.1f}'),
        ('… without one sub-batch’s gradient', lambda r: f'{r["memory"]["copies_besides_one_gradient"]:.1f}'),
        ('bSAM step, seconds to compile', lambda r: f'{r["compile_seconds"]["bsam"]:.1f}'),
    ]
    published = [
        ('bSAM step as published, seconds', lambda r: f'{r["baseline"]["step_seconds"]:.2f}'),
        ('bSAM step, speed-up over published', lambda r: f'{r["baseline"]["step_speed_up"]:.2f}'),
        ('… range over the turns', lambda r: extremes(r['baseline']['turns'], 'published_bsam', 'bsam')),
        ('forward pass, speed-up over published', lambda r: f'{r["baseline"]["logits_speed_up"]:.2f}'),
        ('bSAM step as published, seconds to compile', lambda r: f'{r["baseline"]["compile_seconds"]:.1f}'),
    ]
    return own + published if has_baseline else own


def extremes(turns, name, other):
    """Returns 'LOWEST to HIGHEST', the range of the ratios of two lists of seconds over the turns."""
    of_turns = ratios(turns[name], turns[other])
    return f'{min(of_turns):.2f} to {max(of_turns):.2f}'


if __name__ == '__main__':
    main()
