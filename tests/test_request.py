"""Requests for evaluations: test.py understands the flags of a Request, and a Request names the files."""

import dataclasses
from pathlib import Path

import pytest

import test as evaluate
from evaluation.request import Request

EVERYTHING = Request(
    split='validation', testmc=(2, 8), testimages=5, bins=10, bnrefresh=3, ood=('digits', 'svhn'), corruptions='',
    checkpoint=7,
)  # fmt: skip
LAPLACE = Request(laplace='full', laplaceprior='training')


@pytest.mark.parametrize('request_', [Request(), EVERYTHING, Request(temperature=True), LAPLACE])
def test_flags_of_a_request_ask_the_same(request_):
    args = evaluate.parse_args(['--resultsfolder=run_0', *request_.arguments()])
    assert Request.of(args) == request_


def test_defaults_are_those_of_test_py():
    assert Request.of(evaluate.parse_args(['--resultsfolder=run_0'])) == Request()
    assert Request().arguments() == []


def test_numbers_of_samples_rise():
    assert Request.of(evaluate.parse_args(['--resultsfolder=x', '--testmc', '8', '2', '8'])).testmc == (2, 8)


def test_files_of_a_request():
    run = Path('run_0')
    assert Request().metrics_file(run) == run / 'metrics.json'
    assert Request(split='validation').metrics_file(run) == run / 'metrics-validation.json'
    assert Request(laplace='diag', checkpoint=5).predictions_file(run) == run / 'predictions-laplace-5.npz'
    assert Request(testmc=(9,), bins=3).plots_folder(run) == run / 'plots'


def test_what_metrics_json_says_of_a_request():
    assert EVERYTHING.recorded() == {
        'split': 'validation', 'testimages': 5, 'testmc': 8, 'bins': 10, 'bnrefresh': 3, 'laplace': False,
    }  # fmt: skip
    assert LAPLACE.recorded()['laplace'] == {'structure': 'full', 'prior': 'training'}
    assert dataclasses.replace(EVERYTHING, testmc=(1, 8)).recorded() == EVERYTHING.recorded()
