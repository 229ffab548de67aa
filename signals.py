"""Stopping a run by SIGTERM (Slurm's preemption) or SIGINT (Ctrl-C) without losing its work."""

import os
import signal
import sys
import threading


class Stop:
    """What the two signals do while it is entered.

    Before `begin()` a signal ends the process, as there is nothing to save. After it, the first is noted in `signal`,
    for the caller to save and to end; a second one ends the process at once. Files of a run are written beside their
    place and renamed, so what was saved before stays whole.
    """

    def __init__(self):
        self.signal = None
        self._begun = False
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception):
        if self.signal is None:  # else the process is about to end, and another signal is to end it without a traceback
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def begin(self):
        self._begun = True

    def _note(self, number, frame):
        del frame
        if self.signal is not None or not self._begun:
            os._exit(128 + number)  # sys.exit would be lost in callbacks, such as those of garbage collection
        self.signal = number
        name = signal.Signals(number).name
        print(f'\n{name}: finishing the step and saving it; once more to exit at once', file=sys.stderr, flush=True)
