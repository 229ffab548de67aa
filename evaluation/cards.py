"""Model cards: what an export holds, how it was trained, how good it is, and how to draw samples, in Markdown."""

import dataclasses
import inspect
import shlex
import string
import textwrap

import jax

import experiment
import optimizers
from errors import printable
from evaluation import tables
from evaluation.request import Request
from evaluation.trained import Trained
from runs import checkpoints, folders, provenance, training_flags


def text(restored: Trained, asked: Request, results: dict) -> str:
    """Returns the model card of an export.

    Args:
        restored: the run.
        asked: what was measured of the run.
        results: the entries of metrics.json.
    """
    flags, described, config = restored.flags, restored.config['dataset'], restored.config
    dataset, size = printable(flags['dataset']), '×'.join(map(str, described['image_shape']))
    is_point, num_data = restored.experiment.optimizer.is_point, restored.experiment.num_data
    holds = 'the weights' if is_point else 'a posterior over the weights'
    use = ('Read the weights', 'weights') if is_point else ('Draw a sample of the weights', 'sample')
    names = list(checkpoints.named(restored.state.params))
    num_weights = sum(leaf.size for leaf in jax.tree.leaves(restored.state.params))
    return f"""# {flags['model']} on {dataset}, trained with {flags['optim']}

This folder holds {holds} of an image classifier. `test.py --export` of bayesian-sam wrote it.

## Training

- **Data set**: {dataset}, {described['num_train']:,} training images {size}, {described['num_classes']} classes
- **Network**: {flags['model']}, {num_weights:,} weights, computed in {flags['precision']}
- **Optimizer**: {flags['optim']}, {'a point estimate' if is_point else 'a Gaussian posterior'}
- **N**: {num_data:,.10g}, the number of training images times the augmentation factor `--dafactor`
- **Length**: {_length(restored)}

This command trains such a run:

{_command('train.py', training_flags_of(flags))}

## Evaluation

Measured on {results['num_images']:,} {_IMAGES[asked.split]}, {_measured_at(is_point, asked)}.
The intervals show what other images would have given. They do not show the noise of training.

{tables.with_intervals(results, is_point)}
`nll` is the negative log-likelihood, `brier` the Brier score, `ece` the expected calibration error with {asked.bins}
bins, and `aurc` the area under the risk-coverage curve: lower is better. `auroc` says how well confidence separates
right from wrong predictions: higher is better. `entropy` and `mutual_information` are in nats.

This command of bayesian-sam measures again, with the path of this folder as FOLDER:

{_command('test.py', ['--resultsfolder', 'FOLDER', *_flags_of_test(asked)])}

In Python, `evaluation.trained.restore('FOLDER')` returns the network, the mean and the posterior.

## Files

- `config.json`: all flags of the training, the properties of the data set, versions
- `posterior.safetensors`: tensors in the layout of Flax, such as `params.{names[-1]}`

The tensors are:

{_tensors(restored)}

The network takes pixels divided by 255, minus {printable(described['mean'])}, divided by {printable(described['std'])}.

## {use[0]}

These lines need NumPy and safetensors, but neither JAX nor bayesian-sam. Run them in this folder:

```python
{sampling_code(restored)}```

Then `{use[1]}['{names[-1]}']` is an array of shape {list(jax.tree.leaves(restored.state.params)[-1].shape)}.

## Versions

- Trained with {_versions(config)}
- Exported with {_versions(provenance.environment())}

## Licence and citation

bayesian-sam has the Apache-2.0 licence, which does not extend to weights that it trains. The data set has terms of its
own. Cite the method:

> {_references(flags['optim'])}
"""


_IMAGES = {'test': 'test images', 'validation': 'images that were held out of training'}


def _length(restored):
    flags, progress = restored.flags, restored.progress
    steps = restored.config['dataset']['num_train'] // flags['batchsize']
    length = f'{flags["epochs"] + 1} epochs of {steps} steps, {flags["batchsize"]} images per step'
    if progress.trained() == folders.end_of_training(restored.config, flags['epochs']):
        return length
    return f'{length}; training is not complete: it is in epoch {progress.epoch + 1} after step {progress.step}'


def training_flags_of(flags: dict) -> list[str]:
    """Returns the command line of train.py for a run like this one.

    It has the flags of the optimizer, and other flags that are not at the default. It names neither folders nor
    devices, because they differ between machines.
    """
    defaults = vars(training_flags.parse_args([]))
    always = {'dataset', 'model', 'optim', *(row.name for row in training_flags.rows_of(flags['optim']))}
    never = {'resultsfolder', *training_flags.MAY_CHANGE} - {'epochs'}
    values = {
        name: value
        for name, value in flags.items()
        if name not in never and value is not None and (name in always or value != defaults[name])
    }
    return training_flags.command_line(values)


def _flags_of_test(asked):
    """Returns the flags of test.py that measure the numbers of the card."""
    others = {'checkpoint': None, 'temperature': False, 'ood': (), 'corruptions': None}
    return dataclasses.replace(asked, testmc=(asked.num_samples,), **others).arguments()


