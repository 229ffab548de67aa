"""Measures how long train.py takes from the command to the end of its first bSAM step.

    python benchmarks/start.py --json results/start.json

Starts train.py twice with the same --compilecache folder. The first start compiles, the second loads the compiled
functions. Images are random.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from runs import json_files, launch, parsing, provenance

ROOT = Path(__file__).parent.parent


@launch.script('start.py')
def main(argv=None):
    parser = parsing.Parser(__doc__)
    parser.add_argument(
        '--models', nargs='+', choices=('resnet18', 'resnet20'), default=['resnet18', 'resnet20'], help='networks'
    )
    parser.add_argument('--json', type=parsing.new_file, help='write all figures to this JSON file')
    args = parser.parse_args(argv)
    results = provenance.of_command('benchmarks/start.py', argv) | {'help_seconds': seconds_of_help()}
    print(f'train.py --help: {results["help_seconds"]:.2f} s')
    for model in args.models:
        results[model] = start_times(model)
        first, second = results[model]['first_seconds'], results[model]['second_seconds']
        print(
            f'{model}, to the end of the first step: {first:.1f} s at the first start, {second:.1f} s at the second',
            flush=True,
        )
    if args.json:
        json_files.write_json(args.json, results)


def seconds_of_help():
    """Returns how long `train.py --help` takes."""
    began = time.perf_counter()
    subprocess.run([sys.executable, ROOT / 'train.py', '--help'], check=True, capture_output=True)
    return time.perf_counter() - began


def start_times(model):
    """Returns the seconds to the first step of two starts with the same, initially empty, compile cache."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        records = np.random.default_rng(0).integers(0, 10, (40, 3073), np.uint8)
        (folder / 'cifar-10-batches-bin').mkdir()
        for name in [*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch']:
            (folder / 'cifar-10-batches-bin' / f'{name}.bin').write_bytes(records.tobytes())
        arguments = f'--model {model} --optim bsam --alpha 0.01 --epochs 0 --datasetfolder {folder}'.split()
        arguments += ['--resultsfolder', folder / 'results', '--compilecache', folder / 'compiled']
        command = [sys.executable, ROOT / 'train.py', *arguments]
        return {'first_seconds': seconds_to_first_step(command), 'second_seconds': seconds_to_first_step(command)}


def seconds_to_first_step(command):
    """Runs train.py for one step. Returns the seconds from the command to the end of the step.

    They are the seconds until the line that train.py prints before the step, plus the logged seconds of the step.
    """
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        run = process.stdout.readline().split(':')[0]
        before_the_step = time.perf_counter() - began
        process.communicate()
    record = json.loads((Path(run) / 'log.jsonl').read_text())
    return before_the_step + record['seconds']


if __name__ == '__main__':
    main()
