"""The examples of docs/your_own_loop.md, the loops that the diffs of this page start from, and the page's snippets."""

import os
import re
import runpy
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import conftest
import optimizers
from children import ROOT
from conftest import slow_except

EXAMPLES = ROOT / 'docs' / 'examples'
NAMES = ('linen', 'nnx', 'equinox_', 'haiku_')
SECTIONS = dict(re.findall(r'^#+ (.*)\n((?:(?!^#).*\n)*)', (ROOT / 'docs/your_own_loop.md').read_text(), re.MULTILINE))
DIFFS = {
    name: ''.join(re.findall(r'```diff\n(.*?)```', SECTIONS[title], re.DOTALL))
    for name, title in zip(NAMES, ('From Optax to bSAM', 'NNX', 'Equinox', 'Haiku'), strict=True)
}
RECIPES = {
    title: ''.join(re.findall(r'```python\n(.*?)```', text, re.DOTALL))
    for title, text in SECTIONS.items()
    if '```python' in text
}
SHARED = RECIPES.pop('Recipes')


@pytest.fixture(scope='module')
def package(tmp_path_factory):
    """Returns a folder with a package bayesian_sam like the installed one."""
    folder = tmp_path_factory.mktemp('site')
    (folder / 'bayesian_sam').mkdir()
    shutil.copy(ROOT / 'optimizers.py', folder / 'bayesian_sam/__init__.py')
    shutil.copy(ROOT / 'metrics.py', folder / 'bayesian_sam')
    return folder


@pytest.fixture
def importable(monkeypatch):
    monkeypatch.setitem(sys.modules, 'bayesian_sam', optimizers)


