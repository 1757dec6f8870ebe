"""Pre-activation residual networks, the baselines of the RevNet paper, as its authors have them."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from revjax.architecture import check_architecture, check_images, integer
from revjax.layers import Head, Stem, call_recomputed, pure, stack
from revjax.recompute import checkpoint_step
from revjax.residual import Residual, shortcut


class ResidualUnit(nnx.Module):
    """`y = S(x) + F(x)`: `[B, H, W, inputs] -> [B, H', W', outputs]`."""

    def __init__(self, inputs, outputs, stride=1, *, bottleneck, preactivate=True, dtype, rngs):
        kind = dict(bottleneck=bottleneck, dtype=dtype, rngs=rngs)
        self.residual = Residual(inputs, outputs, stride, preactivate=preactivate, **kind)
        self.shortcut = shortcut(inputs, outputs, stride, **kind)

    def __call__(self, x: jax.Array) -> jax.Array:
        return (x if self.shortcut is None else self.shortcut(x)) + self.residual(x)


class ResidualStage(nnx.Module):
    """A unit that may change shape, then `depth - 1` equal ones, run by one `lax.scan`."""

    def __init__(
        self,
        inputs,
        outputs,
        stride,
        depth,
        *,
        preactivate,
        backward,
        unroll,
        bottleneck,
        dtype,
        rngs,
    ):
        self.remat = backward == "remat"
        self.unroll = unroll
        self.depth = depth
        kind = dict(bottleneck=bottleneck, dtype=dtype)
        self.first = ResidualUnit(
            inputs, outputs, stride, preactivate=preactivate, rngs=rngs, **kind
        )

        def unit(rngs):
            return ResidualUnit(outputs, outputs, rngs=rngs, **kind)

        self.rest = stack(depth - 1, unit, rngs) if depth > 1 else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x = call_recomputed(self.first, x) if self.remat else self.first(x)
        if self.rest is None:
            return x
        apply, params, statistics = pure(self.rest)

        def step(x, unit):
            return apply(*unit, x)

        if self.remat:
            step = checkpoint_step(step, self.depth - 1, self.unroll)
        x, statistics = jax.lax.scan(step, x, (params, statistics), unroll=self.unroll)
        nnx.update(self.rest, jax.lax.stop_gradient(statistics))
        return x


class ResNet(nnx.Module):
    """A pre-activation ResNet (He et al. 2016), as in the RevNet paper's comparisons.

    Args:
        units: residual units in each stage; every stage but the first halves height and width.
        filters: output channels of the stem and of each stage; a bottleneck stage has four times
            as many as listed.
        num_classes: logits.
        in_channels: channels of the images.
        bottleneck: residual functions of 1x1, 3x3, 1x1 convolutions instead of two 3x3.
        large_images: the ImageNet stem, which reduces height and width by four.
        backward: "store" keeps activations for the gradient; "remat" keeps the input of each unit
            and recomputes the rest. Only "store" has forward mode.
        unroll: as in `RevNet`.
        dtype: what convolutions compute in; the stream, statistics and parameters are float32, or
            float64 where dtype is.
        rngs: with a stream "params".
    """

    def __init__(
        self,
        units: Sequence[int],
        filters: Sequence[int],
        num_classes: int,
        *,
        in_channels: int = 3,
        bottleneck: bool = False,
        large_images: bool = False,
        backward: Literal["store", "remat"] = "store",
        unroll: int | bool = 1,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        units, filters = check_architecture(
            units,
            filters,
            bottleneck=bottleneck,
            backward=backward,
            unroll=unroll,
            ways=("store", "remat"),
        )
        num_classes = integer("num_classes", num_classes)
        self.in_channels = in_channels = integer("in_channels", in_channels)
        kind = dict(dtype=dtype, rngs=rngs)
        self.stem = Stem(in_channels, filters[0], large_images=large_images, **kind)
        width, stages = filters[0], []
        for i, (depth, listed) in enumerate(zip(units, filters[1:], strict=True)):
            outputs = 4 * listed if bottleneck else listed
            stages.append(
                ResidualStage(
                    width,
                    outputs,
                    1 if i == 0 else 2,
                    depth,
                    preactivate=i > 0,
                    backward=backward,
                    unroll=unroll,
                    bottleneck=bottleneck,
                    **kind,
                )
            )
            width = outputs
        self.stages = nnx.List(stages)
        self.head = Head(width, num_classes, **kind)

    def __call__(self, images: jax.Array) -> jax.Array:
        """`[B, H, W, in_channels] -> [B, num_classes]`, in the dtype of the stream."""
        check_images(images, self.in_channels)
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return self.head(x)
