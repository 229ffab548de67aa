"""Measures how fast images are decoded, read again, and trained on from the device or streamed to it.

    python benchmarks/loading.py --json results/loading.json

The data set imitates TinyImageNet: the same number of training JPEGs in the same size, cut out of two photographs.
"""

import contextlib
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluation import tables
from runs import json_files, launch, parsing, provenance

ROOT = Path(__file__).parent.parent

CLASSES, SIZE = 200, 64
TRAINING = ['--dataset', 'tinyimagenet', '--model', 'lenet', '--optim', 'sgd', '--alpha', '0.01', '--warmup', '1']


@launch.script('loading.py')
def main(argv=None):
    parser = parsing.Parser(__doc__)
    add = parser.add_argument
    add(
        '--perclass',
        type=parsing.integer(1),
        default=500,
        help='training images in each of the 200 classes, for reading',
    )
    add('--trained', type=parsing.integer(1), default=20, help='training images in each class, for training')
    add('--epochs', type=parsing.integer(1), default=3, help='see train.py; the first epoch is not timed')
    add('--turns', type=parsing.integer(1), default=3, help='trainings with --stream, and the same number without')
    add('--json', type=parsing.new_file, help='write all figures to this JSON file')
    args = parser.parse_args(argv)
    with made_set(args.perclass) as (folder, setup_seconds):
        figures = {'setup_seconds': setup_seconds} | reading(folder)
    with made_set(args.trained) as (folder, _):
        figures |= streaming(folder, args)
    print(tables.markdown(['', 'measured'], rows(figures)))
    if args.json:
        json_files.write_json(args.json, provenance.of_command('benchmarks/loading.py', argv) | figures)


def rows(figures):
    """Returns the table's rows, [(label, cell), ...]."""
    ratios = figures['streamed_over_resident']
    return [
        ('`setup_tinyimagenet.py`: unpacking, decoding and storing, s', f'{figures["setup_seconds"]:.1f}'),
        (
            'first reading of the training images: decoding and storing, images/s',
            f'{figures["decoded_per_second"]:.0f}',
        ),
        ('… relative to plain decoding loops on all cores', f'{figures["decoding_share"]:.0%}'),
        ('later start: until both splits are mapped, s', f'{figures["start_seconds"]:.2f}'),
        ('… until all images are read from the disk, s', f'{figures["reading_seconds"]:.2f}'),
        ('… until all images are read, if the system has them in memory, s', f'{figures["reading_again_seconds"]:.2f}'),
        ('training epoch, images on the device, s', f'{statistics.median(figures["epoch_seconds"]):.2f}'),
        ('training epoch, `--stream`, s', f'{statistics.median(figures["streamed_epoch_seconds"]):.2f}'),
        ('streamed ÷ on the device', f'{statistics.median(ratios):.3f}'),
        ('… range over the turns', f'{min(ratios):.2f} to {max(ratios):.2f}'),
    ]


