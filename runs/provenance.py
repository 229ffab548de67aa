"""How a figure came about: command, versions, commit, device."""

import contextlib
import os
import platform
import subprocess
import sys
from pathlib import Path


def environment():
    """Versions, git commit and device of this process, for the record."""
    from importlib import metadata

    import jax  # takes most of a second

    packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
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


def _cpu_name():
    """Where Linux tells it; else the architecture."""
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.machine()


def of_command(script, argv=None):
    """How the figures of a script come about: its command, argv or that of this process, and the environment."""
    command = ' '.join(['python', script, *(sys.argv[1:] if argv is None else argv)])
    return {'command': command, 'environment': environment()}


def _git_commit():
    """Returns the commit of the repository that this file is in, None if there is none."""
    top = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    if _git(top, 'rev-parse', '--show-prefix') != '':  # the folder lies inside another repository
        return None
    return _git(top, 'describe', '--always', '--dirty', '--abbrev=40', '--match=')


def _git(folder, *arguments):
    """Returns what a command of git says of a folder, None if it fails."""
    elsewhere = ('GIT_DIR', 'GIT_WORK_TREE', 'GIT_INDEX_FILE', 'GIT_COMMON_DIR', 'GIT_OBJECT_DIRECTORY')
    environment = {name: value for name, value in os.environ.items() if name not in elsewhere}
    try:
        command = ['git', *arguments]
        said = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        return said.stdout.strip()
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None
