"""Stopping a run by SIGTERM (Slurm's preemption) or SIGINT (Ctrl-C) without losing its work."""

import os
import signal
import sys
import threading
import time

SAVED = 'saved; go on with: python train.py --resume'  # what a run says that a signal has stopped


class Stop:
    """What the two signals do while it is entered.

    Before `begin()` a signal ends the process, as there is nothing to save. After it, the first is noted in `signal`,
    for the caller to save and to end; another one more than a second later ends the process at once, while in that
    second it is taken for the same: Slurm signals a process and its parent, which passes it on. Files of a run are
    written beside their place and renamed, so what was saved before stays whole.
    """

    def __init__(self):
        self.signal = None
        self._noted_at = None
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
        if self.signal is not None and time.monotonic() - self._noted_at < 1:
            return
        if self.signal is not None or not self._begun:
            os._exit(128 + number)  # sys.exit would be lost in callbacks, such as those of garbage collection
        self.signal, self._noted_at = number, time.monotonic()
        name = signal.Signals(number).name
        said = f'{name}: finishing the step and saving it; once more after a second to exit at once'
        print(f'\n{said}', file=sys.stderr, flush=True)
