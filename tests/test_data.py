"""Readers of archives in the official layouts, intact and damaged; augmentation; batches; downloads."""

import gzip
import hashlib
import http.server
import pickle
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io

import archives
import data
from archives import prepare_tfds
from readers import cifar, files, idx, svhn


def read(name, folder, split):
    return data.dataset(name, folder).read(split)


@pytest.mark.parametrize('layout', ['folder', 'archive', 'python folder', 'python archive'])
def test_cifar10(layout, tmp_path):
    files, contents = archives.cifar10_record_files()
    if 'python' in layout:
        files = {f'cifar-10-batches-py/{name}': archives.cifar_pickle(*part) for name, part in contents.items()}
    if 'folder' in layout:
        archives.write_files(tmp_path, files)
    else:
        name = 'cifar-10-python.tar.gz' if 'python' in layout else 'cifar-10-binary.tar.gz'
        archives.write_tar(tmp_path / name, files)
    images, labels = read('cifar10', tmp_path, 'train')
    expected = [contents[name] for name in archives.CIFAR10_TRAIN]
    assert images.dtype == np.uint8 and labels.dtype == np.int32 and images.flags['C_CONTIGUOUS']
    np.testing.assert_array_equal(images, np.concatenate([part[0] for part in expected]))
    np.testing.assert_array_equal(labels, np.concatenate([part[1] for part in expected]))
    np.testing.assert_array_equal(read('cifar10', tmp_path, 'test')[0], contents['test_batch'][0])


def test_svhn(tmp_path):
    """The axes of MATLAB's array are height, width, channel, image; the label 10 stands for the digit 0."""
    images, labels = archives.cifar_images(0, 6, 10)
    content = {'X': images.transpose(1, 2, 3, 0), 'y': np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)}
    (tmp_path / 'svhn').mkdir()
    scipy.io.savemat(tmp_path / 'svhn' / 'test_32x32.mat', content)
    read_images, read_labels = read('svhn', tmp_path, 'test')
    np.testing.assert_array_equal(read_images, images)
    np.testing.assert_array_equal(read_labels, labels)
    scipy.io.savemat(tmp_path / 'svhn' / 'test_32x32.mat', content | {'y': np.full(6, 11)})
    with pytest.raises(data.DataError, match='has labels from 11 to 11, not 0 to 10'):
        read('svhn', tmp_path, 'test')
    damaged = (tmp_path / 'svhn' / 'test_32x32.mat').read_bytes()[:5000]
    (tmp_path / 'svhn' / 'test_32x32.mat').write_bytes(damaged)
    with pytest.raises(data.DataError, match=r'test_32x32\.mat is damaged .*, not the published cdce80df'):
        read('svhn', tmp_path, 'test')
    with pytest.raises(data.DataError, match=r'train_32x32\.mat is missing and could not be downloaded'):
        read('svhn', tmp_path, 'train')


def write_mat(path, images, labels):
    content = {'X': images.transpose(1, 2, 3, 0), 'y': np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)}
    scipy.io.savemat(path, content)


def test_svhn_extra(tmp_path, monkeypatch):
    """The images of the split extra follow those of the split train. Files are read in parts, here of 4 images."""
    monkeypatch.setattr(svhn, '_PART', 4 * 3072 + 100)
    contents = {name: archives.cifar_images(i, 5 + 4 * i, 10) for i, name in enumerate(('train', 'extra', 'test'))}
    for name, content in contents.items():
        write_mat(tmp_path / f'{name}_32x32.mat', *content)
    images, labels = read('svhn_extra', tmp_path, 'train')
    assert images.dtype == np.uint8 and images.flags.c_contiguous and labels.dtype == np.int32
    np.testing.assert_array_equal(images, np.concatenate([contents['train'][0], contents['extra'][0]]))
    np.testing.assert_array_equal(labels, np.concatenate([contents['train'][1], contents['extra'][1]]))
    np.testing.assert_array_equal(read('svhn_extra', tmp_path, 'test')[0], contents['test'][0])
    np.testing.assert_array_equal(read('svhn', tmp_path, 'train')[0], contents['train'][0])
    (tmp_path / 'extra_32x32.mat').unlink()
    with pytest.raises(data.DataError, match=r'extra_32x32\.mat is missing and could not be downloaded'):
        read('svhn_extra', tmp_path, 'train')


