"""Normalisation and augmentation of image batches, on the device and inside `jit`."""

import jax
import jax.numpy as jnp
import numpy as np


def mean_image(images: np.ndarray) -> np.ndarray:
    """The per-pixel mean of a training set.

    Args:
        images: uint8 `[N, H, W, C]`, the training split alone. (The RevNet authors' code averages
            over the test split too, which leaks it.)

    Returns:
        float32 `[H, W, C]`, on the images' scale.

    Example:
        >>> mean_image(np.array([[[[0]]], [[[15]]]], np.uint8))
        array([[[7.5]]], dtype=float32)
    """
    return images.mean(axis=0, dtype=np.float64).astype(np.float32)


def normalize(images: jax.Array, mean: jax.Array) -> jax.Array:
    """What the network sees in evaluation: the images minus the mean image, on the scale of 0..255.

    Args:
        images: uint8 `[B, H, W, C]`.
        mean: float32 `[H, W, C]`, from `mean_image`.

    Returns:
        float32 `[B, H, W, C]`.

    Example:
        >>> normalize(jnp.ones((1, 1, 1, 1), jnp.uint8), jnp.full((1, 1, 1), 7.5)).item()
        -6.5
    """
    return images.astype(jnp.float32) - mean[None]


def random_crop_flip(key: jax.Array, images: jax.Array, *, padding: int, flip: bool) -> jax.Array:
    """Shifts each image at random, and mirrors it left to right or not.

    Each image is padded by zeros on all four sides, and a window of the image's size is cut out of
    that at a place drawn uniformly, for each image on its own.

    Args:
        key: a PRNG key.
        images: `[B, H, W, C]`, of any dtype.
        padding: zeros a side, so the largest shift; 0 shifts nothing.
        flip: whether to mirror an image with probability one half.

    Returns:
        An array of the shape and dtype of `images`.

    Example:
        >>> cut = jax.jit(lambda key, x: random_crop_flip(key, x, padding=4, flip=True))
        >>> cut(jax.random.key(0), jnp.ones((128, 32, 32, 3), jnp.uint8)).shape
        (128, 32, 32, 3)
    """
    batch, height, width, _ = images.shape
    shift_key, flip_key = jax.random.split(key)
    top, left = jax.random.randint(shift_key, (2, batch, 1), 0, 2 * padding + 1)
    rows = top + jnp.arange(height)[None, :]
    columns = left + jnp.arange(width)[None, :]
    if flip:
        columns = jnp.where(
            jax.random.bernoulli(flip_key, shape=(batch, 1)), columns[:, ::-1], columns
        )
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    return padded[jnp.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]


def augment(
    key: jax.Array, images: jax.Array, mean: jax.Array, *, padding: int, flip: bool
) -> jax.Array:
    """What the network sees in training: minus the mean image, then shifted and mirrored at random.

    The mean is taken off before the padding, so that the zeros around an image stand for the mean,
    as in the RevNet authors' code.

    Args:
        key: a PRNG key.
        images: uint8 `[B, H, W, C]`.
        mean: float32 `[H, W, C]`, from `mean_image`.
        padding: as `random_crop_flip`.
        flip: as `random_crop_flip`.

    Returns:
        float32 `[B, H, W, C]`.

    Example:
        >>> images, mean = jnp.ones((128, 32, 32, 3), jnp.uint8), jnp.zeros((32, 32, 3))
        >>> augment(jax.random.key(0), images, mean, padding=2, flip=True).dtype
        dtype('float32')
    """
    return random_crop_flip(key, normalize(images, mean), padding=padding, flip=flip)
