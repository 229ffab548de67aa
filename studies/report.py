"""Write results/README.md, its pictures and the tables of other pages from the records in results/.

    python studies/report.py

The prose of results/README.md is in report.md. This script makes the tables, verdicts and pictures.
"""

import csv
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.stats

sys.path.insert(0, str(Path(__file__).parent.parent))

import experiment
import metrics
from benchmarks import loading, peers, run, throughput
from evaluation import comparison, plots, tables
from runs import json_files, launch, parsing, training_flags
from studies import study

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / 'results'
NAMES = {
    'sgd': 'SGD', 'sam': 'SAM', 'bsam': 'bSAM', 'ivon': 'IVON', 'adam': 'Adam', 'adamw': 'AdamW', 'samadam': 'SAM-Adam',
    'asam': 'ASAM', 'swag': 'SWAG',
}  # fmt: skip
_AT = {'mean': 'mean', 'average': 'samples', 'laplace': 'Laplace'}
PUBLISHED_RHO = {'bsam': 0.01, 'sam': 0.05}


class Subject(NamedTuple):
    """A variant of a study and the weights that predict.

    Attributes:
        variant: the name of the variant in study.STUDIES.
        at: 'mean' for the posterior mean, 'average' for the average over posterior samples, 'laplace' for the average
            over samples of a Laplace approximation.
    """

    variant: str
    at: str

    def __str__(self):
        return f'{NAMES[self.variant]}, {_AT[self.at]}'


SGD, SAM = Subject('sgd', 'mean'), Subject('sam', 'mean')
BSAM_MEAN, BSAM = Subject('bsam', 'mean'), Subject('bsam', 'average')
IVON_MEAN, IVON = Subject('ivon', 'mean'), Subject('ivon', 'average')


class Claim(NamedTuple):
    """The claim that `lower` has a lower value of a metric than `higher`."""

    text: str
    metric: str
    lower: Subject
    higher: Subject


CLAIMS = [
    Claim('SAM is more accurate than SGD', 'accuracy', SGD, SAM),
    Claim('bSAM is more accurate than SAM', 'accuracy', SAM, BSAM),
    Claim('bSAM is more accurate than SGD', 'accuracy', SGD, BSAM),
    Claim('SAM has a lower NLL than SGD', 'nll', SAM, SGD),
    Claim('bSAM has a lower NLL than SAM', 'nll', BSAM, SAM),
    Claim('bSAM has a lower NLL than SGD', 'nll', BSAM, SGD),
    Claim('SAM has a lower ECE than SGD', 'ece', SAM, SGD),
    Claim('bSAM has a lower ECE than SAM', 'ece', BSAM, SAM),
    Claim('bSAM has a lower ECE than SGD', 'ece', BSAM, SGD),
    Claim('bSAM at its mean has a lower NLL than SGD', 'nll', BSAM_MEAN, SGD),
    Claim('bSAM at its mean has a lower NLL than SAM', 'nll', BSAM_MEAN, SAM),
    Claim('bSAM at its mean has a lower ECE than SAM', 'ece', BSAM_MEAN, SAM),
    Claim('averaging lowers the NLL of bSAM', 'nll', BSAM, BSAM_MEAN),
    Claim('averaging lowers the NLL of IVON', 'nll', IVON, IVON_MEAN),
    Claim('bSAM has a lower NLL than IVON', 'nll', BSAM, IVON),
]


@launch.script('report.py')
def main(argv=None):
    parsing.Parser(__doc__).parse_args(argv)
    found = all_records()
    pages = {RESULTS / 'README.md': page(**found)}
    pages |= {path: with_tables(path.read_text()) for path in PAGES_WITH_TABLES}
    for path, text in pages.items():
        path.write_text(text)
    pictures = {
        'all_reliability': reliability(found['cifar10_all'], ALL),
        'all_samples': over_samples(found['cifar10_all'], ALL),
        'all_corruptions': over_severities(found['cifar10_all'], ALL),
        'reliability': reliability(found['cifar10_few'], FEW),
        'few_samples': over_samples(found['cifar10_few'], FEW),
        'few_corruptions': over_severities(found['cifar10_few'], FEW),
        'cifar10_samples': over_samples(found['cifar10'], SHORT),
        'fashion_samples': over_samples(found['fashion'], FASHION),
        'cifar10_corruptions': over_severities(found['cifar10'], SHORT),
        'rho': over_rho(found['rho'], FASHION),
    }
    with plots.settings({}):
        for name, figure in pictures.items():
            figure.savefig(RESULTS / f'{name}.png', dpi=150)