def test_held_out_images():
    """A fifth of the images is held out, the same at every call. Each image is on one side only."""
    images, labels = archives.cifar_images(0, 50, 10)
    (rest, rest_labels), (held, held_labels) = data.hold_out(images, labels, 0.2)
    assert len(rest) == 40 and len(held) == 10
    together = np.concatenate([rest, held]).reshape(50, -1)
    order = np.lexsort(together.T[:5])
    np.testing.assert_array_equal(together[order], images.reshape(50, -1)[np.lexsort(images.reshape(50, -1).T[:5])])
    assert sorted([*rest_labels, *held_labels]) == sorted(labels)
    np.testing.assert_array_equal(data.hold_out(images, labels, 0.2)[1][0], held)


def test_subset():
    """Images keep their labels, and every call gives the same subset. A smaller subset is part of a larger one.

    A subset of more images than there are is an error.
    """
    images, labels = archives.cifar_images(0, 50, 10)
    few, few_labels = data.subset('--trainimages', 10, images, labels)
    more, _ = data.subset('--trainimages', 20, images, labels)
    places = [np.flatnonzero((images == image).all(axis=(1, 2, 3))).item() for image in few]
    assert len(set(places)) == 10
    np.testing.assert_array_equal(few_labels, labels[places])
    assert all((more == image).all(axis=(1, 2, 3)).any() for image in few)
    np.testing.assert_array_equal(data.subset('--trainimages', 10, images, labels)[0], few)
    assert data.subset('--trainimages', None, images, labels)[0] is images
    with pytest.raises(data.DataError, match='--trainimages 51 exceeds the 50 available images'):
        data.subset('--trainimages', 51, images, labels)


def test_cifar100_has_fine_labels(tmp_path):
    archives.write_tar(tmp_path / 'cifar-100-binary.tar.gz', archives.cifar100_record_files())
    _, labels = read('cifar100', tmp_path, 'train')
    np.testing.assert_array_equal(labels, np.arange(200) % 100)
    expected, labels = archives.cifar_images(1, 200, 100)
    np.testing.assert_array_equal(read('cifar100', tmp_path, 'test')[0], expected)
    payload = archives.cifar_pickle(expected, labels, label_key=b'fine_labels')
    archives.write_files(tmp_path / 'python', {'cifar-100-python/train': payload, 'cifar-100-python/test': payload})
    np.testing.assert_array_equal(read('cifar100', tmp_path / 'python', 'train')[1], labels)


@pytest.mark.parametrize(
    ('name', 'archive', 'files'),
    [
        ('cifar10', 'cifar-10-binary.tar.gz', archives.cifar10_record_files(4000)[0]),
        ('cifar100', 'cifar-100-binary.tar.gz', archives.cifar100_record_files(20_000)),
    ],
)
def test_memory_of_reading(name, archive, files, tmp_path):
    """Peak memory is less than 1.5 times the returned images, whether a split is one file or five."""
    archives.write_tar(tmp_path / archive, files)
    assert 1 < peak_of_reading(f'cifar.read(cifar.{name.upper()}, folder, "train")', tmp_path) < 1.5


def test_memory_of_reading_svhn_extra(tmp_path):
    """Peak memory is little more than the returned images and a part of 64 MiB, here a third of the images."""
    for name, n in (('train', 15_000), ('extra', 50_000)):
        write_mat(tmp_path / f'{name}_32x32.mat', np.ones((n, 32, 32, 3), np.uint8), np.ones(n, np.uint8))
    assert 1 < peak_of_reading('svhn.read(folder, "train", extra=True)', tmp_path) < 1.5


