"""What a stream leaves to the device: enlarging what is seen of an image, and mirroring it."""

import jax
import jax.numpy as jnp


@jax.jit
def finish_images(pixels: jax.Array, boxes: jax.Array, mirrored: jax.Array) -> jax.Array:
    """Enlarges a part of each image to the whole, bilinearly, and mirrors those that are due.

    A pixel is read at its centre; beyond the outermost centres the outermost pixels go on. That is
    how Pillow and OpenCV do it, and TensorFlow and PyTorch where they do not align corners. A part
    that is the whole keeps its values. As float32 is rounded to integers, what lies just between
    two of them may become one on one kind of device, and the other on another.

    Args:
        pixels: uint8 `[B, S, S, C]`.
        boxes: int32 `[B, 4]`, the parts, each inside the image: left, top, width, height, as `Box`
            has them. What is beside a part is of no account.
        mirrored: bool `[B]`, of which images left and right change places.

    Returns:
        uint8 `[B, S, S, C]`.

    Example:
        >>> pixels = jnp.zeros((1, 4, 4, 1), jnp.uint8).at[0, 2, 1:3, 0].set(jnp.uint8([10, 30]))
        >>> boxes, mirrored = jnp.array([[1, 2, 2, 1]]), jnp.array([True])
        >>> finish_images(pixels, boxes, mirrored)[0, 0, :, 0].tolist()
        [30, 25, 15, 10]
    """
    return jax.vmap(_finish)(pixels, boxes, mirrored)


def _finish(pixels: jax.Array, box: jax.Array, mirrored: jax.Array) -> jax.Array:
    side = len(pixels)
    left, top, width, height = box
    rows, columns = _weights(top, height, side), _weights(left, width, side)
    columns = jnp.where(mirrored, columns[::-1], columns)
    exact = {"precision": "highest", "preferred_element_type": jnp.float32}
    x = jnp.einsum("ij,jkc->ikc", rows, pixels.astype(jnp.float32), **exact)
    x = jnp.einsum("lk,ikc->ilc", columns, x, **exact)
    return jnp.round(x).astype(jnp.uint8)


def _weights(start: jax.Array, size: jax.Array, side: int) -> jax.Array:
    """How much of each source pixel is in each pixel due, float32 `[side due, side source]`."""
    pixel = jnp.arange(side, dtype=jnp.int32)
    unit = 2 * side  # of a source pixel's side, in which all positions are integers
    at = unit * start + jnp.clip((2 * pixel + 1) * size - side, 0, unit * (size - 1))
    distance = jnp.abs(at[:, None] - unit * pixel[None, :])
    return jnp.maximum(0, unit - distance).astype(jnp.float32) / unit
