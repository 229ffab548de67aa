"""Tables in Markdown, CSV and LaTeX, and the tables that test.py prints for one run."""

import csv
import io
import math
from collections.abc import Sequence

import numpy as np

import metrics

UNDEFINED = '–'  # the cell of a number that is not defined


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table, padded for a terminal. The first column is left-aligned, the others right-aligned."""
    widths = [max(2, *map(len, column)) for column in zip(header, *rows, strict=True)]  # Markdown needs the mark -:
    marks = ['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])]
    return ''.join(_line(cells, widths) for cells in (header, marks, *rows))


def _line(cells, widths):
    first = cells[0].ljust(widths[0])
    others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return f'| {" | ".join([first, *others])} |\n'


def comma_separated(header: list[str], rows: list[list[str]]) -> str:
    """Returns a table as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows([header, *rows])
    return text.getvalue()


def latex(header: list[str], rows: list[list[str]]) -> str:
    """Returns a LaTeX tabular for the package booktabs. A cell `**text**` becomes bold."""
    lines = [f'\\begin{{tabular}}{{l{"r" * (len(header) - 1)}}}', '\\toprule', _latex_line(header), '\\midrule']
    lines += [*map(_latex_line, rows), '\\bottomrule', '\\end{tabular}']
    return '\n'.join(lines) + '\n'


def _latex_line(cells):
    return ' & '.join(_latex_cell(cell) for cell in cells) + ' \\\\'


def _latex_cell(cell):
    if cell.startswith('**'):
        return f'\\textbf{{{_latex_cell(cell.strip("*"))}}}'
    for character, command in {'\\': '', '%': '\\%', '_': '\\_', '&': '\\&', '#': '\\#', '±': '$\\pm$'}.items():
        cell = cell.replace(character, command)
    return cell


# The tables that test.py prints for one run.

REPORTED = ('accuracy', 'nll', 'brier', 'ece', 'auroc', 'aurc', 'entropy', 'mutual_information')


def evaluation(results: dict, is_point: bool = False, show_all: bool = False) -> str:
    """Returns the tables of all measurements of a run.

    Args:
        results: entries of metrics.json. A missing measurement gets no table.
        is_point: whether the run has a point estimate instead of a posterior. Then the tables leave out the average
            over samples, because it equals the mean.
        show_all: whether the table of metrics has all metrics instead of the metrics in REPORTED.
    """
    shown = _shown(results, is_point)
    text = _metrics(results, shown, show_all) if 'mean' in results else ''
    return text + ''.join(table(results, shown) for part, table in _PARTS.items() if part in results)


def with_intervals(results: dict, is_point: bool = False) -> str:
    """Returns the table of the metrics in REPORTED with 95 % intervals. The arguments are as for `evaluation`."""
    return _with_intervals(results, _shown(results, is_point), show_all=False)


def of_predictions(results: dict, title: str, show_all: bool) -> str:
    """Returns the table of metrics of saved predictions, as from evaluation.foreign.Saved.measure.

    Args:
        results: entries of metrics.json.
        title: what predicts besides the mean.
        show_all: whether the table has all metrics instead of the metrics in REPORTED.
    """
    shown = {'mean': 'mean', 'average': title}
    return _with_intervals(results, {at: shown[at] for at in shown if at in results}, show_all)


def _shown(results, is_point):
    return {'mean': 'mean'} | ({} if is_point else {'average': samples(results['testmc'])})


def samples(number: int | None) -> str:
    """Returns '1 sample', '2 samples' and so on, or 'average' if the number is unknown."""
    return 'average' if number is None else f'{number} sample{"s" * (number != 1)}'


def _metrics(results, shown, show_all):
    """Returns the two lines of the published test.py, where auroc is `auroc_grid`, then a table with intervals."""
    line = '  > testacc={accuracy:.2%}, nll={nll:.4f}, ece={ece:.4f}, auroc={auroc_grid:.4f} (exact {auroc:.4f})\n'
    return (
        f'results at mean of distribution:\n{line.format(**results["mean"])}'
        f'results at model average ({samples(results["testmc"])}):\n{line.format(**results["average"])}\n'
        + _with_intervals(results, shown, show_all)
    )


def _with_intervals(results, shown, show_all):
    rows = []
    for name in results['average']:
        if not (show_all or name in REPORTED) or not any(name in results[at] for at in shown):
            continue
        cells = [name]
        for at in shown:
            interval = results['intervals'][at].get(name, (math.nan, math.nan))
            cells += [
                _cell(name, results[at].get(name)), ' to '.join(_cell(name, x) for x in interval if x == x),
            ]  # fmt: skip
        rows.append(cells)
    header = [cell for title in shown.values() for cell in (title, '95 % interval')]
    return markdown(['', *header], rows)


