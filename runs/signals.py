"""Stopping a run by a signal without losing its work."""

import contextlib
import os
import signal
import sys
import threading
import time

# Slurm's preemption, Ctrl-C, Slurm's warning before a time limit, a terminal that is closed.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def handle(handler, numbers=STOPPING):
    """Handles signals by handler(number, frame). Returns the handlers of before, {number: handler}.

    A SIGHUP that is ignored stays so, as under nohup. Only the main thread may call it.
    """
    taken = [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in taken}


def restore(handlers):
    """Undoes `handle`, given what it returned."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


def say(text):
    """Prints a line to stderr from a signal's handler, which may have interrupted another print."""
    try:
        print(f'\n{text}', file=sys.stderr, flush=True)
    except RuntimeError:  # streams cannot be entered twice
        with contextlib.suppress(OSError):
            os.write(2, f'\n{text}\n'.encode(errors='replace'))


class Stop:
    """Handles the STOPPING signals while it is entered.

    Before `begin()` a signal ends the process, because nothing needs saving. After it, the first signal is noted in
    `signal`, and the caller saves and ends. A second signal ends the process at once. A second one within a second is
    ignored, because Slurm signals a process and its parent, which passes the signal on. What was saved before stays
    whole, because files of a run are written beside their place and renamed.
    """

    def __init__(self):
        self.signal = None
        self.calls = 0  # of hosts.reached_stop
        self._noted_at = None
        self._begun = False
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = handle(self._note)
        return self

    def __exit__(self, *exception):
        if self.signal is None:  # else the process is about to end, and another signal is to end it without a traceback
            restore(self._before)

    def begin(self):
        self._begun = True

    def _note(self, number, frame):
        del frame
        if self.signal is not None and time.monotonic() - self._noted_at < 1:
            return
        if self.signal is not None or not self._begun:
            os._exit(128 + number)  # sys.exit would be lost in callbacks, such as those of garbage collection
        self.signal, self._noted_at = number, time.monotonic()
        say(
            f'{signal.Signals(number).name}: finishing the step and saving it; once more after a second to exit at once'
        )
