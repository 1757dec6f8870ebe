"""Street View House Numbers for tensorflow-datasets, prepared without TensorFlow.

The builder has the name, version, features and keys, and so the order of examples, of the one that
ships with tensorflow-datasets: what either has prepared, the other reads.
"""

import functools
import io
import itertools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy.io
import tensorflow_datasets as tfds
import tqdm
from tensorflow_datasets.core import hashing

from revjax.data.dataset import Dataset
from revjax.data.official import OFFICIAL
from revjax.data.png import encode_png
from revjax.data.prepare import Examples, prepare
from revjax.data.prepared import data_directory, open_prepared, read_prepared

_CITATION = """\
@inproceedings{Netzer2011,
    author = {Yuval Netzer and Tao Wang and Adam Coates and Alessandro Bissacco and Bo Wu and
        Andrew Y. Ng},
    title = {Reading digits in natural images with unsupervised feature learning},
    booktitle = {NIPS Workshop on Deep Learning and Unsupervised Feature Learning},
    year = {2011}
}"""

_EXAMPLES_A_SHARD = 1 << 15  # 0.1 GB, which tensorflow-datasets holds while it writes the shard

# What each name trains on, in tensorflow-datasets' notation: all of train, then all of extra.
TRAIN_SPLITS = {"svhn_cropped": "train", "svhn_cropped+extra": "train+extra"}


class SvhnCropped(tfds.core.ShardBasedBuilder, skip_registration=True):
    """SVHN: 73,257 training, 26,032 test and 531,131 easier extra images, 32x32 RGB, of 10 digits.

    Args:
        files: as `revjax.data.fetch.official_files` opens them; not needed to describe the set.
        **kwargs: as every builder of tensorflow-datasets takes them, such as `data_dir`.

    A `GeneratorBasedBuilder` would need TensorFlow to sort the gigabytes of extra on disk. Here the
    examples are written in their final order at once, which is that of the hashes of their keys.

    Source: Y. Netzer et al., Reading Digits in Natural Images with Unsupervised Feature Learning,
    2011; format 2, cropped digits.
    """

    VERSION = tfds.core.Version("3.1.0")

    def __init__(self, *, files: Mapping[str, io.BufferedIOBase] | None = None, **kwargs: Any):
        self._files = files or {}
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(32, 32, 3)),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Digits of house numbers in photographs of streets, cropped to 32x32: "
            "73257 to train on, 26032 to test on, and 531131 easier ones as extra training data.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage=OFFICIAL[self.name].url,
            citation=_CITATION,
        )

    def _shard_iterators_per_split(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, list[Callable[[], Examples]]]:
        del dl_manager  # it would keep the downloads
        shards = {}
        for split, (file,) in OFFICIAL[self.name].splits.items():
            labels = scipy.io.loadmat(self._files[file], variable_names=["y"])["y"].ravel()
            examples = self._generate_examples(split, self._files[file], labels)
            # Shards are written one after another, each going on where the one before it ended.
            shard = functools.partial(itertools.islice, examples, _EXAMPLES_A_SHARD)
            shards[split] = [shard] * math.ceil(len(labels) / _EXAMPLES_A_SHARD)
        return shards

    def _generate_examples(
        self, split: str, file: io.BufferedIOBase, labels: np.ndarray
    ) -> Examples:
        # A split's images, 1.6 GB of extra, are read when the split's turn comes, and freed after.
        images = scipy.io.loadmat(file, variable_names=["X"])["X"]  # [32, 32, 3, N]
        order = sorted(range(len(labels)), key=hashing.Hasher(split).hash_key)
        for index in tqdm.tqdm(order, desc=split, unit=" examples", disable=None):
            example = {
                "id": f"{split}_{index:06d}",
                "image": encode_png(images[..., index]),
                "label": int(labels[index]) % 10,  # the digit 0 is class 10 in the files
            }
            yield index, example


def load_svhn(name: str, *, data_dir: str | None = None, source: str | None = None) -> Dataset:
    """Loads SVHN, preparing it first where that was never done.

    Both names are read from one prepared folder, which holds all three splits. Its training data
    are the examples of train, followed under the second name by those of extra, as in Huang et al.
    2016 (Deep Networks with Stochastic Depth), section 4. Preparing holds extra's images in memory,
    1.6 GB, under either name.

    Args:
        name: "svhn_cropped" or "svhn_cropped+extra".
        data_dir: where prepared data sets lie; None is tensorflow-datasets' default.
        source: as `official_files` takes it; not looked at once the set is prepared.

    Raises:
        DataError: where the files are missing, damaged or out of reach, or what is prepared is
            damaged.
    """
    directory = data_directory(data_dir) / SvhnCropped.name / str(SvhnCropped.VERSION)
    if not os.path.lexists(directory):
        prepare(SvhnCropped, SvhnCropped.name, directory, source)
    return read_prepared(name, open_prepared(directory), train=TRAIN_SPLITS[name])
