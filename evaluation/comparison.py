"""Tables that compare methods. Runs with the same flags, apart from the seed, are runs of one method."""

import collections
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import errors
import metrics
from evaluation import tables
from runs import json_files

# Flags in which the runs of a method may differ: the seed, and what --resume may change except the number of epochs.
# They are listed here because training_flags imports JAX, which comparisons do not need.
_NOT_OF_THE_METHOD = (
    'randomseed', 'resultsfolder', 'datasetfolder', 'compilecache', 'checkpointevery', 'keepbest', 'keepgoing',
    'logcalibration', 'testbatchsize', 'devices', 'stream', 'atonce',
)  # fmt: skip

SHOWN = (*metrics.SHORT, 'auroc')
TESTED = ('accuracy', 'nll')  # by the paired bootstrap test over images
TITLES = {'accuracy': 'accuracy %', 'nll': 'NLL', 'ece': 'ECE', 'auroc': 'AUROC'}


class ComparisonError(errors.UserError):
    """Raised for runs that cannot be compared."""


class Result(NamedTuple):
    """The predictions of a run for N images.

    Attributes:
        flags: the training flags of the run.
        labels: int [N].
        probs_at_mean: float [N, K], at the posterior mean.
        probs: float [N, K], averaged over posterior samples.
        num_samples: the number of posterior samples, 0 if there is no posterior, None if it is unknown. For an ensemble
            of runs with different numbers, a text such as '16/32'.
        with_laplace: whether the samples are from a Laplace approximation.
        is_ensemble: whether these are the predictions of an ensemble of runs.
        measured: entries of metrics.json, from which pictures take curves over samples and severities. None for an
            ensemble, and for saved predictions without their metrics.json.
    """

    flags: dict
    labels: np.ndarray
    probs_at_mean: np.ndarray
    probs: np.ndarray
    num_samples: int | str | None
    with_laplace: bool = False
    is_ensemble: bool = False
    measured: dict | None = None


class Row(NamedTuple):
    """A row of the tables: a method at its posterior mean, or averaged over posterior samples.

    Attributes:
        name: the method and what predicts, such as 'bsam, mean' or 'bsam, 32 samples'.
        probs: float [N, K] of each run of the method.
        is_ensemble: whether an ensemble of runs predicts. An ensemble counts as one run.
        at: the key of the row's metrics in metrics.json, 'mean' or 'average'.
        measured: Result.measured of each run.
    """

    name: str
    probs: list[np.ndarray]
    is_ensemble: bool = False
    at: str = 'average'
    measured: Sequence[dict | None] = ()


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
            measured = [r.measured for r in group]
            is_single = all(r.num_samples == 0 for r in group)
            found.setdefault(name if is_single else f'{name}, mean', (at_mean, group[0].is_ensemble, 'mean', measured))
            if not all(np.allclose(a, b, atol=1e-6) for a, b in zip(at_mean, averaged, strict=True)):
                laplace = ' laplace' if with_laplace else ''
                averages = averaged, group[0].is_ensemble, 'average', measured
                found[f'{name}{laplace}, {tables.samples(_num_samples(group))}'] = averages
    return [Row(name, *of_row) for name, of_row in found.items()]


def _methods(results):
    """Returns {method name: its results}. The flags of one method's runs differ only in _NOT_OF_THE_METHOD."""
    groups = collections.defaultdict(list)
    for result in results:
        groups[_method(result.flags)].append(result)
    return dict(zip(_names(list(groups)), groups.values(), strict=True))


def _num_samples(results):
    """Returns the number of samples of the results with samples, or a text such as '16/32' if the numbers differ."""
    numbers = {result.num_samples for result in results} - {0} or {0}
    return numbers.pop() if len(numbers) == 1 else '/'.join(sorted('?' if n is None else str(n) for n in numbers))


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
    groups = {f'{name} ensemble of {len(group)}': group for name, group in methods.items() if len(group) > 1}
    if len(methods) > 1:
        groups[f'ensemble of all {len(results)} runs'] = results
    return [_ensemble(name, group) for name, group in groups.items()]


def _ensemble(name, results):
    at_mean, averaged = (np.mean([getattr(r, part) for r in results], axis=0) for part in ('probs_at_mean', 'probs'))
    return Result({'optim': name}, results[0].labels, at_mean, averaged, _num_samples(results), is_ensemble=True)


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
    header = ['method', 'runs', *(TITLES[name] for name in SHOWN)]
    cells = [
        [row.name, str(len(row.probs)), *(_bold_if_best(name, v[name], best[name] if bold else None) for name in SHOWN)]
        for row, v in zip(rows, values, strict=True)
    ]
    return header, cells


