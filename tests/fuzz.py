"""Damages small valid files at random and reads them.

Readers must give a result of the right kind or one line of error, in little time and memory. The files belong to data
sets, run folders and sweeps.

    python tests/fuzz.py --cases 10000

Prints how many damaged files each reader read and refused. Prints every other outcome with its seed, and saves the
file in tests/corpus/READER. The test suite reads the saved files, too. A reader is a row of READERS.
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
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import unittest.mock
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import numpy as np  # noqa: E402
import scipy.io  # noqa: E402
from PIL import Image  # noqa: E402

import archives  # noqa: E402
import errors  # noqa: E402
import setup_tinyimagenet  # noqa: E402
from readers import cifar, decoded, decoding, idx, image_folder, npy, npz, svhn, tfds, tinyimagenet  # noqa: E402

CORPUS = HERE / 'corpus'
SECONDS, MEGABYTES = 10, 300  # limits for one file


class Reader(NamedTuple):
    """A reader under test.

    Attributes:
        make: returns the bytes of a small valid file, the same at every call.
        read: reads damaged bytes in an empty folder. Raises errors.UserError, or AssertionError for a wrong result.
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
    return b'MATLAB 5.0'.ljust(116) + file.getvalue()[116:]  # replaces the text that holds the time


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
    with decoded.data_errors():
        images = decoding.decode(tinyimagenet.RECIPE, [str(folder / 'a.JPEG')])
    assert images.shape == (1, 64, 64, 3) and images.dtype == np.uint8


@functools.cache
def _pictures():
    """Returns small image files of every format, joined."""
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8))
    grey = Image.fromarray(np.arange(0, 60_000, 400, dtype=np.uint16).reshape(10, 15))
    orientation = Image.Exif()
    orientation[0x0112] = 6
    kinds = [('JPEG', colours, {'exif': orientation}), ('PNG', colours, {'exif': orientation}), ('PNG', grey, {})]
    kinds += [(kind, colours, {}) for kind in ('BMP', 'GIF', 'TIFF', 'WEBP', 'PPM')]
    kinds += [('TIFF', grey, {}), ('TIFF', colours, {'compression': 'tiff_lzw'}), ('WEBP', colours, {'lossless': True})]
    payloads = []
    for kind, image, options in kinds:
        image.save(file := io.BytesIO(), kind, **options)
        payloads.append(file.getvalue())
    return _BETWEEN.join(payloads)


def _read_pictures(folder, payload):
    for i, part in enumerate(payload.split(_BETWEEN)):
        _write(folder / 'set' / 'train' / 'a' / f'{i}.png', part)
    opened = image_folder.open_set(folder / 'set', 8, folder / 'cache')
    with unittest.mock.patch.object(Image, 'MAX_IMAGE_PIXELS', 1 << 22):  # images of the usual limit take 400 MB
        images, labels = image_folder.read(opened, 'train')
    _check(images, labels)
    assert images.shape[1:] == (8, 8, 3)


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


@functools.cache
def _image_arrays():
    """Returns the arrays of a small image set in MedMNIST's layout as .npy files, {name: bytes}."""
    images, labels = np.arange(300, dtype=np.uint8).reshape(4, 5, 5, 3), np.arange(4, dtype=np.uint8)[:, None]
    arrays = {'train_images': images, 'train_labels': labels, 'test_images': images[:2], 'test_labels': labels[:2]}
    files = {}
    for name, array in arrays.items():
        np.save(file := io.BytesIO(), array)
        files[f'{name}.npy'] = file.getvalue()
    return files


def _read_images_npz(folder, payload):
    _write(folder / 'images.npz', payload)
    opened = npz.open_set(folder / 'images.npz')
    for split in ('train', 'test'):
        _check(*npz.read(opened, split), opened.num_classes)


def _read_image_arrays(folder, payload):
    """Reads damaged arrays in an intact zip file."""
    _read_images_npz(folder, _zip_of(dict(zip(_image_arrays(), payload.split(_BETWEEN), strict=False))))


TOY = 'toy/1.0.0'
SHARD = f'{TOY}/toy-test.array_record-00000-of-00001'


