"""Two-dimensional convolution whose derivatives stay fast inside a loop.

XLA:CPU brings convolutions into the layout of its fast kernels only in a program's entry
computation. In the body of a `lax.scan` the kernel gradient that `lax.conv_general_dilated` asks
for (activations as `f01b`, cotangents as `i01o`) runs as a naive loop, many times slower.
Here the input gradient is a convolution of the canonical layout (NHWC, HWIO), and the kernel
gradient a sum of matrix products, each of some images: as a convolution it would have both its
operands transposed, and products are faster. Other platforms get JAX's own gradients, which their
libraries recognise.

A primitive and not a `jax.custom_vjp`, so that forward mode, and so `jvp` of `grad`, works.
"""

import math
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
_CHUNK_BYTES = 2**22  # of what a CPU copies for a kernel gradient at a time


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
    """`dK[i, j] = sum over b, r, c of x[b, s r + i - top, s c + j - left]^T dy[b, r, c]`."""
    height, width, c_in, c_out = kernel.aval.shape
    (top, bottom), (left, right) = padding
    rows, out_rows, out_columns = x.shape[1], *dy.shape[1:3]
    total_dtype = kernel.aval.dtype if kernel.aval.dtype.itemsize >= 4 else jnp.float32

    def aligned(dy, x):
        """Copies of dy, and of x, one after another in channels, that meet at each pixel.

        At stride 1 a row i of the kernel has a copy of dy, `dy[b, r - i + top, c]`, and a column j
        one of x, `x[b, r, c + j - left]`; else each place of the kernel has one of x.
        """
        if stride == 1:
            dy = _pad(dy, (height - 1 - top, rows + top - out_rows), (0, 0))
            x = _pad(x, (0, 0), (left, right))
            dys = [dy[:, i : i + rows] for i in reversed(range(height))]
            xs = [x[:, :, j : j + out_columns] for j in range(width)]
        else:
            x = _pad(x, (top, bottom), (left, right))
            down, across = stride * (out_rows - 1) + 1, stride * (out_columns - 1) + 1
            places = [(i, j) for i in range(height) for j in range(width)]
            xs = [x[:, i : i + down : stride, j : j + across : stride] for i, j in places]
            dys = [dy]
        return jnp.concatenate(dys, axis=-1), jnp.concatenate(xs, axis=-1)

    def product(dy, x):
        # Of matrices, and pixels first: in any other form XLA:CPU transposes the larger ones.
        dy, x = (a.reshape(math.prod(a.shape[:3]), a.shape[3]) for a in aligned(dy, x))
        contracting = ((0,), (0,)), ((), ())
        return lax.dot_general(x, dy, contracting, preferred_element_type=total_dtype)

    def by_products(dy, x):
        images = x.shape[0]
        copies = jax.eval_shape(aligned, dy, x)
        chunks = 1 if stride == height == width == 1 else _chunks(images, copies)
        if chunks == 1:
            total = product(dy, x)
        else:
            # Each has every chunks-th image: were they neighbours, what walks the chunks would
            # walk the axis that a mesh shards. The reshape is within the loop: before it, XLA:CPU
            # evaluates again what gives x, an activation, to have it in the other shape.
            def images_of(a, n):
                a = a.reshape(images // chunks, chunks, *a.shape[1:])
                return lax.dynamic_index_in_dim(a, n, axis=1, keepdims=False)

            def step(total, n):
                return total + product(images_of(dy, n), images_of(x, n)), None

            zeros = jnp.zeros((copies[1].shape[3], copies[0].shape[3]), total_dtype)
            numbers = jnp.arange(chunks, dtype=jnp.uint32)
            total, _ = lax.scan(step, vary_as(x, vary_as(dy, zeros)), numbers)
        if stride == 1:
            total = total.reshape(width, c_in, height, c_out).transpose(2, 0, 1, 3)
        return total.reshape(kernel.aval.shape).astype(kernel.aval.dtype)

    def native(dy, x):
        forward = partial(_conv, x, stride=stride, padding=padding)
        return jax.linear_transpose(forward, kernel.aval)(dy)[0]

    return lax.platform_dependent(dy, x, cpu=by_products, default=native)


def _pad(x, rows, columns):
    return jnp.pad(x, ((0, 0), rows, columns, (0, 0)))


def _chunks(images, copies):
    """In how many equal chunks to take the images, for no more than _CHUNK_BYTES of copies each.

    As many as there are images where one is larger; and one where their number is not known.
    """
    if not isinstance(images, int):
        return 1
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in copies)
    fits = (n for n in range(1, images) if images % n == 0 and size <= n * _CHUNK_BYTES)
    return next(fits, max(images, 1))


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
