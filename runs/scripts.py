"""Reports the errors of every script as one line. Needs no JAX."""

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import errors

_ROOT = Path(__file__).resolve().parent.parent
_script = Path(getattr(sys.modules['__main__'], '__file__', None) or '').resolve()
if _script.parent in (_ROOT, *(_ROOT / folder for folder in ('benchmarks', 'evaluation', 'studies'))):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during imports ends the script without a traceback


@contextlib.contextmanager
def script(name: str) -> Iterator[None]:
    """Wraps a script's main. UserErrors and Ctrl-C end the script without a traceback.

    Writing to stdout or stderr fails if nobody reads the pipe, or if the disk is full. Then the rest of the output is
    dropped, and the script continues.
    """

    def warn(error):
        print(f'{name}: warning: further output is lost ({error.strerror})', file=sys.stderr, flush=True)

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='replace')  # formulas and tables are not ASCII
    with (
        open(os.devnull, 'w') as null,
        contextlib.redirect_stdout(_BreakableStream(sys.stdout or null, warn)) as stdout,
        contextlib.redirect_stderr(_BreakableStream(sys.stderr or null, lambda error: None)) as stderr,
    ):
        try:
            with one_line_errors(name):
                _require_working_folder()
                yield
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        finally:
            stdout.flush()
            stderr.flush()


def _require_working_folder():
    """Raises a UserError if the working folder was removed, because relative paths then have no meaning."""
    try:
        os.getcwd()
    except OSError as error:
        raise errors.UserError('the working folder no longer exists: cd to an existing folder') from error


class _BreakableStream:
    """A text stream that goes to the null device after the first failed write. Calls on_break(error) once."""

    def __init__(self, stream, on_break):
        self._stream, self._on_break = stream, on_break
        self._broken = threading.Lock()

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        return self._try(self._stream.write, text)

    def flush(self):
        self._try(self._stream.flush)

    def _try(self, function, *args):
        try:
            return function(*args)
        except OSError as error:
            if self._broken.acquire(blocking=False):  # only in the first of several threads
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())  # Python flushes the buffer again when the process ends
                os.close(null)
                self._on_break(error)


@contextlib.contextmanager
def one_line_errors(script: str) -> Iterator[None]:
    """Ends the script with one line after a UserError or an OSError.

    A UserError gives its message and exit status. An OSError gives its file, its reason and status 2. An OSError
    without a file is raised again.
    """
    try:
        yield
    except errors.UserError as error:
        print(f'{script}: error: {error}', file=sys.stderr)
        sys.exit(error.status)
    except OSError as error:
        if error.filename is None:
            raise
        print(f'{script}: error: {errors.printable(error.filename)}: {error.strerror}', file=sys.stderr)
        sys.exit(2)
