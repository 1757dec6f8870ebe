"""Residual functions and shortcuts, as the authors of RevNet have them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from revjax.layers import Conv, NormRelu


class Residual(nnx.Module):
    """A pre-activation residual function (He et al. 2016, figure 4e).

    Basic: BN-ReLU-conv3x3(stride)-BN-ReLU-conv3x3. Bottleneck: BN-ReLU-conv1x1(stride)-BN-ReLU-
    conv3x3-BN-ReLU-conv1x1, with a quarter of the output's channels in the middle. Without
    `preactivate` the leading BN-ReLU is left out.

    `[B, H, W, inputs] -> [B, H', W', outputs]`, in the dtype of the stream.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int = 1,
        *,
        bottleneck: bool,
        preactivate: bool = True,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        middle = outputs // 4 if bottleneck else outputs
        channels = [inputs, middle, middle, outputs] if bottleneck else [inputs, middle, outputs]
        sizes = [1, 3, 1] if bottleneck else [3, 3]
        strides = [stride, 1, 1]
        layers: list[nnx.Module] = []
        for i, size in enumerate(sizes):
            if preactivate or i > 0:
                layers.append(NormRelu(channels[i], dtype=dtype, rngs=rngs))
            layers.append(
                Conv(channels[i], channels[i + 1], size, strides[i], dtype=dtype, rngs=rngs)
            )
        self.layers = nnx.List(layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


class PoolAndPad(nnx.Module):
    """The shortcut without parameters: average-pool by the stride, zero-pad the channels evenly."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        self.stride = stride
        self.padding = ((outputs - inputs) // 2, (outputs - inputs + 1) // 2)

    def __call__(self, x: jax.Array) -> jax.Array:
        _, height, width, _ = x.shape
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"images reach a stage of stride {self.stride} as {height}x{width}: their sides "
                "must be divisible by all strides, 4 in a CIFAR network."
            )
        window, zero = (1, self.stride, self.stride, 1), np.zeros((), x.dtype)
        x = jax.lax.reduce_window(x, zero, jax.lax.add, window, window, "VALID")
        x = x / np.asarray(self.stride**2, x.dtype)
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), self.padding))


def shortcut(
    inputs: int, outputs: int, stride: int, *, bottleneck: bool, dtype: Any, rngs: nnx.Rngs
) -> PoolAndPad | Conv | None:
    """The shortcut of a unit; None is the identity, where neither stride nor width changes.

    Basic networks pool and pad. Bottleneck networks project the raw input by a 1x1 convolution.
    """
    if stride == 1 and inputs == outputs:
        return None
    if bottleneck:
        return Conv(inputs, outputs, 1, stride, dtype=dtype, rngs=rngs)
    return PoolAndPad(inputs, outputs, stride)
