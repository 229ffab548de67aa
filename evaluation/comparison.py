"""Tables that compare methods. Runs with the same flags, apart from the seed, are runs of one method."""

import collections
import json
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

import errors
import metrics
from evaluation import tables
from runs import json_files, training_flags

# Flags in which the runs of a method may differ.
_NOT_OF_THE_METHOD = {'randomseed', 'resultsfolder', *training_flags.MAY_CHANGE} - {'epochs'}

SHOWN = (*metrics.SHORT, 'auroc')
_TITLES = {'accuracy': 'accuracy %', 'nll': 'NLL', 'ece': 'ECE', 'auroc': 'AUROC'}
_HIGHER_IS_BETTER = ('accuracy', 'top5', 'auroc', 'auroc_grid')


class ComparisonError(errors.UserError):
    """Raised for runs that cannot be compared."""


class Result(NamedTuple):
    """The predictions of a run for N images.

    Attributes:
        flags: the training flags of the run.
        labels: int [N].
        probs_at_mean: float [N, K], at the posterior mean.
        probs: float [N, K], averaged over posterior samples.
        num_samples: the number of posterior samples. For an ensemble of runs with different numbers, a text such as
            '16/32'.
        with_laplace: whether the samples are from a Laplace approximation.
    """

    flags: dict
    labels: np.ndarray
    probs_at_mean: np.ndarray
    probs: np.ndarray
    num_samples: int | str
    with_laplace: bool = False


class Row(NamedTuple):
    """A row of the tables: a method at its posterior mean, or averaged over posterior samples.

    Attributes:
        name: the method and what predicts, such as 'bsam, mean' or 'bsam, 32 samples'.
        probs: float [N, K] of each run of the method.
    """

    name: str
    probs: list[np.ndarray]


def rows(results: list[Result]) -> list[Row]:
    """Returns the Rows of each method: at the posterior mean, and averaged over samples if the average differs.

    Samples from a Laplace approximation make a row of their own.
    """
    found = {}
    for name, of_method in _methods(results).items():
        for with_laplace in (False, True):
            group = [result for result in of_method if result.with_laplace == with_laplace]
            if not group:
                continue
            at_mean, averaged = [r.probs_at_mean for r in group], [r.probs for r in group]
            found.setdefault(f'{name}, mean', at_mean)
            if not all(np.allclose(a, b, atol=1e-6) for a, b in zip(at_mean, averaged, strict=True)):
                laplace = ' laplace' if with_laplace else ''
                found[f'{name}{laplace}, {tables.samples(_num_samples(group))}'] = averaged
    return [Row(name, probs) for name, probs in found.items()]


def _methods(results):
    """Returns {method name: its results}. The flags of one method's runs differ only in _NOT_OF_THE_METHOD."""
    groups = collections.defaultdict(list)
    for result in results:
        groups[_method(result.flags)].append(result)
    return dict(zip(_names(list(groups)), groups.values(), strict=True))


def _num_samples(results):
    """Returns the number of samples of each result, or a text such as '16/32' if the numbers differ."""
    numbers = {result.num_samples for result in results}
    return numbers.pop() if len(numbers) == 1 else '/'.join(sorted(map(str, numbers)))


def _method(flags):
    return json.dumps({name: value for name, value in flags.items() if name not in _NOT_OF_THE_METHOD})


def _names(methods):
    """Returns a name for each method: its optimizer, and the flags in which methods with this optimizer differ."""
    methods = [json.loads(method) for method in methods]
    names = []
    for method in methods:
        others = [other for other in methods if other['optim'] == method['optim']]
        differing = [name for name in method if any(other.get(name) != method[name] for other in others)]
        names.append(' '.join([method['optim'], *(f'{name}={method[name]}' for name in differing)]))
    return names


def check_flags(flags: list[dict], split: str) -> None:
    """Raises a ComparisonError if runs have different images, or if runs of one method have the same seed.

    Args:
        flags: the training flags of each run.
        split: 'test' or 'validation', the images of the evaluation.
    """
    for other in flags:
        for name in ('dataset', *(['validation', 'trainimages'] if split == 'validation' else [])):
            if other[name] != flags[0][name]:
                values = f'--{name} {flags[0][name]} and --{name} {other[name]}'
                raise ComparisonError(f'runs with {values} have different images: compare runs with the same --{name}')
    seeds = [(_method(f), f['randomseed']) for f in flags]
    for twice in (seed for seed in seeds if seeds.count(seed) > 1):
        optim = json.loads(twice[0])['optim']
        raise ComparisonError(
            f'two runs of {optim} have the same flags and --randomseed {twice[1]}: leave out one of them'
        )


