"""Methods side by side: runs that differ by their seed alone are one method, and several methods one table."""

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

# Flags that do not make a method another one.
_NOT_OF_THE_METHOD = {'randomseed', 'resultsfolder', *training_flags.MAY_CHANGE} - {'epochs'}

SHOWN = (*metrics.SHORT, 'auroc')
_HIGHER_IS_BETTER = ('accuracy', 'top5', 'auroc', 'auroc_grid')


class ComparisonError(errors.UserError):
    """Runs that cannot be compared."""


class Result(NamedTuple):
    """What a run, trained with `flags`, predicts: labels int [N], and probabilities [N, K] at its mean and averaged
    over `num_samples` samples."""

    flags: dict
    labels: np.ndarray
    probs_at_mean: np.ndarray
    probs: np.ndarray
    num_samples: int | str
    with_laplace: bool = False


class Row(NamedTuple):
    """A method and the weights that predict, by name, and the probabilities [N, K] of each of its runs."""

    name: str
    probs: list


def rows(results):
    """The Rows of results: a method at the mean, and averaged over samples where that makes a difference."""
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
                found[f'{name}{laplace}, {_num_samples(group)} samples'] = averaged
    return [Row(name, probs) for name, probs in found.items()]


def _methods(results):
    """{name: results}: those whose flags differ by no more than the seed are of one method."""
    groups = collections.defaultdict(list)
    for result in results:
        groups[_method(result.flags)].append(result)
    return dict(zip(_names(list(groups)), groups.values(), strict=True))


def _num_samples(results):
    return '/'.join(sorted({str(result.num_samples) for result in results}))


def _method(flags):
    return json.dumps({name: value for name, value in flags.items() if name not in _NOT_OF_THE_METHOD})


def _names(methods):
    """A method is called by its optimizer, and by the flags in which others with the same optimizer differ."""
    methods = [json.loads(method) for method in methods]
    names = []
    for method in methods:
        others = [other for other in methods if other['optim'] == method['optim']]
        differing = [name for name in method if any(other.get(name) != method[name] for other in others)]
        names.append(' '.join([method['optim'], *(f'{name}={method[name]}' for name in differing)]))
    return names


def check_flags(flags, split):
    """Raises a ComparisonError unless runs with these flags are of the same images and of different seeds."""
    for other in flags:
        for name in ('dataset', *(['validation', 'trainimages'] if split == 'validation' else [])):
            if other[name] != flags[0][name]:
                values = f'--{name} {flags[0][name]} and --{name} {other[name]}'
                raise ComparisonError(f'runs with {values} are not evaluated on the same images: compare those of one')
    seeds = [(_method(f), f['randomseed']) for f in flags]
    for twice in (seed for seed in seeds if seeds.count(seed) > 1):
        optim = json.loads(twice[0])['optim']
        raise ComparisonError(f'two runs of {optim} have the same flags and --randomseed {twice[1]}: leave one out')


def check_labels(results):
    """Raises a ComparisonError unless all results are of the same images."""
    first = results[0]
    same = (
        np.array_equal(result.labels, first.labels) and result.probs.shape == first.probs.shape for result in results
    )
    if not all(same):
        raise ComparisonError('the runs were evaluated on different images: evaluate them again, without --reuse')


def ensembles(results):
    """Deep ensembles (Lakshminarayanan et al., 2017), averages of runs with their posterior samples: one of each
    method that has several runs, and one of all where there are several methods. Laplace approximations stay out."""
    results = [result for result in results if not result.with_laplace]
    methods = _methods(results)
    groups = {f'{name} ensemble': group for name, group in methods.items() if len(group) > 1}
    if len(methods) > 1:
        groups['all as an ensemble'] = results
    return [_ensemble(f'{name} of {len(group)}', group) for name, group in groups.items()]


def _ensemble(name, results):
    at_mean, averaged = (np.mean([getattr(r, part) for r in results], axis=0) for part in ('probs_at_mean', 'probs'))
    return Result({'optim': name}, results[0].labels, at_mean, averaged, _num_samples(results))


def values(rows, labels, num_bins):
    """Every metric of every run, a dict {metric: [runs]} for each row."""
    summaries = [[metrics.summary(probs, labels, num_bins) for probs in row.probs] for row in rows]
    return [{name: [s[name] for s in runs] for name in metrics.METRICS} for runs in summaries]


def order(values):
    """Row numbers, that of the lowest NLL first: it is a proper score, of accuracy and calibration at once."""
    nlls = [np.mean(v['nll']) for v in values]
    return sorted(range(len(values)), key=lambda i: (np.isnan(nlls[i]), nlls[i]))


