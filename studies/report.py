"""Makes results/README.md and its pictures, and the tables of the other pages, from what is kept in results/.

    python studies/report.py

The prose is report.md; here are its tables, verdicts and pictures.
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
from benchmarks import loading, run, throughput
from evaluation import comparison, measures, plots, tables
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
    """What is compared: a variant of a study, at the 'mean' of its posterior, the 'average' over samples of it, or
    over those of a 'laplace' approximation."""

    variant: str
    at: str

    def __str__(self):
        return f'{NAMES[self.variant]}, {_AT[self.at]}'


SGD, SAM = Subject('sgd', 'mean'), Subject('sam', 'mean')
BSAM_MEAN, BSAM = Subject('bsam', 'mean'), Subject('bsam', 'average')
IVON_MEAN, IVON = Subject('ivon', 'mean'), Subject('ivon', 'average')


class Claim(NamedTuple):
    """That a metric of `lower` is below that of `higher`."""

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
        'reliability': reliability(found['cifar10_few']),
        'few_samples': over_samples(found['cifar10_few']),
        'few_corruptions': over_severities(found['cifar10_few']),
        'cifar10_samples': over_samples(found['cifar10']),
        'fashion_samples': over_samples(found['fashion']),
        'cifar10_corruptions': over_severities(found['cifar10']),
        'rho': over_rho(found['rho']),
    }
    with plots.settings({}):
        for name, figure in pictures.items():
            figure.savefig(RESULTS / f'{name}.png', dpi=150)


def all_records():
    return {name: records(name) for name in study.STUDIES if not name.endswith('_tuning')}


def page(cifar10, cifar10_few, fashion, rho, ablations, bnupdate, published):
    template = (Path(__file__).parent / 'report.md').read_text()
    return template.format(
        cifar10_table=methods_table(cifar10),
        cifar10_claims=claims_table(cifar10),
        cifar10_commands=commands('cifar10', cifar10),
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
        ablations=ablations_table('as above', rho['bsam_0.01'], ablations),
        bnupdate=bnupdate_table(bnupdate),
        published=published_table(published),
        published_intervals=published_intervals(published),
        comparisons='\n'.join(side_by_side(*row) for row in COMPARISONS),
        speed_table=speed_table(),
    )


def records(name):
    """{variant: {seed: record}} of what study.py kept, variants as it lists them and seeds rising."""
    found = {}
    for variant, seed, path in study.records(name):
        if path.exists():
            found.setdefault(variant, {})[seed] = json_files.read_record(path)
    return found


def first_of(group):
    return next(iter(group.values()))


def values(group, metric, at):
    """A metric of each record, as it is shown."""
    scale, _ = metrics.scale_and_digits(metric)
    evaluation, part = ('laplace', 'average') if at == 'laplace' else ('test', at)
    return scale * np.array([record['evaluations'][evaluation][part][metric] for record in group.values()], float)


def differences(lower, higher, metric, at_lower='average', at_higher='average'):
    """higher − lower of the seeds that both groups have."""
    seeds = [seed for seed in lower if seed in higher]
    lower, higher = ({seed: group[seed] for seed in seeds} for group in (lower, higher))
    return values(higher, metric, at_higher) - values(lower, metric, at_lower)


def cells(group, at, names):
    return [spread(values(group, name, at), metrics.scale_and_digits(name)[1]) for name in names]


def spread(numbers, digits):
    """Mean ± standard deviation."""
    text = f'{np.mean(numbers):.{digits}f}'
    return text if len(numbers) < 2 else f'{text} ± {np.std(numbers, ddof=1):.{digits}f}'


def interval(differences):
    """(mean, low, high) of paired differences: the 95 % interval of the mean by Student's t; nan of a single one."""
    half = np.nan
    if len(differences) > 1:
        half = scipy.stats.t.ppf(0.975, len(differences) - 1) * scipy.stats.sem(differences)
    return differences.mean(), differences.mean() - half, differences.mean() + half