def all_records():
    """Returns {study: {variant: {seed: record}}}, without studies that only tune learning rates or have no record."""
    found = {name: records(name) for name in study.STUDIES if not name.endswith('_tuning')}
    return {name: of_study for name, of_study in found.items() if of_study}


def page(cifar10, cifar10_all, cifar10_few, fashion, rho, ablations, bnupdate, laplace, source, transfer, published):
    """Returns the text of results/README.md. Takes the records of each study, {variant: {seed: record}}."""
    template = (Path(__file__).parent / 'report.md').read_text()
    return template.format(
        cifar10_table=methods_table(cifar10),
        cifar10_claims=claims_table(cifar10),
        cifar10_commands=commands('cifar10', cifar10),
        all_table=bounds_table(cifar10_all),
        all_tests=paired_tests('cifar10_all'),
        all_ood=ood_table(cifar10_all),
        all_commands=commands('cifar10_all', cifar10_all),
        few_table=methods_table(cifar10_few),
        few_claims=claims_table(cifar10_few),
        few_commands=commands('cifar10_few', cifar10_few),
        fashion_table=methods_table(fashion),
        fashion_ensembles=compared(RESULTS / 'studies' / 'fashion' / 'comparison.csv', only='ensemble'),
        fashion_claims=claims_table(fashion),
        fashion_commands=commands('fashion', fashion),
        rho_table=rho_table(rho),
        rho_verdict=rho_verdict(rho),
        rho_commands=commands('rho', {name: rho[name] for name in ('bsam_0.01', 'sam_0.05')}),
        ablations=ablations_table('base setting', rho['bsam_0.01'], ablations),
        bnupdate=bnupdate_table(bnupdate),
        laplace_table=laplace_table(laplace),
        laplace_commands=commands('laplace', laplace),
        source_accuracy=cells(source['sgd'], 'mean', ['accuracy'])[0],
        transfer_table=transfer_table(transfer),
        transfer_commands=commands('transfer', {name: transfer[name] for name in transfer if name.startswith('bsam')}),
        published=published_table(published),
        published_intervals=published_intervals(published),
        digits_comparison=side_by_side('digits_lenet'),
        fashion_comparison=side_by_side('fashion_lenet'),
        speed_table=speed_table(),
    )


def records(name):
    """Returns the records of a study, {variant: {seed: record}}, in the order of study.records."""
    found = {}
    for variant, seed, path in study.records(name):
        if path.exists():
            found.setdefault(variant, {})[seed] = json_files.read_record(path)
    return found


def first_of(group):
    return next(iter(group.values()))


def values(group, metric, at):
    """Returns a metric of each record, float [records], in the unit of the tables.

    Args:
        group: {seed: record}.
        metric: the name of the metric.
        at: 'mean', 'average' or 'laplace', as in Subject.
    """
    scale, _ = metrics.scale_and_digits(metric)
    evaluation, part = ('laplace', 'average') if at == 'laplace' else ('test', at)
    return scale * np.array([record['evaluations'][evaluation][part][metric] for record in group.values()], float)


def differences(lower, higher, metric, at_lower='average', at_higher='average'):
    """Returns higher − lower of a metric for each seed that both groups have, float [seeds].

    Args:
        lower: {seed: record}.
        higher: {seed: record}.
        metric: the name of the metric.
        at_lower: the weights that predict in `lower`, as in Subject.
        at_higher: the weights that predict in `higher`.
    """
    seeds = [seed for seed in lower if seed in higher]
    lower, higher = ({seed: group[seed] for seed in seeds} for group in (lower, higher))
    return values(higher, metric, at_higher) - values(lower, metric, at_lower)