def check_labels(results: list[Result]) -> None:
    """Raises a ComparisonError unless all results have the same labels and number of classes."""
    first = results[0]
    same = (np.array_equal(r.labels, first.labels) and r.probs.shape == first.probs.shape for r in results)
    if not all(same):
        raise ComparisonError('the runs were evaluated on different images: evaluate them again without --reuse')


def ensembles(results: list[Result]) -> list[Result]:
    """Returns deep ensembles (Lakshminarayanan et al., 2017), which average the probabilities of several runs.

    An ensemble has predictions at the posterior means and over the posterior samples of its runs. Each method with
    several runs gives one ensemble. Several methods give one more ensemble, of all runs. Ignores results with a Laplace
    approximation.
    """
    results = [result for result in results if not result.with_laplace]
    methods = _methods(results)
    groups = {f'{name} ensemble': group for name, group in methods.items() if len(group) > 1}
    if len(methods) > 1:
        groups['all as an ensemble'] = results
    return [_ensemble(f'{name} of {len(group)}', group) for name, group in groups.items()]


def _ensemble(name, results):
    at_mean, averaged = (np.mean([getattr(r, part) for r in results], axis=0) for part in ('probs_at_mean', 'probs'))
    return Result({'optim': name}, results[0].labels, at_mean, averaged, _num_samples(results))


def values(rows: list[Row], labels: np.ndarray, num_bins: int) -> list[dict[str, list[float]]]:
    """Returns all metrics of all runs: a dict {metric: [value of each run]} for each row.

    Args:
        rows: as from `rows`.
        labels: int [N].
        num_bins: the number of bins of ECE and MCE.
    """
    summaries = [[metrics.summary(probs, labels, num_bins) for probs in row.probs] for row in rows]
    return [{name: [s[name] for s in runs] for name in metrics.METRICS} for runs in summaries]


def order(values: list[dict]) -> list[int]:
    """Returns the row indices, sorted by mean NLL: the lowest first, nan last.

    The NLL ranks the rows because it is a proper scoring rule: it measures accuracy and calibration at once.
    """
    nlls = [np.mean(v['nll']) for v in values]
    return sorted(range(len(values)), key=lambda i: (np.isnan(nlls[i]), nlls[i]))


def main_table(rows: list[Row], values: list[dict], bold: bool) -> tuple[list[str], list[list[str]]]:
    """Returns the header and rows of the main table: mean ± standard deviation over the runs of each method.

    Args:
        rows: as from `rows`.
        values: as from `values`, for the same rows.
        bold: whether the best value of each column is in bold.
    """
    means = {name: [round(float(np.mean(v[name])), 4) for v in values] for name in SHOWN}
    best = {name: _best(name, column) for name, column in means.items()}
    header = ['method', 'runs', *(_TITLES[name] for name in SHOWN)]
    cells = [
        [
            row.name,
            str(len(row.probs)),
            *(_mean_and_deviation(name, v[name], best[name] if bold else None) for name in SHOWN),
        ]
        for row, v in zip(rows, values, strict=True)
    ]
    return header, cells


def _best(name, column):
    numbers = [value for value in column if not np.isnan(value)]
    return (max if name in _HIGHER_IS_BETTER else min)(numbers, default=None)


def _mean_and_deviation(name, values, best):
    scale, digits = metrics.scale_and_digits(name)
    text = f'{scale * np.mean(values):.{digits}f}'
    if len(values) > 1:
        text += f' ± {scale * _standard_deviation(values):.{digits}f}'
    return f'**{text}**' if round(float(np.mean(values)), 4) == best else text


