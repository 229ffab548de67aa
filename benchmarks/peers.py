"""Times steps of SGD, SAM and bSAM against plain Flax with Optax, PyTorch and the published formulation.

    python benchmarks/peers.py --oldjax OTHER_PYTHON --json results/peers.json

All steps are on one synthetic batch of 200 images in float32, and are taken in turns. Needs PyTorch and a C++ compiler.
OTHER_PYTHON is the interpreter of an environment with JAX 0.5.3, Flax 0.10.4 and Optax 0.2.4.
"""

import contextlib
import importlib.util
import multiprocessing
import shutil
import statistics
import subprocess
import sys
from functools import partial
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax import tree

sys.path.insert(0, str(Path(__file__).parent.parent))

import errors
import experiment
from benchmarks import baseline, plain, run
from evaluation import tables
from runs import json_files, launch, parsing, provenance

# The columns of the table for one network.
STEPS = {
    'sgd': 'SGD',
    'sgd_in_pieces': 'SGD in pieces',
    'sam': 'SAM',
    'sam_in_8': 'SAM in 8',
    'bsam_in_8': 'bSAM in 8',
}
PEERS = {
    'ours': 'these scripts',
    'flax': 'plain Flax, Optax',
    'torch': 'PyTorch',
    'compiled': 'PyTorch, torch.compile',
    'published': 'published formulation, same JAX',
    'published_old_jax': 'published formulation, JAX 0.5.3',
}
RHO = 0.05


class PlainStepper:
    """Takes steps of plain Flax and Optax on one synthetic batch.

    SAM on the whole batch is optax.contrib.sam. Sub-batches are a loop in Python over one jitted function, because on
    CPUs XLA's gradients of convolutions are slow within XLA's own loops.

    Args:
        model: a name in plain.NETWORKS.
        num_sub_batches: sub-batches of the batch. SAM perturbs the weights for each sub-batch.
        rho: the size of SAM's perturbation, None for SGD.
    """

    def __init__(self, model, num_sub_batches, rho=None):
        images, labels = run.synthetic_images(run.BATCH)
        batch = jax.device_put((np.float32(images) / 255, labels))
        self.sub_batches = [tree.map(lambda x, i=i: x[i::num_sub_batches], batch) for i in range(num_sub_batches)]
        self.params, self.batch_stats = plain.init(plain.NETWORKS[model](10), self.sub_batches[0][0])
        self.value_and_grad = jax.value_and_grad(plain.loss_function(plain.NETWORKS[model](10)), has_aux=True)
        self.rho, self.with_optax_sam = rho, rho is not None and num_sub_batches == 1
        self.optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.01, momentum=0.9))
        if self.with_optax_sam:
            adversary = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
            self.optimizer = optax.contrib.sam(self.optimizer, adversary, sync_period=2, opaque_mode=True)
        self.state = self.optimizer.init(self.params)
        self.whole_step = jax.jit(self._whole_step, donate_argnums=(0, 1, 2))
        self.add_gradient = jax.jit(self._add_gradient, donate_argnums=(0, 1))
        self.update = jax.jit(self._update, donate_argnums=(0, 1))

    def __call__(self):
        if len(self.sub_batches) == 1:
            self.params, self.batch_stats, self.state = self.whole_step(
                self.params, self.batch_stats, self.state, *self.sub_batches
            )
            return self.params
        total = tree.map(jnp.zeros_like, self.params)
        for sub_batch in self.sub_batches:
            total, self.batch_stats = self.add_gradient(total, self.batch_stats, self.params, sub_batch)
        self.params, self.state = self.update(self.params, self.state, total)
        return self.params

    def _whole_step(self, params, batch_stats, state, batch):
        (_, batch_stats), grads = self.value_and_grad(params, batch_stats, batch)
        options = {}
        if self.with_optax_sam:
            options['grad_fn'] = lambda params, _: self.value_and_grad(params, batch_stats, batch)[1]
        updates, state = self.optimizer.update(grads, state, params, **options)
        return optax.apply_updates(params, updates), batch_stats, state

    def _add_gradient(self, total, batch_stats, params, sub_batch):
        (_, batch_stats), grads = self.value_and_grad(params, batch_stats, sub_batch)
        if self.rho is not None:
            scale = self.rho / optax.tree.norm(grads)
            perturbed = tree.map(lambda w, g: w + scale * g, params, grads)
            (_, batch_stats), grads = self.value_and_grad(perturbed, batch_stats, sub_batch)
        return tree.map(jnp.add, total, grads), batch_stats

    def _update(self, params, state, total):
        grads = tree.map(lambda g: g / len(self.sub_batches), total)
        updates, state = self.optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state


