"""Progress of a training: a bar on a terminal, a line an epoch elsewhere."""

import sys
import time
from typing import Any

from tqdm import tqdm

from runs import hosts


class Report:
    """Shows steps and epochs until it is closed."""

    def __init__(self, training: Any) -> None:
        """training: has `args`, `steps` of an epoch, `split` and `progress`."""
        self.num_epochs, self.batch_size = training.args.epochs + 1, training.args.batchsize
        self.split, self.steps = training.split, training.steps
        self.steps_before = training.progress.epoch * self.steps
        total = self.num_epochs * self.steps * self.batch_size
        begun = (self.steps_before + training.progress.step) * self.batch_size
        hidden = not (sys.stderr.isatty() and hosts.is_first())
        self.bar = tqdm(total=total, initial=begun, unit=' images', disable=hidden, dynamic_ncols=True)
        self.accuracy, self.refreshed = '', time.monotonic()

    def close(self) -> None:
        """Ends the bar."""
        self.bar.close()

    def step(self, steps_done: int, loss: float) -> None:
        """Shows, once a second, how many steps of an epoch are done and the mean of their losses."""
        if not self.bar.disable and time.monotonic() - self.refreshed >= 1:
            self._show(steps_done, loss)

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
        """Prints a warning, above the bar."""
        self.bar.clear()
        print(f'train.py: warning: {message}', file=sys.stderr, flush=True)

    def _show(self, steps_done, loss):
        self.bar.set_postfix_str(f'loss {loss:.4f}{self.accuracy}', refresh=False)
        self.bar.update((self.steps_before + steps_done) * self.batch_size - self.bar.n)
        self.refreshed = time.monotonic()
