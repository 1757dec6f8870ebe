"""How the errors of reconstruction grow with depth, by dtype and grid: as a table and a plot."""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from revjax.architecture import integers
from revjax.check import largest_difference, normal_like, relative_error
from revjax.contract import chain_blocks, check_function, check_pair
from revjax.grid import round_to_grid
from revjax.reversible import Pair, rev_chain_apply, rev_chain_inverse
from revjax.trees import PyTree, check_arrays, check_concrete, is_inexact, vjp

COLOURS = ("#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")  # Okabe and Ito
MEASURES = {
    "gradient_error": "relative error of the gradient",
    "inverse_error": "largest error of the inverse",
}


class DriftRow(NamedTuple):
    """The errors of a chain.

    Attributes:
        dtype: what f and g computed in.
        grid_bits: k of the grid `2**-k`; None without one.
        depth: the number of blocks.
        gradient_error: |reversible - stored| / |stored|, of parameters and x together.
        inverse_error: the largest |inverse(y) - x|, x on the grid.
    """

    dtype: str
    grid_bits: int | None
    depth: int
    gradient_error: float
    inverse_error: float


class Drift(NamedTuple):
    """What `drift` found; `str()` of it is a table.

    Attributes:
        rows: for every dtype, grid and depth.

    Example:
        >>> found = Drift((DriftRow("float32", None, 100, gradient_error=1e-6, inverse_error=0),))
        >>> print(found)
        relative error of the gradient  100 blocks
        float32, no grid                   1.0e-06
        <BLANKLINE>
        largest error of the inverse  100 blocks
        float32, no grid                       0
    """

    rows: tuple[DriftRow, ...]

    def __str__(self) -> str:
        depths = sorted({row.depth for row in self.rows})
        blocks = [f"{depth} block{'s' * (depth > 1)}" for depth in depths]
        parts = []
        for measure, title in MEASURES.items():
            lines = [[title, *blocks]]
            for label, rows in self._lines().items():
                values = {row.depth: getattr(row, measure) for row in rows}
                shown = (f"{values[depth]:.1e}" if values[depth] else "0" for depth in depths)
                lines.append([label, *shown])
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            for first, *cells in lines:
                cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
                parts.append("  ".join([first.ljust(widths[0]), *cells]))
            parts.append("")
        return "\n".join(parts[:-1])

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the two errors against depth; an error of zero lies on the lower edge.

        One that is infinite or NaN is left out, and leaves a gap in its line.

        Args:
            path: of the image to write; None writes none.

        Returns:
            The `matplotlib.figure.Figure`, which a notebook shows.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.4), layout="constrained")
        depths = sorted({row.depth for row in self.rows})
        for axes, (measure, title) in zip(figure.subplots(1, 2), MEASURES.items(), strict=True):
            errors = [getattr(row, measure) for row in self.rows]
            lines = self._lines().items()
            for i, (label, rows) in enumerate(lines):
                axes.plot(
                    [row.depth for row in rows],
                    [_or_gap(getattr(row, measure)) for row in rows],
                    "s--" if rows[0].grid_bits is None else "o-",
                    color=COLOURS[i % len(COLOURS)],
                    label=label,
                    clip_on=False,  # zeros lie on the axis
                    markersize=3 + 1.5 * (len(lines) - i),  # those below show
                )
            errors = [error for error in errors if math.isfinite(error)]  # the rest has no place
            smallest = min((error for error in errors if error > 0), default=1e-7)
            axes.set_xscale("log")
            axes.set_yscale(
                "symlog", linthresh=10 ** math.floor(math.log10(smallest)), linscale=0.5
            )
            axes.set_ylim(0, 3 * max([*errors, smallest]))
            axes.set_xticks(depths, [str(depth) for depth in depths])
            axes.minorticks_off()
            axes.set(xlabel="blocks", title=title)
            axes.grid(alpha=0.3)
        figure.axes[0].legend(fontsize=8)
        if path is not None:
            figure.savefig(path, dpi=100)
        return figure

    def _lines(self) -> dict[str, list[DriftRow]]:
        """The rows of each line of the plot, by depth."""
        lines: dict[str, list[DriftRow]] = {}
        for row in sorted(self.rows, key=lambda row: row.depth):
            grid = "no grid" if row.grid_bits is None else f"grid 2^-{row.grid_bits}"
            lines.setdefault(f"{row.dtype}, {grid}", []).append(row)
        return lines


def _or_gap(error):
    return error if math.isfinite(error) else math.nan


