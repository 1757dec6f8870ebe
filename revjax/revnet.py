"""Reversible residual networks (Gomez et al. 2017), as the authors' code has them."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from revjax.architecture import check_architecture, check_images, integer
from revjax.conventions import CONVENTIONS
from revjax.coupling import additive
from revjax.grid import DEFAULT_GRID_BITS
from revjax.layers import Head, Stem, call_gated, call_recomputed, pure, stack
from revjax.residual import Residual
from revjax.reversible import Backward, Pair, apply_chains, rev_chain_inverse
from revjax.shortcut import resize
from revjax.stochastic_depth import (
    StochasticDepth,
    apply_gated,
    check_stochastic_depth,
    network_gates,
)

Gates = Any  # of a chain or stage: arrays [depth, ...] for F and for G; (None, None): all run


class StreamPeak(nnx.Variable):
    """The largest |stream| in a chain's last forward pass in training mode: float32 scalar.

    Of chains that run as one, each has the largest of all.
    """


class ReversibleChain(nnx.Module):
    """`depth` reversible blocks of one kind: `y1 = x1 + F(x2)`, `y2 = x2 + G(y1)`.

    Args:
        make_f, make_g: a `nnx.Rngs` to a module that keeps the shape of `[B, H, W, C]`; its only
            variables are parameters and batch statistics.
        depth: the number of blocks; None for a single block run without `lax.scan`.
        backward, grid_bits, unroll: as in `rev_chain_apply`.
        rngs: with a stream "params".
    """

    def __init__(
        self,
        make_f: Callable[[nnx.Rngs], nnx.Module],
        make_g: Callable[[nnx.Rngs], nnx.Module],
        depth: int | None,
        *,
        backward: Backward,
        grid_bits: int | None,
        unroll: int | bool = 1,
        rngs: nnx.Rngs,
    ):
        self.scanned = depth is not None
        self.f = make_f(rngs) if depth is None else stack(depth, make_f, rngs)
        self.g = make_g(rngs) if depth is None else stack(depth, make_g, rngs)
        self.backward: Backward = backward
        self.grid_bits = grid_bits
        self.unroll = unroll
        self.use_running_average = False  # set by train() and eval()
        self.peak = None if grid_bits is None else StreamPeak(jnp.zeros((), jnp.float32))

    def __call__(self, x: Pair, gates: Gates = (None, None)) -> Pair:
        """Apply the chain, moving batch statistics in training mode: pair to pair of one shape.

        gates are `(for F, for G)`, each None or `[depth, ...]` as `apply_gated` takes one.
        """
        return call_chains([self], x, [gates])

    def inverse(self, y: Pair, gates: Gates = (None, None)) -> Pair:
        """The input that the chain maps to `y`, with the same gates; statistics do not move.

        In training mode the batch must be the one that gave y: its statistics are used again.
        """
        f, g, params, xs, gates = self.pure(gates)
        options: Any = dict(has_aux=True, grid_bits=self.grid_bits, unroll=self.unroll)
        return rev_chain_inverse(f, g, params, y, xs=xs, gates=gates, **options)

    def pure(self, gates: Gates) -> tuple[Callable, Callable, Any, Any, Any]:
        """The chain's f, g, params, xs and gates, as `rev_chain_apply` takes them."""
        apply_f, params_f, statistics_f = pure(self.f)
        apply_g, params_g, statistics_g = pure(self.g)
        drawn = tuple(gate if _is_drawn(gate) else None for gate in gates)
        factors = tuple(None if _is_drawn(gate) else gate for gate in gates)

        def f(params, x2, xs):
            statistics, factors = xs
            return apply_gated(apply_f, factors[0], params, statistics[0], x2)

        def g(params, y1, xs):
            statistics, factors = xs
            return apply_gated(apply_g, factors[1], params, statistics[1], y1)

        params, xs = (params_f, params_g), ((statistics_f, statistics_g), factors)
        return (f, g, params, xs, drawn) if self.scanned else (f, g, [params], [xs], [drawn])


def _is_drawn(gate):
    return gate is not None and gate.dtype == bool


