"""The command line of all scripts: a parser, types of flags, and flags that several scripts share."""

import argparse
import contextlib
import difflib
import math
import os
import pathlib

import errors


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that explains defaults in --help and reports an error in one line.

    description: its first line is shown; None, as docstrings are under `python -OO`, shows none.
    """

    def __init__(self, description):
        super().__init__(
            description=(description or '').split('\n')[0], formatter_class=_HelpFormatter, allow_abbrev=False
        )

    def error(self, message):
        self.exit(2, f'{self.prog}: error: {errors.printable(message)} (see --help)\n')

    def add_choice(self, flag, names, also=None, **options):
        """Adds a flag of type `choice`."""
        type = choice(names, also)
        self.add_argument(flag, type=type, metavar=type.metavar, **options)

    def parse(self, argv=None) -> tuple[argparse.Namespace, dict]:
        """Returns all flags of a command line, and {name: value} of the flags that it gives."""
        unset = object()
        actions = [action for action in self._actions if action.dest != 'help']
        args = self.parse_args(argv, argparse.Namespace(**{action.dest: unset for action in actions}))
        given = {name: value for name, value in vars(args).items() if value is not unset}
        return argparse.Namespace(**{action.dest: action.default for action in actions} | given), given

    def is_switch(self, name):
        """Returns whether a flag takes no value."""
        return any(action.dest == name and action.nargs == 0 for action in self._actions)

    def takes_whole_numbers(self, name):
        """Whether a flag's type is one of `integer`."""
        return any(action.dest == name and hasattr(action.type, 'whole') for action in self._actions)

    def from_values(self, values, without=()):
        """A Namespace of all flags but those named, from plain values held to the bounds of each. Raises ValueError.

        A flag that is not among the values is one that there was not yet when they were written: it has its default.
        """
        actions = [action for action in self._actions if action.dest not in ('help', *without)]
        unknown = sorted(set(values) - {action.dest for action in actions})
        if unknown:
            raise ValueError(f'there is no --{unknown[0]}')
        return argparse.Namespace(**{action.dest: _checked_value(action, values) for action in actions})


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for flags that have none."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def _checked_value(action, values):
    if action.dest not in values:
        return action.default
    value = values[action.dest]
    if value is None and action.default is None:
        return None
    if action.nargs == 0 and isinstance(value, bool):
        return value
    if action.nargs == 0 or isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f'--{action.dest} is {value!r}')
    try:
        return action.type(str(value)) if action.type else str(value)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise ValueError(f'--{action.dest}: {error}') from error


def choice(names, also=None):
    """A flag type: one of `names` in any case, or a name that begins with `also`."""

    def choose(text):
        if text.lower() in names or (also and text.startswith(also) and text != also):
            return text.lower() if text.lower() in names else text
        near = difflib.get_close_matches(text.lower(), names, n=1)
        hint = f'did you mean {near[0]}? ' if near else ''
        raise argparse.ArgumentTypeError(f'unknown: {text!r}; {hint}choose from {", ".join(listed)}')

    listed = [*names, f'{also}NAME'] if also else list(names)
    choose.metavar = f'{{{",".join(listed)}}}'
    return choose


def add_compilecache(parser):
    """Adds --compilecache, the folder where XLA keeps what it compiled for the next start."""
    help = 'folder of compiled functions, which make the next start fast; "off" for none'
    parser.add_argument('--compilecache', type=_folder_or_off, default=_default_compilecache(), help=help)


def _default_compilecache():
    """Returns the folder that JAX's own variables name, or one in the user's cache; 'off' without a home folder."""
    if os.environ.get('JAX_ENABLE_COMPILATION_CACHE', '1').lower() in ('0', 'false', 'f', 'no', 'n', 'off'):
        return 'off'
    if os.environ.get('JAX_COMPILATION_CACHE_DIR'):
        return os.path.abspath(os.path.expanduser(os.environ['JAX_COMPILATION_CACHE_DIR']))
    caches = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return os.path.join(caches, 'bayesian-sam') if os.path.isabs(caches) else 'off'


def _folder_or_off(text):
    """A flag type: 'off', or the absolute path of a folder."""
    if not text:
        raise argparse.ArgumentTypeError("'' is no folder: name one, or give off")
    return text if text == 'off' else os.path.abspath(folder(text))


