"""Measure predictions that any program saved, and compare several programs, methods or seeds.

examples:
  python -m evaluation predictions.npz --plots --output measured
  python -m evaluation sgd.npz bsam.npz
  python -m evaluation sgd_0.npz sgd_1.npz bsam_0.npz bsam_1.npz --names sgd sgd bsam bsam

A file holds labels, int [N], and probs or logits, float [N, K], for N images and K classes:
  np.savez('predictions.npz', labels=labels, probs=probs)
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # for `python FOLDER/evaluation`

from runs import scripts

# isort: split
import argparse
from pathlib import Path

import numpy as np

import errors
from evaluation import comparison, foreign, tables
from readers.files import DataError
from runs import json_files, parsing


@scripts.script('evaluation')
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.output:
        json_files.require_place(args.output, '--output')
    if args.plots:
        require_drawing()
    saved = {path: foreign.read(path) for path in args.files}
    require_same_images(saved)
    results = []
    for name, (path, predictions) in zip(args.names, saved.items(), strict=True):
        result = predictions.result(name)
        evaluate(path, predictions, result, args)
        results.append(result)
    if len(results) > 1:
        compare(results, args)


def require_drawing() -> None:
    """Raises a UserError if a package is missing that pictures need and tables do not."""
    try:
        from evaluation import plots  # noqa: F401, imported late because Matplotlib takes most of a second
    except ModuleNotFoundError as error:
        raise errors.UserError(f'--plots needs {error.name}: pip install -r requirements.txt') from error


def require_same_images(saved: dict[Path, foreign.Saved]) -> None:
    """Raises a DataError unless all files have the same labels and number of classes."""
    (first, expected), *others = saved.items()
    for path, predictions in others:
        shapes = [of.probs['average'].shape for of in (expected, predictions)]
        if shapes[0] != shapes[1] or (predictions.labels != expected.labels).any():
            what = 'the labels differ' if shapes[0] == shapes[1] else f'N and K are {shapes[1]} and {shapes[0]}'
            raise DataError(f'{path} and {first} are of different images, or in another order: {what}')


def evaluate(path: Path, predictions: foreign.Saved, result: comparison.Result, args: argparse.Namespace) -> None:
    """Measures the predictions of a file and prints all metrics. With --output, writes them, and pictures if asked."""
    several = len(args.files) > 1
    measured = predictions.measure(args.bins)
    text = tables.of_predictions(measured, predictions.title, args.all)
    if args.all:
        text += tables.classes(result.probs, result.labels, predictions.class_names, predictions.title)
    print((f'\n{path}\n' if several else '') + text, end='', flush=True)
    if args.output:
        folder = comparison.own_folder(args.output, path) if several else args.output
        json_files.make_folder(folder)
        json_files.write_json(folder / 'metrics.json', {'file': str(path)} | measured)
        print(f'\nwritten: {folder}')
        if args.plots:
            print(f'pictures: {draw(folder, path, predictions, result, args)}')


def draw(
    folder: Path, path: Path, predictions: foreign.Saved, result: comparison.Result, args: argparse.Namespace
) -> Path:
    """Writes the pictures of a file to a folder within `folder` and returns it. Raises RunError."""
    from evaluation import plots

    heading = f'{path.name}: {len(result.labels)} images'
    figures = plots.of_rows(comparison.rows([result]), result.labels, args.bins, heading)
    figures['confusion'] = plots.confusion(result.probs, result.labels, predictions.class_names, heading)
    plots.write(folder / 'plots', figures)
    return folder / 'plots'


def compare(results: list[comparison.Result], args: argparse.Namespace) -> None:
    """Prints the comparison of several files. With --output, writes it, and pictures if asked."""
    text, rows, values = comparison.report(results, args.bins, args.ensemble)
    print(text, end='')
    if args.output:
        written = comparison.write(args.output, rows, values)
        print('written: ' + ', '.join(str(path) for path in written))
        if args.plots:
            print(f'pictures: {draw_comparison(rows, results[0].labels, args)}')


def draw_comparison(rows: list[comparison.Row], labels: np.ndarray, args: argparse.Namespace) -> Path:
    """Writes the pictures that compare several files to a folder beside the tables and returns it. Raises RunError."""
    from evaluation import plots

    plots.write(args.output / 'plots', plots.of_rows(rows, labels, args.bins, f'{len(labels)} images'))
    return args.output / 'plots'


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = create_parser()
    args = parser.parse_args(argv)
    try:
        _require_consistency(args)
    except ValueError as error:
        parser.error(str(error))
    args.names = args.names or _names(args.files)
    return args


def create_parser() -> parsing.Parser:
    parser = parsing.Parser(__doc__)
    parser.prog, parser.usage = 'evaluation', 'python -m evaluation FILE [FILE ...] [flags]'
    add = parser.add_argument
    add('files', type=parsing.path, nargs='+', metavar='FILE', help='.npz files; several are also compared')
    help = 'name of the method of each file; files of one method are its runs (default: the names of the files)'
    add('--names', type=_name, nargs='+', metavar='NAME', help=help)
    help = 'number of bins of ECE, MCE and the reliability diagram'
    add('--bins', type=parsing.integer(1, below=10_001), default=20, help=help)
    help = f'show all metrics instead of the usual {len(tables.REPORTED)}, and a table of the classes'
    add('--all', action='store_true', help=help)
    add('--ensemble', action='store_true', help='with several files: also evaluate ensembles, per method and over all')
    add('--output', type=parsing.path, metavar='FOLDER', help='write metrics.json and the tables to this folder')
    add('--plots', action='store_true', help='draw pictures into the folder plots of --output, as PNG and PDF')
    return parser


def _name(text):
    """Reads a flag's value: a name of one line."""
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f'{text!r} is not a name')
    return text


_name.metavar = 'NAME'


def _names(files):
    """Returns a name for each file: the file's name, or the path if two files have the same name."""
    names = [file.stem for file in files]
    return [errors.printable(name) for name in (names if len(set(names)) == len(names) else map(str, files))]


def _require_consistency(args):
    """Raises a ValueError for flags that cannot be combined."""
    paths = [os.path.realpath(file) for file in args.files]
    for file, path in zip(args.files, paths, strict=True):
        if paths.count(path) > 1:
            raise ValueError(f'{file} is given twice: leave out one of them')
    if args.names and len(args.names) != len(args.files):
        raise ValueError(f'--names has {len(args.names)} names for {len(args.files)} files: name every file')
    if args.ensemble and len(args.files) == 1:
        raise ValueError('--ensemble needs several files')
    if args.plots and not args.output:
        raise ValueError('--plots needs --output FOLDER')


if __name__ == '__main__':
    main()
