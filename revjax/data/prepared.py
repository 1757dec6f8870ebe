"""Reading data sets that lie prepared in tensorflow-datasets' array_record layout."""

import contextlib
import os
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf import json_format
from tensorflow_datasets.core import constants, read_only_builder

from revjax.data.dataset import DataError, Dataset, DatasetInfo
from revjax.data.png import decode_unfiltered

_RECORDS_A_READ = 4096


def data_directory(data_dir: str | None) -> pathlib.Path:
    """Where prepared data sets lie: the folder given, or tensorflow-datasets' default for None.

    Raises:
        DataError: where it is not a local folder.
    """
    directory = data_dir or constants.DATA_DIR
    if "://" in directory:
        raise DataError(
            f"{directory} is not a local folder, and others cannot be read without TensorFlow: "
            "copy it to this machine and name the copy with --config.data.dir=DIR."
        )
    return pathlib.Path(directory).expanduser()


def find_prepared(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """The builder of any data set that is prepared under `data_dir`, made from its files alone.

    Args:
        name: a name of tensorflow-datasets, such as "mnist" or "emnist/balanced".
        data_dir: as `data_directory` takes it.

    Raises:
        DataError: where the name is unknown, or was never prepared there; then with the command
            that prepares it.
    """
    directory = data_directory(data_dir)
    unknown = DataError(
        f"there is no data set {name!r}: the names are digits, cifar10, cifar100, svhn_cropped, "
        "svhn_cropped+extra and those of the image-classification sets that tensorflow-datasets "
        f"has prepared in {directory}."
    )
    if not re.fullmatch(r"\w+(/[\w.-]+)?", name):
        raise unknown
    try:
        with damage_is_data_error(directory / name):
            return read_only_builder.builder_from_files(name, data_dir=os.fspath(directory))
    except tfds.core.DatasetNotFoundError as error:
        if name.partition("/")[0] not in tfds.list_builders(with_community_datasets=False):
            raise unknown from error
        raise DataError(
            f"{name} was looked for in {directory} and was never prepared there: prepare it once "
            "where TensorFlow is installed, with python -c 'import tensorflow_datasets as tfds; "
            f'tfds.builder("{name}", data_dir="{directory}").download_and_prepare('
            'file_format="array_record")\'.'
        ) from error


def open_prepared(directory: pathlib.Path) -> tfds.core.DatasetBuilder:
    """The builder of the data set that is prepared in a folder, which is DATA_DIR/NAME/VERSION.

    Raises:
        DataError: where the folder's metadata are missing or damaged.
    """
    with damage_is_data_error(directory):
        return tfds.builder_from_directory(directory)


def check_array_record(builder: tfds.core.DatasetBuilder) -> None:
    """Refuses what is prepared in a file format that needs TensorFlow.

    Raises:
        DataError: where that is so.
    """
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise DataError(
            f"{builder.name} is prepared in {builder.data_path} as {', '.join(sorted(formats))}, "
            "where array_record is due, which can be read without TensorFlow: choose another "
            "folder with --config.data.dir=DIR, or delete this one."
        )


def prepared_info(builder: tfds.core.DatasetBuilder) -> DatasetInfo:
    """The sizes of a prepared data set, from its metadata.

    Raises:
        DataError: where it is not in array_record, has no train and test split, or is not uint8
            images of one shape, each with a class.
    """
    check_array_record(builder)
    name, place, splits = builder.name, builder.data_path, builder.info.splits
    if not {"train", "test"} <= set(splits):
        raise DataError(
            f"{name} in {place} has the splits {', '.join(splits)}, where train and test are due: "
            "choose another set."
        )
    (_, image), (_, label) = supervised(builder)
    if image.np_dtype != np.uint8 or None in image.shape:
        raise DataError(
            f"{name} in {place} has {np.dtype(image.np_dtype)} images of shape {image.shape}, "
            "where uint8 of one shape for all is due: choose another set."
        )
    sizes = splits["train"].num_examples, splits["test"].num_examples
    return DatasetInfo(image.shape, label.num_classes, *sizes)


def read_prepared(name: str, builder: tfds.core.DatasetBuilder, *, train: str = "train") -> Dataset:
    """Reads a prepared data set into memory, its examples in the order in which they are stored.

    Args:
        name: the name that the result carries.
        builder: from `open_prepared` or `find_prepared`.
        train: the training split, or several that are joined, in that order: "train+extra".

    Raises:
        DataError: as `prepared_info`, and where records are missing or damaged.
    """
    info = prepared_info(builder)
    with damage_is_data_error(builder.data_path):
        train_images, train_labels = _read_split(builder, train, info)
        test_images, test_labels = _read_split(builder, "test", info)
    return Dataset(name, train_images, train_labels, test_images, test_labels, info.num_classes)


@contextlib.contextmanager
def damage_is_data_error(directory: os.PathLike | str) -> Iterator[None]:
    """Turns what tensorflow-datasets raises on damaged files into a `DataError`."""
    try:
        yield
    except tfds.core.DatasetNotFoundError:
        raise  # nothing is there, so nothing is damaged
    except (OSError, RuntimeError, ValueError, LookupError, zlib.error, json_format.Error) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"what is prepared in {os.fspath(directory)} is damaged ({type(error).__name__}: "
            f"{reason}): delete that folder and start again."
        ) from error


def supervised(builder: Any) -> list[tuple[str, Any]]:
    """The names and features of a set's image and of its class.

    Raises:
        DataError: where it is supervised by anything else.
    """
    keys = builder.info.supervised_keys or ()
    pair = [(key, builder.info.features[key]) for key in keys if isinstance(key, str)]
    if [type(feature) for _, feature in pair] != [tfds.features.Image, tfds.features.ClassLabel]:
        raise DataError(
            f"{builder.name} in {builder.data_path} is supervised by {keys}, where an image and "
            "its class are due: choose an image-classification set."
        )
    return pair


def _read_split(builder: Any, split: str, info: DatasetInfo) -> tuple[np.ndarray, np.ndarray]:
    (image_key, image), (label_key, _) = supervised(builder)
    # In blocks, and decoded here where that is quick: three times as fast as one after another.
    records = builder.as_data_source(split, decoders={image_key: tfds.decode.SkipDecoding()})
    images = np.empty((len(records), *info.image_shape), np.uint8)
    labels = np.empty(len(records), np.int32)
    for start in range(0, len(records), _RECORDS_A_READ):
        numbers = list(range(start, min(start + _RECORDS_A_READ, len(records))))
        for n, record in zip(numbers, records.__getitems__(numbers), strict=True):
            pixels = decode_unfiltered(record[image_key], info.image_shape)
            images[n] = image.decode_example_np(record[image_key]) if pixels is None else pixels
            labels[n] = record[label_key]
    return images, labels
