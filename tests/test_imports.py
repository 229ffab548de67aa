"""Imports point down only: scripts → evaluation → experiment → runs → data, models → readers, ops → errors."""

import ast
import graphlib

import pytest

from children import ROOT

LAYERS = [
    ('errors', 'optimizers', 'metrics'), ('readers', 'ops'), ('data', 'models'), ('runs',), ('experiment',),
    ('evaluation',), ('train', 'test', 'sweep', 'demo2d', 'setup_tinyimagenet'), ('benchmarks',), ('studies',),
]  # fmt: skip
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}
PATHS = [path for name in HEIGHT for pattern in (f'{name}.py', f'{name}/*.py') for path in sorted(ROOT.glob(pattern))]
FILES = {path: '.'.join(path.relative_to(ROOT).with_suffix('').parts) for path in PATHS}


def imported(path):
    """Returns the project's modules that a file imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {f'{node.module}.{alias.name}' for alias in node.names} | {node.module}
    return found & set(FILES.values())


@pytest.mark.parametrize('path', FILES, ids=FILES.get)
def test_imports_point_down(path):
    own = FILES[path].partition('.')[0]
    heights = {name: HEIGHT[name.partition('.')[0]] for name in imported(path)}
    for name, height in heights.items():
        assert height < HEIGHT[own] or name.startswith(f'{own}.'), name
        assert HEIGHT['train'] != height, f'{name} is a script'
    assert own not in ('optimizers', 'metrics') or not heights


def test_no_circles():
    graphlib.TopologicalSorter({FILES[path]: imported(path) for path in FILES}).prepare()


def test_top_is_small():
    assert len(list(ROOT.glob('*.py'))) <= 11
