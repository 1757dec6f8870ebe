"""Augmentation of image batches, on the device and inside `jit`."""

import jax
import jax.numpy as jnp

from revjax.data.normalization import Normalization, normalize


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
    # A map over images: of one gather the compiler would not see that images stay on their device.
    return jax.vmap(lambda image, rows, columns: image[rows[:, None], columns])(
        padded, rows, columns
    )


def augment(
    key: jax.Array, images: jax.Array, by: Normalization, *, padding: int, flip: bool
) -> jax.Array:
    """What the network sees in training: normalised, then shifted and mirrored at random.

    The mean is taken off before the padding, so that the zeros around an image stand for the mean,
    as in the code of all three papers of `find_normalization`.

    Args:
        key: a PRNG key.
        images: uint8 `[B, H, W, C]`.
        by: of the training set, from `find_normalization`.
        padding: as `random_crop_flip`.
        flip: as `random_crop_flip`.

    Returns:
        float32 `[B, H, W, C]`.

    Example:
        >>> images = jnp.ones((128, 32, 32, 3), jnp.uint8)
        >>> by = Normalization(jnp.zeros((1, 1, 3)), jnp.ones((1, 1, 3)))
        >>> augment(jax.random.key(0), images, by, padding=2, flip=True).dtype
        dtype('float32')
    """
    return random_crop_flip(key, normalize(images, by), padding=padding, flip=flip)
