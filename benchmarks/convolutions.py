"""Where the time of a gradient goes: a profile of ResNet-18's, by kind of convolution and stage.

    python benchmarks/convolutions.py

Operations overlap on several cores, so their times add up to more than the gradient's.
"""

import collections
import math
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
    gradient, arguments = run.gradient_over_sub_batches(args.model, 'float32', SUB_BATCHES * SUB_BATCH, SUB_BATCHES)
    compiled = gradient.lower(*arguments).compile()
    run.seconds(compiled, *arguments)
    elapsed = run.seconds(compiled, *arguments) / SUB_BATCHES
    times = operation_times(partial(compiled, *arguments))
    table, other = by_kind(times, compiled.as_text())
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


def operation_times(call):
    """Milliseconds a sub-batch of each compiled operation, by name."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (path,) = Path(folder).rglob('*.xplane.pb')
        profile = jax.profiler.ProfileData.from_file(str(path))
    times = collections.Counter()
    for plane in profile.planes:
        for line in plane.lines:
            if not line.name.startswith('python'):
                for event in line.events:
                    times[event.name] += event.duration_ns / 1e6 / SUB_BATCHES
    return times


def by_kind(times, hlo):
    """{kind and stage: [milliseconds, GFLOP]} of the convolutions in a compiled module, and all other milliseconds."""
    table = collections.defaultdict(lambda: [0.0, 0.0])
    convolutions = dict(find_convolutions(hlo))
    for name, line in convolutions.items():
        if times[name]:
            row = table[label_of(line)]
            row[0] += times[name]
            row[1] += gflop_of(line, hlo)
    names = set(re.findall(r'%([\w.\-]+) = ', hlo)) - set(convolutions)
    other = sum(time for name, time in times.items() if name in names and not name.startswith('while'))
    return dict(sorted(table.items())), other


def find_convolutions(hlo):
    """(operation, line of its convolution): operations are convolutions or fusions around one."""
    inside, computation = {}, None
    for line in hlo.splitlines():
        begin = re.match(r'%?([\w.\-]+) .*\{$', line)
        computation = begin.group(1) if begin else computation
        if ' convolution(' in line:
            inside[computation] = line
            yield re.search(r'%([\w.\-]+) = ', line).group(1), line
    for name, called in re.findall(r'%([\w.\-]+) = .*fusion\(.*calls=%([\w.\-]+)', hlo):
        if called in inside:
            yield name, inside[called]


def label_of(line):
    stage = re.search(r'/(stem|stage\d)/', line)
    height, width = map(int, re.search(r'window=\{size=(\d+)x(\d+)', line).groups())
    if 'transpose(' not in line:
        kind = 'forward'
    else:
        kind = 'gradient by the input' if max(height, width) <= 3 else 'gradient by the kernel'
    return f'{kind}, {stage.group(1) if stage else "?"}'


def gflop_of(line, hlo):
    """Multiply-adds twice, those with the zeros of a dilated operand left out."""
    output = sizes(line.split(' convolution(')[0])
    kernel_name = re.search(r' convolution\(%[\w.\-]+, %([\w.\-]+)\)', line).group(1)
    kernel = sizes(re.search(rf'%{re.escape(kernel_name)} = (\S+)', hlo).group(1))
    zeros = 4 if 'lhs_dilate' in line else 1
    return 2 * math.prod(output) * math.prod(kernel[:-1]) / zeros / 1e9


def sizes(shape):
    return [int(n) for n in re.search(r'f32\[([\d,]+)\]', shape).group(1).split(',')]


if __name__ == '__main__':
    main()
