"""A trained run: its weights, images and posterior."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial

import data
import errors
import experiment
import models
from evaluation import corruptions, exported, laplace, posteriors
from evaluation.request import Request
from ops import sharding
from runs import checkpoints, folders, hosts, training_flags


class Trained(NamedTuple):
    """A restored run.

    Attributes:
        run: the run folder.
        config: the content of config.json.
        experiment: the functions that the configuration describes.
        state: the state of the optimizer. Of an export, fields that only training needs are None.
        progress: the training progress of the checkpoint.
    """

    run: Path
    config: dict
    experiment: experiment.Experiment
    state: Any
    progress: checkpoints.Progress

    @property
    def flags(self) -> dict:
        """Returns the flags of the run."""
        return self.config['flags']


def restore(run: Path, step: int | None = None, config: dict | None = None) -> Trained:
    """Restores the newest checkpoint of a run, the checkpoint of `step`, or an export.

    Sends the state to the devices of the current mesh, or to the first device without a mesh. Raises DataError,
    ModelError and RunError.

    Args:
        run: the run folder, or the folder of an export of test.py.
        step: the number of training steps at the checkpoint, None for the newest checkpoint.
        config: the configuration of the run. By default, it is read from the run folder.
    """
    config = config or hosts.from_first(lambda: training_flags.checked_config(run))
    functions = experiment.create(config)
    if not hosts.from_first(lambda: checkpoints.is_export(run)):
        _, state, progress = checkpoints.restore(run, functions.state_shapes(), step)
    elif step is None:
        state, progress = exported.restore(run, config)
    else:
        raise folders.RunError(f'--checkpoint {step} does not apply to {run}: an export holds a single state')
    return Trained(Path(run), config, functions, sharding.send(state), progress)


def initial_weights(path: str | Path, functions: experiment.Experiment, description: dict) -> dict[str, np.ndarray]:
    """Returns weights and batch statistics to start another run from, {name: array}, on the host.

    Leaves out the last layer if the classes differ: their number, or their names.

    Args:
        path: a run folder, the folder of an export, or FILE.safetensors of an export.
        functions: the Experiment of the new run.
        description: the description of the new run's data set.

    Raises:
        DataError, ModelError, RunError: the weights are missing or damaged, or another network has them.
    """
    state = functions.state_shapes()
    needed = checkpoints.named({'params': state.params, 'batch_stats': state.batch_stats})
    weights = {}

    def read():
        held, before = _weights_of(Path(path))
        expected = needed
        same_classes = all(before.get(name, description[name]) == description[name] for name in _CLASSES)
        if not same_classes or any(held[name].shape != x.shape for name, x in needed.items() if name in held):
            head = f'params.{".".join(_last_layer(functions, state, description))}.'
            held, expected = ({n: x for n, x in of.items() if not n.startswith(head)} for of in (held, needed))
        try:
            checkpoints.require_types(held, expected)
        except errors.UserError as error:
            what = f'--init {path} is of another network: {error}'
            raise folders.RunError(f'{what}: name a run with the same --model') from error
        weights.update(held)
        return list(held)

    names = hosts.from_first(read)
    return hosts.arrays_from_first({name: weights.get(name, needed[name]) for name in names})


_CLASSES = ('num_classes', 'class_names')


def _weights_of(path):
    """Returns the weights and batch statistics of a run, an export or a safetensors file, and what its classes were."""
    is_file = path.suffix == '.safetensors'
    folder = path.parent if is_file else path
    is_alone = is_file and not (folder / 'config.json').exists()
    description = {} if is_alone else folders.read_config(folder).get('dataset')
    if is_file or checkpoints.is_export(folder):
        held = exported.tensors(path if is_file else folder / checkpoints.EXPORT)
    else:
        held = checkpoints.arrays(folder)
    held = {name: array for name, array in held.items() if name.startswith(('params.', 'batch_stats.'))}
    return held, description if isinstance(description, dict) else {}


def _last_layer(functions, state, description):
    images = jax.ShapeDtypeStruct((1, *description['image_shape']), np.uint8)
    return models.last_layer(functions.apply, state.params, state.batch_stats, images)


def require_whole(run: Path, config: dict) -> None:
    """Raises a DataError or RunError if the newest checkpoint of a run, or an export, is missing or damaged."""
    if checkpoints.is_export(run):
        exported.require_whole(run, config)
    else:
        checkpoints.require_whole(run)


class Images(NamedTuple):
    """The images of an evaluation, uint8 [N, H, W, C], and their labels, int32 [N].

    Attributes:
        images: the images of the test or validation split, or a part of them.
        labels: the labels of `images`.
        train: (images, labels) that the run was trained on, or None if the request does not need them.
        held_out: (images, labels) that the run held out of training, or None if the request does not need them.
        augmented: whether training augmented the images.
        ood: {name of another data set: (images in the run's shape, their shape [H, W, C] before resizing)}.
        corrupted: {name of a corruption: function(severity) -> images}.
    """

    images: np.ndarray
    labels: np.ndarray
    train: tuple | None
    held_out: tuple | None
    augmented: bool
    ood: dict
    corrupted: dict


def read_images(trained: Trained, request: Request, dataset_folder: str | None) -> Images:
    """Reads all images that a request needs.

    Args:
        trained: the restored run.
        request: what to evaluate.
        dataset_folder: the folder of the data sets, None for the folder that training used.

    Raises:
        DataError: images cannot be read, or are not the images of the run.
    """
    flags, described = trained.flags, trained.config['dataset']
    folder = dataset_folder or training_flags.folder_or_default(flags['datasetfolder'])
    dataset = data.dataset(flags['dataset'], folder, flags['imagesize'])
    train = held_out = None
    if request.temperature or request.split == 'validation' or request.bnrefresh or request.laplace:
        train, held_out = data.read_train(dataset, flags)
        hosts.require_same_arrays('training images', *train)
    found = data.describe(dataset, *train) if train else data.describe_classes(dataset)
    data.require_images_of_run(found, described, folder, trained.run)
    whole_split = held_out if request.split == 'validation' else dataset.read('test')
    images, labels = data.subset('--testimages', request.testimages, *whole_split)
    shape = images.shape[1:]
    data.require_shape(images, request.split, described['image_shape'])
    augmented = dataset.augment and not flags['noaugment']
    ood = {name: _read_ood(name, folder, request.testimages, shape) for name in request.ood}
    corrupted = {} if request.corruptions is None else _read_corrupted(images, labels, request.corruptions)
    return Images(images, labels, train, held_out, augmented, ood, corrupted)


def _read_ood(name, folder, num_images, shape):
    images, labels = data.dataset(name, folder, shape[0]).read('test')
    images, _ = data.subset('--testimages', num_images and min(num_images, len(images)), images, labels)
    return data.resized(images, shape), list(images.shape[1:])


def _read_corrupted(images, labels, folder):
    if folder:
        return corruptions.read_official(folder, images.shape[1:], labels)
    return {name: partial(corruptions.corrupt, name, images=images) for name in corruptions.CORRUPTIONS}


def posterior(
    trained: Trained, images: Images, request: Request, batch_size: int,
    approximation: laplace.Approximation | None = None,
) -> posteriors.Posterior:  # fmt: skip
    """Returns the posterior of a run, or a Laplace approximation of its last layer. Raises RunError.

    Args:
        trained: the restored run.
        images: the images of the evaluation, as from `read_images`.
        request: what to evaluate.
        batch_size: the number of images in a batch.
        approximation: as from `fit_laplace`. By default, it is fitted if the request asks for it.
    """
    functions, state = trained.experiment, trained.state
    sample_key, refresh_key = jax.random.split(experiment.keys(trained.flags['randomseed']).samples)
    sample, is_point = Partial(functions.optimizer.sample, state), functions.optimizer.is_point
    if request.laplace:
        approximation = approximation or fit_laplace(trained, images, request, batch_size)
        sample, is_point = approximation.sample, False
    if request.dropout:
        sample, is_point = Partial(_thinned, sample), False
    refresh = None
    if request.bnrefresh:
        batches = _training_batches(refresh_key, images, request.bnrefresh, trained.flags['batchsize'])
        estimate = partial(posteriors.batch_statistics, functions.update_batch_stats)
        refresh = Partial(estimate, state.batch_stats, batches)
    return posteriors.Posterior(
        functions.apply, sample, state.params, state.batch_stats, sample_key, batch_size,
        is_point=is_point, refresh=refresh,
    )  # fmt: skip


def _thinned(sample, key):
    """Returns the weights of a sample with a seed for its dropout. Leaves the weights as they are without dropout."""
    return experiment.Thinned(sample(key), jax.random.bits(jax.random.fold_in(key, 1)))


def fit_laplace(trained: Trained, images: Images, request: Request, batch_size: int) -> laplace.Approximation:
    """Returns the Laplace approximation of a run that a request asks for. Raises ModelError and RunError.

    The arguments are as for `posterior`.
    """
    functions, state = trained.experiment, trained.state
    apply = models.with_features(functions.apply)
    if not jax.device_get(experiment.all_finite(state)):
        raise folders.RunError('--laplace: the weights of the run are not finite, so a posterior cannot be fitted')
    path = models.last_layer(functions.apply, state.params, state.batch_stats, images.train[0][:1])
    layer = jax.device_get(laplace.layer_of(state.params, path))
    weights = np.concatenate([layer['kernel'], layer['bias'][None]])
    prior_precision = trained.flags['priorprec'] if request.laplaceprior == 'training' else None
    fit = laplace.fit(
        Partial(apply, state.params, state.batch_stats), weights, *images.train, batch_size, functions.num_data,
        request.laplace, prior_precision,
    )  # fmt: skip

    def probit(images):
        held, parts = (state.params, fit.posterior), posteriors.parts(images, batch_size)
        return posteriors.probs_at(partial(laplace.probit_logits, apply), held, state.batch_stats, parts, batch_size)

    sample = Partial(partial(laplace.sample, path), fit.posterior, state.params)
    return laplace.Approximation(fit, sample, probit)


def _training_batches(key, images, num_batches, batch_size):
    """Returns uint8 [num_batches, B, H, W, C], shuffled and augmented as in training."""
    order_key, augment_key = jax.random.split(key)
    order = jax.device_get(data.shuffled_batches(order_key, len(images.train[0]), batch_size))[:num_batches]
    batches = sharding.send(images.train[0][order])
    if images.augmented:
        batches = jax.vmap(data.augment)(jax.random.split(augment_key, num_batches), batches)
    return batches
