"""The provenance of results: command, versions, git commit, device."""

import contextlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax

import errors
from runs import folders, hosts


def environment() -> dict:
    """Returns the versions, the git commit and the device of this process."""
    packages = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'scipy')
    device = jax.devices()[0]
    return {
        'python': platform.python_version(),
        'versions': {package: metadata.version(package) for package in packages},
        'matmul_precision': jax.config.jax_default_matmul_precision,
        'xla_flags': os.environ.get('XLA_FLAGS', ''),
        'git_commit': _git_commit(),
        'device': f'{device.platform}: {device.device_kind}, {os.cpu_count()} CPU cores',
        'cpu': _cpu_name(),
    }


def require_same_precision(run: Path, before: dict) -> None:
    """Raises a RunError if the precision of matrix products has changed since the run began.

    Warns if XLA_FLAGS have changed. A setting that the configuration lacks counts as unchanged.

    Args:
        run: the run folder, for the messages.
        before: the run's configuration.
    """
    now = environment()
    precision, flags = before.get('matmul_precision'), before.get('xla_flags', now['xla_flags'])
    if 'matmul_precision' in before and precision != now['matmul_precision']:
        begun, given = precision or 'unset', now['matmul_precision'] or 'unset'
        what = f'JAX_DEFAULT_MATMUL_PRECISION is {given}, but {run} began with {begun}'
        raise folders.RunError(f'{what}: set the same precision')
    if flags != now['xla_flags'] and hosts.is_first():
        what = f'XLA_FLAGS is {now["xla_flags"]!r}, but {run} began with {flags!r}'
        print(f'train.py: warning: {errors.printable(what)}: results may differ by rounding', file=sys.stderr)


def _cpu_name():
    """Returns the name of the CPU from Linux, or the architecture on other systems."""
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.machine()


def of_command(script: str, argv: list[str] | None = None) -> dict:
    """Returns the command and the environment of a script's results. argv: None means this process's arguments."""
    command = ' '.join(['python', script, *(sys.argv[1:] if argv is None else argv)])
    return {'command': command, 'environment': environment()}


def _git_commit():
    """Returns the commit of the repository that this file is in, or None without a repository."""
    top = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    if _git(top, 'rev-parse', '--show-prefix') != '':  # the folder lies inside another repository
        return None
    return _git(top, 'describe', '--always', '--dirty', '--abbrev=40', '--match=')


def _git(folder, *arguments):
    """Returns the output of a git command in a folder, or None if the command fails."""
    elsewhere = ('GIT_DIR', 'GIT_WORK_TREE', 'GIT_INDEX_FILE', 'GIT_COMMON_DIR', 'GIT_OBJECT_DIRECTORY')
    environment = {name: value for name, value in os.environ.items() if name not in elsewhere}
    try:
        command = ['git', *arguments]
        said = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        return said.stdout.strip()
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None
