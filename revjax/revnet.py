"""Reversible residual networks (Gomez et al. 2017), as the authors' code has them."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from revjax.architecture import check_architecture, check_images, integer
from revjax.contract import check_store_last
from revjax.conventions import CONVENTIONS
from revjax.grid import DEFAULT_GRID_BITS
from revjax.layers import Head, Stem, call_gated, call_recomputed, split_first
from revjax.residual import Residual
from revjax.reversible import Backward, Pair
from revjax.shortcut import resize
from revjax.stage import ReversibleStage, StageGates, call_stages
from revjax.stochastic_depth import StochasticDepth, check_stochastic_depth, network_gates


class Transition(nnx.Module):
    """A unit that changes shape: `y1 = S(x1) + F(x2)`, `y2 = S(x2) + G(y1)`; F has the stride.

    It is not reversible: its stage keeps its input and recomputes it, unless backward is "store".
    """

    def __init__(self, inputs, outputs, stride, *, preactivate, **kind):
        self.f = Residual(inputs, outputs, stride, preactivate=preactivate, **kind)
        self.g = Residual(outputs, outputs, **kind)
        self.shortcut1: Any = resize(inputs, outputs, stride, **kind)
        self.shortcut2: Any = resize(inputs, outputs, stride, **kind)

    def __call__(self, x: Pair, gates: StageGates = (None, None)) -> Pair:
        x1, x2 = x
        y1 = self.shortcut1(x1) + call_gated(self.f, gates[0], x2)
        y2 = self.shortcut2(x2) + call_gated(self.g, gates[1], y1)
        return y1, y2


def keeps_shape(inputs: int, outputs: int, stride: int) -> bool:
    """True of a unit that can be reversible; one that changes shape is a `Transition`."""
    return stride == 1 and inputs == outputs


class RevStage(nnx.Module):
    """`depth` units, of which the first may change shape and the others are one reversible chain.

    A pair of `[B, H, W, inputs / 2]` to a pair of `[B, H / stride, W / stride, outputs / 2]`.
    """

    def __init__(
        self,
        inputs,
        outputs,
        stride,
        depth,
        *,
        preactivate,
        backward,
        grid_bits,
        unroll,
        store_last,
        rngs,
        **kind,
    ):
        inputs, outputs = inputs // 2, outputs // 2
        rule = dict(backward=backward, grid_bits=grid_bits, unroll=unroll, rngs=rngs)

        def first(rngs):
            return Residual(inputs, outputs, preactivate=preactivate, rngs=rngs, **kind)

        def residual(rngs):
            return Residual(outputs, outputs, rngs=rngs, **kind)

        self.store = backward == "store"
        self.store_last = store_last
        if keeps_shape(inputs, outputs, stride):
            self.first = ReversibleStage(first, residual, **rule)
        else:
            self.first = Transition(
                inputs, outputs, stride, preactivate=preactivate, rngs=rngs, **kind
            )
        self.rest = ReversibleStage(residual, residual, depth - 1, **rule) if depth > 1 else None

    def __call__(self, x: Pair, gates: StageGates = (None, None)) -> Pair:
        """Apply the units; gates are `(for F, for G)`, each None or `[depth, ...]`."""
        first, rest = split_first(gates)
        chains, own = ([], []) if self.rest is None else ([self.rest], [rest])
        if isinstance(self.first, ReversibleStage):
            chains, own = [self.first, *chains], [first, *own]
        else:
            x = self.first(x, first) if self.store else call_recomputed(self.first, x, first)
        if not chains:
            return x
        keys = [None] * len(chains)
        return call_stages(chains, x, keys=keys, gates=own, store_last=self.store_last)

    def inverse(self, y: Pair, gates: StageGates = (None, None)) -> Pair:
        """Undo the reversible part: the input of the stage, or of its second unit.

        It is the former where the first unit keeps the shape (basic networks, stage 1). In training
        mode the batch must be the one that gave y, and gates, if there are any, those that it was
        given. Statistics do not move.
        """
        first, rest = split_first(gates)
        if self.rest is not None:
            y = self.rest.inverse(y, gates=rest)
        return self.first.inverse(y, gates=first) if isinstance(self.first, ReversibleStage) else y


class RevNet(nnx.Module):
    """A reversible residual network (Gomez et al. 2017).

    `stages[i]` maps a pair of halves of the channels to the next pair, and `stages[i].inverse`
    undoes its reversible part.

    Args:
        units: reversible units in each stage; every stage but the first halves height and width.
        filters: output channels of the stem and of each stage, both halves together; a bottleneck
            stage has four times as many as listed.
        num_classes: logits.
        in_channels: channels of the images.
        bottleneck: residual functions of 1x1, 3x3, 1x1 convolutions instead of two 3x3.
        large_images: the ImageNet stem, which reduces height and width by four.
        stochastic_depth: None for constant depth. A gate is drawn for each residual function: with
            the F and G of every unit there are as many as in a ResNet of the same layers. The
            reconstruction has the same gates, so that gradients are as exact.
        backward: "reversible" reconstructs activations; "remat" keeps the input of each unit and
            recomputes the rest; "store" keeps all. Parameters and numbers are the same. Only
            "store" has forward mode.
        grid_bits: the stream is kept on multiples of `2**-grid_bits`, which makes "reversible"
            exact; None for the plain float coupling. See `rev_chain_apply`.
        unroll: units in one iteration of the loop over the equal units of a stage, as in
            `lax.scan`; True leaves no loop. More take longer to compile; whether they take less
            time or memory is the compiler's matter. Of a stage's units that store, eight or fewer
            are in no loop at any rate.
        store_last: of so many reversible units, the last, "reversible" keeps what convolutions and
            sums give, and computes nothing but normalisation and ReLU again (`rev_chain_apply`).
            None is as many as leave the peak of memory in the first stage, where batches are large
            enough for activations to be most of it; on a TPU, whose steps leave less room, 0.
        dtype: what convolutions compute in; the stream, statistics and parameters are float32, or
            float64 where dtype is.
        rngs: with a stream "params".

    Raises:
        ValueError, TypeError: an argument that no network can have; or, when it is called, images
            that are not `[B, H, W, in_channels]`, or a missing key.

    Example:
        >>> options = dict(filters=(8, 8), num_classes=10, rngs=nnx.Rngs(0))
        >>> model = revjax.RevNet(units=(2,), **options)
        >>> model.eval()
        >>> model(jnp.zeros((2, 8, 8, 3))).shape  # [B, H, W, C] to [B, num_classes]
        (2, 10)
        >>> y = model.stages[0]((jnp.ones((2, 8, 8, 4)), jnp.ones((2, 8, 8, 4))))
        >>> print(model.stages[0].inverse(y)[0][0, 0, 0])
        [1. 1. 1. 1.]
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
        stochastic_depth: StochasticDepth | None = None,
        backward: Backward = "reversible",
        grid_bits: int | None = DEFAULT_GRID_BITS,
        unroll: int | bool = 1,
        store_last: int | None = None,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        units, filters = check_architecture(
            units,
            filters,
            bottleneck=bottleneck,
            backward=backward,
            unroll=unroll,
            ways=("reversible", "remat", "store"),
            halves=True,
        )
        num_classes = integer("num_classes", num_classes)
        self.in_channels = in_channels = integer("in_channels", in_channels)
        self.units = units
        self.stochastic_depth = check_stochastic_depth(stochastic_depth)
        self.deterministic = False  # set by train() and eval()
        self.store = backward == "store"
        kind: Any = dict(conventions=CONVENTIONS["revnet"], dtype=dtype, rngs=rngs)
        self.stem = Stem(in_channels, filters[0], large_images=large_images, **kind)
        widths = [filters[0], *((4 if bottleneck else 1) * listed for listed in filters[1:])]
        strides = [1, *[2] * (len(units) - 1)]
        edges = list(itertools.pairwise(widths))
        chains = [
            depth if keeps_shape(*edge, stride) else depth - 1
            for depth, edge, stride in zip(units, edges, strides, strict=True)
        ]
        if store_last is None:
            none = backward != "reversible" or jax.default_backend() == "tpu"
            store_last = 0 if none else units_to_store(chains, widths[1:], bottleneck)
        store_last = check_store_last(store_last, sum(chains), backward)
        stages = []
        for i, (inputs, outputs) in enumerate(edges):
            stage = RevStage(
                inputs,
                outputs,
                strides[i],
                units[i],
                preactivate=i > 0,
                backward=backward,
                grid_bits=grid_bits,
                unroll=unroll,
                store_last=min(max(store_last - sum(chains[i + 1 :]), 0), chains[i]),
                bottleneck=bottleneck,
                **kind,
            )
            stages.append(stage)
        self.stages = nnx.List(stages)
        self.head = Head(widths[-1], num_classes, **kind)

    def __call__(self, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """`[B, H, W, in_channels] -> [B, num_classes]`, in the dtype of the stream.

        key is a PRNG key, of which stochastic depth draws its gates in training mode.
        """
        check_images(images, self.in_channels)
        images = images.astype(self.stem.dtype)
        x = self.stem(images) if self.store else call_recomputed(self.stem, images)
        x1, x2 = jnp.split(x, 2, axis=-1)
        for stage, gates in zip(self.stages, self.gates(len(images), key), strict=True):
            x1, x2 = stage((x1, x2), gates)
        return self.head(jnp.concatenate([x1, x2], axis=-1))

    def gates(self, batch_size: int, key: jax.Array | None = None) -> list[StageGates]:
        """The gates of each stage, as the stage and its inverse take them.

        In training mode they are drawn from key, as a call with the same key draws them; in
        evaluation mode they are survival probabilities; without stochastic depth, None.
        """
        gates = network_gates(
            self.stochastic_depth,
            2 * sum(self.units),
            batch_size,
            self.stem.dtype,
            key=key,
            training=not self.deterministic,
        )
        if gates is None:
            return [(None, None)] * len(self.units)
        f, g = gates[0::2], gates[1::2]
        edges = np.cumsum((0, *self.units))
        return [(f[i:j], g[i:j]) for i, j in itertools.pairwise(edges)]


def units_to_store(chains: Sequence[int], widths: Sequence[int], bottleneck: bool) -> int:
    """How many of the last reversible units can store and leave the peak of memory where it is.

    The peak is where the first stage is differentiated, whose activations are the largest. What the
    last units keep is gone by then, so they may keep as much as stays below it. Activations are
    counted, in halves of the stream: neither the batch nor parameters play a part.

    Args:
        chains: reversible units of each stage.
        widths: channels of each stage, of which each next one has a quarter of the pixels.
        bottleneck: as `RevNet` takes it.

    Returns:
        The number, counted from the end of the network.
    """
    # A unit keeps its functions' inputs and the outputs of all convolutions but their last. What
    # differentiating one takes (stream, outputs of convolutions, their cotangents, and what waits
    # for kernel gradients) was found by `python -m revjax.memory --store_last N`, on a CPU and for
    # an H100.
    kept, working = (3, 7.5) if bottleneck else (4, 9)
    sizes = [width * 4 ** (len(widths) - i) for i, width in enumerate(widths)]

    def fits(stored: list[int]) -> bool:
        for i, size in enumerate(sizes):
            inputs = 2 * sum(sizes[:i])  # of the units that change shape, up to this stage
            waiting = [kept * sizes[j] * stored[j] for j in range(i + 1)]
            if sum(waiting) and sum(waiting) + inputs + working * size >= working * sizes[0]:
                return False
            before = sum(waiting[:-1])  # while the unit that changes shape is differentiated
            if before and before + inputs + working * sizes[i - 1] >= working * sizes[0]:
                return False
        return True

    stored = [0] * len(chains)
    for i in reversed(range(len(chains))):
        for _ in range(chains[i]):
            stored[i] += 1
            if not fits(stored):
                return sum(stored) - 1
    return sum(stored)
