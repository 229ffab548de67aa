"""Stopping a run by a signal without losing its work."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable

# In order: Slurm's preemption, Ctrl-C, Slurm's warning before a time limit, a closed terminal.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def handle(handler: Callable | signal.Handlers, numbers: Iterable[int] = STOPPING) -> dict:
    """Handles signals by handler(number, frame). Returns the previous handlers, {number: handler}.

    An ignored SIGHUP stays ignored, as under nohup. Only the main thread may call this function.
    """
    taken = [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in taken}


def restore(handlers: dict) -> None:
    """Undoes `handle`. Takes the handlers that `handle` returned."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


def say(text: str) -> None:
    """Prints a line to stderr. Works in a signal handler, which may have interrupted another print."""
    try:
        print(f'\n{text}', file=sys.stderr, flush=True)
    except RuntimeError:  # streams are not reentrant
        with contextlib.suppress(OSError):
            os.write(2, f'\n{text}\n'.encode(errors='replace'))


class Stop:
    """Handles the STOPPING signals inside a `with` block.

    Before `begin()` a signal ends the process, because nothing needs saving. After `begin()` the first signal is stored
    in `signal`, and the caller saves and ends. A later signal ends the process at once. Saved files stay intact,
    because the files of a run are written atomically.

    A second signal within one second is ignored. Slurm signals a process and its parent, and the parent passes the
    signal on.

    Attributes:
        signal: the number of the first signal, or None.
        calls: the number of calls of hosts.reached_stop.
    """

    def __init__(self) -> None:
        self.signal = None
        self.calls = 0
        self._noted_at = None
        self._begun = False
        self._before = {}

    def __enter__(self) -> 'Stop':
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            self._before = handle(self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        # After a signal the process is about to end, and another signal must end it without a traceback.
        if self.signal is None:
            restore(self._before)

    def begin(self) -> None:
        """Declares that a signal must not end the process before its work is saved."""
        self._begun = True

    def _note(self, number, frame):
        del frame
        if self.signal is not None and time.monotonic() - self._noted_at < 1:
            return
        if self.signal is not None or not self._begun:
            os._exit(128 + number)  # callbacks, as in garbage collection, would swallow sys.exit
        self.signal, self._noted_at = number, time.monotonic()
        say(f'{signal.Signals(number).name}: finishing the step and saving it; repeat after a second to exit at once')