def _curve(results, shown):
    rows = [
        [str(point['testmc']), *(_cell(name, point[name]) for name in metrics.SHORT)] for point in results['samples']
    ]
    return _table(['samples', *metrics.SHORT], rows)


def _temperature(results, shown):
    tempered, rows = results['temperature'], []
    for at, title in shown.items():
        for label, summary in (('1', results[at]), (_of_temperature(tempered[at]), tempered[at])):
            rows.append([title, label, *(_cell(name, summary[name]) for name in (*metrics.SHORT, 'brier'))])
    text = _table(['', 'temperature', *metrics.SHORT, 'brier'], rows)
    if any(tempered[at]['at_bound'] for at in shown):
        text += 'A temperature with < or > is at the end of its range: the best temperature is further out.\n'
    return text


def _of_temperature(tempered):
    """Returns a temperature as text, such as '1.234', '> 100' or '< 0.01'."""
    temperature = tempered['temperature']
    if not tempered['at_bound']:
        return f'{temperature:.3f}'
    return f'{"<" if temperature < 1 else ">"} {temperature:g}'


def _laplace(results, shown):
    fitted, names = results['laplace'], (*metrics.SHORT, 'brier', 'auroc')
    if not fitted or 'probit' not in fitted:
        return ''
    tau = f'{fitted["prior_precision"]:.4g}'
    rows = {shown['average']: results['average'], 'probit': fitted['probit']}
    cells = [[title, tau, *(_cell(name, found[name]) for name in names)] for title, found in rows.items()]
    return _table([f'Laplace, {fitted["structure"]}', 'prior precision', *names], cells)


def _ood(results, shown):
    names = ('auroc', 'aupr_unknown', 'aupr_known', 'fpr95')
    text = ''
    for dataset, result in results['ood'].items():
        rows = [
            [f'{title}, {score}', *(_cell(name, separation[name]) for name in names)]
            for at, title in shown.items()
            for score, separation in result[at].items()
        ]
        text += _table([f'unknown: {dataset}', *names], rows)
    return text


def _corruptions(results, shown):
    """Returns means over corruptions at each severity, then means over severities of each corruption.

    Corruptions that the means leave out are in a table of their own.
    """
    header = [f'{name}, {title}' for name in metrics.SHORT for title in ('mean', 'MC')[: len(shown)]]
    from evaluation import corruptions, measures  # imported late because they import JAX

    corrupted = results['corruptions']
    averaged = corruptions.in_mean(corrupted)

    def cells(points):
        return [_cell(name, points[at][name]) for name in metrics.SHORT for at in shown]

    def over_severities(title, names):
        return _table([title, *header], [[name, *cells(measures.over_severities(corrupted[name]))] for name in names])

    of_severity = zip(*(measures.over_corruptions(corrupted, at) for at in ('mean', 'average')), strict=True)
    rows = [['0 (clean)', *cells(results)]]
    rows += [[str(i), *cells({'mean': m, 'average': a})] for i, (m, a) in enumerate(of_severity, start=1)]
    legend = f'; MC: average over {shown["average"]}' if 'average' in shown else ''
    text = f'\n{corruptions.description(corrupted)}{legend}' + _table(['severity', *header], rows)
    text += over_severities('corruption', averaged)
    left_out = [name for name in corrupted if name not in averaged]
    return text + (over_severities('not in the mean', left_out) if left_out else '')


MOST_CLASSES = 20  # in tables and pictures with a row for each class


def classes(probs: np.ndarray, labels: np.ndarray, class_names: Sequence[str] | None, title: str) -> str:
    """Returns a table of the classes: images, accuracy and mean confidence. It is '' for more than MOST_CLASSES.

    Args:
        probs: float [N, K].
        labels: int [N].
        class_names: the name of each class, None for numbers.
        title: what predicts.
    """
    if probs.shape[1] > MOST_CLASSES:
        return ''
    right, confidence = probs.argmax(axis=1) == labels, probs.max(axis=1)
    rows = []
    for k, name in enumerate(class_names or map(str, range(probs.shape[1]))):
        of_class = labels == k
        measured = np.isfinite(probs).all() and of_class.any()
        means = [x[of_class].mean() if measured else math.nan for x in (right, confidence)]
        rows.append([name, str(of_class.sum()), *(_cell('accuracy', mean) for mean in means)])  # both in %
    return _table([f'class, {title}', 'images', 'accuracy', 'mean confidence'], rows)


_PARTS = {'samples': _curve, 'laplace': _laplace, 'temperature': _temperature, 'ood': _ood, 'corruptions': _corruptions}


def _cell(name, value):
    if value is None or value != value:
        return UNDEFINED
    scale, digits = metrics.scale_and_digits(name)
    return f'{scale * value:.{digits}f}{"%" * (scale == 100)}'


def _table(header, rows):
    return '\n' + markdown(header, rows)