def cells(group, at, names):
    """Returns a cell 'mean ± standard deviation' over the records of a group for each metric of `names`."""
    return [spread(values(group, name, at), metrics.scale_and_digits(name)[1]) for name in names]


def spread(numbers, digits):
    """Returns 'mean ± standard deviation', or the number alone if there is only one."""
    text = f'{np.mean(numbers):.{digits}f}'
    return text if len(numbers) < 2 else f'{text} ± {np.std(numbers, ddof=1):.{digits}f}'


def interval(differences):
    """Returns the mean of paired differences and its 95 % interval by Student's t, (mean, low, high).

    Both bounds are nan for a single difference.
    """
    half = np.nan
    if len(differences) > 1:
        half = scipy.stats.t.ppf(0.975, len(differences) - 1) * scipy.stats.sem(differences)
    return differences.mean(), differences.mean() - half, differences.mean() + half


def tested(claim, found):
    """Returns a row of the table of claims: text, paired difference higher − lower, seeds that agree, verdict."""
    lower, higher = claim.lower, claim.higher
    found = differences(found[lower.variant], found[higher.variant], claim.metric, lower.at, higher.at)
    _, digits = metrics.scale_and_digits(claim.metric)
    return [claim.text, shown(found, digits), *verdict(found)]


def verdict(differences):
    """Returns how many seeds have the claimed sign, and the verdict, such as ('4 of 5', 'not supported')."""
    agreeing = f'{(differences > 0).sum()} of {len(differences)}'
    if len(differences) < 2:
        return agreeing, 'not tested'
    _, low, high = interval(differences)
    return agreeing, 'supported' if low > 0 else 'contradicted' if high < 0 else 'not supported'


def shown(differences, digits):
    """Returns the mean of differences and its interval, such as '+2.05 [-0.07, +4.17]'."""
    mean, low, high = interval(differences)
    if len(differences) < 2:
        return f'{mean:+.{digits}f}'
    return f'{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]'


# Tables.


def methods_table(found):
    """Returns a table of every method at the mean and over samples.

    The columns of FURTHER are shown if the study measured them.
    """
    header = ['method', 'runs', 'accuracy %', 'NLL', 'ECE', 'AUROC', 'minutes']
    more = {name: pick for name, pick in FURTHER.items() if name in first_of(found['sgd'])['evaluations']['test']}
    rows = []
    for subject in subjects(found):
        group, at = found[subject.variant], subject.at
        minutes = [sum(epoch['seconds'] for epoch in record['log']) / 60 for record in group.values()]
        further = [[pick(record['evaluations']['test'], at) for record in group.values()] for _, pick in more.values()]
        shown = cells(group, at, comparison.SHOWN)
        rows.append([str(subject), str(len(group)), *shown, spread(minutes, 1), *(spread(f, 4) for f in further)])
    return tables.markdown(header + [title for title, _ in more.values()], rows)


def bounds_table(found):
    """Returns a table of the first seed of every method, with intervals over test images."""
    rows = []
    for subject in subjects(found):
        record = first_of(found[subject.variant])
        shown = [with_bounds(record['evaluations']['test'], subject.at, metric) for metric in comparison.SHOWN]
        rows.append([str(subject), *shown])
    return tables.markdown(['method', *(comparison.TITLES[name] for name in comparison.SHOWN)], rows)


def paired_tests(name):
    """Returns the tests over images of a study's comparison.md, from the line that names the baseline."""
    text = (RESULTS / 'studies' / name / 'comparison.md').read_text()
    return text[text.index('baseline: ') :]


