"""Pictures of an evaluation, as PNG and PDF. They are readable in print, in grey and for colour-blind people.

Other modules take Matplotlib from this module, which keeps a user's Matplotlib settings out of all pictures.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import errors
import metrics
from evaluation import measures, posteriors, tables
from runs.json_files import RunError

os.environ.pop('MPLBACKEND', None)  # notebooks set it for commands too, and the backend may be missing

import matplotlib
from matplotlib import ticker
from matplotlib.collections import LineCollection  # noqa: F401, used by demo2d.py
from matplotlib.figure import Figure

# From the palette of Okabe & Ito (2008), which colour-blind people can distinguish. The lightness differs too.
BLUE, ORANGE, GREY, SKY = '#0072B2', '#D55E00', '#777777', '#8CC8EE'

_STYLE = {
    'font.size': 9,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'grid.color': '#DDDDDD',
    'grid.linewidth': 0.6,
    'axes.axisbelow': True,
    'figure.constrained_layout.use': True,
}
_DEFAULTS = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != 'backend'}
_FORMATS = {'png': {'dpi': 200}, 'pdf': {'metadata': {'CreationDate': None}}}


@contextlib.contextmanager
def settings(style: dict) -> Iterator[None]:
    """Sets Matplotlib's defaults and `style` in a with-block or a decorated function. Ignores the user's settings."""
    with matplotlib.rc_context(_DEFAULTS | style):
        yield


# Decorates each function that draws a figure.
styled = settings(_STYLE)


def save(figure: Figure, folder: Path, name: str) -> None:
    """Writes NAME.png and NAME.pdf atomically. The same figure gives the same bytes. Raises OSError."""
    Path(folder).mkdir(exist_ok=True)
    for ending, options in _FORMATS.items():
        with settings(_STYLE), errors.replacing(Path(folder) / f'{name}.{ending}') as partial:
            figure.savefig(partial, format=ending, **options)


def remove(folder: Path, name: str) -> None:
    """Removes the files of `save`, and the incomplete files of an interrupted `save`. Raises OSError."""
    for ending in _FORMATS:
        path = Path(folder) / f'{name}.{ending}'
        errors.discard_leftovers(path)
        path.unlink(missing_ok=True)


def write(folder: Path, figures: dict[str, Figure | None]) -> None:
    """Writes figures to a folder. Removes the earlier pictures of figures that are None. Raises RunError.

    An earlier picture stays until the new picture is complete.

    Args:
        folder: the folder of the pictures. It must not be a link.
        figures: {name: Figure or None}.
    """
    if os.path.islink(folder):
        raise RunError(f'{folder} is a link to another folder, so nothing is written: remove the link')
    try:
        for name, figure in figures.items():
            if figure:
                save(figure, folder, name)
            else:
                remove(folder, name)
    except OSError as error:
        raise RunError(f'{folder} cannot be written: {error.strerror}') from error


def of_evaluation(
    images: Any, prediction: posteriors.Prediction, results: dict, log: list[dict]
) -> dict[str, Figure | None]:
    """Returns the figures of an evaluation, {name: Figure or None}. None means that the evaluation did not measure it.

    Args:
        images: the evaluation.trained.Images.
        prediction: the prediction for these images.
        results: the entries of metrics.json.
        log: the records of log.jsonl.
    """
    titles = {'mean': 'posterior mean', 'average': f'average of {tables.samples(results["testmc"])}'}
    predictions = {titles['mean']: prediction.probs_at_mean, titles['average']: prediction.probs}
    severities_of = None
    if 'corruptions' in results:
        severities_of = severities(
            {
                title: [results[at], *measures.over_corruptions(results['corruptions'], at)]
                for at, title in titles.items()
            }
        )
    return {
        'reliability': reliability({title: results['reliability'][at] for at, title in titles.items()}),
        'risk_coverage': risk_coverage(predictions, images.labels),
        'training': training(log),
        'images': image_sheet(images.images, images.labels, prediction.probs),
        'samples': samples(results['samples'], results['mean']) if 'samples' in results else None,
        'severities': severities_of,
    }


@styled
def reliability(diagrams: dict[str, dict], fewest: int = 1) -> Figure:
    """Returns reliability diagrams (Guo et al., 2017), one column for each title.

    The upper panel shows the accuracy of each bin, and its gap to the mean confidence. The lower panel is the histogram
    of the confidence.

    Args:
        diagrams: {title: metrics.reliability(...)}.
        fewest: the upper panel leaves out bins with fewer images.
    """
    hatched = {'facecolor': 'none', 'edgecolor': ORANGE, 'hatch': '////'}
    figure = Figure(figsize=(3.2 * len(diagrams), 4))
    axes = figure.subplots(2, len(diagrams), squeeze=False, sharex=True, sharey='row', height_ratios=(3, 1))
    for (title, bins), (top, bottom) in zip(diagrams.items(), axes.T, strict=True):
        counts = np.asarray(bins['counts'])
        accuracy, confidence = (np.asarray(bins[name], float) for name in ('accuracy', 'confidence'))
        held = counts > 0
        error = np.sum(counts[held] * np.abs(accuracy - confidence)[held]) / counts.sum()
        width = 1 / len(counts)
        edges = np.arange(len(counts)) * width
        drawn = counts >= fewest
        left, accuracy, confidence = edges[drawn], accuracy[drawn], confidence[drawn]
        low, high = np.minimum(accuracy, confidence), np.maximum(accuracy, confidence)
        top.bar(left, accuracy, width, align='edge', color=SKY, edgecolor='white', label='accuracy')
        top.bar(left, high - low, width, low, align='edge', **hatched, label='gap to mean confidence')
        top.plot([0, 1], [0, 1], '--', color='black', linewidth=1, label='perfect calibration')
        top.set(title=f'{title}\nECE {error:.4f}', xlim=(0, 1), ylim=(0, 1))
        bottom.bar(edges, counts / counts.sum(), width, align='edge', color=GREY, edgecolor='white')
        bottom.set(xlabel='confidence')
    axes[0, 0].set_ylabel('accuracy')
    axes[1, 0].set_ylabel('share of\nimages')
    legend_above(figure, axes[0, 0])
    return figure


@styled
def risk_coverage(predictions: dict[str, np.ndarray], labels: np.ndarray) -> Figure:
    """Returns a figure of the risk-coverage curve: the error rate over the share of images kept, most confident first.

    Args:
        predictions: {title: probs float [N, K]}.
        labels: int [N].
    """
    figure = Figure(figsize=(4.4, 3.2))
    axes = figure.subplots()
    for (title, probs), style in zip(predictions.items(), line_styles(), strict=False):
        coverage, risk = metrics.risk_coverage(probs, labels)
        area = metrics.aurc(probs, labels)
        axes.plot(100 * coverage, 100 * risk, label=f'{title}: AURC {area:.4f}', **style)
    axes.set(
        xlabel='coverage: most confident images kept (%)', ylabel='risk: error rate of kept images (%)', xlim=(0, 100)
    )
    axes.set_ylim(bottom=0)
    legend_above(figure, axes, num_columns=1)
    return figure


@styled
def training(log: list[dict]) -> Figure:
    """Returns a figure of loss, accuracy and learning rate over the epochs of log.jsonl."""
    split = 'validation' if log and 'validation_accuracy' in log[0] else 'test'
    figure = Figure(figsize=(7.5, 2.5))
    epochs = [record['epoch'] + 1 for record in log]
    accuracy = f'{split}_accuracy'
    panels = [
        ('loss', 'training loss', 1),
        (accuracy, f'{split} accuracy (%)', 100),
        ('learning_rate', 'learning rate', 1),
    ]
    for axes, (name, label, scale) in zip(figure.subplots(1, 3), panels, strict=True):
        values = [np.nan if record[name] is None else scale * record[name] for record in log]
        axes.plot(epochs, values, color=BLUE, marker='o' if len(log) < 20 else '')
        axes.set(xlabel='epoch', ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


@styled
def samples(curve: list[dict], at_mean: dict[str, float]) -> Figure:
    """Returns a figure of accuracy, NLL and ECE over the number of posterior samples, beside the posterior mean.

    Args:
        curve: [{'testmc': n, 'accuracy': ..., 'nll': ..., 'ece': ...}, ...].
        at_mean: {'accuracy': ..., 'nll': ..., 'ece': ...} at the posterior mean.
    """
    figure = Figure(figsize=(7.5, 2.5))
    numbers = [point['testmc'] for point in curve]
    ticks = []
    for number in numbers:
        if not ticks or number >= 1.4 * ticks[-1]:  # labels of closer ticks would overlap
            ticks.append(number)
    for axes, (name, scale) in zip(figure.subplots(1, 3), _CURVES, strict=True):
        axes.axhline(scale * at_mean[name], color=ORANGE, linestyle='--', label='posterior mean')
        axes.plot(numbers, [scale * point[name] for point in curve], color=BLUE, marker='o', label='average of samples')
        axes.set_xscale('log', base=2)
        axes.set_xticks(ticks, ticks)
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.set(xlabel='number of samples', ylabel=LABELS[name])
    legend_above(figure, axes)
    return figure


@styled
def severities(results: dict[str, list[dict]]) -> Figure:
    """Returns a figure of accuracy, NLL and ECE over the severity of corruptions, averaged over the corruptions.

    Args:
        results: {title: [{'accuracy': ..., 'nll': ..., 'ece': ...} at severity 0, 1, ...]}. Severity 0 is the clean
            images.
    """
    figure = Figure(figsize=(7.5, 2.5))
    for axes, (name, scale) in zip(figure.subplots(1, 3), _CURVES, strict=True):
        for (title, points), style in zip(results.items(), line_styles(), strict=False):
            axes.plot(range(len(points)), [scale * p[name] for p in points], marker='o', label=title, **style)
        axes.set(xlabel='severity (0: clean)', ylabel=LABELS[name], xticks=range(len(points)))
    legend_above(figure, axes)
    return figure


def legend_above(figure: Figure, axes: matplotlib.axes.Axes, num_columns: int | None = None) -> None:
    """Adds one legend above all panels, where it covers no curve.

    Args:
        figure: the figure. All panels must show the same lines.
        axes: the panel that has the labels of the lines.
        num_columns: the number of columns of the legend. By default, all labels are in one row.
    """
    lines, labels = axes.get_legend_handles_labels()
    figure.legend(lines, labels, frameon=False, loc='outside upper center', ncols=num_columns or len(labels))


_CURVES = [('accuracy', 100), ('nll', 1), ('ece', 1)]
LABELS = {'accuracy': 'accuracy (%)', 'nll': 'NLL', 'ece': 'ECE'}


def line_styles() -> list[dict[str, str]]:
    """Returns the colour and the line style of each line of a panel, as keyword arguments of Axes.plot."""
    return [
        {'color': ORANGE, 'linestyle': '--'},
        {'color': BLUE, 'linestyle': '-'},
        {'color': 'black', 'linestyle': ':'},
        {'color': GREY, 'linestyle': '-.'},
    ]


@styled
def image_sheet(images: np.ndarray, labels: np.ndarray, probs: np.ndarray, num_images: int = 10) -> Figure:
    """Returns a figure of the most confident errors, and of the images with the highest predictive entropy.

    The text above each image is the predicted class, the probability of this class and the true class.

    Args:
        images: uint8 [N, H, W, C], grey or in colour, with an alpha channel if C is 2 or 4.
        labels: int [N].
        probs: float [N, K].
        num_images: the maximum number of images in each row.
    """
    confidence, predicted = probs.max(axis=1), probs.argmax(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    rows = {
        'most\nconfident\nerrors': wrong[np.argsort(-confidence[wrong], kind='stable')][:num_images],
        'highest\npredictive\nentropy': np.argsort(-metrics.entropy(probs), kind='stable')[:num_images],
    }
    figure = Figure(figsize=(0.95 * num_images + 0.8, 3))
    axes = figure.subplots(len(rows), num_images, squeeze=False)
    for line, (title, chosen) in zip(axes, rows.items(), strict=True):
        for ax in line:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        line[0].set_ylabel(title, rotation=0, ha='right', va='center')
        for ax, i in zip(line, chosen, strict=False):
            _show(ax, images[i])
            ax.set_title(f'pred. {predicted[i]} ({confidence[i]:.0%})\ntrue {labels[i]}', fontsize=8)
    return figure


def _show(axes, image):
    if image.shape[-1] > 2:
        axes.imshow(image)
    else:
        axes.imshow(image[..., 0], cmap='gray', alpha=image[..., 1] / 255 if image.shape[-1] == 2 else None)
