"""Folders of images: layouts, kinds of images, the cache, and errors that name the file."""

import io
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from children import ROOT
from readers import decoded, decoding, image_folder
from readers.files import DataError


def picture(seed, mode='RGB', size=(10, 12)):
    """Returns an image of smooth random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 3, 4), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert('RGB').convert(mode)


def save(path, image, **options):
    """Writes an image, or bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, bytes):
        path.write_bytes(image)
    else:
        image.save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    """Returns a folder with two classes, cat and dog, of two training images and a test image each."""
    for i, name in enumerate(['train/cat/1.png', 'train/cat/2.jpg', 'train/dog/1.png', 'train/dog/2.bmp']):
        save(tmp_path / 'pets' / name, picture(i))
    for i, name in enumerate(['test/cat/1.png', 'test/dog/1.png']):
        save(tmp_path / 'pets' / name, picture(i + 4))
    return tmp_path / 'pets'


def read(folder, split='train', image_size=None):
    opened = image_folder.open_set(folder, image_size, folder.parent / 'cache')
    return image_folder.read(opened, split)


def read_one(path, image, **options):
    """Returns an image, uint8 [H, W, 3], that is alone in a set."""
    save(path / 'set' / 'train' / 'a' / options.pop('name'), image, **options)
    return read(path / 'set')[0][0]


def plain(path):
    """Returns what Pillow decodes, uint8 [H, W, 3]."""
    with Image.open(path) as image:
        return np.asarray(image.convert('RGB'))


def error_of(function, *arguments):
    with pytest.raises(DataError) as error:
        function(*arguments)
    assert '\n' not in str(error.value)
    return str(error.value)


def caches(folder):
    return sorted(path.name for path in (folder.parent / 'cache').iterdir())


# Layouts.


def test_train_and_test(folder):
    """The images are mapped read-only, and equal what Pillow decodes."""
    opened = image_folder.open_set(folder, None, folder.parent / 'cache')
    assert opened.class_names == ('cat', 'dog')
    for split, labels, paths in (
        ('train', [0, 0, 1, 1], ['cat/1.png', 'cat/2.jpg', 'dog/1.png', 'dog/2.bmp']),
        ('test', [0, 1], ['cat/1.png', 'dog/1.png']),
    ):
        images, found = image_folder.read(opened, split)
        assert isinstance(images, np.memmap) and not images.flags.writeable
        assert images.dtype == np.uint8 and found.dtype == np.int32
        np.testing.assert_array_equal(images, [plain(folder / split / path) for path in paths])
        np.testing.assert_array_equal(found, labels)


def test_val_is_the_test_split(folder):
    expected = read(folder, 'test')
    (folder / 'test').rename(folder / 'val')
    for found, array in zip(read(folder, 'test'), expected, strict=True):
        np.testing.assert_array_equal(found, array)
    save(folder / 'test' / 'dog' / '1.png', picture(9))  # counts, now that both exist
    np.testing.assert_array_equal(read(folder, 'test')[1], [1])


def test_classes_without_splits(folder):
    expected = read(folder)
    for name in ('cat', 'dog'):
        (folder / 'train' / name).rename(folder / name)
    (folder / 'train').rmdir()
    assert error_of(read, folder) == f'{folder} has a folder test, but no folder train'
    (folder / 'test').rename(folder.parent / 'elsewhere')
    for found, array in zip(read(folder), expected, strict=True):
        np.testing.assert_array_equal(found, array)
    no_test = f'{folder} has no folder test or val: train with --validation 0.1, and evaluate with --split validation'
    assert error_of(read, folder, 'test') == no_test


def test_no_test_split(folder):
    (folder / 'test').rename(folder.parent / 'elsewhere')
    assert len(read(folder)[0]) == 4
    assert 'has no folder test or val: train with --validation 0.1' in error_of(read, folder, 'test')


