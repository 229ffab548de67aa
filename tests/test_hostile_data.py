"""Hostile image files: their code does not run, memory that they claim is not taken, and the error is one line."""

import gzip
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image, PngImagePlugin

import archives
import data
import setup_tinyimagenet
from evaluation import corruptions
from readers import cifar, files, idx, image_folder, npy, pickles, tfds

ROOT = Path(__file__).parent.parent


def error_of(read, *arguments, megabytes=40):
    """Returns the message of a DataError. Checks that it is one line, and that little memory was taken."""
    tracemalloc.start()
    try:
        with pytest.raises(data.DataError) as error:
            read(*arguments)
        assert tracemalloc.get_traced_memory()[1] < megabytes << 20
    finally:
        tracemalloc.stop()
    assert '\n' not in str(error.value)
    return str(error.value)


# Pickles.


def batch(pixels, labels):
    """Returns a pickle of {'data': pixels, 'labels': labels} in protocol 2. Both arguments are opcodes."""
    return b'\x80\x02}(' + text(b'data') + pixels + text(b'labels') + labels + b'u.'


def text(content):
    return b'U' + bytes([len(content)]) + content


def whole(number):
    content = number.to_bytes((number.bit_length() + 8) // 8 or 1, 'little', signed=True)
    return b'\x8a' + bytes([len(content)]) + content


def made_by_ndarray(shape, *more):
    return b'cnumpy\nndarray\n((' + b''.join(map(whole, shape)) + b't' + U1 + b''.join(more) + b'tR'


def reconstructed(shape, dtype, content):
    empty = b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(' + whole(0) + b't' + text(b'b') + b'tR'
    return empty + b'(' + whole(1) + b'(' + b''.join(map(whole, shape)) + b't' + dtype + b'\x89' + content + b'tb'


def dtype(code):
    state = b'(K\x03' + text(b'|') + b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb'
    return b'cnumpy\ndtype\n(' + text(code) + b'K\x00K\x01tR' + state


U1 = b'cnumpy\ndtype\n(' + text(b'u1') + b'tR'
ZERO_STRIDES = (text(b'\0'), whole(0), b'(' + whole(0) + whole(0) + b't')
LABELS = b'](K\x01K\x02e'


@pytest.mark.parametrize(
    ('payload', 'reason'),
    [
        (batch(made_by_ndarray((200_000, 3072)), made_by_ndarray((200_000,))), 'it makes an array by calling ndarray'),
        (batch(made_by_ndarray((10**9, 3072), *ZERO_STRIDES), LABELS), 'it makes an array by calling ndarray'),
        (batch(reconstructed((2, 3072), dtype(b'u1'), text(b'A' * 32)), LABELS), 'shape (2, 3072) has 32 bytes'),
        (batch(reconstructed((0, 3072), dtype(b'u1'), text(b'')), LABELS), 'data is uint8 (0, 3072)'),
        (batch(reconstructed((10**30,), dtype(b'u1'), text(b'A')), LABELS), 'has 1 bytes'),
        (batch(reconstructed((4,), dtype(b'O8'), text(b'A' * 32)), LABELS), 'values that are not whole numbers'),
        (batch(reconstructed((4,), dtype(b'V8'), text(b'A' * 32)), LABELS), 'values that are not whole numbers'),
        (batch(LABELS, b'](G' + b'\0' * 8 + b'e'), 'the opcode BINFLOAT'),
        (batch(b'cos\nsystem\n(' + text(b'true') + b'tR', LABELS), 'it refers to os.system'),
        (batch(b'\x8c\x02os\x8c\x06system\x93', LABELS), 'it refers to os.system'),
        (batch(b'(' + text(b'x') + b'ios\nsystem\n', LABELS), 'the opcode INST'),
        (batch(LABELS, LABELS), 'data is int64 (2,), not uint8'),
        (b'\x80\x02' + b'}' * 10 + b'.', 'not enough values|too many values'),
        (b'\x80\x02]q\x00(' + b'h\x00' * 9 + b'e.', 'it holds no dictionary'),
        (b'\x80\x02}' + b'(' * 1000 + b't' * 1000 + b'K\x01s.', 'it has a tuple where a str belongs'),
        (b'\x80\x04\x8e' + struct.pack('<Q', 1 << 60) + b'A', 'expected'),
    ],
)
def test_hostile_pickles(payload, reason, tmp_path):
    archives.write_files(tmp_path, {'cifar-10-batches-py/test_batch': payload})
    error = error_of(data.dataset('cifar10', tmp_path).read, 'test', megabytes=4)
    assert 'test_batch is damaged' in error
    assert any(part in error for part in reason.split('|')), error


def test_pickle_that_encodes_one_text_again_and_again(tmp_path):
    """A megabyte would become a gigabyte."""
    again = b'c_codecs\nencode\nh\x01' + b'X\x06\0\0\0latin1' + b'\x86R'
    payload = b'\x80\x02}' + b'X' + struct.pack('<I', 1 << 20) + b'x' * (1 << 20) + b'q\x01(' + again * 1000 + b'ls.'
    archives.write_files(tmp_path, {'cifar-10-batches-py/test_batch': payload})
    error = error_of(data.dataset('cifar10', tmp_path).read, 'test', megabytes=16)
    assert 'it encodes more bytes than it has' in error


def test_pickle_of_many_empty_things(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, '_MOST_OPCODES', 1000)
    archives.write_files(tmp_path, {'cifar-10-batches-py/test_batch': b'\x80\x02' + b'}\x94' * 5000 + b'.'})
    assert 'more than 1000 opcodes' in error_of(data.dataset('cifar10', tmp_path).read, 'test')


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_all_protocols(protocol, tmp_path):
    """Keys are text or bytes, labels a list or an array, and arrays in C or Fortran order."""
    images, labels = archives.cifar_images(0, 4, 10)
    rows = images.transpose(0, 3, 1, 2).reshape(4, 3072)
    for content in (
        {b'data': rows, b'labels': labels.tolist(), b'filenames': [b'\xff.png', b''], b'batch_label': b'made'},
        {'data': np.asfortranarray(rows), 'labels': labels.astype('>i4')},
        {'data': rows, 'labels': labels.astype(np.uint8)},
    ):
        archives.write_files(tmp_path, {'cifar-10-batches-py/test_batch': pickle.dumps(content, protocol)})
        read_images, read_labels = data.dataset('cifar10', tmp_path).read('test')
        np.testing.assert_array_equal(read_images, images)
        np.testing.assert_array_equal(read_labels, labels)


def test_pickle_as_python_2_wrote_it(tmp_path):
    """The official archives have byte strings, and the module names of NumPy 1."""
    images, _ = archives.cifar_images(0, 2, 10)
    rows = images.transpose(0, 3, 1, 2).reshape(2, 3072).tobytes()
    content = b'T' + struct.pack('<I', len(rows)) + rows
    payload = batch(reconstructed((2, 3072), dtype(b'u1'), content), b'](K\x00K\x01e')
    archives.write_files(tmp_path, {'cifar-10-batches-py/test_batch': payload})
    np.testing.assert_array_equal(data.dataset('cifar10', tmp_path).read('test')[0], images)


# Tar archives.


def tar_of(path, write):
    with gzip.open(path, 'wb', 1) as file, tarfile.open(fileobj=file, mode='w:') as tar:
        for name, payload in archives.cifar10_record_files(2)[0].items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
        write(tar.fileobj)


def header(name, kind, size, sparse=None):
    """Returns a tar header. `sparse` is the size that a GNU sparse file claims."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if sparse:
        block[483:495] = b'%011o\0' % sparse
        block[148:156] = b'%06o\0 ' % (sum(block[:148]) + 256 + sum(block[156:]))
    return bytes(block)


@pytest.mark.parametrize(
    'kind', [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.REGTYPE]
)
def test_tar_of_long_names(kind, tmp_path):
    """A name of 100 million bytes is skipped. A file beyond the limit is refused."""
    path = tmp_path / 'cifar-10-binary.tar.gz'

    def write(file):
        file.write(header('long', kind, 100_000_256))
        for _ in range(100):
            file.write(b'1' * 1_000_000)
        file.write(b'1' * 256)
        file.write(header('long', kind, 1 << 30))

    tar_of(path, write)
    assert 'exceeds 268435456 bytes' in error_of(data.dataset('cifar10', tmp_path).read, 'test', megabytes=8)


def test_tar_of_sparse_files(tmp_path):
    """Sparse files of GNU tar and of PAX claim zeros that the archive does not hold."""
    name, records = 'cifar-10-batches-bin/test_batch.bin', 3073 * 1000
    pax = b'25 GNU.sparse.realsize=30\n' + b'19 GNU.sparse.map=\n'
    for blocks in (
        [header(name, tarfile.GNUTYPE_SPARSE, 0, sparse=records)],
        [header('pax', tarfile.XHDTYPE, len(pax)), pax.ljust(512, b'\0'), header(name, tarfile.REGTYPE, 0)],
    ):
        path = tmp_path / 'cifar-10-binary.tar.gz'
        path.write_bytes(gzip.compress(b''.join(blocks) + bytes(1024)))
        assert f'it holds no {name}' in error_of(data.dataset('cifar10', tmp_path).read, 'test', megabytes=4)


@pytest.mark.parametrize('pax', [b'9 size=x\n', b'9 size=-1\n', b'30 size=' + b'9' * 5000 + b'\n', b'\xff' * 600])
def test_tar_with_damaged_pax_headers(pax, tmp_path):
    path = tmp_path / 'cifar-10-binary.tar.gz'
    blocks = [header('pax', tarfile.XHDTYPE, len(pax)), pax, bytes(-len(pax) % 512), header('x', tarfile.REGTYPE, 0)]
    path.write_bytes(gzip.compress(b''.join(blocks) + bytes(1024)))
    assert f'{path} is damaged' in error_of(data.dataset('cifar10', tmp_path).read, 'test', megabytes=4)


def test_tar_with_pax_headers_is_read(tmp_path):
    """Python's tarfile adds PAX headers for fractions of seconds."""
    recorded, contents = archives.cifar10_record_files(2)
    with tarfile.open(tmp_path / 'cifar-10-binary.tar.gz', 'w:gz', format=tarfile.PAX_FORMAT) as tar:
        for name, payload in recorded.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(payload), 1.5
            tar.addfile(info, io.BytesIO(payload))
    np.testing.assert_array_equal(data.dataset('cifar10', tmp_path).read('test')[0], contents['test_batch'][0])


def test_pickle_beyond_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, 'LIMIT', 1000)
    archives.write_files(tmp_path, {'cifar-10-batches-py/test_batch': b'\x80\x02}.' * 1000})
    assert 'it exceeds 1000 bytes' in error_of(data.dataset('cifar10', tmp_path).read, 'test')


# idx files.


@pytest.mark.parametrize(
    ('payload', 'message'),
    [
        (b'\0\0\x08\x41' + b'\0\0\0\x01' * 65 + b'\0', 'does not start like an idx file'),
        (b'\0\0\x08\x00', 'does not start like an idx file'),
        (b'\0\0\x08\x03' + struct.pack('>3I', 0, 1 << 31, 1 << 31), 'holds no images|is damaged'),
        (b'\0\0\x08\x03' + struct.pack('>3I', 10, 0, 28), 'its images have no pixels'),
        (b'\0\0\x08\x03' + struct.pack('>3I', 1 << 16, 1 << 10, 1), 'more than the file can hold'),
        (b'\0\0\x08\x03' + struct.pack('>3I', 1, 1 << 16, 1 << 16), 'more than the file can hold'),
    ],
)
@pytest.mark.parametrize('compressed', [False, True])
def test_idx_headers(payload, message, compressed, tmp_path):
    archives.write_idx_set(tmp_path / 'mnist', compressed=compressed)
    path = tmp_path / 'mnist' / ('t10k-images-idx3-ubyte' + '.gz' * compressed)
    path.write_bytes(gzip.compress(payload) if compressed else payload)
    if message.startswith('holds no images'):
        (tmp_path / 'mnist' / ('t10k-labels-idx1-ubyte' + '.gz' * compressed)).unlink()
        empty = archives.idx(np.zeros(0, np.uint8))
        path = tmp_path / 'mnist' / ('t10k-labels-idx1-ubyte' + '.gz' * compressed)
        path.write_bytes(gzip.compress(empty) if compressed else empty)
    error = error_of(data.dataset('mnist', tmp_path).read, 'test', megabytes=2)
    assert any(part in error for part in message.split('|')), error


def test_compressed_idx_within_the_budget_only(tmp_path):
    """200 million zeros take 200 kilobytes in a .gz file."""
    path = tmp_path / 'images.gz'
    with gzip.open(path, 'wb', 1) as file:
        file.write(b'\0\0\x08\x03' + struct.pack('>3I', 200_000, 1000, 1))
        for _ in range(200):
            file.write(bytes(1_000_000))
    assert 'claims 200000000 bytes, more than the file can hold' in error_of(idx.read_file, path, megabytes=2)


# MATLAB files.


def write_svhn(folder, compressed=True, **changes):
    images, labels = archives.cifar_images(0, 6, 10)
    content = {'X': images.transpose(1, 2, 3, 0), 'y': np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)}
    (folder / 'svhn').mkdir(exist_ok=True)
    path = folder / 'svhn' / 'test_32x32.mat'
    scipy.io.savemat(path, content | changes, do_compression=compressed)
    return path, images, labels


