"""Training and evaluation on several devices are those on one, to rounding; on eight virtual ones, in a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import devices
import train

ROOT = Path(__file__).parent.parent

# Trains and evaluates every optimizer on 1 and on 8 devices; prints the relative differences of weights, batch
# statistics and averaged NLL as JSON.
SCRIPT = """if True:
    import contextlib, io, json, sys
    import jax, numpy as np
    sys.path[:0] = ['tests', '.']
    import conftest, models, test, train
    models.MODELS |= {'resnet18': conftest.SmallResNet, 'resnet20': conftest.SmallResNet20}

    def run(optim, model, number):
        split = [] if optim in ('sgd', 'adam', 'adamw', 'swag') else ['--batchsplit=8']
        folder, data = sys.argv[1:]
        flags = [f'--optim={optim}', f'--model={model}', f'--devices={number}', *split, '--alpha=0.01']
        flags += ['--dataset=mnist', '--batchsize=16', '--epochs=1', '--warmup=0', '--dafactor=10']
        flags += [f'--datasetfolder={data}', f'--resultsfolder={folder}/{number}', '--compilecache=off']
        with contextlib.redirect_stdout(io.StringIO()):
            run = train.main(flags)
            nll = 1.0
            if optim == 'bsam':
                test.main([f'--resultsfolder={run}', '--testmc=2', '--testbatchsize=8', f'--devices={number}'])
                nll = json.loads((run / 'metrics.json').read_text())['average']['nll']
        _, state, _ = conftest.restore(run)
        return [np.concatenate([np.ravel(x) for x in jax.tree.leaves(part)] or [[1.0]])
                for part in (state.params, state.batch_stats, nll)]

    def difference(one, other):
        return float(np.linalg.norm(one - other) / np.linalg.norm(one))

    assert len(jax.devices()) == 8
    cases = [(optim, 'resnet20') for optim in train.OPTIMIZERS] + [(o, 'resnet18') for o in ('sgd', 'sam', 'bsam')]
    print(json.dumps({
        f'{optim} {model}': [difference(*pair) for pair in zip(*(run(optim, model, n) for n in (1, 8)))]
        for optim, model in cases
    }))
"""


def test_eight_devices_train_as_one(tmp_path):
    """20 steps: weights and batch statistics within 1e-5; both kinds of normalisation."""
    import archives

    archives.write_idx_set(tmp_path / 'data' / 'mnist', num_train=160, num_test=20)
    environment = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=8', 'JAX_PLATFORMS': 'cpu'}
    command = [sys.executable, '-c', SCRIPT, tmp_path / 'runs', tmp_path / 'data']
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    differences = json.loads(done.stdout)
    assert len(differences) == len(train.OPTIMIZERS) + 3
    for case, (weights, batch_stats, nll) in differences.items():
        assert weights < 1e-5 and batch_stats < 1e-5 and nll < 1e-5, (case, weights, batch_stats, nll)
    assert differences['bsam resnet20'][0] > 0  # else all ran on one


@pytest.mark.parametrize(
    ('number', 'offer'), [(12, '--batchsize 8 or --batchsize 16'), (3, '--batchsize 8, or --devices 1')]
)
def test_shares_that_are_not_equal(number, offer):
    mesh = jax.sharding.AbstractMesh((8,), (devices.AXIS,))
    with pytest.raises(
        devices.DeviceError, match=f'--batchsize {number} cannot be shared out over 8 devices: take {offer}'
    ):
        devices.require_divisible('--batchsize', number, mesh)
    devices.require_divisible('--batchsize', 24, mesh)


def test_devices_that_are_not_there(flags_of, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(flags_of(devices=64))
    assert stop.value.code == 2 and '--devices 64: there are' in capsys.readouterr().err
