"""setup_tinyimagenet.py, from the zip to sorted folders and the cache. It is interrupted anywhere, and meets errors."""

import io
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import archives
import data
import setup_tinyimagenet
from readers import decoding, tinyimagenet


@pytest.fixture
def folder(tmp_path):
    archives.write_tinyimagenet_zip(tmp_path / 'tiny-imagenet-200.zip')
    return tmp_path


def check(folder):
    for split in ('train', 'test'):
        images, labels = data.dataset('tinyimagenet', folder).read(split)
        assert images.shape == (200, 64, 64, 3) and images.dtype == np.uint8
        np.testing.assert_array_equal(labels, np.arange(200))
        assert np.abs(images[:, 0, 0, 0].astype(int) - labels).max() <= 2
        grey = images[labels % 10 == 0]
        assert np.all(grey == grey[..., :1])
    root = folder / 'tiny-imagenet-200'
    assert not (root / 'val' / 'images').exists() and not (root / 'test').exists()
    assert sorted(os.listdir(folder)) == ['tiny-imagenet-200', 'tiny-imagenet-200.zip']


def test_from_the_zip_and_again(folder, capsys):
    setup_tinyimagenet.main(['--datasetfolder', str(folder)])
    check(folder)
    setup_tinyimagenet.main(['--datasetfolder', str(folder)])
    check(folder)
    assert capsys.readouterr().out.count('train: 200 images of 200 classes') == 2


def test_later_starts_decode_nothing(folder, monkeypatch):
    setup_tinyimagenet.main(['--datasetfolder', str(folder)])
    monkeypatch.setattr(Image, 'open', None)
    check(folder)


def test_damaged_cache_is_made_again(folder):
    setup_tinyimagenet.main(['--datasetfolder', str(folder)])
    for cache in (folder / 'tiny-imagenet-200').glob('*.npy'):
        cache.write_bytes(cache.read_bytes()[:1000])
    check(folder)


def test_stray_folders_do_not_shift_labels(folder):
    setup_tinyimagenet.main(['--datasetfolder', str(folder)])
    for split in ('train', 'val'):
        (folder / 'tiny-imagenet-200' / split / '.ipynb_checkpoints').mkdir()
    check(folder)


@pytest.mark.parametrize('payload', [b'', None])
def test_cache_of_something_else_is_made_again(payload, folder):
    setup_tinyimagenet.main(['--datasetfolder', str(folder)])
    for cache in (folder / 'tiny-imagenet-200').glob('*.npy'):
        np.save(cache, np.zeros((3, 2))) if payload is None else cache.write_bytes(payload)
    check(folder)


def test_changed_images_are_decoded_again(folder):
    setup_tinyimagenet.main(['--datasetfolder', str(folder)])
    changed = folder / 'tiny-imagenet-200' / 'train' / 'n00000007' / 'images' / 'n00000007_0.JPEG'
    changed.write_bytes(archives.jpeg(255, 'L'))
    images, _ = data.dataset('tinyimagenet', folder).read('train')
    assert images[7].min() >= 253
    assert len(list((folder / 'tiny-imagenet-200').glob('train-*.npy'))) == 1


def test_arrays_of_the_user_stay(folder):
    """Arrays of any other name stay. Caches of earlier images are deleted."""
    setup_tinyimagenet.main(['--datasetfolder', str(folder)])
    root = folder / 'tiny-imagenet-200'
    own = ['train-labels.npy', 'test-my-labels.npy', 'train-features-resnet50.npy', 'train-0123456789ABCDEF.npy']
    next(root.glob('train-*.npy')).rename(root / 'train-0123456789abcdef.npy')
    for name in own:
        (root / name).write_bytes(name.encode())
    check(folder)
    assert all((root / name).read_bytes() == name.encode() for name in own)
    assert not (root / 'train-0123456789abcdef.npy').exists()


HEADERS = [
    b"\x93NUMPY\x01\0\x40\0{'descr': '|u1', 'fortran_order': False, 'shape': (200, 64, [\n",
    b'\x93NUMPY\x01\0\xff\x20' + b'(' * 9000,
    b"\x93NUMPY\x01\0\x60\0{'descr': '|u1', 'fortran_order': False, 'shape': (" + b'9' * 40 + b',), }\n',
]


