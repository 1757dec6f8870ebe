"""What the papers leave to their code: how BatchNorm is set, how kernels are drawn, what is shared.

Networks that are equal on paper differ in these from one authors' code to another's.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class Conventions(NamedTuple):
    """The conventions of one code.

    Attributes:
        epsilon: of BatchNorm, added to the variance.
        decay: of the running averages, a batch.
        truncated: kernels are drawn from a normal distribution truncated at two deviations.
        fan: the channels whose number n gives kernels their deviation `sqrt(2 / (size^2 n))`.
        dense_scale: the dense kernel is uniform within `sqrt(3 dense_scale / C)`, C its inputs.
        dense_bias: its bias is uniform within `1 / sqrt(C)` instead of zero.
        shared_preactivation: where a unit changes shape, its first activation feeds the shortcut
            as well as the residual function.
    """

    epsilon: float
    decay: float
    truncated: bool
    fan: str
    dense_scale: float
    dense_bias: bool
    shared_preactivation: bool

    def kernel_init(self, size: int, inputs: int, outputs: int) -> nnx.Initializer:
        """What draws a convolution's kernel `[size, size, inputs, outputs]`."""
        deviation = math.sqrt(2 / (size * size * (outputs if self.fan == "out" else inputs)))
        normal = nnx.initializers.truncated_normal if self.truncated else nnx.initializers.normal
        return normal(deviation)

    def dense_inits(self, inputs: int) -> tuple[nnx.Initializer, nnx.Initializer]:
        """What draws the kernel and the bias of the last layer."""
        kernel = nnx.initializers.variance_scaling(self.dense_scale, "fan_in", "uniform")
        if not self.dense_bias:
            return kernel, nnx.initializers.zeros
        limit = 1 / math.sqrt(inputs)

        def bias(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -limit, limit)

        return kernel, bias


CONVENTIONS = {
    "revnet": Conventions(1e-3, 0.99, True, "out", 1.0, False, False),
    "identity_mappings": Conventions(1e-5, 0.9, False, "out", 1 / 3, False, True),
    "stochastic_depth": Conventions(1e-5, 0.9, False, "in", 1 / 3, True, False),
}
"""Gomez et al. 2017, He et al. 2016 and Huang et al. 2016, as their authors' code has them."""
