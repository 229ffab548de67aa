"""What train.py says before and during a training."""

import time
from types import SimpleNamespace

import pytest

import train
from runs import checkpoints, training_flags
from runs.report import Report, duration


@pytest.fixture
def seconds(monkeypatch):
    """A clock that only moves when a test sets it. Returns its one-element list of seconds."""
    now = [0.0]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    return now


def report(epochs=9, steps=100, progress=checkpoints.Progress()):  # noqa: B008
    args = SimpleNamespace(epochs=epochs - 1, batchsize=50)
    return Report(SimpleNamespace(args=args, steps=steps, split='test', progress=progress))


def test_time_left_after_the_first_steps(seconds, capsys):
    """The first three steps take 30 s. The next ones take 0.5 s each, and 900 - 8 of them are left after step 8."""
    reported = report()
    for step in range(1, 9):
        seconds[0] = 10.0 * step if step <= 3 else 30 + 0.5 * (step - 3)
        reported.step(step, 1.0)
    expected = 'the first step took 30 s with compilation; now 100 images/s, about 7 min to go\n'
    assert capsys.readouterr().out == expected


def test_a_line_every_five_minutes(seconds, capsys):
    """Steps take 10 s, so a line comes every 30 steps. After step 20 of epoch 7 of 9, 280 steps are left."""
    reported = report(progress=checkpoints.Progress(epoch=6, step=20))
    for step in range(21, 101):
        seconds[0] += 10
        reported.step(step, step / 100)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == 'the first step took 30 s with compilation; now 5 images/s, about 46 min to go'
    assert lines == [
        'epoch 7/9, step 56/100: loss 0.5600, 5 images/s, about 41 min to go',
        'epoch 7/9, step 86/100: loss 0.8600, 5 images/s, about 36 min to go',
    ]


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [(0.4, '0 s'), (89, '89 s'), (90, '2 min'), (5399, '90 min'), (5400, '1.5 hours'), (311_040, '3.6 days')],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_what_is_about_to_run(flags_of, capsys):
    """The MLP has 784·500 + 500 + 500·300 + 300 + 300·10 + 10 weights."""
    flags = flags_of(batchsize=10)
    run = train.main(flags)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f'{run}: 40 training and 20 test images'
    assert lines[0] == '  network    mlp, 545,810 weights, float32; mnist images 28×28×1'
    assert lines[1].startswith('  optimizer  bsam --alpha 0.1 --rho 0.1 --beta1 0.9') and lines[1].endswith('N = 4,000')
    assert lines[2] == '  training   2 epochs of 4 steps, 10 images per step'
    assert lines[3].startswith('  devices    ') and lines[4].startswith('compiling')
    train.main([f'--resume={run}', '--epochs=2'])
    assert '3 epochs of 4 steps, 10 images per step; resumed in epoch 2 after step 4\n' in capsys.readouterr().out


@pytest.mark.parametrize(('optim', 'warns'), [('sgd', True), ('bsam', True), ('adam', False), ('swag', False)])
def test_default_learning_rate(optim, warns):
    """No published run used the default of the published scripts."""
    for given in ([], ['--alpha=1']):
        warnings = training_flags.poor_settings(*training_flags.parse([f'--optim={optim}', *given]))
        assert bool(warnings) == (warns and not given)
        assert all(training_flags.PUBLISHED[optim] in warning for warning in warnings)


@pytest.mark.parametrize(
    ('flags', 'hint'),
    [
        (['--lr', '0.1'], '--lr; use --alpha'),
        (['--learning_rate=0.1'], '--learning_rate=0.1; use --alpha'),
        (['--weight-decay', '5e-4'], '--weight-decay; use --priorprec: weight decay × N, so 5e-4 × 50,000'),
        (['--wd=5e-4'], '--wd=5e-4; use --priorprec'),
        (['--momentum', '0.9'], '--momentum; use --beta1'),
        (['--batch-size', '50'], '--batch-size; use --batchsize'),
        (['--epoch', '3'], '--epoch; use --epochs'),
        (['--nothing-like-it'], '--nothing-like-it (see --help)'),
    ],
)
def test_flags_of_other_programs(flags, hint, capsys):
    with pytest.raises(SystemExit) as stop:
        training_flags.parse(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and f'unknown flag: {hint}' in error
