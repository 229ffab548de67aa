"""Animate bSAM's posterior over decision boundaries on the two-moons data.

python demo2d.py --output animation.gif
"""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))  # PYTHONSAFEPATH=1 leaves this folder out

from runs import launch

# isort: split

import argparse
import io
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image, ImageColor
from tqdm import trange

import data
import models
import optimizers
from runs import devices, json_files, parsing

X_RANGE, Y_RANGE = (-1.5, 2.7), (-1.0, 1.4)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the flags. Ends the script if a flag is wrong."""
    parser = parsing.Parser("Animate bSAM's posterior over decision boundaries on the two-moons data.")
    parser.add_argument('--output', type=parsing.new_file, default='animation.gif', help='the GIF to write')
    parser.add_argument('--epochs', type=parsing.integer(1), default=251, help='epochs; every second epoch is a frame')
    parser.add_argument(
        '--randomseed', type=parsing.integer(0, below=2**32), default=0, help='seed of weights, batches and samples'
    )
    args = parser.parse_args(argv)
    if args.output.suffix != '.gif':
        parser.error(f'--output {args.output}: the name of the animation must end in .gif')
    return args


@launch.script('demo2d.py')
def main(argv: list[str] | None = None) -> None:
    """Trains, draws a frame every second epoch, and writes the animation."""
    args = parse_args(argv)
    devices.require()
    with jax.enable_x64(True):
        points, labels = two_moons()
        frames = [draw(points, labels, *epoch) for epoch in train(points, labels, args)]
    save_gif(frames, args.output)
    print(f'{args.output}: {len(frames)} frames, {args.output.stat().st_size / 1e6:.1f} MB')


def two_moons() -> tuple[np.ndarray, np.ndarray]:
    """Draws 100 points, float64 [100, 2], and their classes 0 or 1, float64 [100]."""
    from sklearn.datasets import make_moons

    points, labels = make_moons(n_samples=100, noise=0.1, random_state=1)
    return points, labels.astype(float)


def train(
    points: np.ndarray, labels: np.ndarray, args: argparse.Namespace
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Trains an MLP with bSAM, and yields logits on the grid every second epoch.

    Args:
        points: float64 [N, 2].
        labels: float64 [N], 0 or 1.
        args: the flags.

    Yields:
        The epoch, the logits of 20 posterior samples, float64 [20, rows · columns], and of the mean, float64
        [rows · columns].
    """
    model = models.MLP(num_classes=1, features=(32, 32, 32, 32))

    def logits(params, points):
        return model.apply({'params': params}, points, train=True)[:, 0]

    def loss(params, batch_stats, batch):
        points, labels = batch
        return optax.sigmoid_binary_cross_entropy(logits(params, points), labels).mean(), batch_stats

    optimizer = optimizers.bsam(
        loss,
        learning_rate=0.5,
        beta1=0.9,
        beta2=0.999,
        weight_decay=1e-4,
        rho=0.05,
        num_sub_batches=5,
        num_data=len(points),
        damping=0.1,
    )

    @jax.jit
    def boundaries(state, key):
        samples = jax.vmap(lambda k: optimizer.sample(state, k))(jax.random.split(key, 20))
        return jax.vmap(logits, (0, None))(samples, grid), logits(state.params, grid)

    step = jax.jit(optimizer.step)
    key = jax.random.key(args.randomseed, impl='threefry2x32')  # even if JAX_DEFAULT_PRNG_IMPL names another
    init_key, state_key, order_key, sample_key = jax.random.split(key, 4)
    params = model.init(init_key, points, train=True)['params']
    state = optimizer.init(jax.tree.map(lambda w: w.astype(float), params), {}, state_key)
    grid = jnp.asarray(grid_points().reshape(-1, 2))
    for epoch in trange(args.epochs, unit=' epochs', disable=None):
        lr_factor = optimizers.lr_factor(epoch, args.epochs - 1, warmup=0)
        for batch in data.shuffled_batches(jax.random.fold_in(order_key, epoch), len(points), batch_size=30):
            state, _ = step(state, (points[batch], labels[batch]), lr_factor)
        if epoch % 2 == 0:
            yield epoch, *jax.device_get(boundaries(state, sample_key))