def drift(
    f: Callable,
    g: Callable,
    params: Pair,
    x: Pair,
    *args: PyTree,
    dtypes: Sequence[Any] = ("float32", "bfloat16"),
    grid_bits: Sequence[int | None] = (None, 14),
    depths: Sequence[int] | None = None,
) -> Drift:
    """Measure the errors of the first blocks of a chain, for every dtype, grid and depth.

    The gradient of `<y, c>`, for a normal c, by backward="reversible" is held against that by
    "store" of the same function, and the inverse against x: not what a dtype or a grid itself
    costs. A program that stores may round its forward pass otherwise, which is in the former, and
    counts for more on a grid; of the reconstruction alone is the latter.

    Args:
        f, g, params, x, *args: as for `rev_chain_apply`, additive; params are stacked.
        dtypes: what f and g compute in: parameters, half and args are cast to it, and the residual
            back to the stream's dtype.
        grid_bits: grids, and None for the plain float coupling.
        depths: how many of the blocks; by default powers of four, and all of them.

    Returns:
        A `Drift`: print it for a table, look at its rows, or `plot()` it.

    Raises:
        TypeError, ValueError: what `rev_chain_apply` raises; params is a list; or a dtype, a grid
            or a depth is none.

    Example:
        >>> def dense(w, x): return jnp.tanh(x @ w)
        >>> w, x = 0.1 * jnp.ones((4, 3, 3)), (jnp.ones((2, 3)), jnp.ones((2, 3)))
        >>> found = revjax.drift(dense, dense, (w, w), x, dtypes=["float32"], grid_bits=[14])
        >>> print(found)
        relative error of the gradient  1 block  4 blocks
        float32, grid 2^-14                   0         0
        <BLANKLINE>
        largest error of the inverse  1 block  4 blocks
        float32, grid 2^-14                 0         0
    """
    if isinstance(params, list):
        raise TypeError("params is a list: give stacked parameters, of which some can be taken.")
    check_function("f", f)
    check_function("g", g)
    check_concrete("drift", params, x, args)
    x1, x2 = check_arrays("x", check_pair("x", x))
    x = jax.tree.map(jnp.asarray, (x1, x2))
    depth, *_ = chain_blocks(params, None, None)  # of all of them, before some are taken
    assert depth is not None
    if depths is None:
        depths = [4**i for i in range(depth.bit_length()) if 4**i < depth] + [depth]
    depths = integers("depths", depths)
    if max(depths) > depth:
        raise ValueError(f"depths={depths}: the chain has {depth} blocks.")
    rows = []
    for dtype in map(_floating, _listed("dtypes", dtypes)):
        for bits in _listed("grid_bits", grid_bits):
            measure = _measure(f, g, dtype, bits)
            for number in depths:
                some = jax.tree.map(lambda leaf, number=number: leaf[:number], params)
                errors = measure(some, x, args)
                rows.append(DriftRow(dtype.name, bits, number, *errors))
    return Drift(tuple(rows))


def _listed(name, values):
    if not isinstance(values, list | tuple):
        raise TypeError(f"{name}={values!r}: give a list.")
    return values


def _floating(name):
    try:
        dtype = None if name is None else jnp.dtype(name)  # NumPy takes None for float64
    except (TypeError, ValueError):
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype={name!r}: give a floating one, such as bfloat16.")
    return dtype


def _measure(f, g, dtype, bits):
    """A function of params, x and args that returns the two errors."""

    def functions(x):
        return _compute_in(dtype, f, x[0]), _compute_in(dtype, g, x[1])

    def differentiate(params, x, args, c, backward):
        def apply(params, x):
            how: Any = dict(grid_bits=bits, backward=backward)
            return rev_chain_apply(*functions(x), params, x, *args, **how)

        y, pullback = vjp(apply, params, x)
        return y, pullback(c)

    @jax.jit
    def stored(params, x, args, c):
        return differentiate(params, x, args, c, "store")[1]

    @jax.jit
    def reversible(params, x, args, c):
        y, gradient = differentiate(params, x, args, c, "reversible")
        # A barrier, so that no sum of one direction is fused with its difference in the other.
        y = jax.lax.optimization_barrier(y)
        return gradient, rev_chain_inverse(*functions(x), params, y, *args, grid_bits=bits)

    def errors(params, x, args):
        c = normal_like(x)
        got, back = reversible(params, x, args, c)
        due = stored(params, x, args, c)
        return relative_error(got, due), largest_difference(back, round_to_grid(x, bits))

    return errors


def _compute_in(dtype, h, due):
    """H with its floating inputs in dtype, and its residual in the dtypes that are due."""

    def narrow(leaf):
        if not is_inexact(leaf):
            return leaf
        if jnp.finfo(dtype).bits < jnp.finfo(leaf.dtype).bits:
            bits = jnp.finfo(dtype)  # else the compiler might keep the wider value, here or there
            leaf = jax.lax.reduce_precision(leaf, bits.nexp, bits.nmant)
        return leaf.astype(dtype)

    def widen(leaf, like):
        both = is_inexact(leaf) and is_inexact(like)
        return jnp.asarray(leaf).astype(like.dtype) if both else leaf

    @functools.wraps(h)  # errors name it
    def in_dtype(*operands):
        residual = h(*jax.tree.map(narrow, operands))
        if jax.tree.structure(residual) != jax.tree.structure(due):
            return residual  # which the chain refuses
        return jax.tree.map(widen, residual, due)

    return in_dtype
