"""The residual function of the benchmarks' chains."""

import jax

from revjax.conv import conv


def residual(params, x, dtype=None):
    """BN-ReLU-conv3x3 for each (scale, bias, kernel) of params; convolutions compute in `dtype`."""
    for scale, bias, kernel in params:
        mean, variance = x.mean((0, 1, 2), keepdims=True), x.var((0, 1, 2), keepdims=True)
        x = jax.nn.relu((x - mean) * jax.lax.rsqrt(variance + 1e-3) * scale + bias)
        compute = x.dtype if dtype is None else dtype
        x = conv(x.astype(compute), kernel.astype(compute)).astype(x.dtype)
    return x