def grid_points() -> np.ndarray:
    """Returns the grid on which boundaries are drawn, float64 [rows, columns, 2]."""
    return np.stack(np.meshgrid(np.linspace(*X_RANGE, 85), np.linspace(*Y_RANGE, 49)), axis=-1)


def colours() -> dict[str, str]:
    """Returns the colours of the boundaries and the classes, as #RRGGBB. The boundaries have bSAM's colour."""
    from evaluation import plots  # imported late because Matplotlib takes most of a second

    bsam = plots.STYLES['bsam']['color']
    return {'mean': bsam, 'samples': plots.tint(bsam, 0.4), 'class 0': '#000000', 'class 1': plots.GREY}


def draw(
    points: np.ndarray, labels: np.ndarray, epoch: int, sample_logits: np.ndarray, mean_logits: np.ndarray
) -> Image.Image:
    """Returns a frame: the samples' boundaries as thin lines, the mean's boundary as a thick line.

    Args:
        points: float64 [N, 2].
        labels: float64 [N], 0 or 1.
        epoch: the epoch, from 0.
        sample_logits: float64 [S, rows · columns], on the grid.
        mean_logits: float64 [rows · columns], on the grid.
    """
    from evaluation import plots

    colour = colours()
    with plots.settings({'font.size': 9}), io.BytesIO() as file:
        figure = plots.Figure(figsize=(5.6, 3.9), dpi=100)
        axes = figure.add_axes((0.115, 0.215, 0.87, 0.715), xlim=X_RANGE, ylim=Y_RANGE, xlabel='x₁', ylabel='x₂')
        axes.set_title(f'Decision boundaries of bSAM on two moons, epoch {epoch + 1}')
        lines = [line for logits in sample_logits for line in boundary(logits)]
        style = {'colors': colour['samples'], 'linewidths': 0.8}
        axes.add_collection(plots.LineCollection(lines, label=f'{len(sample_logits)} posterior samples', **style))
        style = {'colors': colour['mean'], 'linewidths': 3}
        axes.add_collection(plots.LineCollection(boundary(mean_logits), label='posterior mean', **style))
        axes.plot(*points[labels == 0].T, 'x', color=colour['class 0'], markeredgewidth=2, label='class 0')
        axes.plot(*points[labels == 1].T, 'o', color=colour['class 1'], label='class 1')
        figure.legend(loc='lower center', ncols=4, frameon=False)
        figure.savefig(file, format='png')
        return Image.open(file).convert('RGB')


def boundary(logits: np.ndarray) -> list[np.ndarray]:
    """Returns the lines where the logits are 0, float64 [points, 2] each.

    logits: float64 [rows · columns], on the grid.
    """
    from contourpy import contour_generator

    grid = grid_points()
    return contour_generator(grid[..., 0], grid[..., 1], logits.reshape(grid.shape[:2])).lines(0)


def save_gif(frames: list[Image.Image], path: Path) -> None:
    """Writes a GIF that shows each frame for 50 ms and loops forever. Raises RunError.

    The palette holds white, the drawn colours, and each drawn colour mixed half with white.
    """
    shades = [(1, 1, 1)] + [
        1 - opacity * (1 - np.array(ImageColor.getrgb(c)) / 255) for c in colours().values() for opacity in (0.5, 1)
    ]
    palette = Image.new('P', (1, 1))
    palette.putpalette(np.round(np.array(shades) * 255).astype(np.uint8).tobytes())
    frames = [frame.quantize(palette=palette, dither=0) for frame in frames]
    with io.BytesIO() as file:
        frames[0].save(file, 'GIF', save_all=True, append_images=frames[1:], duration=50, loop=0, optimize=True)
        json_files.write_bytes(path, file.getvalue())


if __name__ == '__main__':
    main()
