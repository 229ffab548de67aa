"""Where the time of a gradient goes: a profile of ResNet-18's, by kind of convolution and stage.

    python benchmarks/convolutions.py

On one core: on several, operations overlap and wait for each other, and what each costs cannot be told.
"""

import collections
import math
import os
import re
import tempfile
from functools import partial
from pathlib import Path

import jax
import run

import flags
import runs
import tables

SUB_BATCHES, SUB_BATCH = 4, 25


def main(argv=None):
    parser = flags.Parser(__doc__.splitlines()[0])
    parser.add_argument('--model', choices=run.MULTIPLY_ADDS, default='resnet18', help='network')
    parser.add_argument('--json', type=flags.new_file, help='write all figures here')
    args = parser.parse_args(argv)
    os.environ['PJRT_NPROC'] = '1'
    if jax.default_backend() != 'cpu':
        parser.error('profiles of CPUs alone are understood here: set JAX_PLATFORMS=cpu')
    gradient, arguments = run.gradient_over_sub_batches(args.model, 'float32', SUB_BATCHES * SUB_BATCH, SUB_BATCHES)
    compiled = gradient.lower(*arguments).compile()
    run.seconds(compiled, *arguments)
    elapsed = run.seconds(compiled, *arguments) / SUB_BATCHES
    hlo = compiled.as_text()
    convolutions = dict(find_convolutions(hlo))
    names = {name for name in re.findall(r'%([\w.\-]+) = ', hlo) if not name.startswith('while')}
    times, calls = operation_times(partial(compiled, *arguments), names)
    table, other = by_kind(times, calls, convolutions, hlo)
    matrix_rate = run.machine()['matrix_gflops']
    flops = 6 * run.MULTIPLY_ADDS[args.model] * SUB_BATCH / 1e9
    print(f'a gradient of {SUB_BATCH} images: {elapsed * 1e3:.0f} ms, {flops / elapsed:.0f} GFLOP/s;', end=' ')
    print(f'matrix product {matrix_rate:.0f} GFLOP/s\n')
    rows = []
    for label, (milliseconds, gflop) in table.items():
        rate = gflop / milliseconds * 1e3
        rows.append([label, f'{milliseconds:.0f}', f'{rate:.0f}', f'{rate / matrix_rate:.0%}'])
    rows.append(['all else: normalisation, additions, transpositions', f'{other:.0f}', '', ''])
    print(tables.markdown(['', 'ms', 'GFLOP/s', 'of the matrix product'], rows))
    if args.json:
        figures = runs.provenance('benchmarks/convolutions.py', argv) | {
            'gradient_milliseconds': elapsed * 1e3,
            'gflops': flops / elapsed,
            'matrix_gflops': matrix_rate,
            'milliseconds_and_gflop': table,
            'other_milliseconds': other,
        }
        runs.write_json(args.json, figures)


def operation_times(call, names):
    """Milliseconds and calls a sub-batch of the compiled operations of these names."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (path,) = Path(folder).rglob('*.xplane.pb')
        profile = jax.profiler.ProfileData.from_file(str(path))
    times, calls = collections.Counter(), collections.Counter()
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in names:
                    times[event.name] += event.duration_ns / 1e6 / SUB_BATCHES
                    calls[event.name] += 1 / SUB_BATCHES
    return times, calls


def by_kind(times, calls, convolutions, hlo):
    """{kind and stage: [milliseconds, GFLOP]} of the convolutions in a compiled module, and all other milliseconds."""
    table = collections.defaultdict(lambda: [0.0, 0.0])
    for name, line in convolutions.items():
        if times[name]:
            row = table[label_of(line)]
            row[0] += times[name]
            row[1] += gflop_of(line, hlo) * calls[name]
    return dict(sorted(table.items())), sum(time for name, time in times.items() if name not in convolutions)


def find_convolutions(hlo):
    """(operation, line of its convolution), which may be written as a product; operations are those or fusions."""
    inside, computation = {}, None
    for line in hlo.splitlines():
        begin = re.match(r'%?([\w.\-]+) .*\{$', line)
        computation = begin.group(1) if begin else computation
        if re.search(r' (convolution|dot)\(', line) and '/conv/' in line:
            inside[computation] = line
            yield re.search(r'%([\w.\-]+) = ', line).group(1), line
    for name, called in re.findall(r'%([\w.\-]+) = .*fusion\(.*calls=%([\w.\-]+)', hlo):
        if called in inside:
            yield name, inside[called]


def label_of(line):
    stage = re.search(r'/(stem|stage\d)/', line).group(1)
    if 'transpose(' not in line:
        return f'forward, {stage}'
    if ' dot(' in line:
        by_kernel = 'lhs_contracting_dims={0}' in line
    else:
        by_kernel = max(map(int, re.search(r'window=\{size=(\d+)x(\d+)', line).groups())) > 3
    return f'gradient by the {"kernel" if by_kernel else "input"}, {stage}'


def gflop_of(line, hlo):
    """Multiply-adds twice, those with the zeros of a dilated operand left out."""
    operation, first, second = re.search(r' (convolution|dot)\(%([\w.\-]+), %([\w.\-]+)\)', line).groups()
    output = math.prod(sizes(line.split(f' {operation}(')[0]))
    if operation == 'dot':
        axis = int(re.search(r'lhs_contracting_dims=\{(\d)\}', line).group(1))
        return 2 * output * sizes_of(first, hlo)[axis] / 1e9
    zeros = 4 if 'lhs_dilate' in line else 1
    return 2 * output * math.prod(sizes_of(second, hlo)[:-1]) / zeros / 1e9


def sizes_of(name, hlo):
    return sizes(re.search(rf'%{re.escape(name)} = (\S+)', hlo).group(1))


def sizes(shape):
    return [int(n) for n in re.search(r'f32\[([\d,]+)\]', shape).group(1).split(',')]


if __name__ == '__main__':
    main()
