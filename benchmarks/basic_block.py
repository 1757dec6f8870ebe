"""The residual function of the benchmarks' chains."""

import jax
import jax.numpy as jnp

from revjax.batch_norm import batch_norm
from revjax.conv import conv
from revjax.layers import rounded


def residual(params, x, dtype=None):
    """BN-ReLU-conv3x3 for each (scale, bias, kernel) of params; convolutions compute in `dtype`."""
    for scale, bias, kernel in params:
        y, _, _ = batch_norm(x, scale, bias, epsilon=1e-3)
        x = jax.nn.relu(y)
        compute = x.dtype if dtype is None else jnp.dtype(dtype)
        narrow = (rounded(a, compute).astype(compute) for a in (x, kernel))
        x = rounded(conv(*narrow).astype(x.dtype), compute)
    return x
