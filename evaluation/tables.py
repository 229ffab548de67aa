"""Tables of text cells: Markdown that is neat in a terminal too, CSV and LaTeX."""

import csv
import io


def markdown(header, rows):
    """Columns are padded to one width, the first to the left and the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    marks = ['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])]
    return ''.join(_line(cells, widths) for cells in (header, marks, *rows))


def _line(cells, widths):
    first = cells[0].ljust(widths[0])
    others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return f'| {" | ".join([first, *others])} |\n'


def comma_separated(header, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows([header, *rows])
    return text.getvalue()


def latex(header, rows):
    """A tabular for the package booktabs; `**bold**` cells are set bold."""
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
