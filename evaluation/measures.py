"""The evaluation of a run: what its posterior is worth on test, out-of-distribution (OOD) and corrupted images."""

import io
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial
from tqdm import tqdm

import data
import errors
import experiments
import metrics
import models
import training
from evaluation import corruptions, laplace, posteriors
from ops import sharding
from readers import npy
from runs import checkpoints, folders, hosts, json_files, training_flags


class Trained(NamedTuple):
    """A trained run: its configuration, what that means, the optimizer's state and how far training was."""

    config: dict
    experiment: experiments.Experiment
    state: Any
    progress: checkpoints.Progress


class Subject(NamedTuple):
    """A run that is evaluated: its images uint8 [N, H, W, C] and int32 [N] of the split, and its posterior.

    held_out has the images and labels that the run kept out of training, None where they are not wanted.
    """

    run: Path
    config: dict
    progress: checkpoints.Progress
    dataset_folder: str
    images: np.ndarray
    labels: np.ndarray
    held_out: Any
    posterior: posteriors.Posterior

    @property
    def flags(self):
        return self.config['flags']


def restore(run, step=None):
    """A run folder's newest checkpoint, or that of `step`, as Trained. Raises DataError, ModelError and RunError.

    The state's arrays are on the devices of the mesh that is set, or on the first.
    """
    config = hosts.from_first(lambda: training_flags.read_config(run))
    data.check_description(config.get('dataset'), Path(run) / 'config.json')
    experiment = experiments.create(config)
    _, state, progress = checkpoints.restore(run, experiment.state_shapes(), step)
    return Trained(config, experiment, sharding.send(state), progress)


def load(run, *, split, with_held_out, num_images, step, dataset_folder, batch_size, bn_refresh, with_laplace):
    """The Subject of a run, of which assessment.require_possible has found that it can be.

    Raises DataError, DeviceError, ModelError and RunError.

    with_held_out: whether the images are wanted that the run kept out of training, besides those of the split;
    num_images: of the split, None for all; step: a checkpoint, None for the newest; bn_refresh: training batches over
    which batch statistics of each weights are estimated again, None for those of training; with_laplace: the posterior
    is a Laplace approximation of the last layer.
    """
    config, experiment, state, progress = restore(run, step)
    flags = config['flags']
    folder = dataset_folder or training_flags.folder_there(flags['datasetfolder'])
    dataset = data.dataset(flags['dataset'], folder)
    needs_training_images = with_held_out or split == 'validation' or bn_refresh or with_laplace
    train, held_out = data.read_train(dataset, flags) if needs_training_images else (None, None)
    found = data.describe(dataset, *train) if train else {'num_classes': dataset.num_classes}
    data.require_same(found, config['dataset'], folder, run)
    if train:
        hosts.require_same_arrays('training images', *train)
    whole_split = held_out if split == 'validation' else dataset.read('test')
    images, labels = data.subset('--testimages', num_images, *whole_split)
    if list(images.shape[1:]) != config['dataset']['image_shape']:
        raise data.DataError(
            f'the {split} images are {images.shape[1:]}, not {config["dataset"]["image_shape"]} as in training'
        )
    sample = Partial(experiment.optimizer.sample, state)
    if with_laplace:
        sample = _laplace_sample(experiment, flags, state, batch_size, train[0])
    posterior = _posterior(experiment, flags, state, sample, batch_size, bn_refresh, train, dataset.augment)
    return Subject(run, config, progress, folder, images, labels, held_out, posterior)


def _laplace_sample(experiment, flags, state, batch_size, images):
    """sample(key) of a Laplace approximation around the trained weights. Raises RunError."""
    if not jax.device_get(training.all_finite(state)):
        raise folders.RunError('--laplace: weights of the run are not finite, so that there is nothing to approximate')
    layer = models.LAST_LAYERS[flags['model']]
    outputs = Partial(models.with_features(experiment.apply, layer), state.params, state.batch_stats)
    factors = laplace.fit(outputs, images, batch_size, experiment.num_data, flags['priorprec'])
    return Partial(partial(laplace.sample, layer), factors, state.params)


def _posterior(experiment, flags, state, sample, batch_size, bn_refresh, train, augment):
    sample_key, refresh_key = jax.random.split(experiments.keys(flags['randomseed']).samples)
    refresh = None
    if bn_refresh:
        batches = _training_batches(refresh_key, train[0], bn_refresh, flags, augment)
        refresh = Partial(partial(posteriors.batch_statistics, experiment.update), state.batch_stats, batches)
    apply, params, batch_stats = experiment.apply, state.params, state.batch_stats
    return posteriors.Posterior(apply, sample, params, batch_stats, sample_key, batch_size, refresh)


def _training_batches(key, images, num_batches, flags, augment):
    """uint8 [num_batches, B, H, W, C], shuffled and augmented as in training."""
    order_key, augment_key = jax.random.split(key)
    batches = jax.device_get(data.shuffled_batches(order_key, len(images), flags['batchsize']))[:num_batches]
    batches = sharding.send(images[batches])
    if augment and not flags['noaugment']:
        batches = jax.vmap(data.augment)(jax.random.split(augment_key, num_batches), batches)
    return batches