def tested(claim, found):
    """The claim, the difference of runs with the same seed, higher − lower, and a verdict."""
    lower, higher = claim.lower, claim.higher
    found = differences(found[lower.variant], found[higher.variant], claim.metric, lower.at, higher.at)
    _, digits = metrics.scale_and_digits(claim.metric)
    return [claim.text, shown(found, digits), verdict(found)]


def verdict(differences):
    _, low, high = interval(differences)
    if len(differences) < 2:
        return 'right sign, one seed' if differences[0] > 0 else 'wrong sign, one seed'
    found = 'supported' if low > 0 else 'contradicted' if high < 0 else 'not supported here'
    return f'{found}, {(differences > 0).sum()} of {len(differences)} seeds'


def shown(differences, digits):
    mean, low, high = interval(differences)
    if len(differences) < 2:
        return f'{mean:+.{digits}f}'
    return f'{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]'


# Tables.


def methods_table(found):
    """Every method at the mean and over samples; temperature and unknown images where they were evaluated."""
    header = ['', 'runs', 'accuracy %', 'NLL', 'ECE', 'AUROC', 'minutes']
    more = {name: pick for name, pick in FURTHER.items() if name in first_of(found['sgd'])['evaluations']['test']}
    rows = []
    for subject in subjects(found):
        group, at = found[subject.variant], subject.at
        minutes = [sum(epoch['seconds'] for epoch in record['log']) / 60 for record in group.values()]
        further = [[pick(record['evaluations']['test'], at) for record in group.values()] for _, pick in more.values()]
        shown = cells(group, at, comparison.SHOWN)
        rows.append([str(subject), str(len(group)), *shown, spread(minutes, 1), *(spread(f, 4) for f in further)])
    return tables.markdown(header + [title for title, _ in more.values()], rows)


def subjects(found):
    """Of every variant the mean, and the average over samples where there is a posterior, Laplace's too."""
    subjects = []
    for variant in (name for name in NAMES if name in found):
        subjects.append(Subject(variant, 'mean'))
        if not experiment.is_point(variant):
            subjects.append(Subject(variant, 'average'))
        elif 'laplace' in first_of(found[variant])['evaluations']:
            subjects.append(Subject(variant, 'laplace'))
    return subjects


# What only some evaluations have, {key in metrics.json: (column, function of metrics.json and 'mean' or 'average')}.
FURTHER = {
    'temperature': ('NLL, tempered', lambda test, at: test['temperature'][at]['nll']),
    'ood': ('AUROC, unknown', lambda test, at: test['ood']['cifar100'][at]['entropy']['auroc']),
}


def claims_table(found):
    return tables.markdown(
        ['claim', 'difference [95 % interval]', 'verdict'], [tested(claim, found) for claim in CLAIMS]
    )


def rho_table(found):
    rows = [
        [NAMES[method], f'{rho:g}', *cells(group, 'average', metrics.SHORT)]
        for method in PUBLISHED_RHO
        for rho, group in by_rho(found, method).items()
    ]
    return tables.markdown(['', 'ρ', 'accuracy %', 'NLL', 'ECE'], rows)


def by_rho(found, method):
    """{ρ: records} of a method, ρ rising."""
    groups = {float(name.split('_')[1]): group for name, group in found.items() if name.startswith(f'{method}_')}
    return dict(sorted(groups.items()))


def rho_verdict(found):
    """How far the mean NLL lies apart over ρ, up to about the published one and over all, beside how far seeds do."""
    lines = []
    for method, published in PUBLISHED_RHO.items():
        nlls = {rho: values(group, 'nll', 'average') for rho, group in by_rho(found, method).items()}
        small = [rho for rho in nlls if rho <= 3 * published]
        apart, apart_in_all = (np.ptp([nlls[rho].mean() for rho in rhos]) for rhos in (small, nlls))
        seeds = np.mean([nlls[rho].std(ddof=1) for rho in small])
        lines.append(
            f'- {NAMES[method]}: from ρ = {small[0]:g} to {small[-1]:g}, a factor of {small[-1] / small[0]:.0f}, the '
            f'best and the worst NLL differ by {apart:.4f}, seeds by {seeds:.4f}; over all ρ by {apart_in_all:.4f}'
        )
    return '\n'.join(lines)