def ood_table(found):
    """Returns a table of how well entropy and energy detect images of each other data set, for the first seed."""
    columns = [(score, dataset) for dataset in ('cifar100', 'fashion') for score in ('entropy', 'energy')]
    rows = [
        [str(subject), *(f'{detected[dataset][subject.at][score]["auroc"]:.4f}' for score, dataset in columns)]
        for subject in subjects(found)
        for detected in [first_of(found[subject.variant])['evaluations']['ood']['ood']]
    ]
    titles = {'cifar100': 'CIFAR-100', 'fashion': 'Fashion-MNIST'}
    return tables.markdown(['AUROC', *(f'{titles[dataset]}, {score}' for score, dataset in columns)], rows)


def subjects(found):
    """Returns the Subjects of a table: each variant at the mean, then over samples or Laplace samples if any."""
    subjects = []
    for variant in (name for name in NAMES if name in found):
        subjects.append(Subject(variant, 'mean'))
        if not experiment.is_point(variant):
            subjects.append(Subject(variant, 'average'))
        elif 'laplace' in first_of(found[variant])['evaluations']:
            subjects.append(Subject(variant, 'laplace'))
    return subjects


# Columns that only some studies have: {key in the evaluation: (column, function of the evaluation and Subject.at)}.
FURTHER = {
    'temperature': ('NLL, tempered', lambda test, at: test['temperature'][at]['nll']),
    'ood': ('AUROC, CIFAR-100', lambda test, at: test['ood']['cifar100'][at]['entropy']['auroc']),
}


def claims_table(found):
    header = ['claim', 'difference [95 % interval]', 'seeds that agree', 'verdict']
    return tables.markdown(header, [tested(claim, found) for claim in CLAIMS])


def rho_table(found):
    rows = [
        [NAMES[method], f'{rho:g}', *cells(group, 'average', metrics.SHORT)]
        for method in PUBLISHED_RHO
        for rho, group in by_rho(found, method).items()
    ]
    return tables.markdown(['method', 'ρ', 'accuracy %', 'NLL', 'ECE'], rows)


def by_rho(found, method):
    """Returns the records of a method by rising ρ, {ρ: {seed: record}}."""
    groups = {float(name.split('_')[1]): group for name, group in found.items() if name.startswith(f'{method}_')}
    return dict(sorted(groups.items()))


def rho_verdict(found):
    """Returns a list with the range of the mean NLL over ρ, and how much seeds differ.

    The first range is over ρ up to three times the published ρ, the second over all ρ.
    """
    lines = []
    for method, published in PUBLISHED_RHO.items():
        nlls = {rho: values(group, 'nll', 'average') for rho, group in by_rho(found, method).items()}
        small = [rho for rho in nlls if rho <= 3 * published]
        range_of_small, range_of_all = (np.ptp([nlls[rho].mean() for rho in rhos]) for rhos in (small, nlls))
        deviation = np.mean([nlls[rho].std(ddof=1) for rho in small])
        factor = small[-1] / small[0]
        lines.append(
            f'- {NAMES[method]}: from ρ = {small[0]:g} to {small[-1]:g}, a factor of {factor:.0f}, the mean NLL varies '
            f'by {range_of_small:.4f}.\n'
            f'  The standard deviation over seeds is {deviation:.4f} there. Over all ρ the mean NLL varies by '
            f'{range_of_all:.4f}.'
        )
    return '\n'.join(lines)


def ablations_table(name_of_base, base, found):
    """Returns a table of a base setting, and of other settings with their difference in NLL to the base setting.

    Args:
        name_of_base: the name of the base setting in the table.
        base: {seed: record} of the base setting.
        found: {setting: {seed: record}}.
    """
    rows = [ablation(name_of_base, base, base)]
    rows += [ablation(name.replace('_', ' '), group, base) for name, group in found.items() if group is not base]
    header = [
        'setting', 'runs', 'accuracy %, samples', 'NLL, mean', 'NLL, samples', 'ECE, samples',
        'NLL, samples: difference',
    ]  # fmt: skip
    return tables.markdown(header, rows)