def peak_of_reading(call, folder):
    """Returns the peak memory of a new process that reads images, as a multiple of the images' size."""
    if not Path('/proc/self/clear_refs').exists():
        pytest.skip('this system does not tell the most memory that a process had')
    script = f"""if True:
        import pathlib, sys
        from readers import cifar, svhn
        def kilobytes(name):
            lines = open('/proc/self/status').read().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(name))
        folder = pathlib.Path(sys.argv[1])
        open('/proc/self/clear_refs', 'w').write('5')  # forgets the peak so far
        before = kilobytes('VmRSS')
        images, _ = {call}
        print(1024 * (kilobytes('VmHWM') - before) / images.nbytes)
    """
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, '-c', script, folder], cwd=root, check=True, capture_output=True, text=True)
    return float(done.stdout)


def damage_truncated(path):
    path.write_bytes(path.read_bytes()[:-3000])


def damage_flipped(path):
    payload = bytearray(path.read_bytes())
    payload[len(payload) // 2] ^= 0xFF
    path.write_bytes(payload)


def damage_other_kind(path):
    path.write_bytes(b'<html>not an archive</html>')


@pytest.mark.parametrize('damage', [damage_truncated, damage_flipped, damage_other_kind])
def test_damaged_cifar_archive_is_named_with_its_checksum(damage, tmp_path):
    path = tmp_path / 'cifar-10-binary.tar.gz'
    archives.write_tar(path, archives.cifar10_record_files()[0])
    damage(path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(data.DataError, match=f'{path} is damaged .* its SHA-256 is {sha256}, not the published c4a38c'):
        read('cifar10', tmp_path, 'test')


def test_incomplete_cifar(tmp_path):
    files, _ = archives.cifar10_record_files()
    del files['cifar-10-batches-bin/data_batch_3.bin']
    archives.write_tar(tmp_path / 'cifar-10-binary.tar.gz', files)
    with pytest.raises(data.DataError, match=r'it holds no cifar-10-batches-bin/data_batch_3\.bin'):
        read('cifar10', tmp_path, 'train')
    archives.write_files(tmp_path, files)
    with pytest.raises(data.DataError, match=r'data_batch_3\.bin cannot be read: No such file'):
        read('cifar10', tmp_path, 'train')


@pytest.mark.parametrize(
    ('payload', 'message'),
    [
        (b'\0' * 3074, '3074 bytes are not a whole number of CIFAR records'),
        (b'\x0b' + b'\0' * 3072, 'labels from 11 to 11'),
    ],
)
def test_bad_cifar_records(payload, message, tmp_path):
    archives.write_files(tmp_path, {'cifar-10-batches-bin/test_batch.bin': payload})
    with pytest.raises(data.DataError, match=message):
        read('cifar10', tmp_path, 'test')


class _Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), 'w'))


def test_pickle_with_code_is_refused_and_not_run(tmp_path):
    payload = pickle.dumps({b'data': _Code(tmp_path / 'ran'), b'labels': []}, protocol=2)
    archives.write_files(tmp_path, {'cifar-10-batches-py/test_batch': payload})
    with pytest.raises(data.DataError, match='only arrays and plain containers are allowed'):
        read('cifar10', tmp_path, 'test')
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('content', [{b'labels': [0]}, {b'data': np.zeros((1, 9), np.uint8), b'labels': [0]}, [1, 2]])
def test_pickle_without_images(content, tmp_path):
    archives.write_files(tmp_path, {'cifar-10-batches-py/test_batch': pickle.dumps(content, protocol=2)})
    with pytest.raises(data.DataError, match='test_batch is damaged'):
        read('cifar10', tmp_path, 'test')


