"""What a stream leaves to the device, where it costs next to nothing: enlarging and mirroring."""

import jax
import jax.numpy as jnp


@jax.jit
def finish(pixels: jax.Array, boxes: jax.Array, mirrored: jax.Array) -> jax.Array:
    """Enlarges a part of each image to the whole, bilinearly, and mirrors those that are due.

    A pixel is read at its centre; beyond the outermost centres the outermost pixels go on. That is
    how Pillow and OpenCV do it, and TensorFlow and PyTorch where they do not align corners. A part
    that is the whole keeps its values.

    Args:
        pixels: uint8 `[B, S, S, C]`.
        boxes: int32 `[B, 4]`, the parts, each inside the image: left, top, width, height, as `Box`
            has them. What is beside a part is of no account.
        mirrored: bool `[B]`, of which images left and right change places.

    Returns:
        uint8 `[B, S, S, C]`, rounded.

    Example:
        >>> pixels = jnp.zeros((1, 4, 4, 1), jnp.uint8).at[0, 2, 1:3, 0].set(jnp.uint8([10, 30]))
        >>> finish(pixels, jnp.array([[1, 2, 2, 1]]), jnp.array([True]))[0, 0, :, 0].tolist()
        [30, 25, 15, 10]
    """
    return jax.vmap(_finish)(pixels, boxes.astype(jnp.float32), mirrored)


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
    pixel = jnp.arange(side, dtype=jnp.float32)
    at = start + jnp.clip((pixel + 0.5) * size / side - 0.5, 0, size - 1)
    return jnp.maximum(0, 1 - jnp.abs(at[:, None] - pixel[None, :]))
