"""The layers that residual networks are made of, and their use as pure functions.

The reversible rule, `jax.checkpoint` and `lax.scan` take pure functions of arrays: `pure` splits a
module into one, and `stack` makes many modules of a kind into one whose arrays have a leading axis.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from revjax.batch_norm import BatchNorm
from revjax.conv import conv
from revjax.conventions import Conventions
from revjax.pool import max_pool
from revjax.recompute import recompute
from revjax.stochastic_depth import apply_gated


def stream_dtype(dtype: Any) -> Any:
    """The dtype of the stream, of statistics and of parameters, for convolutions in `dtype`.

    float32, or float64 where that is asked for: a narrower stream could not hold the grid.
    """
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` rounded to the bits of `dtype`, and so its cotangent, whatever the compiler does.

    Of a cast there and back it may keep the wider value, in one evaluation of a function and not in
    another: then what a reversible network reconstructs is not what it computed.
    """
    if dtype == x.dtype:
        return x
    bits = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, bits.nexp, bits.nmant)


class Conv(nnx.Module):
    """Convolution without bias, padding "SAME": `[B, H, W, C_in] -> [B, H', W', C_out]`.

    It computes in `dtype` and returns the stream's. The kernel is drawn as `conventions` say.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        stride: int,
        *,
        conventions: Conventions,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.stride = stride
        init = conventions.kernel_init(size, inputs, outputs)
        shape = (size, size, inputs, outputs)
        self.kernel = nnx.Param(init(rngs.params(), shape, stream_dtype(dtype)))

    def __call__(self, x: jax.Array) -> jax.Array:
        x, kernel = (rounded(a, self.dtype).astype(self.dtype) for a in (x, self.kernel[...]))
        y = conv(x, kernel, stride=self.stride).astype(stream_dtype(self.dtype))
        return rounded(y, self.dtype)


class Activation(nnx.Module):
    """BatchNorm, then ReLU, or one of them, in the dtype of the stream.

    Args:
        which: "norm_relu", "norm" or "relu".
        channels: of the stream.
        conventions: say epsilon and the decay of running averages.
        dtype, rngs: as for `Conv`.
    """

    def __init__(
        self, which: str, channels: int, *, conventions: Conventions, dtype: Any, rngs: nnx.Rngs
    ):
        self.relu = which.endswith("relu")
        self.norm: Any = nnx.data(None)
        if which == "relu":
            return
        dtype = stream_dtype(dtype)
        constants: Any = dict(decay=conventions.decay, epsilon=conventions.epsilon)
        self.norm = BatchNorm(channels, **constants, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.norm is not None:
            x = self.norm(x)
        return jax.nn.relu(x) if self.relu else x


class Stem(nnx.Module):
    """Images to the stream: conv-BN-ReLU, 3x3; or 7x7/2 and a 3x3/2 max-pool for large images."""

    def __init__(self, inputs: int, outputs: int, *, large_images: bool, dtype: Any, **kind: Any):
        self.dtype = stream_dtype(dtype)
        self.large_images = large_images
        size, stride = (7, 2) if large_images else (3, 1)
        self.conv = Conv(inputs, outputs, size, stride, dtype=dtype, **kind)
        self.norm_relu = Activation("norm_relu", outputs, dtype=dtype, **kind)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.norm_relu(self.conv(images.astype(self.dtype)))
        if self.large_images:
            x = max_pool(x)
        return x


class Head(nnx.Module):
    """The stream to logits: an activation, global average pool, dense with bias.

    Args:
        inputs: channels of the stream, C.
        num_classes: logits.
        activation: as `Activation` takes it; "" for a stream that has been through one.
        conventions: say how the dense layer is drawn.
        dtype, rngs: as for `Conv`.
    """

    def __init__(
        self,
        inputs: int,
        num_classes: int,
        *,
        activation: str = "norm_relu",
        conventions: Conventions,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        kind: Any = dict(conventions=conventions, dtype=dtype, rngs=rngs)
        self.activation = Activation(activation, inputs, **kind) if activation else None
        kernel_init, bias_init = conventions.dense_inits(inputs)
        self.dense = nnx.Linear(
            inputs,
            num_classes,
            kernel_init=kernel_init,
            bias_init=bias_init,
            dtype=stream_dtype(dtype),
            param_dtype=stream_dtype(dtype),
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.activation is not None:
            x = self.activation(x)
        return self.dense(x.mean((1, 2)))


def stack(depth: int, make: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> Any:
    """`depth` independently initialised modules in one: every array is `[depth, ...]`.

    They are made one after another, so that drawing them takes the memory of one. Each has streams
    of its own, split from those of rngs.
    """
    keys = {name: jax.random.split(stream(), depth) for name, stream in rngs.items()}
    one = {name: stream[0] for name, stream in keys.items()}
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(**one))))
    return nnx.merge(graphdef, jax.lax.map(lambda keys: nnx.state(make(nnx.Rngs(**keys))), keys))


def split_first(tree: Any) -> tuple[Any, Any]:
    """The first entry of every leaf, and the others: of the gates `[depth, ...]` of a stage."""
    return jax.tree.map(lambda leaf: leaf[0], tree), jax.tree.map(lambda leaf: leaf[1:], tree)


def pure(module: nnx.Module) -> tuple[Callable, nnx.State, nnx.State]:
    """A module as a pure function and its arguments.

    Returns:
        `(apply, params, state)` with `apply(params, state, *x) -> (y, state)`; the state is all
        that the module holds beside parameters, and what is returned of it is as the call leaves
        it. Of a module made by `stack` both are stacked, and `apply` is the function of one member.
    """
    graphdef, params, state = nnx.split(module, nnx.Param, ...)

    def apply(params, state, *x, **named):
        module = nnx.merge(graphdef, params, state, copy=True)
        y = module(*x, **named)
        return y, nnx.state(module, nnx.Not(nnx.Param))

    return apply, params, state


def call_recomputed(module: nnx.Module, x: Any, *others: Any) -> Any:
    """`module(x, *others)`, of which the gradient recomputes everything from its inputs."""
    apply, params, statistics = pure(module)
    y, statistics = recompute(
        lambda x, *operands: apply(*operands[:2], x, *operands[2:]), x, params, statistics, *others
    )
    nnx.update(module, jax.lax.stop_gradient(statistics))
    return y


def call_gated(module: nnx.Module, gate: jax.Array | None, x: jax.Array) -> jax.Array:
    """`gate * module(x)`, as `apply_gated` has it."""
    if gate is None:
        return module(x)
    apply, params, statistics = pure(module)
    y, statistics = apply_gated(apply, gate, params, statistics, x)
    nnx.update(module, jax.lax.stop_gradient(statistics))
    return y
