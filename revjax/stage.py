"""Reversible stages of Flax NNX modules: what RevNets are made of, for networks of one's own."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors, nnx

from revjax.architecture import integer
from revjax.contract import (
    check_backward,
    check_coupling,
    check_key,
    check_pair,
    check_store_last,
    check_unroll,
    describe,
)
from revjax.coupling import Coupling, additive
from revjax.grid import GridBits
from revjax.layers import pure, stack
from revjax.reversible import Backward, Pair, apply_chains, rev_chain_inverse
from revjax.stochastic_depth import apply_gated
from revjax.trees import PyTree, check_arrays, is_inexact

StageGates = tuple[jax.Array | None, jax.Array | None]  # for F and G, [depth, ...]; None: all run


class StreamPeak(nnx.Variable):
    """The largest |stream| in a stage's last forward pass in training mode: float32 scalar.

    Of stages that run as one, each has the largest of all. `stream_bound` says what it may be.
    Where a transform closes over the stage, of which nothing may move then, it stays what it was.

    Example:
        >>> options = dict(units=(2,), filters=(8, 8), rngs=nnx.Rngs(0))
        >>> model = revjax.create_model("revnet", 10, **options)
        >>> _ = model(jnp.ones((4, 8, 8, 3)))
        >>> all(peak < 1024 for peak in jax.tree.leaves(nnx.state(model, StreamPeak)))
        True
    """


class ReversibleStage(nnx.Module):
    """`depth` reversible blocks of NNX modules (Gomez et al. 2017, eq. 6), as `rev_chain_apply`.

        y1 = x1 + F(x2)          x2 = y2 - G(y1)
        y2 = x2 + G(y1)          x1 = y1 - F(x2)

    F and G are any modules `(half, *args) -> residual` that keep shapes, and return the dtype of
    the stream. Whatever they hold beside parameters (batch statistics, random streams) moves once a
    call. In the stage's `f` and `g` every array has a leading axis `[depth, ...]`.

    Args:
        f, g: functions of `nnx.Rngs` (a class, say) that make F and G; each block draws its own. Or
            the modules themselves: for a single block, or with every array `[depth, ...]`.
        depth: the number of blocks, run by `lax.scan`; None for a single one, run without.
        rngs: what f and g draw from; not read where they are modules.
        coupling, grid_bits, backward, unroll, store_last: as in `rev_chain_apply`.

    Raises:
        TypeError, ValueError: an argument is not what it is here, or what `rev_chain_apply` raises.

    Example:
        >>> class Dense(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.linear = nnx.Linear(3, 3, rngs=rngs)
        ...         self.dropout = nnx.Dropout(0.1)
        ...     def __call__(self, x, key):
        ...         return self.dropout(jnp.tanh(self.linear(x)), rngs=key)
        >>> stage = ReversibleStage(Dense, Dense, depth=10, rngs=nnx.Rngs(0))
        >>> x, key = (jnp.ones((2, 3)), jnp.ones((2, 3))), jax.random.key(1)
        >>> y = stage(x, key=key)
        >>> print(stage.inverse(y, key=key)[0][0])
        [1. 1. 1.]
    """

    def __init__(
        self,
        f: Callable[[nnx.Rngs], nnx.Module] | nnx.Module,
        g: Callable[[nnx.Rngs], nnx.Module] | nnx.Module,
        depth: int | None = None,
        *,
        rngs: nnx.Rngs | None = None,
        coupling: Coupling = additive,
        grid_bits: GridBits = "default",
        backward: Backward = "reversible",
        unroll: int | bool = 1,
        store_last: int = 0,
    ):
        self.depth = depth if depth is None else integer("depth", depth)
        self.coupling = check_coupling(coupling)
        self.grid_bits: GridBits = grid_bits
        self.backward: Backward = check_backward(backward)
        self.unroll = check_unroll(unroll)
        self.store_last = check_store_last(store_last, self.depth or 1, backward)
        self.deterministic = False  # set by train() and eval()
        self.f = _members("f", f, self.depth, rngs)
        self.g = _members("g", g, self.depth, rngs)
        of_f, of_g = (_moving(module) for module in (self.f, self.g))
        if shared := of_f.keys() & of_g.keys():
            raise ValueError(
                f"f and g share {', '.join(sorted(of_f[each] for each in shared))}, which would "
                "move for one of them alone: give each its own, random streams by rngs.fork()."
            )
        bits = coupling.grid_bits if grid_bits == "default" else grid_bits
        self.peak = None if bits is None else StreamPeak(jnp.zeros((), jnp.float32))

    def __call__(
        self,
        x: Pair,
        *args: PyTree,
        key: jax.Array | None = None,
        gates: StageGates = (None, None),
    ) -> Pair:
        """Apply the blocks: a pair to a pair of the same shapes.

        Args:
            x: `(x1, x2)`, the halves of the stream, any pytrees.
            *args: further inputs of every F and G.
            key: a PRNG key; each F and G is called as `F(half, *args, key=...)` with one of its
                own, split from it. None calls them without.
            gates: for F and for G, each None, or bool `[depth]` for functions that run or do not,
                as in `rev_chain_apply`, or floating `[depth, ...]` for factors of the residuals,
                which have no gradient. Without the leading axis where the stage has no depth.
        """
        return call_stages([self], x, *args, keys=[key], gates=[gates], store_last=self.store_last)

    def inverse(
        self,
        y: Pair,
        *args: PyTree,
        key: jax.Array | None = None,
        gates: StageGates = (None, None),
    ) -> Pair:
        """The x of `y = stage(x, *args, key=key, gates=gates)`, on the grid bit for bit.

        In training mode BatchNorm needs the batch that gave y. Nothing that the modules hold moves.

        Raises:
            ValueError: F or G draws from a random stream of its own, which has moved on since the
                call: give them a key instead.
        """
        f, g, params, xs, gates = self._pure(key, gates, _refuse_draws)
        options: Any = dict(coupling=self.coupling, grid_bits=self.grid_bits, unroll=self.unroll)
        return rev_chain_inverse(
            f, g, params, y, *args, xs=xs, gates=gates, has_aux=True, **options
        )

    def _pure(
        self, key: jax.Array | None, gates: StageGates, watch: Callable | None = None
    ) -> tuple[Callable, Callable, Any, Any, Any]:
        """f, g, params, xs and gates, as `rev_chain_apply` takes them; aux is the modules' state.

        watch is called with the state before and after each call of a module.
        """
        gates = check_arrays("gates", check_pair("gates", gates))
        for gate in gates:
            is_leaf = jax.tree.structure(gate) == jax.tree.structure(0)
            if gate is not None and not (is_leaf and (_is_drawn(gate) or is_inexact(gate))):
                raise TypeError(
                    f"a gate of {describe(gate)}: give an array, bool for functions that run or do "
                    "not, or floating for factors of the residuals."
                )
        number = (2,) if self.depth is None else (self.depth, 2)
        keys = None if key is None else jax.random.split(check_key(key), number)
        both = [pure(self.f), pure(self.g)]
        drawn = tuple(gate if _is_drawn(gate) else None for gate in gates)
        factors = tuple(None if _is_drawn(gate) else gate for gate in gates)

        def function(which):
            apply = both[which][0]

            def residual(params, half, *rest):
                *args, (states, factors, keys) = rest
                named = {} if keys is None else {"key": keys[which]}

                def call(params, state, *args):
                    residual, new = apply(params, state, *args, **named)
                    if watch is not None:
                        watch(state, new)
                    return residual, new

                return apply_gated(call, factors[which], params, states[which], half, *args)

            return residual

        params, states = ((f, g) for f, g in zip(both[0][1:], both[1][1:], strict=True))
        xs = states, factors, keys
        if self.depth is None:
            return function(0), function(1), [params], [xs], [drawn]
        return function(0), function(1), params, xs, drawn


def call_stages(
    stages: list[ReversibleStage],
    x: Pair,
    *args: PyTree,
    keys: Sequence[jax.Array | None],
    gates: list[StageGates],
    store_last: int,
) -> Pair:
    """Apply stages in turn, as one reversible chain; all have the options of the first.

    store_last is that of the chain, where its way is "reversible": it may have been set since.
    """
    first = stages[0]

    def record(peak, bound):
        for stage in stages:
            if stage.peak is not None:
                with suppress(errors.TraceContextError):  # see StreamPeak
                    stage.peak[...] = peak

    track = first.peak is not None and not first.deterministic
    y, auxes = apply_chains(
        [stage._pure(key, own) for stage, key, own in zip(stages, keys, gates, strict=True)],
        x,
        args,
        coupling=first.coupling,
        grid_bits=first.grid_bits,
        has_aux=True,
        unroll=first.unroll,
        backward=first.backward,
        store_last=store_last if first.backward == "reversible" else 0,
        range_check=record if track else None,
    )
    for stage, own, aux in zip(stages, gates, auxes, strict=True):
        aux = aux[0] if stage.depth is None else aux
        for module, gate, new in zip((stage.f, stage.g), own, aux, strict=True):
            if _is_drawn(gate):  # the aux of a closed function is zero
                new = _keep_where_closed(gate, new, nnx.state(module, nnx.Not(nnx.Param)))
            nnx.update(module, new)
    return y


def _members(name: str, how: Any, depth: int | None, rngs: nnx.Rngs | None) -> Any:
    """What a stage holds for F or G: a module, with a leading axis where there is a depth."""
    if not isinstance(how, nnx.Module):
        make: Any = how
        if not callable(how):
            raise TypeError(
                f"{name}={how!r}: give a module, or a function of nnx.Rngs to make one."
            )
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"rngs={rngs!r}: {name} makes modules, which draw from nnx.Rngs(seed).")
        return make(rngs) if depth is None else stack(depth, make, rngs)
    leaves = jax.tree.leaves(nnx.state(how))
    if depth is not None and any(jnp.shape(leaf)[:1] != (depth,) for leaf in leaves):
        raise ValueError(
            f"{name} is a single module, and depth={depth} blocks draw their parameters each for "
            f"itself: give a function of nnx.Rngs that makes one, such as its class."
        )
    return how


def _refuse_draws(before, after):
    old, new = (jax.tree.leaves(nnx.filter_state(s, nnx.RngCount)) for s in (before, after))
    if any(a is not b for a, b in zip(old, new, strict=True)):
        raise ValueError(
            "inverse: F or G draws from a random stream of its own (nnx.Dropout(..., rngs=rngs)?), "
            "which has moved on since the call that gave y. Give the stage key=..., and draw from "
            "the key that F and G are called with: nnx.Dropout(rate)(x, rngs=key)."
        )


def _is_drawn(gate):
    return gate is not None and jnp.result_type(gate) == jnp.bool_


def _moving(module):
    """What a module holds beside parameters, by identity: its path."""
    return {
        id(node): ".".join(map(str, path))
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Variable) and not isinstance(node, nnx.Param)
    }


def _keep_where_closed(gate, new, old):
    """New, and old where the gate is closed; what was not there before the call is as it came."""
    before = dict(nnx.to_flat_state(old))
    return nnx.from_flat_state(
        [
            (path, jax.tree.map(partial(_where_open, gate), leaf, before[path]))
            if jax.tree.structure(leaf) == jax.tree.structure(before.get(path))
            else (path, leaf)
            for path, leaf in nnx.to_flat_state(new)
        ]
    )


def _where_open(gate, new, old):
    return jnp.where(jnp.expand_dims(gate, tuple(range(gate.ndim, new.ndim))), new, old)
