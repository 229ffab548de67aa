"""Damaged, hostile and unwritable files: a script gives a clear error or the right result, never wrong numbers."""

import json
import os
import random
import resource
import shutil
import subprocess
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import archives
import children
import data
import setup_tinyimagenet
import test as evaluate
import train
from conftest import arrays, read_log, restore
from readers import cifar
from runs import checkpoints, folders, training_flags


def error_of(main, arguments, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1
    return error


# Run folders.


@pytest.fixture(scope='module')
def finished(datasets, tmp_path_factory):
    """A run of three epochs, with its last two checkpoints."""
    folder = tmp_path_factory.mktemp('finished')
    return train.main([
        '--dataset=mnist', '--model=mlp', '--optim=bsam', '--alpha=0.1', '--batchsize=20', '--batchsplit=2',
        '--epochs=2', f'--datasetfolder={datasets}', f'--resultsfolder={folder}',
    ])  # fmt: skip


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / 'run'))


def flip(path, position):
    payload = bytearray(path.read_bytes())
    payload[position % len(payload)] ^= 1 << position % 8
    path.write_bytes(payload)


DAMAGES = {
    'flipped': lambda path, position: flip(path, position),
    'truncated': lambda path, position: path.write_bytes(path.read_bytes()[: position % path.stat().st_size]),
    'missing': lambda path, position: path.unlink(),
}


@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize('name', ['state.npz', 'progress.json', 'checksums.json'])
def test_damaged_checkpoint_is_named_and_the_one_before_offered(name, damage, run, capsys):
    DAMAGES[damage](run / 'checkpoints' / '6' / name, 20)
    for main, arguments in ((evaluate.main, [f'--resultsfolder={run}']), (train.main, [f'--resume={run}'])):
        error = error_of(main, arguments, capsys)
        assert f'{run}/checkpoints/6 is damaged: ' in error and 'checkpoint 4 is intact: use --checkpoint 4' in error
        assert f'is damaged: {name}' in error or name == 'checksums.json'
    assert not (run / 'metrics.json').exists()
    evaluate.main([f'--resultsfolder={run}', '--checkpoint=4'])
    assert json.loads((run / 'metrics-4.json').read_text())['trained'] == {'epoch': 1, 'steps_of_epoch': 2}


def test_training_goes_on_from_the_checkpoint_before(run, finished):
    flip(run / 'checkpoints' / '6' / 'progress.json', 5)
    train.main([f'--resume={run}', '--checkpoint=4'])
    for one, two in zip(arrays(restore(run)[1]), arrays(restore(finished)[1]), strict=True):
        np.testing.assert_array_equal(one, two)


def test_no_whole_checkpoint(run, capsys):
    for step in (4, 6):
        (run / 'checkpoints' / str(step) / 'progress.json').unlink()
    assert 'no earlier checkpoint is intact' in error_of(evaluate.main, [f'--resultsfolder={run}'], capsys)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda text: text.replace('"alpha": 0.1', '"alpha": 0.2'), 'config.json is damaged: its SHA-256 is '),
        (lambda text: text[:-40], 'config.json is damaged or cannot be read'),
        (lambda text: '{}', 'config.json has no checksum'),
        (lambda text: '[]', 'config.json is damaged or cannot be read: it is not a JSON object'),
        (lambda text: '', 'config.json is damaged or cannot be read'),
    ],
)
def test_damaged_config(change, message, run, capsys):
    (run / 'config.json').write_text(change((run / 'config.json').read_text()))
    for main, arguments in ((evaluate.main, [f'--resultsfolder={run}']), (train.main, [f'--resume={run}'])):
        assert message in error_of(main, arguments, capsys)


@pytest.mark.parametrize(
    ('part', 'name', 'value', 'message'),
    [
        ('flags', 'alpha', -1, "--alpha: '-1' is not a number > 0"),
        ('flags', 'alpha', 'x' * 300, 'is not a number > 0'),
        ('flags', 'batchsize', True, '--batchsize: expected one argument'),
        ('flags', 'optim', None, "--optim: unknown: 'None'"),
        ('flags', 'model', 'resnet50', "--model: unknown: 'resnet50'"),
        ('flags', 'model', 'lenet', 'does not fit the model and optimizer of config.json'),
        ('flags', 'extra', 1, 'there is no --extra'),
        ('flags', 'noaugment', 'yes', "--noaugment: ignored explicit argument 'yes'"),
        ('dataset', 'image_shape', [10**6, 10**6, 3], 'config.json'),
        ('dataset', 'image_shape', [28, 28], 'does not describe images that train.py could have read'),
        ('dataset', 'num_classes', 10**12, 'does not describe images'),
        ('dataset', 'mean', ['0'], 'does not describe images'),
        ('dataset', 'std', [float('nan')], 'does not describe images'),
        ('flags', 'batchsplit', 3, 'does not divide into --batchsplit 3 sub-batches'),
    ],
)
def test_absurd_config(part, name, value, message, run, capsys):
    """The checksum is right, as in a forged run."""
    config = folders.read_config(run)
    config[part][name] = value
    folders.write_config(run, config)
    assert message in error_of(evaluate.main, [f'--resultsfolder={run}'], capsys)


