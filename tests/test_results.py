"""Tests that results/README.md is what `make results` writes, and that its verdicts follow the rule on the page."""

import re
from pathlib import Path

import numpy as np
import pytest

from studies import report

ROOT = Path(__file__).parent.parent


def test_records_are_what_the_studies_ask_for():
    """After a change of a study, its old records would be on the page with flags that they do not have."""
    study = report.study
    for name, of_name in study.STUDIES.items():
        for variant, seed, path in study.records(name):
            flags = study.flags_of_run(of_name, variant, seed)
            if path.exists():
                study.require_record(path, flags, study.evaluations_of(of_name, flags))


def test_page_is_made_of_the_records():
    page = report.page(**report.all_records())
    assert page == (ROOT / 'results' / 'README.md').read_text(), 'run make results'


def test_findings_quote_the_tables():
    """Every decimal number in the ten findings is in a table of the page."""
    page = (ROOT / 'results' / 'README.md').read_text()
    findings = re.findall(r'^\d+\. (?:.|\n {2,})*', page.partition('\n## ')[0], re.MULTILINE)
    cells = re.findall(r'\d+\.\d+', ''.join(re.findall(r'^\|.*', page, re.MULTILINE)))
    assert len(findings) == 10
    assert set(re.findall(r'\d+\.\d+', ''.join(findings))) <= set(cells)


def test_tables_of_other_pages_are_made_of_the_records():
    shown = []
    for path in report.PAGES_WITH_TABLES:
        page = path.read_text()
        assert report.with_tables(page) == page, 'run make results'
        shown += re.findall(r'<!-- (\w+): made by', page)
    assert sorted(shown) == sorted(report.TABLES)


def record(nll):
    return {'evaluations': {'test': {'mean': {'nll': nll}}}}


@pytest.mark.parametrize(
    ('nlls', 'verdict'),
    [
        ([1.0, 1.1, 1.2], ['3 of 3', 'supported']),
        ([2.0, 2.1, 2.2], ['0 of 3', 'contradicted']),
        ([1.0, 1.1, 1.9], ['2 of 3', 'not supported']),
    ],
)
def test_verdicts(nlls, verdict):
    """The differences to 1.5, 1.59, 1.71 are 0.5 ± 0.01, then −0.5 ± 0.01, then 0.5, 0.49, −0.19 around zero."""
    found = {'sam': dict(enumerate(map(record, nlls))), 'sgd': dict(enumerate(map(record, (1.5, 1.59, 1.71))))}
    claim = report.Claim('', 'nll', report.SAM, report.SGD)
    assert report.tested(claim, found)[2:] == verdict


def test_interval():
    """The half width is t(0.975, 2) = 4.3027 times the standard error 1/√3 of 1, 2, 3."""
    np.testing.assert_allclose(report.interval(np.array([1.0, 2.0, 3.0])), [2, 2 - 2.48414, 2 + 2.48414], rtol=1e-5)


def test_differences_are_of_the_same_seed():
    lower, higher = {0: record(1.0), 2: record(3.0)}, {1: record(9.0), 2: record(3.5)}
    assert report.differences(lower, higher, 'nll', 'mean', 'mean').tolist() == [0.5]