def ablations_table(name_of_base, base, found):
    """The records `base`, and every group that was found with the difference of its NLL to them."""
    rows = [ablation(name_of_base, base, base)]
    rows += [ablation(name.replace('_', ' '), group, base) for name, group in found.items() if group is not base]
    header = [
        '', 'runs', 'accuracy %, samples', 'NLL, mean', 'NLL, samples', 'ECE, samples', 'difference in NLL, samples',
    ]  # fmt: skip
    return tables.markdown(header, rows)


def bnupdate_table(found):
    """Which gradients move batch statistics, and statistics that are estimated again for the mean and every sample."""
    both = found['bnupdate_both']
    refreshed = {seed: {'evaluations': {'test': record['evaluations']['refreshed']}} for seed, record in both.items()}
    table = ablations_table('both', both, found | {'both, bnrefresh 20': refreshed})
    return table + '\n' + commands('bnupdate', {'bnupdate_both': both})


def ablation(name, group, base):
    accuracy, nll, ece = cells(group, 'average', metrics.SHORT)
    row = [name, str(len(group)), accuracy, *cells(group, 'mean', ['nll']), nll, ece]
    if group is base:
        return [*row, '']
    return [*row, shown(differences(base, group, 'nll'), 4)]


# What the paper's authors report, one run each, the NLL divided rightly: accuracy in per cent, NLL, ECE.
PUBLISHED = {
    'cifar10_sgd': ('94.77', '0.2017', '0.0306'),
    'cifar10_sam': ('95.69', '0.1402', '0.0134'),
    'cifar10_bsam': ('95.95', '0.1214', '0.0082'),
    'cifar100_bsam': ('about 80.4',),
}
PUBLISHED_AUROC = '0.9536'  # of bSAM on CIFAR-10, on the grid


def published_table(found):
    """The published numbers beside ours in both precisions, whose cells are empty where there is no record."""
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
    return tables.markdown(['ResNet-18: `python train.py` …', 'published', 'here', 'here, bfloat16'], rows)


def published_intervals(found):
    """bSAM's metrics on CIFAR-10 with intervals, of the runs that there are, below the published ones."""
    rows = [['bSAM as published, over 32 samples', *PUBLISHED['cifar10_bsam'], PUBLISHED_AUROC]]
    for variant, precision in {'cifar10_bsam': 'float32', 'cifar10_bsam_bfloat16': 'bfloat16'}.items():
        if variant in found:
            test = first_of(found[variant])['evaluations']['test']
            for at, label in {'average': 'over 32 samples', 'mean': 'at the mean'}.items():
                shown = [with_bounds(test, at, metric) for metric in (*metrics.SHORT, 'auroc_grid')]
                rows.append([f'bSAM here, {precision}, {label}', *shown])
    return tables.markdown(['CIFAR-10, ResNet-18', 'accuracy %', 'NLL', 'ECE', 'AUROC, grid'], rows)


def with_bounds(test, at, metric):
    """A metric and its 95 % interval, if it has one."""
    scale, digits = metrics.scale_and_digits(metric)
    value = f'{scale * test[at][metric]:.{digits}f}'
    if metric not in test['intervals'][at]:
        return value
    low, high = (f'{scale * end:.{digits}f}' for end in test['intervals'][at][metric])
    return f'{value} ({low} to {high})'


COMPARISONS = [
    ('digits_lenet', "scikit-learn's digits, LeNet-5, 20 epochs, 5 seeds"),
    ('fashion_lenet', 'Fashion-MNIST, LeNet-5, 15 epochs, one seed'),
]


def side_by_side(name, title):
    """All methods on one data set."""
    table = compared(RESULTS / f'{name}.csv')
    return f'{title} ([commands and settings]({name}.json), [paired tests]({name}.md)):\n\n{table}'