class Elsewhere:
    """Takes steps of the published formulation in another environment, by a process at the other end of a pipe.

    Args:
        python: the environment's interpreter.
        model: a name in plain.NETWORKS.
    """

    def __init__(self, python, model):
        self.connection, end = multiprocessing.Pipe()
        command = [python, baseline.__file__, model, run.BATCH, run.SPLIT, end.fileno()]
        self.process = subprocess.Popen([str(part) for part in command], pass_fds=[end.fileno()])
        end.close()
        try:
            self.jax_version = self.connection.recv()
        except EOFError as error:
            raise errors.UserError(
                f'--oldjax {python} cannot run benchmarks/baseline.py: see its message above'
            ) from error

    def __call__(self):
        self.connection.send(None)
        return self.connection.recv()

    def close(self):
        self.process.terminate()
        self.process.wait()


def steppers(model, steps):
    """Returns {(peer, step): function that takes a step} for some of STEPS, except for bSAM's."""
    from benchmarks import peers_torch  # imported late, so that `--help` needs no PyTorch

    peers_torch.forget_compiled()
    pieces = experiment.num_pieces(model, run.BATCH)
    ways = {
        'sgd': (1, None),
        'sgd_in_pieces': (pieces if pieces > 1 else run.SPLIT, None),
        'sam': (1, RHO),
        'sam_in_8': (run.SPLIT, RHO),
    }
    found = {}
    for step, (num_sub_batches, rho) in ((step, ways[step]) for step in ways if step in steps):
        if rho is not None:
            found['ours', step] = run.TrainerOfOneBatch(model, 'sam', 'float32', num_sub_batches)
        elif num_sub_batches == pieces:
            found['ours', step] = run.TrainerOfOneBatch(model, 'sgd', 'float32')
        found['flax', step] = PlainStepper(model, num_sub_batches, rho)
        for peer, compiled in (('torch', False), ('compiled', True)):
            found[peer, step] = peers_torch.Stepper(model, run.BATCH, num_sub_batches, compiled, rho)
    return found


def measure(model, steps, old_jax, turns):
    """Returns the seconds of all steps, {'turns': {peer: {step: [seconds of each turn]}}, 'compile_seconds': ...}.

    The published formulation takes its own turns with our bSAM, because its steps need most time and memory.

    Args:
        model: a name in plain.NETWORKS.
        steps: names in STEPS.
        old_jax: the interpreter with JAX 0.5.3, None to leave it out.
        turns: a function that returns an iterable with one entry per turn.
    """
    times, first = run.in_turns(turns(), steppers(model, steps))
    found = {}
    if 'bsam_in_8' in steps:
        published = {
            ('ours', 'bsam_in_8'): run.TrainerOfOneBatch(model, 'bsam', 'float32'),
            ('published', 'bsam_in_8'): baseline.stepper(model, run.BATCH, run.SPLIT),
        }
        with contextlib.ExitStack() as stack:
            if old_jax:
                elsewhere = stack.enter_context(contextlib.closing(Elsewhere(old_jax, model)))
                published['published_old_jax', 'bsam_in_8'], found['old_jax'] = elsewhere, elsewhere.jax_version
            times_of_bsam, first_of_bsam = run.in_turns(turns(), published)
        times, first = times | times_of_bsam, first | first_of_bsam
    return found | {
        'turns': nested(times),
        'compile_seconds': nested({way: first[way] - statistics.median(times[way]) for way in times}),
    }