@pytest.mark.parametrize('compressed', [False, True])
@pytest.mark.parametrize('kind', ['u1', 'i4', 'i8', '>u2'])
def test_svhn_as_matlab_writes_it(kind, compressed, tmp_path):
    y = np.array([10, 1, 2, 3, 4, 5], kind)
    for shape in ((6, 1), (1, 6)):
        _, images, labels = write_svhn(tmp_path, compressed, y=y.reshape(shape), other={'a': 1}, text='abc')
        read_images, read_labels = data.dataset('svhn', tmp_path).read('test')
        np.testing.assert_array_equal(read_images, images)
        np.testing.assert_array_equal(read_labels, labels)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'y': np.zeros((5, 1), np.uint8)}, 'y is uint8 (5, 1), not whole numbers [6, 1]'),
        ({'y': np.zeros((3, 2), np.uint8)}, 'y is uint8 (3, 2), not whole numbers [6, 1]'),
        ({'y': np.zeros((6, 1)) + 0.5}, 'y is float64 (6, 1), not whole numbers [6, 1]'),
        ({'y': 'seven'}, 'y is not a full array of real numbers'),
        ({'y': np.ones((6, 1)) * 1j}, 'y is not a full array of real numbers'),
        ({'y': np.array([{'a': 1}] * 6)}, 'y is not a full array of real numbers'),
        ({'X': np.zeros((32, 32, 6), np.uint8)}, 'X is uint8 (32, 32, 6), not uint8 [32, 32, 3, N]'),
        ({'X': np.zeros((32, 32, 3, 6)) + 0.5}, 'X is float64 (32, 32, 3, 6), not uint8 [32, 32, 3, N]'),
        ({'X': scipy.sparse.eye_array(3).tocsc()}, 'X is not a full array of real numbers'),
    ],
)
def test_svhn_of_other_arrays(changes, message, tmp_path):
    """The message names the wrong array."""
    write_svhn(tmp_path, **changes)
    assert message in error_of(data.dataset('svhn', tmp_path).read, 'test')


