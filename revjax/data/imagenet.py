"""ImageNet (ILSVRC 2012) as tensorflow-datasets has prepared it, read one by one."""

import dataclasses
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from revjax.data.dataset import DataError
from revjax.data.examples import Encoded
from revjax.data.prepared import check_array_record, damage_is_data_error, find_prepared, supervised

_SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class PreparedImages:
    """A split of image files in array_record.

    Attributes:
        split: its name.
        folder: where it lies prepared.
        records: of the split, by number; their images are encoded still.
        image_key: the feature that is the image.
        label_key: the feature that is its class.
    """

    split: str
    folder: str
    records: Any
    image_key: str
    label_key: str

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int) -> Encoded:
        """As `Examples.read`."""
        with damage_is_data_error(self.folder):
            record = self.records[index]
            return Encoded(record[self.image_key], int(record[self.label_key]))

    def name(self, index: int) -> str:
        """As `Examples.name`: its number in the split, and its file_name if it has one."""
        file = self.records[index].get("file_name", b"")
        return f"{self.split}[{index}] {file.decode()}".rstrip()


def open_imagenet(name: str, data_dir: str | None) -> tuple[int, PreparedImages, PreparedImages]:
    """Opens a prepared set of the features and splits of `imagenet2012`.

    Args:
        name: "imagenet2012".
        data_dir: where prepared data sets lie; None is tensorflow-datasets' default.

    Returns:
        The number of classes, the training split, and the validation split, which is tested on.

    Raises:
        DataError: where it was never prepared there, or in another file format, or is damaged.
    """
    builder: Any = find_prepared(name, data_dir)
    check_array_record(builder)
    splits, folder = builder.info.splits, str(builder.data_path)
    (image_key, image), (label_key, label) = supervised(builder)
    if image.np_dtype != np.uint8 or not set(_SPLITS) <= set(splits):
        raise DataError(
            f"{name} in {folder} has {np.dtype(image.np_dtype)} images and the splits "
            f"{', '.join(splits)}, where uint8, train and validation are due: delete that folder "
            "and prepare it again."
        )
    decoders = {image_key: tfds.decode.SkipDecoding()}
    with damage_is_data_error(folder):
        train, test = (
            PreparedImages(
                split,
                folder,
                builder.as_data_source(split, decoders=decoders),
                image_key,
                label_key,
            )
            for split in _SPLITS
        )
    return label.num_classes, train, test
