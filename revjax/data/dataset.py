"""What a data set is: its arrays, its sizes, and the error that every problem with data becomes."""

import dataclasses
from typing import NamedTuple

import numpy as np


class DataError(Exception):
    """Data that are unknown, missing, damaged or unreachable; the message is one sentence."""


class DatasetInfo(NamedTuple):
    """What is known of a data set before its arrays are loaded.

    Attributes:
        image_shape: (H, W, C) of every image.
        num_classes: how many classes the labels name.
        train_size: how many examples the training split has.
        test_size: how many examples the test split has.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    train_size: int
    test_size: int


@dataclasses.dataclass(frozen=True)
class Dataset:
    """An image-classification data set, whole, in host memory.

    Attributes:
        name: the name it was loaded by.
        train_images: uint8 `[N, H, W, C]`.
        train_labels: int32 `[N]`, each in `0 .. num_classes - 1`.
        test_images: uint8 `[M, H, W, C]`.
        test_labels: int32 `[M]`.
        num_classes: how many classes the labels name.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int

    @property
    def info(self) -> DatasetInfo:
        """The sizes of the arrays held."""
        height, width, channels = self.train_images.shape[1:]
        sizes = len(self.train_images), len(self.test_images)
        return DatasetInfo((height, width, channels), self.num_classes, *sizes)
