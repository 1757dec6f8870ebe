"""CIFAR-10 and CIFAR-100 for tensorflow-datasets, prepared without TensorFlow.

The builders have the names, versions, features and keys, and so the order of examples, of those
that ship with tensorflow-datasets: what either has prepared, the other reads. Those need TensorFlow
to prepare; these do not.
"""

import io
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from revjax.data.dataset import Dataset
from revjax.data.official import OFFICIAL
from revjax.data.png import encode_png
from revjax.data.prepare import Examples, prepare
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


class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """CIFAR-10: 50,000 training and 10,000 test images, 32x32 RGB, of 10 classes.

    Args:
        files: as `revjax.data.fetch.official_files` opens them; not needed to describe the set.
        **kwargs: as every builder of tensorflow-datasets takes them, such as `data_dir`.

    Example:
        >>> with official_files("cifar10", None, scratch="datasets") as files:  # doctest: +SKIP
        ...     builder = Cifar10(files=files, data_dir="datasets")
        ...     builder.download_and_prepare(file_format="array_record")
        >>> builder.as_data_source("train")[0]["id"]                            # doctest: +SKIP
        'train_16399'
    """

    VERSION = tfds.core.Version("3.0.2")

    def __init__(self, *, files: Mapping[str, io.BufferedIOBase] | None = None, **kwargs: Any):
        self._files = files or {}
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
        features: Any = self.info.features
        for label, file in official.names.items():
            features[label].names = self._files[file].read().decode().split()
        return {
            split: self._generate_examples(split, [self._files[file] for file in files])
            for split, files in official.splits.items()
        }

    def _generate_examples(self, split: str, files: Iterable[io.BufferedIOBase]) -> Examples:
        # A record is a byte for each label, then 3,072 of pixels, [3, 32, 32].
        labels = list(OFFICIAL[self.name].names)
        records = np.concatenate([np.frombuffer(file.read(), np.uint8) for file in files])
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
        prepare({"cifar10": Cifar10, "cifar100": Cifar100}[name], name, directory, source)
    return read_prepared(name, open_prepared(directory))
