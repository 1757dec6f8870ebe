"""BatchNorm with Flax's values and a gradient of two sums over the batch.

Ioffe & Szegedy 2015 (arXiv:1502.03167), algorithm 1. It is `(x - mean) * factor + bias`, where the
factor is `scale / sqrt(variance + epsilon)`. The derivative is written as that of
`x * factor + offset`: its gradient sums `dy` and `dy * x` over the batch. That of the formula as it
stands has a third sum, and keeps `x - mean`, which is as large as x.

Values are by the formula as it stands all the same. Of `x * factor + offset` a compiler may make
one operation in one program and two in another; then what a reversible network computes would not
be what a stored one does.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean and the variance of `[..., C]` over all axes but the last, `[C]` each.

    The latter is a difference of squares, and 0 where rounding leaves less.
    """
    batch = tuple(range(x.ndim - 1))
    mean, square = x.mean(batch), (x * x).mean(batch)
    return mean, jnp.maximum(0, square - mean * mean)


@jax.custom_jvp
def normalize(x: jax.Array, mean: jax.Array, factor: jax.Array, bias: jax.Array) -> jax.Array:
    """`(x - mean) * factor + bias`, whose derivative keeps nothing as large as x beside x.

    A sum `mean / deviation` times smaller than its terms is in the gradient of the factor, as it is
    in a variance that is a difference of squares: where means are far above deviations both round.

    Args:
        x: floating `[..., C]`.
        mean, factor, bias: `[C]`, of the dtype of x.

    Returns:
        `[..., C]`, of the dtype of x.

    Example:
        >>> normalize(jnp.array([[1.0], [3.0]]), *jnp.array([[2.0], [0.5], [10.0]]))
        Array([[ 9.5],
               [10.5]], dtype=float32)
    """
    mean, factor, bias = (_along(x, of_channel) for of_channel in (mean, factor, bias))
    return (x - mean) * factor + bias


@normalize.defjvp
def _normalize_jvp(primals, tangents):
    x, mean, factor, _ = primals
    dx, dmean, dfactor, dbias = tangents
    doffset = dbias - dmean * factor - mean * dfactor
    dy = dx * _along(x, factor) + x * _along(x, dfactor) + _along(x, doffset)
    return normalize(*primals), dy


def _along(x, of_channel):
    return of_channel.reshape((1,) * (x.ndim - 1) + of_channel.shape)


class BatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm` over all axes but the last, by `normalize`.

    Parameters, running averages and the switches between these and the batch's own statistics are
    those of `nnx.BatchNorm`; so are its values, to the bit.

    Args:
        channels: C.
        decay: of running averages.
        epsilon: added to the variance.
        dtype: of parameters and averages, and of x.
        rngs: as for `nnx.BatchNorm`.
    """

    def __init__(self, channels: int, *, decay: float, epsilon: float, dtype: Any, rngs: nnx.Rngs):
        constants: Any = dict(momentum=decay, epsilon=epsilon, dtype=dtype, param_dtype=dtype)
        super().__init__(channels, **constants, rngs=rngs)
        self.mean = nnx.BatchStat(jnp.zeros(channels, dtype))
        self.var = nnx.BatchStat(jnp.ones(channels, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., C] -> [..., C]`; statistics of the batch move the running averages."""
        mean, variance = self.mean[...], self.var[...]
        if not self.use_running_average:
            mean, variance = statistics(x)
            for average, new in ((self.mean, mean), (self.var, variance)):
                average[...] = self.momentum * average[...] + (1 - self.momentum) * new
        scale: Any = self.scale
        bias: Any = self.bias
        factor = jax.lax.rsqrt(variance + self.epsilon) * scale[...]
        return normalize(x, mean, factor, bias[...])
