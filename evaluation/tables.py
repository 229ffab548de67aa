"""Tables in Markdown, which is neat in a terminal too, CSV and LaTeX. The tables that test.py prints for one run."""

import csv
import io
import math

import metrics
from evaluation import corruptions, measures


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table with padded columns. The first column is aligned left, the others are aligned right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
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
    """Returns a LaTeX tabular for the package booktabs. Cells `**bold**` are in bold."""
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


def evaluation(results: dict) -> str:
    """Returns the tables of all measurements of a run, for those entries of metrics.json that `results` has."""
    return ''.join(show(results) for part, show in _PARTS.items() if part in results)


def _metrics(results):
    """Returns the lines of the reference code, where auroc is `auroc_grid`, then all metrics with their intervals."""
    num_samples = results['testmc']
    line = '  > testacc={accuracy:.2%}, nll={nll:.4f}, ece={ece:.4f}, auroc={auroc_grid:.4f} (exact {auroc:.4f})\n'
    rows = []
    for name, value in results['average'].items():
        cells = [name]
        for at, shown in (('mean', results['mean'].get(name)), ('average', value)):
            interval = results['intervals'][at].get(name, (math.nan, math.nan))
            cells += [_cell(name, shown), ' to '.join(_cell(name, bound) for bound in interval if bound == bound)]
        rows.append(cells)
    return (
        f'results at mean of distribution:\n{line.format(**results["mean"])}'
        f'results at model average ({num_samples} samples):\n{line.format(**results["average"])}'
        + _table(['', 'mean', '95 % interval', f'{num_samples} samples', '95 % interval'], rows)
    )


def _curve(results):
    rows = [
        [str(point['testmc']), *(_cell(name, point[name]) for name in metrics.SHORT)] for point in results['samples']
    ]
    return _table(['samples', *metrics.SHORT], rows)


def _temperature(results):
    tempered, rows = results['temperature'], []
    for at, title in (('mean', 'mean'), ('average', f'{results["testmc"]} samples')):
        for label, summary in (('1', results[at]), (f'{tempered[at]["temperature"]:.3f}', tempered[at])):
            rows.append([title, label, *(_cell(name, summary[name]) for name in (*metrics.SHORT, 'brier'))])
    return _table(['', 'temperature', *metrics.SHORT, 'brier'], rows)


def _ood(results):
    names = ('auroc', 'aupr_unknown', 'aupr_known', 'fpr95')
    text = ''
    for dataset, result in results['ood'].items():
        rows = [
            [f'{at}: {score}', *(_cell(name, separation[name]) for name in names)]
            for at in ('mean', 'average')
            for score, separation in result[at].items()
        ]
        text += _table([f'unknown: {dataset}', *names], rows)
    return text


def _corruptions(results):
    """Returns means over corruptions at each severity, then means over severities of each corruption.

    Corruptions that the means leave out are in a table of their own.
    """
    header = [f'{name} {at}' for name in metrics.SHORT for at in ('mean', f'{results["testmc"]}')]
    corrupted = results['corruptions']
    averaged = corruptions.in_mean(corrupted)

    def cells(points):
        return [_cell(name, points[at][name]) for name in metrics.SHORT for at in ('mean', 'average')]

    def over_severities(title, names):
        return _table([title, *header], [[name, *cells(measures.over_severities(corrupted[name]))] for name in names])

    of_severity = zip(*(measures.over_corruptions(corrupted, at) for at in ('mean', 'average')), strict=True)
    rows = [['0 (clean)', *cells(results)]]
    rows += [[str(i), *cells({'mean': m, 'average': a})] for i, (m, a) in enumerate(of_severity, start=1)]
    text = f'\n{corruptions.description(corrupted)}' + _table(['severity', *header], rows)
    text += over_severities('corruption', averaged)
    left_out = [name for name in corrupted if name not in averaged]
    return text + (over_severities('not in the mean', left_out) if left_out else '')


_PARTS = {
    'mean': _metrics, 'samples': _curve, 'temperature': _temperature, 'ood': _ood, 'corruptions': _corruptions,
}  # fmt: skip


def _cell(name, value):
    if value is None or value != value:
        return '–'
    return f'{value:.2%}' if name in ('accuracy', 'top5', 'risk_at_80', 'disagreement') else f'{value:.4f}'


def _table(header, rows):
    return '\n' + markdown(header, rows)
