"""How many images a second train.py's steps take on this device, beside the rate of its matrix products.

    python benchmarks/throughput.py --json results/throughput.json

Images are synthetic. Steps are sent one after another without waiting, as in training, and all ways are timed in turns.
"""

import contextlib
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

import run  # noqa: E402

import devices  # noqa: E402
import flags  # noqa: E402
import runs  # noqa: E402
import settings  # noqa: E402
import tables  # noqa: E402

# A step's name, its optimizer, flags that differ from the defaults, whether it has a mesh, and its gradients.
STEPS = (
    ('sgd', 'sgd', {}, False, 1),
    ('sam', 'sam', {}, False, 2),
    ('bsam', 'bsam', {}, False, 2),
    ('bsam, mesh of one device', 'bsam', {}, True, 2),
    ('bsam, --atonce 1', 'bsam', {'atonce': 1}, False, 2),
)


class Trainer(run.Trainer):
    """run.py's, with its arrays on a mesh of one device if it is to have one; compiled before it is called."""

    def __init__(self, has_mesh, *args, **given):
        super().__init__(*args, **given)
        self.mesh = devices.create_mesh(1) if has_mesh else None
        if has_mesh:
            names = 'state', 'epoch', 'images', 'labels', 'lr_factor'
            vars(self).update(devices.replicate({name: getattr(self, name) for name in names}, self.mesh))

    def compile(self):
        with self._context():
            self.step = self.step.lower(*self.arguments()).compile()
        self.temporary_bytes = self.step.memory_analysis().temp_size_in_bytes

    def __call__(self):
        with self._context():
            return super().__call__()

    def _context(self):
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()


def main(argv=None):
    args = parse_args(argv)
    flags.use_compilecache(args.compilecache)
    results = runs.provenance('benchmarks/throughput.py', argv) | {'batch_size': args.batchsize}
    results['machine'] = {'copy_gbytes_per_second': run.copy_rate() / 1e9}
    trainers = {}
    for precision in args.precisions:
        results['machine'][f'{precision}_matrix_tflops'] = run.matrix_rate(args.matrix, precision) / 1e12
        for name, optim, given, has_mesh, gradients in STEPS:
            trainer = Trainer(has_mesh, args.model, optim, precision, args.batchsize, **given)
            trainers[precision, name] = trainer, gradients
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda pair: pair[0].compile(), trainers.values()))
    times, _ = run.in_turns(args.repeats, {key: trainer for key, (trainer, _) in trainers.items()}, args.steps)
    for (precision, name), turns in times.items():
        trainer, gradients = trainers[precision, name]
        rate = args.batchsize / statistics.median(turns)
        flops = 6 * run.MULTIPLY_ADDS[args.model] * gradients * rate
        results.setdefault(precision, {})[name] = {
            'seconds': turns,
            'images_per_second': rate,
            'share_of_matrix_rate': flops / 1e12 / results['machine'][f'{precision}_matrix_tflops'],
            'temporary_gbytes': trainer.temporary_bytes / 1e9,
        }
    print_table(results, args)
    if args.json:
        runs.write_json(args.json, results)


def parse_args(argv):
    parser = flags.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add('--model', choices=run.MULTIPLY_ADDS, default='resnet18', help='network')
    help = 'what networks compute in, see train.py'
    add('--precisions', nargs='+', choices=settings.PRECISIONS, default=list(settings.PRECISIONS), help=help)
    add('--batchsize', type=flags.integer(8), default=run.BATCH, help='images of a step')
    add('--steps', type=flags.integer(1), default=20, help='steps of a turn')
    add('--repeats', type=flags.integer(1), default=5, help='turns')
    add('--matrix', type=flags.integer(1), default=8192, help='rows of the square matrices that are multiplied')
    flags.add_compilecache(parser)
    add('--json', type=flags.new_file, help='write all figures here')
    return parser.parse_args(argv)


def print_table(results, args):
    """Markdown."""
    environment = results['environment']
    print(f'`{results["command"]}`: {environment["device"]}, JAX {environment["versions"]["jax"]}; {args.model}\n')
    rows = []
    for name, *_ in STEPS:
        row = [name]
        for precision in args.precisions:
            step = results[precision][name]
            row += [f'{step["images_per_second"]:.0f}', f'{step["share_of_matrix_rate"]:.0%}']
        rows.append(row)
    header = ['images/s']
    for precision in args.precisions:
        header += [precision, f'of {results["machine"][f"{precision}_matrix_tflops"]:.3g} TFLOP/s']
    print(tables.markdown(header, rows))


if __name__ == '__main__':
    main()