def test_svhn_that_stands_for_gigabytes(tmp_path):
    """An X of 77 million zeros takes 75 kilobytes in the file."""
    path, *_ = write_svhn(tmp_path, X=np.zeros((32, 32, 3, 25_000), np.uint8))
    assert path.stat().st_size < 100_000
    assert 'exceeds 67108864 bytes' in error_of(data.dataset('svhn', tmp_path).read, 'test', megabytes=8)


@pytest.mark.parametrize('where', [100, -3000, -3])
def test_svhn_with_a_changed_byte(where, tmp_path):
    """The reader compares the checksum of the compressed stream."""
    path, *_ = write_svhn(tmp_path)
    payload = bytearray(path.read_bytes())
    payload[128 + where if where > 0 else where] ^= 1
    path.write_bytes(payload)
    assert 'is damaged (' in error_of(data.dataset('svhn', tmp_path).read, 'test')


# .npy and .npz files.


def npy_file(header, content=b''):
    return b'\x93NUMPY\x01\0' + struct.pack('<H', len(header)) + header + content


@pytest.mark.parametrize(
    'payload',
    [
        b'',
        b'\x93NUMPY\x01\0v\0',
        npy_file(b"{'descr': '|u1', 'fortran_order': False, 'shape': (3,), 'x': '''\n"),  # TokenError
        npy_file(b'(' * 9000 + b'\n'),  # MemoryError or RecursionError
        npy_file(b"{'descr': '|u1', 'fortran_order': False, 'shape': (" + b'9' * 200 + b',), }\n'),  # OverflowError
        npy_file(b"{'descr': '|u1', 'fortran_order': False, 'shape': (" + b'9' * 9000 + b',), }\n'),
        npy_file(b"{'descr': '|u1', 'fortran_order': False, 'shape': (0, " + b'9' * 200 + b'), }\n'),
        npy_file(b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000,), }\n", b'abc'),
        npy_file(b"{'descr': '|u1', 'fortran_order': False, 'shape': (2,), }\n", b'abc'),
        npy_file(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n", b'abcdefgh'),
        npy_file(b"{'descr': '<u3', 'fortran_order': False, 'shape': (1,), }\n", b'abc'),
        npy_file(b"{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (3,), }\n", b'abc'),
        npy_file(b"{'descr': '|u1', 'fortran_order': False, 'shape': (-3,), }\n", b'abc'),
        npy_file(b"{'descr': '|u1', 'fortran_order': False, 'shape': (" + b'1, ' * 99 + b'), }\n', b'a'),
        npy_file(b"{'descr': '<U0', 'fortran_order': False, 'shape': (3,), }\n"),
        b'\x93NUMPY\x02\0' + struct.pack('<I', (1 << 32) - 1) + b'{',
    ],
)
def test_damaged_npy(payload, tmp_path):
    path = tmp_path / 'a.npy'
    path.write_bytes(payload)
    assert str(path) in error_of(npy.load, path, megabytes=2)
    with zipfile.ZipFile(tmp_path / 'a.npz', 'w') as members:
        members.writestr('a.npy', payload)
    assert str(tmp_path / 'a.npz') in error_of(npy.load_npz, tmp_path / 'a.npz', megabytes=2)