@functools.cache
def _toy():
    """Returns the files of a data set that TFDS has prepared, {name: bytes}."""
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
        with (  # TFDS prints long warnings about the missing TensorFlow
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
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
    """Reads an example that is damaged anywhere, including the PNG in it."""
    opened = _opened_toy()
    image, label = tfds._image(opened, [payload], 0)
    assert image.format in ('PNG', 'JPEG')
    if image.size == (8, 8):
        with tfds._damage_of(folder, 0):
            np.asarray(image.convert('RGB'))
            int(label)


# Run folders and sweeps. The functions import the modules, because JAX is slow to import and most readers need none.

FLAGS = [
    '--dataset=digits', '--model=mlp', '--optim=bsam', '--batchsize=50', '--batchsplit=5', '--epochs=2',
    '--trainimages=200', '--validation=0.2', '--datasetfolder=/data', '--resultsfolder=/runs', '--compilecache=off',
]  # fmt: skip


@functools.cache
def _config():
    from runs import training_flags

    flags = {
        name: value
        for name, value in vars(training_flags.parse_args(FLAGS)).items()
        if name not in training_flags.OF_START
    }
    dataset = {'num_train': 160, 'num_classes': 10, 'image_shape': [32, 32, 1], 'mean': [0.0], 'std': [1.0]}
    return {
        'format': 1, 'flags': flags, 'dataset': dataset | {'labels_crc32': 5}, 'num_data': 160.0, 'python': '3.11.7',
        'versions': {'jax': '0.10.1'}, 'matmul_precision': None, 'xla_flags': '', 'git_commit': None, 'device': 'cpu',
    }  # fmt: skip


def _log():
    record = {'validation_accuracy': 0.5, 'learning_rate': 1.0, 'seconds': 2.5, 'images_per_second': 64.0}
    return [{'epoch': epoch, 'loss': 2.5 - epoch} | record for epoch in range(3)]


def _metrics():
    values = dict.fromkeys(('accuracy', 'nll', 'ece', 'brier'), 0.5)
    asked = {'split': 'validation', 'testimages': None, 'testmc': 1, 'bins': 20, 'bnrefresh': None, 'laplace': False}
    trained = {'epoch': 2, 'steps_of_epoch': 3}
    return {'trained': trained, 'num_images': 40} | asked | {'mean': values, 'average': values | {'disagreement': None}}


def _json(content):
    return json.dumps(content, indent=1).encode()


def _make_config():
    import jax

    from evaluation import request  # noqa: F401

    now = {'matmul_precision': jax.config.jax_default_matmul_precision, 'xla_flags': os.environ.get('XLA_FLAGS', '')}
    return _json(_config() | now)


def _with_checksum(payload):
    """Adds the right checksum to a damaged configuration, if it is still a JSON object without one."""
    from runs import folders

    try:
        content = json.loads(payload.decode('utf-8-sig'))
        digest = folders._digest(content)
    except (ValueError, RecursionError):
        return payload
    if not isinstance(content, dict) or 'sha256' in content:
        return payload
    return payload.rstrip()[:-1] + f'{"," if content else ""} "sha256": "{digest}"}}'.encode()


def _read_config(folder, payload):
    """Reads the file like train.py --resume and test.py, up to the checkpoint and the images."""
    import experiment
    from evaluation import comparison, request
    from runs import devices, folders, provenance, training_flags

    _write(folder / 'config.json', _with_checksum(payload))
    folders.end_of_training(folders.read_config(folder), 2)
    config = training_flags.checked_config(folder)
    given = {name: value for name, value in config['flags'].items() if value is not None}
    assert vars(training_flags.parse_args(training_flags.command_line(given))).items() >= config['flags'].items()
    with unittest.mock.patch.object(provenance, 'environment', return_value=_environment()):
        provenance.require_same_precision(folder, config)
    assert all(type(config['dataset'][name]) is int for name in ('num_train', 'num_classes'))
    comparison.check_flags([config['flags']], 'validation')
    request.require_possible(request.Request(temperature=True), folder, config)
    args = training_flags.continued(argparse.Namespace(**config['flags']), {'compilecache': 'off'}, folder)
    devices.mesh_of_training(args, flags_hold=True)
    _state_shapes(experiment.create(config))
    folders.write_config(folder, config | {'flags': vars(args)})


@functools.cache
def _environment():
    from runs import provenance

    return provenance.environment()


@functools.cache
def _state_shapes(experiment):
    return experiment.state_shapes()


def _write_checkpoint(folder, files):
    from runs import checkpoints

    for name, payload in files.items():
        _write(folder / 'checkpoints' / '3' / name, payload)
    if 'checksums.json' not in files:
        _write(folder / 'checkpoints' / '3' / 'checksums.json', _json(checkpoints._checksums(folder / 'checkpoints/3')))


def _make_progress():
    from runs import checkpoints

    return _json(checkpoints.Progress(3, 1, 2.5, 0.5, 0.1, _log())._asdict())


def _read_progress(folder, payload):
    from runs import checkpoints, folders

    _write_checkpoint(folder, {'state.npz': b'a', 'progress.json': payload})
    held = checkpoints._of_whole(folder, None, checkpoints._read_progress)
    assert all(type(number) is int and 0 <= number < 2**31 for number in (held.epoch, held.step))
    assert all(type(number) is float and math.isfinite(number) for number in (held.seconds, held.lr_factor))
    assert type(held.loss) is float and not math.isinf(held.loss)
    assert all(type(checkpoints._accuracy(record)) in (int, float) for record in held.log)
    folders.write_log(folder, held.log)
    assert folders.read_log(folder) == list(held.log)


_OF_CHECKPOINT = {'state.npz': b'a', 'progress.json': b'{}'}


@functools.cache
def _make_checksums():
    from runs import checkpoints

    with tempfile.TemporaryDirectory() as folder:
        _write_checkpoint(Path(folder), _OF_CHECKPOINT)
        return _json(checkpoints._checksums(Path(folder) / 'checkpoints/3'))


def _read_checksums(folder, payload):
    from runs import checkpoints

    _write_checkpoint(folder, _OF_CHECKPOINT | {'checksums.json': payload})
    assert checkpoints.require_whole(folder).name == '3'
    assert json.loads(payload.decode('utf-8-sig')) == json.loads(_make_checksums())


def _make_log():
    from evaluation import plots  # noqa: F401

    return ''.join(json.dumps(record) + '\n' for record in _log()).encode()


def _read_log(folder, payload):
    from evaluation import plots
    from runs import folders

    _write(folder / 'log.jsonl', payload)
    log = folders.read_log(folder)
    assert all(type(record['epoch']) is int for record in log)
    figure = plots.training(log)
    numbers = [abs(x) for record in log for x in record.values() if isinstance(x, float | int) and x]
    if numbers and (max(numbers) > 1e3 or min(numbers) < 1e-3):  # other plots look alike, and drawing is slow
        with plots.settings(plots._STYLE):
            figure.draw_without_rendering()


def _make_metrics():
    import sweep  # noqa: F401
    from studies import study  # noqa: F401

    return _json(_metrics())


def _read_metrics(folder, payload):
    """Reads the file like sweep.py and studies/study.py."""
    import sweep
    from evaluation.request import Request
    from runs import folders, json_files
    from studies import study

    trained = folder / '0000' / 'digits_mlp' / 'bsam' / 'run_0'
    _write(trained / 'log.jsonl', _make_lines(_log()))
    folders.write_config(trained, _config())
    _write(trained / 'metrics-validation.json', payload)
    values = dict(flag.removeprefix('--').split('=') for flag in FLAGS)
    print(sweep.summarise(argparse.Namespace(output=folder, testmc=1), [values], [{'rho': 0.1}]))
    request = Request(split='validation')
    try:
        measured = json_files.read_json(request.metrics_file(trained))
    except ValueError as error:
        raise folders.RunError(error) from error
    record = study.record_of(trained, values, {'validation': request}, [measured])
    json_files.write_json(folder / 'record.json', record)
    study.require_record(folder / 'record.json', values, {'validation': request})
    assert record['evaluations']['validation']['average']['nll'] is None or np.isfinite(
        record['evaluations']['validation']['average']['nll']
    )


def _make_lines(records):
    return ''.join(json.dumps(record) + '\n' for record in records).encode()


def _predictions():
    """Returns the arrays of predictions.npz as .npy files, {name: bytes}."""
    import metrics
    from evaluation import posteriors, predictions
    from runs import checkpoints

    logits = np.linspace(-1, 1, 15, dtype=np.float32).reshape(5, 3)
    votes = np.int32([[2, 0, 0]] * 5)
    prediction = posteriors.Prediction(logits, metrics.softmax(logits), np.full(5, 0.1), votes)
    with tempfile.TemporaryDirectory() as folder:
        predictions.write(Path(folder) / 'a.npz', prediction, np.arange(5) % 3, 2, checkpoints.Progress(2, 3))
        with zipfile.ZipFile(Path(folder) / 'a.npz') as members:
            return {name: members.read(name) for name in members.namelist()}


def _zip_of(files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as members:
        for name, payload in files.items():
            members.writestr(zipfile.ZipInfo(name), payload, zipfile.ZIP_DEFLATED)
    return file.getvalue()


_BETWEEN = b'<next array>'


def _read_arrays(folder, payload):
    """Reads damaged arrays in an intact zip file."""
    _read_predictions(folder, _zip_of(dict(zip(_predictions_by_name(), payload.split(_BETWEEN), strict=False))))


@functools.cache
def _predictions_by_name():
    return _predictions()


def _read_predictions(folder, payload):
    import test
    from evaluation import comparison, predictions

    _write(folder / 'predictions.npz', payload)
    labels, prediction, num_samples, progress = predictions.read(folder / 'predictions.npz')
    assert num_samples > 0 and progress.epoch >= 0 and progress.step >= 0
    assert (prediction.votes >= 0).all() and (prediction.votes.sum(axis=1) == num_samples).all()
    probs = [prediction.probs_at_mean, prediction.probs]
    assert all(p.shape == (len(labels), 3) or p.size != 15 for p in probs)
    for p in probs:
        finite = p[np.isfinite(p).all(axis=1)]
        np.testing.assert_allclose(finite.sum(axis=1), 1, rtol=1e-6)
    test.warn_if_incomplete(folder, _config(), progress)
    rows = comparison.rows([comparison.Result(_config()['flags'], labels, *probs, num_samples)])
    values = comparison.values(rows, labels, 20)
    comparison.main_table(rows, values, bold=True), comparison.full_table(rows, values)


@functools.cache
def _foreign():
    """Returns the arrays of predictions of another program as .npy files, {name: bytes}."""
    samples = np.full((2, 5, 3), 1 / 3, np.float32) + np.float32([[[0.1, -0.1, 0]]])
    arrays = {'labels': np.arange(5) % 3, 'logits': np.eye(5, 3), 'samples': samples, 'class_names': np.array([*'abc'])}
    files = {}
    for name, array in arrays.items():
        np.save(file := io.BytesIO(), array)
        files[f'{name}.npy'] = file.getvalue()
    return files


def _read_foreign(folder, payload):
    from evaluation import comparison, foreign

    _write(folder / 'a.npz', payload)
    saved = foreign.read(folder / 'a.npz')
    shape = saved.probs['average'].shape
    assert saved.labels.shape == shape[:1] and 0 <= saved.labels.min() <= saved.labels.max() < shape[1]
    for probs in saved.probs.values():
        assert probs.shape == shape and (probs >= 0).all()
        np.testing.assert_allclose(probs.sum(axis=1), 1, rtol=1e-6)
    names = saved.class_names or 'abc'
    assert ''.join(names).isprintable() and (len(names) == shape[1] or saved.class_names is None)
    rows = comparison.rows([saved.result('a')])
    assert all(np.isfinite(value['brier']).all() for value in comparison.values(rows, saved.labels, 20))


def _read_foreign_arrays(folder, payload):
    """Reads damaged arrays in an intact zip file."""
    _read_foreign(folder, _zip_of(dict(zip(_foreign(), payload.split(_BETWEEN), strict=False))))


_TENSORS = {
    'batch_stats.count': np.asarray(7, np.int32),
    'params.head.bias': np.arange(3, dtype=np.float32),
    'params.head.kernel': np.arange(6, dtype=np.float32).reshape(2, 3),
    'precision.head.kernel': np.ones((2, 3), np.float32),
}
_SETTINGS = {'format': '1', 'optimizer': 'bsam', 'num_data': '160.0', 'weight_decay': '0.00625', 'config': 'a' * 64}


@functools.cache
def _make_posterior():
    from evaluation import exported

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'posterior.safetensors'
        exported._save(path, _TENSORS, _SETTINGS | {'epoch': '2', 'steps_of_epoch': '3'})
        return path.read_bytes()


def _read_posterior(folder, payload):
    tensors, progress = _read_tensors(folder, payload)
    assert tensors.keys() == _TENSORS.keys() and (progress.epoch, progress.step) == (2, 3)
    assert all(tensors[name].tobytes() == tensor.tobytes() for name, tensor in _TENSORS.items())


def _read_tensors(folder, payload):
    from evaluation import exported

    _write(folder / 'posterior.safetensors', payload)
    return exported._read(folder / 'posterior.safetensors', _TENSORS, _SETTINGS)


def _make_header():
    return _make_posterior()[8 : 8 + int.from_bytes(_make_posterior()[:8], 'little')].rstrip()


def _read_header(folder, payload):
    """Reads intact tensors with a damaged header, whatever checksum the header has."""
    from evaluation import exported

    of_tensors = _make_posterior()[8 + int.from_bytes(_make_posterior()[:8], 'little') :]
    padded = payload + b' ' * (-len(payload) % 8)
    with unittest.mock.patch.object(exported, '_digest', return_value=unittest.mock.ANY):
        tensors, progress = _read_tensors(folder, len(padded).to_bytes(8, 'little') + padded + of_tensors)
    assert tensors.keys() == _TENSORS.keys() and progress.epoch >= 0 and progress.step >= 0
    for name, tensor in _TENSORS.items():
        assert (tensors[name].dtype, tensors[name].shape) == (tensor.dtype, tensor.shape)


TOML = """[flags]
dataset = 'digits'
model = 'mlp'
optim = 'bsam'
datasetfolder = '/data'
priorprec = 1
batchsize = 50
batchsplit = 5
validation = 0.2
noaugment = true
stream = false

[grid]
rho = [0.01, 0.05]
randomseed = [0, 1]

[random]
draws = 2
alpha = [0.1, 1.0]
warmup = [1, 3]
"""


def _make_toml():
    import sweep  # noqa: F401

    return TOML.encode()


def _read_toml(folder, payload):
    import sweep
    from runs import training_flags

    _write(folder / 'sweep.toml', payload)
    fixed, varied = sweep.read(folder / 'sweep.toml')
    assert 0 < len(varied) <= 10_000
    for values in varied[:3]:
        args = training_flags.parse_args(training_flags.command_line(fixed | values))
        for name, value in (fixed | values).items():
            held = getattr(args, name)
            assert str(held).lower() == str(value).lower() or type(held)(value) == held, (name, held, value)


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
    'image_folder': Reader(_pictures, _read_pictures),
    'npy': Reader(_npy, _read_npy),
    'npz': Reader(_npz, _read_npz),
    'images.npz': Reader(lambda: _zip_of(_image_arrays()), _read_images_npz),
    'images-arrays': Reader(lambda: _BETWEEN.join(_image_arrays().values()), _read_image_arrays),
}
OF_DATA = set(READERS)
READERS |= {
    'config.json': Reader(_make_config, _read_config),
    'progress.json': Reader(_make_progress, _read_progress),
    'checksums.json': Reader(_make_checksums, _read_checksums),
    'log.jsonl': Reader(_make_log, _read_log),
    'metrics.json': Reader(_make_metrics, _read_metrics),
    'predictions.npz': Reader(lambda: _zip_of(_predictions()), _read_predictions),
    'predictions-arrays': Reader(lambda: _BETWEEN.join(_predictions().values()), _read_arrays),
    'foreign.npz': Reader(lambda: _zip_of(_foreign()), _read_foreign),
    'foreign-arrays': Reader(lambda: _BETWEEN.join(_foreign().values()), _read_foreign_arrays),
    'sweep.toml': Reader(_make_toml, _read_toml),
}
OF_RUNS = READERS.keys() - OF_DATA  # read in plain Python, where no case can crash the process
READERS |= {
    'posterior.safetensors': Reader(_make_posterior, _read_posterior),
    'posterior-header': Reader(_make_header, _read_header),
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
    changes = _CHANGES + 6 * _CHANGES_OF_TEXT if _is_text(payload) else _CHANGES
    for _ in range(draws.choice((1, 1, 2, 4))):
        if content:
            draws.choice(changes)(content, draws)
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
    """Replaces a digit of the text by a huge or malformed number."""
    places = [i for i, byte in enumerate(content[:4096]) if 48 <= byte < 58] or [draws.randrange(len(content))]
    place = draws.choice(places)
    content[place : place + 1] = draws.choice((b'-1', b'9' * 12, b'9' * 30, b'9' * 5000, b'1e999', b'NaN', b'0x', b''))


def _is_text(payload):
    try:
        return payload.decode().isprintable() or b'\n' in payload
    except UnicodeDecodeError:
        return False


# Text: JSON, lines of JSON and TOML.

_VALUES_OF_TEXT = (
    b'Infinity', b'-Infinity', b'NaN', b'inf', b'nan', b'1e999', b'1e308', b'-1e308', b'5e-324', b'9' * 400,
    b'-' + b'9' * 400, b'9' * 5000, b'-1', b'0', b'1', b'0.5', b'-0.0', b'2147483648', b'18446744073709551616', b'null',
    b'true', b'false', b'""', b'{}', b'[]', b'[0]', b'[[]]', b'{"a": []}', b'[' * 5000, b'[' * 5000 + b']' * 5000,
    b'[' * 600 + b']' * 600, b'{"a":' * 600 + b'0' + b'}' * 600, b'"\\u001b[31m"', b'"\x1b]0;a\x07"', b'"\\u0000"',
    b'"a\\nb"', b'"\\ud800"', b'"' + b'a' * 5000 + b'"', b'"nan"', b'"1"', b'"../a"', b'"~nobody/a"', b'"a=b"',
    b'1979-05-27',
)  # fmt: skip
_STRING = rb"""(?:"(?:[^"\\\n]|\\.)*"|'[^'\n]*')"""
_VALUE = re.compile(rb'(?<=[:=\[,])\s*(' + _STRING + rb'|\{[^{}]*\}|\[[^][]*\]|[-+.\w]+)')
_ENTRY = re.compile(rb'(' + _STRING + rb'|\w+)(\s*[:=]\s*)(' + _STRING + rb'|\{[^{}]*\}|\[[^][]*\]|[-+.\w]+)(,?\s*)')


def _value(content, draws):
    """Replaces a value of the text by a hostile one, or by another value of the text."""
    found = list(_VALUE.finditer(content)) or [re.match(rb'()', content)]
    chosen = draws.choice(found)
    content[slice(*chosen.span(1))] = draws.choice((*_VALUES_OF_TEXT, draws.choice(found)[1]))


def _entry(content, draws):
    """Drops an entry, doubles it, or writes it under the key of another entry or under a hostile key."""
    found = list(_ENTRY.finditer(content))
    if not found:
        return
    chosen, other = draws.choice(found), draws.choice(found)
    quoted = b'"\\u001b[31m"', b'""', b'"a=b"', b'"resume"', b'"\\ud800"', b'"help"'
    keys = (other[1], draws.choice(quoted))
    again = draws.choice(keys) + chosen[2] + draws.choice((chosen[3], other[3], *_VALUES_OF_TEXT)) + (chosen[4] or b',')
    new = draws.choice((b'', chosen[0] * 2, again, again + chosen[0]))
    content[slice(*chosen.span())] = new


def _mark(content, draws):
    """Inserts a byte-order mark, a NUL or an escape code, mostly at the beginning."""
    where = draws.choice((0, 0, draws.randrange(len(content))))
    content[where:where] = draws.choice(
        (b'\xef\xbb\xbf', b'\xff\xfe', b'\0', b'\x1b[31m', b'\xed\xa0\x80', '\u202e'.encode())
    )


_CHANGES_OF_TEXT = (_value, _value, _value, _entry, _entry, _mark)
_CHANGES = (_flip, _flip, _truncate, _delete, _splice, _repeat, _number, _number, _digits)


# Cases.


class _TooLongError(BaseException):
    """A case that took more than SECONDS."""


def outcome(name: str, payload: bytes) -> str:
    """Gives a payload to a reader. Returns 'read', 'refused' or what went wrong."""

    def stop(signum, frame):
        raise _TooLongError

    before, said = _peak_megabytes(), io.StringIO()
    folder = Path(tempfile.mkdtemp())
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True, file=sys.__stderr__)  # for calls that hang in C
    try:
        with (
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
            unittest.mock.patch('os.fsync'),  # takes longer than everything else
        ):
            READERS[name].read(folder, payload)
        found = 'read'
    except errors.UserError as error:
        found = 'refused'
        print(error, file=said)
    except SystemExit as error:  # from an argument parser
        found = 'refused' if error.code == 2 else f'exit status {error.code}'
    except _TooLongError:
        found = f'more than {SECONDS} s'
    except BaseException:
        found = traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(folder, ignore_errors=True)
    grown = _peak_megabytes() - before
    lines = said.getvalue().splitlines() if found in ('read', 'refused') else []
    if not all(line.isprintable() and len(line) < 2000 for line in lines) or (found == 'refused' and len(lines) > 1):
        found = f'{found}, and said {lines!r:.5000}'
    return found if grown < MEGABYTES else f'{grown:.0f} MB more memory, then: {found}'


def _peak_megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def corpus(name: str) -> list[Path]:
    """Returns the saved files of a reader."""
    return sorted((CORPUS / name).glob('*'))


def run(name: str, cases: int, seed: int = 0, with_corpus: bool = True) -> tuple[dict, dict]:
    """Tries a reader in child processes, and goes on after a crash.

    Args:
        name: a row of READERS.
        cases: the number of damaged files.
        seed: the seed of the first file. Each further file adds 1.
        with_corpus: whether to read the saved files as well.

    Returns:
        Counts of outcomes, and failures by seed or file name.
    """
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


def run_here(
    name: str, cases: int, seed: int = 0, with_corpus: bool = True, begin: Callable[[str], None] = len
) -> tuple[dict, dict]:
    """Tries a reader in this process, which ends if the reader crashes. Takes and returns what `run` does.

    Args:
        begin: is called with the seed or file name of each case before the case is read.
    """
    counts, failures = collections.Counter(), {}
    valid = READERS[name].make()
    assert (found := outcome(name, valid)) == 'read', f'the file that is not damaged: {found}'
    named = [(path.name, path.read_bytes) for path in corpus(name)] if with_corpus else []
    named += [(str(seed), functools.partial(damage, valid, seed)) for seed in range(seed, seed + cases)]
    for label, payload in named:
        begin(label)
        found = outcome(name, payload())
        if found in ('read', 'refused'):
            counts[found] += 1
        else:
            failures[label] = found
    return counts, failures


def _child(args):
    """Tries a reader in a child process of `run`, and prints the results as JSON."""
    with open(args.at, 'w') as at:
        counts, failures = run_here(
            args.child,
            args.cases,
            args.seed,
            args.corpus,
            lambda label: os.pwrite(at.fileno(), label.ljust(64).encode(), 0),
        )
    print(json.dumps({'counts': counts, 'failures': failures}))


def main() -> None:
    """Runs the cases of all readers or of the named ones, and prints counts."""
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