def compared(path, only=''):
    """The rows of a CSV that test.py wrote, those whose method has `only` in its name."""
    shown = comparison.SHOWN
    with open(path, newline='') as file:
        rows = [
            [row['method'], row['runs'], *(from_csv(row, metric) for metric in shown)]
            for row in csv.DictReader(file)
            if only in row['method']
        ]
    return tables.markdown(['', 'runs', 'accuracy %', 'NLL', 'ECE', 'AUROC'], rows)


def from_csv(row, metric):
    scale, digits = metrics.scale_and_digits(metric)
    mean, deviation = (scale * float(row[f'{metric}_{part}']) for part in ('mean', 'sd'))
    return f'{mean:.{digits}f}' if np.isnan(deviation) else f'{mean:.{digits}f} ± {deviation:.{digits}f}'


PAGES_WITH_TABLES = [ROOT / 'README.md', ROOT / 'benchmarks' / 'README.md', ROOT / 'docs' / 'hosts.md']


# The rows of the table of a GPU.
THROUGHPUT = ('sgd', 'sam', 'bsam')


def few_table(found):
    """Each method as it is meant to be used: averaged over samples where it has a posterior, else at the mean."""
    used = [Subject(name, 'mean' if experiment.is_point(name) else 'average') for name in NAMES if name in found]
    rows = [[NAMES[name], str(len(found[name])), *cells(found[name], at, comparison.SHOWN)] for name, at in used]
    return tables.markdown(['', 'runs', 'accuracy %', 'NLL', 'ECE', 'AUROC'], rows)


def kept(name):
    return json_files.read_record(RESULTS / f'{name}.json')


def measured_scaling_table():
    rows = [
        [row['scaling'], f'{row["processes"]}', f'{row["batch"]}', f'{row["images/s"]:.0f}', row['efficiency']]
        for row in kept('scaling_measured')['rows']
    ]
    return tables.markdown(['', 'processes', 'batch', 'images/s', 'efficiency'], rows)


def predicted_scaling_table():
    shown = {
        'devices': 'devices', 'batch': 'batch, one sub-batch each', 'GFLOP a device': 'GFLOP a device',
        'MB reduced': 'MB reduced', 'computing, ms': 'computing, ms', 'ring, ms': 'reducing, ms',
        'efficiency': 'efficiency', 'with 8 sub-batches each': 'with 8 sub-batches each',
    }  # fmt: skip
    rows = [[f'{row[name]}' for name in shown] for row in kept('scaling_predicted')['rows']]
    return tables.markdown(list(shown.values()), rows)


def loading_table():
    results = kept('loading')
    return tables.markdown(['', f'JAX {results["environment"]["versions"]["jax"]}'], loading.rows(results))


def convolutions_table():
    """GFLOP/s of each kind of convolution in each stage, of both networks."""
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
    """A page with every table that stands between its marks made again."""

    def made_again(table):
        begin, name, end = table.groups()
        return begin + TABLES[name]() + end

    return re.sub(
        r'(<!-- (\w+): made by studies/report\.py -->\n\n).*?(\n<!-- until here -->)',
        made_again,
        page,
        flags=re.DOTALL,
    )


# Of the names that stand in the marks.
TABLES = {
    'headline': lambda: published_intervals(records('published')),
    'few': lambda: few_table(records('cifar10_few')),
    'processes': measured_scaling_table,
    'devices': predicted_scaling_table,
    'gpu': lambda: throughput.table(
        [kept('throughput_bfloat16'), kept('throughput_float32')], training_flags.PRECISIONS, THROUGHPUT
    ),
    'speed': lambda: run.table(kept('benchmark')),
    'convolutions': convolutions_table,
    'loading': loading_table,
}


def speed_table():
    """What SAM's and bSAM's steps cost, over a gradient and over a step of SGD, by benchmarks/run.py."""
    results = kept('benchmark')
    costs = [(optim, of) for of in ('gradient', 'sgd') for optim in ('sam', 'bsam')]
    rows = []
    for model, name in run.NAMES.items():
        cost = results[model]['over_gradient'] | {'gradient': 1}
        rows.append([name, *(f'{cost[optim] / cost[of]:.2f}' for optim, of in costs)])
    header = ['SAM / gradient', 'bSAM / gradient', 'SAM / SGD', 'bSAM / SGD']
    return tables.markdown(['[two CPU cores](benchmark.json)', *header], rows)


