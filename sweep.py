"""Train a grid or random draws of any flags of train.py, and rank the runs by validation NLL.

    python sweep.py sweep.toml --output results/sweep_digits
    python sweep.py sweep.toml --output results/sweep_digits --part $SLURM_ARRAY_TASK_ID/8

The format of sweep.toml:

    [flags]                  # flags of every run; validation holds out images to rank the runs by
    dataset = 'digits'
    model = 'lenet'
    optim = 'bsam'
    priorprec = 1
    batchsize = 50
    batchsplit = 5
    epochs = 19
    warmup = 1
    validation = 0.2

    [grid]                   # all combinations
    rho = [0.01, 0.05]
    randomseed = [0, 1]

    [random]                 # settings, the same for each combination, log-uniform between two numbers
    draws = 2
    alpha = [0.1, 1.0]
"""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))  # PYTHONSAFEPATH=1 leaves this folder out

from runs import launch

# isort: split

import argparse
import itertools
import math
import random
import tomllib
from functools import partial
from pathlib import Path

import errors
from evaluation import tables
from evaluation.request import Request
from runs import folders, json_files, parsing, processes, training_flags

_MOST_RUNS = 10_000  # because run folders have numbers of four digits
SHOWN = ('nll', 'accuracy', 'ece')


class SweepError(errors.UserError):
    """A sweep file or folder cannot be used."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the flags. Ends the script if a flag is wrong."""
    parser = parsing.Parser(__doc__)
    parser.add_argument('sweep', type=parsing.path, help='the TOML file, in the format below')
    parser.add_argument('--output', type=parsing.path, required=True, help='folder for the runs and the summary')
    parser.add_argument(
        '--part', type=_part, default='0/1', metavar='I/M', help='train only every M-th run, from run I on'
    )
    parsing.add_jobs(parser)
    parser.add_argument('--testmc', type=parsing.integer(1), default=8, help='posterior samples in each evaluation')
    parser.add_argument('--summary', action='store_true', help='train nothing, only write the tables')
    return parser.parse_args(argv)


def _part(text):
    """Reads a flag's value: I/M, two whole numbers with I < M."""
    index, _, number = text.partition('/')
    number = parsing.integer(1)(number)
    return parsing.integer(0, below=number)(index), number


@launch.script('sweep.py')
def main(argv: list[str] | None = None) -> None:
    """Trains and evaluates the runs of a sweep, and prints the summary. Ends with status 1 if a run fails."""
    args = parse_args(argv)
    fixed, varied = read(args.sweep)
    sweep = [fixed | values for values in varied]
    chosen = [] if args.summary else range(args.part[0], len(sweep), args.part[1])
    for values in sweep:
        training_flags.parse_args(training_flags.command_line(values))
    _require_folder(args.output)
    for number, values in enumerate(sweep):
        processes.require_same_flags(_folder(args, number), values)
    complete = processes.on_devices([partial(_complete, args, number, sweep[number]) for number in chosen], args.jobs)
    print(summarise(args, sweep, varied))
    if not all(complete):
        sys.exit(1)


def read(path: Path) -> tuple[dict, list[dict]]:
    """Returns the flags that all runs share, and a list with the varied flags of each run. Raises SweepError."""
    try:
        sweep = tomllib.loads(json_files.read_text(path, limit=1 << 20))
    except (OSError, ValueError, RecursionError) as error:
        raise SweepError(f'{path} cannot be read: {errors.first_line(error)}') from error
    fixed, grid, ranges = (sweep.get(name, {}) for name in ('flags', 'grid', 'random'))
    if not all(isinstance(table, dict) for table in (fixed, grid, ranges)):
        raise SweepError(f'{path}: flags, grid and random must be tables: [flags], [grid] and [random]')
    draws, names = ranges.pop('draws', 1), {*fixed, *grid, *ranges}
    unknown, twice = sweep.keys() - {'flags', 'grid', 'random'}, grid.keys() & ranges.keys()
    reserved = {*training_flags.OF_START, 'resultsfolder', 'devices', 'help'} & names
    odd = {name for name in names if not name.isidentifier()}  # such a name, like 'a=1', could hold a flag and a value
    has_ranges = type(draws) is int and 0 < draws < 2**31 and all(map(_is_range, ranges.values()))
    for wrong, what in (
        (unknown, f' has an unknown table [{min(unknown, default="")}]: use [flags], [grid] and [random]'),
        (reserved, f': --{min(reserved, default="")} cannot be set in a sweep: omit it'),
        (odd, f': train.py has no flag {min(odd, default="")!r}'),
        (twice, f': {min(twice, default="")} is both in [grid] and in [random]: remove one'),
        (not fixed.get('validation'), ' holds out no images to rank the runs by: set validation = 0.1 in [flags]'),
        (not all(isinstance(v, list) and v for v in grid.values()), ': each flag in [grid] needs a list of values'),
        (not has_ranges, ': [random] needs draws of 1 or more, and for each flag two numbers, 0 < low < high'),
        (
            'random' in sweep and not ranges,
            ': [random] draws nothing: add a flag with two numbers, such as alpha = [0.1, 1]',
        ),
    ):
        if wrong:
            raise SweepError(f'{path}{what}')
    num_runs = draws * math.prod(len(values) for values in grid.values())
    if num_runs > _MOST_RUNS:
        raise SweepError(f'{path} asks for {num_runs} runs, but a sweep has at most {_MOST_RUNS}')
    rng = random.Random(0)
    parser = training_flags.create_parser()
    whole = {name for name in ranges if parser.takes_whole_numbers(name)}
    drawn = [{name: _drawn(rng, bounds, name in whole) for name, bounds in ranges.items()} for _ in range(draws)]
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return fixed, [combination | draw for combination in combinations for draw in drawn]