@pytest.mark.parametrize(
    ('main', 'flag', 'message'),
    [
        (evaluate.main, 'resultsfolder', 'does not describe images'),
        (train.main, 'resume', 'does not describe images'),
    ],
)
def test_config_without_a_part(main, flag, message, run, capsys):
    config = folders.read_config(run)
    del config['dataset']
    folders.write_config(run, config)
    assert message in error_of(main, [f'--{flag}={run}'], capsys)


def test_config_from_before_a_flag_was_there(run):
    """A missing flag takes its default, which is the behaviour before the flag existed."""
    config = folders.read_config(run)
    del config['flags']['validation'], config['flags']['bnupdate'], config['flags']['eta']
    del config['dataset']['labels_crc32']
    folders.write_config(run, config)
    evaluate.main([f'--resultsfolder={run}'])
    train.main([f'--resume={run}'])
    args = training_flags.flags_of(folders.read_config(run), run)
    assert (args.validation, args.bnupdate, args.eta) == (0.0, 'both', None)


def test_damaged_log_is_written_again_from_the_checkpoint(run):
    log = read_log(run)
    (run / 'log.jsonl').write_text('{"epoch": 0, "lo')
    with pytest.raises(folders.RunError, match=r'log\.jsonl is damaged'):
        folders.read_log(run)
    train.main([f'--resume={run}'])
    assert [record['loss'] for record in read_log(run)] == [record['loss'] for record in log]


def test_links_in_checkpoints_are_refused(run, tmp_path, capsys):
    progress = run / 'checkpoints' / '6' / 'progress.json'
    progress.rename(tmp_path / 'elsewhere')
    progress.symlink_to(tmp_path / 'elsewhere')
    assert 'progress.json is not a regular file' in error_of(evaluate.main, [f'--resultsfolder={run}'], capsys)


def test_checkpoint_of_another_network(run, flags_of, small_resnet18, capsys):
    """The arrays are of another network, but their checksums are right."""
    other = train.main(flags_of(model='resnet18'))
    shutil.rmtree(run / 'checkpoints')
    shutil.copytree(other / 'checkpoints', run / 'checkpoints')
    assert 'does not fit the model and optimizer' in error_of(evaluate.main, [f'--resultsfolder={run}'], capsys)


def test_500_random_damages_of_a_run_folder(run, finished):
    """Every damage is detected or harmless, such as a configuration without its last newline."""
    expected, config = arrays(restore(finished)[1]), folders.read_config(finished)
    files = [path.relative_to(run) for path in run.rglob('*') if path.is_file() and path.name != 'lock']
    files = [path for path in files if path.parts[:2] != ('checkpoints', '4')]
    draws, noticed = random.Random(0), 0
    for _ in range(500):
        name, damage = draws.choice(files), draws.choice(list(DAMAGES))
        DAMAGES[damage](run / name, draws.randrange(1 << 30))
        try:
            training_flags.flags_of(folders.read_config(run), run)
            state = restore(run)[1]
            folders.read_log(run)
        except folders.RunError as error:
            noticed += 1
            assert '\n' not in str(error)
        else:
            assert name.name in ('log.jsonl', 'config.json') and folders.read_config(run) == config
            for one, two in zip(arrays(state), expected, strict=True):
                np.testing.assert_array_equal(one, two)
        (run / name).write_bytes((finished / name).read_bytes())
    assert noticed > 400


# Disks.