def test_what_belongs_to_a_class(folder):
    """Folders within a class belong to it. Hidden and other files do not. Suffixes have any case."""
    for name in ('.hidden.png', 'notes.txt', 'png', '.thumbnails/1.png', 'readme'):
        save(folder / 'train' / 'cat' / name, b'no image')
    save(folder / 'train' / '.cache' / '1.png', b'no image')
    save(folder / 'train' / 'loose.png', b'no image')
    for name in ('a/b/1.png', 'a/2.PNG', 'z.JPEG', '0.TiFF'):
        save(folder / 'train' / 'cat' / name, picture(0))
    opened = image_folder.open_set(folder, None, folder.parent / 'cache')
    paths, labels = opened.files['train']
    names = ['0.TiFF', '1.png', '2.jpg', 'a/2.PNG', 'a/b/1.png', 'z.JPEG']
    assert paths[:6] == [str(folder / 'train' / 'cat' / name) for name in names]
    np.testing.assert_array_equal(labels, [0] * 6 + [1] * 2)
    assert len(image_folder.read(opened, 'train')[0]) == 8


def test_links(folder):
    """Links are followed. A folder is visited once, so circles end, and a class holds no images of the others."""
    elsewhere = save(folder.parent / 'elsewhere' / '7.png', picture(7)).parent
    cat = folder / 'train' / 'cat'
    (cat / 'link').symlink_to(elsewhere)
    (cat / 'linked.png').symlink_to(elsewhere / '7.png')
    for name, target in (('again', 'link'), ('self', '.'), ('up', '..'), ('top', '/')):
        (cat / name).symlink_to(target)
    (elsewhere / 'back').symlink_to(cat)
    (folder / 'train' / 'bird').symlink_to(elsewhere)
    opened = image_folder.open_set(folder, None, folder.parent / 'cache')
    assert opened.class_names == ('bird', 'cat', 'dog')
    paths, labels = opened.files['train']
    assert paths[labels.tolist().index(1) :] == [
        str(folder / 'train' / name)
        for name in ('cat/1.png', 'cat/2.jpg', 'cat/link/7.png', 'cat/linked.png', 'dog/1.png', 'dog/2.bmp')
    ]


@pytest.mark.parametrize(
    ('link', 'listed'), [('pets/train/cat/a.png', 'pets'), ('pets/train/a', 'pets'), ('a', 'a')]
)  # fmt: skip
def test_endless_link(link, listed, folder):
    path = folder.parent / link
    path.symlink_to(path.name)
    assert error_of(read, folder.parent / listed) == f'{path} cannot be read: Too many levels of symbolic links'


def test_names_that_are_not_utf_8(folder):
    """The path and the file names may have any bytes. The names of classes must be text."""
    expected = read(folder)[0]
    strange = folder.parent / os.fsdecode(b'p\xffts\n')
    folder.rename(strange)
    (strange / 'train' / 'cat' / '2.jpg').rename(strange / 'train' / 'cat' / os.fsdecode(b'\xfe\n.jpg'))
    (strange / 'train' / 'cat' / '1.png').rename(strange / 'train' / 'cat' / '1\x1b.png')
    np.testing.assert_array_equal(read(strange)[0][[1, 0]], expected[[1, 0]])
    assert all(name.startswith('p_ts_') for name in caches(folder) if 'pets' not in name)
    (strange / 'train' / 'cat' / '1\x1b.png').write_bytes(b'no image')
    assert r'p\udcffts\n/train/cat/1\x1b.png is damaged' in error_of(read, strange)


@pytest.mark.parametrize('name', ['a\nb', 'a\x1b[31m', 'a\x7f', 'a\u202eb', os.fsdecode(b'\xff')])
def test_class_names_are_printable(name, folder):
    (folder / 'train' / 'dog').rename(folder / 'train' / name)
    escaped = name.encode('unicode_escape').decode()
    message = 'the name of a class must be printable text, so rename the folder'
    assert error_of(read, folder) == f'{folder}/train/{escaped}: {message}'


