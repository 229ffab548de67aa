"""Pictures of an evaluation, as PNG and PDF. They are readable in print, in grey and for colour-blind people.

Each optimizer has one colour, line style and marker in all pictures. Other modules take Matplotlib from this module,
which keeps a user's Matplotlib settings out of all pictures.
"""

import contextlib
import itertools
import os
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import errors
import metrics
from evaluation import comparison, tables
from runs.json_files import RunError

os.environ.pop('MPLBACKEND', None)  # notebooks set it for commands too, and the backend may be missing

import matplotlib
from matplotlib import ticker
from matplotlib.collections import LineCollection  # noqa: F401, used by demo2d.py
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

GREY, DARK = '#777777', '#333333'


def _style(color, linestyle, marker):
    return {'color': color, 'linestyle': linestyle, 'marker': marker}


# The keyword arguments of Axes.plot for each optimizer. Colour-blind people can distinguish the colours, seven of which
# are from Okabe & Ito (2008). In grey, the markers differ.
STYLES = {
    'sgd': _style('#000000', ':', 's'),
    'sam': _style('#D55E00', '--', '^'),
    'bsam': _style('#0072B2', '-', 'o'),
    'ivon': _style('#009E73', (0, (8, 2)), 'D'),
    'swag': _style('#CC79A7', (0, (3, 1, 1, 1, 1, 1)), 'P'),
    'adam': _style('#E69F00', '-.', 'v'),
    'adamw': _style('#882255', (0, (1, 1)), 'X'),
    'samadam': _style('#56B4E9', (0, (5, 1)), '<'),
    'asam': _style('#8A3FE0', (0, (4, 1, 1, 1)), '>'),
}
_OF_NO_OPTIMIZER = _style(GREY, (0, (10, 1, 1, 1)), '*')  # such as the ensemble of all runs