def _best(name, column):
    numbers = [value for value in column if not np.isnan(value)]
    return (max if metrics.higher_is_better(name) else min)(numbers, default=None)


def _bold_if_best(name, values, best):
    text = mean_and_deviation(name, values)
    return f'**{text}**' if round(float(np.mean(values)), 4) == best else text


def mean_and_deviation(name: str, values: list[float]) -> str:
    """Returns a metric's cell for readers: 'mean ± standard deviation', with accuracy in per cent.

    A mean that is not defined is a dash. A standard deviation that is not defined is left out.

    Args:
        name: the metric.
        values: the metric of each run. It is nan for a diverged run.
    """
    mean, deviation = np.mean(values), _standard_deviation(values)
    scale, digits = metrics.scale_and_digits(name)
    texts = [f'{scale * x:.{digits}f}' for x in (mean, deviation) if not np.isnan(x)]
    return ' ± '.join(texts) or tables.UNDEFINED


def csv_header(names: Iterable[str]) -> list[str]:
    """Returns the titles of `csv_cells`, such as 'nll_mean' and 'nll_sd'. Titles of per cents say so."""
    return [f'{name}{_csv_unit(name)}_{part}' for name in names for part in ('mean', 'sd')]


def _csv_unit(name):
    return '_percent' if metrics.scale_and_digits(name)[0] == 100 else ''


def csv_cells(name: str, values: list[float]) -> list[str]:
    """Returns a metric's two cells for other programs: mean and standard deviation, each empty if not defined."""
    scale, _ = metrics.scale_and_digits(name)
    return ['' if np.isnan(x) else f'{scale * x:.6g}' for x in (np.mean(values), _standard_deviation(values))]