@pytest.mark.parametrize('name', ['Ærø', '猫', 'a b', "it's", '$(x)'])
def test_other_class_names(name, folder):
    for split in ('train', 'test'):
        (folder / split / 'dog').rename(folder / split / name)
    assert name in image_folder.open_set(folder, None, folder.parent / 'cache').class_names


# Errors of layout.


def test_unknown_class_in_the_test_split(folder):
    (folder / 'test' / 'dog').rename(folder / 'test' / 'fox')
    assert error_of(read, folder) == f'{folder}/test/fox: {folder}/train has no such class'


def test_class_without_test_images(folder):
    (folder / 'test' / 'cat').rename(folder.parent / 'elsewhere')
    np.testing.assert_array_equal(read(folder, 'test')[1], [1])


@pytest.mark.parametrize('split', ['train', 'test'])
def test_empty_class(split, folder):
    for path in (folder / split / 'dog').iterdir():
        path.rename(path.with_suffix('.txt'))
    suffixes = '.png, .jpg, .jpeg, .bmp, .gif, .tif, .tiff, .webp, .ppm, .pgm'
    message = f'{folder}/{split}/dog holds no images: add some ({suffixes}) or remove the folder'
    assert error_of(read, folder) == message


def test_no_images_at_all(folder):
    (folder / 'empty').mkdir()
    (folder / 'file').touch()
    (folder / 'flat').mkdir()
    save(folder / 'flat' / '1.png', picture(0))
    expected = 'holds no images: train/CLASS/IMAGE.png and test/CLASS/IMAGE.png are expected in it'
    assert error_of(read, folder / 'empty') == f'{folder}/empty {expected}'
    assert error_of(read, folder / 'flat') == f'{folder}/flat {expected}'
    assert error_of(read, folder / 'file') == f'{folder}/file cannot be read: Not a directory'
    assert error_of(read, folder / 'none') == f'{folder}/none cannot be read: No such file or directory'
    assert 'a\\x00b is not a valid path' in error_of(read, folder / 'a\0b')
    (folder / 'test' / 'cat').rename(folder / 'empty' / 'cat')
    (folder / 'test' / 'dog').rename(folder / 'empty' / 'dog')
    assert error_of(read, folder) == f'{folder}/test holds no folders of classes'


@pytest.mark.parametrize('name', ['3.png', 'pipe'])
@pytest.mark.parametrize('make', [os.mkfifo, lambda path: path.symlink_to('/dev/zero'), lambda p: p.symlink_to('none')])
def test_no_regular_file(make, name, folder):
    path = folder / 'train' / 'cat' / 'within' / name
    path.parent.mkdir()
    make(path)
    assert error_of(read, folder) == f'{path} is not a regular file'


# Kinds of images.


@pytest.mark.parametrize(
    ('name', 'mode', 'options'),
    [
        *((name, 'RGB', {}) for name in ('1.png', '1.jpg', '1.bmp', '1.gif', '1.tif', '1.webp', '1.ppm')),
        *((name, 'L', {}) for name in ('1.png', '1.jpeg', '1.bmp', '1.gif', '1.tiff', '1.webp', '1.pgm')),
        *((name, '1', {}) for name in ('1.png', '1.tif', '1.bmp')),
        *((name, 'P', {}) for name in ('1.png', '1.gif', '1.bmp')),
        *((name, 'CMYK', {}) for name in ('1.jpg', '1.tif')),
        ('1.tif', 'YCbCr', {}),
        ('1.png', 'P', {'transparency': bytes(range(0, 250, 10))}),
        ('1.gif', 'P', {'transparency': 3}),
        ('1.png', 'L', {'transparency': 3}),
        ('1.png', 'RGB', {'transparency': (0, 0, 0)}),
        ('1.jpg', 'RGB', {'progressive': True, 'quality': 30}),
        ('1.png', 'RGB', {'format': 'JPEG'}),
        ('1.jpg', 'P', {'format': 'PNG'}),
        ('1.pgm', 'RGB', {'format': 'WEBP', 'lossless': True}),
    ],
)
@pytest.mark.filterwarnings('ignore:Palette images with Transparency')
def test_kinds_of_images(name, mode, options, tmp_path):
    """The content of a file says what it is, not its suffix. Transparent pixels keep their colours."""
    found = read_one(tmp_path, picture(0, mode), name=name, **options)
    np.testing.assert_array_equal(found, plain(tmp_path / 'set' / 'train' / 'a' / name))
    if mode in ('L', '1'):
        assert (found == found[..., :1]).all()


