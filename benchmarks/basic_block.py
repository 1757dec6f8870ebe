"""The residual function of the benchmarks' chains."""

import jax
import jax.numpy as jnp

from revjax.conv import conv
from revjax.layers import rounded


def residual(params, x, dtype=None):
    """BN-ReLU-conv3x3 for each (scale, bias, kernel) of params; convolutions compute in `dtype`."""
    for scale, bias, kernel in params:
        x = jax.nn.relu(normalize(x, scale, bias))
        compute = x.dtype if dtype is None else jnp.dtype(dtype)
        narrow = (rounded(a, compute).astype(compute) for a in (x, kernel))
        x = rounded(conv(*narrow).astype(x.dtype), compute)
    return x


def normalize(x, scale, bias, epsilon=1e-3):
    """BatchNorm in training, by the formulas of Flax's, which the networks have."""
    mean, square = x.mean((0, 1, 2)), (x * x).mean((0, 1, 2))
    variance = jnp.maximum(0, square - mean * mean)
    return (x - mean) * (jax.lax.rsqrt(variance + epsilon) * scale) + bias
