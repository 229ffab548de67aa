"""Processes of tests that run a script of the project: forked from one that has imported JAX, which takes a second."""

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

# multiprocessing takes the exit statuses of all processes where one starts or ends, which two threads must not at once.
_LOCK = threading.Lock()


class Child:
    """What `python ARGUMENTS` does, SCRIPT ... or -c CODE ..., with what subprocess.Popen has for it."""

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
        """The exit status, or minus the signal that it ended by; None as long as it has not ended."""
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
        """The rest of its output and its errors, when it has ended; it is killed after `timeout` seconds."""
        late = threading.Timer(timeout, self.kill)
        late.start()
        with self, ThreadPoolExecutor(1) as pool:
            errors = pool.submit(self.stderr.read)
            said = self.stdout.read(), errors.result()
        late.cancel()
        return said


def run(arguments, environment=None):
    """As subprocess.run: the CompletedProcess of a child, with its texts."""
    child = Child(arguments, environment=environment)
    out, errors = child.communicate(timeout=600)
    return subprocess.CompletedProcess(arguments, child.returncode, out, errors)


def _pipe():
    """The end of a pipe to read text from, and the other, which can be given to a process."""
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
    finally:  # as an interpreter ends, which multiprocessing leaves out
        threading._shutdown()
        atexit._run_exitfuncs()