@pytest.mark.parametrize(('name', 'mode'), [('1.png', 'LA'), ('1.png', 'RGBA'), ('1.webp', 'RGBA'), ('1.tif', 'RGBA')])
def test_hidden_colours_show(name, mode, tmp_path):
    image = picture(0, mode)
    expected = np.asarray(image.convert('RGB'))
    image.putalpha(0)
    options = {'lossless': True, 'exact': True} if name == '1.webp' else {}
    np.testing.assert_array_equal(read_one(tmp_path, image, name=name, **options), expected)


def tiff(levels, bits, photometric):
    """Returns an uncompressed TIFF of grey levels, uint16 [H, W] in the order of bytes of the file."""
    order, mark = ('>', b'MM\0*') if levels.dtype.str[0] == '>' else ('<', b'II*\0')
    shorts = {258: bits, 259: 1, 262: photometric, 277: 1}
    height, width = levels.shape
    longs = {256: width, 257: height, 273: 8 + 2 + 9 * 12 + 4, 278: height, 279: levels.nbytes}
    entries = [struct.pack(f'{order}HHIHH', tag, 3, 1, value, 0) for tag, value in shorts.items()]
    entries += [struct.pack(f'{order}HHII', tag, 4, 1, value) for tag, value in longs.items()]
    entries.sort(key=lambda entry: struct.unpack(f'{order}H', entry[:2]))
    return mark + struct.pack(f'{order}IH', 8, 9) + b''.join(entries) + bytes(4) + levels.tobytes()


LEVELS = np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize(
    ('name', 'image'),
    [
        ('1.png', Image.fromarray(LEVELS)),
        ('1.tif', Image.fromarray(LEVELS)),
        ('1.tif', tiff(LEVELS.astype('<u2'), 16, 1)),
        ('1.tif', tiff(LEVELS.astype('>u2'), 16, 1)),
        ('1.pgm', b'P5 256 256 65535\n' + LEVELS.astype('>u2').tobytes()),
    ],
    ids=['png', 'tiff', 'little', 'big', 'pgm'],
)
def test_16_bits(name, image, tmp_path):
    """65535 becomes 255. Pillow's convert clips all levels above 255."""
    expected = np.round(LEVELS / 65535 * 255)
    found = read_one(tmp_path, image, name=name)
    np.testing.assert_array_equal(found, np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ('name', 'image', 'mode'),
    [
        ('1.tif', Image.new('I', (8, 8)), 'I'),
        ('1.tif', Image.new('F', (8, 8)), 'F'),
        ('1.ppm', Image.new('F', (8, 8)), 'F'),
        ('1.tif', Image.new('LAB', (8, 8)), 'LAB'),
        ('1.tif', tiff(np.zeros((8, 6), '<u2'), 12, 1), 'I;16'),
        ('1.tif', tiff(np.zeros((8, 8), '<u2'), 16, 0), 'I;16'),
    ],
    ids=['32 bits', 'floats', 'floats of ppm', 'LAB', '12 bits', '0 is white'],
)
def test_unsuitable_pixels(name, image, mode, tmp_path):
    message = f"has pixels of Pillow's mode {mode}: save it as RGB with 8 bits per channel"
    error = error_of(lambda: read_one(tmp_path, image, name=name))
    assert error == f'{tmp_path}/set/train/a/{name} {message}'


