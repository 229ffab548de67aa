"""Profiles a gradient on one CPU core, by kind of convolution and stage of the network.

    python benchmarks/convolutions.py

One core, because operations on several cores overlap and wait for each other. Their times would not add up.
"""

import collections
import math
import os
import re
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
from flax import linen as nn

import models
from benchmarks import run
from evaluation import tables
from runs import json_files, launch, parsing, provenance

SUB_BATCHES, SUB_BATCH = 4, 25


@launch.script('convolutions.py')
def main(argv=None):
    parser = parsing.Parser(__doc__)
    parser.add_argument('--model', choices=run.MULTIPLY_ADDS, default='resnet18', help='network')
    parser.add_argument('--json', type=parsing.new_file, help='write all figures to this JSON file')
    args = parser.parse_args(argv)
    os.environ['PJRT_NPROC'] = '1'
    if jax.default_backend() != 'cpu':
        parser.error('this benchmark reads profiles of CPUs only: set JAX_PLATFORMS=cpu')
    gradient, arguments = run.gradient_over_sub_batches(args.model, 'float32', SUB_BATCHES * SUB_BATCH, SUB_BATCHES)
    compiled = gradient.lower(*arguments).compile()
    gflop_of = gflop_of_stages(args.model)
    run.seconds(compiled, *arguments)
    elapsed = run.seconds(compiled, *arguments) / SUB_BATCHES
    kinds = kinds_of_operations(compiled.as_text())
    times = operation_times(partial(compiled, *arguments), kinds)
    of_kind = collections.Counter()
    for name, time in times.items():
        of_kind[kinds[name]] += time
    other = of_kind.pop(None)
    table = {kind: [time, gflop_of[kind.split()[-1]]] for kind, time in sorted(of_kind.items())}
    matrix_rate = run.machine()['matrix_gflops']
    flops = 6 * run.MULTIPLY_ADDS[args.model] * SUB_BATCH / 1e9
    print(f'gradient of {SUB_BATCH} images: {elapsed * 1e3:.0f} ms, {flops / elapsed:.0f} GFLOP/s;', end=' ')
    print(f'matrix product {matrix_rate:.0f} GFLOP/s\n')
    rows = []
    for label, (milliseconds, gflop) in table.items():
        rate = gflop / milliseconds * 1e3
        rows.append([label, f'{milliseconds:.0f}', f'{rate:.0f}', f'{rate / matrix_rate:.0%}'])
    rows.append(['everything else: normalisation, additions, transpositions', f'{other:.0f}', '', ''])
    print(tables.markdown(['', 'ms', 'GFLOP/s as a plain convolution', 'share of the matrix product'], rows))
    if args.json:
        figures = provenance.of_command('benchmarks/convolutions.py', argv) | {
            'gradient_milliseconds': elapsed * 1e3,
            'gflops': flops / elapsed,
            'matrix_gflops': matrix_rate,
            'milliseconds_and_gflop': table,
            'other_milliseconds': other,
        }
        json_files.write_json(args.json, figures)


def operation_times(call, names):
    """Calls `call` under the profiler. Returns {operation: milliseconds per sub-batch} for these names."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (path,) = Path(folder).rglob('*.xplane.pb')
        profile = jax.profiler.ProfileData.from_file(str(path))
    times = collections.Counter()
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in names:
                    times[event.name] += event.duration_ns / 1e6 / SUB_BATCHES
    return times


def kinds_of_operations(hlo):
    """Returns {operation: kind} for a compiled module, where a kind is 'forward, stage1' or the like.

    The kind is None for operations outside convolutions, and for the gradient of a bias. A fusion has the kind of its
    last operation. Loops are left out, because the operations inside them are listed.
    """
    operations = re.findall(r'%([\w.\-]+) = (.*)', hlo)
    return {name: kind_of(line) for name, line in operations if not name.startswith('while')}


def kind_of(operation):
    """Returns the kind of an operation, from its line in the compiled module."""
    layer = re.search(r'op_name="[^"]*/(stem|stage\d)/[^"]*conv/', operation)
    if not layer:
        return None
    gradient = re.search('(input|kernel)_gradient', operation)
    if gradient:
        return f'{gradient[1]} gradient, {layer[1]}'
    return None if 'transpose(' in operation else f'forward, {layer[1]}'


def gflop_of_stages(model):
    """Returns {stage: GFLOP of the stage's convolutions in a forward pass over one sub-batch}.

    A multiply-add counts as two operations. The input gradient and the kernel gradient each take as many operations as
    the forward pass. Winograd tiles count as plain convolutions, although they need 16/36 of the multiplications only.
    """
    gflop = collections.Counter()

    def intercept(function, inputs, options, context):
        y = function(*inputs, **options)
        if isinstance(context.module, nn.Conv):
            inputs_of_output = math.prod(context.module.kernel_size) * inputs[0].shape[-1]
            gflop[context.module.path[0]] += 2 * inputs_of_output * y.size / 1e9
        return y

    with nn.intercept_methods(intercept):
        images = jax.ShapeDtypeStruct((SUB_BATCH, 32, 32, 3), 'float32')
        jax.eval_shape(partial(models.create(model, 10).init, train=False), jax.random.key(0), images)
    return gflop


if __name__ == '__main__':
    main()