LIMITED = """
import resource, sys, time
import train
report = train.Report.epoch
def epoch(self, record):
    report(self, record)
    limit = {limits}.get(record['epoch'])
    if limit:
        time.sleep(1)  # the epoch's checkpoint is being written
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
train.Report.epoch = epoch
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ('limits', 'status', 'last_step'),
    [
        ({0: 100_000}, 1, 2),
        ({0: 100_000, 2: resource.RLIM_INFINITY}, 0, 10),
        ({2: 100}, 1, 6),
    ],
    ids=['full to the end', 'room again', 'not even room for the log'],
)
def test_files_that_cannot_grow(limits, status, last_step, flags_of, tmp_path):
    """Training continues, with one warning of each kind, and saved files stay.

    The exit status says whether the end was saved.
    """
    process = children.run(['-c', LIMITED.format(limits=limits), *flags_of(epochs=4)])
    assert process.returncode == status and process.stderr.count('a checkpoint could not be saved') == 1
    assert process.stdout.count('test accuracy') == 5 and 'Traceback' not in process.stderr
    run = tmp_path / 'results' / 'mnist_mlp' / 'bsam' / 'run_0'
    assert restore(run)[0] == last_step
    assert not list(run.rglob('*.partial'))
    epochs = 3 if 100 in limits.values() else 5
    assert [record['epoch'] for record in read_log(run)] == list(range(epochs))
    assert ('train.py: error: the last state or log of' in process.stderr) == (status == 1)


def test_small_file_system(flags_of, tmp_path):
    """The second and third checkpoints, of 6 MB each, do not fit together on a real file system of 12 MB."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=12m', 'tmpfs', str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('this machine lets nobody mount a file system')
    try:
        process = children.run(['train.py', *flags_of(epochs=3, resultsfolder=disk / 'results')])
        run = disk / 'results' / 'mnist_mlp' / 'bsam' / 'run_0'
        assert process.returncode == 1 and 'No space left on device' in process.stderr, process.stderr
        assert process.stderr.count('a checkpoint could not be saved') == 1 and 'Traceback' not in process.stderr
        assert [record['epoch'] for record in read_log(run)] == [0, 1, 2, 3]
        assert restore(run)[0] in (2, 4) and not list(run.rglob('*.partial'))
    finally:
        subprocess.run(['umount', str(disk)], check=True)


def test_folder_that_vanishes(flags_of, tmp_path, monkeypatch, capsys):
    """Simulates a lost mount. The end of the run is not saved, and the exit status says so."""
    report = train.Report.epoch

    def epoch(self, record):
        report(self, record)
        if record['epoch'] == 1:
            run = tmp_path / 'results' / 'mnist_mlp' / 'bsam' / 'run_0'
            while checkpoints.all_steps(run / 'checkpoints')[-1] < 4:
                time.sleep(0.01)
            run.rename(tmp_path / 'gone')
            run.write_text('')

    monkeypatch.setattr(train.Report, 'epoch', epoch)
    with pytest.raises(SystemExit) as stop:
        train.main(flags_of(epochs=3))
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count('warning') == 2 and error.endswith('could not be saved\n')
    assert restore(tmp_path / 'gone')[0] == 4


# Archives of images.


def write_cifar10_archive(folder):
    path = folder / 'cifar-10-binary.tar.gz'
    archives.write_tar(path, archives.cifar10_record_files(2)[0])
    return 'cifar10', path


def write_cifar10_pickle(folder):
    content = archives.cifar_pickle(*archives.cifar_images(0, 3, 10))
    archives.write_files(folder, {f'cifar-10-batches-py/{name}': content for name in archives.CIFAR10_TRAIN})
    return 'cifar10', folder / 'cifar-10-batches-py' / 'data_batch_2'


def write_mnist(folder):
    archives.write_idx_set(folder / 'mnist')
    return 'mnist', folder / 'mnist' / 'train-images-idx3-ubyte.gz'


def write_plain_mnist(folder):
    archives.write_idx_set(folder / 'mnist', compressed=False)
    return 'mnist', folder / 'mnist' / 'train-labels-idx1-ubyte'


@pytest.mark.parametrize('write', [write_cifar10_archive, write_cifar10_pickle, write_mnist, write_plain_mnist])
def test_500_random_damages_of_an_archive(write, tmp_path):
    """Reading raises a DataError of one line, or gives images of the right kind.

    It never takes much more memory than reading the intact file.
    """
    name, path = write(tmp_path)
    whole, draws, noticed = path.read_bytes(), random.Random(0), 0
    tracemalloc.start()
    try:
        expected = data.dataset(name, tmp_path).read('train')[0]
        allowed = 2 * tracemalloc.get_traced_memory()[1] + (1 << 23)  # Python's own tables grow now and then
        for _ in range(500):
            for _ in range(draws.choice((1, 1, 3))):
                if path.exists() and path.stat().st_size:
                    DAMAGES[draws.choice(('flipped', 'flipped', 'truncated', 'missing'))](
                        path, draws.randrange(1 << 30)
                    )
            tracemalloc.reset_peak()
            try:
                images, labels = data.dataset(name, tmp_path).read('train')
            except data.DataError as error:
                noticed += 1
                assert '\n' not in str(error)
            else:
                assert images.dtype == np.uint8 and images.shape[1:] == expected.shape[1:]
                assert len(images) == len(labels) and 0 <= labels.min() <= labels.max() < 10
            assert tracemalloc.get_traced_memory()[1] < allowed
            path.write_bytes(whole)
    finally:
        tracemalloc.stop()
    assert noticed > 100