@pytest.mark.parametrize('payload', HEADERS, ids=('unfinished', 'nested', 'huge'))
def test_cache_with_a_damaged_header_is_made_again(payload, folder):
    setup_tinyimagenet.main(['--datasetfolder', str(folder)])
    caches = list((folder / 'tiny-imagenet-200').glob('*.npy'))
    before = [cache.read_bytes() for cache in caches]
    for cache in caches:
        cache.write_bytes(payload + cache.read_bytes()[len(payload) :])
    check(folder)
    assert [cache.read_bytes() for cache in caches] == before


@pytest.mark.parametrize('where', [128, 1_000_000, -4, -5])
def test_cache_with_a_changed_byte_is_made_again(where, folder):
    """Changes the first pixel, one in the middle, the last, or a checksum."""
    setup_tinyimagenet.main(['--datasetfolder', str(folder)])
    caches = list((folder / 'tiny-imagenet-200').glob('*.npy'))
    before = [cache.read_bytes() for cache in caches]
    for cache, payload in zip(caches, before, strict=True):
        changed = bytearray(payload)
        changed[where] ^= 1
        cache.write_bytes(changed)
    check(folder)
    assert [cache.read_bytes() for cache in caches] == before


@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir])
def test_something_else_in_place_of_a_cache(make, folder, capsys):
    """A pipe is replaced. With a folder, one line is printed, and the images stay in memory."""
    setup_tinyimagenet.main(['--datasetfolder', str(folder)])
    for cache in list((folder / 'tiny-imagenet-200').glob('*.npy')):
        cache.unlink()
        make(cache)
    capsys.readouterr()
    check(folder)
    expected = 'could not be written (Is a directory): images are decoded at every start'
    assert capsys.readouterr().err.count(expected) == (2 if make == os.mkdir else 0)


@pytest.fixture
def unpacked(folder):
    """The zip as users unpack it themselves, with val/ unsorted."""
    shutil.unpack_archive(folder / 'tiny-imagenet-200.zip', folder)
    shutil.rmtree(folder / 'tiny-imagenet-200' / 'test')
    return folder


def test_what_macos_leaves_is_passed_over(unpacked):
    root = unpacked / 'tiny-imagenet-200'
    for inner in ('', 'train', 'val', 'val/images', 'train/n00000007', 'train/n00000007/images'):
        (root / inner / '.DS_Store').write_bytes(b'Bud1')
        (root / inner / '._n00000007_0.JPEG').write_bytes(b'Mac OS X')
    setup_tinyimagenet.main(['--datasetfolder', str(unpacked)])
    check(unpacked)


def test_annotations_with_a_byte_order_mark(unpacked):
    annotations = unpacked / 'tiny-imagenet-200' / 'val' / 'val_annotations.txt'
    annotations.write_bytes(b'\xef\xbb\xbf' + annotations.read_bytes())
    setup_tinyimagenet.main(['--datasetfolder', str(unpacked)])
    check(unpacked)


def test_annotations_that_are_no_text(unpacked, capsys):
    (unpacked / 'tiny-imagenet-200' / 'val' / 'val_annotations.txt').write_bytes(b'\xff\xfe')
    assert 'val_annotations.txt is damaged' in error_of(['--datasetfolder', str(unpacked)], capsys)


def test_pipes_in_place_of_files(folder, capsys):
    setup_tinyimagenet.main(['--datasetfolder', str(folder)])
    root = folder / 'tiny-imagenet-200'
    image = root / 'val' / 'n00000003' / 'val_197.JPEG'
    image.unlink()
    os.mkfifo(image)
    assert f'{image} is not a regular file' in error_of(['--datasetfolder', str(folder)], capsys)
    (root / 'val' / 'images').mkdir()
    (root / 'val' / 'val_annotations.txt').unlink()
    os.mkfifo(root / 'val' / 'val_annotations.txt')
    assert 'val_annotations.txt cannot be read: it is not a regular file' in error_of(
        ['--datasetfolder', str(folder)], capsys
    )
    shutil.rmtree(root)
    (folder / 'tiny-imagenet-200.zip').unlink()
    os.mkfifo(folder / 'tiny-imagenet-200.zip')
    assert 'tiny-imagenet-200.zip cannot be read: it is not a regular file' in error_of(
        ['--datasetfolder', str(folder)], capsys
    )


class Interrupt(BaseException):
    """The process ends here."""


