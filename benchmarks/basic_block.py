"""The residual function of the benchmarks' chains."""

import jax
import jax.numpy as jnp

from revjax.batch_norm import normalize, statistics
from revjax.conv import conv
from revjax.layers import rounded


def residual(params, x, dtype=None):
    """BN-ReLU-conv3x3 for each (scale, bias, kernel) of params; convolutions compute in `dtype`."""
    for scale, bias, kernel in params:
        x = jax.nn.relu(batch_norm(x, scale, bias))
        compute = x.dtype if dtype is None else jnp.dtype(dtype)
        narrow = (rounded(a, compute).astype(compute) for a in (x, kernel))
        x = rounded(conv(*narrow).astype(x.dtype), compute)
    return x


def batch_norm(x, scale, bias, epsilon=1e-3):
    """BatchNorm in training, as the networks have it."""
    mean, variance = statistics(x)
    return normalize(x, mean, jax.lax.rsqrt(variance + epsilon) * scale, bias)