def call_chains(chains: list[ReversibleChain], x: Pair, gates: list[Gates]) -> Pair:
    """Apply chains in turn, as one reversible chain; all have the options of the first."""
    first = chains[0]

    def record(peak, bound):
        for chain in chains:
            if chain.peak is not None:
                chain.peak[...] = peak

    track = first.peak is not None and not first.use_running_average
    y, auxes = apply_chains(
        [chain.pure(own) for chain, own in zip(chains, gates, strict=True)],
        x,
        (),
        coupling=additive,
        grid_bits=first.grid_bits,
        has_aux=True,
        unroll=first.unroll,
        backward=first.backward,
        range_check=record if track else None,
    )
    for chain, own, aux in zip(chains, gates, auxes, strict=True):
        for module, gate, statistics in zip(
            (chain.f, chain.g), own, aux if chain.scanned else aux[0], strict=True
        ):
            if _is_drawn(gate):  # the aux of a closed function is zero
                old = nnx.state(module, nnx.BatchStat)
                statistics = jax.tree.map(partial(_where_open, gate), statistics, old)
            nnx.update(module, statistics)
    return y


def _where_open(gate, new, old):
    return jnp.where(jnp.expand_dims(gate, tuple(range(gate.ndim, new.ndim))), new, old)


class Transition(nnx.Module):
    """A unit that changes shape: `y1 = S(x1) + F(x2)`, `y2 = S(x2) + G(y1)`; F has the stride.

    It is not reversible: its stage keeps its input and recomputes it, unless backward is "store".
    """

    def __init__(self, inputs, outputs, stride, *, preactivate, **kind):
        self.f = Residual(inputs, outputs, stride, preactivate=preactivate, **kind)
        self.g = Residual(outputs, outputs, **kind)
        self.shortcut1: Any = resize(inputs, outputs, stride, **kind)
        self.shortcut2: Any = resize(inputs, outputs, stride, **kind)

    def __call__(self, x: Pair, gates: Gates = (None, None)) -> Pair:
        x1, x2 = x
        y1 = self.shortcut1(x1) + call_gated(self.f, gates[0], x2)
        y2 = self.shortcut2(x2) + call_gated(self.g, gates[1], y1)
        return y1, y2


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
        if stride == 1 and inputs == outputs:
            self.first = ReversibleChain(first, residual, None, **rule)
        else:
            self.first = Transition(
                inputs, outputs, stride, preactivate=preactivate, rngs=rngs, **kind
            )
        self.rest = ReversibleChain(residual, residual, depth - 1, **rule) if depth > 1 else None

    def __call__(self, x: Pair, gates: Gates = (None, None)) -> Pair:
        """Apply the units; gates are `(for F, for G)`, each None or `[depth, ...]`."""
        first, rest = (jax.tree.map(lambda a, i=i: a[i], gates) for i in (0, slice(1, None)))
        chains, own = ([], []) if self.rest is None else ([self.rest], [rest])
        if isinstance(self.first, ReversibleChain):
            chains, own = [self.first, *chains], [first, *own]
        else:
            x = self.first(x, first) if self.store else call_recomputed(self.first, x, first)
        return call_chains(chains, x, own) if chains else x

    def inverse(self, y: Pair, gates: Gates = (None, None)) -> Pair:
        """Undo the reversible part: the input of the stage, or of its second unit.

        It is the former where the first unit keeps the shape (basic networks, stage 1). In training
        mode the batch must be the one that gave y, and gates, if there are any, those that it was
        given. Statistics do not move.
        """
        first, rest = (jax.tree.map(lambda a, i=i: a[i], gates) for i in (0, slice(1, None)))
        if self.rest is not None:
            y = self.rest.inverse(y, rest)
        return self.first.inverse(y, first) if isinstance(self.first, ReversibleChain) else y


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
            time or memory is the compiler's matter.
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
        width, stages = filters[0], []
        for i, (depth, listed) in enumerate(zip(units, filters[1:], strict=True)):
            outputs = 4 * listed if bottleneck else listed
            stage = RevStage(
                width,
                outputs,
                1 if i == 0 else 2,
                depth,
                preactivate=i > 0,
                backward=backward,
                grid_bits=grid_bits,
                unroll=unroll,
                bottleneck=bottleneck,
                **kind,
            )
            stages.append(stage)
            width = outputs
        self.stages = nnx.List(stages)
        self.head = Head(width, num_classes, **kind)

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

    def gates(self, batch_size: int, key: jax.Array | None = None) -> list[Gates]:
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
