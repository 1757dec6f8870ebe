"""How chains are laid out for the rule: as segments, and apart, as they are traced, their operands.

A segment is a scan over equal blocks, or a single block of a list. Its operands are
`(params, (xs, gates), shared)`: those that differ by block, `[depth, ...]` in a scan, and those
that all blocks share, `[for f, for g]`, which are the arguments and what f and g close over.
The last blocks may be segments that store, which takes a scan in two.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from revjax.contract import (
    chain_blocks,
    check_coupling,
    check_flag,
    check_pair,
    residual_function,
)
from revjax.coupling import Coupling
from revjax.grid import resolve_grid_bits, round_to_grid
from revjax.trees import PyTree, check_arrays, hoist_closure


class Block(NamedTuple):
    """Functions f and g as `(params, half, xs, *shared) -> (residual, aux)`, and the coupling."""

    f: Callable
    g: Callable
    coupling: Coupling


class Segment(NamedTuple):
    """Blocks with equal functions: a scan of them, or a single one."""

    block: Block
    depth: int | None  # of a scan; None: a single block, whose operands have no leading axis
    run: int | None  # of a scan: how many of these blocks run, from the first
    stores: bool = False  # what is dear, see gate.py, where it is differentiated without the rule


def lay_out(chains, x, args, coupling, grid_bits, has_aux):
    """Check the inputs, put x on the grid, and lay the chains out as segments and operands."""
    check_flag("has_aux", has_aux)
    check_arrays("x", check_pair("x", x))
    check_arrays("args", args)
    bits = resolve_grid_bits(grid_bits, check_coupling(coupling).grid_bits, x)
    x1, x2 = x = round_to_grid(jax.tree.map(jnp.asarray, tuple(x)), bits)
    segments, operands = [], []
    for f, g, params, xs, gates in chains:
        has_xs = xs is not None
        depth, params, xs = chain_blocks(params, xs, gates)
        f = residual_function("f", f, x1, coupling, bits, has_aux, has_xs)
        g = residual_function("g", g, x2, coupling, bits, has_aux, has_xs)
        for both in zip(params, xs, strict=True):
            segments.append(Segment(Block(f, g, coupling), depth, depth))
            operands.append((*both, [[args], [args]]))
    return bits, x, segments, operands


def split_last(segments: list[Segment], count: int) -> tuple[list[Segment], list[Segment]]:
    """All blocks but the last `count`, and these, which store.

    A scan may be in both. The operands of the former are the first ones as they are, and those of
    the latter are what `last_operands` takes of the others.
    """
    head, tail = list(segments), []
    while count:
        segment = head.pop()
        depth = segment.depth
        number = 1 if depth is None else min(count, depth)
        if depth is not None and number < depth:
            head.append(segment._replace(run=depth - number))
        size = None if depth is None else number
        tail.append(segment._replace(depth=size, run=size, stores=True))
        count -= number
    return head, tail[::-1]


def last_operands(tail: list[Segment], operands: list) -> list:
    """Of the operands of all segments, those of the last, as `split_last` has these."""
    last = operands[len(operands) - len(tail) :]
    return [
        own
        if segment.depth is None
        else (*jax.tree.map(lambda leaf, n=segment.depth: leaf[-n:], own[:2]), own[2])
        for segment, own in zip(tail, last, strict=True)
    ]


def concatenate(first: PyTree, last: PyTree) -> PyTree:
    """What the blocks of a scan gave: the first ones and the others, along the leading axis."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), first, last)


def put_after(number: int, last: PyTree) -> PyTree:
    """What the last blocks of a scan gave, after zeros in place of what `number` others will."""
    return jax.tree.map(
        lambda leaf: jnp.pad(leaf, [(number, 0), *[(0, 0)] * (leaf.ndim - 1)]), last
    )


def close(segment, operands, x):
    """Make what f and g of a segment close over a part of its shared operands."""
    (f, g, coupling), (params, xs, [[args], _]) = segment.block, operands
    one = (*params, xs[0])
    if segment.depth is not None:
        one = jax.eval_shape(lambda stacked: jax.tree.map(lambda leaf: leaf[0], stacked), one)
    f, captured_f = hoist_closure(f, one[0], x[1], one[2], args)
    g, captured_g = hoist_closure(g, one[1], x[0], one[2], args)
    shared = [[args, captured_f], [args, captured_g]]
    return segment._replace(block=Block(f, g, coupling)), (params, xs, shared)