def bnupdate_table(found):
    """Returns a table of --bnupdate, and of batch statistics re-estimated for the mean and for every sample."""
    both = found['bnupdate_both']
    refreshed = {seed: {'evaluations': {'test': record['evaluations']['refreshed']}} for seed, record in both.items()}
    table = ablations_table('bnupdate both', both, found | {'bnupdate both, bnrefresh 20': refreshed})
    return table + '\n' + commands('bnupdate', {'bnupdate_both': both})


def ablation(name, group, base):
    """Returns a row of ablations_table. The base setting has no difference to itself."""
    accuracy, nll, ece = cells(group, 'average', metrics.SHORT)
    row = [name, str(len(group)), accuracy, *cells(group, 'mean', ['nll']), nll, ece]
    if group is base:
        return [*row, '']
    return [*row, shown(differences(base, group, 'nll'), 4)]


def laplace_table(found):
    """Returns a table of point estimates, and of Laplace approximations by sampling and by the probit approximation."""
    rows = []
    for optim, group in found.items():
        tests = [record['evaluations'] for record in group.values()]
        rows.append([NAMES[optim], 'none', '', '', *_laplace_cells([test['test']['mean'] for test in tests])])
        for name in ('training', 'kron', 'full', 'diag'):
            of_name = [test[name] for test in tests]
            prior = spread(np.array([test['laplace']['prior_precision'] for test in of_name]), 1)
            structure = of_name[0]['laplace']['structure'] + ', prior of training' * (name == 'training')
            for how, part in {
                '32 samples': lambda test: test['average'],
                'probit': lambda test: test['laplace']['probit'],
            }.items():
                rows.append([NAMES[optim], structure, prior, how, *_laplace_cells([part(test) for test in of_name])])
    header = ['method', 'Laplace approximation', 'prior precision', 'prediction', 'accuracy %', 'NLL', 'ECE', 'AUROC']
    return tables.markdown(header, rows)


def _laplace_cells(summaries):
    cells = []
    for name in comparison.SHOWN:
        scale, digits = metrics.scale_and_digits(name)
        cells.append(spread(scale * np.array([summary[name] for summary in summaries], float), digits))
    return cells


def transfer_table(found):
    """Returns a table of runs from random and from trained weights, with the differences that the training made."""
    rows = []
    for optim in dict.fromkeys(name.split('_')[0] for name in found):
        random, trained = (found[f'{optim}_{start}'] for start in ('random', 'trained'))
        for start, group in (('random', random), ('trained on CIFAR-10', trained)):
            rows.append([NAMES[optim], start, str(len(group)), *cells(group, 'average', metrics.SHORT)])
        gains = [shown(differences(random, trained, name), metrics.scale_and_digits(name)[1]) for name in metrics.SHORT]
        rows.append([NAMES[optim], 'difference [95 % interval]', '', *gains])
    return tables.markdown(['method', 'first weights', 'runs', 'accuracy %', 'NLL', 'ECE'], rows)


# The paper's results, one run each: accuracy in per cent, NLL, ECE. The NLL is corrected by the factor 49/50.
PUBLISHED = {
    'cifar10_sgd': ('94.77', '0.2017', '0.0306'),
    'cifar10_sam': ('95.69', '0.1402', '0.0134'),
    'cifar10_bsam': ('95.95', '0.1214', '0.0082'),
    'cifar100_bsam': ('about 80.4',),
}
PUBLISHED_AUROC = '0.9536'  # bSAM on CIFAR-10, on the published grid of thresholds


def published_table(found):
    """Returns a table of the published numbers and ours. A run without a record has an empty cell."""
    rows = []
    for name, numbers in PUBLISHED.items():
        flags = study.STUDIES['published'].variants[name]
        at = 'mean' if experiment.is_point(flags['optim']) else 'average'
        ours = [
            ', '.join(cells(found[run], at, metrics.SHORT)) if run in found else ''
            for run in (name, f'{name}_bfloat16')
        ]
        command = ' '.join(training_flags.command_line(flags)).replace('=', ' ')
        rows.append([f'`{command}`', ', '.join(numbers), *ours])
    header = ['ResNet-18: `python train.py` …', 'published', 'here, float32', 'here, bfloat16']
    return tables.markdown(header, rows)


