"""Distortion of colours, on the device and inside `jit`: there it costs next to nothing."""

import jax
import jax.numpy as jnp


def distort_color(key: jax.Array, images: jax.Array) -> jax.Array:
    """Changes brightness, saturation, hue and contrast of each image at random.

    Brightness is shifted by up to 32/255, hue by up to 0.2 of the circle; saturation and contrast
    are multiplied by 0.5 to 1.5; all uniform. Brightness comes first, and contrast next or last,
    with probability one half each. Only then are values clipped.

    Args:
        key: a PRNG key.
        images: `[B, H, W, 3]`, RGB on a scale of 0..255, of any dtype.

    Returns:
        float32 `[B, H, W, 3]`, in 0..255.

    Source: the Inception preprocessing in the code of Gomez et al. 2017 (arXiv:1707.04585), where
    the order depends on the thread that has the image.

    Example:
        >>> images = jnp.ones((4, 32, 32, 3), jnp.uint8)
        >>> distort_color(jax.random.key(0), images).shape
        (4, 32, 32, 3)
    """
    keys = jax.random.split(key, 5)
    shape = (len(images), 1, 1, 1)
    brightness = jax.random.uniform(keys[0], shape, minval=-32 / 255, maxval=32 / 255)
    saturation = jax.random.uniform(keys[1], shape, minval=0.5, maxval=1.5)
    hue = jax.random.uniform(keys[2], shape, minval=-0.2, maxval=0.2)
    contrast = jax.random.uniform(keys[3], shape, minval=0.5, maxval=1.5)
    early = jax.random.bernoulli(keys[4], shape=shape)

    x = images.astype(jnp.float32) / 255 + brightness
    x = jnp.where(early, adjust_contrast(x, contrast), x)
    x = adjust_hue(adjust_saturation(x, saturation), hue)
    x = jnp.where(early, x, adjust_contrast(x, contrast))
    return 255 * jnp.clip(x, 0, 1)


def adjust_contrast(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiplies the distance of each channel, float `[B, H, W, 3]`, from its mean."""
    mean = x.mean((1, 2), keepdims=True)
    return mean + factor * (x - mean)


def adjust_saturation(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiplies S of HSV, up to 1, of RGB `[B, H, W, 3]`; a value outside 0..1 is no error."""
    v = x.max(-1, keepdims=True)
    positive = v > 0
    s = jnp.where(positive, (v - x.min(-1, keepdims=True)) / jnp.where(positive, v, 1), 0)
    # v and hue stay, so the distance of each channel from v changes as s does.
    ratio = jnp.where(s > 0, jnp.clip(factor * s, 0, 1) / jnp.where(s > 0, s, 1), 0)
    return v - ratio * (v - x)


def adjust_hue(x: jax.Array, delta: jax.Array) -> jax.Array:
    """Adds to H of HSV, on a circle of length 1, of RGB `[B, H, W, 3]`."""
    r, g, b = x[..., 0:1], x[..., 1:2], x[..., 2:3]
    v = x.max(-1, keepdims=True)
    chroma = v - x.min(-1, keepdims=True)
    c = jnp.where(chroma > 0, chroma, 1)
    sixths = jnp.where(v == r, (g - b) / c, jnp.where(v == g, 2 + (b - r) / c, 4 + (r - g) / c))
    k = (jnp.array([5.0, 3.0, 1.0]).reshape(1, 1, 1, 3) + sixths + 6 * delta) % 6
    return v - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)
