"""The layers that residual networks are made of, and their use as pure functions.

The reversible rule, `jax.checkpoint` and `lax.scan` take pure functions of arrays: `pure` splits a
module into one, and `stack` makes many modules of a kind into one whose arrays have a leading axis.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from revjax.conv import conv
from revjax.recompute import recompute


def stream_dtype(dtype: Any) -> Any:
    """The dtype of the stream, of statistics and of parameters, for convolutions in `dtype`.

    float32, or float64 where that is asked for: a narrower stream could not hold the grid.
    """
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


class Conv(nnx.Module):
    """Convolution without bias, padding "SAME": `[B, H, W, C_in] -> [B, H', W', C_out]`.

    It computes in `dtype` and returns the stream's. The kernel is drawn from a normal distribution
    of standard deviation `sqrt(2 / (size * size * C_out))`, truncated at two of them.
    """

    def __init__(
        self, inputs: int, outputs: int, size: int, stride: int, *, dtype: Any, rngs: nnx.Rngs
    ):
        self.dtype = dtype
        self.stride = stride
        init = nnx.initializers.truncated_normal(math.sqrt(2 / (size * size * outputs)))
        shape = (size, size, inputs, outputs)
        self.kernel = nnx.Param(init(rngs.params(), shape, stream_dtype(dtype)))

    def __call__(self, x: jax.Array) -> jax.Array:
        x, kernel = (self._round(a).astype(self.dtype) for a in (x, self.kernel[...]))
        return self._round(conv(x, kernel, stride=self.stride).astype(stream_dtype(self.dtype)))

    def _round(self, x):
        """Round to the bits of `dtype`, and so the cotangent, whatever the compiler does.

        Of a cast there and back it may keep the wider value, in one evaluation of a function and
        not in another: then what a RevNet reconstructs is not what it computed.
        """
        if self.dtype == x.dtype:
            return x
        bits = jnp.finfo(self.dtype)
        return jax.lax.reduce_precision(x, bits.nexp, bits.nmant)


class NormRelu(nnx.Module):
    """BatchNorm, then ReLU, in the dtype of the stream. Epsilon 1e-3, decay of averages 0.99."""

    def __init__(self, channels: int, *, dtype: Any, rngs: nnx.Rngs):
        dtype = stream_dtype(dtype)
        self.norm = nnx.BatchNorm(
            channels, momentum=0.99, epsilon=1e-3, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        self.norm.mean = nnx.BatchStat(jnp.zeros(channels, dtype))
        self.norm.var = nnx.BatchStat(jnp.ones(channels, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(self.norm(x))


class Stem(nnx.Module):
    """Images to the stream: conv-BN-ReLU, 3x3; or 7x7/2 and a 3x3/2 max-pool for large images."""

    def __init__(
        self, inputs: int, outputs: int, *, large_images: bool, dtype: Any, rngs: nnx.Rngs
    ):
        self.dtype = stream_dtype(dtype)
        self.large_images = large_images
        size, stride = (7, 2) if large_images else (3, 1)
        self.conv = Conv(inputs, outputs, size, stride, dtype=dtype, rngs=rngs)
        self.norm_relu = NormRelu(outputs, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.norm_relu(self.conv(images.astype(self.dtype)))
        if self.large_images:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        return x


class Head(nnx.Module):
    """The stream to logits: BN-ReLU, global average pool, dense with bias.

    The dense kernel is uniform within `sqrt(3 / C)`, its bias zero.
    """

    def __init__(self, inputs: int, num_classes: int, *, dtype: Any, rngs: nnx.Rngs):
        self.norm_relu = NormRelu(inputs, dtype=dtype, rngs=rngs)
        self.dense = nnx.Linear(
            inputs,
            num_classes,
            kernel_init=nnx.initializers.variance_scaling(1.0, "fan_in", "uniform"),
            dtype=stream_dtype(dtype),
            param_dtype=stream_dtype(dtype),
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(self.norm_relu(x).mean((1, 2)))


def stack(depth: int, make: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> Any:
    """`depth` independently initialised modules in one: every array is `[depth, ...]`.

    They are made one after another, so that drawing them takes the memory of one.
    """
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), depth)
    return nnx.merge(graphdef, jax.lax.map(lambda key: nnx.state(make(nnx.Rngs(params=key))), keys))


def pure(module: nnx.Module) -> tuple[Callable, nnx.State, nnx.State]:
    """A module as a pure function and its arguments.

    Returns:
        `(apply, params, statistics)` with `apply(params, statistics, *x) -> (y, statistics)`, the
        statistics as the call leaves them. Of a module made by `stack`, the states are stacked,
        and `apply` is the function of one member.
    """
    graphdef, params, statistics = nnx.split(module, nnx.Param, nnx.BatchStat)

    def apply(params, statistics, *x):
        module = nnx.merge(graphdef, params, statistics, copy=True)
        y = module(*x)
        return y, nnx.state(module, nnx.BatchStat)

    return apply, params, statistics


def call_recomputed(module: nnx.Module, x: Any) -> Any:
    """`module(x)`, of which the gradient recomputes everything from `x`."""
    apply, params, statistics = pure(module)
    y, statistics = recompute(lambda x, *states: apply(*states, x), x, params, statistics)
    nnx.update(module, jax.lax.stop_gradient(statistics))
    return y
