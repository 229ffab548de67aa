"""Requests: what test.py measures of a run, and the files that it writes."""

import argparse
import dataclasses
from pathlib import Path

import jax

import experiment
import models
from evaluation import laplace
from readers.files import DataError
from runs import folders, parsing, training_flags
from runs.parsing import integer


@dataclasses.dataclass(frozen=True)
class Request:
    """Says what to measure of a run. Each field has the name and the default of a flag of test.py.

    Attributes:
        split: 'test' or 'validation', the images that the run held out.
        testmc: numbers of posterior samples, in rising order. All metrics use the last number.
        testimages: the number of images of each set, None for all.
        bins: the number of bins of ECE, MCE and the reliability diagram.
        bnrefresh: the number of training batches that re-estimate batch statistics, None to keep the statistics of
            training.
        temperature: whether to measure at the best temperature as well.
        ood: names of data sets for out-of-distribution (OOD) detection.
        corruptions: a folder of corrupted images, '' for the built-in corruptions, None for no corruptions.
        laplace: the structure of a Laplace approximation of the last layer, a name in laplace.STRUCTURES. None for no
            approximation.
        laplaceprior: the prior precision of the approximation: 'marglik' to maximise the marginal likelihood, or
            'training'.
        dropout: whether dropout thins the network of each sample.
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
    laplace: str | None = None
    laplaceprior: str = 'marglik'
    dropout: bool = False
    checkpoint: int | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> 'Request':
        """Returns the Request of the flags of test.py."""
        values = {field.name: getattr(args, field.name) for field in dataclasses.fields(cls)}
        return cls(**values | {'testmc': tuple(sorted(set(args.testmc))), 'ood': tuple(args.ood)})

    @property
    def num_samples(self) -> int:
        """Returns the number of posterior samples that all metrics use."""
        return self.testmc[-1]

    def arguments(self) -> list[str]:
        """Returns the flags of test.py that make an equal Request."""
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
        """Returns the entries of metrics.json about this request."""
        names = ('split', 'testimages', 'testmc', 'bins', 'bnrefresh')
        recorded = {name: getattr(self, name) for name in names} | {'testmc': self.num_samples}
        how = {'structure': self.laplace, 'prior': self.laplaceprior}
        return recorded | {'laplace': how if self.laplace else False}

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
        marks = [self.split] * (self.split != 'test') + ['laplace'] * bool(self.laplace) + ['dropout'] * self.dropout
        return ''.join(f'-{mark}' for mark in [*marks, *([] if self.checkpoint is None else [self.checkpoint])])


def add_flags(parser: parsing.Parser) -> None:
    """Adds the flags of a Request to the parser of test.py."""
    add = parser.add_argument_group('what to measure').add_argument
    help = 'average probabilities over N posterior samples; several numbers give a curve (default: 1)'
    add('--testmc', type=integer(1), nargs='+', default=[*Request.testmc], metavar='N', help=help)
    help = 'evaluate the checkpoint after STEP steps instead of the newest'
    add('--checkpoint', type=integer(0), metavar='STEP', help=help)
    help = 'evaluate on the test set, or on the images that train.py --validation held out'
    add('--split', type=parsing.choice(('test', 'validation')), default=Request.split, help=help)
    help = 'evaluate N images of each set, the same images for every run (default: all)'
    add('--testimages', type=integer(1), metavar='N', help=help)
    help = 'number of bins of ECE, MCE and the reliability diagram'
    add('--bins', type=integer(1, below=10_001), default=Request.bins, help=help)
    help = 're-estimate the batch statistics of the mean and of every sample over K training batches'
    add('--bnrefresh', type=integer(1), metavar='K', help=help)
    help = 'keep dropout in posterior samples: each sample is one thinned network (MC dropout)'
    add('--dropout', action='store_true', help=help)
    help = 'also measure at the temperature with the best NLL on the images that train.py --validation held out'
    add('--temperature', action='store_true', help=help)
    help = 'detect images from these other data sets (out of distribution); names as in train.py --dataset'
    add('--ood', type=training_flags.dataset_name, nargs='+', default=[], metavar='NAME', help=help)
    help = 'evaluate corrupted test images: built-in corruptions, or the official FOLDER of CIFAR-10-C or CIFAR-100-C'
    add('--corruptions', type=_builtin_or_folder, nargs='?', const='', metavar='FOLDER', help=help)
    help = 'add a post-hoc posterior to a point estimate: a Laplace approximation of the last layer'
    add('--laplace', type=parsing.choice(laplace.STRUCTURES), nargs='?', const='kron', help=f'{help} (alone: kron)')
    help = "prior precision of --laplace: maximises the marginal likelihood, or the training's"
    add('--laplaceprior', type=parsing.choice(laplace.PRIORS), default=Request.laplaceprior, help=help)


def _size_of_last_layer(functions, image_shape):
    """Returns (number of features + 1, number of classes) of the last layer. Raises ModelError."""
    state, images = functions.state_shapes(), jax.ShapeDtypeStruct((1, *image_shape), 'uint8')
    path = models.last_layer(functions.apply, state.params, state.batch_stats, images)
    num_features, num_classes = laplace.layer_of(state.params, path)['kernel'].shape
    return num_features + 1, num_classes


def _builtin_or_folder(text):
    return text and parsing.folder(text)


def require_consistency(request: Request) -> None:
    """Raises a ValueError for flags that cannot be combined."""
    if request.split == 'validation' and request.temperature:
        raise ValueError('--temperature cannot be combined with --split validation: it is fitted on these images')
    if request.split == 'validation' and request.corruptions:
        raise ValueError(
            '--split validation cannot be combined with --corruptions FOLDER: the folder has corrupted test images'
        )
    if request.testimages and request.corruptions:
        raise ValueError(
            '--testimages cannot be combined with --corruptions FOLDER: the folder covers the whole test set'
        )
    if request.dropout and request.bnrefresh:
        raise ValueError('--dropout cannot be combined with --bnrefresh: the batch statistics are of whole networks')
    if request.laplace and request.bnrefresh:
        raise ValueError(
            '--laplace cannot be combined with --bnrefresh: it is fitted with the batch statistics of training'
        )


def require_possible(request: Request, run: Path, config: dict) -> None:
    """Raises a DataError, ModelError or RunError if a run with this configuration cannot be evaluated as requested."""
    flags = config['flags']
    functions = experiment.create(config)
    if flags['dataset'] in request.ood:
        raise DataError(f'--ood {flags["dataset"]}: {run} was trained on this data set; name another')
    if request.laplace and not functions.optimizer.is_point:
        raise folders.RunError(f'--laplace does not apply to {run}: {flags["optim"]} has a posterior of its own')
    if request.laplace and request.laplaceprior == 'training' and flags['priorprec'] == 0:
        raise folders.RunError(
            f'--laplaceprior training does not apply to {run}: --priorprec 0 means no prior, so its posterior is '
            'unbounded'
        )
    if request.laplace == 'full':
        laplace.require_small('full', *_size_of_last_layer(functions, config['dataset']['image_shape']))
    if (request.temperature or request.split == 'validation') and not flags['validation']:
        raise folders.RunError(f'{run} held out no training images: train with --validation 0.1')
    if request.dropout and not functions.has_dropout:
        raise folders.RunError(f'--dropout does not apply to {run}: its network {flags["model"]} has no dropout')
    if request.bnrefresh:
        batches = config['dataset']['num_train'] // flags['batchsize']
        if request.bnrefresh > batches:
            what = f'the training images make only {batches} batches of {flags["batchsize"]}'
            raise folders.RunError(f'--bnrefresh {request.bnrefresh}: {what}')
        if not jax.tree.leaves(functions.state_shapes().batch_stats):
            raise folders.RunError(f'--bnrefresh {request.bnrefresh}: {flags["model"]} has no batch normalisation')