@pytest.mark.parametrize('compressed', [True, False])
@pytest.mark.parametrize(
    ('name', 'folder'),
    [
        ('mnist', 'MNIST/raw'), ('fashion', 'fashion'), ('fashion', 'FashionMNIST/raw'), ('kmnist', 'kmnist'),
        ('kmnist', 'KMNIST/raw'),
    ],
)  # fmt: skip
@pytest.mark.parametrize('mark', ['-', '.'])
def test_idx_sets(name, folder, compressed, mark, tmp_path):
    """The names of the files may have a hyphen or a dot before idx."""
    archives.write_idx_set(tmp_path / folder, compressed=compressed)
    for path in (tmp_path / folder).iterdir():
        path.rename(path.with_name(path.name.replace('-idx', f'{mark}idx')))
    images, labels = read(name, tmp_path, 'train')
    assert images.shape == (20, 28, 28, 1) and images.dtype == np.uint8
    np.testing.assert_array_equal(labels, np.arange(20) % 10)
    assert np.all(images[np.arange(20), :, 2 * labels] == 255)
    assert len(read(name, tmp_path, 'test')[0]) == 10


@pytest.mark.parametrize('folder', ['emnist', 'emnist/gzip', 'EMNIST/raw'])
@pytest.mark.parametrize(
    ('name', 'part', 'first', 'last'), [('emnist', 'balanced', 0, 46), ('emnist_letters', 'letters', 1, 26)]
)
def test_emnist(name, part, first, last, folder, tmp_path):
    """The files hold transposed images. The labels of letters begin at 1."""
    images = np.random.default_rng(0).integers(0, 256, (60, 6, 6), np.uint8)
    labels = np.arange(60, dtype=np.uint8) % (last - first + 1)
    folder, stem = tmp_path / folder, f'emnist-{part}-train'
    folder.mkdir(parents=True)
    (folder / f'{stem}-images-idx3-ubyte.gz').write_bytes(gzip.compress(archives.idx(images.swapaxes(1, 2).copy())))
    (folder / f'{stem}-labels-idx1-ubyte').write_bytes(archives.idx(labels + np.uint8(first)))
    read_images, read_labels = read(name, tmp_path, 'train')
    assert read_images.dtype == np.uint8 and read_images.flags.c_contiguous and read_labels.dtype == np.int32
    np.testing.assert_array_equal(read_images, images[..., None])
    np.testing.assert_array_equal(read_labels, labels)
    (folder / f'{stem}-labels-idx1-ubyte').write_bytes(archives.idx(labels + np.uint8(first + 1)))
    with pytest.raises(data.DataError, match=f'ubyte has labels from {first + 1} to {last + 1}, not {first} to {last}'):
        read(name, tmp_path, 'train')


def test_missing_emnist(tmp_path):
    with pytest.raises(data.DataError) as error:
        read('emnist_letters', tmp_path, 'test')
    assert str(error.value) == (
        f'{tmp_path}/emnist/emnist-letters-test-images-idx3-ubyte.gz is missing: download '
        'https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip and put its files emnist-letters-*.gz in '
        f'{tmp_path}/emnist'
    )


def test_every_class_has_a_name():
    """TinyImageNet has only identifiers of WordNet."""
    for name, row in data.DATASETS.items():
        names = row.class_names or ()
        assert len(set(names)) == len(names) == (0 if name == 'tinyimagenet' else row.num_classes)


