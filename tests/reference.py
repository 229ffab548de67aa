"""SGD, SAM, bSAM and ASAM in plain NumPy, from the equations of Möllenhoff & Khan (2023) and Kwon et al. (2021).

Weights are one vector; gradient(w, stats, sub_batch) returns (loss, gradient, new stats). Slow and obvious.
"""

import numpy as np


def sgd_step(w, m, stats, batch, gradient, rate, beta1, decay):
    loss, g, stats = gradient(w, stats, batch)
    m = beta1 * m + g + decay * w
    return w - rate * m, m, stats, loss


def sam_step(w, m, stats, sub_batches, gradient, rate, beta1, decay, rho):
    losses, gradients, kept = [], [], None
    for sub_batch in sub_batches:
        _, g, new_stats = gradient(w, stats, sub_batch)
        loss, g, new_stats = gradient(w + rho * g / np.sqrt(np.sum(g**2)), new_stats, sub_batch)
        losses.append(loss)
        gradients.append(g)
        kept = new_stats if kept is None else kept
    m = beta1 * m + np.mean(gradients, axis=0) + decay * w
    return w - rate * m, m, kept, np.mean(losses)


def bsam_step(w, m, s, stats, sub_batches, noises, gradient, rate, beta1, beta2, decay, rho, damping, num_data):
    losses, gradients, magnitudes, kept = [], [], [], None
    for sub_batch, noise in zip(sub_batches, noises, strict=True):
        theta = w + noise / np.sqrt(num_data * s)
        _, g, new_stats = gradient(theta, stats, sub_batch)
        loss, perturbed_g, new_stats = gradient(w + rho * g / s, new_stats, sub_batch)
        losses.append(loss)
        gradients.append(perturbed_g)
        magnitudes.append(np.sqrt(s) * np.abs(g))
        kept = new_stats if kept is None else kept
    m = beta1 * m + (1 - beta1) * (np.mean(gradients, axis=0) + decay * w)
    w_next = w - rate * m / s
    s_next = beta2 * s + (1 - beta2) * (np.mean(magnitudes, axis=0) + damping + decay)
    return w_next, m, s_next, kept, np.mean(losses)


def asam_step(w, m, sub_batches, gradient, rate, beta1, decay, rho, eta, is_bias):
    """Takes a step of ASAM (Kwon et al., 2021) that perturbs each sub-batch on its own. Returns the new (w, m)."""
    grads = []
    for sub_batch in sub_batches:
        _, g, _ = gradient(w, 0.0, sub_batch)
        size = np.where(is_bias, 1.0, np.abs(w) + eta)
        perturbation = rho * size**2 * g / np.sqrt(np.sum((size * g) ** 2))
        _, g, _ = gradient(w + perturbation, 0.0, sub_batch)
        grads.append(g)
    m = beta1 * m + np.mean(grads, axis=0) + decay * w
    return w - rate * m, m


def logistic_gradient(w, stats, batch):
    """Returns (loss, gradient, stats) of logistic regression. `stats` is a running mean of the scores."""
    x, y = batch
    score = x @ w
    p = 1 / (1 + np.exp(-score))
    loss = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    return loss, x.T @ (p - y) / len(y), 0.9 * stats + 0.1 * np.mean(score)