def folder(text):
    """A flag type: the path of a folder or file as a str, in which ~ stands for the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("'' is no path: name a folder or file")
    if '\0' in text:
        raise argparse.ArgumentTypeError(f'{errors.printable(text)!r} is no path: it holds a NUL character')
    expanded = os.path.expanduser(text)
    if text.startswith('~') and not os.path.isabs(expanded):
        raise argparse.ArgumentTypeError(f'{text!r}: this home folder is unknown: give the whole path')
    return expanded


def path(text):
    """A flag type: as `folder`, a pathlib.Path."""
    return pathlib.Path(folder(text))


def add_coordinator(parser):
    """--coordinator, --processes, --processid and --jointimeout, which join processes on several hosts."""
    add = parser.add_argument
    help = 'run on several hosts: the address of process 0, or auto to ask Slurm, Open MPI or Kubernetes'
    add('--coordinator', type=_address, metavar='HOST:PORT', help=help)
    add('--processes', type=integer(1), metavar='N', help='with HOST:PORT: how many processes there are')
    add('--processid', type=integer(0), metavar='I', help='with HOST:PORT: which of them this is')
    help = 'how long processes wait for each other at the start (60); more where hosts become ready one by one'
    add('--jointimeout', type=integer(1), metavar='SECONDS', help=help)


def add_jobs(parser):
    """--jobs, how many runs are made at once."""
    parser.add_argument('--jobs', type=integer(1), help='runs at once; by default one per GPU, or one without any')


def _address(text):
    """A flag type: HOST:PORT or auto."""
    host, _, port = text.rpartition(':')
    if text != 'auto' and not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise argparse.ArgumentTypeError(f'{text!r} is neither HOST:PORT nor auto')
    return text


def require_whole_address(parser, args):
    """Ends the script if the flags of add_coordinator do not go together."""
    numbers = (args.processes, args.processid)
    if args.jointimeout and not args.coordinator:
        parser.error('--jointimeout goes with --coordinator')
    if args.coordinator in (None, 'auto'):
        if numbers != (None, None):
            parser.error('--processes and --processid go with --coordinator HOST:PORT')
    elif None in numbers or args.processid >= args.processes:
        parser.error('--coordinator HOST:PORT needs --processes N, and a --processid from 0 to N - 1')


def integer(minimum, below=2**31):
    """A flag type: whole numbers from `minimum` on and less than `below`, by default those that fit in an int32."""

    def parse(text):
        value = None
        with contextlib.suppress(ValueError):
            value = int(text)
        if value is not None and minimum <= value < below:
            return value
        bound = f' and less than {below}' if below < 2**31 or (value or 0) >= below else ''
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of {minimum} or more{bound}')

    parse.whole = True
    return parse


def number(above=None, minimum=None, below=None):
    """A flag type: numbers that float32 holds, > `above`, >= `minimum` and < `below`, of those that are given."""

    def parse(text):
        value = math.nan
        with contextlib.suppress(ValueError):
            value = float(text)
        inside = (
            (above is None or value > above)
            and (minimum is None or value >= minimum)
            and (below is None or value < below)
        )
        if inside and _in_float32(value):
            return value
        bounds = [
            f'{sign} {bound:g}' for sign, bound in (('>', above), ('>=', minimum), ('<', below)) if bound is not None
        ]
        held = ' that float32 holds' if inside else ''
        raise argparse.ArgumentTypeError(f'{text!r} is not a number {" and ".join(bounds)}{held}')

    return parse


def _in_float32(value):
    """Whether a number is 0 or neither overflows nor underflows, which would make it 0, in float32."""
    return value == 0 or 2.0**-126 <= abs(value) < 2.0**128


def steps_or_minutes(text):
    """A flag type: steps, a whole number like 500, as an int, or minutes like 30min, as a str."""
    if text.endswith('min'):
        number(above=0)(text.removesuffix('min'))
        return text
    try:
        return integer(1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f'{text!r} is neither a number of steps like 500 nor minutes like 30min'
        ) from error


def new_file(text):
    """A flag type: the path of a file that can be written, as far as its folder tells."""
    name = path(text)
    if os.path.isdir(name):
        raise argparse.ArgumentTypeError(f'{name} is a folder: give the path of a file')
    if not os.path.isdir(name.parent):
        raise argparse.ArgumentTypeError(f'{name.parent} is no folder: make it first')
    if not os.access(name.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f'{name.parent} cannot be written')
    return name
