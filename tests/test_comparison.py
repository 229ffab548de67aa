"""Comparisons of runs: methods, means over seeds, ensembles, significance tests, tables."""

import csv
import re

import numpy as np
import pytest
import scipy.stats

import metrics
from evaluation import comparison, tables
from runs import training_flags

LABELS = np.random.default_rng(0).integers(0, 3, 400)


def probs(seed, strength):
    rng = np.random.default_rng(seed)
    return metrics.softmax(rng.normal(size=(400, 3)) + strength * np.eye(3)[LABELS])


def result(optim, seed, strength=2.0, averaged=None, **flags):
    flags = {'optim': optim, 'dataset': 'mnist', 'rho': 0.1, 'randomseed': seed, 'resultsfolder': str(seed)} | flags
    at_mean = probs(seed, strength)
    return comparison.Result(flags, LABELS, at_mean, at_mean if averaged is None else averaged, 8)


def test_rows_are_methods():
    """Another seed or folder is the same method. An average over samples that equals the mean gets no row."""
    results = [result('sgd', 0), result('sgd', 1), result('bsam', 0, averaged=probs(9, 3)), result('bsam', 1, rho=0.2)]
    rows = comparison.rows(results)
    assert [(row.name, len(row.probs)) for row in rows] == [
        ('sgd, mean', 2), ('bsam rho=0.1, mean', 1), ('bsam rho=0.1, 8 samples', 1), ('bsam rho=0.2, mean', 1),
    ]  # fmt: skip


def test_main_table():
    results = [result('sgd', 0), result('sgd', 1), result('sam', 0, strength=4)]
    rows = comparison.rows(results)
    values = comparison.values(rows, LABELS, num_bins=20)
    assert comparison.order(values) == [1, 0]
    header, cells = comparison.main_table(rows, values, bold=True)
    nlls = [metrics.nll(probs(seed, 2.0), LABELS) for seed in (0, 1)]
    column = header.index('NLL')
    assert cells[0][column] == f'{np.mean(nlls):.4f} ± {np.std(nlls, ddof=1):.4f}'
    assert cells[1][column] == f'**{metrics.nll(probs(0, 4), LABELS):.4f}**' and cells[0][1] == '2'


def test_ensembles():
    results = [result('sgd', 0), result('sgd', 1), result('sam', 0)]
    of_sgd, of_all = comparison.ensembles(results)
    assert of_sgd.flags['optim'] == 'sgd ensemble of 2' and of_all.flags['optim'] == 'ensemble of all 3 runs'
    rows = comparison.rows([*results, of_sgd, of_all])
    assert [(row.name, row.is_ensemble) for row in rows] == [
        ('sgd, mean', False), ('sam, mean', False), ('sgd ensemble of 2, mean', True),
        ('ensemble of all 3 runs, mean', True),
    ]  # fmt: skip
    np.testing.assert_allclose(of_sgd.probs, (results[0].probs + results[1].probs) / 2)
    np.testing.assert_allclose(of_all.probs_at_mean, np.mean([r.probs_at_mean for r in results], axis=0))
    assert metrics.nll(of_sgd.probs, LABELS) < min(metrics.nll(r.probs, LABELS) for r in results[:2])


def test_test_table():
    """Equal predictions have nothing to test. Much worse predictions differ significantly."""
    rows = comparison.rows([result('sgd', 0, strength=5), result('sam', 0, strength=5), result('bsam', 0, strength=1)])
    header, (same, worse) = comparison.test_table(rows, comparison.values(rows, LABELS, num_bins=20), LABELS)
    assert header[1:] == ['accuracy %', 'p', 'NLL', 'p', 'ECE'] and worse[2] == '0.002'
    assert same[1:] == ['+0.00', '–', '+0.0000', '–', '+0.0000']
    value, *interval = worse[header.index('NLL')].split()
    low, high = (float(x.strip('[],')) for x in interval)
    difference = metrics.nll(rows[2].probs[0], LABELS) - metrics.nll(rows[0].probs[0], LABELS)
    assert value == f'{difference:+.4f}' and 0 < low < difference < high
    difference = metrics.ece(rows[2].probs[0], LABELS) - metrics.ece(rows[0].probs[0], LABELS)
    assert worse[-1] == f'{difference:+.4f}'


