"""Times steps of SGD, SAM and bSAM against plain Flax with Optax, PyTorch and the published formulation.

    python benchmarks/peers.py --oldjax OTHER_PYTHON --json results/peers.json

All steps are on one synthetic batch of 200 images in float32, taken in turns. Each peer computes a batch whole, and in
8 sub-batches. In 8 sub-batches, SAM perturbs the weights for each. Needs PyTorch. OTHER_PYTHON is the interpreter of an
environment with JAX 0.5.3, Flax 0.10.4 and Optax 0.2.4.
"""

import multiprocessing
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import optax
import optax.contrib
from jax import tree

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import baseline, plain, run
from evaluation import tables
from runs import json_files, launch, parsing, provenance

# The columns of the table: {name: (title, number of sub-batches)}.
STEPS = {
    'sgd': ('SGD', 1),
    'sgd_in_8': ('SGD in 8', run.SPLIT),
    'sam': ('SAM', 1),
    'sam_in_8': ('SAM in 8', run.SPLIT),
    'bsam_in_8': ('bSAM in 8', run.SPLIT),
}
PEERS = {
    'ours': 'these scripts',
    'flax': 'plain Flax, Optax',
    'torch': 'PyTorch',
    'compiled': 'PyTorch, torch.compile',
    'published': "published formulation, today's JAX",
    'published_before': 'published formulation, JAX 0.5.3',
}


class PlainStepper:
    """Takes steps of plain Flax and Optax on one synthetic batch.

    Sub-batches are a loop in Python over one jitted function, because XLA's gradients of convolutions are slow in
    loops on CPUs. `optax.MultiSteps` averages their gradients.

    Args:
        model: a name in plain.NETWORKS.
        pieces: sub-batches that the batch is cut into.
        rho: the size of SAM's perturbation, None for SGD.
    """

    def __init__(self, model, pieces, rho=None):
        images, labels = run.synthetic_images(run.BATCH)
        batch = jax.device_put((np.float32(images) / 255, labels))
        self.sub_batches = [tree.map(lambda x, i=i: x[i::pieces], batch) for i in range(pieces)]
        self.params, self.batch_stats = plain.init(plain.NETWORKS[model](10), self.sub_batches[0][0])
        optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.01, momentum=0.9))
        if rho is not None and pieces == 1:
            adversary = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
            optimizer = optax.contrib.sam(optimizer, adversary, sync_period=2, opaque_mode=True)
        self.optimizer = optax.MultiSteps(optimizer, pieces) if pieces > 1 else optimizer
        self.state = self.optimizer.init(self.params)
        self.value_and_grad = jax.value_and_grad(plain.loss_function(plain.NETWORKS[model](10)), has_aux=True)
        self.rho, self.pieces = rho, pieces
        self.step = jax.jit(self._step, donate_argnums=(0, 1, 2))

    def __call__(self):
        for sub_batch in self.sub_batches:
            self.params, self.batch_stats, self.state = self.step(self.params, self.batch_stats, self.state, sub_batch)
        return self.params

    def _step(self, params, batch_stats, state, batch):
        (_, batch_stats), grads = self.value_and_grad(params, batch_stats, batch)
        options = {}
        if self.rho is not None and self.pieces == 1:
            options['grad_fn'] = lambda params, _: self.value_and_grad(params, batch_stats, batch)[1]
        elif self.rho is not None:
            scale = self.rho / optax.tree.norm(grads)
            perturbed = tree.map(lambda w, g: w + scale * g, params, grads)
            (_, batch_stats), grads = self.value_and_grad(perturbed, batch_stats, batch)
        updates, state = self.optimizer.update(grads, state, params, **options)
        return optax.apply_updates(params, updates), batch_stats, state


