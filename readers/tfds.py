"""Reads image classification sets that TensorFlow Datasets (TFDS) prepared. Imports no code that a set names."""

import contextlib
import importlib.util
import io
import json
import math
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

import errors
from readers import files
from readers.files import DataError

_NAME = re.compile(r'[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*){0,2}')
_MOST_CLASSES = 1 << 16
_DEEPEST = 3  # levels of folders below NAME to search: configuration, version, one to spare


class Opened(NamedTuple):
    """A prepared data set: the builder of TFDS, and how to read an image and its label from a record."""

    builder: object
    features: object
    decoders: dict
    image_key: str
    label_key: str
    num_classes: int
    channels: int
    folder: Path


def open_set(name: str, folder: Path) -> Opened:
    """Opens the data set `name`, such as mnist or mnist/3.0.1, in the folder of the data sets. Raises DataError."""
    if not _NAME.fullmatch(name):
        raise DataError(f'tfds/{name}: {name!r} is not the name of a data set, such as mnist or mnist/3.0.1')
    try:
        import tensorflow_datasets as tfds
    except ModuleNotFoundError as error:
        raise DataError(f'tfds/{name}: {error.name} is not installed: run pip install -r requirements.txt') from error
    try:
        builder = _builder(tfds, name, folder)
        image_key, label_key = (builder.info.supervised_keys or ('image', 'label'))[:2]
        features = builder.info.features
        has_images = image_key in features and isinstance(features[image_key], tfds.features.Image)
        has_classes = label_key in features and isinstance(features[label_key], tfds.features.ClassLabel)
        if not (has_images and has_classes) or 'train' not in builder.info.splits:
            raise DataError(f'tfds/{name} is not an image classification set with a split "train"')
        num_classes, channels = features[label_key].num_classes, features[image_key].shape[-1]
        dtype = features[image_key].np_dtype
    except DataError:
        raise
    except Exception as error:  # TFDS has no error of its own for unknown names and damaged folders
        raise DataError(f'{folder / name} cannot be read by TFDS: {errors.first_line(error)}') from error
    if dtype != np.uint8 or channels not in _MODES:
        raise DataError(f'tfds/{name} has {dtype} images of {channels} channels, not uint8 images of 1 to 4 channels')
    if not num_classes or not 0 < num_classes <= _MOST_CLASSES:
        raise DataError(f'tfds/{name} has {num_classes} classes, not 1 to {_MOST_CLASSES}')
    wanted = tfds.features.FeaturesDict({key: features[key] for key in (image_key, label_key)})  # decodes no others
    decoders = {image_key: tfds.decode.SkipDecoding()}
    return Opened(builder, wanted, decoders, image_key, label_key, num_classes, channels, folder / name)


def _builder(tfds, name, folder):
    prepared = _prepared(folder, name)
    if prepared:
        newest = max(prepared, key=lambda path: path.stat().st_mtime).parent
        _require_harmless(newest)
        return tfds.builder_from_directory(newest)
    if importlib.util.find_spec('tensorflow') is None:
        raise DataError(
            f'{folder / name} holds no prepared data set, and TFDS needs tensorflow to prepare one: install it here, '
            f"or run tfds.builder('{name}', data_dir='{folder}', file_format='array_record').download_and_prepare() "
            'where it is installed'
        )
    builder = tfds.builder(name, data_dir=folder, file_format='array_record')
    builder.download_and_prepare()
    return builder


def _prepared(folder: Path, name: str) -> list[Path]:
    """Returns the dataset_info.json files of a data set. Does not follow links to folders below its folder."""
    found, top = [], folder / name
    for path, folders, names in os.walk(top):
        path = Path(path)
        if len(path.relative_to(top).parts) >= _DEEPEST:
            folders.clear()
        if 'dataset_info.json' in names:
            found.append(path / 'dataset_info.json')
    return found


# Checks of features.json, because TFDS imports the classes that it names.

_FEATURES = 'tensorflow_datasets.core.features.'
_ADMITTED = {
    f'{_FEATURES}{name}'
    for name in (
        'audio_feature.Audio', 'bounding_boxes.BBoxFeature', 'class_label_feature.ClassLabel',
        'dataset_feature.Dataset', 'feature.Tensor', 'features_dict.FeaturesDict', 'image_feature.Image',
        'labeled_image.LabeledImage', 'scalar.Scalar', 'sequence_feature.Sequence', 'tensor_feature.Tensor',
        'text_feature.Text', 'translation_feature.Translation', 'translation_feature.TranslationVariableLanguages',
        'video_feature.Video',
    )
}  # fmt: skip