def headline_table(found):
    """Returns a table of SGD, SAM and bSAM on CIFAR-10: the published metrics beside ours, '–' without a record.

    Ours are from the run in float32, or from the run in bfloat16 if there is no other.
    """
    rows = []
    for optim, title in {'sgd': 'SGD', 'sam': 'SAM', 'bsam': 'bSAM, 32 samples'}.items():
        runs = found.get(f'cifar10_{optim}') or found.get(f'cifar10_{optim}_bfloat16')
        at = 'mean' if experiment.is_point(optim) else 'average'
        ours = cells(runs, at, metrics.SHORT) if runs else ['–'] * len(metrics.SHORT)
        pairs = zip(PUBLISHED[f'cifar10_{optim}'], ours, strict=True)
        rows.append([title, *(cell for pair in pairs for cell in pair)])
    header = ['accuracy %, published', 'here', 'NLL, published', 'here', 'ECE, published', 'here']
    return tables.markdown(['CIFAR-10, ResNet-18', *header], rows)


def published_intervals(found):
    """Returns a table of bSAM's metrics on CIFAR-10: the published values, then ours with intervals."""
    rows = [['published, 32 samples', *PUBLISHED['cifar10_bsam'], PUBLISHED_AUROC]]
    for variant, precision in {'cifar10_bsam': 'float32', 'cifar10_bsam_bfloat16': 'bfloat16'}.items():
        if variant in found:
            test = first_of(found[variant])['evaluations']['test']
            for at, label in {'average': '32 samples', 'mean': 'at the mean'}.items():
                shown = [with_bounds(test, at, metric) for metric in (*metrics.SHORT, 'auroc_grid')]
                rows.append([f'here, {precision}, {label}', *shown])
    return tables.markdown(['bSAM, CIFAR-10, ResNet-18', 'accuracy %', 'NLL', 'ECE', 'AUROC, grid'], rows)


def with_bounds(test, at, metric):
    """Returns a metric with its 95 % interval, or alone if the interval was not computed.

    Args:
        test: the evaluation.
        at: 'mean' or 'average'.
        metric: the name of the metric.
    """
    scale, digits = metrics.scale_and_digits(metric)
    value = f'{scale * test[at][metric]:.{digits}f}'
    if metric not in test['intervals'][at]:
        return value
    low, high = (f'{scale * end:.{digits}f}' for end in test['intervals'][at][metric])
    return f'{value} ({low} to {high})'


def side_by_side(name):
    """Returns the table of all methods on one data set, with links to its records."""
    table = compared(RESULTS / f'{name}.csv')
    return f'[Commands and settings]({name}.json), [paired tests]({name}.md).\n\n{table}'


def compared(path, only=''):
    """Returns a table of a comparison.csv of test.py. `only` selects the rows that contain it in the name."""
    shown = comparison.SHOWN
    with open(path, newline='') as file:
        rows = [
            [displayed(row['method']), row['runs'], *(from_csv(row, metric) for metric in shown)]
            for row in csv.DictReader(file)
            if only in row['method']
        ]
    return tables.markdown(['method', 'runs', 'accuracy %', 'NLL', 'ECE', 'AUROC'], rows)


def displayed(method):
    """Returns a method's name as the other tables write it: 'SGD Laplace, 32 samples' for 'sgd laplace, 32 samples'."""
    optimizer = re.match(r'\w*', method)[0]
    return (NAMES.get(optimizer, optimizer) + method.removeprefix(optimizer)).replace(' laplace', ' Laplace')


def from_csv(row, metric):
    """Returns the cell of a metric: 'mean ± standard deviation', or the mean alone for a single run."""
    _, digits = metrics.scale_and_digits(metric)
    return ' ± '.join(f'{float(row[name]):.{digits}f}' for name in comparison.csv_header([metric]) if row[name])


