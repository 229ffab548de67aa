"""Requests: what to evaluate, as flags of test.py, and the files that the results go to."""

import argparse
import dataclasses
from pathlib import Path

import jax

import data
import experiment
from readers.files import DataError
from runs import folders, parsing
from runs.parsing import integer


@dataclasses.dataclass(frozen=True)
class Request:
    """Says what to measure of a run. Each field has the name and the default of a flag of test.py.

    Attributes:
        split: 'test' or 'validation', the images that the run held out.
        testmc: numbers of posterior samples, rising; all metrics are over the last.
        testimages: how many images of each set, None for all.
        bins: of ECE, MCE and the reliability diagram.
        bnrefresh: training batches over which batch statistics are re-estimated, None to keep those of training.
        temperature: whether to measure at the best temperature too.
        ood: names of data sets whose images are unknown to the run.
        corruptions: a folder of corrupted images, '' for the built-in corruptions, None for neither.
        laplace: whether to sample from a Laplace approximation of the last layer.
        checkpoint: a number of steps, None for the newest checkpoint.
    """

    split: str = 'test'
    testmc: tuple[int, ...] = (1,)
    testimages: int | None = None
    bins: int = 20
    bnrefresh: int | None = None
    temperature: bool = False
    ood: tuple[str, ...] = ()
    corruptions: str | None = None
    laplace: bool = False
    checkpoint: int | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> 'Request':
        """Returns the Request of the flags of test.py."""
        values = {field.name: getattr(args, field.name) for field in dataclasses.fields(cls)}
        return cls(**values | {'testmc': tuple(sorted(set(args.testmc))), 'ood': tuple(args.ood)})

    @property
    def num_samples(self) -> int:
        """Returns the number of samples that all metrics are over."""
        return self.testmc[-1]

    def arguments(self) -> list[str]:
        """Returns the flags of test.py that ask the same."""
        given = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            given.append(f'--{field.name}')
            if value is not True and value != '':
                given += map(str, value if isinstance(value, tuple) else [value])
        return given

    def recorded(self) -> dict:
        """Returns what metrics.json says of the request."""
        names = ('split', 'testimages', 'testmc', 'bins', 'bnrefresh', 'laplace')
        return {name: getattr(self, name) for name in names} | {'testmc': self.num_samples}

    def metrics_file(self, run: Path) -> Path:
        """Returns the file of the metrics in a run folder."""
        return run / f'metrics{self._mark()}.json'

    def predictions_file(self, run: Path) -> Path:
        """Returns the file of the predictions in a run folder."""
        return run / f'predictions{self._mark()}.npz'

    def plots_folder(self, run: Path) -> Path:
        """Returns the folder of the pictures in a run folder."""
        return run / f'plots{self._mark()}'

    def _mark(self):
        marks = [self.split] * (self.split != 'test') + ['laplace'] * self.laplace
        return ''.join(f'-{mark}' for mark in [*marks, *([] if self.checkpoint is None else [self.checkpoint])])


def add_flags(parser: parsing.Parser) -> None:
    """Adds the flags of a Request to the parser of test.py."""
    add = parser.add_argument
    help = 'samples from the posterior over which probabilities are averaged; several numbers give a curve'
    add('--testmc', type=integer(1), nargs='+', default=[*Request.testmc], metavar='N', help=help)
    help = 'the checkpoint after so many steps, instead of the newest'
    add('--checkpoint', type=integer(0), metavar='STEP', help=help)
    help = 'evaluate on the test set, or on what train.py --validation kept out of training'
    parser.add_choice('--split', ('test', 'validation'), default=Request.split, help=help)
    help = 'evaluate so many images of each set, a random part that is the same for all runs; all by default'
    add('--testimages', type=integer(1), metavar='N', help=help)
    help = 'bins of ECE, MCE and the reliability diagram'
    add('--bins', type=integer(1, below=10_001), default=Request.bins, help=help)
    help = 'estimate batch statistics of the mean and of every sample again, over K training batches'
    add('--bnrefresh', type=integer(1), metavar='K', help=help)
    help = 'also the metrics at the temperature that is best for what train.py --validation kept out of training'
    add('--temperature', action='store_true', help=help)
    help = 'test sets of other data, to be told from the known'
    parser.add_choice('--ood', data.DATASETS, also='tfds/', nargs='+', default=[], help=help)
    help = 'evaluate corrupted test images: built-in corruptions, or those of a folder CIFAR-10-C or CIFAR-100-C'
    add('--corruptions', type=_builtin_or_folder, nargs='?', const='', metavar='FOLDER', help=help)
    help = 'sample from a Laplace approximation of the last layer, of runs whose optimizer has no posterior'
    add('--laplace', action='store_true', help=help)


def _builtin_or_folder(text):
    return text and parsing.folder(text)


def require_consistency(request: Request) -> None:
    """Raises a ValueError for flags that cannot be combined."""
    if request.split == 'validation' and request.temperature:
        raise ValueError('--temperature is fitted on the images of --split validation: evaluate it on others')
    if request.split == 'validation' and request.corruptions:
        raise ValueError(
            '--split validation goes without a folder of corrupted images, which are those of the test set'
        )
    if request.testimages and request.corruptions:
        raise ValueError('--testimages goes without a folder of corrupted images, which are those of all test images')
    if request.laplace and request.bnrefresh:
        raise ValueError('--laplace goes without --bnrefresh: it is fitted with the batch statistics of the training')


def require_possible(request: Request, run: Path, config: dict) -> None:
    """Raises a DataError, ModelError or RunError for what cannot be asked of a run with this configuration."""
    flags = config['flags']
    functions = experiment.create(config)
    if flags['dataset'] in request.ood:
        raise DataError(f'--ood {flags["dataset"]}: these are the images that the run knows')
    if request.laplace and not functions.optimizer.is_point:
        raise folders.RunError(f'--laplace: {flags["optim"]} has a posterior of its own')
    if request.laplace and flags['priorprec'] == 0:
        raise folders.RunError('--laplace: a run with --priorprec 0 has no prior, and its posterior no bounds')
    if (request.temperature or request.split == 'validation') and not flags['validation']:
        raise folders.RunError(f'{run} kept no training images out: train with --validation 0.1')
    if request.bnrefresh:
        batches = config['dataset']['num_train'] // flags['batchsize']
        if request.bnrefresh > batches:
            what = f'the training images are {batches} batches of {flags["batchsize"]}'
            raise folders.RunError(f'--bnrefresh {request.bnrefresh}: {what}')
        if not jax.tree.leaves(functions.state_shapes().batch_stats):
            raise folders.RunError(f'--bnrefresh {request.bnrefresh}: {flags["model"]} has no batch normalisation')