def measure(prediction, labels, num_bins):
    """All metrics, {'mean': {name: value}, 'average': ..., 'intervals': {'mean': {name: (low, high)}, 'average': ...}}.

    Both have the mean entropy over the images besides, the average also its mutual information and disagreement.
    'reliability' has the bins of ECE.
    """
    probs = {'mean': prediction.probs_at_mean, 'average': prediction.probs}
    measured = {at: metrics.summary(p, labels, num_bins) for at, p in probs.items()}
    measured['mean']['entropy'] = float(metrics.entropy(probs['mean']).mean())
    diverged = not np.isfinite(prediction.probs).all()  # the votes of such a network do not tell
    for name in ('entropy', 'mutual_information', 'disagreement'):
        measured['average'][name] = math.nan if diverged else float(getattr(prediction, name).mean())
    measured['intervals'] = {at: _intervals(p, labels, num_bins) for at, p in probs.items()}
    measured['reliability'] = {at: _reliability(p, labels, num_bins) for at, p in probs.items()}
    return measured


def _reliability(probs, labels, num_bins):
    return {name: values.tolist() for name, values in metrics.reliability(probs, labels, num_bins).items()}


def _intervals(probs, labels, num_bins):
    tested = metrics.with_intervals(num_bins)
    if not np.isfinite(probs).all():
        return dict.fromkeys(tested, (math.nan, math.nan))
    return {name: metrics.interval(values) for name, values in metrics.resampled(tested, probs, labels).items()}


def curve(predictions, numbers, labels, num_bins):
    """Accuracy, NLL and ECE after each number of samples, [{'testmc': n, 'accuracy': ..., ...}, ...]."""
    return [
        {'testmc': n} | _short_summary(prediction.probs, labels, num_bins)
        for n, prediction in zip(numbers, predictions, strict=True)
    ]


def _short_summary(probs, labels, num_bins):
    summary = metrics.summary(probs, labels, num_bins)
    return {name: summary[name] for name in metrics.SHORT}


def tempered(subject, prediction, num_samples, num_bins):
    """The metrics at the temperature that is best for images kept out of training, {'mean': ..., 'average': ...}."""
    images, held_labels = subject.held_out
    (held,) = subject.posterior.predict(images, [num_samples])
    pairs = {'mean': (held.probs_at_mean, prediction.probs_at_mean), 'average': (held.probs, prediction.probs)}
    results = {}
    for at, (held_probs, probs) in pairs.items():
        temperature = metrics.fit_temperature(held_probs, held_labels)
        summary = metrics.summary(metrics.temper(probs, temperature), subject.labels, num_bins)
        results[at] = {'temperature': temperature} | summary
    return results


def read_ood(subject, name, num_images):
    """The test images of another data set in the shape of the run's, and the shape that they had. Raises DataError.

    num_images: that many of them at most, None for all.
    """
    images, labels = data.dataset(name, subject.dataset_folder).read('test')
    images, _ = data.subset('--testimages', num_images and min(num_images, len(images)), images, labels)
    return data.resized(images, subject.images.shape[1:]), list(images.shape[1:])


def all_ood(subject, known, sets, num_samples):
    """`ood_detection` of every data set, {name: {'num_images', 'shape', 'mean', 'average'}}; sets: as from read_ood."""
    results = {}
    for name, (images, shape) in sets.items():
        (prediction,) = subject.posterior.predict(images, [num_samples])
        results[name] = {'num_images': len(images), 'shape': shape} | ood_detection(known, prediction)
    return results


def ood_detection(known, prediction):
    """How well scores tell the images of `prediction` from the known ones: {'mean': {score: {...}}, 'average': ...}.

    auroc; aupr_unknown and aupr_known, by which of the two counts as positive; fpr95, the share of unknown images that
    pass the threshold which 95 % of the known ones pass (Hendrycks & Gimpel, 2017; Liang et al., 2018).
    """
    is_unknown = np.repeat([False, True], [len(known.probs), len(prediction.probs)])
    results = {}
    for at in ('mean', 'average'):
        of_unknown = _scores(prediction, at)
        scores = {name: np.concatenate([s, of_unknown[name]]) for name, s in _scores(known, at).items()}
        varying = {name: s for name, s in scores.items() if not np.ptp(s) <= 1e-9}  # a point has no mutual information
        results[at] = {name: _separation(s, is_unknown) for name, s in varying.items()}
    return results


def _scores(prediction, at):
    """The uncertainty of every image in several ways, greater for less certain ones."""
    probs = prediction.probs_at_mean if at == 'mean' else prediction.probs
    scores = {'max_prob': -probs.max(axis=1), 'entropy': metrics.entropy(probs)}
    return scores if at == 'mean' else scores | {'mutual_information': prediction.mutual_information}