@pytest.mark.parametrize('calls', [1, 2, 3, 100, 202])
def test_interrupted_anywhere(calls, folder, monkeypatch):
    """The first run ends at the n-th move, of the unpacked folder, 200 validation images and two caches."""
    replace, count = os.replace, 0

    def interrupted(source, target):
        nonlocal count
        count += 1
        if count == calls:
            raise Interrupt
        replace(source, target)

    monkeypatch.setattr(os, 'replace', interrupted)
    with pytest.raises(Interrupt):
        setup_tinyimagenet.main(['--datasetfolder', str(folder)])
    monkeypatch.undo()
    setup_tinyimagenet.main(['--datasetfolder', str(folder)])
    assert not [path for path in folder.rglob('*.partial') if path.is_dir()]
    for leftover in folder.rglob('*.partial'):
        leftover.unlink()
    check(folder)


def test_what_killed_processes_left(folder):
    """Leftovers are deleted after an hour. Folders of other processes, which may be running, and of the user stay."""
    killed, another, *of_the_user = paths = [
        folder / f'tiny-imagenet-200{name}.partial' for name in ('.node.7', '.node.8', '', '.mine')
    ]
    long_ago = time.time() - 2 * 3600
    for path in paths:
        path.mkdir()
        (path / 'train').touch()
        if path != another:
            os.utime(path, (long_ago, long_ago))
    setup_tinyimagenet.main(['--datasetfolder', str(folder)])
    assert not killed.exists() and all((path / 'train').exists() for path in (another, *of_the_user))


def test_from_an_unpacked_folder(folder):
    shutil.unpack_archive(folder / 'tiny-imagenet-200.zip', folder)
    shutil.rmtree(folder / 'tiny-imagenet-200' / 'test')
    setup_tinyimagenet.main(['--datasetfolder', str(folder)])
    check(folder)


