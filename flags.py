"""Types of command-line flags, and errors of one line: what was wrong, with what, what to do; exit status 2."""

import argparse
import contextlib
import difflib
import io
import math
import os
import sys


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that explains defaults in --help and reports an error in one line."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors='replace')  # the formulas in --help are not ASCII

    def error(self, message):
        self.exit(2, f'{self.prog}: error: {message} (see --help)\n')

    def add_choice(self, flag, names, also=None, **options):
        """A flag that takes one of `names` in any case, or a name that begins with `also`."""

        def choose(text):
            if text.lower() in names or (also and text.startswith(also) and text != also):
                return text.lower() if text.lower() in names else text
            near = difflib.get_close_matches(text.lower(), names, n=1)
            hint = f'did you mean {near[0]}? ' if near else ''
            raise argparse.ArgumentTypeError(f'unknown: {text!r}; {hint}choose from {", ".join(listed)}')

        listed = [*names, f'{also}NAME'] if also else list(names)
        self.add_argument(flag, type=choose, metavar=f'{{{",".join(listed)}}}', **options)


def add_compilecache(parser):
    """--compilecache, the folder where XLA keeps what it compiled for the next start."""
    default = os.path.join(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'bayesian-sam')
    help = 'folder of compiled functions, which make the next start fast; "off" for none'
    parser.add_argument('--compilecache', default=default, help=help)


def use_compilecache(folder):
    """Turns JAX's persistent compilation cache on, unless folder is 'off'."""
    import jax

    if folder != 'off':
        jax.config.update('jax_compilation_cache_dir', folder)
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def integer(minimum, below=math.inf):
    """A flag type: whole numbers from `minimum` on and less than `below`."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if minimum <= int(text) < below:
                return int(text)
        bound = '' if below == math.inf else f' and less than {below}'
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of {minimum} or more{bound}')

    return parse


def number(above=None, minimum=None, below=None):
    """A flag type: finite numbers > `above`, >= `minimum` and < `below`, of those that are given."""

    def parse(text):
        with contextlib.suppress(ValueError):
            value = float(text)
            inside = (
                math.isfinite(value)
                and (above is None or value > above)
                and (minimum is None or value >= minimum)
                and (below is None or value < below)
            )
            if inside:
                return value
        bounds = [
            f'{sign} {bound:g}' for sign, bound in (('>', above), ('>=', minimum), ('<', below)) if bound is not None
        ]
        raise argparse.ArgumentTypeError(f'{text!r} is not a number {" and ".join(bounds)}')

    return parse


@contextlib.contextmanager
def one_line_errors(script, *errors):
    """Ends the script with status 2 and the message of one of `errors`, which are the user's to mend."""
    try:
        yield
    except errors as error:
        print(f'{script}: error: {error}', file=sys.stderr)
        sys.exit(2)
