"""Makes small image sets in the official file layouts."""

import gzip
import io
import pickle
import tarfile
import zipfile

import numpy as np
from PIL import Image

CIFAR10_TRAIN = [f'data_batch_{i}' for i in range(1, 6)]


def cifar_images(seed, n, num_classes):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 32, 32, 3), np.uint8), np.arange(n) % num_classes


def cifar10_record_files(n=4):
    """Returns CIFAR-10's binary files, {name: bytes}, and what they hold, {batch: (images, labels)}."""
    files, contents = {}, {}
    for i, name in enumerate([*CIFAR10_TRAIN, 'test_batch']):
        images, labels = cifar_images(i, n, 10)
        rows = images.transpose(0, 3, 1, 2).reshape(n, 3072)
        files[f'cifar-10-batches-bin/{name}.bin'] = np.column_stack([labels.astype(np.uint8), rows]).tobytes()
        contents[name] = images, labels
    return files, contents


def cifar100_record_files(n=200):
    files = {}
    for i, name in enumerate(['train', 'test']):
        images, labels = cifar_images(i, n, 100)
        rows = images.transpose(0, 3, 1, 2).reshape(n, 3072)
        head = np.column_stack([labels // 5, labels]).astype(np.uint8)
        files[f'cifar-100-binary/{name}.bin'] = np.column_stack([head, rows]).tobytes()
    return files


def cifar_pickle(images, labels, label_key=b'labels'):
    """Returns a batch pickled as by Python 2: protocol 2, byte strings as keys."""
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
    return pickle.dumps({b'data': rows, label_key: labels.tolist(), b'batch_label': b'made'}, protocol=2)


def write_tar(path, files):
    with tarfile.open(path, 'w:gz') as tar:
        for name, payload in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))


def write_files(folder, files):
    for name, payload in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(payload)


def idx(array):
    return b'\0\0\x08' + bytes([array.ndim]) + np.array(array.shape, '>u4').tobytes() + array.tobytes()


def write_idx_set(folder, num_train=20, num_test=10, compressed=True, pixels=28):
    """Writes MNIST's four files. Each image is black except for one white column, number 2 × label."""

    def of_labels(n):
        labels = np.arange(n) % 10
        images = np.zeros((n, pixels, pixels), np.uint8)
        images[np.arange(n), :, 2 * labels] = 255
        return images, labels

    write_idx_files(folder, of_labels(num_train), of_labels(num_test), compressed)


def write_idx_files(folder, train, test, compressed=True):
    """Writes MNIST's four files from pairs of grey images, uint8 [N, H, W] or [N, H, W, 1], and labels [N]."""
    folder.mkdir(parents=True)
    for prefix, (images, labels) in (('train', train), ('t10k', test)):
        images = images.reshape(images.shape[:3])
        labels = labels.astype(np.uint8)
        for name, array in ((f'{prefix}-images-idx3-ubyte', images), (f'{prefix}-labels-idx1-ubyte', labels)):
            if compressed:
                (folder / f'{name}.gz').write_bytes(gzip.compress(idx(array)))
            else:
                (folder / name).write_bytes(idx(array))


def jpeg(level, mode='RGB'):
    payload = io.BytesIO()
    Image.new(mode, (64, 64), level if mode == 'L' else (level, 0, 255 - level)).save(payload, 'JPEG')
    return payload.getvalue()


def write_tinyimagenet_zip(path, num_classes=200):
    """Writes the zip with one training and one validation image per class.

    The red channel is the number of the class. Every tenth image is grey.
    """
    classes = [f'n{i:08d}' for i in range(num_classes)]
    annotations = []
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('tiny-imagenet-200/wnids.txt', '\n'.join(classes))
        for i, name in enumerate(classes):
            mode = 'L' if i % 10 == 0 else 'RGB'
            archive.writestr(f'tiny-imagenet-200/train/{name}/images/{name}_0.JPEG', jpeg(i, mode))
            # the file names sort in another order than the classes
            archive.writestr(f'tiny-imagenet-200/val/images/val_{num_classes - i}.JPEG', jpeg(i, mode))
            annotations.append(f'val_{num_classes - i}.JPEG\t{name}\t0\t0\t62\t62')
        archive.writestr('tiny-imagenet-200/val/val_annotations.txt', '\n'.join(annotations))
        archive.writestr('tiny-imagenet-200/test/images/test_0.JPEG', jpeg(0))


def prepare_tfds(folder, channels=3, sizes=(8,), png=None):
    """Lets TFDS prepare a data set with 6 training and 3 test images of three classes.

    TFDS does not need TensorFlow for PNG files.

    Args:
        folder: TFDS's data_dir.
        channels: the channels of the images.
        sizes: heights in pixels, which the images cycle through. The width is 8.
        png: the bytes of one image file for all images. By default, image i has the level 10·i everywhere.
    """
    import tensorflow_datasets as tfds

    def image_file(i):
        if png is not None:
            return io.BytesIO(png)
        file = io.BytesIO()
        pixels = np.full((sizes[i % len(sizes)], 8, channels), 10 * i, np.uint8).squeeze()
        Image.fromarray(pixels).save(file, 'PNG')
        file.seek(0)
        return file

    class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version('1.0.0')

        def _info(self):
            image = tfds.features.Image(shape=(None, None, channels))
            features = tfds.features.FeaturesDict({'image': image, 'label': tfds.features.ClassLabel(num_classes=3)})
            return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=('image', 'label'))

        def _split_generators(self, manager):
            return {'train': self._generate_examples(6), 'test': self._generate_examples(3)}

        def _generate_examples(self, n):
            for i in range(n):
                yield i, {'image': image_file(i), 'label': i % 3}

    Toy(data_dir=folder, file_format='array_record').download_and_prepare()