class Elsewhere:
    """Takes steps of the published formulation in another environment, by a process at the other end of a pipe.

    Args:
        python: the environment's interpreter.
        model: a name in plain.NETWORKS.
    """

    def __init__(self, python, model):
        self.connection, end = multiprocessing.Pipe()
        command = [python, baseline.__file__, model, str(end.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[end.fileno()])
        end.close()
        self.jax_version = self.connection.recv()

    def __call__(self):
        self.connection.send(None)
        return self.connection.recv()

    def close(self):
        self.process.terminate()
        self.process.wait()


def functions_of(model, elsewhere):
    """Returns {(peer, step): function that takes a step}. Returns no step elsewhere if `elsewhere` is None."""
    from benchmarks import peers_torch  # imported late, so that `--help` needs no PyTorch

    found = {
        ('ours', 'sgd'): run.TrainerOfOneBatch(model, 'sgd', 'float32'),
        ('ours', 'sam'): run.TrainerOfOneBatch(model, 'sam', 'float32', batchsplit=1),
        ('ours', 'sam_in_8'): run.TrainerOfOneBatch(model, 'sam', 'float32'),
        ('ours', 'bsam_in_8'): run.TrainerOfOneBatch(model, 'bsam', 'float32'),
    }
    for step, (_, pieces) in STEPS.items():
        if step != 'bsam_in_8':
            rho = 0.05 if step.startswith('sam') else None
            found['flax', step] = PlainStepper(model, pieces, rho)
            for peer, compiled in (('torch', False), ('compiled', True)):
                found[peer, step] = peers_torch.Stepper(model, run.BATCH, pieces, compiled, rho)
    found['published', 'bsam_in_8'] = baseline.stepper(model, run.BATCH, run.SPLIT)
    if elsewhere:
        found['published_before', 'bsam_in_8'] = elsewhere
    return found


def measure(model, old_jax, turns):
    """Returns {'turns': {peer: {step: seconds of each turn}}, 'compile_seconds': the same without turns, ...}."""
    elsewhere = Elsewhere(old_jax, model) if old_jax else None
    functions = functions_of(model, elsewhere)
    first = {}
    for way, function in functions.items():
        first[way] = run.seconds(function)
        run.report(f'{model}, {way[0]}, {way[1]}: first step {first[way]:.1f} s')
    times = {way: [] for way in functions}
    for turn in turns:
        for way, function in functions.items():
            times[way].append(run.seconds(function))
        run.report(f'{model}: turn {turn + 1}')
    if elsewhere:
        elsewhere.close()
    return {
        'turns': _nested(times),
        'compile_seconds': _nested({way: first[way] - statistics.median(times[way]) for way in functions}),
        'published_before_jax': elsewhere and elsewhere.jax_version,
    }


def _nested(of_ways):
    found = {}
    for (peer, step), value in of_ways.items():
        found.setdefault(peer, {})[step] = value
    return found


def rates(turns):
    """Returns {peer: {step: how many times as long as ours the step takes}}: the median over the turns.

    Our SGD has one step, which is compared with the peers' steps on the whole batch and in sub-batches.
    """
    ours = turns['ours'] | {'sgd_in_8': turns['ours']['sgd']}
    return {
        peer: {step: run.ratio(times, ours[step]) for step, times in of_peer.items()}
        for peer, of_peer in turns.items()
        if peer != 'ours'
    }


def table(result):
    """Returns a Markdown table for one network: seconds of our steps, and how many times as long the peers' take."""
    found = rates(result['turns'])
    ours = {step: f'{statistics.median(times):.2f} s' for step, times in result['turns']['ours'].items()}
    cells = {'ours': ours} | {
        peer: {step: f'{value:.2f} ×' for step, value in of_peer.items()} for peer, of_peer in found.items()
    }
    rows = [[PEERS[peer], *(of_peer.get(step, tables.UNDEFINED) for step in STEPS)] for peer, of_peer in cells.items()]
    return tables.markdown(['step', *(title for title, _ in STEPS.values())], rows)


def short_table(results):
    """Returns a Markdown table for both networks: how many times as long as ours the peers' steps take.

    SGD's column has the faster of both steps of the peer. SAM and bSAM have 8 sub-batches.
    """
    header, rows = ['time ÷ ours'], {}
    for model in plain.NETWORKS:
        header += [f'{run.NAMES[model]}: SGD', 'SAM', 'bSAM']
        for peer, of_peer in rates(results[model]['turns']).items():
            sgd = min((of_peer[step] for step in ('sgd', 'sgd_in_8') if step in of_peer), default=None)
            found = sgd, of_peer.get('sam_in_8'), of_peer.get('bsam_in_8')
            cells = [tables.UNDEFINED if value is None else f'{value:.2f}' for value in found]
            rows.setdefault(peer, [PEERS[peer]]).extend(cells)
    return tables.markdown(header, list(rows.values()))


@launch.script('peers.py')
def main(argv=None):
    parser = parsing.Parser(__doc__)
    add = parser.add_argument
    add('--models', nargs='+', choices=plain.NETWORKS, default=list(plain.NETWORKS), help='networks')
    add('--oldjax', metavar='PYTHON', help='interpreter of an environment with JAX 0.5.3 (default: leave it out)')
    add('--repeats', type=parsing.integer(1), default=3, help='minimum number of turns')
    add('--seconds', type=parsing.integer(0), default=120, help='minimum seconds of each network, without compilation')
    add('--json', type=parsing.new_file, help='write all figures to this JSON file')
    args = parser.parse_args(argv)
    results = provenance.of_command('benchmarks/peers.py', argv) | {'machine': run.machine()}
    results['environment']['versions']['torch'] = metadata.version('torch')
    for model in args.models:
        results[model] = measure(model, args.oldjax, run.lasting(args.repeats, args.seconds))
        print(f'{run.NAMES[model]}\n\n{table(results[model])}', flush=True)
    if args.json:
        json_files.write_json(args.json, results)


if __name__ == '__main__':
    main()
