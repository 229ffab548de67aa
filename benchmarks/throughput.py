"""How many images a second train.py's steps take on this device, beside the rate of its matrix products.

    python benchmarks/throughput.py --json results/throughput.json

Images are synthetic. Steps are sent one after another without waiting, as in training, and all ways are timed in turns.
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

# Of each way to take a step: its name in tables, the optimizer, flags other than the defaults, whether it has a mesh.
WAYS = {
    'sgd': ('SGD', 'sgd', {}, False),
    'sam': ('SAM', 'sam', {}, False),
    'bsam': ('bSAM', 'bsam', {}, False),
    'bsam_on_a_mesh_of_one_device': ('bSAM on a mesh of one device', 'bsam', {}, True),
    'bsam_one_by_one': ('bSAM, --atonce 1', 'bsam', {'atonce': 1}, False),
}


class Trainer(run.Trainer):
    """run.py's, with its arrays on a mesh of one device if it is to have one; compiled before it is called."""

    def __init__(self, has_mesh, *args, **given):
        super().__init__(*args, **given)
        self.mesh = devices.create_mesh(1) if has_mesh else None
        if has_mesh:
            self.state, self.lr_factor = sharding.replicate((self.state, self.lr_factor), self.mesh)

    def compile(self):
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
    for trainer in trainers.values():  # in threads they would disturb XLA's choice of kernels, which it times
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
    help = 'what networks compute in, see train.py'
    add(
        '--precisions', nargs='+', choices=training_flags.PRECISIONS, default=list(training_flags.PRECISIONS), help=help
    )
    add('--ways', nargs='+', choices=WAYS, default=list(WAYS), help='steps that are timed')
    add('--batchsize', type=parsing.integer(8), default=run.BATCH, help='images of a step')
    add('--steps', type=parsing.integer(1), default=20, help='steps of a turn')
    add('--repeats', type=parsing.integer(1), default=5, help='turns')
    add('--matrix', type=parsing.integer(1), default=8192, help='rows of the square matrices that are multiplied')
    parsing.add_compilecache(parser)
    add('--json', type=parsing.new_file, help='write all figures here')
    args = parser.parse_args(argv)
    if args.batchsize % run.SPLIT:
        parser.error(f'--batchsize {args.batchsize} does not divide into {run.SPLIT} sub-batches')
    return args


def print_table(results, args):
    """Markdown."""
    environment = results['environment']
    print(f'`{results["command"]}`: {environment["device"]}, JAX {environment["versions"]["jax"]}; {args.model}\n')
    print(table([results], args.precisions, args.ways))


def table(results, precisions, ways):
    """Images a second and shares of the matrix product's rate; results: of calls for one precision or several."""
    header, rows = ['images/s'], [[WAYS[way][0]] for way in ways]
    for precision in precisions:
        (measured,) = [found for found in results if precision in found]
        header += [precision, f'of {measured["machine"][f"{precision}_matrix_tflops"]:.3g} TFLOP/s']
        for way, row in zip(ways, rows, strict=True):
            step = measured[precision][way]
            row += [f'{step["images_per_second"]:.0f}', f'{step["share_of_matrix_rate"]:.0%}']
    return tables.markdown(header, rows)


if __name__ == '__main__':
    main()