def test_archive_of_links_and_outside_paths(tmp_path):
    with tarfile.open(tmp_path / 'cifar-10-binary.tar.gz', 'w:gz') as tar:
        for name in ('/etc/evil', '../evil', 'cifar-10-batches-bin/test_batch.bin'):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, '/etc/passwd'
            tar.addfile(info)
    with pytest.raises(data.DataError, match=r'it holds no cifar-10-batches-bin/test_batch\.bin'):
        data.dataset('cifar10', tmp_path).read('test')
    assert [path.name for path in tmp_path.iterdir()] == ['cifar-10-binary.tar.gz']


def test_archive_that_promises_a_terabyte(tmp_path):
    with tarfile.open(tmp_path / 'cifar-10-binary.tar.gz', 'w:gz') as tar:
        info = tarfile.TarInfo('cifar-10-batches-bin/readme.html')
        info.size = 10**12
        tar.fileobj.write(info.tobuf())  # addfile of Python 3.13 would need the terabyte
    with pytest.raises(data.DataError, match='it exceeds 268435456 bytes'):
        data.dataset('cifar10', tmp_path).read('test')


def test_archive_that_never_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, 'LIMIT', 1 << 22)
    files = archives.cifar10_record_files(2)[0]
    archives.write_tar(tmp_path / 'cifar-10-binary.tar.gz', files | {'zeros': b'\0' * (1 << 23)})
    with pytest.raises(data.DataError, match='it exceeds 4194304 bytes'):
        data.dataset('cifar10', tmp_path).read('test')


def test_images_of_the_wrong_size_are_not_decoded(tmp_path, capsys):
    archives.write_tinyimagenet_zip(tmp_path / 'tiny-imagenet-200.zip')
    setup_tinyimagenet.main([f'--datasetfolder={tmp_path}'])
    image = tmp_path / 'tiny-imagenet-200' / 'train' / 'n00000007' / 'images' / 'n00000007_0.JPEG'
    Image.new('L', (5_000, 5_000)).save(image, 'JPEG')
    error = error_of(setup_tinyimagenet.main, [f'--datasetfolder={tmp_path}'], capsys)
    assert f'{image} is damaged (5000×5000 pixels instead of 64×64)' in error
    payload = bytearray(image.read_bytes())
    start = payload.index(b'\xff\xc0') + 5
    payload[start : start + 4] = (50_000).to_bytes(2, 'big') * 2
    image.write_bytes(payload)
    assert f'{image} is damaged' in error_of(setup_tinyimagenet.main, [f'--datasetfolder={tmp_path}'], capsys)


@pytest.mark.parametrize(
    ('name', 'where'), [('x.JPEG', '../../../evil'), ('../../x', 'n00000000'), ('/x', 'n00000000')]
)
def test_annotations_that_lead_outside(name, where, tmp_path, capsys):
    folder = tmp_path / 'datasets'
    archives.write_files(folder / 'tiny-imagenet-200' / 'val', {'val_annotations.txt': f'{name}\t{where}\n'.encode()})
    (folder / 'tiny-imagenet-200' / 'val' / 'images').mkdir()
    (folder / 'tiny-imagenet-200' / 'train').mkdir()
    error = error_of(setup_tinyimagenet.main, [f'--datasetfolder={folder}'], capsys)
    assert 'are not plain names' in error and [path.name for path in tmp_path.iterdir()] == ['datasets']


@pytest.mark.parametrize(
    ('name', 'size', 'reason'),
    [
        ('n0/images/bomb.JPEG', 1 << 21, 'has more than 1048576 bytes'),
        ('../../../../evil.JPEG', 1, 'leads out of the folder'),
    ],
)
def test_zip_with_a_bomb_and_outside_paths(name, size, reason, tmp_path, capsys):
    folder = tmp_path / 'datasets'
    folder.mkdir()
    with zipfile.ZipFile(folder / 'tiny-imagenet-200.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('/tiny-imagenet-200/val/evil.JPEG', b'')
        archive.writestr(f'tiny-imagenet-200/train/{name}', b'\0' * size)
    error = error_of(setup_tinyimagenet.main, [f'--datasetfolder={folder}'], capsys)
    assert f'{name} {reason}' in error
    assert os.listdir(tmp_path) == ['datasets'] and os.listdir(folder) == ['tiny-imagenet-200.zip']