def test_seeds_table():
    """The table equals scipy's test on the metrics of the runs. Ensembles are left out."""
    results = [result('sgd', seed, strength=5) for seed in range(3)] + [result('sam', seed) for seed in (3, 4)]
    rows = comparison.rows([*comparison.ensembles(results), *results])
    values = comparison.values(rows, LABELS, num_bins=20)
    header, (cells,) = comparison.seeds_table(rows, values)
    assert header[0] == 'against sgd, mean' and cells[0] == 'sam, mean'
    nlls = [[metrics.nll(r.probs, LABELS) for r in results if r.flags['optim'] == optim] for optim in ('sam', 'sgd')]
    expected = scipy.stats.ttest_ind(*nlls, equal_var=False)
    difference = np.mean(nlls[0]) - np.mean(nlls[1])
    column = header.index('NLL')
    low, high = expected.confidence_interval()
    assert cells[column] == f'{difference:+.4f} [{low:+.4f}, {high:+.4f}]'
    assert expected.pvalue < 0.001 and cells[column + 1] == '<0.001'
    column = header.index('ECE')
    eces = [[metrics.ece(r.probs, LABELS) for r in results if r.flags['optim'] == optim] for optim in ('sam', 'sgd')]
    pvalue = scipy.stats.ttest_ind(*eces, equal_var=False).pvalue
    assert pvalue > 0.001 and cells[column + 1] == f'{pvalue:.3f}'


def test_seeds_without_a_test():
    """A method with one run is left out. If all runs of both methods are alike, only the difference is defined."""
    single = comparison.rows([result('sgd', 0), result('sgd', 1), result('sam', 0)])
    assert comparison.seeds_table(single, comparison.values(single, LABELS, num_bins=20)) == ([], [])
    alike = [result(optim, 0, strength=s) for optim, s in (('sgd', 2), ('sgd', 2), ('sam', 3), ('sam', 3))]
    for i, r in enumerate(alike):
        r.flags['randomseed'] = i
    rows = comparison.rows(alike)
    _, (cells,) = comparison.seeds_table(rows, comparison.values(rows, LABELS, num_bins=20))
    difference = metrics.accuracy(rows[1].probs[0], LABELS) - metrics.accuracy(rows[0].probs[0], LABELS)
    assert cells[1:3] == [f'{100 * difference:+.2f}', '–'] and difference


def test_impossible_classes():
    """An infinite NLL has no standard deviation, and no difference that can be tested."""
    certain = np.eye(3)[(LABELS + 1) % 3]
    results = [result('sgd', seed)._replace(probs_at_mean=certain, probs=certain) for seed in (0, 1)]
    rows = comparison.rows([result('sam', 0), *results])
    values = comparison.values(rows, LABELS, num_bins=20)
    assert comparison.main_table(rows, values, bold=True)[1][1][3] == 'inf'
    assert comparison.full_table(rows, values)[1][1][6:8] == ['inf', '']
    assert comparison.test_table(rows, comparison.values(rows, LABELS, num_bins=20), LABELS)[1][0][3:5] == ['+inf', '–']
    both = comparison.rows([result('sam', 0), result('sam', 1), *results])
    values = comparison.values(both, LABELS, num_bins=20)
    assert comparison.seeds_table(both, values)[1][0][3:5] == ['+inf', '–']


def test_diverged_runs_come_last_and_are_not_tested():
    diverged = [result('sgd', seed)._replace(probs_at_mean=np.full((400, 3), np.nan)) for seed in (0, 1)]
    diverged = [r._replace(probs=r.probs_at_mean) for r in diverged]
    rows = comparison.rows([*diverged, result('sam', 0), result('bsam', 0, strength=4)])
    values = comparison.values(rows, LABELS, num_bins=20)
    order = comparison.order(values)
    assert [rows[i].name for i in order] == ['bsam, mean', 'sam, mean', 'sgd, mean', 'sgd, 8 samples']
    rows, values = [rows[i] for i in order], [values[i] for i in order]
    assert comparison.main_table(rows, values, bold=True)[1][2][2:] == ['–'] * 4
    assert comparison.test_table(rows, comparison.values(rows, LABELS, num_bins=20), LABELS)[1][-1][1:] == ['–'] * 5
    assert set(comparison.full_table(rows, values)[1][2][2:]) == {''}


def test_units():
    """Per cents and fractions never share a header. A single run has no standard deviation."""
    rows = comparison.rows([result('sgd', 0), result('sam', 0), result('sam', 1)])
    values = comparison.values(rows, LABELS, num_bins=20)
    header, cells = comparison.full_table(rows, values)
    assert set(header) >= {'accuracy_percent_mean', 'top5_percent_sd', 'risk_at_80_percent_mean', 'nll_mean', 'ece_sd'}
    (of_sgd, of_sam), accuracy = (dict(zip(header, row, strict=True)) for row in cells), values[0]['accuracy'][0]
    assert of_sgd['accuracy_percent_mean'] == f'{100 * accuracy:.6g}' and accuracy < 1
    assert {of_sgd[name] for name in header if name.endswith('_sd')} == {''}
    assert of_sam['nll_sd'] == f'{np.std(values[1]["nll"], ddof=1):.6g}'
    assert comparison.main_table(rows, values, bold=False)[0][2] == 'accuracy %'