@pytest.mark.parametrize('name', ['1.gif', '1.png', '1.tif', '1.webp'])
def test_several_frames(name, tmp_path):
    error = error_of(
        lambda: read_one(tmp_path, picture(0), name=name, save_all=True, append_images=[picture(1), picture(2)])
    )
    message = 'has several frames or pages: save one of them as an image of its own'
    assert error == f'{tmp_path}/set/train/a/{name} {message}'


def test_photograph_with_previews(tmp_path):
    """Cameras write MPO files, which are JPEGs that more JPEGs follow."""
    options = {'format': 'MPO', 'save_all': True, 'append_images': [picture(1, size=(4, 4))]}
    found = read_one(tmp_path, picture(0), name='1.jpg', **options)
    with Image.open(tmp_path / 'set' / 'train' / 'a' / '1.jpg') as image:
        assert image.format == 'MPO' and image.n_frames == 2
        np.testing.assert_array_equal(found, np.asarray(image))


@pytest.mark.parametrize('name', ['1.jpg', '1.png', '1.webp', '1.tif'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation(orientation, name, tmp_path):
    """The sizes of all images agree once they are turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture(0) if orientation < 5 else picture(0).transpose(Image.Transpose.TRANSPOSE)
    save(tmp_path / 'set' / 'train' / 'a' / '0.png', picture(1))
    path = save(tmp_path / 'set' / 'train' / 'a' / name, stored, exif=exif)
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image)
    assert expected.size == (10, 12)
    np.testing.assert_array_equal(read(tmp_path / 'set')[0][1], expected)
    fitted = ImageOps.fit(expected.convert('RGB'), (6, 6), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(read(tmp_path / 'set', image_size=6)[0][1], fitted)


def test_damaged_metadata_do_not_matter(tmp_path):
    image = picture(0)
    expected = read_one(tmp_path, image, name='1.jpg')
    found = read_one(tmp_path, image, name='1.jpg', exif=b'Exif\0\0no TIFF header')
    np.testing.assert_array_equal(found, expected)


# Sizes.


@pytest.mark.parametrize('size', [(10, 12), (31, 17), (5, 40), (6, 6), (1, 1)])
def test_resized_and_cropped(size, folder):
    """The shorter side becomes 6 pixels long, and the centre is taken."""
    save(folder / 'train' / 'cat' / '2.jpg', picture(0, size=size))
    found = read(folder, image_size=6)[0]
    assert found.shape == (4, 6, 6, 3)
    image = Image.fromarray(plain(folder / 'train' / 'cat' / '2.jpg'))
    np.testing.assert_array_equal(found[1], ImageOps.fit(image, (6, 6), Image.Resampling.BILINEAR))


def test_different_sizes(folder):
    """Both files are named, also if they are in different splits."""
    first = folder / 'train' / 'cat' / '1.png'
    for split, name in (('test', 'dog/1.png'), ('train', 'dog/2.bmp')):
        other = save(folder / split / name, picture(0, size=(12, 10)))
        message = f'{other} has 12×10 pixels, and {first} has 10×12: add --imagesize N'
        assert error_of(read, folder, split) == message
    assert not caches(folder)


def test_other_sizes_are_not_decoded(folder, monkeypatch):
    save(folder / 'train' / 'dog' / '2.bmp', picture(0, size=(11, 12)))
    opened = image_folder.open_set(folder, None, folder.parent / 'cache')
    recipe = decoding.Recipe(12, 10, reference='other')
    monkeypatch.setattr(Image.Image, 'load', None)
    assert 'has 11×12 pixels' in error_of(decoded.decode, recipe, opened.files['train'][0][3:], None)


def test_blocks_are_bounded():
    """A block has at most 16 MiB, or one image. Blocks of images that are resized are shorter."""
    lengths = {(64, False): 500, (64, True): 50, (224, False): 111, (1024, True): 5, (9000, False): 1}
    for (size, fit), length in lengths.items():
        assert decoding.block_length(size, size, fit) == length


# Damage.


@pytest.mark.parametrize('image_size', [None, 6])
@pytest.mark.parametrize('name', ['1.png', '1.jpg', '1.bmp', '1.gif', '1.tif', '1.webp', '1.ppm'])
def test_truncated_files(name, image_size, tmp_path):
    path = save(tmp_path / 'set' / 'train' / 'a' / name, picture(0))
    for share in (0.9, 0.5):
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        assert f'{path} is damaged (' in error_of(read, tmp_path / 'set', 'train', image_size)


@pytest.mark.parametrize('content', [b'', b'no image', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n'])
def test_no_image(content, folder):
    """Pillow could open PostScript and other formats, but is not asked to."""
    path = save(folder / 'train' / 'dog' / '1.png', content)
    message = f'{path} is damaged (it does not start like JPEG or PNG or BMP or GIF or TIFF or WEBP or PPM)'
    assert error_of(read, folder) == message


def test_huge_image(folder):
    file = io.BytesIO()
    Image.new('1', (9500, 9500)).save(file, 'PNG')
    path = save(folder / 'train' / 'dog' / '1.png', file.getvalue())
    assert f'{path} is damaged (Image size (90250000 pixels) exceeds limit' in error_of(read, folder, 'train', 6)


def test_file_that_disappears(folder):
    opened = image_folder.open_set(folder, None, folder.parent / 'cache')
    (folder / 'train' / 'cat' / '2.jpg').unlink()
    assert error_of(image_folder.read, opened, 'train') == (
        f'{folder}/train/cat/2.jpg cannot be read: No such file or directory'
    )


# The cache.


@pytest.mark.parametrize('image_size', [None, 6])
def test_later_starts_decode_nothing(image_size, folder, monkeypatch):
    expected = read(folder, 'train', image_size), read(folder, 'test', image_size)
    assert len(caches(folder)) == 2
    monkeypatch.setattr(Image, 'open', None)
    for split, arrays in zip(('train', 'test'), expected, strict=True):
        for found, array in zip(read(folder, split, image_size), arrays, strict=True):
            np.testing.assert_array_equal(found, array)


def touch(folder):
    os.utime(folder / 'train' / 'dog' / '1.png', ns=(0, 1))


def replace(folder):
    save(folder / 'train' / 'dog' / '1.png', picture(9))


def replace_at_the_same_time(folder):
    path = folder / 'train' / 'dog' / '1.png'
    before = path.stat()
    replace(folder)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def rename(folder):
    (folder / 'train' / 'dog' / '1.png').rename(folder / 'train' / 'dog' / '3.png')


def remove(folder):
    (folder / 'train' / 'dog' / '1.png').unlink()


@pytest.mark.parametrize('change', [touch, replace, replace_at_the_same_time, rename, remove])
def test_changed_files_are_decoded_again(change, folder):
    """The earlier cache of the split is deleted. The cache of the other split stays."""
    for split in ('train', 'test'):
        read(folder, split)
    before = caches(folder)
    change(folder)
    images, _ = read(folder)
    paths, _ = image_folder.open_set(folder, None, folder).files['train']
    np.testing.assert_array_equal(images, [plain(path) for path in paths])
    assert len(caches(folder)) == 2 and len(set(caches(folder)) & set(before)) == 1


def test_other_size_is_decoded_again(folder):
    names = set()
    for image_size, height in ((6, 6), (None, 12), (7, 7)):
        assert read(folder, 'train', image_size)[0].shape[1] == height
        names |= set(caches(folder))
    assert len(names) == 3 and len(caches(folder)) == 1


def test_test_images_depend_on_the_size_of_training_images(folder):
    read(folder, 'test')
    for path in (folder / 'train').rglob('*.*'):
        save(path, picture(0, size=(9, 9)))
    assert 'has 10×12 pixels, and ' in error_of(read, folder, 'test')


def test_folders_of_the_same_name(folder):
    """Each has a cache of its own. Links to a folder share it."""
    other = folder.parent / 'other' / 'pets'
    save(other / 'train' / 'cat' / '1.png', picture(9))
    (folder.parent / 'link').symlink_to(folder)
    for _ in range(2):
        read(folder)
        read(folder.parent / 'link')
        image_folder.read(image_folder.open_set(other, None, folder.parent / 'cache'), 'train')
    assert len(caches(folder)) == 2


@pytest.mark.parametrize('where', [0, 70, 200, -1])
def test_damaged_cache_is_made_again(where, folder):
    expected = np.array(read(folder)[0])
    (name,) = caches(folder)
    cache = folder.parent / 'cache' / name
    payload = bytearray(cache.read_bytes())
    payload[where] ^= 1
    cache.write_bytes(payload)
    np.testing.assert_array_equal(read(folder)[0], expected)
    payload[where] ^= 1
    assert cache.read_bytes() == payload
    for header in (b'', b'(' * 9000, b"\x93NUMPY\x01\0\x40\0{'descr': '|u1', 'fortran_order': False, 'shape': (4,), }"):
        cache.write_bytes(header + payload[len(header) :])
        np.testing.assert_array_equal(read(folder)[0], expected)


def test_cache_that_cannot_be_written(folder, capsys):
    """One line is printed, and the images stay in memory."""
    expected = read(folder)[0]
    (folder.parent / 'file').touch()
    for _ in range(2):
        opened = image_folder.open_set(folder, None, folder.parent / 'file')
        images, _ = image_folder.read(opened, 'train')
        assert not isinstance(images, np.memmap)
        np.testing.assert_array_equal(images, expected)
        error = capsys.readouterr().err
        assert error.count('\n') == 1 and error.startswith(f'{folder.parent}/file/pets-')
        assert error.endswith(' could not be written (File exists): images are decoded at every start\n')


def test_nothing_is_written_to_the_images(folder, capsys):
    """Neither into their folder nor through a link to it."""
    before = sorted(folder.rglob('*'))
    (folder.parent / 'link').symlink_to(folder)
    for cache_folder in (folder, folder / 'decoded', folder.parent / 'link' / 'decoded'):
        images, _ = image_folder.read(image_folder.open_set(folder, None, cache_folder), 'train')
        assert len(images) == 4 and sorted(folder.rglob('*')) == before
        assert f'could not be written (nothing is written to {folder})' in capsys.readouterr().err


def test_another_process_deletes_the_cache(folder, monkeypatch):
    """Another process that reads the folder in another size deletes the file as soon as it has its name."""
    expected = np.array(read(folder)[0])
    touch(folder)

    def replaced_and_deleted(source, target):
        os.rename(source, target)
        target.unlink()

    monkeypatch.setattr(os, 'replace', replaced_and_deleted)
    images, _ = read(folder)
    np.testing.assert_array_equal(images, expected)


OWN_SCRIPT = """
import sys, pathlib
sys.path.insert(0, {root!r})
from readers import decoding, image_folder
decoding.BLOCK = 10  # a tenth in each block
folder = pathlib.Path(sys.argv[1])
images, _ = image_folder.read(image_folder.open_set(folder, 6, folder.parent / 'cache'), 'train')
print(images.sum())
with decoding.decoders(3) as pool:
    print(*decoding.submit(pool, eval, "sorted(__import__('sys').modules)").result())
"""


def test_two_processes_at_the_same_time(folder):
    """Both start processes that decode, and write the same cache.

    The processes that decode import neither JAX nor the main script, which has no guard and would print more lines.
    """
    script = save(folder.parent / 'own.py', OWN_SCRIPT.format(root=str(ROOT)).encode())
    command = [sys.executable, script, folder]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    for process in running:
        output, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        total, modules = output.decode().splitlines()
        assert int(total) == read(folder, 'train', 6)[0].sum()
        assert 'readers.decoding' in modules.split()
        assert not {'jax', 'data', 'readers.image_folder', 'PIL.EpsImagePlugin'} & set(modules.split())
    assert len(caches(folder)) == 1
