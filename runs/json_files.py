"""Reads and writes JSON files. Writes are atomic. Reads check the content, because a file may be damaged or hostile."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import errors


class RunError(errors.UserError):
    """A run folder that cannot be made, or whose files are missing, damaged or wrong."""


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file atomically. Raises RunError."""
    write_text(path, json.dumps(finite(content), indent=2) + '\n')


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8 atomically. Raises RunError."""
    write_bytes(path, text.encode())


def require_numbers(record: dict, names: Iterable[str]) -> None:
    """Raises a ValueError if a dict lacks a number under one of these names. None stands for NaN or infinity."""
    for name in names:
        if name not in record or not isinstance(record[name], int | float | None) or isinstance(record[name], bool):
            raise ValueError(f'{name} is {str(record.get(name))[:50]}, not a number')


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically: a reader sees the old or the new content, never a part. Raises RunError."""
    try:
        errors.write_bytes(path, content)
    except OSError as error:
        raise RunError(f'{path} cannot be written: {error.strerror}') from error


def require_place(folder: Path, flag: str) -> None:
    """Raises a RunError if files cannot be written to a folder, which need not exist. Writes nothing.

    Args:
        folder: the folder.
        flag: the flag that names the folder, for the message.
    """
    path = Path(os.path.abspath(folder))
    nearest = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f'{flag} {folder}: {nearest} is not a folder, or is read-only: name another folder')


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents, unless they exist. Raises RunError."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise RunError(f'{folder} cannot be made: {error.strerror}') from error


def read_json(path: Path) -> dict:
    """Returns the object of a JSON file that these scripts wrote.

    Raises OSError, or ValueError if the content is not a JSON object or larger than `read_text` allows.
    """
    content = parse(read_text(path))
    if not isinstance(content, dict):
        raise ValueError('it is not a JSON object')
    return content


def read_record(path: Path) -> dict:
    """Returns the object of a JSON file, as `read_json` does. Raises RunError if the file is damaged or unreadable."""
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise RunError(f'{path} is damaged or cannot be read: {errors.reason(error)}') from error


def read_text(path: Path, limit: int = 1 << 24) -> str:
    """Returns the text of a regular UTF-8 file, with or without a byte-order mark. Raises OSError.

    Raises ValueError for other encodings, and for more than `limit` bytes.
    """
    with errors.opened(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f'it is larger than {limit} bytes')
    return content.decode('utf-8-sig')


def parse(text: str) -> Any:
    """Returns the content of a JSON text. Raises ValueError for bad JSON, NaN, infinity and numbers beyond float64."""
    try:
        content = json.loads(text, parse_constant=_number, parse_float=_number, parse_int=_whole_number)
    except RecursionError as error:
        raise ValueError('it is nested too deeply') from error
    _require_shallow(content)
    return content


def _require_shallow(content, depth=50):
    """Raises a ValueError for content that is nested too deeply for recursive functions."""
    if isinstance(content, dict | list):
        if not depth:
            raise ValueError('it is nested too deeply')
        for part in content.values() if isinstance(content, dict) else content:
            _require_shallow(part, depth - 1)


def _number(text):
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f'{text[:30]} is not a finite number')
    return value


def _whole_number(text):
    _number(text)
    return int(text)


def finite(content: Any) -> Any:
    """Returns content with None for NaN and infinity, because JSON has no such numbers."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
