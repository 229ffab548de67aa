"""Progress of a training: a bar on a terminal; elsewhere a line for each epoch, and a line every five minutes."""

import sys
import time
from typing import Any

from tqdm import tqdm

from runs import hosts

SECONDS_BETWEEN_LINES = 300
SECONDS_BEFORE_ESTIMATE = 2


class Report:
    """Shows the progress of a training until it is closed."""

    def __init__(self, training: Any) -> None:
        """Starts a report. `training` has the attributes `args`, `steps` (per epoch), `split` and `progress`."""
        self.num_epochs, self.batch_size = training.args.epochs + 1, training.args.batchsize
        self.split, self.steps = training.split, training.steps
        self.steps_before = training.progress.epoch * self.steps
        first = self.steps_before + training.progress.step
        hidden = not (sys.stderr.isatty() and hosts.is_first())
        self.bar = tqdm(
            total=self.num_epochs * self.steps * self.batch_size, initial=first * self.batch_size, unit=' images',
            disable=hidden, dynamic_ncols=True,
        )  # fmt: skip
        self.accuracy, self.refreshed = '', time.monotonic()
        self._clock, self._printed = _Clock(first, self.num_epochs * self.steps), None

    def close(self) -> None:
        """Ends the bar."""
        self.bar.close()

    def step(self, steps_done: int, loss: float) -> None:
        """Reports a step. Prints the expected duration once, after the first steps.

        Args:
            steps_done: the number of steps of this epoch so far.
            loss: the mean loss of these steps.
        """
        now, step = time.monotonic(), self.steps_before + steps_done
        self._clock.step(now, step)
        if self._printed is None and self._clock.measured >= SECONDS_BEFORE_ESTIMATE:
            self._print(
                f'the first step took {duration(self._clock.first)} with compilation; now {self._images_per_second()}, '
                f'about {duration(self._clock.left)} to go'
            )
        if not self.bar.disable:
            if now - self.refreshed >= 1:
                self._show(steps_done, loss)
        elif self._printed is not None and now - self._printed >= SECONDS_BETWEEN_LINES:
            self._print(
                f'epoch {step // self.steps + 1}/{self.num_epochs}, step {steps_done}/{self.steps}: loss {loss:.4f}, '
                f'{self._images_per_second()}, about {duration(self._clock.left)} to go'
            )

    def epoch(self, record: dict) -> None:
        """Shows the log's record of an epoch."""
        self.accuracy = f', {self.split} accuracy {record[f"{self.split}_accuracy"]:.2%}'
        if self.bar.disable:
            print(
                f'epoch {record["epoch"] + 1}/{self.num_epochs}: loss {record["loss"]:.4f}{self.accuracy}, '
                f'{record["seconds"]:.1f} s, {record["images_per_second"]:.0f} images/s',
                flush=True,
            )
        else:
            self._show(self.steps, record['loss'])
        self.steps_before += self.steps

    def warn(self, message: str) -> None:
        """Prints a warning above the bar."""
        self.bar.clear()
        print(f'train.py: warning: {message}', file=sys.stderr, flush=True)

    def _images_per_second(self):
        return f'{self.batch_size * self._clock.steps_per_second:.0f} images/s'

    def _print(self, line):
        self.bar.clear()
        print(line, flush=True)
        self._printed = time.monotonic()

    def _show(self, steps_done, loss):
        self.bar.set_postfix_str(f'loss {loss:.4f}{self.accuracy}', refresh=False)
        self.bar.update((self.steps_before + steps_done) * self.batch_size - self.bar.n)
        self.refreshed = time.monotonic()


class _Clock:
    """Measures the speed of steps after the first ones, because the first step is compiled."""

    IN_FLIGHT = 3  # when the third step starts, the first step has ended

    def __init__(self, step, last):
        self._started, self._step, self._last = time.monotonic(), step, last
        self.first = self._from = None

    def step(self, now, step):
        if self._from is None and step - self._step >= self.IN_FLIGHT:
            self.first, self._from, self._step = now - self._started, now, step
        self._now, self._done = now, step

    @property
    def measured(self):
        """Returns the seconds that the measured steps took, 0 before there are three."""
        return self._now - self._from if self._from and self._done - self._step >= self.IN_FLIGHT else 0

    @property
    def steps_per_second(self):
        """Returns the speed of the measured steps. Evaluations between epochs count as time of their steps."""
        return (self._done - self._step) / (self._now - self._from)

    @property
    def left(self):
        """Returns the seconds that the remaining steps take at this speed."""
        return (self._last - self._done) / self.steps_per_second


def duration(seconds: float) -> str:
    """Returns a duration in words, such as '45 s', '12 min', '3.4 hours' or '2.1 days'."""
    for unit, size, digits in (('days', 86400, 1), ('hours', 3600, 1), ('min', 60, 0)):
        if seconds >= 1.5 * size:
            return f'{seconds / size:.{digits}f} {unit}'
    return f'{seconds:.0f} s'