@contextlib.contextmanager
def made_set(per_class):
    """Makes a data set in a temporary folder. Yields the folder, and the seconds that setup_tinyimagenet.py took."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_archive(folder / 'tiny-imagenet-200.zip', per_class)
        yield folder, seconds_of(['setup_tinyimagenet.py', '--datasetfolder', folder])


def write_archive(path, per_class):
    """Writes a zip in the official layout. It has a tenth as many validation images as training images."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photographs = load_sample_images().images
    classes = [f'n{i:08d}' for i in range(CLASSES)]
    annotations = []
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('tiny-imagenet-200/wnids.txt', '\n'.join(classes))
        for name in classes:
            for i in range(per_class):
                archive.writestr(f'tiny-imagenet-200/train/{name}/images/{name}_{i}.JPEG', cutting(rng, photographs))
            for _ in range(max(1, per_class // 10)):
                file = f'val_{len(annotations)}.JPEG'
                archive.writestr(f'tiny-imagenet-200/val/images/{file}', cutting(rng, photographs))
                annotations.append(f'{file}\t{name}\t0\t0\t62\t62')
        archive.writestr('tiny-imagenet-200/val/val_annotations.txt', '\n'.join(annotations))


def cutting(rng, photographs):
    """Returns a random crop of 64×64 pixels from one of the photographs, as a JPEG."""
    photograph = photographs[rng.integers(len(photographs))]
    top, left = (rng.integers(size - SIZE) for size in photograph.shape[:2])
    payload = io.BytesIO()
    Image.fromarray(photograph[top : top + SIZE, left : left + SIZE]).save(payload, 'JPEG')
    return payload.getvalue()


def seconds_of(script):
    """Runs a script, [file name, flags, ...]. Returns its seconds."""
    began = time.perf_counter()
    subprocess.run([sys.executable, ROOT / script[0], *script[1:]], check=True, capture_output=True)
    return time.perf_counter() - began


def reading(folder):
    """Times reading in a made data set.

    First reads both splits as later starts do, from the disk and then from the system's memory. Then decodes the
    training images again, and compares the rate with plain decoding loops.
    """
    import data  # imported late, because decoding processes import this file and should start fast, as with train.py

    dataset = data.dataset('tinyimagenet', folder)
    room = np.ones(dataset.read('train')[0].shape, np.uint8)
    (cache,) = (folder / 'tiny-imagenet-200').glob('train-*.npy')
    forget(cache)
    start, from_disk = reading_seconds(dataset, room)
    _, from_memory = reading_seconds(dataset, room)
    cache.unlink()
    began = time.perf_counter()
    images, _ = dataset.read('train')
    rate = len(images) / (time.perf_counter() - began)
    return {
        'start_seconds': start,
        'reading_seconds': from_disk,
        'reading_again_seconds': from_memory,
        'decoded_per_second': rate,
        'decoding_share': rate / plain_rate(folder),
    }


def forget(path):
    """Asks the system to drop a file from its memory, so that the next reading is from the disk."""
    with open(path, 'rb') as file:
        os.fsync(file)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reading_seconds(dataset, room):
    """Returns the seconds until both splits are mapped, and until both are copied into `room`.

    `room` must be memory that is in use already, because a virtual machine waits seconds for its first gigabyte.
    """
    began = time.perf_counter()
    splits = [dataset.read(split)[0] for split in ('train', 'test')]
    mapped = time.perf_counter() - began
    for images in splits:
        room[: len(images)] = images
    return mapped, time.perf_counter() - began


def plain_rate(folder):
    """Returns the images per second of decoding loops over the first 5,000 images, one process on each core at once."""
    paths = sorted((folder / 'tiny-imagenet-200' / 'train').rglob('*.JPEG'))[:5000]
    cores = os.cpu_count()
    context = multiprocessing.get_context('spawn')
    all_started = context.Barrier(cores)
    with ProcessPoolExecutor(cores, context, all_started.wait) as pool:
        return sum(pool.map(rate_of_loop, [paths] * cores))


def rate_of_loop(paths):
    """Returns the images per second of a loop that decodes these files."""
    began = time.perf_counter()
    for path in paths:
        with Image.open(path) as image:
            np.asarray(image.convert('RGB'))
    return len(paths) / (time.perf_counter() - began)


def streaming(folder, args):
    """Trains with the images on the device and with --stream, in turns. Returns the seconds of the epochs."""
    turns = [
        (epoch_seconds(folder, args.epochs), epoch_seconds(folder, args.epochs, '--stream')) for _ in range(args.turns)
    ]
    return {
        'epoch_seconds': [seconds for resident, _ in turns for seconds in resident],
        'streamed_epoch_seconds': [seconds for _, streamed in turns for seconds in streamed],
        'streamed_over_resident': [
            statistics.median(streamed) / statistics.median(resident) for resident, streamed in turns
        ],
    }


def epoch_seconds(folder, epochs, *more):
    """Trains once. Returns the seconds of every epoch except the first, which compiles. more: further flags."""
    with tempfile.TemporaryDirectory() as results:
        paths = [f'--datasetfolder={folder}', f'--resultsfolder={results}']
        seconds_of(['train.py', *TRAINING, f'--epochs={epochs}', *more, *paths])
        (log,) = Path(results).rglob('log.jsonl')
        return [json.loads(line)['seconds'] for line in log.read_text().splitlines()][1:]


if __name__ == '__main__':
    main()