_STYLE = {
    'font.size': 9,
    'figure.titlesize': 9,
    'lines.markersize': 4,
    'axes.titlesize': 9,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'grid.color': '#DDDDDD',
    'grid.linewidth': 0.6,
    'axes.axisbelow': True,
    'figure.constrained_layout.use': True,
    'legend.frameon': False,
    'legend.handlelength': 3,
    'hatch.linewidth': 0.8,
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
        with (
            settings(_STYLE),
            warnings.catch_warnings(),
            errors.replacing(Path(folder) / f'{name}.{ending}') as partial,
        ):
            warnings.filterwarnings('ignore', 'Glyph')  # class names in a script that the font lacks become boxes
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


def styles_of(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns the colour, line style and marker of each row of a comparison, {name: keyword arguments of Axes.plot}.

    The optimizer gives the style. Further methods with the same optimizer are paler and have other markers. The mean is
    dashed with hollow markers if the comparison also has samples of the method. Methods without an optimizer take a
    grey style, then the styles of optimizers that the comparison lacks.

    Args:
        names: names as in comparison.Row, such as 'bsam rho=0.1, mean'.
    """
    methods = {name: re.sub(r'( laplace)?, (mean|average|([\d/]+ )?samples?)$', '', name) for name in names}
    groups = {}
    for method in methods.values():
        groups.setdefault(method.split(' ')[0].lower(), {})[method] = None
    unused = itertools.cycle([_OF_NO_OPTIMIZER, *(STYLES[optim] for optim in STYLES if optim not in groups)])
    styles = {
        method: _variant(STYLES[optim], i) if optim in STYLES else next(unused)
        for optim, group in groups.items()
        for i, method in enumerate(group)
    }
    with_samples = {method for name, method in methods.items() if not _is_at_mean(name)}
    at_mean = {'linestyle': '--', 'markerfacecolor': 'white'}
    return {
        name: styles[method] | (at_mean if _is_at_mean(name) and method in with_samples else {})
        for name, method in methods.items()
    }


def _is_at_mean(name):
    return name.endswith(', mean')


def _variant(style, i):
    """Returns the style of the method at index i among the methods with one optimizer."""
    markers = [style['marker'] for style in STYLES.values()]
    marker = markers[(markers.index(style['marker']) + i) % len(markers)]
    return style | {'color': tint(style['color'], (1, 0.65, 0.4)[i % 3]), 'marker': marker}


def line_styles() -> list[dict[str, str]]:
    """Returns the colours and line styles of SAM, bSAM and SGD, as keyword arguments of Axes.plot."""
    return [{name: STYLES[optim][name] for name in ('color', 'linestyle')} for optim in ('sam', 'bsam', 'sgd')]


def tint(colour: str, opacity: float) -> str:
    """Returns a colour mixed with white, as #RRGGBB. Opacity 1 is the colour itself, opacity 0 is white."""
    return to_hex([1 - opacity * (1 - part) for part in to_rgb(colour)]).upper()


def of_run(
    result: comparison.Result, images: np.ndarray, log: list[dict], num_bins: int, run: str, evaluated: str,
    class_names: Sequence[str] | None = None,
) -> dict[str, Figure | None]:  # fmt: skip
    """Returns the figures of a run, {name: Figure or None}. None means that the evaluation did not measure it.

    Args:
        result: the run's Result for N images.
        images: uint8 [N, H, W, C].
        log: the records of log.jsonl.
        num_bins: the number of bins of the reliability diagram.
        run: names the run in titles.
        evaluated: names the images in titles, such as '200 test images'.
        class_names: the name of each class, None for numbers.
    """
    rows, heading = comparison.rows([result]), f'{run}, {evaluated}'
    last = rows[-1].name
    colour = styles_of([last])[last]['color']
    of_last = f'{last}; {heading}'
    return {
        **of_rows(rows, result.labels, num_bins, heading),
        'training': training(log, run, colour) if log else None,
        'images': image_sheet(images, result.labels, result.probs, class_names, of_last),
        'confusion': confusion(result.probs, result.labels, class_names, of_last, colour),
    }


MOST_ROWS = 12  # in the pictures of a comparison


def of_rows(rows: list[comparison.Row], labels: np.ndarray, num_bins: int, heading: str) -> dict[str, Figure | None]:
    """Returns the figures that compare methods, {name: Figure or None}. None means that no row has the measurement.

    Args:
        rows: the Rows in the order of the tables. The pictures show the first MOST_ROWS.
        labels: int [N].
        num_bins: the number of bins of the reliability diagram.
        heading: names the images.
    """
    if len(rows) > MOST_ROWS:
        heading += f'; the first {MOST_ROWS} of {len(rows)} rows of the table'
    rows = rows[:MOST_ROWS]
    diagrams = {row.name: [metrics.reliability(probs, labels, num_bins) for probs in row.probs] for row in rows}
    return {
        'reliability': reliability(diagrams, heading),
        'risk_coverage': risk_coverage({row.name: row.probs for row in rows}, labels, heading),
        'samples': samples(rows, heading),
        'severities': severities(rows, heading),
    }


@styled
def reliability(diagrams: dict[str, list[dict]], heading: str = '', fewest: int = 10) -> Figure:
    """Returns reliability diagrams (Guo et al., 2017), one for each row of a comparison.

    The upper panel shows the accuracy of each bin, and its gap to the mean confidence. The lower panel is the histogram
    of the confidence. Both pool the images of all runs. The ECE is the mean over runs.

    Args:
        diagrams: {name as in comparison.Row: [metrics.reliability(...) of each run]}.
        heading: names what all diagrams have in common.
        fewest: bins with fewer images are pale.
    """
    columns = min(len(diagrams), 4)
    blocks = -(-len(diagrams) // columns)
    figure = Figure(figsize=(2.5 * columns + 2.2, 3.4 * blocks + 0.3))
    axes = figure.subplots(2 * blocks, columns, squeeze=False, sharex=True, height_ratios=(3, 1) * blocks)
    for ax in axes.flat:
        ax.set_visible(False)
    panels = zip(axes[::2].flat, axes[1::2].flat, strict=True)
    styles = styles_of(diagrams)
    for (name, runs), (top, bottom) in zip(diagrams.items(), panels, strict=False):
        eces = comparison.mean_and_deviation('ece', [_ece(bins) for bins in runs])
        top.set_title(f'{_wrapped(name, 36)}\nECE {eces}' + (f', {len(runs)} runs' if len(runs) > 1 else ''))
        _draw_bins(top, bottom, *_pooled(runs), styles[name]['color'], fewest)
    shares = max(ax.dataLim.ymax for ax in axes[1::2].flat if ax.get_visible())
    for ax in axes[1::2].flat:
        ax.set_ylim(0, shares)
    for first in axes[:, 0]:
        first.set_ylabel('accuracy' if first in axes[::2] else 'share of\nimages')
    _title(figure, 'Reliability', heading)
    legend_beside(
        figure,
        {
            'perfect calibration': figure.axes[0].lines[0],
            'accuracy': Patch(facecolor=tint(GREY, 0.6)),
            'over-confident: accuracy is\nbelow the mean confidence': Patch(**_OVER),
            'under-confident: accuracy is\nabove the mean confidence': Patch(**_UNDER),
            f'pale: fewer than {fewest} images': Patch(facecolor=tint(GREY, 0.15)),
        },
    )
    return figure


_OVER = {'facecolor': 'none', 'edgecolor': '#B2182B', 'hatch': '/////'}
_UNDER = {'facecolor': 'none', 'edgecolor': DARK, 'hatch': '....'}


def _ece(bins):
    """Returns the ECE of metrics.reliability(...). It is nan for a diverged run."""
    counts, accuracy, confidence = _pooled([bins])
    return np.sum(counts * np.abs(accuracy - confidence)) / counts.sum()


def _pooled(runs):
    """Returns counts, accuracy and mean confidence of the bins of all runs together, 0 for empty bins.

    runs: [metrics.reliability(...) of each run].
    """
    counts = np.array([bins['counts'] for bins in runs], float)
    total = counts.sum(axis=0)
    values = (np.array([bins[name] for bins in runs], float) for name in ('accuracy', 'confidence'))
    return total, *(np.where(counts > 0, counts * v, 0).sum(axis=0) / np.maximum(total, 1) for v in values)


def _draw_bins(top, bottom, counts, accuracy, confidence, colour, fewest):
    width = 1 / len(counts)
    edges = np.arange(len(counts)) * width
    for alpha, drawn in ((1, counts >= fewest), (0.3, (counts > 0) & (counts < fewest))):
        left, height, middle = edges[drawn], accuracy[drawn], confidence[drawn]
        common = {'width': width, 'align': 'edge', 'alpha': alpha}
        top.bar(left, height, color=tint(colour, 0.4), edgecolor='white', **common)
        for style, gap in ((_OVER, middle - height), (_UNDER, height - middle)):
            wide = gap > 0
            top.bar(left[wide], gap[wide], bottom=np.minimum(height, middle)[wide], **style, **common)
    top.plot([0, 1], [0, 1], '--', color='black', linewidth=1)
    top.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), visible=True)
    bottom.bar(edges, counts / counts.sum(), width, align='edge', color=colour, edgecolor='white')
    bottom.set(xlabel='confidence', visible=True)
    bottom.tick_params(labelbottom=True)


@styled
def risk_coverage(predictions: dict[str, list[np.ndarray]], labels: np.ndarray, heading: str = '') -> Figure:
    """Returns a figure of risk-coverage curves: the error rate over the share of images kept, most confident first.

    A line is the mean over runs, a band their standard deviation.

    Args:
        predictions: {name as in comparison.Row: [probs float [N, K] of each run]}.
        labels: int [N].
        heading: names the images.
    """
    figure = Figure(figsize=(6.8, max(3.3, 0.36 * len(predictions) + 1)))
    axes = figure.subplots()
    coverage = np.linspace(0.01, 1, 100)
    styles, lines = styles_of(predictions), {}
    for i, (name, runs) in enumerate(predictions.items()):
        risks = [np.interp(coverage, *metrics.risk_coverage(probs, labels)) for probs in runs]
        areas = comparison.mean_and_deviation('aurc', [metrics.aurc(probs, labels) for probs in runs])
        line = _draw_line(axes, 100 * coverage, 100 * np.array(risks), styles[name])
        line.set(markevery=(3 * i % 10, 10), clip_on=False)  # markers of different lines do not meet
        lines[f'{name}\narea (AURC) {areas}'] = line
    axes.set(
        xlabel='coverage: most confident images kept (%)', ylabel='risk: error rate of kept images (%)', xlim=(0, 100)
    )
    axes.set_ylim(bottom=0)
    _title(figure, 'Errors among the most confident images', heading)
    legend_beside(figure, lines | _legend_of_bands(predictions.values()))
    return figure


def _draw_line(axes, positions, values, style):
    """Draws the mean over runs as a line and the standard deviation as a band. Returns the line.

    Args:
        axes: the panel.
        positions: float [P].
        values: float [runs, P].
        style: keyword arguments of Axes.plot.
    """
    mean = values.mean(axis=0)
    if len(values) > 1:
        with np.errstate(invalid='ignore'):  # an NLL may be infinite
            deviation = values.std(axis=0, ddof=1)
        axes.fill_between(positions, mean - deviation, mean + deviation, color=style['color'], alpha=0.15, linewidth=0)
    (line,) = axes.plot(positions, mean, **style)
    return line


def _legend_of_bands(groups):
    """Returns the entry of the legend for bands, if a group has several runs."""
    if all(len(group) < 2 for group in groups):
        return {}
    return {'band: ± standard deviation\nover runs around their mean': Patch(facecolor=GREY, alpha=0.3)}


@styled
def training(log: list[dict], heading: str = '', colour: str = DARK) -> Figure:
    """Returns a figure of loss, accuracy and learning rate over the epochs of log.jsonl."""
    split = 'validation' if log and 'validation_accuracy' in log[0] else 'test'
    figure = Figure(figsize=(7.5, 2.6))
    epochs = [record['epoch'] + 1 for record in log]
    accuracy = f'{split}_accuracy'
    panels = [
        ('loss', 'training loss', 1),
        (accuracy, f'{split} accuracy (%)', 100),
        ('learning_rate', 'learning rate', 1),
    ]
    for axes, (name, label, scale) in zip(figure.subplots(1, 3), panels, strict=True):
        values = [np.nan if record[name] is None else scale * record[name] for record in log]
        axes.plot(epochs, values, color=colour, marker='o' if len(log) < 20 else '')
        axes.set(xlabel='epoch', ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
    _title(figure, 'Training', heading)
    return figure


@styled
def samples(rows: list[comparison.Row], heading: str = '') -> Figure | None:
    """Returns a figure of accuracy, NLL and ECE over the number of posterior samples, beside the posterior means.

    Rows whose runs have no curve, or curves over different numbers, are left out. Returns None without any curve.

    Args:
        rows: Rows of a comparison.
        heading: names the images.
    """
    of_samples = {row.name: _curves_of(row) for row in rows if row.at == 'average'}
    numbers = sorted({number for found in of_samples.values() if found for number in found[0]})
    if not numbers:
        return None
    curves = {}
    for row in rows:
        if row.at == 'mean' and _have(row, 'mean'):
            mean = {name: np.array([m['mean'][name] for m in row.measured], float).mean() for name in LABELS}
            curves[row.name] = numbers, [[mean] * len(numbers)]
        elif of_samples.get(row.name):
            curves[f'{row.name.rpartition(", ")[0]}, samples'] = of_samples[row.name]
    figure = _three_panels(curves)
    _title(figure, 'Averages over posterior samples', heading)
    ticks = []
    for number in numbers:
        if not ticks or number >= 1.4 * ticks[-1]:  # labels of closer ticks would overlap
            ticks.append(number)
    for axes in figure.axes:
        axes.set_xscale('log', base=2)
        axes.set_xticks(ticks, ticks)
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.set(xlabel='posterior samples')
    return figure


def _curves_of(row):
    """Returns (numbers of samples, [points of each run]), or None unless all runs have curves over equal numbers."""
    if not _have(row, 'samples'):
        return None
    first, *others = ([point['testmc'] for point in m['samples']] for m in row.measured)
    return (first, [m['samples'] for m in row.measured]) if all(other == first for other in others) else None


def _have(row, part):
    return bool(row.measured) and all(measured and part in measured for measured in row.measured)


@styled
def severities(rows: list[comparison.Row], heading: str = '') -> Figure | None:
    """Returns a figure of accuracy, NLL and ECE over the severity of corruptions, averaged over the corruptions.

    Severity 0 is the clean images. Rows without corruptions, or with others than the first row, are left out. Returns
    None if no row has corruptions.

    Args:
        rows: Rows of a comparison.
        heading: names the images.
    """
    from evaluation import corruptions, measures  # imported late because they import JAX

    rows = [row for row in rows if _have(row, 'corruptions')]
    if not rows:
        return None
    first = rows[0].measured[0]['corruptions']
    rows = [row for row in rows if all(m['corruptions'].keys() == first.keys() for m in row.measured)]
    severity = range(1 + max(map(len, first.values())))
    curves = {
        row.name: (
            severity,
            [[m[row.at], *measures.over_corruptions(m['corruptions'], row.at)] for m in row.measured],
        )
        for row in rows
    }
    figure = _three_panels(curves)
    _title(figure, f'Corrupted images, {corruptions.description(first)}', heading)
    for axes in figure.axes:
        axes.set(xlabel='severity (0: clean)', xticks=severity)
    return figure


def _three_panels(curves):
    """Returns a figure with panels of accuracy, NLL and ECE.

    curves: {name as in comparison.Row: (positions, [[{metric: value} at each position] of each run])}.
    """
    figure = Figure(figsize=(9.2, max(2.7, 0.22 * len(curves) + 1)))
    styles = styles_of(curves)
    for axes, (metric, label) in zip(figure.subplots(1, 3), LABELS.items(), strict=True):
        scale, _ = metrics.scale_and_digits(metric)
        lines = {}
        for name, (positions, runs) in curves.items():
            values = scale * np.array([[point[metric] for point in points] for points in runs], float)
            lines[name] = _draw_line(axes, positions, values, styles[name])
        axes.set(ylabel=label)
    legend_beside(figure, lines | _legend_of_bands(runs for _, runs in curves.values()))
    return figure


LABELS = {'accuracy': 'accuracy (%)', 'nll': 'NLL (nats)', 'ece': 'ECE'}


def legend_beside(figure: Figure, entries: dict[str, Any]) -> None:
    """Adds one legend to the right of all panels, where it covers no curve.

    Args:
        figure: the figure.
        entries: {label: the line or patch that the label names}.
    """
    labels = [_wrapped(label, 40) for label in entries]
    figure.legend(entries.values(), labels, loc='outside right center', fontsize=8, labelspacing=0.8)


def _title(figure, what, heading):
    figure.suptitle(_wrapped(f'{what}: {heading}' if heading else what, int(14 * figure.get_figwidth())))


def _wrapped(text, width):
    return '\n'.join(textwrap.fill(line, width) for line in _plain(text).splitlines())


def _plain(text):
    """Returns text that Matplotlib shows as it is. A pair of dollar signs would mean a formula."""
    return text.replace('$', r'\$')


def _shortened(text, length):
    return text if len(text) <= length else text[: length - 1] + '…'


@styled
def image_sheet(
    images: np.ndarray, labels: np.ndarray, probs: np.ndarray, class_names: Sequence[str] | None = None,
    heading: str = '', num_images: int = 10,
) -> Figure:  # fmt: skip
    """Returns a figure of the most confident errors, and of the images with the highest predictive entropy.

    The text above each image is the predicted class, the probability of this class and the true class.

    Args:
        images: uint8 [N, H, W, C], grey or in colour, with an alpha channel if C is 2 or 4.
        labels: int [N].
        probs: float [N, K].
        class_names: the name of each class, None for numbers.
        heading: names the run and the images.
        num_images: the maximum number of images in each row.
    """
    confidence, predicted = probs.max(axis=1), probs.argmax(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    rows = {
        'most\nconfident\nerrors': wrong[np.argsort(-confidence[wrong], kind='stable')][:num_images],
        'highest\npredictive\nentropy': np.argsort(-metrics.entropy(probs), kind='stable')[:num_images],
    }
    names = [_plain(_shortened(name, 10)) for name in _names(class_names, probs.shape[1])]
    figure = Figure(figsize=(0.95 * num_images + 0.8, 3.3))
    axes = figure.subplots(len(rows), num_images, squeeze=False)
    for line, (title, chosen) in zip(axes, rows.items(), strict=True):
        for ax in line:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        line[0].set_ylabel(title, rotation=0, ha='right', va='center')
        for ax, i in zip(line, chosen, strict=False):
            _show(ax, images[i])
            text = f'pred. {names[predicted[i]]}\n{confidence[i]:.0%}\ntrue {names[labels[i]]}'
            ax.set_title(text, fontsize=7)
    _title(figure, 'Predicted class, its probability and the true class', heading)
    return figure


def _names(class_names, num_classes):
    return list(map(str, range(num_classes))) if class_names is None else class_names


def _show(axes, image):
    if image.shape[-1] > 2:
        axes.imshow(image)
    else:
        axes.imshow(image[..., 0], cmap='gray', alpha=image[..., 1] / 255 if image.shape[-1] == 2 else None)


@styled
def confusion(
    probs: np.ndarray, labels: np.ndarray, class_names: Sequence[str] | None = None, heading: str = '',
    colour: str = DARK, num_pairs: int = 10,
) -> Figure | None:  # fmt: skip
    """Returns a figure of the confusion matrix, or of the most confused pairs of more than tables.MOST_CLASSES classes.

    Rows of the matrix are true classes. Cells are shares of the images of the true class. Returns None for a diverged
    run.

    Args:
        probs: float [N, K].
        labels: int [N].
        class_names: the name of each class, None for numbers.
        heading: names the run and the images.
        colour: the colour of a share of 100 %.
        num_pairs: the number of most confused pairs.
    """
    if not np.isfinite(probs).all():
        return None
    num_classes = probs.shape[1]
    counts = np.zeros((num_classes, num_classes), int)
    np.add.at(counts, (labels, probs.argmax(axis=1)), 1)
    names = [_plain(_shortened(name, 20)) for name in _names(class_names, num_classes)]
    if num_classes > tables.MOST_CLASSES:
        return _confused_pairs(counts, names, heading, colour, num_pairs)
    return _confusion_matrix(counts, names, heading, colour)


def _confusion_matrix(counts, names, heading, colour):
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.where(totals > 0, 100 * counts / np.maximum(totals, 1), np.nan)
    side = 0.34 * len(names) + 1.4
    figure = Figure(figsize=(side + 1.3, side + 0.4))
    axes = figure.subplots()
    colours = LinearSegmentedColormap.from_list('shares', ['white', colour])
    image = axes.imshow(shares, colours, vmin=0, vmax=100)
    for (row, column), share in np.ndenumerate(shares):
        if counts[row, column]:
            is_dark = np.dot(colours(share / 100)[:3], (0.3, 0.59, 0.11)) < 0.5
            text = f'{share:.0f}' if share >= 0.5 else '<1'
            ink = 'white' if is_dark else 'black'
            axes.text(column, row, text, ha='center', va='center', fontsize=7, color=ink)
    positions = range(len(names))
    axes.set(xlabel='predicted class', ylabel='true class')
    axes.set_xticks(positions, names, rotation=90 if max(map(len, names)) > 2 else 0)
    axes.set_yticks(positions, names)
    axes.grid(False)
    figure.colorbar(image, label='share of the images of the true class (%)', shrink=0.7)
    _title(figure, 'Confusion', heading.replace('; ', '\n', 1))
    return figure


def _confused_pairs(counts, names, heading, colour, num_pairs):
    wrong = counts * (1 - np.eye(len(counts), dtype=int))
    pairs = [divmod(int(i), len(counts)) for i in np.argsort(-wrong.ravel(), kind='stable')[:num_pairs]]
    pairs = [(true, predicted) for true, predicted in pairs if wrong[true, predicted]]
    figure = Figure(figsize=(7, 0.26 * max(len(pairs), 2) + 1.1))
    axes = figure.subplots()
    bars = axes.barh(range(len(pairs)), [wrong[pair] for pair in pairs], color=tint(colour, 0.65))
    texts = [f'{wrong[pair]} of {counts[pair[0]].sum()}' for pair in pairs]
    axes.bar_label(bars, texts, padding=2, fontsize=8)
    axes.set_yticks(range(len(pairs)), [f'{names[true]} → {names[predicted]}' for true, predicted in pairs])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(False, axis='y')
    axes.set(xlabel='confused images, of all images of the true class', ylabel='true → predicted')
    _title(figure, 'Most confused classes', heading.replace('; ', '\n', 1))
    return figure