def _require_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(f'--output {folder} cannot be written: {error.strerror}') from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SweepError(f'--output {folder} cannot be written: permission denied')


def _is_range(bounds):
    numbers = isinstance(bounds, list) and len(bounds) == 2 and all(type(b) in (int, float) for b in bounds)
    return numbers and 0 < bounds[0] < bounds[1] <= sys.float_info.max


def _drawn(rng, bounds, whole):
    """Draws log-uniformly between two numbers: a whole number if `whole`, otherwise a number of four digits."""
    low, high = map(math.log, bounds)
    value = math.exp(rng.uniform(low, high))
    return round(value) if whole else float(f'{value:.4g}')


def _folder(args, number):
    return args.output / f'{number:04}'


def _complete(args, number, values, run):
    """Trains or resumes one run and evaluates it, unless it is complete. Returns True. Raises RunError."""
    folder = _folder(args, number)
    if not _measured(args, number, values):
        _, (measured,) = processes.trained_and_tested(run, folder, values, [_request(args)])
        print(f'{folder}: validation nll {measured["average"]["nll"]}', flush=True)
    return True


def _request(args):
    return Request(split='validation', testmc=(args.testmc,))


def _measured(args, number, values):
    """Returns the metrics of the model average, or None if the run is not yet trained and evaluated as asked."""
    request = _request(args)
    for trained in _folder(args, number).glob('*/*/run_*'):
        try:
            found = json_files.read_json(request.metrics_file(trained))
            average = found.get('average')
            json_files.require_numbers(average if isinstance(average, dict) else {}, SHOWN)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise folders.RunError(f'{trained}: its metrics cannot be read: {error}') from error
        epochs = training_flags.parse_args(training_flags.command_line(values)).epochs
        end = folders.end_of_training(folders.read_config(trained), epochs)
        if all(found.get(name) == value for name, value in (request.recorded() | {'trained': end}).items()):
            return average
    return None


def summarise(args: argparse.Namespace, sweep: list[dict], varied: list[dict]) -> str:
    """Writes summary.md and summary.csv if a run is complete. The run with the lowest validation NLL comes first.

    Args:
        args: the flags of this script.
        sweep: all flags of each run.
        varied: the flags of each run that differ between runs.

    Returns:
        The text of summary.md.

    Raises:
        RunError: metrics cannot be read, or a summary cannot be written.
    """
    measured = [_measured(args, number, values) for number, values in enumerate(sweep)]
    complete = [number for number, found in enumerate(measured) if found]
    complete.sort(key=lambda number: math.inf if measured[number]['nll'] is None else measured[number]['nll'])
    names = list(dict.fromkeys(name for values in varied for name in values))
    header = ['run', *names, *SHOWN]
    rows = [
        [
            f'{number:04}',
            *(errors.printable(varied[number][name]) for name in names),
            *(_four_digits(measured[number][name]) for name in SHOWN),
        ]
        for number in complete
    ]
    text = (
        tables.markdown(header, rows)
        + f'\n{len(complete)} of {len(sweep)} runs, on validation images, lowest NLL first\n'
    )
    if complete:
        json_files.write_bytes(args.output / 'summary.md', text.encode())
        json_files.write_bytes(args.output / 'summary.csv', tables.comma_separated(header, rows).encode())
    return text


def _four_digits(value):
    return 'nan' if value is None else f'{value:.4f}'


if __name__ == '__main__':
    main()
