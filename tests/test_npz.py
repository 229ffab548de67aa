"""Image sets in one .npz file: the arrays of Keras and of MedMNIST, and what is refused."""

import pickle
import re
import tracemalloc
import zipfile

import numpy as np
import pytest

from readers import files, npz


def arrays(n, shape=(8, 6), seed=0):
    """Returns random images and the labels 0, 1, 2, 0, ..."""
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8), np.arange(n, dtype=np.uint8) % 3


def keras(**changes):
    train, test = arrays(7), arrays(5, seed=1)
    content = {'x_train': train[0], 'y_train': train[1], 'x_test': test[0], 'y_test': test[1]} | changes
    return {name: array for name, array in content.items() if array is not None}


def medmnist(shape=(8, 6)):
    parts = {'train': arrays(7, shape), 'val': arrays(2, shape, 2), 'test': arrays(5, shape, 1)}
    images = {f'{split}_images': images for split, (images, _) in parts.items()}
    return images | {f'{split}_labels': labels[:, None] for split, (_, labels) in parts.items()}


def saved(path, content, save=np.savez_compressed):
    save(path, **content)
    return path


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
@pytest.mark.parametrize('channels', [(), (1,), (2,), (3,), (4,)])
def test_layouts(channels, save, tmp_path):
    """Images are read whether the labels are [N], as in Keras, or [N, 1], as in MedMNIST."""
    (images, labels), (test_images, test_labels) = arrays(7, (8, 6, *channels)), arrays(5, (8, 6, *channels), 1)
    of_keras = {'x_train': images, 'y_train': labels, 'x_test': test_images, 'y_test': test_labels}
    for i, content in enumerate((of_keras, medmnist((8, 6, *channels)))):
        opened = npz.open_set(saved(tmp_path / f'{i}.npz', content, save))
        assert opened.num_classes == 3 and opened.channels == (channels or (1,))[0]
        for split, expected in (('train', (images, labels)), ('test', (test_images, test_labels))):
            read_images, read_labels = npz.read(opened, split)
            assert read_images.dtype == np.uint8 and read_images.flags.c_contiguous and read_images.flags.writeable
            np.testing.assert_array_equal(read_images, expected[0].reshape(-1, 8, 6, opened.channels))
            assert read_labels.dtype == np.int32 and np.array_equal(read_labels, expected[1])


def test_other_kinds_of_labels_and_orders(tmp_path):
    """Labels may be of any whole type and leave gaps. Arrays may be in Fortran order."""
    images, _ = arrays(7)
    labels = np.array([9, 4, 4, 9, 9, 4, 4])
    for kind in ('i1', '>i4', 'u8'):
        changes = {'x_train': np.asfortranarray(images), 'y_train': labels.astype(kind), 'x_test': images[..., None]}
        content = keras(**changes, y_test=labels)
        opened = npz.open_set(saved(tmp_path / 'a.npz', content))
        assert opened.num_classes == 10
        read_images, read_labels = npz.read(opened, 'train')
        np.testing.assert_array_equal(read_images[..., 0], images)
        np.testing.assert_array_equal(read_labels, labels)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'x_train': np.zeros((7, 8, 6))}, 'x_train is float64: uint8 from 0 to 255 is needed'),
        ({'x_test': np.zeros((5, 8, 6), np.int8)}, 'x_test is int8: uint8 from 0 to 255 is needed'),
        (
            {'x_train': np.zeros((7, 28, 28, 28), np.uint8)},
            'x_train has the shape (7, 28, 28, 28): [N, H, W] or [N, H, W, C] with 1 to 4 channels is needed',
        ),
        (
            {'x_train': np.zeros((7, 64), np.uint8)},
            'x_train has the shape (7, 64): [N, H, W] or [N, H, W, C] with 1 to 4 channels is needed',
        ),
        ({'x_train': np.zeros((0, 8, 6), np.uint8)}, 'x_train has the shape (0, 8, 6): it holds no images'),
        ({'x_train': np.zeros((7, 0, 6), np.uint8)}, 'x_train has the shape (7, 0, 6): it holds no images'),
        (
            {'x_test': np.zeros((5, 8, 6, 3), np.uint8)},
            'x_train has images of shape (8, 6, 1), but x_test of shape (8, 6, 3)',
        ),
        ({'y_train': np.zeros(7)}, 'y_train is float64: whole numbers are needed'),
        (
            {'y_train': np.zeros((7, 14), np.uint8)},
            'y_train has the shape (7, 14): one label per image, [7], is needed',
        ),
        ({'y_test': np.zeros(4, np.uint8)}, 'y_test has the shape (4,): one label per image, [5], is needed'),
        ({'y_train': np.arange(7) - 1}, 'y_train has labels from -1 to 5, not 0 to 65535'),
        ({'y_test': np.full(5, 1 << 40)}, f'y_test has labels from {1 << 40} to {1 << 40}, not 0 to 65535'),
        ({'x_train': np.array([None] * 7)}, 'x_train is not an .npy file of numbers or text'),
    ],
)
def test_arrays_that_are_refused(changes, message, tmp_path):
    path = saved(tmp_path / 'a.npz', keras(**changes))
    with pytest.raises(files.DataError) as error:
        npz.open_set(path)
    assert str(error.value) == f'{path}: {message}'


