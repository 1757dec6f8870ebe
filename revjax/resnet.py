"""Residual networks: the RevNet paper's baselines, and those of the two papers beside it."""

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from revjax.architecture import check_architecture, check_images, integer, one_of
from revjax.conventions import CONVENTIONS
from revjax.layers import (
    Activation,
    Head,
    Stem,
    call_gated,
    call_recomputed,
    pure,
    split_first,
    stack,
    stream_dtype,
)
from revjax.recompute import checkpoint_step
from revjax.residual import PLACEMENTS, Residual
from revjax.shortcut import Shortcut, Skip, check_shortcut
from revjax.stochastic_depth import StochasticDepth, check_stochastic_depth, network_gates

Draws = tuple[jax.Array | None, jax.Array | None]


class ResidualUnit(nnx.Module):
    """`y = f(h(x) + F(x))`: `[B, H, W, inputs] -> [B, H', W', outputs]` (He et al. 2016, eq. 1).

    Called with `(gate, key)`: see `apply_gated`, and the key of a dropout shortcut.
    """

    def __init__(
        self,
        inputs,
        outputs,
        stride=1,
        *,
        preactivate=True,
        placement,
        shortcut,
        bottleneck,
        **kind,
    ):
        first, _, addition = PLACEMENTS[placement]
        resized = stride != 1 or inputs != outputs
        shared = preactivate and resized and kind["conventions"].shared_preactivation
        kind |= dict(bottleneck=bottleneck, placement=placement)
        own = {name: kind[name] for name in ("conventions", "dtype", "rngs")}
        self.first = Activation(first, inputs, **own) if shared and first else None
        preactivate = preactivate and self.first is None
        self.residual = Residual(inputs, outputs, stride, preactivate=preactivate, **kind)
        self.skip = Skip(inputs, outputs, stride, shortcut=shortcut, **kind)
        self.addition = Activation(addition, outputs, **own) if addition else None

    def __call__(self, x: jax.Array, draws: Draws = (None, None)) -> jax.Array:
        gate, key = draws
        if self.first is not None:
            x = self.first(x)
        skip, scale = self.skip(x, key)
        residual = call_gated(self.residual, gate, x)
        y = skip + (residual if scale is None else scale * residual)
        return y if self.addition is None else self.addition(y)


class ResidualStage(nnx.Module):
    """A unit that may change shape, then `depth - 1` equal ones, run by one `lax.scan`."""

    def __init__(
        self, inputs, outputs, stride, depth, *, preactivate, backward, unroll, rngs, **kind
    ):
        self.remat = backward == "remat"
        self.unroll = unroll
        self.depth = depth
        self.first = ResidualUnit(
            inputs, outputs, stride, preactivate=preactivate, rngs=rngs, **kind
        )

        def unit(rngs):
            return ResidualUnit(outputs, outputs, rngs=rngs, **kind)

        self.rest = stack(depth - 1, unit, rngs) if depth > 1 else None

    def __call__(self, x: jax.Array, draws: Draws = (None, None)) -> jax.Array:
        """Apply the units; every leaf of draws is `[depth, ...]`."""
        first, rest = split_first(draws)
        x = call_recomputed(self.first, x, first) if self.remat else self.first(x, first)
        if self.rest is None:
            return x
        apply, params, statistics = pure(self.rest)

        def step(x, unit):
            params, statistics, draws = unit
            return apply(params, statistics, x, draws)

        if self.remat:
            step = checkpoint_step(step, self.depth - 1, self.unroll)
        x, statistics = jax.lax.scan(step, x, (params, statistics, rest), unroll=self.unroll)
        nnx.update(self.rest, jax.lax.stop_gradient(statistics))
        return x


