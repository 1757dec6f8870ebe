"""How chains are laid out for the rule: as segments, and apart, as they are traced, their operands.

A segment is a scan over equal blocks, or a single block of a list. Its operands are
`(params, (xs, gates), shared)`: those that differ by block, `[depth, ...]` in a scan, and those
that all blocks share, `[for f, for g]`, which are the arguments and what f and g close over.
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
from revjax.trees import check_arrays, hoist_closure


class Block(NamedTuple):
    """Functions f and g as `(params, half, xs, *shared) -> (residual, aux)`, and the coupling."""

    f: Callable
    g: Callable
    coupling: Coupling


class Segment(NamedTuple):
    """Blocks with equal functions: a scan of them, or a single one."""

    block: Block
    depth: int | None  # of a scan; None: a single block, whose operands have no leading axis


def lay_out(chains, x, args, coupling, grid_bits, has_aux):
    """Check the inputs, put x on the grid, and lay the chains out as segments and operands."""
    check_flag("has_aux", has_aux)
    check_arrays("x", check_pair("x", x))
    bits = resolve_grid_bits(grid_bits, check_coupling(coupling).grid_bits, x)
    x1, x2 = x = round_to_grid(jax.tree.map(jnp.asarray, tuple(x)), bits)
    segments, operands = [], []
    for f, g, params, xs, gates in chains:
        has_xs = xs is not None
        depth, params, xs = chain_blocks(params, xs, gates)
        f = residual_function("f", f, x1, coupling, bits, has_aux, has_xs)
        g = residual_function("g", g, x2, coupling, bits, has_aux, has_xs)
        for both in zip(params, xs, strict=True):
            segments.append(Segment(Block(f, g, coupling), depth))
            operands.append((*both, [[args], [args]]))
    return bits, x, segments, operands


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