def _separation(scores, is_unknown):
    return {
        'auroc': metrics.area_under_roc(scores, is_unknown),
        'aupr_unknown': metrics.area_under_precision_recall(scores, is_unknown),
        'aupr_known': metrics.area_under_precision_recall(-scores, ~is_unknown),
        'fpr95': metrics.fpr_at_95_tpr(-scores, ~is_unknown),
    }


def read_corrupted(subject, folder):
    """The corruptions of the run's test images, {name: function(severity) -> images}.

    folder: that of the official files, or None for the built-in corruptions. Raises DataError.
    """
    images = subject.images
    if folder is not None:
        return corruptions.read_official(folder, images.shape[1:], subject.labels)
    return {name: partial(corruptions.corrupt, name, images=images) for name in corruptions.CORRUPTIONS}


def all_corrupted(subject, sets, num_samples, num_bins):
    """Accuracy, NLL and ECE of corrupted images, {name: [{'mean': {...}, 'average': {...}} of severity 1, ..., 5]}."""
    results = {}
    total = len(sets) * len(corruptions.SEVERITIES)
    hidden = None if hosts.is_first() else True
    with tqdm(None, 'corruptions', total, leave=False, disable=hidden) as progress:
        for name, at_severity in sets.items():
            results[name] = []
            for severity in corruptions.SEVERITIES:
                results[name].append(_corrupted(subject, at_severity(severity=severity), num_samples, num_bins))
                progress.update()
    return results


def _corrupted(subject, images, num_samples, num_bins):
    (prediction,) = subject.posterior.predict(images, [num_samples])
    probs = {'mean': prediction.probs_at_mean, 'average': prediction.probs}
    return {at: _short_summary(p, subject.labels, num_bins) for at, p in probs.items()}


def over_corruptions(results, at):
    """Returns the mean of each metric over corruptions.in_mean, [{name: value} of severity 1, ..., 5].

    results: of `all_corrupted`.
    """
    averaged = [results[name] for name in corruptions.in_mean(results)]
    return [_means(group, at) for group in zip(*averaged, strict=True)]


def over_severities(points):
    """The means over severities of each metric of one corruption, {'mean': {name: value}, 'average': ...}."""
    return {at: _means(points, at) for at in ('mean', 'average')}


def _means(points, at):
    return {name: float(np.mean([point[at][name] for point in points])) for name in points[0][at]}


def write_predictions(path, prediction, subject, num_samples):
    """predictions.npz, whose format the README documents. Raises RunError."""
    progress = subject.progress
    arrays = {
        'labels': subject.labels.astype(np.int32),
        'logits': prediction.logits.astype(np.float32),
        'probs': prediction.probs.astype(np.float32),
        'log_probs': _log(prediction.probs).astype(np.float32),
        'entropy': prediction.entropy.astype(np.float32),
        'expected_entropy': prediction.expected_entropy.astype(np.float32),
        'votes': prediction.votes,
        'num_samples': np.int32(num_samples),
        'trained': np.int32([progress.epoch, progress.step]),
    }
    with io.BytesIO() as file:
        np.savez_compressed(file, **arrays)
        json_files.write_bytes(path, file.getvalue())


def _log(probs):
    with np.errstate(divide='ignore'):
        return np.log(probs)


def read_predictions(path):
    """(labels, Prediction, num_samples, checkpoints.Progress) of predictions.npz. Raises RunError."""
    try:
        arrays = npy.load_npz(path)
        held = {name: arrays[name] for name in _TYPES}
    except (errors.UserError, KeyError) as error:
        raise folders.RunError(f'{path} is missing or damaged ({error}): evaluate the run without --reuse') from error
    n, k = held['logits'].shape if held['logits'].ndim == 2 else (0, 0)
    shapes = {'labels': (n,), 'logits': (n, k), 'log_probs': (n, k), 'expected_entropy': (n,), 'votes': (n, k)}
    shapes['trained'] = (2,)
    fits = all(
        held[name].shape == shapes.get(name, ()) and held[name].dtype.kind == kind for name, kind in _TYPES.items()
    )
    fits = fits and n and 0 <= held['labels'].min() <= held['labels'].max() < k
    fits = fits and held['trained'].min() >= 0 and held['votes'].min() >= 0 and held['num_samples'] > 0
    if not fits or (held['votes'].sum(axis=1) != held['num_samples']).any():
        raise folders.RunError(f'{path} is not what test.py writes: evaluate the run without --reuse')
    probs = metrics.softmax(held['log_probs'])
    prediction = posteriors.Prediction(held['logits'], probs, held['expected_entropy'], held['votes'])
    return held['labels'], prediction, int(held['num_samples']), checkpoints.Progress(*held['trained'].tolist())


_TYPES = {
    'labels': 'i', 'logits': 'f', 'log_probs': 'f', 'expected_entropy': 'f', 'votes': 'i', 'num_samples': 'i',
    'trained': 'i',
}  # fmt: skip