@pytest.mark.parametrize(
    'array',
    [
        np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.float32(7),
        np.array(['a', 'text']),
        np.zeros((0, 5), '>i2'),
        np.array([True, False]),
    ],
    ids=lambda array: f'{np.asarray(array).dtype}',
)
def test_npy_and_npz_as_numpy_writes_them(array, tmp_path):
    np.save(tmp_path / 'a.npy', array)
    np.savez(tmp_path / 'a.npz', a=array, other=np.arange(3))
    np.savez_compressed(tmp_path / 'b.npz', a=array)
    for read in (
        npy.load(tmp_path / 'a.npy'),
        npy.load_npz(tmp_path / 'a.npz')['a'],
        npy.load_npz(tmp_path / 'b.npz')['a'],
    ):
        assert read.dtype == np.asarray(array).dtype
        np.testing.assert_array_equal(read, array)


def test_npz_within_the_budget_only(tmp_path):
    np.savez_compressed(tmp_path / 'a.npz', a=np.zeros(80 << 20, np.uint8))
    assert 'claims to hold 83886208 bytes, but at most' in error_of(npy.load_npz, tmp_path / 'a.npz', megabytes=2)


def test_npz_with_two_arrays_of_a_name(tmp_path):
    content = io.BytesIO()
    np.save(content, np.arange(3))
    with pytest.warns(UserWarning, match='Duplicate'), zipfile.ZipFile(tmp_path / 'a.npz', 'w') as members:
        members.writestr('a.npy', content.getvalue())
        members.writestr('a.npy', content.getvalue())
    assert 'occurs twice' in error_of(npy.load_npz, tmp_path / 'a.npz')


