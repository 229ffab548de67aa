"""Further measurements: curves over samples, temperature scaling, out-of-distribution detection, corrupted images."""

from collections.abc import Callable, Sequence

import numpy as np
from tqdm import tqdm

import metrics
from evaluation import corruptions, posteriors
from runs import hosts


def curve(predictions: list, numbers: Sequence[int], labels: np.ndarray, num_bins: int) -> list[dict[str, float]]:
    """Returns accuracy, NLL and ECE for each number of samples, [{'testmc': n, 'accuracy': ..., ...}, ...].

    Args:
        predictions: a posteriors.Prediction for each number of samples.
        numbers: the numbers of samples.
        labels: int [N].
        num_bins: the number of bins of the ECE.
    """
    return [
        {'testmc': n} | _short_summary(prediction.probs, labels, num_bins)
        for n, prediction in zip(numbers, predictions, strict=True)
    ]


def _short_summary(probs, labels, num_bins):
    summary = metrics.summary(probs, labels, num_bins)
    return {name: summary[name] for name in metrics.SHORT}


def tempered(
    posterior: posteriors.Posterior, prediction: posteriors.Prediction, labels: np.ndarray, held_out: tuple,
    num_samples: int, num_bins: int,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Returns the metrics after temperature scaling, {'mean': {name: value}, 'average': {name: value}}.

    Mean and average have a temperature each, returned as 'temperature'. The temperature minimises the NLL of the
    held-out images. 'at_bound' says whether it is the lowest or the highest temperature that is tried.

    Args:
        posterior: the posterior of the run.
        prediction: the posterior's prediction for the evaluated images.
        labels: int [N], of the evaluated images.
        held_out: (images uint8 [M, H, W, C], labels int [M]), held out of training.
        num_samples: the number of posterior samples.
        num_bins: the number of bins of ECE and MCE.
    """
    images, held_labels = held_out
    (held,) = posterior.predict(images, [num_samples])
    pairs = {'mean': (held.probs_at_mean, prediction.probs_at_mean), 'average': (held.probs, prediction.probs)}
    results = {}
    for at, (held_probs, probs) in pairs.items():
        temperature = metrics.fit_temperature(held_probs, held_labels)
        summary = metrics.summary(metrics.temper(probs, temperature), labels, num_bins)
        results[at] = {'temperature': temperature, 'at_bound': temperature in metrics.TEMPERATURES} | summary
    return results


def all_ood(
    posterior: posteriors.Posterior, known: posteriors.Prediction, sets: dict[str, tuple], num_samples: int
) -> dict[str, dict]:
    """Returns the result of `ood_detection` for every data set, {name: {'num_images', 'shape', 'mean', 'average'}}.

    Args:
        posterior: the posterior of the run.
        known: the prediction for images of the run's data set (in distribution).
        sets: {name: (images uint8 [N, H, W, C] in the run's shape, the shape [H, W, C] before resizing)}.
        num_samples: the number of posterior samples.
    """
    results = {}
    for name, (images, shape) in sets.items():
        (prediction,) = posterior.predict(images, [num_samples])
        results[name] = {'num_images': len(images), 'shape': shape} | ood_detection(known, prediction)
    return results


def ood_detection(known: posteriors.Prediction, prediction: posteriors.Prediction) -> dict[str, dict]:
    """Returns how well each score separates unknown images from known images: {'mean': {score: {...}}, 'average': ...}.

    Scores are 'max_prob', 'entropy', 'energy', 'max_logit' (Hendrycks et al., 2022) and, in 'average',
    'mutual_information'. In 'average', energy and largest logit are averages over samples. Scores that are constant or
    not known are left out.

    Each score has these measures (Hendrycks & Gimpel, 2017; Liang et al., 2018):
        auroc: the area under the ROC curve.
        aupr_unknown, aupr_known: the average precision with unknown images, or known images, as positives.
        fpr95: the share of unknown images that are accepted if the threshold accepts 95 % of the known images.

    Args:
        known: the prediction for images of the run's data set (in distribution).
        prediction: the prediction for unknown images (out of distribution).
    """
    is_unknown = np.repeat([False, True], [len(known.probs), len(prediction.probs)])
    results = {}
    for at in ('mean', 'average'):
        of_unknown = _scores(prediction, at)
        scores = {name: np.concatenate([s, of_unknown[name]]) for name, s in _scores(known, at).items()}
        # Leaves out constant scores, such as the mutual information of a point estimate, which is 0.
        varying = {name: s for name, s in scores.items() if not np.ptp(s) <= 1e-9}
        results[at] = {name: _separation(s, is_unknown) for name, s in varying.items()}
    return results


def _scores(prediction, at):
    """Returns several scores of every image, {name: float [N]}. A higher score means a less certain prediction."""
    probs = prediction.probs_at_mean if at == 'mean' else prediction.probs
    scores = {'max_prob': -probs.max(axis=1), 'entropy': metrics.entropy(probs)}
    if at == 'mean':
        return scores | {'energy': metrics.energy(prediction.logits), 'max_logit': -prediction.logits.max(axis=1)}
    if prediction.energy is not None:
        scores |= {'energy': prediction.energy, 'max_logit': -prediction.max_logit}
    return scores | {'mutual_information': prediction.mutual_information}


def _separation(scores, is_unknown):
    return {
        'auroc': metrics.area_under_roc(scores, is_unknown),
        'aupr_unknown': metrics.area_under_precision_recall(scores, is_unknown),
        'aupr_known': metrics.area_under_precision_recall(-scores, ~is_unknown),
        'fpr95': metrics.fpr_at_95_tpr(-scores, ~is_unknown),
    }


def all_corrupted(
    posterior: posteriors.Posterior, sets: dict[str, Callable], labels: np.ndarray, num_samples: int, num_bins: int
) -> dict[str, list[dict]]:
    """Returns accuracy, NLL and ECE on corrupted images.

    Args:
        posterior: the posterior of the run.
        sets: {name: function(severity) -> images uint8 [N, H, W, C]}.
        labels: int [N].
        num_samples: the number of posterior samples.
        num_bins: the number of bins of the ECE.

    Returns:
        {name: [{'mean': {...}, 'average': {...}} for each severity]}.
    """
    results = {}
    total = len(sets) * len(corruptions.SEVERITIES)
    hidden = None if hosts.is_first() else True
    with tqdm(None, 'corruptions', total, leave=False, disable=hidden) as progress:
        for name, at_severity in sets.items():
            results[name] = []
            for severity in corruptions.SEVERITIES:
                images = at_severity(severity=severity)
                results[name].append(_corrupted(posterior, images, labels, num_samples, num_bins))
                progress.update()
    return results


def _corrupted(posterior, images, labels, num_samples, num_bins):
    (prediction,) = posterior.predict(images, [num_samples])
    probs = {'mean': prediction.probs_at_mean, 'average': prediction.probs}
    return {at: _short_summary(p, labels, num_bins) for at, p in probs.items()}


def over_corruptions(results: dict[str, list[dict]], at: str) -> list[dict[str, float]]:
    """Returns the mean of each metric over the corruptions, [{metric: value} at severity 1, ..., 5].

    `corruptions.in_mean` chooses the corruptions.

    Args:
        results: as from `all_corrupted`.
        at: 'mean' or 'average'.
    """
    averaged = [results[name] for name in corruptions.in_mean(results)]
    return [_means(group, at) for group in zip(*averaged, strict=True)]


def over_severities(points: list[dict]) -> dict[str, dict[str, float]]:
    """Returns the mean of each metric over the severities, {'mean': {metric: value}, 'average': ...}."""
    return {at: _means(points, at) for at in ('mean', 'average')}


def _means(points, at):
    return {name: float(np.mean([point[at][name] for point in points])) for name in points[0][at]}