def main_table(rows, values, bold):
    """Header and rows: mean ± standard deviation over the runs of a method, the best value of a column `bold`."""
    means = {name: [round(float(np.mean(v[name])), 4) for v in values] for name in SHOWN}
    best = {name: _best(name, column) for name, column in means.items()}
    header = ['method', 'runs', *SHOWN]
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


def full_table(rows, values):
    """Header and rows with all metrics, mean and standard deviation in columns of their own, for programs."""
    header = ['method', 'runs', *(f'{name}_{part}' for name in metrics.METRICS for part in ('mean', 'sd'))]
    cells = [
        [row.name, str(len(row.probs))]
        + [f'{x:.6g}' for name in metrics.METRICS for x in (np.mean(v[name]), _standard_deviation(v[name]))]
        for row, v in zip(rows, values, strict=True)
    ]
    return header, cells


def _standard_deviation(values):
    """nan of a single run, and of infinite values."""
    return np.std(values, ddof=1) if len(values) > 1 and np.isfinite(values).all() else np.nan


def test_table(rows, labels, num_bins):
    """Header and rows: each row's difference from the first, with its 95 % interval and p-value (bootstrap)."""
    tested = {name: metric for name, metric in metrics.with_bins(num_bins).items() if name in metrics.SHORT}
    measured = [_averages(tested, row.probs, labels) for row in rows]
    cells = []
    for row, (observed, resampled) in zip(rows[1:], measured[1:], strict=True):
        line = [row.name]
        for name in metrics.SHORT:
            with np.errstate(invalid='ignore'):  # of an infinite NLL
                difference = observed[name] - measured[0][0][name]
                test = metrics.difference(difference, resampled[name] - measured[0][1][name])
            line += _test_cells(name, difference, *test)
        cells.append(line)
    return _test_header(rows[0].name), cells


def seeds_table(rows, values):
    """As `test_table`, of the rows with several runs, over those: what other seeds would have given (Welch's t-test).

    values: those of the rows. Neither interval nor p where the runs of both rows are all alike, or a value is infinite.
    """
    import scipy.stats  # takes most of a second

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
            told = (low, high, test.pvalue) if low < high else (np.nan,) * 3
            line += _test_cells(metric, difference, *told)
        cells.append(line)
    return (_test_header(of_several[0][0]), cells) if cells else ([], [])


def _test_header(first):
    return [f'against {first}', *(part for name in metrics.SHORT for part in (name, 'p'))]


def _test_cells(name, difference, low, high, p):
    scale, digits = metrics.scale_and_digits(name)
    difference, low, high = (f'{scale * x:+.{digits}f}' for x in (difference, low, high))
    return [f'{difference} [{low}, {high}]', f'{p:.3f}']


def _averages(tested, probs, labels):
    """The average over runs of each metric, {name: float}, and that on every resample of the images, {name: [R]}."""
    resampled = [metrics.resampled(tested, p, labels) for p in probs]
    return (
        {name: np.mean([metric(p, labels) for p in probs]) for name, metric in tested.items()},
        {name: np.mean([run[name] for run in resampled], axis=0) for name in tested},
    )


def report(results: list[Result], num_bins: int, with_ensembles: bool) -> tuple[str, list[Row], list[dict]]:
    """Returns the tables of several runs as a text, and their rows and values, the lowest NLL first."""
    found = rows([*results, *ensembles(results)] if with_ensembles else results)
    measured = values(found, results[0].labels, num_bins)
    first_to_last = order(measured)
    found, measured = [found[i] for i in first_to_last], [measured[i] for i in first_to_last]
    text = '\nmean ± standard deviation over runs; the lowest NLL first\n\n'
    text += tables.markdown(*main_table(found, measured, bold=False)) + '\n'
    if len(found) > 1:
        text += 'difference to the first: 95 % interval and p-value over resampled test images (paired bootstrap)\n\n'
        text += tables.markdown(*test_table(found, results[0].labels, num_bins)) + '\n'
    header, over_seeds = seeds_table(found, measured)
    if over_seeds:
        text += "difference to the first of several runs: 95 % interval and p-value over seeds (Welch's t-test)\n\n"
        text += tables.markdown(header, over_seeds) + '\n'
    return text, found, measured


def write(folder, rows, values):
    """comparison.md, .csv and .tex in a folder; returns their paths. Raises RunError."""
    main, full = main_table(rows, values, bold=True), full_table(rows, values)
    texts = {'md': tables.markdown(*main), 'csv': tables.comma_separated(*full), 'tex': tables.latex(*main)}
    paths = [Path(folder) / f'comparison.{suffix}' for suffix in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        json_files.write_bytes(path, text.encode())
    return paths
