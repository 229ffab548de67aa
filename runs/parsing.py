"""The command line of all scripts: a parser, types of flags, and flags that several scripts share."""

import argparse
import contextlib
import difflib
import math
import os
import pathlib
import re
from collections.abc import Callable, Collection
from typing import Any, NoReturn

import errors


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that explains defaults in --help and reports an error in one line.

    Args:
        description: the script's docstring. --help shows its first line at the top and the other lines at the end. None
            shows nothing, because `python -OO` removes docstrings.
        exits: whether an error ends the script with status 2. Otherwise an error raises a ValueError.
        habits: {flag of other programs: what to give instead}, such as {'lr': '--alpha'}. The key '' is for an argument
            without a flag.
    """

    def __init__(self, description: str | None, exits: bool = True, habits: dict[str, str] | None = None) -> None:
        first, _, rest = (description or '').partition('\n')
        super().__init__(description=first, epilog=rest, formatter_class=_HelpFormatter, allow_abbrev=False)
        self._exits, self._habits = exits, habits or {}

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        """Returns the flags of a command line. An unknown flag is an error that names a similar flag."""
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            is_flag = unknown[0].startswith('-')
            similar = self._similar(unknown[0].split('=')[0]) if is_flag else self._habits.get('')
            self.error(
                f'unknown {"flag" if is_flag else "argument"}: {unknown[0]}' + (f'; use {similar}' if similar else '')
            )
        return namespace

    def _similar(self, flag):
        own = {flag.lstrip('-'): flag for flag in self._option_string_actions}
        name = flag.lstrip('-').lower().replace('-', '').replace('_', '')
        habits = {habit.replace('-', ''): own for habit, own in self._habits.items()}
        near = difflib.get_close_matches(name, own, n=1)
        return habits.get(name) or own.get(name) or (own[near[0]] if near else None)

    def error(self, message: str) -> NoReturn:
        """Ends the script with a message and status 2, or raises a ValueError."""
        if not self._exits:
            raise ValueError(message)
        self.exit(2, f'{self.prog}: error: {errors.printable(message)} (see --help)\n')

    def parse(self, argv: list[str] | None = None) -> tuple[argparse.Namespace, dict]:
        """Returns all flags of a command line, and {name: value} of the flags that the command line gives."""
        unset = object()
        actions = [action for action in self._actions if action.dest != 'help']
        args = self.parse_args(argv, argparse.Namespace(**{action.dest: unset for action in actions}))
        given = {name: value for name, value in vars(args).items() if value is not unset}
        return argparse.Namespace(**{action.dest: action.default for action in actions} | given), given

    def is_switch(self, name: str) -> bool:
        """Returns whether a flag takes no value."""
        return any(action.dest == name and action.nargs == 0 for action in self._actions)

    def takes_whole_numbers(self, name: str) -> bool:
        """Returns whether a flag has a type from `integer`."""
        return any(action.dest == name and hasattr(action.type, 'whole') for action in self._actions)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the placeholder of each flag type instead of the flag's name in capitals."""

    def _get_help_string(self, action):
        is_unset = action.default in (None, []) or action.default is False
        return action.help if is_unset or '(default:' in action.help else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action):
        return getattr(action.type, 'metavar', None) or super()._get_default_metavar_for_optional(action)


def choice(
    names: Collection[str], others: dict[str, Callable[[str], str | None]] | None = None
) -> Callable[[str], str]:
    """Returns a flag type: one of some names.

    Args:
        names: the names, which may be given in upper or lower case.
        others: {how messages show it: function}. The function returns the value of a valid text, otherwise None.
    """

    def choose(text):
        if text.lower() in names:
            return text.lower()
        for read in (others or {}).values():
            if (value := read(text)) is not None:
                return value
        near = difflib.get_close_matches(text.lower(), names, n=1)
        hint = f'did you mean {near[0]}? ' if near else ''
        raise argparse.ArgumentTypeError(f'unknown: {text!r}; {hint}choose from {", ".join(listed)}')

    listed = [*names, *(others or ())]
    choose.metavar = f'{{{",".join(listed)}}}'
    return choose


def matching(pattern: str) -> Callable[[str], str | None]:
    """Returns a function for `choice` that accepts the texts of a regular expression, in upper or lower case."""
    return lambda text: text.lower() if re.fullmatch(pattern, text.lower()) else None


def after(prefix: str) -> Callable[[str], str | None]:
    """Returns a function for `choice` that accepts PREFIXPATH and makes the path absolute."""

    def read(text):
        path = text.removeprefix(prefix)
        return prefix + os.path.abspath(folder(path)) if text.startswith(prefix) else None

    return read


def python_name(text: str) -> str | None:
    """Accepts FILE.py:NAME for `choice`, and makes the path absolute."""
    path, _, name = text.rpartition(':')
    return f'{os.path.abspath(folder(path))}:{name}' if path.endswith('.py') and name.isidentifier() else None


def add_compilecache(parser: argparse._ActionsContainer) -> None:
    """Adds --compilecache, the folder where XLA keeps compiled functions for the next start."""
    help = 'folder that keeps compiled functions, so that the next start is fast; "off" keeps none'
    parser.add_argument('--compilecache', type=_folder_or_off, default=_default_compilecache(), help=help)


def _default_compilecache():
    """Returns the folder that JAX's own variables name, else a folder in the user's cache, else 'off'."""
    if os.environ.get('JAX_ENABLE_COMPILATION_CACHE', '1').lower() in ('0', 'false', 'f', 'no', 'n', 'off'):
        return 'off'
    if os.environ.get('JAX_COMPILATION_CACHE_DIR'):
        return os.path.abspath(os.path.expanduser(os.environ['JAX_COMPILATION_CACHE_DIR']))
    caches = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return os.path.join(caches, 'bayesian-sam') if os.path.isabs(caches) else 'off'


