"""The grid that makes addition exact, and the range within which it does.

Float addition loses bits, so `(x + r) - r` is `x` only up to an ulp; those ulps flip ReLUs and bf16
roundings, and the error of a reconstructed gradient grows with depth. On a grid it does not: two
multiples of `2**-k` add without rounding as long as their sum stays within `2**(24 - k)` (float32;
`2**(53 - k)` for float64), and subtraction gives back the very same bits.

Within the range nothing is lost but the resolution `2**-k`; beyond it the chain still works, with
the errors of the plain float coupling, so the range is worth watching: `rev_chain_apply` hands the
largest |stream| and its bound to the function given as `range_check`.
"""

import operator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from revjax.trees import PyTree, check_arrays, is_inexact

GridBits = int | Literal["default"] | None

DEFAULT_GRID_BITS = 14


def round_to_grid(tree: PyTree, grid_bits: int | None) -> PyTree:
    """Round every floating leaf to the nearest multiple of `2**-grid_bits`.

    The derivative is the identity (straight-through), in both modes. Other leaves, and all leaves
    where `grid_bits` is None, are returned as they are.

    Args:
        tree: any pytree, its floating leaves float32 or float64.
        grid_bits: k, from 0 to the bits of their significand (23 or 52); None does not round.

    Raises:
        TypeError, ValueError: the leaves' dtype cannot hold such a grid.

    Example:
        >>> print(round_to_grid(jnp.float32(0.3), 2))
        0.25
    """
    bits = resolve_grid_bits(grid_bits, DEFAULT_GRID_BITS, check_arrays("tree", tree))
    if bits is None:
        return tree

    def round_leaf(x):
        if not is_inexact(x):
            return x
        x = jnp.asarray(x)
        scale = jnp.asarray(2.0**bits, x.dtype)
        # Beyond, every number is on the grid, and infinities stay what they are.
        fine = jnp.abs(x) < 2.0 ** (jnp.finfo(x.dtype).nmant - bits)
        rounding = jnp.where(fine, jnp.round(x * scale) / scale - x, jnp.zeros_like(x))
        # Exact, as a sum and as a difference. Not a custom_jvp: jax 0.10 gets the second derivative
        # of one wrong inside scan.
        return x + jax.lax.stop_gradient(rounding)

    return jax.tree.map(round_leaf, tree)


def resolve_grid_bits(grid_bits: GridBits, default: int | None, stream: PyTree) -> int | None:
    """The grid to use for `stream`, or a TypeError or ValueError that says why there is none.

    Args:
        grid_bits: what was asked for.
        default: the coupling's own grid, None for a coupling that cannot keep to one.
        stream: any pytree of arrays.
    """
    if grid_bits is None or (grid_bits == "default" and default is None):
        return None
    given: Any = default if grid_bits == "default" else grid_bits
    try:
        bits = operator.index(given)  # NumPy's integers too
    except TypeError:
        bits = None
    if bits is None or isinstance(given, bool):
        raise TypeError(f'grid_bits={grid_bits!r}: give an integer, None or "default".')
    if default is None:
        raise ValueError(
            f"grid_bits={grid_bits}, but this coupling cannot keep the stream on a grid: pass "
            "grid_bits=None (its default), or use the additive coupling."
        )
    for dtype in {jax.typeof(leaf).dtype for leaf in jax.tree.leaves(stream) if is_inexact(leaf)}:
        if dtype not in (jnp.float32, jnp.float64):
            raise TypeError(
                f"The stream is {dtype}, which cannot hold a grid: cast it to float32 (f and g "
                f"may compute in {dtype} and cast their result), or pass grid_bits=None for the "
                "plain float coupling, whose gradient error grows with depth."
            )
        _check_fits(bits, dtype)
    return bits


def _check_fits(bits, dtype):
    if not 0 <= bits <= jnp.finfo(dtype).nmant:
        raise ValueError(
            f"grid_bits={bits}: give an integer from 0 to {jnp.finfo(dtype).nmant} for a "
            f"{dtype} stream, or None for the plain float coupling."
        )


def stream_bound(grid_bits: int | None, dtype: Any = jnp.float32) -> float:
    """The magnitude within which a stream on the grid adds without rounding.

    Args:
        grid_bits: k, for a grid of multiples of `2**-k`; None for no grid.
        dtype: of the stream, float32 or float64.

    Returns:
        `2**(24 - k)` for float32, `2**(53 - k)` for float64, infinity without a grid.

    Raises:
        ValueError: the dtype is another, or k none that its significand has room for.
        TypeError: grid_bits is no integer.

    Example:
        >>> stream_bound(14)
        1024.0
    """
    if grid_bits is None:
        return float("inf")
    try:
        known = None if dtype is None else jnp.dtype(dtype)  # NumPy takes None for float64
    except (TypeError, ValueError):
        known = None
    if known is None or known not in (jnp.float32, jnp.float64):
        raise ValueError(f"dtype={dtype!r}: give float32 or float64.")
    bits: Any = resolve_grid_bits(grid_bits, DEFAULT_GRID_BITS, ())
    _check_fits(bits, known)
    return 2.0 ** (jnp.finfo(known).nmant + 1 - bits)


def stream_peak(stream: PyTree) -> jax.Array:
    """The largest magnitude in a pytree: a float32 scalar, without gradient.

    NaN where the stream holds one; 0 where it has no floating leaf. A float64 value beyond the
    range of float32 counts as infinite. Raises nothing.

    Example:
        >>> print(stream_peak((jnp.array([1.0, -3.0]), jnp.array([2.0]))))
        3.0
    """
    leaves = [leaf for leaf in jax.tree.leaves(stream) if is_inexact(leaf)]
    peaks = [jnp.max(jnp.abs(leaf), initial=0.0).astype(jnp.float32) for leaf in leaves]
    return jax.lax.stop_gradient(jnp.max(jnp.stack(peaks)) if peaks else jnp.float32(0))


_OUT_OF_RANGE = (
    "The stream reached {peak}, beyond the {bound} within which it is exact on its grid: gradients "
    "are approximate. Use a smaller grid_bits, or keep the stream smaller."
)


def warn_out_of_range(peak: jax.Array, bound: float) -> None:
    """A `range_check` that prints a sentence when |stream| passes its bound; works under jit.

    Raises nothing: `check_in_range` does.

    Args:
        peak: the largest |stream|, float32 `[]`, traced or not.
        bound: what `stream_bound` says.

    Example:
        >>> warn_out_of_range(jnp.float32(1000), stream_bound(14))  # within: silent
    """

    def warn(peak):
        if not peak <= bound:  # NaN warns too
            print(_OUT_OF_RANGE.format(peak=peak, bound=bound), flush=True)

    jax.debug.callback(warn, peak)  # not lax.cond, both of whose branches run under vmap


def check_in_range(peak: jax.Array, bound: float) -> None:
    """A `range_check` that is a `checkify.check`: the caller is wrapped in `checkify.checkify`.

    Args:
        peak: the largest |stream|, float32 `[]`, traced or not.
        bound: what `stream_bound` says.

    Raises:
        checkify.JaxRuntimeError: |stream| passes its bound; from a wrapped caller, by the `throw`
            of the error that it returns.
        ValueError: the caller is compiled, and not wrapped.

    Example:
        >>> from jax.experimental.checkify import checkify
        >>> error, _ = checkify(check_in_range)(jnp.float32(2000), stream_bound(14))
        >>> "The stream reached 2000" in error.get()
        True
    """
    peak = jnp.asarray(peak, jnp.float32)
    checkify.check(peak <= bound, _OUT_OF_RANGE, peak=peak, bound=jnp.float32(bound))
