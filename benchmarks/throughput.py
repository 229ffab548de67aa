"""Measures the images per second of train.py's steps on this device, for GPUs.

    python benchmarks/throughput.py --json results/throughput.json

Images are synthetic. Steps are sent one after another without waiting, as in training. All ways to take a step are
timed in turns. Each rate is also given as a share of the rate of a large matrix product on the same device.
"""

import contextlib
import statistics
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import run
from evaluation import tables
from ops import sharding
from runs import devices, json_files, launch, parsing, provenance, training_flags

# Ways to take a step: {way: (name in tables, optimizer, flags that differ from the defaults, whether it has a mesh)}.
WAYS = {
    'sgd': ('SGD', 'sgd', {}, False),
    'sam': ('SAM', 'sam', {}, False),
    'bsam': ('bSAM', 'bsam', {}, False),
    'bsam_on_a_mesh_of_one_device': ('bSAM on a mesh of one device', 'bsam', {}, True),
    'bsam_one_by_one': ('bSAM, --atonce 1', 'bsam', {'atonce': 1}, False),
}


class Trainer(run.Trainer):
    """run.Trainer, optionally on a mesh of one device. Call `compile` before the first step."""

    def __init__(self, has_mesh, *args, **given):
        super().__init__(*args, **given)
        self.mesh = devices.create_mesh(1) if has_mesh else None
        if has_mesh:
            self.state, self.lr_factor = sharding.replicate((self.state, self.lr_factor), self.mesh)

    def compile(self):
        """Compiles the step, and records the bytes of its temporary arrays."""
        with self._context():
            self.step = self.step.lower(*self.arguments()).compile()
        self.temporary_bytes = self.step.memory_analysis().temp_size_in_bytes

    def __call__(self):
        with self._context():
            return super().__call__()

    def _context(self):
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()


@launch.script('throughput.py')
def main(argv=None):
    args = parse_args(argv)
    launch.use_compilecache(args.compilecache)
    results = provenance.of_command('benchmarks/throughput.py', argv) | {
        'model': args.model,
        'batch_size': args.batchsize,
    }
    results['machine'] = {'copy_gbytes_per_second': run.copy_rate() / 1e9}
    trainers = {}
    for precision in args.precisions:
        results['machine'][f'{precision}_matrix_tflops'] = run.matrix_rate(args.matrix, precision) / 1e12
        for way in args.ways:
            _, optim, given, has_mesh = WAYS[way]
            trainers[precision, way] = Trainer(has_mesh, args.model, optim, precision, args.batchsize, **given)
    for trainer in trainers.values():  # not in threads, because XLA times kernels to choose between them
        trainer.compile()
    times, _ = run.in_turns(range(args.repeats), trainers, args.steps)
    for (precision, way), turns in times.items():
        rate = args.batchsize / statistics.median(turns)
        gradients = 1 if way == 'sgd' else 2
        tflops = 6 * run.MULTIPLY_ADDS[args.model] * gradients * rate / 1e12
        results.setdefault(precision, {})[way] = {
            'seconds': turns,
            'images_per_second': rate,
            'share_of_matrix_rate': tflops / results['machine'][f'{precision}_matrix_tflops'],
            'temporary_gbytes': trainers[precision, way].temporary_bytes / 1e9,
        }
    print_table(results, args)
    if args.json:
        json_files.write_json(args.json, results)


def parse_args(argv):
    parser = parsing.Parser(__doc__)
    add = parser.add_argument
    add('--model', choices=run.MULTIPLY_ADDS, default='resnet18', help='network')
    help = 'precisions that networks compute in, see train.py'
    add(
        '--precisions', nargs='+', choices=training_flags.PRECISIONS, default=list(training_flags.PRECISIONS), help=help
    )
    add('--ways', nargs='+', choices=WAYS, default=list(WAYS), help='ways to take a step')
    add('--batchsize', type=parsing.integer(8), default=run.BATCH, help='images per step')
    add('--steps', type=parsing.integer(1), default=20, help='steps per turn')
    add('--repeats', type=parsing.integer(1), default=5, help='turns; each turn times every way')
    add(
        '--matrix', type=parsing.integer(1), default=8192, help='rows and columns of the matrices in the matrix product'
    )
    parsing.add_compilecache(parser)
    add('--json', type=parsing.new_file, help='write all figures to this JSON file')
    args = parser.parse_args(argv)
    if args.batchsize % run.SPLIT:
        parser.error(f'--batchsize {args.batchsize} is not a multiple of {run.SPLIT}, the number of sub-batches')
    return args


def print_table(results, args):
    """Prints the command, the device and the table, as Markdown."""
    environment = results['environment']
    print(f'`{results["command"]}`: {environment["device"]}, JAX {environment["versions"]["jax"]}; {args.model}\n')
    print(table([results], args.precisions, args.ways))


def table(results, precisions, ways):
    """Returns a Markdown table of images per second, and of shares of the matrix product's rate.

    Args:
        results: records of this script. Exactly one of them must have measured each precision.
        precisions: columns of the table.
        ways: rows of the table, keys of WAYS.
    """
    header, rows = ['images/s'], [[WAYS[way][0]] for way in ways]
    for precision in precisions:
        (measured,) = [found for found in results if precision in found]
        header += [precision, f'share of {measured["machine"][f"{precision}_matrix_tflops"]:.3g} TFLOP/s']
        for way, row in zip(ways, rows, strict=True):
            step = measured[precision][way]
            row += [f'{step["images_per_second"]:.0f}', f'{step["share_of_matrix_rate"]:.0%}']
    return tables.markdown(header, rows)


if __name__ == '__main__':
    main()
