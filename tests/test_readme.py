"""What the README and the other pages show works."""

import json
import re
import shlex
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import optimizers
import sweep
import test as evaluate
import train
from runs import training_flags

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'benchmarks/README.md', ROOT / 'results/README.md', *ROOT.glob('docs/*.md')]
README = (ROOT / 'README.md').read_text()
OF_OPTIMIZERS, OF_A_RUN = re.findall(r'```python\n(.*?)```', (ROOT / 'docs/optimizers.md').read_text(), re.DOTALL)

# The flags of the published runs, all written out.
PUBLISHED = (
    '--optim sgd --alpha 0.03 --beta1 0.9 --priorprec 25',
    '--optim sam --alpha 0.03 --beta1 0.9 --priorprec 25 --rho 0.05 --batchsplit 8',
    '--optim bsam --alpha 0.5 --beta1 0.9 --beta2 0.999 --priorprec 40 --rho 0.01 --batchsplit 8 --dafactor 4',
    '--optim bsam --alpha 0.5 --beta1 0.9 --beta2 0.999 --priorprec 40 --rho 0.01 --batchsplit 8 --dafactor 4',
    '--optim sgd --alpha 0.1 --beta1 0.95 --priorprec 20',
    '--optim sam --alpha 0.1 --beta1 0.95 --priorprec 20 --rho 0.01 --batchsplit 8',
    '--optim bsam --alpha 0.25 --beta1 0.9 --beta2 0.999 --priorprec 25 --rho 5e-5 --batchsplit 8',
)


def test_example_of_a_trained_run(flags_of):
    """Probabilities, which depend on the samples."""
    run = train.main(flags_of())
    names = {}
    exec(OF_A_RUN.replace('results/digits_lenet/bsam/run_0', str(run)), names)
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), np.uint8)
    average = names['average'](images, 2)
    np.testing.assert_allclose(average.sum(axis=1), np.ones(3), rtol=1e-6)
    assert average.shape == (3, 10) and not np.array_equal(average, names['average'](images, 2, seed=1))


def test_example_of_the_optimizers(monkeypatch):
    """The example runs, and finds the line that its data lie on."""
    monkeypatch.setitem(sys.modules, 'bayesian_sam', optimizers)
    names = {}
    exec(OF_OPTIMIZERS, names)
    np.testing.assert_allclose(names['state'].params['w'], [1.0, -2.0, 0.5], atol=0.02)
    np.testing.assert_allclose(names['state'].params['b'], 3.0, atol=0.02)
    assert jax.tree.map(np.shape, names['sampled']) == {'w': (3,), 'b': ()}


def test_published_settings():
    """README's table leaves out the defaults. The warning about --alpha names the same settings."""
    shown = re.findall(r'\| `(--optim [^`]*)` *\|', README)
    assert [flags_of_a_run(flags) for flags in shown] == [flags_of_a_run(flags) for flags in PUBLISHED]
    for flags, (optim, warned) in zip(shown, training_flags.PUBLISHED.items(), strict=False):
        assert flags == f'--optim {optim} {warned}'


def flags_of_a_run(text):
    return training_flags.parse_args(shlex.split(text))


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_understood(page):
    """Every command of train.py, test.py and sweep.py that stands in a block of code."""
    blocks = '\n'.join(re.findall(r'^    .*|^```(?!python)[^`]*```', page.read_text(), re.MULTILINE))
    commands = re.findall(r'python (train|test|sweep)\.py +([^\n]*)', blocks.replace('\\\n', ' '))
    parse = {'train': training_flags.parse, 'test': evaluate.create_parser().parse, 'sweep': sweep.parse_args}
    for script, text in commands:
        flags = re.split(r' [&|>;]|" &', text)[0].replace('$i', '0').replace('$SLURM_ARRAY_TASK_ID', '0')
        parse[script](shlex.split(flags, comments=True))


def test_figures_in_the_text_are_those_of_the_records():
    """The page of performance has the times and rates of the records. A training is 181 epochs of 250 steps."""
    speed, start = (json.loads((ROOT / 'results' / f'{name}.json').read_text()) for name in ('benchmark', 'start'))
    large, small = of_models(speed, 'seconds')
    machine, text = speed['machine'], ' '.join((ROOT / 'docs/performance.md').read_text().split())
    for shown in (
        f'`{speed["command"]}`',
        f'reached {machine["matrix_gflops"]:.0f} GFLOP/s, a copy {machine["copy_gbytes_per_second"]:.0f} GB/s',
        f'ResNet-20, 181 epochs | {181 * 250 * small["bsam"] / 3600:.0f} hours*',
        f'ResNet-18, 181 epochs, as published | {181 * 250 * large["bsam"] / 86400:.1f} days*',
        f'probabilities take {speed["metrics"]["all_seconds"]:.2f} s',
        'first start, which compiles | {:.1f} s | {:.1f} s'.format(*of_models(start, 'first_seconds')),
        'from the compile cache | {:.1f} s | {:.1f} s'.format(*of_models(start, 'second_seconds')),
        f'answers in {start["help_seconds"]:.2f} s (`{start["command"]}`',
    ):
        assert shown in text, shown


def of_models(record, name):
    return record['resnet18'][name], record['resnet20'][name]


def test_tests_that_are_named_exist():
    tests = ''.join(path.read_text() for path in Path(__file__).parent.glob('test_*.py'))
    named = {name for page in PAGES for name in re.findall(r'`(test_[^_`]+_\w+)`', page.read_text())}
    assert named and named <= set(re.findall(r'^def (test_\w+)\(', tests, re.MULTILINE))


def test_files_are_all_listed():
    listed = set(re.findall(r'^\|.*`(\w+\.py)` .*\|', README, re.MULTILINE))
    assert listed == {path.name for path in ROOT.glob('*.py')}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Every link names a file that exists, and a heading that the page has."""
    links = re.findall(r'\]\(((?!https?:)[^)]*)\)', page.read_text())
    assert links
    for link in links:
        name, _, anchor = link.partition('#')
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def anchors(page):
    """Returns the anchors that GitHub makes for a page's headings."""
    headings = re.findall(r'^#+ (.*)', page.read_text(), re.MULTILINE)
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}
