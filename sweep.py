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

    [grid]                   # all combinations; runs that differ only in randomseed are one row of the table
    rho = [0.001, 0.01]
    randomseed = [0, 1]

    [random]                 # settings, the same for each combination, log-uniform between two numbers
    draws = 2
    seed = 0                 # seed of the draws: another seed draws other settings
    alpha = [0.05, 0.5]
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
import shlex
import tomllib
from functools import partial
from pathlib import Path

import errors
from evaluation import comparison, tables
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
    draws, seed = ranges.pop('draws', 1), ranges.pop('seed', 0)
    names = {*fixed, *grid, *ranges}
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
        (
            type(seed) is not int or seed < 0,
            ': seed in [random] is of the draws, a whole number of 0 or more; the seed of a run is randomseed',
        ),
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
    rng = random.Random(seed)
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
        of_run = {name: [value] for name, value in _numbers(measured['average']).items()}
        print(f'{folder}: validation NLL {_cells(of_run)[0]}', flush=True)
    return True


def _request(args):
    return Request(split='validation', testmc=(args.testmc,))


def _measured(args, number, values):
    """Returns the folder and the metrics of a run, or None if it is not yet trained and evaluated as asked."""
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
            return trained, _numbers(average)
    return None


def _numbers(average):
    """Returns the metrics of SHOWN: nan for a diverged run, whose numbers are None, and inf for an infinite NLL."""
    if average['nll'] is None and average['accuracy'] is not None:
        average = average | {'nll': math.inf}
    return {name: math.nan if average[name] is None else average[name] for name in SHOWN}


def summarise(args: argparse.Namespace, sweep: list[dict], varied: list[dict]) -> str:
    """Writes summary.md and summary.csv if a run is complete. The setting with the lowest validation NLL comes first.

    A row is a setting: its complete runs, which differ only in the seed. Settings with a diverged run come last.

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
    names = list(dict.fromkeys(name for values in varied for name in values if name != 'randomseed'))
    metrics, shown, in_csv = [], [], []
    for numbers in _settings(sweep):
        complete = [measured[number] for number in numbers if measured[number]]
        if not complete:
            continue
        metrics.append({name: [average[name] for _, average in complete] for name in SHOWN})
        runs = _as_one_word([run.relative_to(args.output) for run, _ in complete])
        setting = [runs, *(errors.printable(varied[numbers[0]][name]) for name in names)]
        num_runs = str(len(complete)) if len(complete) == len(numbers) else f'{len(complete)} of {len(numbers)}'
        shown.append([*setting, num_runs, *_cells(metrics[-1])])
        csv_cells = [cell for name in SHOWN for cell in comparison.csv_cells(name, metrics[-1][name])]
        in_csv.append([*setting, str(len(complete)), *csv_cells])
    order = comparison.order(metrics)
    header = ['run', *names, 'runs']
    text = tables.markdown([*header, *(comparison.TITLES[name] for name in SHOWN)], [shown[i] for i in order])
    text += f'\n{sum(map(bool, measured))} of {len(sweep)} runs, on validation images, lowest NLL first\n'
    if not metrics:
        return text
    text += 'a row is the mean ± standard deviation over runs that differ only in --randomseed\n'
    text += f'evaluate a row with: python test.py --resultsfolder {shlex.quote(str(args.output / "RUN"))}\n'
    csv = tables.comma_separated([*header, *comparison.csv_header(SHOWN)], [in_csv[i] for i in order])
    json_files.write_bytes(args.output / 'summary.md', text.encode())
    json_files.write_bytes(args.output / 'summary.csv', csv.encode())
    return text


def _settings(sweep):
    """Returns the numbers of the runs of each setting. The runs differ only in randomseed. A seed counts once."""
    settings = {}
    for number, values in enumerate(sweep):
        setting = repr(sorted((name, value) for name, value in values.items() if name != 'randomseed'))
        settings.setdefault(setting, {}).setdefault(repr(values.get('randomseed')), number)
    return [list(of_setting.values()) for of_setting in settings.values()]


def _as_one_word(runs):
    """Returns run folders as a shell word, such as 0000/digits_lenet/bsam/run_0 or {0000,0001}/digits_lenet/..."""
    numbers = {}
    for run in runs:
        numbers.setdefault(Path(*run.parts[1:]), []).append(run.parts[0])
    words = (f'{{{",".join(of_path)}}}' if len(of_path) > 1 else of_path[0] for of_path in numbers.values())
    return ' '.join(f'{word}/{path}' for word, path in zip(words, numbers, strict=True))


def _cells(values):
    """Returns the cells of the metrics in SHOWN over the runs of a setting. The NLL's cell counts diverged runs."""
    cells = {name: comparison.mean_and_deviation(name, values[name]) for name in SHOWN}
    diverged = sum(map(math.isnan, values['nll']))
    if diverged:
        cells['nll'] = f'{diverged} of {len(values["nll"])} diverged' if len(values['nll']) > 1 else 'diverged'
    return list(cells.values())


if __name__ == '__main__':
    main()