def full_table(rows: list[Row], values: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and rows of the table for other programs: the mean and standard deviation of all metrics."""
    header = ['method', 'runs', *(f'{name}_{part}' for name in metrics.METRICS for part in ('mean', 'sd'))]
    cells = [
        [row.name, str(len(row.probs))]
        + [f'{x:.6g}' for name in metrics.METRICS for x in (np.mean(v[name]), _standard_deviation(v[name]))]
        for row, v in zip(rows, values, strict=True)
    ]
    return header, cells


def _standard_deviation(values):
    """Returns the standard deviation over runs, or nan for a single run or infinite values."""
    return np.std(values, ddof=1) if len(values) > 1 and np.isfinite(values).all() else np.nan


def test_table(rows: list[Row], labels: np.ndarray, num_bins: int) -> tuple[list[str], list[list[str]]]:
    """Returns the header and rows of paired bootstrap tests over images: the difference of each row from the first row.

    Each difference has a 95 % interval and a p-value.

    Args:
        rows: as from `rows`.
        labels: int [N].
        num_bins: the number of bins of the ECE.
    """
    tested = {name: metric for name, metric in metrics.with_bins(num_bins).items() if name in metrics.SHORT}
    measured = [_averages(tested, row.probs, labels) for row in rows]
    cells = []
    for row, (observed, resampled) in zip(rows[1:], measured[1:], strict=True):
        line = [row.name]
        for name in metrics.SHORT:
            with np.errstate(invalid='ignore'):  # an infinite NLL minus another is nan
                difference = observed[name] - measured[0][0][name]
                test = metrics.difference(difference, resampled[name] - measured[0][1][name])
            line += _test_cells(name, difference, *test)
        cells.append(line)
    return _test_header(rows[0].name), cells


def seeds_table(rows: list[Row], values: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Returns a table like `test_table`, but with Welch's t-test over seeds.

    The table has only rows with several runs, and is ([], []) if there are fewer than two. Intervals and p-values are
    nan if the runs within each row are all alike, or if a value is infinite.

    Args:
        rows: as from `rows`.
        values: as from `values`, for the same rows.
    """
    import scipy.stats  # imported late because it takes most of a second

    of_several = [(row.name, v) for row, v in zip(rows, values, strict=True) if len(row.probs) > 1]
    cells = []
    for name, of_row in of_several[1:]:
        line = [name]
        for metric in metrics.SHORT:
            numbers, firsts = of_row[metric], of_several[0][1][metric]
            with warnings.catch_warnings(action='ignore', category=RuntimeWarning):
                difference = np.mean(numbers) - np.mean(firsts)
                test = scipy.stats.ttest_ind(numbers, firsts, equal_var=False)
                low, high = test.confidence_interval(metrics.LEVEL)
            shown = (low, high, test.pvalue) if low < high else (np.nan,) * 3
            line += _test_cells(metric, difference, *shown)
        cells.append(line)
    return (_test_header(of_several[0][0]), cells) if cells else ([], [])


def _test_header(first):
    return [f'against {first}', *(part for name in metrics.SHORT for part in (_TITLES[name], 'p'))]


def _test_cells(name, difference, low, high, p):
    scale, digits = metrics.scale_and_digits(name)
    difference, low, high = (f'{scale * x:+.{digits}f}' for x in (difference, low, high))
    return [f'{difference} [{low}, {high}]', f'{p:.3f}']


def _averages(tested, probs, labels):
    """Returns each metric averaged over runs: {name: float} on the images, {name: float [R]} on each resample."""
    resampled = [metrics.resampled(tested, p, labels) for p in probs]
    return (
        {name: np.mean([metric(p, labels) for p in probs]) for name, metric in tested.items()},
        {name: np.mean([run[name] for run in resampled], axis=0) for name in tested},
    )


def report(results: list[Result], num_bins: int, with_ensembles: bool) -> tuple[str, list[Row], list[dict]]:
    """Returns the tables that compare several runs.

    Args:
        results: a Result of each run, all for the same images.
        num_bins: the number of bins of ECE and MCE.
        with_ensembles: whether the tables also have `ensembles(results)`.

    Returns:
        The tables as one text, the Rows, and the values of the Rows as from `values`, sorted by NLL, the lowest first.
    """
    found = rows([*results, *ensembles(results)] if with_ensembles else results)
    measured = values(found, results[0].labels, num_bins)
    first_to_last = order(measured)
    found, measured = [found[i] for i in first_to_last], [measured[i] for i in first_to_last]
    text = '\nmean ± standard deviation over runs, lowest NLL first\n\n'
    text += tables.markdown(*main_table(found, measured, bold=False)) + '\n'
    if len(found) > 1:
        text += 'difference from the first row: 95 % interval, p-value (paired bootstrap over images)\n\n'
        text += tables.markdown(*test_table(found, results[0].labels, num_bins)) + '\n'
    header, over_seeds = seeds_table(found, measured)
    if over_seeds:
        text += (
            "difference from the first row with several runs: 95 % interval, p-value (Welch's t-test over seeds)\n\n"
        )
        text += tables.markdown(header, over_seeds) + '\n'
    return text, found, measured


def write(folder: Path, rows: list[Row], values: list[dict]) -> list[Path]:
    """Writes comparison.md, comparison.csv and comparison.tex to a folder. Returns their paths. Raises RunError."""
    main, full = main_table(rows, values, bold=True), full_table(rows, values)
    texts = {'md': tables.markdown(*main), 'csv': tables.comma_separated(*full), 'tex': tables.latex(*main)}
    paths = [Path(folder) / f'comparison.{suffix}' for suffix in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        json_files.write_bytes(path, text.encode())
    return paths
