"""Runs of every released format stay readable: evaluation gives the same metrics, and training can resume."""

import json
import shutil

import numpy as np
import pytest

import models
import record_format
import test as evaluate
import train
from conftest import read_log
from runs import folders


@pytest.fixture(params=sorted(path.name for path in record_format.RUNS.iterdir()))
def run(request, tmp_path, monkeypatch):
    """A copy of a recorded run, one per format."""
    monkeypatch.setitem(models.MODELS, 'mlp', record_format.FourFeatures)
    return shutil.copytree(record_format.RUNS / request.param, tmp_path / 'run_0')


def test_a_run_of_every_readable_format_is_recorded():
    recorded = {path.name for path in record_format.RUNS.iterdir()}
    assert recorded == {f'format_{number}' for number in folders.READABLE} and folders.FORMAT in folders.READABLE


def test_evaluation_of_an_older_run(run, capsys):
    before = json.loads((run / 'metrics.json').read_text())
    (run / 'metrics.json').unlink()
    evaluate.main([f'--resultsfolder={run}', '--testmc=3', '--testimages=40'])
    after = json.loads((run / 'metrics.json').read_text())
    for at in ('mean', 'average'):
        for name in ('accuracy', 'nll', 'ece'):
            np.testing.assert_allclose(after[at][name], before[at][name], rtol=1e-4)


def test_an_older_run_is_resumed(run):
    before = read_log(run)
    train.main([f'--resume={run}', '--epochs=8'])
    for old, new in zip(before[:-1], read_log(run), strict=False):  # the last epoch is evaluated again
        assert new == old
    assert len(read_log(run)) == len(before) + 1 and before[-1].items() - read_log(run)[-2].items() == set()
    assert folders.read_config(run)['format'] == folders.FORMAT


@pytest.mark.parametrize('number', [None, folders.FORMAT + 1])
def test_a_run_of_another_format_is_refused(number, run, capsys):
    config = folders.read_config(run) | {'format': number}
    (run / 'config.json').write_text(json.dumps(config | {'sha256': folders._digest(config)}))
    with pytest.raises(SystemExit) as stop:
        evaluate.main([f'--resultsfolder={run}'])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f'has format {number}, but this version reads format {folders.FORMAT}' in error