def commands(name, found):
    """What started the runs, and what that ran for the first seed of some variants."""
    first = first_of(first_of(found))
    environment = first['environment']
    trainings = [
        first_of(found[variant])['command']
        for variant in [*(v for v in NAMES if v in found), *(v for v in found if v not in NAMES)]
    ]
    evaluations = {name: test for group in found.values() for name, test in first_of(group)['evaluations'].items()}
    tests = [measured['command'] for measured in evaluations.values()]
    where = f'{environment["device"]}; Python {environment["python"]}, JAX {environment["versions"]["jax"]}'
    lines = '\n'.join(f'    {line}' for line in [*trainings, *tests])
    return f'`python studies/study.py {name} --folder … --jobs 2` ({where}) runs, with other seeds too:\n\n{lines}'


# Pictures.


def reliability(found):
    """Reliability of SGD, SAM and bSAM side by side, of the first seed."""
    diagrams = {}
    for subject in (SGD, SAM, BSAM):
        test = first_of(found[subject.variant])['evaluations']['test']
        measured = test[subject.at]
        title = f'{NAMES[subject.variant]}: accuracy {100 * measured["accuracy"]:.1f} %, NLL {measured["nll"]:.2f}'
        diagrams[title] = test['reliability'][subject.at]
    return plots.reliability(diagrams, fewest=10)


@plots.styled
def over_samples(found):
    figure = plots.Figure(figsize=(7.5, 2.7))
    for axes, metric in zip(figure.subplots(1, 3), plots.LABELS, strict=True):
        for subject, style in zip((BSAM, IVON), plots.line_styles(), strict=False):
            group = found[subject.variant]
            curves = [record['evaluations']['test']['samples'] for record in group.values()]
            numbers = [point['testmc'] for point in curves[0]]
            scale, _ = metrics.scale_and_digits(metric)
            heights = scale * np.array([[point[metric] for point in curve] for curve in curves])
            colour = style['color']
            axes.axhline(values(group, metric, 'mean').mean(), color=colour, linestyle='--', linewidth=1)
            errorbars(axes, numbers, heights.T, colour, NAMES[subject.variant])
        axes.set_xscale('log', base=2)
        axes.set_xticks(numbers, numbers)
        axes.set(xlabel='samples', ylabel=plots.LABELS[metric])
    plots.legend_above(figure, axes)
    return figure


def errorbars(axes, positions, groups, colour, label):
    """Mean and standard deviation of each group of runs."""
    deviations = [np.std(group, ddof=1) if len(group) > 1 else 0 for group in groups]
    means = [np.mean(group) for group in groups]
    axes.errorbar(positions, means, deviations, color=colour, marker='o', markersize=4, capsize=2, label=label)


def over_severities(found):
    curves = {}
    for subject in (SGD, SAM, BSAM, IVON):
        corrupted = first_of(found[subject.variant])['evaluations']['corrupted']
        over_corruptions = measures.over_corruptions(corrupted['corruptions'], subject.at)
        curves[str(subject)] = [corrupted[subject.at], *over_corruptions]
    return plots.severities(curves)


@plots.styled
def over_rho(found):
    """bSAM's and SAM's metrics over ρ, relative to the published one."""
    figure = plots.Figure(figsize=(7.5, 2.7))
    for axes, metric in zip(figure.subplots(1, 3), plots.LABELS, strict=True):
        for (method, published), style in zip(PUBLISHED_RHO.items(), plots.line_styles(), strict=False):
            groups = by_rho(found, method)
            heights = [values(group, metric, 'average') for group in groups.values()]
            label = f'{NAMES[method]}, ρ₀ = {published:g}'
            errorbars(axes, [rho / published for rho in groups], heights, style['color'], label)
        axes.set_xscale('log')
        axes.set(xlabel='ρ / ρ₀', ylabel=plots.LABELS[metric])
    plots.legend_above(figure, axes)
    return figure


if __name__ == '__main__':
    main()
