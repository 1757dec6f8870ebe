"""Residual functions, and where in a unit BatchNorm and ReLU stand."""

from typing import Any, NamedTuple

import jax
from flax import nnx

from revjax.layers import Activation, Conv


class Placement(NamedTuple):
    """Where BatchNorm and ReLU stand in a unit `y = x + F(x)`.

    Between two convolutions it is BN-ReLU in all. Each field is "norm", "relu", "norm_relu" or "".

    Attributes:
        first: before the first convolution of F, and after the last unit of the network.
        last: after the last convolution of F.
        addition: after the addition.
    """

    first: str
    last: str
    addition: str


PLACEMENTS = {
    "original": Placement("", "norm", "relu"),
    "bn_after_addition": Placement("", "", "norm_relu"),
    "relu_before_addition": Placement("", "norm_relu", ""),
    "relu_only_preactivation": Placement("relu", "norm", ""),
    "full_preactivation": Placement("norm_relu", "", ""),
}
"""He et al. 2016, figure 4, (a) to (e)."""


class Residual(nnx.Module):
    """A residual function F: `[B, H, W, inputs] -> [B, H', W', outputs]`, in the stream's dtype.

    Basic: conv3x3(stride), conv3x3. Bottleneck: conv1x1(stride), conv3x3, conv1x1, with a quarter
    of the output's channels in the middle.

    Args:
        inputs, outputs: channels.
        stride: of the first convolution.
        bottleneck: which of the two.
        placement: one of `PLACEMENTS`: where BatchNorm and ReLU stand.
        preactivate: False leaves out the activation before the first convolution.
        **kind: conventions, dtype and rngs, as for `Conv`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int = 1,
        *,
        bottleneck: bool,
        placement: str = "full_preactivation",
        preactivate: bool = True,
        **kind: Any,
    ):
        first, last, _ = PLACEMENTS[placement]
        middle = outputs // 4 if bottleneck else outputs
        channels = [inputs, middle, middle, outputs] if bottleneck else [inputs, middle, outputs]
        sizes = [1, 3, 1] if bottleneck else [3, 3]
        before = [first if preactivate else "", "norm_relu", "norm_relu"]
        strides = [stride, 1, 1]
        layers: list[nnx.Module] = []
        for i, size in enumerate(sizes):
            if before[i]:
                layers.append(Activation(before[i], channels[i], **kind))
            layers.append(Conv(channels[i], channels[i + 1], size, strides[i], **kind))
        if last:
            layers.append(Activation(last, outputs, **kind))
        self.layers = nnx.List(layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x
