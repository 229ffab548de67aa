"""The Laplace approximation of a last layer, against the Hessian from JAX and laplace-torch. The features it reads."""

import json
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.tree_util import Partial

import models
import test as evaluate
import train
from evaluation import laplace, request
from runs import folders

RNG = np.random.default_rng(0)
FEATURES, WEIGHTS = RNG.normal(size=(45, 4)), RNG.normal(size=(5, 3))
LABELS = RNG.integers(0, 3, 45)
TRAIN, NEW = np.arange(40), np.arange(40, 45)  # rows of FEATURES

# From laplace-torch 0.3, for TRAIN and the prior precision 2.5: the log marginal likelihood, and the variances and
# probit probabilities of the first row of NEW. Then the tuned prior precision. test_laplace_torch_agrees computes them.
RECORDED = {
    'kron': (
        -86.13454097,
        [0.322309189, 0.353245597, 0.361357127],
        [0.714544591, 0.095609903, 0.189845506],
        0.79014924,
    ),
    'full': (-85.62173479, [0.341620309, 0.401649726, 0.38060655], [0.713250248, 0.096405142, 0.190344611], 0.76338821),
    'diag': (
        -87.26709044,
        [0.196491977, 0.241558669, 0.268465527],
        [0.721547254, 0.092422389, 0.186030357],
        1.06907309,
    ),
}


def outputs(weights, rows):
    features = jnp.asarray(FEATURES, weights.dtype)[rows]
    return features @ weights[:-1] + weights[-1:], features


def fit(structure, prior_precision=None, num_data=40, weights=WEIGHTS, batch_size=20):
    held = Partial(outputs, jnp.asarray(weights, jax.dtypes.canonicalize_dtype(weights.dtype)))
    return laplace.fit(held, weights, TRAIN, LABELS[TRAIN], batch_size, num_data, structure, prior_precision)


def hessian(structure, num_data):
    """Returns H, float64 [15, 15], of weights in the order of an array [5, 3]."""

    def loss(weights):
        logits, _ = outputs(weights, TRAIN)
        return -num_data * jnp.take_along_axis(jax.nn.log_softmax(logits), LABELS[TRAIN, None], axis=1).mean()

    full = np.asarray(jax.jit(jax.hessian(loss))(WEIGHTS)).reshape(15, 15)
    if structure == 'full':
        return full
    if structure == 'diag':
        return np.diag(np.diag(full))
    logits, _ = outputs(WEIGHTS, TRAIN)
    p, phi = np.asarray(jax.nn.softmax(logits)), with_ones(FEATURES[TRAIN])
    return num_data * np.kron(phi.T @ phi / len(p), np.diag(p.mean(axis=0)) - p.T @ p / len(p))


def with_ones(features):
    return np.concatenate([features, np.ones((len(features), 1))], axis=1)


def measured(fit):
    """Returns what RECORDED has, for all rows of NEW: the logarithm, the variances and the probabilities."""
    logits = laplace.probit_logits(lambda weights, _, rows: outputs(weights, rows), (WEIGHTS, fit.posterior), None, NEW)
    variances = fit.posterior.variances(with_ones(FEATURES[NEW]))
    return fit.log_marginal_likelihood, np.asarray(variances), np.asarray(jax.nn.softmax(logits))


@pytest.mark.parametrize('structure', laplace.STRUCTURES)
def test_the_closed_forms_are_those_of_the_hessian(structure, x64, monkeypatch):
    """The log marginal likelihood, the logits' variances and the draws' covariance, with N = 60 for 40 images."""
    found = fit(structure, 2.5, num_data=60)
    precision = hessian(structure, 60) + 2.5 * np.eye(15)
    logits, _ = outputs(WEIGHTS, TRAIN)
    log_likelihood = 60 * np.mean(jax.nn.log_softmax(logits)[TRAIN, LABELS[TRAIN]])
    ratio = np.linalg.slogdet(precision)[1] - 15 * np.log(2.5)
    expected = log_likelihood - ratio / 2 - 2.5 * np.square(WEIGHTS).sum() / 2
    evidence, variances, _ = measured(found)
    np.testing.assert_allclose(evidence, expected, rtol=1e-12)
    covariance = np.linalg.inv(precision)
    blocks = covariance.reshape(5, 3, 5, 3).diagonal(axis1=1, axis2=3)
    phi = with_ones(FEATURES[NEW])
    np.testing.assert_allclose(variances, np.einsum('nf,fgk,ng->nk', phi, blocks, phi), rtol=1e-6)
    monkeypatch.setattr(jax.random, 'normal', lambda key, shape: key.reshape(shape))
    head = {'kernel': jnp.zeros((4, 3)), 'bias': jnp.zeros(3)}
    draw = partial(laplace.sample, ('head',), found.posterior, {'head': head, 'other': jnp.ones(1)})
    drawn = jax.vmap(draw)(jnp.eye(15))
    root = jnp.concatenate([drawn['head']['kernel'], drawn['head']['bias'][:, None]], axis=1).reshape(15, 15)
    np.testing.assert_allclose(root.T @ root, covariance, atol=1e-6 * covariance.max())
    assert (drawn['other'] == 1).all()


