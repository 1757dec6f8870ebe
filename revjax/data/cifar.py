"""CIFAR-10 and CIFAR-100 for tensorflow-datasets, prepared without TensorFlow.

The builders have the names, versions, features and keys, and so the order of examples, of those
that ship with tensorflow-datasets: what either has prepared, the other reads. Those need TensorFlow
to prepare; these do not.
"""

import contextlib
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from revjax.data.dataset import DataError, Dataset
from revjax.data.official import OFFICIAL, official_files
from revjax.data.png import encode_png
from revjax.data.prepared import data_directory, open_prepared, read_prepared

_SHAPE = (32, 32, 3)
_CITATION = """\
@TECHREPORT{Krizhevsky09learningmultiple,
    author = {Alex Krizhevsky},
    title = {Learning multiple layers of features from tiny images},
    institution = {},
    year = {2009}
}"""

Labels = Mapping[str, tfds.features.ClassLabel]
Examples = Iterator[tuple[int, dict[str, Any]]]


class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """CIFAR-10: 50,000 training and 10,000 test images, 32x32 RGB, of 10 classes.

    Args:
        source: as `revjax.data.official.official_files` takes it; None downloads the archive.
        **kwargs: as every builder of tensorflow-datasets takes them, such as `data_dir`.

    Example:
        >>> builder = Cifar10(data_dir="datasets")                     # doctest: +SKIP
        >>> builder.download_and_prepare(file_format="array_record")   # doctest: +SKIP
        >>> builder.as_data_source("train")[0]["id"]                   # doctest: +SKIP
        'train_16399'
    """

    VERSION = tfds.core.Version("3.0.2")

    def __init__(self, *, source: str | None = None, **kwargs: Any):
        self._source = source
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return self._describe(
            "60000 32x32 colour images in 10 classes, 6000 images a class: 50000 to train on and "
            "10000 to test on.",
            {"label": tfds.features.ClassLabel(num_classes=10)},
        )

    def _describe(self, description: str, labels: Labels) -> tfds.core.DatasetInfo:
        image = tfds.features.Image(shape=_SHAPE)
        features = {"id": tfds.features.Text(), "image": image, **labels}
        return tfds.core.DatasetInfo(
            builder=self,
            description=description,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            citation=_CITATION,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        del dl_manager  # it would extract the archive to disk
        official = OFFICIAL[self.name]
        files = official_files(self.name, self._source, scratch=os.fspath(self.data_dir_root))
        features: Any = self.info.features
        for label, file in official.names.items():
            features[label].names = files[file].decode().split()
        return {
            "train": self._generate_examples("train", [files[file] for file in official.train]),
            "test": self._generate_examples("test", [files[file] for file in official.test]),
        }

    def _generate_examples(self, split: str, files: Iterable[bytes]) -> Examples:
        labels = list(OFFICIAL[self.name].names)
        records = np.concatenate([np.frombuffer(file, np.uint8) for file in files])
        for index, record in enumerate(records.reshape(-1, len(labels) + 3072)):
            pixels = record[len(labels) :].reshape(3, 32, 32).transpose(1, 2, 0)
            example = {label: int(record[column]) for column, label in enumerate(labels)}
            yield index, {"id": f"{split}_{index:05d}", "image": encode_png(pixels), **example}


class Cifar100(Cifar10, skip_registration=True):
    """CIFAR-100: as CIFAR-10, of 100 classes in 20 superclasses, the coarse labels."""

    def _info(self) -> tfds.core.DatasetInfo:
        return self._describe(
            "As CIFAR-10, in 100 classes of 600 images, 500 to train on and 100 to test on, that "
            "form 20 superclasses: an image has a fine label, its class, and a coarse one.",
            {
                "label": tfds.features.ClassLabel(num_classes=100),
                "coarse_label": tfds.features.ClassLabel(num_classes=20),
            },
        )


def load_cifar(name: str, *, data_dir: str | None = None, source: str | None = None) -> Dataset:
    """Loads CIFAR-10 or CIFAR-100, preparing it first where that was never done.

    Args:
        name: "cifar10" or "cifar100".
        data_dir: where prepared data sets lie; None is tensorflow-datasets' default.
        source: as `official_files` takes it; not looked at once the set is prepared.

    Raises:
        DataError: where the files are missing, damaged or out of reach, or what is prepared is
            damaged.
    """
    directory = data_directory(data_dir) / name / str(Cifar10.VERSION)
    if not os.path.lexists(directory):
        _prepare(name, directory, source)
    return read_prepared(name, open_prepared(directory))


def _prepare(name: str, directory: pathlib.Path, source: str | None) -> None:
    # tensorflow-datasets writes into a folder beside this one and renames that once it is whole.
    builder_class = {"cifar10": Cifar10, "cifar100": Cifar100}[name]
    builder = builder_class(data_dir=directory.parent.parent, source=source)
    quiet = not sys.stderr.isatty()
    if quiet:
        tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            builder.download_and_prepare(file_format="array_record")
    except OSError as error:
        if not directory.exists():  # else another process has prepared it meanwhile
            raise DataError(
                f"{name} could not be prepared in {directory} ({error}): free some space there, or "
                "choose another folder with --config.data.dir=DIR."
            ) from error
    finally:
        if quiet:
            tfds.enable_progress_bar()
