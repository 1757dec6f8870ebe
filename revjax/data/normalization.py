"""What is taken off the images before a network sees them, and what they are divided by."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from revjax.data.dataset import DataError

_IMAGES_A_TIME = 1024


class Normalization(NamedTuple):
    """What `normalize` subtracts and divides by, on the images' scale of 0..255.

    Attributes:
        mean: float32 `[H, W, C]`, `[1, 1, C]`, or `[1, 1, 1]`.
        std: float32 `[1, 1, C]`, or `[1, 1, 1]`.
    """

    mean: jax.Array | np.ndarray
    std: jax.Array | np.ndarray


def _numbers(*values: float) -> np.ndarray:
    return np.array(values, np.float32).reshape(1, 1, -1)


# Ways that ask no training set. The first is that of Gomez et al. 2017 for ImageNet, in their code.
# The second has the mean and standard deviation of ImageNet's channels that torchvision's models
# are trained by.
FIXED_NORMALIZATIONS = {
    "minus_one_to_one": Normalization(_numbers(127.5), _numbers(127.5)),
    "imagenet": Normalization(
        255 * _numbers(0.485, 0.456, 0.406), 255 * _numbers(0.229, 0.224, 0.225)
    ),
}
NORMALIZATIONS = ("mean_image", "channels", "mean_image_std", *FIXED_NORMALIZATIONS)


def find_normalization(way: str, images: np.ndarray) -> Normalization:
    """The statistics of a training set that one of three papers normalises by, or fixed numbers.

    - "mean_image": minus the mean image, and divided by nothing (Gomez et al. 2017, whose code
      averages over the test images too, which leaks them).
    - "channels": minus the mean of each channel, divided by its standard deviation (He et al. 2016,
      arXiv:1603.05027).
    - "mean_image_std": minus the mean image, divided by one number, the standard deviation of all
      pixels before that (Huang et al. 2016, arXiv:1603.09382, by their code).

    - One of `FIXED_NORMALIZATIONS`: whatever the images.

    A standard deviation is that of the pixels given, `sqrt(E[x^2] - E[x]^2)`.

    Args:
        way: one of `NORMALIZATIONS`.
        images: uint8 `[N, H, W, C]`, those that are trained on alone.

    Raises:
        ValueError: for another way.
        DataError: where a standard deviation is 0.

    Example:
        >>> find_normalization("channels", np.array([[[[0]]], [[[15]]]], np.uint8))
        Normalization(mean=array([[[7.5]]], dtype=float32), std=array([[[7.5]]], dtype=float32))
    """
    if way not in NORMALIZATIONS:
        raise ValueError(f"{way!r} is no normalization: choose one of {', '.join(NORMALIZATIONS)}.")
    if way in FIXED_NORMALIZATIONS:
        return FIXED_NORMALIZATIONS[way]
    mean = images.mean(axis=0, dtype=np.float64)
    if way == "mean_image":
        return Normalization(mean.astype(np.float32), np.ones((1, 1, 1), np.float32))
    axes = (0, 1) if way == "channels" else (0, 1, 2)
    average = mean.mean(axes, keepdims=True)
    std = np.sqrt(_mean_square(images).mean(axes, keepdims=True) - average**2)
    if not std.all():
        raise DataError(
            f"the training images cannot be divided by their standard deviation, {std.tolist()}: "
            "choose config.data.normalize='mean_image'."
        )
    offset = average if way == "channels" else mean
    return Normalization(offset.astype(np.float32), std.astype(np.float32))


def normalize(images: jax.Array, by: Normalization) -> jax.Array:
    """What the network sees in evaluation: `(images - mean) / std`.

    Args:
        images: `[B, H, W, C]`, uint8 or on that scale.
        by: of the training set, from `find_normalization`.

    Returns:
        float32 `[B, H, W, C]`.

    Example:
        >>> by = find_normalization("mean_image", np.array([[[[0]]], [[[15]]]], np.uint8))
        >>> normalize(jnp.ones((1, 1, 1, 1), jnp.uint8), by).item()
        -6.5
    """
    return (images.astype(jnp.float32) - by.mean[None]) / by.std[None]


def _mean_square(images: np.ndarray) -> np.ndarray:
    """The mean of the squares of each pixel, float64 [H, W, C]; the sums are of integers, exact."""
    total = np.zeros(images.shape[1:], np.int64)
    for start in range(0, len(images), _IMAGES_A_TIME):  # the squares are twice as large
        squares = np.square(images[start : start + _IMAGES_A_TIME], dtype=np.uint16)
        total += squares.sum(axis=0, dtype=np.int64)
    return total / len(images)
