"""What is measured beside the metrics: curves over samples, temperature, unknown and corrupted images."""

import numpy as np
from tqdm import tqdm

import metrics
from evaluation import corruptions
from runs import hosts


def curve(predictions, numbers, labels, num_bins):
    """Returns accuracy, NLL and ECE after each number of samples, [{'testmc': n, 'accuracy': ..., ...}, ...]."""
    return [
        {'testmc': n} | _short_summary(prediction.probs, labels, num_bins)
        for n, prediction in zip(numbers, predictions, strict=True)
    ]


def _short_summary(probs, labels, num_bins):
    summary = metrics.summary(probs, labels, num_bins)
    return {name: summary[name] for name in metrics.SHORT}


def tempered(posterior, prediction, labels, held_out, num_samples, num_bins):
    """Returns the metrics at the temperature that is best for held-out images, {'mean': ..., 'average': ...}."""
    images, held_labels = held_out
    (held,) = posterior.predict(images, [num_samples])
    pairs = {'mean': (held.probs_at_mean, prediction.probs_at_mean), 'average': (held.probs, prediction.probs)}
    results = {}
    for at, (held_probs, probs) in pairs.items():
        temperature = metrics.fit_temperature(held_probs, held_labels)
        summary = metrics.summary(metrics.temper(probs, temperature), labels, num_bins)
        results[at] = {'temperature': temperature} | summary
    return results


def all_ood(posterior, known, sets, num_samples):
    """Returns `ood_detection` for every data set, {name: {'num_images', 'shape', 'mean', 'average'}}.

    Args:
        posterior: of the run.
        known: its Prediction for images that it knows.
        sets: {name: (images, the shape that they had)}.
        num_samples: of the posterior.
    """
    results = {}
    for name, (images, shape) in sets.items():
        (prediction,) = posterior.predict(images, [num_samples])
        results[name] = {'num_images': len(images), 'shape': shape} | ood_detection(known, prediction)
    return results


def ood_detection(known, prediction):
    """Returns how well scores detect the images of `prediction`: {'mean': {score: {...}}, 'average': ...}.

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
    """Returns the uncertainty of every image in several ways, greater for less certain images."""
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


def all_corrupted(posterior, sets, labels, num_samples, num_bins):
    """Returns accuracy, NLL and ECE of corrupted images, {name: [{'mean': {...}, 'average': {...}} of each severity]}.

    sets: {name: function(severity) -> images uint8 [N, H, W, C]}.
    """
    results = {}
    total = len(sets) * len(corruptions.SEVERITIES)
    hidden = None if hosts.is_first() else True
    with tqdm(None, 'corruptions', total, leave=False, disable=hidden) as progress:
        for name, at_severity in sets.items():
            results[name] = []
            for severity in corruptions.SEVERITIES:
                results[name].append(
                    _corrupted(posterior, at_severity(severity=severity), labels, num_samples, num_bins)
                )
                progress.update()
    return results


def _corrupted(posterior, images, labels, num_samples, num_bins):
    (prediction,) = posterior.predict(images, [num_samples])
    probs = {'mean': prediction.probs_at_mean, 'average': prediction.probs}
    return {at: _short_summary(p, labels, num_bins) for at, p in probs.items()}


def over_corruptions(results, at):
    """Returns the mean of each metric over corruptions.in_mean, [{name: value} of severity 1, ..., 5].

    results: of `all_corrupted`.
    """
    averaged = [results[name] for name in corruptions.in_mean(results)]
    return [_means(group, at) for group in zip(*averaged, strict=True)]


def over_severities(points):
    """Returns the means over severities of each metric of one corruption, {'mean': {name: value}, 'average': ...}."""
    return {at: _means(points, at) for at in ('mean', 'average')}


def _means(points, at):
    return {name: float(np.mean([point[at][name] for point in points])) for name in points[0][at]}