class ResNet(nnx.Module):
    """A residual network: pre-activation as in the RevNet paper's comparisons, or as asked for.

    Args:
        units: residual units in each stage; every stage but the first halves height and width.
        filters: output channels of the stem and of each stage; a bottleneck stage has four times
            as many as listed.
        num_classes: logits.
        in_channels: channels of the images.
        bottleneck: residual functions of 1x1, 3x3, 1x1 convolutions instead of two 3x3.
        large_images: the ImageNet stem, which reduces height and width by four.
        placement: where BatchNorm and ReLU stand (He et al. 2016, figure 4): "original",
            "bn_after_addition", "relu_before_addition", "relu_only_preactivation" or
            "full_preactivation". The stem is conv-BN-ReLU in all, so the first unit has no
            activation before its first convolution (section 4.1).
        shortcut: what is on the way around a residual function: a `Shortcut`, or its kind.
        stochastic_depth: None for constant depth. A gate is drawn for each unit, those that
            change shape among them; a dropped unit is its shortcut alone.
        conventions: whose code BatchNorm's constants and the initialisation are of: "revnet",
            "identity_mappings" (where also a unit that changes shape has one BN-ReLU for shortcut
            and residual function) or "stochastic_depth".
        backward: "store" keeps activations for the gradient; "remat" keeps the input of each unit
            and recomputes the rest. Only "store" has forward mode.
        unroll: as in `RevNet`.
        dtype: what convolutions compute in; the stream, statistics and parameters are float32, or
            float64 where dtype is.
        rngs: with a stream "params".

    Raises:
        ValueError, TypeError: an argument that no network can have; or, when it is called, images
            that are not `[B, H, W, in_channels]`, or a missing key.

    Example:
        >>> options = dict(placement="original", shortcut="convolution", rngs=nnx.Rngs(0))
        >>> model = revjax.ResNet(units=(1,), filters=(8, 8), num_classes=10, **options)
        >>> model(jnp.zeros((2, 8, 8, 3))).shape  # [B, H, W, C] to [B, num_classes]
        (2, 10)
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
        placement: str = "full_preactivation",
        shortcut: str | Shortcut = "identity",
        stochastic_depth: StochasticDepth | None = None,
        conventions: str = "revnet",
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
        one_of("placement", placement, PLACEMENTS)
        one_of("conventions", conventions, CONVENTIONS)
        shortcut = check_shortcut(shortcut)
        num_classes = integer("num_classes", num_classes)
        self.in_channels = in_channels = integer("in_channels", in_channels)
        self.units = units
        self.stochastic_depth = check_stochastic_depth(stochastic_depth)
        self.dropout = shortcut.rate is not None
        self.deterministic = False  # set by train() and eval()
        self.dtype = stream_dtype(dtype)
        kind: Any = dict(conventions=CONVENTIONS[conventions], dtype=dtype, rngs=rngs)
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
                    placement=placement,
                    shortcut=shortcut,
                    backward=backward,
                    unroll=unroll,
                    bottleneck=bottleneck,
                    **kind,
                )
            )
            width = outputs
        self.stages = nnx.List(stages)
        self.head = Head(width, num_classes, activation=PLACEMENTS[placement].first, **kind)

    def __call__(self, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """`[B, H, W, in_channels] -> [B, num_classes]`, in the dtype of the stream.

        key is a PRNG key, of which stochastic depth and dropout draw in training mode.
        """
        check_images(images, self.in_channels)
        x = self.stem(images)
        for stage, draws in zip(self.stages, self._draws(len(images), key), strict=True):
            x = stage(x, draws)
        return self.head(x)

    def gates(self, batch_size: int, key: jax.Array | None = None) -> list[jax.Array | None]:
        """The gates of each stage's units, `[depth, ...]`.

        In training mode they are drawn from key, as a call with the same key draws them; in
        evaluation mode they are survival probabilities; without stochastic depth, None.
        """
        gates = network_gates(
            self.stochastic_depth,
            sum(self.units),
            batch_size,
            self.dtype,
            key=None if key is None else jax.random.split(key)[0],
            training=not self.deterministic,
        )
        return self._by_stage(gates)

    def _by_stage(self, of_units):
        edges = itertools.pairwise(np.cumsum((0, *self.units)))
        return [None if of_units is None else of_units[i:j] for i, j in edges]

    def _draws(self, batch_size, key):
        """The gates and dropout keys of each stage, `[depth, ...]`."""
        keys = None
        if self.dropout and not self.deterministic:
            if key is None:
                raise ValueError(
                    "dropout on the shortcuts draws from a key: call "
                    "model(images, key=jax.random.key(step)), or model.eval() first."
                )
            keys = jax.random.split(jax.random.split(key)[1], sum(self.units))
        return zip(self.gates(batch_size, key), self._by_stage(keys), strict=True)