def _require_harmless(folder):
    """Raises a DataError if a prepared folder holds a pipe or device, or names a class that is not part of TFDS."""
    for entry in os.scandir(folder):
        if not (entry.is_file() or entry.is_dir()):
            raise DataError(f'{entry.path} is not a regular file')
    path = folder / 'features.json'
    with files.one_error(path):
        _require_known_classes(path, json.loads(files.read_text(path)))


def _require_known_classes(path, value):
    """Raises a DataError if a part of features.json, in any format of TFDS, names a class that is not in _ADMITTED."""
    if isinstance(value, list):
        for inner in value:
            _require_known_classes(path, inner)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key in ('pythonClassName', 'python_class_name', 'type') and isinstance(inner, str):
                if inner not in _ADMITTED:
                    raise DataError(f'{path} names the class {inner[:100]!r}, which is not part of TFDS: not imported')
            elif key == 'content' and isinstance(inner, str):  # older versions wrote JSON within JSON
                _require_known_classes(path, json.loads(inner))
            else:
                _require_known_classes(path, inner)


# Reading.

_MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}


def read(opened: Opened, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images, uint8 [N, H, W, C], and the labels, int32 [N], of a split. Raises DataError.

    The split 'test' is the validation split if the data set has no test split.
    """
    builder, folder = opened.builder, opened.folder
    splits = [s for s in ((split,) if split == 'train' else ('test', 'validation')) if s in builder.info.splits]
    if not splits:
        raise DataError(f'{builder.info.full_name} has neither a split "test" nor "validation"')
    if getattr(builder.info.file_format, 'value', None) != 'array_record':
        raise DataError(f"{builder.info.full_name} was not prepared with file_format='array_record'")
    source, num_bytes = _records(builder, splits[0], folder)
    with warnings.catch_warnings():
        warnings.simplefilter('error', Image.DecompressionBombWarning)
        height, width = _image(opened, source, 0)[0].size[::-1]
        shape = (height, width, opened.channels)
        files.require_within_budget(folder, len(source) * math.prod(shape), num_bytes)
        images, labels = np.empty((len(source), *shape), np.uint8), np.empty(len(source), np.int32)

        def decode(i):
            image, label = _image(opened, source, i)
            if image.size != (width, height):
                sizes = f'{shape} and {(*image.size[::-1], opened.channels)}'
                raise DataError(f'{builder.info.full_name} has images of different sizes, {sizes}: one size is needed')
            with _damage_of(folder, i):
                images[i] = np.asarray(image.convert(_MODES[opened.channels])).reshape(shape)
                labels[i] = label

        _for_each(decode, len(source))
    return images, files.checked_labels(labels, opened.num_classes, builder.info.full_name)


def _records(builder, split, folder):
    """Returns the undecoded records of a split, and the size of its files in bytes. Raises DataError."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordReader

    num_bytes = 0
    try:
        for shard in builder.info.splits[split].file_instructions:
            if Path(shard.filename).parent != Path(builder.data_dir):
                raise DataError(f'{builder.data_dir} names files in other folders: {shard.filename[:200]}')
            with files.opened(shard.filename) as file:
                num_bytes += os.fstat(file.fileno()).st_size
            reader = ArrayRecordReader(shard.filename)
            held = reader.num_records()
            reader.close()
            if shard.skip or shard.take != held:
                raise DataError(f'{shard.filename} is damaged: it holds {held} records instead of {shard.take}')
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        source = builder.as_data_source(split, deserialize_method=raw)
        if not len(source):
            raise DataError(f'{builder.info.full_name} has an empty split "{split}"')
    except DataError:
        raise
    except Exception as error:  # TFDS and array_record raise many kinds for damaged files
        reason = errors.first_line(error)
        raise DataError(f'{folder}: its split "{split}" is empty or damaged: {reason}') from error
    return source, num_bytes


def _image(opened, source, i):
    """Returns an image, whose pixels are not decoded yet, and its label. Raises DataError."""
    with _damage_of(opened.folder, i):
        example = opened.features.deserialize_example_np(source[i], decoders=opened.decoders)
        image = Image.open(io.BytesIO(example[opened.image_key]), formats=('PNG', 'JPEG'))
        if image.mode not in ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA'):
            raise ValueError(f'its pixels are {image.mode}, not 8 bits per channel')
        return image, example[opened.label_key]


@contextlib.contextmanager
def _damage_of(folder, i):
    try:
        yield
    except Exception as error:  # TFDS, array_record and Pillow raise many kinds for damaged files
        raise DataError(f'{folder}: image {i} is damaged: {errors.first_line(error)}') from error


def _for_each(decode, num_images):
    """Calls decode(i) for every image, on all cores, with a progress bar."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        calls = pool.map(decode, range(num_images))
        for _ in tqdm(calls, 'decoding', num_images, unit=' images', leave=False, disable=None):
            pass
