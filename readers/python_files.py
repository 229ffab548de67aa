"""Loads a user's own data sets and networks: FILE.py:NAME is the object called NAME in a Python file.

A file runs only if the command line names it. The files of a run folder also hold such names, but a run folder can come
from anybody.
"""

import contextlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import errors


class CodeError(errors.UserError):
    """A user's Python file is missing, not allowed to run, or wrong."""


_allowed = {}  # {file name: path}


def is_name(name: str) -> bool:
    """Returns whether a name has the form FILE.py:NAME."""
    path, _, attribute = name.rpartition(':')
    return path.endswith('.py') and attribute.isidentifier()


def files_of(names: Iterable[str]) -> list[str]:
    """Returns the files of all names that have the form FILE.py:NAME."""
    return list(dict.fromkeys(name.rpartition(':')[0] for name in names if is_name(name)))


def allow(paths: Iterable[str | Path]) -> None:
    """Allows `load` to run these files. A run folder that names another file of the same file name gets this one."""
    _allowed.update({os.path.basename(path): os.path.abspath(path) for path in paths})


def load(name: str) -> Any:
    """Returns the object NAME of FILE.py. Runs the file once per process. Raises CodeError."""
    path, _, attribute = name.rpartition(':')
    allowed = _allowed.get(os.path.basename(path))
    if allowed is None:
        raise CodeError(f'{name} is Python code that a run folder names: if you trust it, add --code {path}')
    module = _module(allowed)
    if not hasattr(module, attribute):
        raise CodeError(f'{allowed} defines no {attribute}')
    return getattr(module, attribute)


def _module(path):
    name = f'own_{Path(path).stem}'
    held = sys.modules.get(name)
    if held is not None and held.__file__ == path:
        return held
    if not os.path.isfile(path):
        raise CodeError(f'{path} is not a file: name the Python file that defines your data or network')
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    folder = os.path.dirname(path)
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that modules of the scripts come first
    try:
        with one_error(path):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def one_error(name: str) -> Iterator[None]:
    """Turns whatever a user's code raises into a CodeError that names the file, the line and the error.

    Args:
        name: FILE.py or FILE.py:NAME.
    """
    try:
        yield
    except errors.UserError:
        raise
    except Exception as error:
        path = name.rpartition(':')[0] if is_name(name) else name
        path = _allowed.get(os.path.basename(path), path)
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        lines += [error.lineno] if isinstance(error, SyntaxError) and error.filename == path else []
        where = f'{path}, line {lines[-1]}' if lines else name
        raise CodeError(f'{where}: {type(error).__name__}: {errors.first_line(error)}') from error
