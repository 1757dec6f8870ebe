"""BatchNorm with Flax's values and a gradient of two sums over the batch.

Ioffe & Szegedy 2015 (arXiv:1502.03167), algorithm 1. It is `(x - mean) * factor + bias`, where the
factor is `scale / sqrt(variance + epsilon)`. The derivative is written as that of
`x * factor + offset`: its gradient sums `dy` and `dy * x` over the batch. That of the formula as it
stands has a third sum, and keeps `x - mean`, which is as large as x.

Values are by the formula as it stands all the same. With `x * factor + offset` XLA:CPU gave the
forward pass of a stored network other last bits than that of a reversible one.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalise by the statistics of all axes but the last.

    The variance is a difference of squares, and 0 where rounding leaves less: where a mean is far
    above its deviation it loses the square of their ratio.

    Args:
        x: floating `[..., C]`.
        scale, bias: `[C]`, of the dtype of x.
        epsilon: added to the variance.

    Returns:
        `[..., C]`; the mean and the variance, `[C]` each; all of the dtype of x.

    Example:
        >>> x = jnp.array([[1.0], [3.0]])
        >>> y, mean, variance = batch_norm(x, jnp.ones(1), jnp.zeros(1), epsilon=0.0)
        >>> y.ravel(), mean, variance
        (Array([-1.,  1.], dtype=float32), Array([2.], dtype=float32), Array([1.], dtype=float32))
    """
    batch = tuple(range(x.ndim - 1))
    mean = x.mean(batch)
    square = (x * x).mean(batch)  # jnp.square would keep 2 x for its derivative
    variance = jnp.maximum(0, square - mean * mean)
    return normalize(x, mean, variance, scale, bias, epsilon), mean, variance


def normalize(x, mean, variance, scale, bias, epsilon):
    """Normalise `[..., C]` by statistics that are given."""
    return _apply(x, mean, jax.lax.rsqrt(variance + epsilon) * scale, bias)


@jax.custom_jvp
def _apply(x, mean, factor, bias):
    mean, factor, bias = (_along(x, of_channel) for of_channel in (mean, factor, bias))
    return (x - mean) * factor + bias


@_apply.defjvp
def _apply_jvp(primals, tangents):
    x, mean, factor, _ = primals
    dx, dmean, dfactor, dbias = tangents
    doffset = dbias - dmean * factor - mean * dfactor
    dy = dx * _along(x, factor) + x * _along(x, dfactor) + _along(x, doffset)
    return _apply(*primals), dy


def _along(x, of_channel):
    return of_channel.reshape((1,) * (x.ndim - 1) + of_channel.shape)


class BatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm` over all axes but the last, by `batch_norm`.

    Parameters, running averages and the switches between these and the batch's own statistics are
    those of `nnx.BatchNorm`; so are its values, to the bit. Of its options those below are read.

    Args:
        channels: C.
        decay: of running averages, `momentum` in `nnx.BatchNorm`.
        epsilon: added to the variance.
        dtype: of parameters, averages and what is returned.
        rngs: as for `nnx.BatchNorm`.
    """

    def __init__(self, channels: int, *, decay: float, epsilon: float, dtype: Any, rngs: nnx.Rngs):
        constants: Any = dict(momentum=decay, epsilon=epsilon, dtype=dtype, param_dtype=dtype)
        super().__init__(channels, **constants, rngs=rngs)
        self.mean = nnx.BatchStat(jnp.zeros(channels, dtype))
        self.var = nnx.BatchStat(jnp.ones(channels, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., C] -> [..., C]`; statistics of the batch move the running averages.

        Raises:
            ValueError: an option is set that is not read.
        """
        if self.axis_name is not None or not self.use_fast_variance:
            raise ValueError(
                f"BatchNorm has axis_name={self.axis_name!r} and use_fast_variance="
                f"{self.use_fast_variance!r}, and reads neither: leave them None and True, or take "
                "nnx.BatchNorm."
            )
        x = x.astype(self.dtype)
        scale: Any = self.scale
        bias: Any = self.bias
        scale, bias = scale[...], bias[...]
        if self.use_running_average:
            return normalize(x, self.mean[...], self.var[...], scale, bias, self.epsilon)
        y, *statistics = batch_norm(x, scale, bias, epsilon=self.epsilon)
        for average, new in zip((self.mean, self.var), statistics, strict=True):
            moved = self.momentum * average[...] + (1 - self.momentum) * new
            average[...] = jax.lax.stop_gradient(moved)
        return y