# The zip of TinyImageNet.


def tiny_zip(folder, change):
    """Writes the zip, damaged by change(payload, position of a directory record in the middle)."""
    path = folder / 'tiny-imagenet-200.zip'
    archives.write_tinyimagenet_zip(path)
    payload = bytearray(path.read_bytes())
    change(payload, payload.index(b'PK\x01\x02', payload.index(b'PK\x01\x02') + 3000))
    path.write_bytes(payload)
    return path


def set_bytes(offset, content):
    def change(payload, position):
        payload[position + offset : position + offset + len(content)] = content

    return change


@pytest.mark.parametrize(
    'change',
    [
        set_bytes(8, b'\x01\x00'),  # encrypted
        set_bytes(8, b'\x20\x00'),  # patched
        set_bytes(8, b'\x40\x00'),  # strongly encrypted
        set_bytes(6, b'\xff\x00'),  # a newer version
        set_bytes(10, b'\x63\x00'),  # an unknown compression
        set_bytes(24, b'\xff\xff\xff\xf0'),  # 4 GB
        set_bytes(42, b'\xff\xff\xff\xf0'),  # beyond the end
        lambda payload, position: (
            set_bytes(46, b'\xff\xfe')(payload, position) or set_bytes(8, b'\0\x08')(payload, position)
        ),
        lambda payload, position: payload.__setitem__(slice(-12, -4), b'\xff' * 8),
    ],
)
def test_zip_with_damaged_records(change, tmp_path, capsys):
    path = tiny_zip(tmp_path, change)
    with pytest.raises(SystemExit) as stop:
        setup_tinyimagenet.main([f'--datasetfolder={tmp_path}'])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and f'{path} is damaged' in error
    assert os.listdir(tmp_path) == [path.name]