PAGES_WITH_TABLES = [
    ROOT / name for name in ('README.md', 'benchmarks/README.md', 'docs/hosts.md', 'docs/performance.md')
]


# The optimizers in the table of GPU throughput.
THROUGHPUT = ('sgd', 'sam', 'bsam')


def kept(name):
    """Returns the record results/NAME.json."""
    return json_files.read_record(RESULTS / f'{name}.json')


def measured_scaling_table():
    rows = [
        [row['scaling'], f'{row["processes"]}', f'{row["batch"]}', f'{row["images/s"]:.0f}', row['efficiency']]
        for row in kept('scaling_measured')['rows']
    ]
    return tables.markdown(['task', 'processes', 'batch', 'images/s', 'efficiency'], rows)


def predicted_scaling_table():
    shown = {
        'devices': 'devices', 'batch': 'batch, 1 sub-batch per device', 'GFLOP a device': 'GFLOP per device',
        'MB reduced': 'MB all-reduced', 'computing, ms': 'compute, ms', 'ring, ms': 'all-reduce, ms',
        'efficiency': 'efficiency', 'with 8 sub-batches each': 'efficiency, 8 sub-batches per device',
    }  # fmt: skip
    rows = [[f'{row[name]}' for name in shown] for row in kept('scaling_predicted')['rows']]
    return tables.markdown(list(shown.values()), rows)


def loading_table():
    results = kept('loading')
    return tables.markdown(['measured', f'JAX {results["environment"]["versions"]["jax"]}'], loading.rows(results))


def convolutions_table():
    """Returns a table of the GFLOP/s of each kind of convolution in each stage of both networks."""
    kinds = ('forward', 'input gradient', 'kernel gradient')
    rows = []
    for network, profile in {'ResNet-18': kept('convolutions'), 'ResNet-20': kept('convolutions_resnet20')}.items():
        measured = profile['milliseconds_and_gflop']
        rates = {name: gflop / milliseconds * 1e3 for name, (milliseconds, gflop) in measured.items()}
        for stage in sorted({name.split(', ')[1] for name in rates}, key=lambda stage: (stage != 'stem', stage)):
            found = [rates.get(f'{kind}, {stage}') for kind in kinds]
            rows.append([f'{network}, {stage}', *('' if rate is None else f'{rate:.0f}' for rate in found)])
    return tables.markdown(['GFLOP/s', *kinds], rows)


def with_tables(page):
    """Returns a page with new tables between the marks `<!-- NAME: made by studies/report.py -->` and their ends."""

    def made_again(table):
        begin, name = table.groups()
        return begin + TABLES[name]() + '\n<!-- until here -->'

    return re.sub(
        r'(<!-- (\w+): made by studies/report\.py -->\n\n).*?<!-- until here -->',
        made_again,
        page,
        flags=re.DOTALL,
    )


# Functions that return the table of each name in the marks.
TABLES = {
    'headline': lambda: headline_table(records('published')),
    'processes': measured_scaling_table,
    'devices': predicted_scaling_table,
    'gpu': lambda: throughput.table(
        [kept('throughput_bfloat16'), kept('throughput_float32')], training_flags.PRECISIONS, THROUGHPUT
    ),
    'speed': lambda: run.table(kept('benchmark')),
    'peers': lambda: peers.short_table(kept('peers')),
    'peers_resnet18': lambda: peers.table(kept('peers')['resnet18']),
    'peers_resnet20': lambda: peers.table(kept('peers')['resnet20']),
    'convolutions': convolutions_table,
    'loading': loading_table,
}


def speed_table():
    """Returns a table of the time of SAM's and bSAM's steps over the time of a gradient and of an SGD step."""
    results = kept('benchmark')
    costs = [(optim, of) for of in ('gradient', 'sgd') for optim in ('sam', 'bsam')]
    rows = []
    for model, name in run.NAMES.items():
        cost = results[model]['over_gradient'] | {'gradient': 1}
        rows.append([name, *(f'{cost[optim] / cost[of]:.2f}' for optim, of in costs)])
    header = ['SAM / gradient', 'bSAM / gradient', 'SAM / SGD', 'bSAM / SGD']
    return tables.markdown(['on [two CPU cores](benchmark.json)', *header], rows)