def _folder_or_off(text):
    """Reads a flag's value: 'off', or the path of a folder, which is returned as an absolute path."""
    if not text:
        raise argparse.ArgumentTypeError("'' is not a folder: name one, or give off")
    return text if text == 'off' else os.path.abspath(folder(text))


_folder_or_off.metavar = 'FOLDER'


def folder(text: str) -> str:
    """Reads a flag's value: the path of a folder or file. Replaces ~ by the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("'' is not a path: name a folder or file")
    if '\0' in text:
        raise argparse.ArgumentTypeError(f'{errors.printable(text)!r} is not a path: it contains a NUL character')
    expanded = os.path.expanduser(text)
    if text.startswith('~') and not os.path.isabs(expanded):
        raise argparse.ArgumentTypeError(f'{text!r}: this home folder is unknown: give the full path')
    return expanded


folder.metavar = 'FOLDER'


def path(text: str) -> pathlib.Path:
    """Reads a flag's value as `folder` does, and returns a pathlib.Path."""
    return pathlib.Path(folder(text))


def add_coordinator(parser: argparse._ActionsContainer) -> None:
    """Adds --coordinator, --processes, --processid and --jointimeout, which join processes on several hosts."""
    add = parser.add_argument
    help = 'joins processes on several hosts: the address of process 0, or auto to ask Slurm, Open MPI or Kubernetes'
    add('--coordinator', type=_address, metavar='HOST:PORT', help=help)
    add('--processes', type=integer(1), metavar='N', help='with HOST:PORT: the number of processes')
    add('--processid', type=integer(0), metavar='I', help='with HOST:PORT: the number of this process, from 0')
    help = 'how long processes wait for each other at start-up (default: 60); raise it if hosts become ready one by one'
    add('--jointimeout', type=integer(1), metavar='SECONDS', help=help)


def add_code(parser: argparse._ActionsContainer) -> None:
    """Adds --code, which allows files of a run to be executed."""
    help = 'your own Python files that a run names in FILE.py:CLASS, because a run folder alone executes nothing'
    parser.add_argument('--code', type=folder, nargs='+', default=[], metavar='FILE.py', help=help)


def add_jobs(parser: argparse._ActionsContainer) -> None:
    """Adds --jobs, the number of runs at once."""
    parser.add_argument('--jobs', type=integer(1), help='runs at once (default: one per GPU, or one without a GPU)')


def _address(text):
    """Reads a flag's value: HOST:PORT or auto."""
    host, _, port = text.rpartition(':')
    if text != 'auto' and not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise argparse.ArgumentTypeError(f'{text!r} is neither HOST:PORT nor auto')
    return text


def require_whole_address(parser: Parser, args: argparse.Namespace) -> None:
    """Ends the script if the flags of add_coordinator cannot be combined."""
    numbers = (args.processes, args.processid)
    if args.jointimeout and not args.coordinator:
        parser.error('--jointimeout needs --coordinator')
    if args.coordinator in (None, 'auto'):
        if numbers != (None, None):
            parser.error('--processes and --processid need --coordinator HOST:PORT')
    elif None in numbers or args.processid >= args.processes:
        parser.error('--coordinator HOST:PORT needs --processes N, and a --processid from 0 to N - 1')


def integer(minimum: int, below: int = 2**31) -> Callable[[str], int]:
    """Returns a flag type: whole numbers >= `minimum` and < `below`, by default numbers that an int32 holds."""

    def parse(text):
        value = None
        with contextlib.suppress(ValueError):
            value = int(text)
        if value is not None and minimum <= value < below:
            return value
        bound = f' and less than {below}' if below < 2**31 or (value or 0) >= below else ''
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of {minimum} or more{bound}')

    parse.whole, parse.metavar = True, 'N'
    return parse


def number(above: float = -math.inf, minimum: float = -math.inf, below: float = math.inf) -> Callable[[str], float]:
    """Returns a flag type: numbers that float32 holds, > `above`, >= `minimum` and < `below`."""
    bounds = [
        f'{sign} {bound:g}' for sign, bound in (('>', above), ('>=', minimum), ('<', below)) if math.isfinite(bound)
    ]

    def parse(text):
        value = math.nan
        with contextlib.suppress(ValueError):
            value = float(text)
        inside = above < value < below and value >= minimum
        if inside and _in_float32(value):
            return value
        held = ' that float32 holds' if inside else ''
        raise argparse.ArgumentTypeError(f'{text!r} is not a number {" and ".join(bounds)}{held}')

    parse.metavar = 'X'
    return parse


def _in_float32(value):
    """Returns whether a number is 0, or neither overflows nor underflows to 0 in float32."""
    return value == 0 or 2.0**-126 <= abs(value) < 2.0**128


def steps_or_minutes(text: str) -> int | str:
    """Reads a flag's value: a number of steps like 500, returned as an int, or minutes like 30min, as a str."""
    if text.endswith('min'):
        number(above=0)(text.removesuffix('min'))
        return text
    try:
        return integer(1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f'{text!r} is neither a number of steps like 500 nor minutes like 30min'
        ) from error


def new_file(text: str) -> pathlib.Path:
    """Reads a flag's value: the path of a file to write. Checks that the folder exists and is writable."""
    name = path(text)
    if os.path.isdir(name):
        raise argparse.ArgumentTypeError(f'{name} is a folder: give the path of a file')
    if not os.path.isdir(name.parent):
        raise argparse.ArgumentTypeError(f'{name.parent} is not a folder: create it first')
    if not os.access(name.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f'{name.parent} is not writable')
    return name
