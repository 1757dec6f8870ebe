"""Batch normalisation that is one multiplication and one addition a number.

    factor = scale / sqrt(variance + epsilon)
    offset = bias - mean * factor
    y = x * factor + offset

Ioffe & Szegedy 2015 (arXiv:1502.03167), algorithm 1, with all that is of a channel done once a
channel. So the gradient has two sums over the batch, of `dy` for the offset and of `dy * x` for the
factor, where that of `(x - mean) * factor + bias` has three.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from revjax.conventions import Conventions


class BatchNorm(nnx.BatchNorm):
    """Normalise `[..., C]` by the statistics of all axes but the last, in the dtype of x.

    Parameters and running averages are those of `nnx.BatchNorm`, and so are the switches between
    statistics of the batch and running averages.

    Args:
        channels: C.
        conventions: say epsilon and the decay of running averages.
        dtype: of parameters and averages; x has it, too.
        rngs: as for `nnx.BatchNorm`.
    """

    def __init__(self, channels: int, *, conventions: Conventions, dtype: Any, rngs: nnx.Rngs):
        super().__init__(
            channels,
            momentum=conventions.decay,
            epsilon=conventions.epsilon,
            dtype=dtype,
            param_dtype=dtype,
            rngs=rngs,
        )
        self.mean = nnx.BatchStat(jnp.zeros(channels, dtype))
        self.var = nnx.BatchStat(jnp.ones(channels, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., C] -> [..., C]`; statistics of the batch move the running averages."""
        mean, variance = self.mean[...], self.var[...]
        if not self.use_running_average:
            batch = range(x.ndim - 1)
            mean = x.mean(batch)
            variance = jnp.maximum((x * x).mean(batch) - mean * mean, 0)  # rounding may leave less
            for average, new in ((self.mean, mean), (self.var, variance)):
                moved = self.momentum * average[...] + (1 - self.momentum) * new
                average[...] = jax.lax.stop_gradient(moved)
        scale: Any = self.scale
        bias: Any = self.bias
        factor = scale[...] * jax.lax.rsqrt(variance + self.epsilon)
        offset = bias[...] - mean * factor
        channels = (1,) * (x.ndim - 1) + factor.shape
        return x * factor.reshape(channels) + offset.reshape(channels)
