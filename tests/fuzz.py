"""Damages small valid files at random and reads them: the right kind of result or one line, in little time and memory.

    python tests/fuzz.py --cases 10000

Prints how many damaged files each reader read and refused. Whatever else happened is printed with its seed, and the
file is saved in tests/corpus/READER, whose files the suite reads, too. A reader is a row of READERS.
"""

import argparse
import collections
import contextlib
import faulthandler
import functools
import gzip
import importlib.util
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import numpy as np  # noqa: E402
import scipy.io  # noqa: E402

import archives  # noqa: E402
import errors  # noqa: E402
import setup_tinyimagenet  # noqa: E402
from readers import cifar, idx, jpegs, npy, svhn, tfds  # noqa: E402

CORPUS = HERE / 'corpus'
SECONDS, MEGABYTES = 10, 300  # that a file may take


class Reader(NamedTuple):
    """A reader to be tried: how to make a valid file, and how to read one that is damaged.

    make: Returns the bytes of a small valid file, the same at every call.
    read: Reads damaged bytes in an empty folder. Raises errors.UserError, or an AssertionError for a wrong result.
    """

    make: Callable[[], bytes]
    read: Callable[[Path, bytes], None]


def _write(path, payload):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(payload)


def _check(images, labels, num_classes=10):
    assert images.dtype == np.uint8 and images.ndim == 4 and images.size
    assert labels.dtype == np.int32 and labels.shape == images.shape[:1]
    assert 0 <= labels.min() <= labels.max() < num_classes


def _of_cifar(name, transform=bytes):
    def read(folder, payload):
        _write(folder / name, transform(payload))
        _check(*cifar.read(cifar.CIFAR10, folder, 'test'))

    return read


def _cifar_tar():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'a'
        archives.write_tar(path, archives.cifar10_record_files(1)[0])
        return gzip.compress(gzip.decompress(path.read_bytes()), mtime=0)


def _cifar_pickle(protocol):
    import pickle

    images, labels = archives.cifar_images(0, 2, 10)
    rows = images.transpose(0, 3, 1, 2).reshape(2, 3072)
    return pickle.dumps({b'data': rows, b'labels': labels.tolist(), b'filenames': [b'a.png', b'b.png']}, protocol)


def _of_idx(name, transform=bytes):
    def read(folder, payload):
        _write(folder / 'mnist' / name, transform(payload))
        values = idx.read_file(folder / 'mnist' / name)
        assert values.dtype == np.uint8 and 0 < values.ndim <= 4

    return read


def _idx():
    return archives.idx(np.arange(150, dtype=np.uint8).reshape(3, 5, 10))


def _mat(compressed=False):
    images, labels = archives.cifar_images(0, 2, 10)
    file = io.BytesIO()
    content = {'X': images.transpose(1, 2, 3, 0), 'y': labels[:, None].astype(np.uint8)}
    scipy.io.savemat(file, content, do_compression=compressed)
    return b'MATLAB 5.0'.ljust(116) + file.getvalue()[116:]  # without the time


def _read_mat(folder, payload):
    _write(folder / 'svhn' / 'test_32x32.mat', payload)
    _check(*svhn.read(folder, 'test'))


