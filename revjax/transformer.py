"""The residual functions of a Transformer: attention and an MLP, each of normalised tokens.

Products, of activations with parameters and of activations with each other, compute in `dtype`;
LayerNorm, softmax, GELU and biases are in the dtype of the stream.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from revjax.layers import rounded, stream_dtype

KERNEL_INIT = nnx.initializers.xavier_uniform()


def product(equation: str, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """`jnp.einsum(equation, a, b)`, computed in `dtype`, in the dtype of the arguments."""
    narrow = (rounded(x, dtype).astype(dtype) for x in (a, b))
    return rounded(jnp.einsum(equation, *narrow).astype(a.dtype), dtype)


def gelu(x: jax.Array) -> jax.Array:
    """`x P(z <= x)` for a normal z.

    `jax.nn.gelu` finds it by erfc, which compiled for a CPU without optimisation rounds one way
    alone and another beside its derivative: a reconstruction would not be what it undoes.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


class Dense(nnx.Module):
    """A product with a kernel, and a bias: `[B, N, inputs] -> [B, N, outputs]`."""

    def __init__(self, inputs: int, outputs: int, *, dtype: Any, rngs: nnx.Rngs):
        self.dtype = dtype
        stream = stream_dtype(dtype)
        self.kernel = nnx.Param(KERNEL_INIT(rngs.params(), (inputs, outputs), stream))
        self.bias = nnx.Param(jnp.zeros((outputs,), stream))

    def __call__(self, x: jax.Array) -> jax.Array:
        return product("bni,io->bno", x, self.kernel[...], self.dtype) + self.bias[None, None]


def layer_norm(width: int, *, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A LayerNorm of `[..., width]`, in the dtype of the stream."""
    stream = stream_dtype(dtype)
    return nnx.LayerNorm(
        width,
        epsilon=1e-6,
        use_fast_variance=False,
        dtype=stream,
        param_dtype=stream,
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Attention among normalised tokens: `[B, N, width] -> [B, N, width]`.

    q, k, v = LayerNorm(x) W + b, and for each of the heads, d = width / heads wide,

        softmax(q k^T / sqrt(d)) v

    of which a last product makes the residual.
    """

    def __init__(self, width: int, heads: int, *, dtype: Any, rngs: nnx.Rngs):
        self.heads = heads
        self.dtype = dtype
        self.norm = layer_norm(width, dtype=dtype, rngs=rngs)
        self.qkv = Dense(width, 3 * width, dtype=dtype, rngs=rngs)
        self.out = Dense(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (
            part.reshape(*x.shape[:2], self.heads, -1)
            for part in jnp.split(self.qkv(self.norm(x)), 3, axis=-1)
        )
        scores = product("bqhd,bkhd->bhqk", q, k, self.dtype) / math.sqrt(q.shape[-1])
        mixed = product("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v, self.dtype)
        return self.out(mixed.reshape(x.shape))


class MLP(nnx.Module):
    """Two dense layers of normalised tokens, a GELU between: `[B, N, width] -> [B, N, width]`.

    The hidden layer is four times as wide.
    """

    def __init__(self, width: int, *, dtype: Any, rngs: nnx.Rngs):
        self.norm = layer_norm(width, dtype=dtype, rngs=rngs)
        self.inner = Dense(width, 4 * width, dtype=dtype, rngs=rngs)
        self.outer = Dense(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.outer(gelu(self.inner(self.norm(x))))