def run(package, *arguments, flags=''):
    """Runs Python in a subprocess where warnings are errors, and returns the output."""
    environment = os.environ | {'PYTHONPATH': str(package), 'XLA_FLAGS': f'{conftest.XLA_FLAGS} {flags}'}
    command = [sys.executable, '-W', 'error', *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=package, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def correct(output):
    """Returns the shares of correct test images that a script has printed."""
    return [float(share) / 100 for share in re.findall(r'([\d.]+)% of the test images are correct', output)]


def lines(diff, signs):
    """Returns the text of the lines of a diff that begin with one of some signs. An empty line is context."""
    kept = (line for line in diff.splitlines() if (line or ' ')[0] in signs)
    return ''.join(line[1:] + '\n' for line in kept)


@pytest.mark.parametrize('name', slow_except(NAMES, 'linen', 'equinox_'))
def test_example_learns(package, name):
    """The least accuracy is far above chance, and above a network whose batch statistics stay at their first values."""
    path = EXAMPLES / f'{name}.py'
    assert len(path.read_text().splitlines()) < 40
    mean, average = correct(run(package, path))
    assert mean > 0.95 and average > 0.95


@pytest.mark.parametrize('name', slow_except(NAMES, 'linen'))
def test_diff_leads_from_a_loop_that_learns(importable, tmp_path, capsys, name):
    """Undoes the diff in the example and runs the loop. linen's loop is optax_loop.py."""
    after = (EXAMPLES / f'{name}.py').read_text()
    before = after
    for hunk in re.split(r'^@@\n', DIFFS[name], flags=re.MULTILINE)[1:]:
        assert before.count(lines(hunk, ' +')) == 1
        before = before.replace(lines(hunk, ' +'), lines(hunk, ' -'))
    assert 'bsam' not in before.partition('\n')[2]
    if name == 'linen':
        assert before.splitlines()[1:] == (EXAMPLES / 'optax_loop.py').read_text().splitlines()[1:]
    path = tmp_path / 'loop.py'
    path.write_text(before)
    runpy.run_path(str(path))
    (share,) = correct(capsys.readouterr().out)
    assert share > 0.95


@pytest.fixture
def recipe(importable):
    """Returns a function that runs the snippet under a title, after linen.py up to its loop, and returns the names."""

    def execute(title):
        names = {}
        for text in (before_training(), SHARED, RECIPES[title]):
            exec(text, names)
        return names

    return execute


def before_training():
    return (EXAMPLES / 'linen.py').read_text().partition('for epoch')[0]


def test_every_recipe_is_tested():
    tested = re.findall(r"(?:recipe\(|RECIPES\[)'(.*?)'", (ROOT / 'tests/test_frontends.py').read_text())
    assert set(RECIPES) == set(tested)


def test_schedule(recipe):
    """Step 280 of the schedule has a learning rate of 0."""
    names = recipe('Learning-rate schedules')
    state = names['state']
    assert state.count == 1
    last, _ = jax.jit(names['optimizer'].step)(state._replace(count=jnp.asarray(280)), names['batch'])
    np.testing.assert_array_equal(last.params['Dense_0']['kernel'], state.params['Dense_0']['kernel'])
    assert not np.array_equal(state.params['Dense_0']['kernel'], names['params']['Dense_0']['kernel'])


def test_other_outputs(recipe):
    """A batch that is seen often is predicted well. The outputs and the batch statistics come from every step."""
    names = recipe('Other outputs of the loss')
    state, step = names['state'], jax.jit(names['optimizer'].step)
    mean = state.batch_stats['stats']['batch_stats']['BatchNorm_0']['mean']
    for _ in range(30):
        state, _ = step(state, names['batch'])
    assert names['accuracy'] <= 0.6 and state.batch_stats['accuracy'] == 1
    assert not np.allclose(state.batch_stats['stats']['batch_stats']['BatchNorm_0']['mean'], mean)


def test_dropout(recipe):
    """Of the keys, the first of every sub-batch counts. Ten sub-batches have five examples each."""
    names = recipe('Dropout')
    start = names['optimizer'].init(names['dropout_params'], key=jax.random.key(1))
    step, others = jax.jit(names['optimizer'].step), jax.random.split(jax.random.key(3), 50)

    def value(new):  # with new keys at some examples
        return step(
            start, (*names['batch'], jnp.where(jnp.isin(jnp.arange(50), np.array(new)), others, names['keys']))
        )[1]

    assert value([-1]) == value([1, 2, 3, 4, 49]) == names['value']
    assert len({float(value([i])) for i in (0, 5, 45)} | {float(names['value'])}) == 4


def test_bfloat16(recipe):
    state = recipe('bfloat16 weights')['state']
    for name, dtype in {'params': jnp.bfloat16, 'momentum': jnp.float32, 'precision': jnp.float32}.items():
        assert {leaf.dtype for leaf in jax.tree.leaves(getattr(state, name))} == {jnp.dtype(dtype)}


def test_several_seeds(recipe):
    """Each network is trained as it would be alone."""
    names = recipe('Several seeds at once')
    for key, value in zip(jax.random.split(jax.random.key(0), 3), names['values'], strict=True):
        _, alone = jax.jit(names['optimizer'].step)(names['init'](key), names['batch'])
        np.testing.assert_allclose(value, alone, rtol=1e-5)
    assert len(set(names['values'].tolist())) == 3


def test_many_steps(recipe):
    """The epoch equals 28 calls."""
    names = recipe('Many steps in one call')
    state = names['optimizer'].init(names['params'], names['batch_stats'], key=jax.random.key(1))
    values = []
    for i in range(28):
        state, value = jax.jit(names['optimizer'].step)(state, jax.tree.map(lambda a: a[i], names['epoch']))  # noqa: B023
        values.append(value)
    np.testing.assert_allclose(names['values'], values, rtol=1e-3)
    assert values[-1] < values[0] / 2


def test_several_devices(package):
    """Two virtual devices compute what one does, and communicate once."""
    asked = """
with jax.set_mesh(mesh):
    text = jax.jit(optimizer.step).lower(state, sharded).compile().as_text()
_, alone = jax.jit(optimizer.step)(optimizer.init(params, batch_stats, key=jax.random.key(1)), batch)
print(len(jax.devices()), value, alone, text.count(' all-reduce('), text.count(' all-gather('))
"""
    script = before_training() + SHARED + RECIPES['Several devices'] + asked
    output = run(package, '-c', script, flags='--xla_force_host_platform_device_count=2')
    devices, value, alone, reductions, gatherings = map(float, output.split())
    assert (devices, reductions, gatherings) == (2, 1, 0)
    assert value == pytest.approx(alone, rel=1e-5)


def test_clipping(recipe):
    """A long gradient gets the length 1 and keeps its direction."""
    names = recipe('Gradient clipping')
    arguments = names['params'], names['batch_stats'], names['batch']
    (full, _), (clipped, _) = (jax.grad(names[name], has_aux=True)(*arguments) for name in ('loss', 'clipped_loss'))
    norm = optax.tree.norm(full)
    assert norm > 1.5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b / norm, rtol=1e-4, atol=1e-7), clipped, full)
    state = names['optimizer'].init(*arguments[:2], key=jax.random.key(1))
    assert np.isfinite(jax.jit(names['optimizer'].step)(state, names['batch'])[1])