def nested(of_ways):
    """Returns {peer: {step: value}} for {(peer, step): value}."""
    found = {}
    for (peer, step), value in of_ways.items():
        found.setdefault(peer, {})[step] = value
    return found


def rates(turns):
    """Returns {peer: {step: how many times as long as ours the step takes}}: the median over the turns.

    Our SGD has one step, which is compared with the peers' steps on the whole batch and in pieces.
    """
    ours = turns['ours']
    sgd = ours.get('sgd') or ours['sgd_in_pieces']
    ours = ours | {'sgd': sgd, 'sgd_in_pieces': sgd}
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
    shown = [step for step in STEPS if any(step in of_peer for of_peer in cells.values())]
    rows = [[PEERS[peer], *(of_peer.get(step, tables.UNDEFINED) for step in shown)] for peer, of_peer in cells.items()]
    return tables.markdown(['seconds, or times ours', *(STEPS[step] for step in shown)], rows)


def short_table(results):
    """Returns a Markdown table for both networks: how many times as long as ours the peers' steps take.

    SGD's column has the faster of both steps of the peer if the pieces have the gradient of the whole batch, as without
    batch normalisation. SAM and bSAM have 8 sub-batches. A column is left out if no peer has it.
    """
    header, rows = ['time ÷ ours'], {}
    for model in plain.NETWORKS:
        found = rates(results[model]['turns'])
        sgd = ('sgd', 'sgd_in_pieces') if model == 'resnet20' else ('sgd',)
        for title, steps in {'SGD': sgd, 'SAM': ('sam_in_8',), 'bSAM': ('bsam_in_8',)}.items():
            fastest = {
                peer: min((of_peer[step] for step in steps if step in of_peer), default=None)
                for peer, of_peer in found.items()
            }
            if any(fastest.values()):
                header.append(f'{run.NAMES[model]}, {title}')
                for peer, value in fastest.items():
                    rows.setdefault(peer, []).append(tables.UNDEFINED if value is None else f'{value:.2f}')
    return tables.markdown(header, [[PEERS[peer], *cells] for peer, cells in rows.items()])


@launch.script('peers.py')
def main(argv=None):
    parser = parsing.Parser(__doc__)
    add = parser.add_argument
    add('--models', nargs='+', choices=plain.NETWORKS, default=list(plain.NETWORKS), help='networks')
    add('--steps', nargs='+', choices=STEPS, default=list(STEPS), help='steps to take')
    add('--oldjax', metavar='PYTHON', help='interpreter of an environment with JAX 0.5.3 (default: leave it out)')
    add('--repeats', type=parsing.integer(1), default=3, help='minimum number of turns')
    add('--seconds', type=parsing.integer(0), default=120, help='minimum seconds of the turns')
    add('--json', type=parsing.new_file, help='write all figures to this JSON file')
    args = parser.parse_args(argv)
    if importlib.util.find_spec('torch') is None:
        parser.error('peers.py needs PyTorch: pip install torch')
    if args.oldjax and not shutil.which(args.oldjax):
        parser.error(f'--oldjax {args.oldjax} is not a program: give the path of a Python interpreter')
    results = provenance.of_command('benchmarks/peers.py', argv) | {'machine': run.machine()}
    if args.oldjax:
        results['command'] = results['command'].replace(args.oldjax, 'OTHER_PYTHON')
    results['environment']['versions']['torch'] = metadata.version('torch')
    for model in args.models:
        results[model] = measure(model, args.steps, args.oldjax, partial(run.lasting, args.repeats, args.seconds))
        print(f'{run.NAMES[model]}\n\n{table(results[model])}', flush=True)
        run.report(f'{model} is done')
    if args.json:
        json_files.write_json(args.json, results)


if __name__ == '__main__':
    main()