def _zip():
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as members:
        for name in ('train/n0/images/a.JPEG', 'val/images/b.JPEG', 'val/val_annotations.txt', 'wnids.txt'):
            members.writestr(zipfile.ZipInfo(f'tiny-imagenet-200/{name}'), b'abcdef' * 20, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def _read_zip(folder, payload):
    _write(folder / 'tiny-imagenet-200.zip', payload)
    with contextlib.redirect_stderr(io.StringIO()):
        setup_tinyimagenet.unpack(folder / 'tiny-imagenet-200.zip', folder / 'tiny-imagenet-200')
    assert {path.name for path in folder.iterdir()} == {'tiny-imagenet-200.zip', 'tiny-imagenet-200'}


def _read_annotations(folder, payload):
    _write(folder / 'val' / 'val_annotations.txt', payload)
    for i in range(9):
        _write(folder / 'val' / 'images' / f'val_{i}.JPEG', b'')
    setup_tinyimagenet.sort_validation_images(folder / 'val')
    assert sum(path.is_file() for path in folder.rglob('*.JPEG')) == 9 and [path.name for path in folder.iterdir()] == [
        'val'
    ]


def _read_jpeg(folder, payload):
    _write(folder / 'a.JPEG', payload)
    try:
        images = jpegs.decode((64, 64, 3), [str(folder / 'a.JPEG')])
    except jpegs.DamagedError as error:
        raise errors.UserError(error) from error
    assert images.shape == (1, 64, 64, 3) and images.dtype == np.uint8


def _npy():
    file = io.BytesIO()
    np.save(file, np.arange(60, dtype=np.uint8).reshape(3, 4, 5))
    return file.getvalue()


def _read_npy(folder, payload):
    _write(folder / 'a.npy', payload)
    array = npy.load(folder / 'a.npy')
    assert array.dtype.kind in 'biufU' and array.tobytes() is not None


def _npz():
    file = io.BytesIO()
    np.savez_compressed(file, a=np.arange(60.0).reshape(3, 20), text=np.array('text'))
    return file.getvalue()


def _read_npz(folder, payload):
    _write(folder / 'a.npz', payload)
    assert all(array.dtype.kind in 'biufU' for array in npy.load_npz(folder / 'a.npz').values())


TOY = 'toy/1.0.0'
SHARD = f'{TOY}/toy-test.array_record-00000-of-00001'


@functools.cache
def _toy():
    """The files of a prepared set by name."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        archives.prepare_tfds(Path(folder))
        paths = [path for path in Path(folder).rglob('*') if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _of_tfds(name):
    def read(folder, payload):
        archives.write_files(folder, _toy() | {name: payload})
        with contextlib.redirect_stderr(io.StringIO()):
            opened = tfds.open_set('toy', folder)
            _check(*tfds.read(opened, 'test'), opened.num_classes)

    return Reader(lambda: _toy()[name], read)


def _tfds_record():
    from array_record.python.array_record_module import ArrayRecordReader

    with tempfile.TemporaryDirectory() as folder:
        archives.write_files(Path(folder), _toy())
        reader = ArrayRecordReader(str(Path(folder) / SHARD))
        return reader.read([0])[0]


@functools.cache
def _opened_toy():
    folder = Path(tempfile.mkdtemp())
    archives.write_files(folder, _toy())
    return tfds.open_set('toy', folder)


def _read_record(folder, payload):
    """An example whose bytes and whose PNG are damaged."""
    opened = _opened_toy()
    image, label = tfds._image(opened, [payload], 0)
    assert image.format in ('PNG', 'JPEG')
    if image.size == (8, 8):
        with tfds._damage_of(folder, 0):
            np.asarray(image.convert('RGB'))
            int(label)


READERS = {
    'cifar.tar.gz': Reader(_cifar_tar, _of_cifar('cifar-10-binary.tar.gz')),
    'cifar.tar': Reader(
        lambda: gzip.decompress(_cifar_tar()),
        _of_cifar('cifar-10-binary.tar.gz', lambda payload: gzip.compress(payload, 1)),
    ),
    'cifar.pickle': Reader(lambda: _cifar_pickle(2), _of_cifar('cifar-10-batches-py/test_batch')),
    'cifar.pickle5': Reader(lambda: _cifar_pickle(5), _of_cifar('cifar-10-batches-py/test_batch')),
    'idx': Reader(_idx, _of_idx('t10k-images-idx3-ubyte')),
    'idx.gz': Reader(lambda: gzip.compress(_idx(), mtime=0), _of_idx('t10k-images-idx3-ubyte.gz')),
    'mat': Reader(_mat, _read_mat),
    'mat-compressed': Reader(lambda: _mat(compressed=True), _read_mat),
    'tinyimagenet.zip': Reader(_zip, _read_zip),
    'val_annotations.txt': Reader(
        lambda: ''.join(f'val_{i}.JPEG\tn{i % 3}\t0\t0\t62\t62\n' for i in range(9)).encode(), _read_annotations
    ),
    'jpeg': Reader(lambda: archives.jpeg(100), _read_jpeg),
    'npy': Reader(_npy, _read_npy),
    'npz': Reader(_npz, _read_npz),
}
if importlib.util.find_spec('tensorflow_datasets'):
    READERS |= {
        'tfds-record': Reader(_tfds_record, _read_record),
        'tfds-features.json': _of_tfds(f'{TOY}/features.json'),
        'tfds-dataset_info.json': _of_tfds(f'{TOY}/dataset_info.json'),
        'tfds-shard': _of_tfds(SHARD),
    }


# Damage.


def damage(payload: bytes, seed: int) -> bytes:
    """Returns the payload with one to four changes that the seed determines."""
    draws = random.Random(seed)
    content = bytearray(payload)
    for _ in range(draws.choice((1, 1, 2, 4))):
        if content:
            draws.choice(_CHANGES)(content, draws)
    return bytes(content)


def _flip(content, draws):
    content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)


def _truncate(content, draws):
    del content[draws.randrange(len(content)) :]


def _delete(content, draws):
    start = draws.randrange(len(content))
    del content[start : start + draws.choice((1, 2, 4, 8, 64))]


def _splice(content, draws):
    source, target = draws.randrange(len(content)), draws.randrange(len(content))
    part = content[source : source + draws.choice((1, 4, 16, 512))]
    content[target : target + (len(part) if draws.random() < 0.5 else 0)] = part


def _repeat(content, draws):
    start = draws.randrange(len(content))
    part = content[start : start + draws.choice((1, 2, 8, 100))]
    content[start:start] = part * draws.choice((1, 10, 1000))


def _number(content, draws):
    width = draws.choice((1, 2, 4, 8))
    number = draws.choice((0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), 2 ** (8 * width - 1) - 1, 1 << 4 * width))
    position = draws.randrange(len(content))
    content[position : position + width] = number.to_bytes(width, draws.choice(('little', 'big')))


def _digits(content, draws):
    """Writes a huge or an odd number where one stands in the text."""
    places = [i for i, byte in enumerate(content[:4096]) if 48 <= byte < 58] or [draws.randrange(len(content))]
    place = draws.choice(places)
    content[place : place + 1] = draws.choice((b'-1', b'9' * 12, b'9' * 30, b'9' * 5000, b'1e999', b'NaN', b'0x', b''))


_CHANGES = (_flip, _flip, _truncate, _delete, _splice, _repeat, _number, _number, _digits)


# Cases.


class _TooLongError(BaseException):
    """A case that took more than SECONDS."""


def outcome(name: str, payload: bytes) -> str:
    """Returns 'read' or 'refused', or what went wrong when a reader was given a payload."""

    def stop(signum, frame):
        raise _TooLongError

    before = _peak_megabytes()
    folder = Path(tempfile.mkdtemp())
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True, file=sys.__stderr__)  # for what does not come back from C
    try:
        READERS[name].read(folder, payload)
        found = 'read'
    except errors.UserError as error:
        found = 'refused' if '\n' not in str(error) and len(str(error)) < 2000 else f'a long message: {error}'
    except _TooLongError:
        found = f'more than {SECONDS} s'
    except BaseException:
        found = traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(folder, ignore_errors=True)
    grown = _peak_megabytes() - before
    return found if grown < MEGABYTES else f'{grown:.0f} MB more memory, then: {found}'


def _peak_megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def corpus(name: str) -> list[Path]:
    """Returns the saved files of a reader."""
    return sorted((CORPUS / name).glob('*'))


def run(name: str, cases: int, seed: int = 0, with_corpus: bool = True) -> tuple[dict, dict]:
    """Tries a reader in processes of its own. Returns counts of outcomes, and what went wrong by seed or file name."""
    counts, failures, end = collections.Counter(), {}, seed + cases
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder) / 'at'
        while seed < end or with_corpus:
            command = [sys.executable, __file__, '--child', name, '--seed', str(seed), '--cases', str(end - seed)]
            command += ['--corpus'] if with_corpus else []
            at.write_text('the start')
            child = subprocess.run([*command, '--at', str(at)], capture_output=True, text=True, cwd=HERE.parent)
            if child.returncode == 0:
                found = json.loads(child.stdout.splitlines()[-1])
                return counts + collections.Counter(found['counts']), failures | found['failures']
            last = at.read_text().strip()
            failures[last] = f'the process ended with {child.returncode}: {child.stderr[-3000:]}'
            if not last.isdecimal():
                return counts, failures
            counts['read or refused'] += int(last) - seed
            seed, with_corpus = int(last) + 1, False
    return counts, failures


def _child(args):
    """In a process of its own: reads the corpus and the cases, and prints what came of them."""
    counts, failures = collections.Counter(), {}
    valid = READERS[args.child].make()
    assert outcome(args.child, valid) == 'read', 'the file that is not damaged'
    named = [(path.name, path.read_bytes) for path in corpus(args.child)] if args.corpus else []
    seeds = range(args.seed, args.seed + args.cases)
    named += [(str(seed), functools.partial(damage, valid, seed)) for seed in seeds]
    with open(args.at, 'w') as at:
        for label, payload in named:
            os.pwrite(at.fileno(), label.ljust(64).encode(), 0)
            found = outcome(args.child, payload())
            if found in ('read', 'refused'):
                counts[found] += 1
            else:
                failures[label] = found
    print(json.dumps({'counts': counts, 'failures': failures}))


def main() -> None:
    """Runs the cases of all readers, or of those named, and prints counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--cases', type=int, default=10_000, help='damaged files a reader')
    parser.add_argument('--seed', type=int, default=0, help='the first seed')
    parser.add_argument('--readers', nargs='*', choices=READERS, default=list(READERS), metavar='READER')
    for hidden in ('--child', '--at'):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument('--corpus', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return _child(args)
    failed = 0
    for name in args.readers:
        counts, failures = run(name, args.cases, args.seed)
        print(f'{name:24}', *(f'{what} {count}' for what, count in sorted(counts.items())), f'failed {len(failures)}')
        for label, found in failures.items():
            print(f'  {name} {label}: {found}')
            if label.isdecimal():
                _write(CORPUS / name / f'seed-{label}', damage(READERS[name].make(), int(label)))
        failed += len(failures)
        sys.stdout.flush()
    sys.exit(failed > 0)


if __name__ == '__main__':
    main()