def test_missing_arrays(tmp_path):
    """The message names both layouts and the arrays that the file holds."""
    needed = 'x_train and y_train (as in Keras) or train_images and train_labels (as in MedMNIST) are needed'
    for content, held in (({'x': [1], 'y_train': [1]}, 'x, y_train'), ({}, 'no arrays')):
        path = saved(tmp_path / 'a.npz', content)
        with pytest.raises(files.DataError, match=re.escape(f'{path} holds {held}: {needed}')):
            npz.open_set(path)
    (tmp_path / 'b.npz').write_bytes(b'<html>')
    with pytest.raises(files.DataError, match=r'b\.npz is damaged \(File is not a zip file\)'):
        npz.open_set(tmp_path / 'b.npz')
    with pytest.raises(files.DataError, match=r'c\.npz cannot be read: No such file'):
        npz.open_set(tmp_path / 'c.npz')


@pytest.mark.parametrize(
    ('changes', 'missing'), [({'x_test': None, 'y_test': None}, 'x_test and y_test'), ({'y_test': None}, 'y_test')]
)
def test_without_test_images(changes, missing, tmp_path):
    path = saved(tmp_path / 'a.npz', keras(**changes))
    opened = npz.open_set(path)
    assert len(npz.read(opened, 'train')[0]) == 7 and opened.num_classes == 3
    with pytest.raises(files.DataError) as error:
        npz.read(opened, 'test')
    expected = f'{path} has no {missing}: train with --validation 0.1, and evaluate with --split validation'
    assert str(error.value) == expected


def test_other_arrays_are_not_read(tmp_path):
    """They may be pickles, files of other kinds or damaged."""
    path = saved(tmp_path / 'a.npz', keras())
    with zipfile.ZipFile(path, 'a') as members:
        members.writestr('names.npy', pickle.dumps(['a', 'b']))
        members.writestr('readme.txt', 'text')
        members.writestr('val_images.npy', b'<damaged>')
    path.write_bytes(path.read_bytes().replace(b'<damaged>', b'<changed>'))
    np.testing.assert_array_equal(npz.read(npz.open_set(path), 'train')[0][..., 0], arrays(7)[0])


def test_a_changed_byte(tmp_path):
    """The reader compares the checksum of each array that it reads."""
    path = saved(tmp_path / 'a.npz', keras(), np.savez)
    payload = bytearray(path.read_bytes())
    payload[payload.index(arrays(7)[0].tobytes()) + 9] ^= 1
    path.write_bytes(payload)
    with pytest.raises(files.DataError, match=r"Bad CRC-32 for file 'x_train\.npy'"):
        npz.read(npz.open_set(path), 'train')


def test_a_file_that_changes_after_it_was_opened(tmp_path):
    opened = npz.open_set(saved(tmp_path / 'a.npz', keras()))
    for content in (medmnist(), keras(x_train=np.zeros((7, 9, 6), np.uint8)), keras(y_train=np.full(7, 3))):
        with pytest.raises(files.DataError, match=r'a\.npz'):
            npz.read(opened._replace(path=saved(tmp_path / 'a.npz', content)), 'train')


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_memory(save, tmp_path):
    """Opening takes little memory. Reading takes little more than the images of one split."""
    images, labels = np.zeros((10_000, 32, 32), np.uint8), np.zeros(10_000, np.uint8)
    content = dict.fromkeys(('x_train', 'x_test', 'val_images'), images)
    path = saved(tmp_path / 'a.npz', content | {'y_train': labels, 'y_test': labels}, save)
    tracemalloc.start()
    try:
        opened = npz.open_set(path)
        assert tracemalloc.get_traced_memory()[1] < 0.3 * images.nbytes
        npz.read(opened, 'train')
        assert tracemalloc.get_traced_memory()[1] < 1.4 * images.nbytes
    finally:
        tracemalloc.stop()


def test_compressed_files_up_to_4_gib(tmp_path, monkeypatch):
    """A compressed file that holds more is refused. A file without compression has no limit."""
    content = keras(x_train=np.zeros((1000, 80, 80), np.uint8), y_train=np.zeros(1000, int))
    content |= {'x_test': np.zeros((9, 80, 80), np.uint8), 'y_test': np.zeros(9, int)}
    monkeypatch.setattr(files, 'budget', lambda num_bytes: max(4_000_000, num_bytes))
    assert npz.open_set(saved(tmp_path / 'a.npz', content, np.savez)).num_classes == 1
    content['noise'] = arrays(100_000, ())[0]
    path = saved(tmp_path / 'b.npz', content)
    message = r'b\.npz holds 65\d{5} bytes: compressed files are read up to 4 GiB, uncompressed files up to any size'
    with pytest.raises(files.DataError, match=message):
        npz.open_set(path)
