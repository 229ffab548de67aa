"""Measures how the cost grows with the batch size, sub-batches, posterior samples and parameters.

    python benchmarks/growth.py --json results/growth.json
    python benchmarks/growth.py --plot results/growth.json results/growth.png

Seconds are medians over turns, and each turn times every point, so that other load on the machine disturbs all points
alike. Three panels train or evaluate ResNet-20. The panel over parameters has the loss |w|²/2 instead of a network, to
time the optimizer alone.
"""

import io
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp

import optimizers
from benchmarks import run
from evaluation import plots
from runs import folders, json_files, launch, parsing, provenance

BATCHES, SUB_BATCHES, SAMPLES = (25, 50, 100, 200, 400), (1, 2, 4, 8, 20), (1, 2, 4, 8, 16, 32)
PARAMETERS = (10_000, 100_000, 1_000_000, 10_000_000, 40_000_000)
NETWORK, SUB_BATCH, TEST_IMAGES, TURNS = 'resnet20', 25, 200, 5


@launch.script('growth.py')
def main(argv=None):
    args = parse_args(argv)
    if args.plot:
        plot(*args.plot)
        return
    results = json_files.read_record(args.json) if args.json.exists() else {}
    measured = provenance.of_command('benchmarks/growth.py', argv)
    for name in args.panels:
        results[name] = measured | {'seconds': curves(*PANELS[name])}
        json_files.write_json(args.json, results)


def parse_args(argv):
    parser = parsing.Parser(__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument('--json', type=parsing.new_file, help='measure, and write all figures to this JSON file')
    help = 'with --json: panels to measure; the file keeps its other panels (default: all)'
    parser.add_argument('--panels', nargs='+', choices=PANELS, default=list(PANELS), help=help)
    help = 'draw the figures of a file that --json wrote'
    action.add_argument('--plot', type=parsing.path, nargs=2, metavar=('JSON', 'PNG'), help=help)
    args = parser.parse_args(argv)
    if args.plot and args.plot[1].suffix != '.png':
        parser.error(f'--plot {args.plot[1]}: the name of the picture must end in .png')
    return args


def all_panels(path):
    """Returns the figures in a JSON file. Raises a RunError if the file lacks a panel."""
    results = json_files.read_record(path)
    lacking = [name for name in PANELS if 'seconds' not in (results.get(name) or {})]
    if lacking:
        raise folders.RunError(f'{path} lacks the panels {", ".join(lacking)}: measure them with --json {path}')
    return results


def plot(source, picture):
    """Draws the figures of a JSON file into a PNG. Raises a RunError if the file lacks a panel."""
    figure = drawn(all_panels(source))
    with plots.settings({}), io.BytesIO() as file:
        figure.savefig(file, dpi=150)
        json_files.write_bytes(picture, file.getvalue())


def curves(make, optims, sizes):
    """Times the functions that make(optimizer, size) returns, all in turns.

    Returns:
        {optimizer: {size: median seconds of a call}}.
    """
    times, _ = run.in_turns(range(TURNS), {(optim, size): make(optim, size) for optim in optims for size in sizes})
    return {optim: {size: statistics.median(times[optim, size]) for size in sizes} for optim in optims}


def step_of_batch(optim, batch_size):
    """Returns a function that takes a training step, in sub-batches of SUB_BATCH images."""
    return run.Trainer(NETWORK, optim, 'float32', batch_size, batchsplit=batch_size // SUB_BATCH)


def step_in_sub_batches(optim, batchsplit):
    """Returns a function that takes a training step over run.BATCH images in `batchsplit` sub-batches."""
    return run.Trainer(NETWORK, optim, 'float32', batchsplit=batchsplit)


def evaluation_over(optim, num_samples):
    """Returns a function that predicts TEST_IMAGES images at the mean and with `num_samples` posterior samples."""
    posterior, _ = run.posterior_of(NETWORK, optim, 'float32', TEST_IMAGES)
    images = jax.device_put(run.synthetic_images(TEST_IMAGES)[0])
    return lambda: list(posterior.predict(images, [num_samples]))


def bare_step(optim, num_params):
    """Returns a function that takes a step over 8 sub-batches. The gradient is w itself and costs nothing."""

    def loss(params, batch_stats, batch):
        del batch
        return jnp.square(params).sum() / 2, batch_stats

    given = {'learning_rate': 0.1, 'beta1': 0.9, 'weight_decay': 1e-4}
    if optim != 'sgd':
        given |= {'rho': 0.01, 'num_sub_batches': run.SPLIT}
    if optim == 'bsam':
        given |= {'beta2': 0.999, 'num_data': 50_000}
    optimizer = optimizers.OPTIMIZERS[optim](loss, **given)
    step = jax.jit(optimizer.step, donate_argnums=0)
    held = {'state': optimizer.init(jnp.ones(num_params), {}, jax.random.key(0))}

    def call():
        held['state'], value = step(held['state'], jnp.zeros(run.SPLIT), 1.0)
        return value

    return call


PANELS = {
    'batch': (step_of_batch, ('sgd', 'sam', 'bsam'), BATCHES),
    'sub_batches': (step_in_sub_batches, ('sam', 'bsam'), SUB_BATCHES),
    'samples': (evaluation_over, ('bsam',), SAMPLES),
    'parameters': (bare_step, ('sgd', 'sam', 'bsam'), PARAMETERS),
}


@plots.styled
def drawn(results):
    """Returns a figure with one panel for each of PANELS, and in it one curve for each optimizer."""
    panels = [
        ('batch', 'images in a batch', f'a training step, sub-batches of {SUB_BATCH}'),
        ('sub_batches', 'sub-batches M', f'a training step, batch of {run.BATCH}'),
        ('samples', 'posterior samples', f'evaluation of {TEST_IMAGES} images'),
        ('parameters', 'parameters', 'the optimizer alone, M = 8'),
    ]
    labels = {'sam': 'SAM', 'bsam': 'bSAM', 'sgd': 'SGD'}
    styles = dict(zip(labels, plots.line_styles(), strict=False))
    figure = plots.Figure(figsize=(11, 2.8))
    all_axes = figure.subplots(1, len(panels))
    for axes, (name, size, title) in zip(all_axes, panels, strict=True):
        for optim, curve in results[name]['seconds'].items():
            sizes = [int(n) for n in curve]
            axes.loglog(sizes, list(curve.values()), label=labels[optim], marker='o', markersize=3, **styles[optim])
        axes.set_xlabel(size)
        axes.set_title(title, fontsize=9)
        if name != 'parameters':
            axes.set_xticks(sizes, sizes)
            axes.set(ylim=(0.05, 10), yticks=(0.1, 1, 10), yticklabels=('0.1', '1', '10'))
            axes.xaxis.set_minor_locator(plots.ticker.NullLocator())
    all_axes[0].set_ylabel('seconds')
    all_axes[0].legend(frameon=False)
    return figure


if __name__ == '__main__':
    main()