@pytest.mark.parametrize('structure', laplace.STRUCTURES)
def test_the_tuned_prior_precision_has_the_highest_marginal_likelihood(structure, x64):
    best = fit(structure)
    for factor in (0.5, 0.99, 1.01, 2):
        assert fit(structure, factor * best.prior_precision).log_marginal_likelihood < best.log_marginal_likelihood
    around = [fit(structure, factor * best.prior_precision).log_marginal_likelihood for factor in (0.999, 1.001)]
    assert abs(around[1] - around[0]) < 1e-5


@pytest.mark.parametrize('size', [1e-30, 1e-6, 1, 1e9])
def test_one_eigenvalue_of_any_size_has_a_tuned_prior_precision(size):
    """With one eigenvalue λ and |w| = 1, the derivative is 0 at τ² + λτ = λ."""
    tau = laplace.tuned_prior_precision(np.array([size, 0, 0]), 1.0)
    assert tau**2 + size * tau == pytest.approx(size)


@pytest.mark.parametrize(('scale', 'reason'), [(0, 'all weights of the layer are 0'), (1e6, 'certain of every')])
def test_where_the_marginal_likelihood_has_no_maximum(scale, reason):
    with pytest.raises(folders.RunError, match=f'{reason}.*: use --laplaceprior training'):
        fit('kron', weights=scale * WEIGHTS)
    assert fit('kron', 2.0, weights=scale * WEIGHTS).prior_precision == 2


@pytest.mark.parametrize('structure', laplace.STRUCTURES)
def test_a_confident_network_has_a_precise_hessian(structure):
    """1 − p is about 1e-8, less than the rounding of p in float32."""
    logits, phi = np.array([[18.0, 0, 1], [0, 19, -2], [20, 1, 0]]), RNG.normal(size=(3, 2))
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    of_images = [np.diag(p) - np.outer(p, p) for p in probs]
    full = np.einsum('nkl,nf,ng->kflg', of_images, phi, phi).reshape(6, 6)
    expected = {'kron': np.sum(of_images, axis=0), 'full': full, 'diag': np.diag(full).reshape(3, 2).T}
    *_, found = laplace.STRUCTURES[structure].products(*(jnp.asarray(x, jnp.float32) for x in (phi, probs)))
    np.testing.assert_allclose(found, expected[structure], rtol=1e-5)


def test_a_matrix_that_is_too_large_is_refused():
    laplace.require_small('full', 1000, 10)
    laplace.require_small('kron', 10**6, 10**3)
    with pytest.raises(
        folders.RunError, match=r'full needs a matrix of 10,010 × 10,010 numbers .*: use --laplace kron'
    ):
        laplace.require_small('full', 1001, 10)


