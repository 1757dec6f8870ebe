"""Two-dimensional convolution whose derivatives stay fast inside a loop.

XLA:CPU brings convolutions into the layout of its fast kernels only in a program's entry
computation. In the body of a `lax.scan` the kernel gradient that `lax.conv_general_dilated` asks
for (activations as `f01b`, cotangents as `i01o`) runs as a naive loop, many times slower.
Here both gradients are written as convolutions of the canonical layout (NHWC, HWIO) between
explicit transposes. Other platforms get JAX's own gradients, which their libraries recognise.

A primitive and not a `jax.custom_vjp`, so that forward mode, and so `jvp` of `grad`, works.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

from revjax.trees import vary_as

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv(x: jax.Array, kernel: jax.Array, *, stride: int = 1) -> jax.Array:
    """Convolve images with a kernel, padding "SAME".

    Args:
        x: `[B, H, W, C_in]`, floating.
        kernel: `[height, width, C_in, C_out]`, of the dtype of x.
        stride: pixels from one window to the next, in both directions.

    Returns:
        `[B, ceil(H / stride), ceil(W / stride), C_out]`, of the dtype of x.

    Raises:
        TypeError: ranks, channels or dtypes do not fit.
        ValueError: the stride is not positive.

    Example:
        >>> conv(jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 5)), stride=2).shape
        (1, 4, 4, 5)
    """
    if jnp.ndim(x) != 4 or jnp.ndim(kernel) != 4 or x.shape[3] != kernel.shape[2]:
        raise TypeError(
            f"conv takes x [B, H, W, C_in] and kernel [height, width, C_in, C_out], got "
            f"{jnp.shape(x)} and {jnp.shape(kernel)}: reshape, or make a kernel for those channels."
        )
    if x.dtype != kernel.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"conv takes one floating dtype, got x {x.dtype} and kernel {kernel.dtype}: cast one."
        )
    if stride < 1:
        raise ValueError(f"conv got stride={stride}: give 1 or more.")
    padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride, stride), "SAME")
    options: Any = dict(stride=stride, padding=tuple(padding))
    mesh = jax.typeof(x).sharding.mesh
    if AxisType.Explicit in mesh.axis_types:  # JAX's own gradients know their shardings
        return _conv(x, kernel, **options)
    # Under shard_map both operands, and so the transposes, vary over the same axes.
    x, kernel = vary_as(kernel, x), vary_as(x, kernel)
    return _conv_p.bind(x, kernel, **options)


def _conv(x, kernel, *, stride, padding):
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=_LAYOUT)


def _input_gradient(dy, x, kernel, *, stride, padding):
    """Full correlation of dy, dilated by the stride, with the flipped kernel, channels swapped."""

    def canonical(dy, kernel):
        pads = []
        for axis in (0, 1):
            width, low = kernel.shape[axis], kernel.shape[axis] - 1 - padding[axis][0]
            dilated = (dy.shape[1 + axis] - 1) * stride + 1
            pads.append((low, x.aval.shape[1 + axis] + width - 1 - dilated - low))
        flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
        return lax.conv_general_dilated(
            dy, flipped, (1, 1), pads, lhs_dilation=(stride, stride), dimension_numbers=_LAYOUT
        )

    def native(dy, kernel):
        forward = partial(_conv, kernel=kernel, stride=stride, padding=padding)
        return jax.linear_transpose(forward, x.aval)(dy)[0]

    return lax.platform_dependent(dy, kernel, cpu=canonical, default=native)


def _kernel_gradient(dy, x, kernel, *, stride, padding):
    """Convolution of x with dy as the kernel: C_in is its batch, and B is summed over."""

    def canonical(dy, x):
        pads = []
        for axis in (0, 1):
            low, dilated = padding[axis][0], (dy.shape[1 + axis] - 1) * stride + 1
            pads.append((low, kernel.aval.shape[axis] + dilated - 1 - x.shape[1 + axis] - low))
        gradient = lax.conv_general_dilated(
            x.transpose(3, 1, 2, 0),  # [C_in, H, W, B]
            dy.transpose(1, 2, 0, 3),  # [H, W, B, C_out]
            (1, 1),
            pads,
            rhs_dilation=(stride, stride),
            dimension_numbers=_LAYOUT,
        )
        return gradient.transpose(1, 2, 0, 3)

    def native(dy, x):
        forward = partial(_conv, x, stride=stride, padding=padding)
        return jax.linear_transpose(forward, kernel.aval)(dy)[0]

    return lax.platform_dependent(dy, x, cpu=canonical, default=native)


def _batch(operands, axes, **params):
    """Fold a batch of images into B; a batch of kernels goes to JAX's own rule."""
    x, kernel = operands
    if axes[1] is not None:
        return jax.vmap(lambda x, kernel: _conv(x, kernel, **params), axes)(x, kernel), 0
    x = jnp.moveaxis(x, axes[0], 0)
    y = _conv_p.bind(x.reshape(-1, *x.shape[2:]), kernel, **params)
    return y.reshape(*x.shape[:2], *y.shape[1:]), 0


_conv_p = Primitive("revjax_conv")
_conv_p.def_impl(jax.jit(_conv, static_argnames=("stride", "padding")))
_conv_p.def_abstract_eval(
    lambda x, kernel, **params: jax.make_jaxpr(lambda *a: _conv(*a, **params))(x, kernel).out_avals[
        0
    ]
)
ad.defbilinear(_conv_p, _input_gradient, _kernel_gradient)
batching.primitive_batchers[_conv_p] = _batch
mlir.register_lowering(_conv_p, mlir.lower_fun(_conv, multiple_results=False))