def test_zip_of_gigabytes(tmp_path, capsys):
    """A file of 240 kilobytes claims 3,000 members of a megabyte of zeros. Nothing is unpacked."""
    path = tmp_path / 'tiny-imagenet-200.zip'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as members:
        members.writestr('tiny-imagenet-200/train/0.JPEG', bytes(1 << 20))
        info, start = members.infolist()[0], members.start_dir
        for i in range(1, 3000):  # all share the data of the first
            more = zipfile.ZipInfo(f'tiny-imagenet-200/train/{i}.JPEG')
            for name in ('CRC', 'compress_size', 'file_size', 'compress_type', 'header_offset'):
                setattr(more, name, getattr(info, name))
            members.filelist.append(more)
        members.start_dir = start
    with pytest.raises(SystemExit):
        setup_tinyimagenet.main([f'--datasetfolder={tmp_path}'])
    assert 'it claims to hold 3145728000 bytes, but at most' in capsys.readouterr().err
    assert os.listdir(tmp_path) == [path.name]


# Pipes, devices and folders in place of files.


def fifo(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to('/dev/zero')


def folder(path):
    path.mkdir()


OFFICIAL_FILES = [
    ('cifar10', 'cifar-10-binary.tar.gz'),
    ('cifar10', 'cifar-10-batches-bin/test_batch.bin'),
    ('cifar10', 'cifar-10-batches-py/test_batch'),
    ('mnist', 'mnist/t10k-images-idx3-ubyte'),
    ('mnist', 'mnist/t10k-images-idx3-ubyte.gz'),
    ('svhn', 'svhn/test_32x32.mat'),
]


@pytest.mark.parametrize('make', [fifo, device, folder])
@pytest.mark.parametrize(('name', 'path'), OFFICIAL_FILES)
def test_no_regular_file(name, path, make, tmp_path):
    archives.write_idx_set(tmp_path / 'mnist', compressed=path.endswith('.gz'))
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).unlink(missing_ok=True)
    make(tmp_path / path)
    error = error_of(data.dataset(name, tmp_path).read, 'test')
    assert path in error and ('is not a regular file' in error or 'cannot be read' in error)


@pytest.mark.parametrize('make', [fifo, device, folder])
@pytest.mark.parametrize('name', ['labels.npy', 'fog.npy'])
def test_no_regular_array(name, make, tmp_path):
    for other in {'labels.npy', 'fog.npy'} - {name}:
        np.save(tmp_path / other, np.zeros(5, np.uint8))
    make(tmp_path / name)
    assert name in error_of(corruptions.read_official, tmp_path, (1,), np.zeros(1, np.uint8))


@pytest.mark.parametrize('name', [*data.DATASETS, 'tfds/toy', 'folder:pets'])
def test_nul_in_a_path(name):
    if name != 'digits':
        assert 'is not a path' in error_of(lambda: data.dataset(name, 'a\0b').read('test'))


def test_nul_in_the_paths_of_others(tmp_path):
    assert 'is not a path' in error_of(corruptions.read_official, 'a\0b', (1,), np.zeros(1))
    assert 'is not a valid path' in error_of(npy.load, 'a\0b')
    with pytest.raises(SystemExit):
        setup_tinyimagenet.main(['--datasetfolder', 'a\0b'])


def test_endless_answer_to_a_download(tmp_path, monkeypatch):
    """The download stops at the size of the official file."""
    monkeypatch.setattr(files, '_open_url', lambda url: Path('/dev/zero').open('rb'))  # noqa: SIM115
    error = error_of(files.download, files.OfficialFile('http://example.org/a', '00', 5 << 20), tmp_path / 'b' / 'a')
    assert 'has the SHA-256' in error and not (tmp_path / 'b').exists()


# Folders of images.


def encoded(mode, size, kind='PNG', **options):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


def long_text():
    """Returns a PNG of 30 kilobytes with a text of 20 million letters."""
    text = PngImagePlugin.PngInfo()
    text.add_text('Comment', 'a' * 20_000_000, zip=True)
    return encoded('L', (8, 8), pnginfo=text)


@pytest.mark.parametrize(
    ('payload', 'message'),
    [
        (lambda: encoded('L', (13_400, 13_400)), 'Image size (179560000 pixels) exceeds limit'),
        (lambda: encoded('1', (9_500, 9_500)), 'Image size (90250000 pixels) exceeds limit'),
        (lambda: b'P5 4000000000 4000000000 255\n' + bytes(100), 'exceeds limit'),
        (lambda: b'P6 4000 4000 255\n' + bytes(100), 'image file is truncated'),
        (lambda: encoded('L', (8, 8), 'GIF')[:6] + b'\xff' * 4 + encoded('L', (8, 8), 'GIF')[10:], 'exceeds limit'),
        (long_text, 'MAX_TEXT_CHUNK'),
        (lambda: encoded('RGB', (8, 8), 'EPS'), 'does not start like'),
        (lambda: encoded('RGB', (8, 8), 'ICO'), 'does not start like'),
    ],
)
def test_hostile_pictures(payload, message, tmp_path):
    """The suffix is that of another format. Formats without a suffix in the list are not opened."""
    archives.write_files(tmp_path / 'set' / 'train' / 'a', {'1.png': encoded('L', (8, 8)), '2.jpg': payload()})
    opened = image_folder.open_set(tmp_path / 'set', 8, tmp_path / 'cache')
    error = error_of(image_folder.read, opened, 'train', megabytes=8)
    assert f'{tmp_path}/set/train/a/2.jpg is damaged (' in error and message in error
    assert os.listdir(tmp_path / 'cache') == []