def full_table(rows: list[Row], values: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and rows of the table for other programs: the mean and standard deviation of all metrics."""
    header = ['method', 'runs', *csv_header(metrics.METRICS)]
    cells = [
        [row.name, str(len(row.probs)), *(cell for name in metrics.METRICS for cell in csv_cells(name, v[name]))]
        for row, v in zip(rows, values, strict=True)
    ]
    return header, cells


def _standard_deviation(values):
    """Returns the standard deviation over runs, or nan for a single run or for values that are not finite."""
    if len(values) == 1 or not np.isfinite(values).all():
        return np.nan
    return np.std(values, ddof=1) if np.ptp(values) else 0.0  # np.std of equal numbers may be 1e-17


def baseline(rows: list[Row]) -> Row:
    """Returns the row that the tests compare the others with: the first row that is not an ensemble."""
    return next(row for row in rows if not row.is_ensemble)


def test_table(rows: list[Row], values: list[dict], labels: np.ndarray) -> tuple[list[str], list[list[str]]]:
    """Returns the header and rows of paired bootstrap tests over images: each row's difference from the baseline.

    Differences in accuracy and NLL have a 95 % interval and a p-value, unless they are 0 on every resample or not
    finite. Differences in ECE have neither, because resampling adds calibration error.

    Args:
        rows: as from `rows`, the row with the lowest NLL first.
        values: as from `values`, for the same rows.
        labels: int [N].
    """
    first = baseline(rows)
    firsts = next(v for row, v in zip(rows, values, strict=True) if row is first)
    resampled_firsts, cells = _resampled(first, labels), []
    for row, of_row in ((row, v) for row, v in zip(rows, values, strict=True) if row is not first):
        with np.errstate(invalid='ignore'):  # an infinite NLL minus another is nan
            differences = {name: np.mean(of_row[name]) - np.mean(firsts[name]) for name in metrics.SHORT}
            resampled = {name: of_name - resampled_firsts[name] for name, of_name in _resampled(row, labels).items()}
        line = [row.name]
        for name in TESTED:
            tested = resampled[name].any()
            test = metrics.difference(differences[name], resampled[name]) if tested else None
            line += _test_cells(name, differences[name], test)
        cells.append([*line, _test_cells('ece', differences['ece'], None)[0]])
    return [*_test_header(first.name, TESTED), TITLES['ece']], cells


def seeds_table(rows: list[Row], values: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Returns a table like `test_table`, but with Welch's t-test over seeds.

    The table has only rows with several runs, and is ([], []) if there are fewer than two. A difference has no interval
    and no p-value if the runs within each row are all alike, or if a value is not finite.

    Args:
        rows: as from `rows`, the row with the lowest NLL first.
        values: as from `values`, for the same rows.
    """
    of_several = [(row.name, v) for row, v in zip(rows, values, strict=True) if len(row.probs) > 1]
    if len(of_several) < 2:
        return [], []
    (first, firsts), *others = of_several
    cells = [
        [name, *(cell for metric in metrics.SHORT for cell in _welch_cells(metric, of_row[metric], firsts[metric]))]
        for name, of_row in others
    ]
    return _test_header(first, metrics.SHORT), cells


def _welch_cells(name, values, firsts):
    """Returns the cells of Welch's t-test between two lists of values, each of several runs."""
    import scipy.stats  # imported late because it takes most of a second

    with np.errstate(invalid='ignore'):
        difference = np.mean(values) - np.mean(firsts)
    if not np.isfinite([*values, *firsts]).all() or not (np.ptp(values) or np.ptp(firsts)):
        return _test_cells(name, difference, None)
    with warnings.catch_warnings(action='ignore', category=RuntimeWarning):
        test = scipy.stats.ttest_ind(values, firsts, equal_var=False)
    return _test_cells(name, difference, (*test.confidence_interval(metrics.LEVEL), test.pvalue))


def _test_header(first, names):
    return [f'against {first}', *(part for name in names for part in (TITLES[name], 'p'))]


def _test_cells(name, difference, test):
    """Returns the cells of a difference and its p-value. `test` is (low, high, p), or None if it is not defined."""
    scale, digits = metrics.scale_and_digits(name)
    if np.isnan(difference):
        return [tables.UNDEFINED] * 2
    if test is None or np.isnan(test).any():
        return [f'{scale * difference:+.{digits}f}', tables.UNDEFINED]
    difference, low, high = (f'{scale * x:+.{digits}f}' for x in (difference, *test[:2]))
    return [f'{difference} [{low}, {high}]', f'{test[2]:.3f}' if test[2] >= 0.001 else '<0.001']


def _resampled(row, labels):
    """Returns the tested metrics on each resample, averaged over the runs of a row: {name: float [R]}."""
    tested = {name: metrics.METRICS[name] for name in TESTED}
    runs = [metrics.resampled(tested, probs, labels) for probs in row.probs]
    return {name: np.mean([run[name] for run in runs], axis=0) for name in tested}


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
    text = '\nmean ± standard deviation over runs, lowest NLL first'
    text += '; an ensemble counts as one run\n\n' if with_ensembles else '\n\n'
    text += tables.markdown(*main_table(found, measured, bold=False)) + '\n'
    if len(found) > 1:
        chosen = 'the lowest NLL that is not of an ensemble' if with_ensembles else 'the lowest NLL'
        text += _caption(baseline(found), chosen, 'paired bootstrap over images')
        text += tables.markdown(*test_table(found, measured, results[0].labels))
        text += '\nECE: the difference only, because resampling adds calibration error\n\n'
    header, over_seeds = seeds_table(found, measured)
    if over_seeds:
        first = next(row for row in found if len(row.probs) > 1)
        text += _caption(first, 'the lowest NLL of rows with several runs', "Welch's t-test over seeds")
        text += tables.markdown(header, over_seeds) + '\n'
    if tables.UNDEFINED in text:
        what = 'a metric of a diverged run, an AUROC without errors, or a test of differences that do not vary'
        text += f'{tables.UNDEFINED} is not defined: {what}\n\n'
    return text, found, measured


def _caption(baseline, chosen, test):
    return f'baseline: {baseline.name} ({chosen})\ndifference from the baseline: 95 % interval, p-value ({test})\n\n'


def own_folder(folder: Path, path: Path) -> Path:
    """Returns the folder, within the folder of a comparison, for the files of a single run.

    The name does not depend on the other runs of the comparison. It has a hash of the run's full path, so no two runs
    share a folder.

    Args:
        folder: the folder of the comparison.
        path: the run folder, or a file of predictions.
    """
    full = os.path.realpath(path)
    names = Path(full.removesuffix('.npz')).parts[1:][-3:]
    digest = hashlib.sha256(os.fsencode(full)).hexdigest()[:8]
    return Path(folder) / f'{"-".join(names)[-60:]}-{digest}'  # file systems allow names of 255 bytes


def write(folder: Path, rows: list[Row], values: list[dict]) -> list[Path]:
    """Writes comparison.md, comparison.csv and comparison.tex to a folder. Returns their paths. Raises RunError."""
    main, full = main_table(rows, values, bold=True), full_table(rows, values)
    texts = {'md': tables.markdown(*main), 'csv': tables.comma_separated(*full), 'tex': tables.latex(*main)}
    paths = [Path(folder) / f'comparison.{suffix}' for suffix in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        json_files.write_bytes(path, text.encode())
    return paths