def _command(script, flags):
    command = printable(shlex.join(['python', script, *flags]))
    lines = textwrap.wrap(command, 100, break_long_words=False, break_on_hyphens=False)
    return '    ' + ' \\\n        '.join(lines)


def _measured_at(is_point, asked):
    average = '' if is_point else f' and averaged over the predictions of {tables.samples(asked.num_samples)}'
    refreshed = f', with batch statistics from `--bnrefresh {asked.bnrefresh}`' if asked.bnrefresh else ''
    return f'at the mean of the weights{average}{refreshed}'


def _tensors(restored):
    """Returns a list of the kinds of tensors, with the formulas of the posterior."""
    numbers = _numbers(restored)
    fields = [name for name in _MEANINGS if jax.tree.leaves(getattr(restored.state, name, None))]
    kinds = [f'`{name}`' if name == 'num_snapshots' else f'`{name}.*`' for name in fields]
    meanings = [string.Template(_MEANINGS[name]).substitute(numbers) for name in fields]
    return '\n'.join(f'- {kind}: {meaning}' for kind, meaning in zip(kinds, meanings, strict=True))


_MEANINGS = {
    'params': 'w, the weights (the mean of the posterior)',
    'batch_stats': 'running statistics of the normalisation layers',
    'precision': 's; the posterior variance of a weight is 1/(N s), with N = $num_data',
    'hessian': 'h; the posterior variance of a weight is 1/(N (h + δ)), with N = $num_data and δ = $weight_decay',
    'variance': 'v, the variance of the snapshots of the weights',
    'deviations': 'D, [$rank, ...]; the posterior covariance is diag(v)/2 + DᵀD/(2 · $freedom)',
    'num_snapshots': 'the number of snapshots',
}


def _numbers(restored):
    """Returns the numbers of an optimizer that formulas need."""
    flags, num_train = restored.flags, restored.config['dataset']['num_train']
    numbers = {
        'num_data': float(restored.experiment.num_data),
        'weight_decay': experiment.optimizer_arguments(flags, num_train)['weight_decay'],
    }
    if flags['optim'] == 'swag':
        rank = flags['swagrank']
        numbers |= {'rank': rank, 'freedom': max(min(int(restored.state.num_snapshots), rank) - 1, 1)}
    return numbers


def sampling_code(restored: Trained) -> str:
    """Returns five lines of Python that draw a sample of the weights. For a point estimate, they read the weights.

    The lines need NumPy and safetensors only.
    """
    field = next((name for name in _CODE if hasattr(restored.state, name)), None)
    return string.Template(_CODE.get(field, _READ)).substitute(_numbers(restored))


_READ = """from safetensors.numpy import load_file
weights = {name[7:]: x for name, x in load_file('posterior.safetensors').items() if name.startswith('params.')}
"""
_LOAD = """import numpy as np, safetensors.numpy
t, rng = safetensors.numpy.load_file('posterior.safetensors'), np.random.default_rng(0)
"""
_OF_DIAGONAL = "sample = {n: t[f'params.{n}'] + x * rng.standard_normal(x.shape, x.dtype) for n, x in std.items()}\n"
_CODE = {
    'precision': f"""{_LOAD}precision = {{name[10:]: s for name, s in t.items() if name.startswith('precision.')}}
std = {{n: 1 / np.sqrt($num_data * s) for n, s in precision.items()}}
{_OF_DIAGONAL}""",
    'hessian': f"""{_LOAD}hessian = {{name[8:]: h for name, h in t.items() if name.startswith('hessian.')}}
std = {{n: 1 / np.sqrt($num_data * (h + $weight_decay)) for n, h in hessian.items()}}
{_OF_DIAGONAL}""",
    'deviations': f"""{_LOAD}c = rng.standard_normal($rank, np.float32) / (2 * $freedom) ** 0.5
low_rank = {{name[11:]: np.tensordot(c, d, 1) for name, d in t.items() if name.startswith('deviations.')}}
sample = {{n: t[f'params.{{n}}'] + x + np.sqrt(t[f'variance.{{n}}'].clip(0) / 2) \
* rng.standard_normal(x.shape, x.dtype) for n, x in low_rank.items()}}
""",
}


def _versions(record):
    """Returns the versions in a configuration or in metrics.json, which someone else may have written."""
    versions = record.get('versions')
    versions = versions.items() if isinstance(versions, dict) else ()
    named = [f'Python {record.get("python")}', *(f'{package} {version}' for package, version in versions)]
    return printable(f'{", ".join(named)}, on {record.get("device")}, git commit {record.get("git_commit")}')


def _references(optim):
    """Returns the references in the optimizer's docstring, which `python -OO` removes."""
    _, _, references = (inspect.getdoc(optimizers.OPTIMIZERS[optim]) or '').partition('References:')
    return ' '.join(references.split()) or 'see the references in optimizers.py of bayesian-sam'