# TensorFlow Datasets.


@pytest.fixture
def toy(tmp_path):
    """Prepares a data set in tmp_path/toy/1.0.0, and returns that folder."""
    pytest.importorskip('tensorflow_datasets')
    archives.prepare_tfds(tmp_path)
    return tmp_path / 'toy' / '1.0.0'


CLASS_LABEL = 'tensorflow_datasets.core.features.class_label_feature.ClassLabel'
LEGACY = {'type': 'evil.Feature', 'content': {'num_classes': 3}}
tfds_warnings = pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::ResourceWarning')


@pytest.mark.parametrize(
    'change',
    [
        lambda text: text.replace(CLASS_LABEL, 'evil.ClassLabel'),
        lambda text: text.replace(CLASS_LABEL, f'{CLASS_LABEL}.evil.ClassLabel'),
        lambda text: text.replace(f'"pythonClassName": "{CLASS_LABEL}"', '"python_class_name": "evil.ClassLabel"'),
        lambda text: json.dumps(LEGACY),
        lambda text: json.dumps({'type': CLASS_LABEL, 'content': json.dumps({'feature': LEGACY})}),
        lambda text: json.dumps({'type': CLASS_LABEL, 'content': [{'a': {'b': LEGACY}}]}),
    ],
)
@tfds_warnings
def test_tfds_that_names_a_class(change, toy, monkeypatch):
    """The module lies beside the data, in a folder where Python looks for modules."""
    (toy.parent.parent / 'evil.py').write_text('raise SystemExit("executed")\n')
    monkeypatch.syspath_prepend(toy.parent.parent)
    (toy / 'features.json').write_text(change((toy / 'features.json').read_text()))
    error = error_of(data.dataset, 'tfds/toy', toy.parent.parent)
    assert 'features.json names the class' in error and 'not imported' in error
    assert 'evil' not in sys.modules


@tfds_warnings
def test_known_classes_are_those_of_the_installed_package(toy):
    """Names that older versions wrote are among them."""
    from tensorflow_datasets.core.features import feature

    installed = {
        name
        for name, kind in feature.FeatureConnector._registered_features.items()
        if kind.__module__.startswith('tensorflow_datasets.core.features.')
        and name.rpartition('.')[2] not in ('TopLevelFeature',)
    }
    assert installed == tfds._ADMITTED


@pytest.mark.parametrize('name', ['../..', '..', '.', 'a/../b', '/etc', 'a//b', 'x:y', 'hugging_face:a', '~', 'a\0b'])
def test_tfds_names_that_lead_elsewhere(name, tmp_path):
    (tmp_path / 'datasets').mkdir()
    assert 'is not the name of a data set' in error_of(data.dataset, f'tfds/{name}', tmp_path / 'datasets')


@tfds_warnings
def test_tfds_behind_links(toy, tmp_path):
    """A data set may be a link, for instance to another disk. Links within a data set are not followed."""
    inside = tmp_path / 'inside'
    inside.mkdir()
    (inside / 'toy').symlink_to(toy.parent)
    assert data.dataset('tfds/toy', inside).num_classes
    (inside / 'toy').unlink()
    (inside / 'toy').mkdir()
    (inside / 'toy' / '1.0.0').symlink_to(toy)
    assert 'holds no prepared data set' in error_of(data.dataset, 'tfds/toy', inside)


@tfds_warnings
def test_tfds_is_not_searched_to_any_depth(toy):
    deep = toy.parent / 'a' / 'b' / 'c'
    deep.mkdir(parents=True)
    toy.rename(deep / '1.0.0')
    assert 'holds no prepared data set' in error_of(data.dataset, 'tfds/toy', toy.parent.parent)