def error_of(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        setup_tinyimagenet.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1
    return error


def test_damaged_zip(folder, capsys):
    path = folder / 'tiny-imagenet-200.zip'
    path.write_bytes(path.read_bytes()[:-100])
    error = error_of(['--datasetfolder', str(folder)], capsys)
    assert f'{path} is damaged' in error and f'not the published {tinyimagenet.OFFICIAL.sha256}' in error
    assert os.listdir(folder) == ['tiny-imagenet-200.zip']


def test_damaged_annotations(folder, capsys):
    shutil.unpack_archive(folder / 'tiny-imagenet-200.zip', folder)
    (folder / 'tiny-imagenet-200' / 'val' / 'val_annotations.txt').write_text('one word a line\n')
    error = error_of(['--datasetfolder', str(folder)], capsys)
    assert "val_annotations.txt is damaged: 'one word a line' and '' are not plain names" in error
    assert len(os.listdir(folder / 'tiny-imagenet-200' / 'val' / 'images')) == 200


def test_something_else_in_place_of_the_folder(folder, capsys):
    root = folder / 'tiny-imagenet-200'
    for make in (root.touch, root.mkdir, lambda: root.symlink_to('nowhere')):
        make()
        assert f'{root} is not the unpacked zip' in error_of(['--datasetfolder', str(folder)], capsys)
        root.rmdir() if root.is_dir() else root.unlink()


def test_zip_of_something_else(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / 'tiny-imagenet-200.zip', 'w') as archive:
        archive.writestr('tiny-imagenet-200/train/n0.txt', 'text')
    assert 'it holds no folder tiny-imagenet-200/val' in error_of(['--datasetfolder', str(tmp_path)], capsys)
    assert os.listdir(tmp_path) == ['tiny-imagenet-200.zip']


def test_damaged_image(folder, capsys):
    setup_tinyimagenet.main(['--datasetfolder', str(folder)])
    image = folder / 'tiny-imagenet-200' / 'val' / 'n00000003' / 'val_197.JPEG'
    image.write_bytes(image.read_bytes()[:200])
    assert f'{image} is damaged' in error_of(['--datasetfolder', str(folder)], capsys)


def test_training_before_the_setup(folder):
    with pytest.raises(data.DataError, match=f'run python setup_tinyimagenet.py --datasetfolder {folder}'):
        data.dataset('tinyimagenet', folder).read('train')


@pytest.fixture
def in_processes(folder, monkeypatch):
    """Returns the sorted folder tiny-imagenet-200 without caches. Its images are decoded in seven blocks."""
    setup_tinyimagenet.main(['--datasetfolder', str(folder)])
    monkeypatch.setattr(decoding, 'BLOCK', 30)
    root = folder / 'tiny-imagenet-200'
    for cache in root.glob('*.npy'):
        cache.unlink()
    return root


def plainly_decoded(root):
    return np.stack([np.asarray(Image.open(path).convert('RGB')) for path in sorted((root / 'train').rglob('*.JPEG'))])


def files_beside_images(root):
    return [path.name for path in root.iterdir() if path.suffix in ('.npy', '.partial')]


def test_decoding_in_processes(in_processes):
    """The images are mapped from a file, which is what np.save writes, followed by seven checksums."""
    images, _ = data.dataset('tinyimagenet', in_processes.parent).read('train')
    assert isinstance(images, np.memmap)
    np.testing.assert_array_equal(images, plainly_decoded(in_processes))
    (name,) = files_beside_images(in_processes)
    saved = io.BytesIO()
    np.save(saved, images)
    written = (in_processes / name).read_bytes()
    assert written[:-28] == saved.getvalue()
    assert written[-4:] == zlib.crc32(images[180:]).to_bytes(4, 'little')
    check(in_processes.parent)


def test_damage_found_by_a_process(in_processes, capsys):
    image = in_processes / 'train' / 'n00000199' / 'images' / 'n00000199_0.JPEG'
    image.write_bytes(image.read_bytes()[:200])
    error = error_of(['--datasetfolder', str(in_processes.parent)], capsys)
    assert f'{image} is damaged (Truncated File Read)' in error
    assert not files_beside_images(in_processes)


@pytest.mark.parametrize('room', [100, 1_000_000])
def test_no_room_for_the_cache(room, in_processes, capsys):
    """The header does not fit, or the third of seven blocks. One line is printed, and the images stay in memory."""
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        images, _ = data.dataset('tinyimagenet', in_processes.parent).read('train')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    np.testing.assert_array_equal(images, plainly_decoded(in_processes))
    error = capsys.readouterr().err
    assert (
        error.count('\n') == 1 and 'could not be written (File too large): images are decoded at every start' in error
    )
    assert not files_beside_images(in_processes)


def test_interrupted_while_decoding(in_processes, monkeypatch):
    def interrupted(descriptor):
        raise Interrupt

    monkeypatch.setattr(os, 'fsync', interrupted)
    with pytest.raises(Interrupt):
        data.dataset('tinyimagenet', in_processes.parent).read('train')
    assert not files_beside_images(in_processes)


OWN_SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import data
from readers import decoding
decoding.BLOCK = 30
print(data.dataset('tinyimagenet', {folder!r}).read('train')[0].sum())
with decoding.decoders(3) as pool:
    print(*decoding.submit(pool, eval, "sorted(__import__('sys').modules)").result())
"""


def test_processes_import_neither_jax_nor_the_main_script(in_processes, tmp_path):
    """Spawned processes would run a script without a guard again, and it would print more lines."""
    script = tmp_path / 'own.py'
    script.write_text(OWN_SCRIPT.format(root=str(ROOT), folder=str(in_processes.parent)))
    done = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True, timeout=120)
    total, modules = done.stdout.splitlines()
    assert int(total) == plainly_decoded(in_processes).sum()
    assert 'readers.decoding' in modules.split()
    assert not {'jax', 'data'} & set(modules.split())
    assert 'Traceback' not in done.stderr


ROOT = Path(__file__).parent.parent


def test_processes_end_with_the_one_that_started_them():
    code = """if True:
        import os
        from readers import decoding
        print(decoding.submit(decoding.decoders(3), os.getpid).result(), flush=True)
        os._exit(1)
    """
    process = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, timeout=60)
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int(process.stdout), 0)
            time.sleep(0.1)


def test_process_that_is_killed_while_it_decodes(in_processes, monkeypatch, capsys):
    monkeypatch.setattr(decoding, 'decode_with_checksum', kill_itself)
    error = error_of(['--datasetfolder', str(in_processes.parent)], capsys)
    assert 'a process that decodes images died, perhaps for lack of memory: start again' in error
    assert not files_beside_images(in_processes)


def kill_itself(recipe, paths):
    assert multiprocessing.parent_process(), 'this is the process of the test'
    os.kill(os.getpid(), signal.SIGKILL)
