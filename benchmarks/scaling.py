"""Measures how work scales over processes on this machine, and predicts how it scales over many devices.

    python benchmarks/scaling.py measure --json results/scaling_measured.json
    python benchmarks/scaling.py predict --json results/scaling_predicted.json

`measure` runs 1, 2, ... processes with one CPU core each. It trains bSAM with the same batch (strong scaling) and with
four sub-batches per process (weak scaling). Then it evaluates twice: first each process has its own posterior samples,
then the processes share the images of each sample.

`predict` compiles bSAM's step for N virtual devices with one sub-batch each. It reads the numbers of operations and of
collective bytes from the compiled step, and divides them by assumed rates (see --help).
"""

import argparse
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

import experiment
from benchmarks import run
from evaluation import tables
from ops import sharding
from runs import devices, hosts, json_files, launch, parsing, processes, provenance

SUB_BATCH = 25
NODE = 8  # devices in a node
BYTES = {'f32': 4, 's32': 4, 'u32': 4, 'u8': 1, 'pred': 1}  # of XLA's types that a float32 step uses


@launch.script('scaling.py')
def main(argv=None):
    parser = parsing.Parser(__doc__)
    add, positive = parser.add_argument, parsing.number(above=0)
    add('part', choices=('measure', 'predict'), help='measure processes on this machine, or predict many devices')
    add('--json', type=parsing.new_file, help='write all figures to this JSON file')
    add('--model', choices=run.MULTIPLY_ADDS, help='network (default: resnet20 to measure, resnet18 to predict)')
    add('--processes', type=parsing.integer(1), nargs='+', default=[1, 2], help='measure: numbers of processes')
    add('--steps', type=parsing.integer(1), default=5, help='measure: steps to time')
    add('--devices', type=parsing.integer(1), nargs='+', default=[8, 64, 512], help='predict: numbers of devices')
    add('--teraflops', type=positive, default=100, help='predict: TFLOP/s of a device in convolutions')
    add('--memory', type=positive, default=3350, help='predict: GB/s between a device and its memory')
    add('--nvlink', type=positive, default=450, help='predict: GB/s between the devices of a node')
    add('--network', type=positive, default=50, help='predict: GB/s between a device and other nodes')
    help = 'predict: latency in µs of each of the 2 (N - 1) steps of a ring all-reduce'
    add('--latency', type=parsing.number(minimum=0), default=5, help=help)
    add('--worker', type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        functions = {'training': time_training, 'evaluation': time_evaluation, 'count': count}
        print(json.dumps(functions[args.worker.pop('function')](**args.worker)))
        return
    if args.part == 'measure' and max(args.processes) > os.cpu_count():
        number = max(args.processes)
        parser.error(f'--processes {number} needs {number} CPU cores, and this machine has {os.cpu_count()}')
    rows = measured(args) if args.part == 'measure' else predicted(args)
    print(tables.markdown(list(rows[0]), [[str(value) for value in row.values()] for row in rows]))
    if args.json:
        json_files.write_json(args.json, provenance.of_command('benchmarks/scaling.py', argv) | {'rows': rows})


def measured(args):
    """Returns a row for each kind of work and number of processes, with images per second and efficiency.

    The efficiency of N processes is their rate over N times the rate of one process.
    """
    rows = []
    training = {'function': 'training', 'steps': args.steps}
    workers = {
        'training, strong': lambda number: training | {'batch_size': 8 * SUB_BATCH},
        'training, weak': lambda number: training | {'batch_size': 4 * number * SUB_BATCH},
        'evaluation, a sample each': lambda number: {'function': 'evaluation', 'batch_size': 200, 'samples': 8},
        'evaluation, images shared': lambda number: {'function': 'evaluation', 'batch_size': 200, 'samples': 1},
    }
    for scaling, worker_of in workers.items():
        alone = None
        for number in args.processes:
            worker = worker_of(number) | {'model': args.model or 'resnet20', 'number': number}
            rate = min(result['rate'] for result in started(worker, number))
            alone = alone or rate / number
            rows.append({
                'scaling': scaling, 'processes': number, 'batch': worker['batch_size'], 'images/s': round(rate, 1),
                'efficiency': f'{rate / number / alone:.0%}',
            })  # fmt: skip
            run.report(f'{scaling}, {number} processes: {rate:.1f} images/s')
    return rows


def started(worker, number):
    """Runs a worker in `number` processes with one core each. Returns the results that they print."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{free.getsockname()[1]}'
    one_core = os.environ | processes.share_of_cores(os.cpu_count())
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, 'measure', '--worker', json.dumps(worker | {'process': i, 'address': address})],
            env=one_core, stdout=subprocess.PIPE, text=True,
        )
        for i in range(number)
    ]  # fmt: skip
    said = [worker.communicate()[0] for worker in workers]
    return [json.loads(text.splitlines()[-1]) for text in said]


def joined(number, process, address):
    """Joins `number` processes, if there are several. Returns the mesh over the devices of all."""
    if number > 1:
        hosts.join('scaling.py', address, number, process)
    return devices.create_mesh()


def time_evaluation(model, samples, batch_size, **processes):
    """Returns the rate of an evaluation: images times passes (the mean and each sample) per second.

    Each process has samples of its own, unless there are fewer samples than processes. Then the processes share the
    images of each sample. Runs in a worker process.
    """
    num_images = 10 * batch_size
    with jax.set_mesh(joined(**processes)):
        posterior, _ = run.posterior_of(model, 'bsam', 'float32', batch_size)
        images, _ = run.synthetic_images(num_images)
        list(posterior.predict(images, [samples]))
        began = time.perf_counter()
        list(posterior.predict(images, [samples]))
    return {'rate': num_images * (1 + samples) / (time.perf_counter() - began)}


def time_training(model, batch_size, steps, **processes):
    """Returns the images per second of bSAM's steps over all processes. Runs in a worker process."""
    mesh = joined(**processes)
    functions = experiment.create(run.configuration(model, 'bsam', 'float32', batch_size // SUB_BATCH))
    with jax.set_mesh(mesh):
        state, one = sharding.replicate((jax.jit(functions.init)(jax.random.key(0)), np.float32(1)), mesh)
        batch = next(run.feed_of(functions, batch_size, mesh).batches(0))
        for number_of_step in range(steps + 1):
            if number_of_step == 1:
                began = time.perf_counter()
            state, loss = functions.step(state, batch, one)
            float(jax.device_get(loss))
    return {'rate': steps * batch_size / (time.perf_counter() - began)}


def predicted(args):
    """Returns a row for each number of devices."""
    rows = []
    for number in args.devices:
        worker = json.dumps({'function': 'count', 'model': args.model or 'resnet18', 'number': number})
        environment = os.environ | {
            'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': f'--xla_force_host_platform_device_count={number}'
        }  # fmt: skip
        command = [sys.executable, __file__, 'predict', '--worker', worker]
        said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        counts = json.loads(said.splitlines()[-1])
        bandwidth = 1e9 * (args.nvlink if number <= NODE else args.network)
        computing = max(counts['flops'] / (1e12 * args.teraflops), counts['bytes'] / (1e9 * args.memory))
        ring = 2 * (number - 1) * (counts['collective_bytes'] / number / bandwidth + 1e-6 * args.latency)
        rows.append({
            'devices': number, 'batch': number * SUB_BATCH, 'GFLOP a device': round(counts['flops'] / 1e9, 1),
            'GB accessed': round(counts['bytes'] / 1e9, 2), 'MB reduced': round(counts['collective_bytes'] / 1e6, 1),
            'computing, ms': round(1e3 * computing, 2), 'ring, ms': round(1e3 * ring, 2),
            'efficiency': f'{computing / (computing + ring):.0%}',
            'with 8 sub-batches each': f'{8 * computing / (8 * computing + ring):.0%}',
        })  # fmt: skip
        run.report(f'{number} devices: {rows[-1]}')
    return rows


@mock.patch('jax.lax.platform_dependent', lambda *arguments, default, **_: default(*arguments))
def count(model, number):
    """Returns the operations, accessed bytes and collective bytes of one device in a bSAM step.

    Runs in a worker process with `number` virtual CPU devices. The step is compiled with the formulas for GPUs.
    """
    mesh = devices.create_mesh()
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    functions = experiment.create(run.configuration(model, 'bsam', 'float32', number))
    batch_size = number * SUB_BATCH

    def typed(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

    with jax.set_mesh(mesh):
        shares = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(sharding.AXIS))
        batch = (
            jax.ShapeDtypeStruct((batch_size, 32, 32, 3), jnp.float32, sharding=shares),
            jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=shares),
        )
        state, one = jax.tree.map(typed, (functions.state_shapes(), jax.ShapeDtypeStruct((), jnp.float32)))
        compiled = functions.step.lower(state, batch, one).compile()
    costs = compiled.cost_analysis()
    return {
        'flops': costs['flops'],
        'bytes': costs['bytes accessed'],
        'collective_bytes': collective_bytes(compiled.as_text()),
    }


def collective_bytes(program):
    """Returns the total bytes of the results of a compiled program's collective operations."""
    operations = 'all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute'
    results = re.findall(rf'= (.*?) (?:{operations})\(', program)
    arrays = [array for result in results for array in re.findall(r'(\w+)\[([\d,]*)\]', result)]
    return sum(BYTES[kind] * math.prod(int(n) for n in shape.split(',') if n) for kind, shape in arrays)


if __name__ == '__main__':
    main()
