"""Starts every script: imports and configures JAX, and reports errors as one line.

Scripts import this module before anything that imports JAX.
"""

import contextlib
import io
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import errors

_ROOT = Path(__file__).resolve().parent.parent
_script = Path(getattr(sys.modules['__main__'], '__file__', None) or '').resolve()
if _script.parent in (_ROOT, _ROOT / 'benchmarks', _ROOT / 'studies'):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during imports ends the script without a traceback


if metadata.version('jaxlib') == '0.10.1':  # logs an error for each cached function, because it misreads CPU features
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
try:
    import jax
except ValueError as error:  # an environment variable that JAX does not understand
    print(f'{os.path.basename(sys.argv[0])}: error: JAX cannot start: {errors.first_line(error)}', file=sys.stderr)
    sys.exit(2)

# JAX settings that change the numbers of a run, or that the scripts depend on.
_CONFIGURATION = {
    'jax_default_prng_impl': 'threefry2x32',
    'jax_threefry_partitionable': True,
    'jax_threefry_gpu_kernel_lowering': False,
    'jax_high_dynamic_range_gumbel': False,
    'jax_accurate_erf_inv': False,
    'jax_random_seed_offset': 0,
    'jax_enable_x64': False,
    'jax_numpy_dtype_promotion': 'standard',
    'jax_softmax_custom_jvp': False,
    'jax_disable_jit': False,
    'jax_debug_key_reuse': False,
    'jax_transfer_guard': 'allow',
    'jax_transfer_guard_host_to_device': 'allow',
    'jax_transfer_guard_device_to_device': 'allow',
    'jax_transfer_guard_device_to_host': 'allow',
}
for _name, _value in _CONFIGURATION.items():  # overrides the environment variables of JAX
    if _name in jax.config.values:
        jax.config.update(_name, _value)


def use_compilecache(folder: str) -> None:
    """Turns on JAX's persistent compilation cache, unless folder is 'off'. Warns once if the folder is not writable."""
    if folder != 'off':
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
            print(f'warning: --compilecache {folder} is not writable: compiled functions are not kept', file=sys.stderr)
            warnings.filterwarnings('ignore', 'Error writing persistent compilation cache')
        folder = folder if os.path.isdir(folder) else 'off'
    jax.config.update('jax_enable_compilation_cache', folder != 'off')
    if folder != 'off':
        _remove_empty_entries(folder)
        jax.config.update('jax_compilation_cache_dir', folder)
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


def _remove_empty_entries(folder):
    """Removes entries that a full disk left empty, because JAX would warn at every start and never replace them."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if entry.name.endswith('-cache') and entry.is_file(follow_symlinks=False):
                status = entry.stat()
                if status.st_size == 0 and time.time() - status.st_mtime > 60:  # newer files may still be written
                    os.unlink(entry)


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
