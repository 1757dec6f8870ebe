"""Max-pooling whose gradient takes little time and memory."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

WINDOW = 3


def max_pool(x: jax.Array) -> jax.Array:
    """The largest value of each 3x3, at a stride of 2 and with padding "SAME".

    Of equal values the first, row by row, has the gradient. XLA expands that of `lax.reduce_window`
    on CPUs and GPUs into arrays of positions, each of the input's size, and a scatter. Here a byte
    an output says where in the window its value is. TPUs have an operation for the gradient of
    `lax.reduce_window`, and use it.

    Args:
        x: floating `[B, H, W, C]`.

    Returns:
        `[B, ceil(H / 2), ceil(W / 2), C]`, in the dtype of x.
    """
    return jax.lax.platform_dependent(x, tpu=_reduce_window, default=_max_pool)


def _reduce_window(x):
    return nnx.max_pool(x, (WINDOW, WINDOW), strides=(2, 2), padding="SAME")


_max_pool = jax.custom_jvp(_reduce_window)


@_max_pool.defjvp
def _max_pool_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    first, *others = _windows(x, -jnp.inf)
    largest, which = first, jnp.zeros(first.shape, jnp.uint8)
    for k, values in enumerate(others, 1):
        better = ~(values <= largest) & (largest == largest)  # NaN is the largest, the first one
        largest, which = jnp.where(better, values, largest), jnp.where(better, jnp.uint8(k), which)
    parts = (jnp.where(which == k, values, 0) for k, values in enumerate(_windows(dx, 0)))
    return largest, sum(parts)


def _windows(x: jax.Array, padding: float) -> Iterator[jax.Array]:
    """The first values of all windows, the second ones, and so on, each of the output's shape."""
    sides = [-(-size // 2) for size in x.shape[1:3]]
    excess = [2 * side + 1 - size for side, size in zip(sides, x.shape[1:3], strict=True)]
    around = [(0, 0), *((n // 2, n - n // 2) for n in excess), (0, 0)]
    x = jnp.pad(x, around, constant_values=padding)
    for i in range(WINDOW):
        for j in range(WINDOW):
            yield x[:, i : i + 2 * sides[0] : 2, j : j + 2 * sides[1] : 2]