def commands(name, found):
    """Returns the command of a study, the machine, and the commands of the first seed of each variant in `found`."""
    first = first_of(first_of(found))
    environment = first['environment']
    trainings = [
        first_of(found[variant])['command']
        for variant in [*(v for v in NAMES if v in found), *(v for v in found if v not in NAMES)]
    ]
    evaluations = {name: test for group in found.values() for name, test in first_of(group)['evaluations'].items()}
    tests = [measured['command'] for measured in evaluations.values()]
    device = environment['device'].removeprefix('cpu: cpu, ')
    where = f'{device}; Python {environment["python"]}, JAX {environment["versions"]["jax"]}'
    lines = '\n'.join(f'    {line}' for line in [*trainings, *tests])
    return (
        f'`python studies/study.py {name} --folder … --jobs 2` runs commands such as these with every seed '
        f'({where}):\n\n{lines}'
    )


# Pictures.


CIFAR10 = 'CIFAR-10, ResNet-20'
FEW, SHORT = f'{CIFAR10}, 1,000 training images', f'{CIFAR10}, 4,500 training images'
ALL = f'{CIFAR10}, 50,000 training images, 6 epochs'
FASHION = 'Fashion-MNIST, LeNet-5, 2,000 training images'


def reliability(found, heading):
    """Returns a figure of the reliability of SGD, SAM and bSAM side by side, for the first seed."""
    diagrams = {
        str(subject): [first_of(found[subject.variant])['evaluations']['test']['reliability'][subject.at]]
        for subject in (SGD, SAM, BSAM)
    }
    return plots.reliability(diagrams, f'{heading}, first seed')


def over_samples(found, heading):
    """Returns a figure of bSAM's and IVON's metrics over the number of samples. Dashed lines are at the mean."""
    subjects = [subject for subject in (BSAM, BSAM_MEAN, IVON, IVON_MEAN) if subject.variant in found]
    return plots.samples([row(subject, found[subject.variant].values(), 'test') for subject in subjects], heading)


def over_severities(found, heading):
    """Returns a figure of the metrics over the severity of corruptions, for the first seed."""
    subjects = [subject for subject in (SGD, SAM, BSAM, IVON) if subject.variant in found]
    rows = [row(subject, [first_of(found[subject.variant])], 'corrupted') for subject in subjects]
    return plots.severities(rows, f'{heading}, first seed')


def row(subject, records, evaluation):
    """Returns the comparison.Row of an evaluation of records, without their predictions."""
    measured = [record['evaluations'][evaluation] for record in records]
    return comparison.Row(str(subject), [], at=subject.at, measured=measured)


@plots.styled
def over_rho(found, heading):
    """Returns a figure of bSAM's and SAM's metrics over ρ, relative to the published ρ.

    Error bars are standard deviations over seeds.
    """
    figure = plots.Figure(figsize=(9.2, 2.7))
    for axes, metric in zip(figure.subplots(1, 3), plots.LABELS, strict=True):
        lines = {}
        for method, published in PUBLISHED_RHO.items():
            groups = by_rho(found, method)
            heights = np.array([values(group, metric, 'average') for group in groups.values()])
            means, deviations = heights.mean(axis=1), heights.std(axis=1, ddof=1)
            positions = [rho / published for rho in groups]
            lines[f'{NAMES[method]}, ρ₀ = {published:g}'] = axes.errorbar(
                positions, means, deviations, capsize=2, **plots.STYLES[method]
            )
        axes.set_xscale('log')
        axes.set_xticks((0.1, 1, 10), ('0.1', '1', '10'))
        axes.set(xlabel='ρ / published ρ₀', ylabel=plots.LABELS[metric])
    figure.suptitle(f'Mean ± standard deviation over seeds: {heading}')
    plots.legend_beside(figure, lines)
    return figure


if __name__ == '__main__':
    main()