@pytest.mark.parametrize(
    ('payload', 'message'),
    [
        (b'', 'does not start like an idx file'),
        (b'\0\0\x0d\x01' + b'\0\0\0\x01' + b'\0' * 4, 'does not start like an idx file'),
        (archives.idx(np.zeros((3, 28, 28), np.uint8))[:-1], 'its header claims 2352 bytes, but 2351 follow'),
        (archives.idx(np.zeros((3, 28, 28), np.uint8)) + b'1', 'its header claims 2352 bytes, but more follow'),
        (b'\0\0\x08\x03' + b'\xff' * 12, 'claims 79228162458924105385300197375 bytes, more than the file can hold'),
    ],
)
def test_damaged_idx(payload, message, tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(payload)
    with pytest.raises(data.DataError, match=message):
        idx.read_file(path)


def test_damaged_gzip_is_named_with_its_checksum(tmp_path):
    archives.write_idx_set(tmp_path / 'mnist')
    path = tmp_path / 'mnist' / 't10k-images-idx3-ubyte.gz'
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(data.DataError, match=f'{path} is damaged .* not the published 8d422c7b'):
        read('mnist', tmp_path, 'test')


def test_empty_sets_are_refused(tmp_path):
    archives.write_idx_set(tmp_path / 'mnist', num_test=0)
    with pytest.raises(data.DataError, match='holds no images'):
        read('mnist', tmp_path, 'test')


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::ResourceWarning')
@pytest.mark.parametrize('name', ['dataset_info.json', 'toy-train.array_record-00000-of-00001'])
def test_damaged_tfds(name, tmp_path):
    pytest.importorskip('tensorflow_datasets')
    prepare_tfds(tmp_path)
    path = tmp_path / 'toy' / '1.0.0' / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(data.DataError, match=r'toy.*damaged|toy cannot be read by TFDS'):
        data.dataset('tfds/toy', tmp_path).read('train')


def test_images_and_labels_that_do_not_match(tmp_path):
    archives.write_idx_set(tmp_path / 'mnist', compressed=False)
    (tmp_path / 'mnist' / 't10k-labels-idx1-ubyte').write_bytes(archives.idx(np.zeros(9, np.uint8)))
    with pytest.raises(data.DataError, match=r'not \[N, H, W\] and \[N\]'):
        read('mnist', tmp_path, 'test')


def test_digits(tmp_path):
    images, labels = read('digits', tmp_path, 'train')
    test_images, test_labels = read('digits', tmp_path, 'test')
    assert images.shape == (1437, 32, 32, 1) and test_images.shape == (360, 32, 32, 1)
    assert images.dtype == np.uint8 and images.max() == 255
    shares = np.bincount(labels) / 1437 - np.bincount(test_labels) / 360
    assert np.abs(shares).max() < 0.003
    joint = {image.tobytes() for image in images} & {image.tobytes() for image in test_images}
    assert not joint


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::ResourceWarning')
def test_tfds(channels, tmp_path):
    pytest.importorskip('tensorflow_datasets')
    prepare_tfds(tmp_path, channels)
    dataset = data.dataset('tfds/toy', tmp_path)
    images, labels = dataset.read('train')
    assert images.shape == (6, 8, 8, channels) and images.dtype == np.uint8 and labels.dtype == np.int32
    levels = images[:, 0, 0, 0]
    assert sorted(levels) == [0, 10, 20, 30, 40, 50] and np.array_equal(levels // 10 % 3, labels)
    assert sorted(dataset.read('test')[1]) == [0, 1, 2]
    assert dataset.num_classes == 3 and dataset.augment == (channels == 3)
    description = data.describe(dataset, images, labels)
    np.testing.assert_allclose(description['mean'], [25 / 255] * channels)
    np.testing.assert_allclose(description['std'], [np.std([0, 10, 20, 30, 40, 50]) / 255] * channels)


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::ResourceWarning')
def test_tfds_images_of_different_sizes(tmp_path):
    pytest.importorskip('tensorflow_datasets')
    prepare_tfds(tmp_path, sizes=(8, 9))
    with pytest.raises(data.DataError, match=r'has images of different sizes, \(\d, 8, 3\) and \(\d, 8, 3\)'):
        data.dataset('tfds/toy', tmp_path).read('train')


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::ResourceWarning')
def test_tfds_of_texts(monkeypatch, tmp_path):
    tfds = pytest.importorskip('tensorflow_datasets')
    features = {'text': tfds.features.Text(), 'label': tfds.features.ClassLabel(num_classes=2)}
    info = SimpleNamespace(supervised_keys=('text', 'label'), features=features, splits={'train': None})
    monkeypatch.setattr('readers.tfds._builder', lambda *args: SimpleNamespace(info=info))
    with pytest.raises(data.DataError, match='tfds/news is not an image classification set'):
        data.dataset('tfds/news', tmp_path)


def test_tfds_that_is_not_prepared(tmp_path, monkeypatch):
    pytest.importorskip('tensorflow_datasets')
    monkeypatch.setitem(sys.modules, 'tensorflow', None)
    with pytest.raises(data.DataError, match=r"run tfds.builder\('mnist', data_dir="):
        data.dataset('tfds/mnist', tmp_path)


def test_tfds_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
    with pytest.raises(data.DataError, match='tfds/mnist: tensorflow_datasets is not installed: run pip install'):
        data.dataset('tfds/mnist', tmp_path)


def test_shuffled_batches_hold_every_image_at_most_once():
    batches = np.asarray(data.shuffled_batches(jax.random.key(0), 23, 5))
    assert batches.shape == (4, 5)
    assert len(set(batches.ravel().tolist())) == 20 and set(batches.ravel().tolist()) <= set(range(23))
    assert batches.ravel().tolist() != sorted(batches.ravel().tolist())


def test_augment_crops_and_flips():
    """Every result is one of the 9 × 9 crops of the padded image, or a mirrored crop. All of them occur."""
    image = np.random.default_rng(0).integers(1, 256, (6, 6, 2), np.uint8)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    crops = [padded[y : y + 6, x : x + 6] for y in range(9) for x in range(9)]
    possible = {variant.tobytes() for crop in crops for variant in (crop, crop[:, ::-1])}
    results = np.asarray(data.augment(jax.random.key(1), jnp.asarray(np.repeat(image[None], 3000, axis=0))))
    assert results.dtype == np.uint8
    assert {result.tobytes() for result in results} == possible


def test_normalise():
    images = np.array([[[[0, 255, 51]]]], np.uint8)
    expected = [[[[-0.5 / 0.2, 0.6 / 0.25, 0.0]]]]
    np.testing.assert_allclose(data.normalise(images, (0.5, 0.4, 0.2), (0.2, 0.25, 1.0)), expected, atol=1e-7)


def test_channels_that_are_constant_are_left_unscaled(capsys):
    """Covers a data set whose deviations are measured, and one whose table row says 0."""
    images = np.random.default_rng(0).integers(0, 99, (50, 8, 8, 4), np.uint8)
    images[..., 1], images[..., 3] = 0, 255
    measured = data.Dataset(None, 10, mean=None, std=None, augment=False)
    description = data.describe(measured, images, np.zeros(50, np.int32))
    assert description['std'][1] == description['std'][3] == 1.0
    np.testing.assert_allclose(description['mean'][1::2], [0, 1])
    np.testing.assert_allclose(description['std'][::2], images[..., ::2].std(axis=(0, 1, 2)) / 255)
    lines = [f'warning: channel {i} of the images is constant and is left unscaled\n' for i in (1, 3)]
    assert capsys.readouterr().err == ''.join(lines)
    normalised = data.normalise(images, description['mean'], description['std'])
    np.testing.assert_allclose(normalised[..., 1::2], 0, atol=1e-7)
    stated = measured._replace(mean=(0.5, 0.0), std=(0.2, 0.0))
    assert data.describe(stated, images[..., :2], np.zeros(50))['std'] == [0.2, 1.0]
    data.check_description(description, 'config.json')
    for std in ([0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, -1.0]):
        with pytest.raises(data.DataError, match=r'config\.json does not describe images'):
            data.check_description(description | {'std': std}, 'config.json')


def test_one_pixel_is_not_constant():
    images = np.full((1000, 32, 32, 1), 7, np.uint8)
    images[500, 3, 3] = 8
    description = data.describe(data.Dataset(None, 10, None, None, False), images, np.zeros(1000))
    np.testing.assert_allclose(description['std'], (1 / 1_024_000) ** 0.5 / 255, rtol=1e-4)


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
@pytest.mark.parametrize('wanted', [1, 2, 3, 4])
def test_channels_are_turned_into_others(channels, wanted):
    """A grey image stays grey. Alpha is dropped, kept, or added as opaque."""
    images = np.full((2, 8, 6, channels), 100, np.uint8)
    if channels in (2, 4):
        images[..., -1] = 40
    resized = data.resized(images, (4, 6, wanted))
    assert resized.shape == (2, 4, 6, wanted)
    colours = resized[..., :-1] if wanted in (2, 4) else resized
    assert (np.abs(colours.astype(int) - 100) <= 2).all()  # colours are rounded where alpha is 40
    if wanted in (2, 4):
        assert (resized[..., -1] == (40 if channels in (2, 4) else 255)).all()


def test_five_channels_cannot_be_turned_into_three():
    with pytest.raises(data.DataError, match='images with 5 channels cannot be converted to 3 channels'):
        data.resized(np.zeros((1, 8, 8, 5), np.uint8), (8, 8, 3))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves tmp_path/served on this machine, in place of the official servers. Yields the folder and the URL."""
    monkeypatch.undo()
    folder = tmp_path / 'served'
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder, f'http://127.0.0.1:{httpd.server_port}/'
        httpd.shutdown()


def test_download(server, tmp_path):
    folder, url = server
    payload = b'abc' * 1_000_000
    (folder / 'file').write_bytes(payload)
    official = files.OfficialFile(url + 'file', hashlib.sha256(payload).hexdigest(), len(payload))
    files.download(official, tmp_path / 'new' / 'file')
    assert (tmp_path / 'new' / 'file').read_bytes() == payload
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['file']


def test_download_of_something_else_is_not_kept(server, tmp_path):
    folder, url = server
    (folder / 'file').write_bytes(b'<html>log in first</html>')
    with pytest.raises(data.DataError, match=r'has the SHA-256 [0-9a-f]{64}, not 0000: it was not kept'):
        files.download(files.OfficialFile(url + 'file', '0000', 9), tmp_path / 'new' / 'file')
    assert not (tmp_path / 'new').exists()


def test_download_without_a_network_says_which_file_to_put_where(tmp_path):
    with pytest.raises(data.DataError) as error:
        read('cifar10', tmp_path, 'train')
    path, url = tmp_path / 'cifar-10-binary.tar.gz', 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
    expected = f'{path} is missing and could not be downloaded (no network in tests): download {url} and put it there'
    assert str(error.value) == expected
    assert not list(tmp_path.iterdir())


def test_network_that_never_answers(monkeypatch):
    monkeypatch.setattr(urllib.request, 'urlopen', lambda url, timeout: time.sleep(5))
    with pytest.raises(TimeoutError, match=r'no answer in 0\.1 seconds'):
        files._open_url('http://example.org', seconds=0.1)


def test_official_addresses_are_whole():
    for layout in (cifar.CIFAR10, cifar.CIFAR100):
        assert layout.official.url.startswith('https://') and len(layout.official.sha256) == 64
    for layout in (idx.MNIST, idx.FASHION, idx.KMNIST):
        assert all(len(sha256) == 64 for sha256, _ in layout.sha256.values())
        assert all(Path(name).suffix == '.gz' for name in layout.sha256)


def test_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(path, **options):
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr(Path, 'exists', refuse)
    for name in ('cifar10', 'mnist', 'svhn'):
        with pytest.raises(data.DataError, match='cannot be read: Permission denied'):
            data.dataset(name, tmp_path).read('test')