@pytest.mark.parametrize('name', ['features.json', 'dataset_info.json', 'toy-train.array_record-00000-of-00001', 'x'])
@tfds_warnings
def test_tfds_of_pipes(name, toy):
    (toy / name).unlink(missing_ok=True)
    os.mkfifo(toy / name)
    assert 'is not a regular file' in error_of(data.dataset, 'tfds/toy', toy.parent.parent)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda info: info['splits'][0].update(shardLengths=['1000000000000']), 'holds 6 records instead of 10000000'),
        (lambda info: info['splits'][0].update(shardLengths=['5']), 'holds 6 records instead of 5'),
        (lambda info: info['splits'][0].update(shardLengths=['6', '6']), 'cannot be read'),
        (lambda info: info['splits'][0].update(shardLengths=['-6']), 'toy'),
        (lambda info: info['splits'][0].update(shardLengths=[]), 'toy'),
        (lambda info: info['splits'][0].update(shardLengths='x'), 'cannot be read by TFDS'),
        (lambda info: info['splits'][0].update(filepathTemplate='../{DATASET}'), 'in other folders'),
        (lambda info: info['splits'][0].update(filepathTemplate='{DATASET.x}'), 'toy'),
        (lambda info: info.update(splits='x'), 'cannot be read by TFDS'),
        (lambda info: info.update(fileFormat='tfrecord'), "not prepared with file_format='array_record'"),
        (lambda info: info.update(name='../x'), 'toy'),
        (lambda info: info.update(version='x'), 'cannot be read by TFDS'),
    ],
)
@tfds_warnings
def test_tfds_with_damaged_shard_lists(change, message, toy):
    edit(toy / 'dataset_info.json', change)
    error = error_of(lambda: data.dataset('tfds/toy', toy.parent.parent).read('train'))
    assert message in error and 'toy' in error


@tfds_warnings
def test_tfds_of_too_many_classes(toy):
    def change(features):
        features['featuresDict']['features']['label']['classLabel']['numClasses'] = str(10**12)

    edit(toy / 'features.json', change)
    assert 'has 1000000000000 classes' in error_of(data.dataset, 'tfds/toy', toy.parent.parent)


@pytest.mark.parametrize(
    ('payload', 'message'),
    [
        (lambda: encoded('L', (13_000, 13_000)), '(Image size|claims to hold 1014000000 bytes)'),
        (lambda: encoded('1', (9_000, 9_000)), 'claims to hold 486000000 bytes'),
        (lambda: encoded('I;16', (8, 8)), 'its pixels are I;16'),
        (lambda: encoded('L', (8, 8), 'BMP'), 'cannot identify image file'),
        (lambda: encoded('L', (8, 8))[:40], 'is damaged'),
        (lambda: b'', 'cannot identify image file'),
    ],
)
@tfds_warnings
def test_tfds_of_hostile_images(payload, message, tmp_path):
    pytest.importorskip('tensorflow_datasets')
    archives.prepare_tfds(tmp_path, 1, png=payload())
    dataset = data.dataset('tfds/toy', tmp_path)
    error = error_of(dataset.read, 'train', megabytes=60)
    assert re.search(message, error), error


@tfds_warnings
def test_tfds_decodes_palettes_to_colours(tmp_path):
    """TFDS itself would return indices into the palette."""
    pytest.importorskip('tensorflow_datasets')
    image = Image.new('RGB', (8, 8), (200, 10, 90)).convert('P', palette=Image.Palette.ADAPTIVE)
    file = io.BytesIO()
    image.save(file, 'PNG')
    archives.prepare_tfds(tmp_path, 3, png=file.getvalue())
    images, _ = data.dataset('tfds/toy', tmp_path).read('train')
    assert (images == [200, 10, 90]).all()


def test_all_but_tfds_works_without_it(tmp_path):
    """Other data sets need neither tensorflow_datasets nor array_record."""
    archives.write_idx_set(tmp_path / 'mnist')
    code = """if True:
        import sys
        sys.modules['tensorflow_datasets'] = sys.modules['array_record'] = None
        import data
        print(len(data.dataset('mnist', sys.argv[1]).read('train')[0]))
        try:
            data.dataset('tfds/mnist', sys.argv[1])
        except data.DataError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, '-c', code, tmp_path], cwd=ROOT, check=True, capture_output=True, text=True)
    expected = 'tfds/mnist: tensorflow_datasets is not installed: run pip install -r requirements.txt'
    assert done.stdout.splitlines() == ['20', expected]


@pytest.mark.parametrize(
    ('num_bytes', 'budget'), [(10, 1 << 26), (1 << 25, 1 << 31), (1 << 30, 1 << 32), (5 << 30, 5 << 30)]
)
def test_budget(num_bytes, budget):
    """The budget of a large checkpoint is its own size."""
    assert files.budget(num_bytes) == budget