@pytest.mark.parametrize('structure', laplace.STRUCTURES)
def test_numbers_that_laplace_torch_computed(structure, x64):
    evidence, variances, probs = measured(fit(structure, 2.5))
    found = evidence, variances[0], probs[0], fit(structure).prior_precision
    for one, recorded in zip(found, RECORDED[structure], strict=True):
        np.testing.assert_allclose(one, recorded, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('structure', laplace.STRUCTURES)
def test_laplace_torch_agrees(structure, x64):
    """Fits the same last layer in the same batches.

    laplace-torch gives the bias a block of its own in the structure kron. There, the features have 1 appended instead,
    and the layer has no bias.
    """
    warnings.simplefilter('ignore')  # of the peers
    torch = pytest.importorskip('torch')
    Laplace = pytest.importorskip('laplace', reason='needs pip install laplace-torch').Laplace  # noqa: N806
    from torch.utils.data import DataLoader, TensorDataset

    appended = structure == 'kron'
    features = torch.tensor(with_ones(FEATURES) if appended else FEATURES)
    layer = torch.nn.Linear(features.shape[1], 3, bias=not appended, dtype=torch.float64)
    for own, values in zip(layer.parameters(), [WEIGHTS] if appended else [WEIGHTS[:-1], WEIGHTS[-1]], strict=True):
        own.data = torch.tensor(values.T.copy())
    network = torch.nn.Sequential(torch.nn.Identity(), layer)
    peer = Laplace(network, 'classification', subset_of_weights='last_layer', hessian_structure=structure)
    peer.fit(DataLoader(TensorDataset(features[TRAIN], torch.tensor(LABELS[TRAIN])), batch_size=16))
    evidence = peer.log_marginal_likelihood(torch.tensor([2.5])).item()
    _, covariances = peer._glm_predictive_distribution(features[NEW])
    variances, probs = covariances.diagonal(dim1=1, dim2=2), peer(features[NEW], pred_type='glm', link_approx='probit')
    for one, other in zip(measured(fit(structure, 2.5, batch_size=16)), (evidence, variances, probs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    peer.optimize_prior_precision(method='marglik', n_steps=600, lr=0.05)
    tuned = peer.prior_precision.item()
    assert fit(structure).prior_precision == pytest.approx(tuned, rel=1e-6)
    for one, recorded in zip((evidence, variances[0], probs[0], tuned), RECORDED[structure], strict=True):
        np.testing.assert_allclose(one, recorded, rtol=1e-6)


def test_evaluation_of_a_run(flags_of, small_resnet18, monkeypatch, capsys):
    """metrics-laplace.json describes the approximation. A table shows the samples beside the probit approximation."""
    run = train.main(flags_of(optim='sgd', model='resnet18'))
    config, found = folders.read_config(run), {}
    for structure, prior in (('kron', 'training'), ('full', 'marglik'), ('diag', 'marglik')):
        flags = [f'--laplace={structure}', f'--laplaceprior={prior}', '--testmc=2']
        evaluate.main([f'--resultsfolder={run}', *flags])
        entry = json.loads((run / 'metrics-laplace.json').read_text())['laplace']
        assert (entry['structure'], entry['prior']) == (structure, prior)
        found[structure] = entry['prior_precision'], entry['log_marginal_likelihood'], entry['probit']['nll']
        out = capsys.readouterr().out
        for line in (
            f'| Laplace, {structure} | prior precision |',
            '| 2 samples ',
            f'| {entry["probit"]["nll"]:.4f} |',
        ):
            assert line in out
    assert found['kron'][0] == config['flags']['priorprec'] and len(set(found.values())) == 3

    require_possible = partial(request.require_possible, run=run, config=config)
    config['flags']['priorprec'] = 0
    require_possible(request.Request(laplace='kron'))
    with pytest.raises(folders.RunError, match='means no prior, so its posterior is unbounded'):
        require_possible(request.Request(laplace='kron', laplaceprior='training'))
    monkeypatch.setattr(laplace, 'MOST_ENTRIES', 50**2 - 1)
    with pytest.raises(folders.RunError, match='full needs a matrix of 50 × 50 numbers'):
        require_possible(request.Request(laplace='full'))


@pytest.mark.parametrize(
    ('flags', 'line'),
    [
        (['--laplaceprior=training'], '--laplaceprior needs --laplace'),
        (['--laplace=lowrank'], "unknown: 'lowrank'; choose from kron, full, diag"),
        (['--laplace', '--laplaceprior=mine'], "unknown: 'mine'; choose from marglik, training"),
    ],
)
def test_flags_of_laplace_that_are_wrong(flags, line, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(['--resultsfolder=run_0', *flags])
    assert line in capsys.readouterr().err


def test_draws_do_not_depend_on_eigenvectors_of_equal_eigenvalues():
    """Two Factors describe the same covariance. Their last three eigenvectors, with equal deviations, are rotated."""
    rng = np.random.default_rng(0)
    features, classes, turn = (np.linalg.qr(rng.normal(size=(n, n)))[0].astype(np.float32) for n in (5, 3, 3))
    deviations = rng.uniform(0.1, 1, (5, 3)).astype(np.float32)
    deviations[2:] = deviations[2]
    turned = np.concatenate([features[:, :2], features[:, 2:] @ turn], axis=1)
    params = {'head': {'kernel': jnp.zeros((4, 3)), 'bias': jnp.zeros(3)}}
    draws = [
        laplace.sample(('head',), laplace.Kron(vectors, classes, deviations), params, jax.random.key(0))['head']
        for vectors in (features, turned)
    ]
    for name in ('kernel', 'bias'):
        np.testing.assert_allclose(draws[0][name], draws[1][name], atol=1e-5)
    assert np.abs(draws[0]['kernel']).max() > 0.1


@pytest.mark.parametrize('name', ['mlp', 'lenet', 'resnet18'])
def test_features_enter_the_last_layer(name, small_resnet18):
    model = models.create(name, 10)
    images = np.random.default_rng(0).standard_normal((3, 32, 32, 1), np.float32)
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(1), images)
    run = lambda images: model.apply(variables, images, train=False)  # noqa: E731
    apply, (layer,) = models.with_features(run), models.last_layer(run, images)
    logits, features = jax.jit(apply)(images)
    head = variables['params'][layer]
    np.testing.assert_allclose(features @ head['kernel'] + head['bias'][None], logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('layers', [0, 1])
def test_networks_without_a_last_layer_that_has_a_bias(layers):
    dense = nn.Dense(2, use_bias=False)
    variables = dense.init(jax.random.key(0), jnp.ones((1, 3)))
    run = (lambda x: dense.apply(variables, x)) if layers else (lambda x: x)
    with pytest.raises(models.ModelError, match=r'not an nn\.Dense with a bias'):
        models.last_layer(run, jnp.ones((1, 3)))
