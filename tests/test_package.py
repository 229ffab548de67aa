"""The wheel: what is in it, what it needs, and that it works where nothing else is installed."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from test_readme import OF_OPTIMIZERS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    command = [
        sys.executable,
        '-m',
        'pip',
        'wheel',
        '--quiet',
        '--no-deps',
        '--no-build-isolation',
        '--wheel-dir',
        folder,
    ]
    subprocess.run([*command, ROOT], check=True, cwd=folder)
    (path,) = folder.glob('*.whl')
    return path


@pytest.fixture(scope='module')
def python(wheel, tmp_path_factory):
    """Returns the Python of an environment that holds the wheel and what it needs, linked, and nothing else."""
    folder = tmp_path_factory.mktemp('environment')
    venv.create(folder, symlinks=True)
    (site_packages,) = folder.glob('lib/python*/site-packages')
    command = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index', '--target', site_packages]
    subprocess.run([*command, wheel], check=True)
    (installed,) = metadata.distributions(name='bayesian-sam', path=[str(site_packages)])
    for name in needed_by(installed, set()):
        distribution = metadata.distribution(name)
        for top in {Path(file).parts[0] for file in distribution.files if '..' not in Path(file).parts}:
            if not (site_packages / top).exists():
                (site_packages / top).symlink_to(distribution.locate_file(top))
    return folder / 'bin' / 'python'


def needed_by(distribution, found):
    """Returns the names of all distributions that a distribution needs, directly or not, without extras."""
    for requirement in map(Requirement, distribution.requires or []):
        name = requirement.name.lower().replace('_', '-')
        if name not in found and (not requirement.marker or requirement.marker.evaluate({'extra': ''})):
            found.add(name)
            needed_by(metadata.distribution(name), found)
    return found


def run(python, *arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith('PYTHON')}
    done = subprocess.run(
        [python, '-I', '-W', 'error', *arguments], env=environment, capture_output=True, text=True, cwd='/'
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_content_and_requirements(wheel):
    """No module of the scripts comes along. The files are the repository's, byte for byte."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if '.dist-info/' not in name]
        assert sorted(names) == ['bayesian_sam/__init__.py', 'bayesian_sam/metrics.py', 'bayesian_sam/py.typed']
        assert archive.read(names[0]) == (ROOT / 'optimizers.py').read_bytes()
        assert archive.read(names[1]) == (ROOT / 'metrics.py').read_bytes()
        (described,) = (name for name in archive.namelist() if name.endswith('METADATA'))
        needed = re.findall(r'^Requires-Dist: ([\w-]+)[^;\n]*$', archive.read(described).decode(), re.MULTILINE)
    assert sorted(needed) == ['jax', 'numpy', 'scipy']
    assert f'version: {wheel.name.split("-")[1]}\n' in (ROOT / 'CITATION.cff').read_text()


def test_environment_holds_only_what_the_wheel_needs(python):
    script = 'import importlib.util as u; print([name for name in {} if u.find_spec(name)])'
    names = [
        'bayesian_sam',
        'jax',
        'numpy',
        'scipy',
        'flax',
        'optax',
        'data',
        'optimizers',
        'metrics',
        'sklearn',
        'PIL',
    ]
    assert run(python, '-c', script.format(names)) == "['bayesian_sam', 'jax', 'numpy', 'scipy']\n"


def test_documented_example(python):
    """The example of docs/optimizers.md finds the line that its data lie on."""
    script = f'{OF_OPTIMIZERS}\nprint(state.params["w"].round(1).tolist(), sampled["b"].shape)'
    assert run(python, '-c', script) == '[1.0, -2.0, 0.5] ()\n'


def test_all_names_and_metrics(python):
    script = (
        'from bayesian_sam import *; from bayesian_sam import metrics; import numpy as np\n'
        'print(sorted(OPTIMIZERS), round(metrics.ece(np.array([[0.9, 0.1], [0.3, 0.7]]), np.array([0, 0])), 6))'
    )
    names = sorted(['sgd', 'sam', 'bsam', 'adam', 'adamw', 'samadam', 'asam', 'swag', 'ivon'])
    assert run(python, '-c', script) == f'{names} 0.4\n'


def test_reference_equations_of_the_wheel(python):
    """Runs the tests of the optimizers on the installed package, in this environment, which has their requirements."""
    (site_packages,) = python.parent.parent.glob('lib/python*/site-packages')
    tests = str(ROOT / 'tests' / 'test_optimizers.py')
    script = (
        f'import sys; sys.path.append({str(site_packages)!r}); import bayesian_sam, pytest\n'
        'sys.modules["optimizers"] = bayesian_sam\n'
        f'sys.exit(pytest.main([{tests!r}, "-v", "-p", "no:xdist", "-k", "golden"]))'
    )
    out = run(sys.executable, '-c', script)
    assert re.search(r'[1-9][0-9]* passed', out) or '100%' in out, out


def test_types_of_an_example(python, tmp_path):
    """A strict static checker accepts the documented example, and sees a wrong argument."""
    typed = 'def loss(params: dict[str, jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:'
    right = OF_OPTIMIZERS.replace('def loss(params, batch):', typed)
    results = []
    for name, text in {'right': right, 'wrong': right.replace('rho=0.01', "rho='0.01'")}.items():
        path = tmp_path / f'{name}.py'
        path.write_text(text)
        command = [sys.executable, '-m', 'mypy', '--strict', '--python-executable', python, path]
        results.append(subprocess.run(command, capture_output=True, text=True, cwd=tmp_path))
    assert results[0].returncode == 0, results[0].stdout
    assert results[1].returncode == 1 and 'incompatible type "str"; expected "float"' in results[1].stdout


def test_notebook(tmp_path):
    """Runs the cells. The kept outputs are the pictures, and metrics close to the metrics of this run."""
    package = tmp_path / 'bayesian_sam'
    package.mkdir()
    shutil.copy(ROOT / 'optimizers.py', package / '__init__.py')
    shutil.copy(ROOT / 'metrics.py', package)
    cells = json.loads((ROOT / 'docs' / 'your_own_loop.ipynb').read_text())['cells']
    cells = [cell for cell in cells if cell['cell_type'] == 'code']
    script = '\n'.join(''.join(cell['source']) for cell in cells)
    environment = os.environ | {'PYTHONPATH': str(tmp_path), 'MPLBACKEND': 'agg', 'XLA_FLAGS': ''}
    done = subprocess.run([sys.executable, '-c', script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outputs = [output for cell in cells for output in cell['outputs']]
    kept = ''.join(''.join(output['text']) for output in outputs if 'text' in output)
    assert sum('image/png' in output.get('data', {}) for output in outputs) == script.count('plt.show()') == 4
    metrics_kept, metrics_now = (
        [
            [float(number) for number in re.findall(r'[\d.]+(?=%|,|$)', line)]
            for line in text.splitlines()
            if 'ECE' in line
        ]
        for text in (kept, done.stdout)
    )
    assert len(metrics_kept) == 3 and all(len(line) == 3 for line in metrics_kept)
    for now, before in zip(metrics_now, metrics_kept, strict=True):  # other CPUs round differently, and bSAM moves fast
        assert abs(now[0] - before[0]) < 6 and abs(now[2] - before[2]) < 0.06
    ece_of_sgd, _, ece_of_samples = (line[2] for line in metrics_now)
    assert ece_of_samples < ece_of_sgd
