"""What the README and the other pages show works."""

import json
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

import optimizers
import train
from runs import training_flags

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ('README.md', 'benchmarks/README.md', 'docs/hosts.md', 'results/README.md')]
README = PAGES[0].read_text()
OF_A_RUN, OF_OPTIMIZERS = re.findall(r'```python\n(.*?)```', README, re.DOTALL)


def test_example_of_a_trained_run(flags_of):
    """Probabilities, which depend on the samples."""
    run = train.main(flags_of())
    names = {}
    exec(OF_A_RUN.replace('results/digits_lenet/bsam/run_0', str(run)), names)
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), np.uint8)
    average = names['average'](images, 2)
    np.testing.assert_allclose(average.sum(axis=1), np.ones(3), rtol=1e-6)
    assert average.shape == (3, 10) and not np.array_equal(average, names['average'](images, 2, seed=1))


def test_example_of_the_optimizers():
    """Runs, and finds the line that its data lie on."""
    names = {}
    exec(OF_OPTIMIZERS, names)
    np.testing.assert_allclose(names['state'].params['w'], [1.0, -2.0, 0.5], atol=0.02)
    np.testing.assert_allclose(names['state'].params['b'], 3.0, atol=0.02)
    assert jax.tree.map(np.shape, names['sampled']) == {'w': (3,), 'b': ()}


def test_published_commands_are_understood():
    """Every set of flags in a table, and every whole command of train.py."""
    tables = re.findall(r'\| `(--[^`]*--optim [^`]*|--optim [^`]*)` \|', README)
    whole = re.findall(r'python train\.py (--dataset [^`\n]*)', README.replace('\\\n', ' '))
    assert len(tables) == 7 and len(whole) == 4
    for flags in [*tables, *whole]:
        assert training_flags.parse_args(shlex.split(flags)).optim in optimizers.OPTIMIZERS


def test_figures_in_the_text_are_those_of_the_records():
    """Of times and rates on CPUs; a training is 181 epochs of 250 steps."""
    speed, start = (json.loads((ROOT / 'results' / f'{name}.json').read_text()) for name in ('benchmark', 'start'))
    large, small = of_models(speed, 'seconds')
    machine, text = speed['machine'], ' '.join(README.split())
    for shown in (
        f'`{speed["command"]}`',
        f'reached {machine["matrix_gflops"]:.0f} GFLOP/s, a copy {machine["copy_gbytes_per_second"]:.0f} GB/s',
        f'ResNet-20, 181 epochs | {181 * 250 * small["bsam"] / 3600:.0f} hours*',
        f'ResNet-18, 181 epochs, as published | {181 * 250 * large["bsam"] / 86400:.1f} days*',
        f'probabilities take {speed["metrics"]["all_seconds"]:.2f} s',
        '{:.1f} s with ResNet-18 and {:.1f} s with ResNet-20'.format(*of_models(start, 'first_seconds')),
        'and {:.1f} s and {:.1f} s the second time'.format(*of_models(start, 'second_seconds')),
        f'answers in {start["help_seconds"]:.2f} s (`{start["command"]}`',
    ):
        assert shown in text, shown


def of_models(record, name):
    return record['resnet18'][name], record['resnet20'][name]


def test_tests_that_are_named_exist():
    tests = ''.join(path.read_text() for path in Path(__file__).parent.glob('test_*.py'))
    named = {name for page in PAGES for name in re.findall(r'`(test_\w+)`', page.read_text())}
    assert named and named <= set(re.findall(r'^def (test_\w+)\(', tests, re.MULTILINE))


def test_files_are_all_listed():
    listed = set(re.findall(r'^    (\w+\.py) ', README, re.MULTILINE))
    assert listed == {path.name for path in ROOT.glob('*.py')}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.parent.name)
def test_links_lead_somewhere(page):
    """To files that are there, and to headings of pages."""
    links = re.findall(r'\]\(((?!https?:)[^)]*)\)', page.read_text())
    assert links
    for link in links:
        name, _, anchor = link.partition('#')
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def anchors(page):
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r'^#+ (.*)', page.read_text(), re.MULTILINE)
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}
