"""JSON that is written whole, and read with care: it may be damaged, or somebody else's."""

import json
import math

import errors


class RunError(errors.UserError):
    """A run folder that cannot be made, or is not what it should be."""


def write_json(path, content):
    """Writes JSON, whole. Raises RunError."""
    write_text(path, json.dumps(finite(content), indent=2) + '\n')


def write_text(path, text):
    write_bytes(path, text.encode())


def require_numbers(record, names):
    """Raises a ValueError unless a dict has numbers of these names: null stands for what is not finite."""
    for name in names:
        if name not in record or not isinstance(record[name], int | float | None) or isinstance(record[name], bool):
            raise ValueError(f'{name} is {str(record.get(name))[:50]}, no number')


def write_bytes(path, content):
    """Writes a file so that a reader sees the old one or the new one, never a part. Raises RunError."""
    try:
        errors.write_bytes(path, content)
    except OSError as error:
        raise RunError(f'{path} cannot be written: {error.strerror}') from error


def read_json(path):
    """The object of a JSON file of ours. Raises OSError, and ValueError for anything else or what is far too large."""
    content = parse(read_text(path))
    if not isinstance(content, dict):
        raise ValueError('it holds no object')
    return content


def read_record(path):
    """The object of a JSON file of measured figures. Raises RunError."""
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise RunError(f'{path} is damaged or cannot be read: {errors.reason(error)}') from error


def read_text(path, limit=1 << 24):
    """Returns the text of a regular file in UTF-8, with or without a byte order mark. Raises OSError and ValueError."""
    with errors.opened(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f'it is larger than {limit} bytes')
    return content.decode('utf-8-sig')


def parse(text):
    """Parses JSON without NaN, infinity or numbers that no float64 holds. Raises ValueError."""
    try:
        content = json.loads(text, parse_constant=_number, parse_float=_number, parse_int=_whole_number)
    except RecursionError as error:
        raise ValueError('it is nested too deeply') from error
    _require_shallow(content)
    return content


def _require_shallow(content, depth=50):
    """Raises a ValueError for what is nested so deeply that a function which calls itself might not get to its end."""
    if isinstance(content, dict | list):
        if not depth:
            raise ValueError('it is nested too deeply')
        for part in content.values() if isinstance(content, dict) else content:
            _require_shallow(part, depth - 1)


def _number(text):
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f'{text[:30]} is no finite number')
    return value


def _whole_number(text):
    _number(text)
    return int(text)


def finite(content):
    """NaN and infinity as null: JSON has no numbers for them."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
