"""Runs the project's scripts in child processes of tests.

The children are forked from a server that has already imported JAX, because the import takes a second.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import connection
from pathlib import Path

ROOT = Path(__file__).parent.parent
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(['flax.linen', 'jax', 'optax', 'PIL.Image', 'tqdm'])

# When a process starts or ends, multiprocessing collects all exit statuses. Two threads must not do so at once.
_LOCK = threading.Lock()


class Child:
    """Runs what `python SCRIPT ...` or `python -c CODE ...` would, with an interface like subprocess.Popen."""

    def __init__(self, arguments, folder=ROOT, environment=None, errors_to_output=False):
        self.stdout, out = _pipe()
        self.stderr, error = (self.stdout, out) if errors_to_output else _pipe()
        environment = dict(os.environ if environment is None else environment)
        arguments = [str(argument) for argument in arguments]
        self._process = FORKS.Process(target=_run, args=(arguments, folder, environment, out, error), daemon=True)
        with _LOCK:
            self._process.start()
        out.close()
        error.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.stdout.close()
        self.stderr.close()
        connection.wait([self._process.sentinel])
        with _LOCK:
            self._process.join()

    @property
    def returncode(self):
        """The exit status, or minus the number of the signal that ended the process. None while it runs."""
        with _LOCK:
            return self._process.exitcode

    @property
    def pid(self):
        return self._process.pid

    def send_signal(self, number):
        os.kill(self._process.pid, number)

    def kill(self):
        self._process.kill()

    def communicate(self, timeout=120):
        """Waits for the end and returns the rest of (stdout, stderr). Kills the process after `timeout` seconds."""
        late = threading.Timer(timeout, self.kill)
        late.start()
        with self, ThreadPoolExecutor(1) as pool:
            errors = pool.submit(self.stderr.read)
            said = self.stdout.read(), errors.result()
        late.cancel()
        return said


def run(arguments, environment=None):
    """Runs a child to its end and returns a CompletedProcess with text output, like subprocess.run."""
    child = Child(arguments, environment=environment)
    out, errors = child.communicate(timeout=600)
    return subprocess.CompletedProcess(arguments, child.returncode, out, errors)


def _pipe():
    """Returns the two ends of a pipe: a text file to read, and a connection that a child process can inherit."""
    reader, writer = FORKS.Pipe(duplex=False)
    return open(os.dup(reader.fileno())), writer


def _run(arguments, folder, environment, out, error):
    import jax

    os.dup2(out.fileno(), 1)
    os.dup2(error.fileno(), 2)
    out.close()
    error.close()
    sys.stdout, sys.stderr = os.fdopen(1, 'w', closefd=False), os.fdopen(2, 'w', buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    jax.config.update('jax_platforms', environment.get('JAX_PLATFORMS'))
    os.chdir(folder)
    try:
        if arguments[0] == '-c':
            sys.argv = ['-c', *arguments[2:]]
            exec(arguments[1], {'__name__': '__main__'})
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name='__main__')
    finally:  # the end of an interpreter, which multiprocessing skips
        threading._shutdown()
        atexit._run_exitfuncs()