def test_an_ensemble_is_not_the_baseline():
    """The ensemble of the runs of SGD has the lowest NLL. Both tests still compare with single runs of SGD."""
    results = [result('sgd', seed) for seed in range(3)] + [result('sam', seed, strength=1) for seed in (3, 4)]
    text, rows, _ = comparison.report(results, num_bins=20, with_ensembles=True)
    assert rows[0].is_ensemble and comparison.baseline(rows).name == 'sgd, mean'
    assert re.findall('^baseline: (.*)$', text, re.M) == [
        'sgd, mean (the lowest NLL that is not of an ensemble)',
        'sgd, mean (the lowest NLL of rows with several runs)',
    ]
    assert re.findall(r'^\| against (\S*, \S*)', text, re.M) == ['sgd, mean'] * 2
    assert 'nan' not in text and 'not defined' not in text
    names = re.findall(r'^\| (.*?) +\|', text.partition('against')[2].partition('baseline')[0], re.M)
    assert sorted(names[1:]) == sorted(row.name for row in rows if row.name != 'sgd, mean')


def test_runs_that_agree_with_every_seed():
    """Tables say 0 and leave the test out. A line explains the dash."""
    alike = [result(optim, 0) for optim in ('sgd', 'sgd', 'sam', 'sam')]
    for i, r in enumerate(alike):
        r.flags['randomseed'] = i
    text, _, values = comparison.report(alike, num_bins=20, with_ensembles=False)
    assert text.count('| +0.0000 |') == 4 and 'nan' not in text and '– is not defined: ' in text
    assert comparison.csv_cells('nll', values[0]['nll'])[1] == '0'


def test_laplace_is_a_row_beside_its_run():
    """Run and approximation share one row at the mean. Ensembles leave out the approximation."""
    run = result('sgd', 0)
    laplace = run._replace(probs=probs(5, 3), with_laplace=True)
    assert [row.name for row in comparison.rows([run, laplace])] == ['sgd, mean', 'sgd laplace, 8 samples']
    assert [row.name for row in comparison.rows([laplace])] == ['sgd, mean', 'sgd laplace, 8 samples']
    (of_all,) = comparison.ensembles([run, laplace, result('sam', 0)])
    assert of_all.flags['optim'] == 'ensemble of all 2 runs'


def test_laplace_has_the_name_of_its_method():
    """Holds even if only one of two methods with the same optimizer has an approximation."""
    runs = [result('sgd', 0), result('sgd', 0, rho=0.2)]
    laplace = runs[1]._replace(probs=probs(5, 3), with_laplace=True)
    assert [row.name for row in comparison.rows([*runs, laplace])] == [
        'sgd rho=0.1, mean', 'sgd rho=0.2, mean', 'sgd rho=0.2 laplace, 8 samples',
    ]  # fmt: skip


def test_runs_of_other_classes_are_refused():
    other = result('sam', 0)._replace(probs=np.full((400, 4), 0.25))
    with pytest.raises(comparison.ComparisonError, match='evaluated on different images'):
        comparison.check_labels([result('sgd', 0), other])


def test_perfect_values_are_bold_only_where_asked():
    certain = np.eye(3)[LABELS]
    rows = comparison.rows([result('sgd', 0)._replace(probs_at_mean=certain, probs=certain)])
    values = comparison.values(rows, LABELS, num_bins=20)
    nll = [comparison.main_table(rows, values, bold)[1][0][3] for bold in (False, True)]
    assert nll == ['0.0000', '**0.0000**']


def test_flags_that_may_change_make_no_other_method():
    """The number of epochs is an exception: it does make another method."""
    assert set(training_flags.MAY_CHANGE) - {'epochs'} <= set(comparison._NOT_OF_THE_METHOD)


def test_what_cannot_be_compared():
    flags = result('sgd', 0).flags | {'validation': 0.1, 'trainimages': None}
    with pytest.raises(comparison.ComparisonError, match='--dataset mnist and --dataset digits'):
        comparison.check_flags([flags, flags | {'dataset': 'digits'}], 'test')
    other = flags | {'validation': 0.2, 'randomseed': 1}
    comparison.check_flags([flags, other], 'test')
    with pytest.raises(comparison.ComparisonError, match=r'--validation 0\.1 and --validation 0\.2'):
        comparison.check_flags([flags, other], 'validation')
    with pytest.raises(comparison.ComparisonError, match='two runs of sgd have the same flags and --randomseed 0'):
        comparison.check_flags([flags, flags | {'resultsfolder': 'elsewhere'}], 'test')
    with pytest.raises(comparison.ComparisonError, match='evaluated on different images'):
        comparison.check_labels([result('sgd', 0), result('sgd', 1)._replace(labels=LABELS[::-1])])


def test_tables():
    header, rows = ['method', 'ece'], [['a_b, 2 %', '**0.1 ± 0.2**'], ['c', '0.3']]
    assert tables.markdown(header, rows).splitlines() == [
        '| method   |           ece |',
        '| -------- | ------------: |',
        '| a_b, 2 % | **0.1 ± 0.2** |',
        '| c        |           0.3 |',
    ]
    assert list(csv.reader(tables.comma_separated(header, rows).splitlines())) == [header, *rows]
    assert r'a\_b, 2 \% & \textbf{0.1 $\pm$ 0.2} \\' in tables.latex(header, rows)
