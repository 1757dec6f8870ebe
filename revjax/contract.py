"""What the residual functions of a chain are given and must return, checked while tracing."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from revjax.coupling import Coupling
from revjax.grid import round_to_grid
from revjax.trees import PyTree, check_arrays, is_inexact

Gates = tuple[jax.Array | None, jax.Array | None] | None  # for f, for g; None: always open


def describe(tree: PyTree) -> str:
    """A pytree's structure with `dtype[shape]` for its leaves."""
    return str(jax.tree.map(_Short, tree))


class _Short:
    def __init__(self, leaf):
        self.leaf = leaf

    def __repr__(self):
        if not hasattr(self.leaf, "shape"):
            return type(self.leaf).__name__
        return f"{self.leaf.dtype}[{','.join(map(str, self.leaf.shape))}]"


def check_function(name: str, function: Any) -> Callable:
    """Return `function`, or raise a TypeError if it cannot be called."""
    if not callable(function):
        raise TypeError(f"{name}={function!r}: give a function.")
    return function


def check_key(key: Any) -> jax.Array:
    """Return `key`, or raise a TypeError unless it is a single PRNG key, of either kind."""
    kind, rank = getattr(key, "dtype", None), getattr(key, "ndim", None)
    typed = kind is not None and jnp.issubdtype(kind, jax.dtypes.prng_key) and rank == 0
    if not (typed or (kind == jnp.uint32 and rank == 1)):  # the latter: jax.random.PRNGKey
        raise TypeError(f"key={key!r}: give a PRNG key, such as jax.random.key(step).")
    return key


def check_flag(name: str, flag: Any) -> bool:
    """Return `flag`, or raise a TypeError unless it is True or False."""
    if not isinstance(flag, bool):
        raise TypeError(f"{name}={flag!r}: give True or False.")
    return flag


def check_unroll(unroll: Any) -> int | bool:
    """`unroll` as `lax.scan` takes it, or a ValueError unless it is True or a positive integer."""
    if unroll is True:
        return True
    try:
        number = 0 if unroll is False else operator.index(unroll)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"unroll={unroll!r}: give a positive integer, or True for all blocks.")
    return number


def check_store_last(store_last: Any, blocks: int, backward: str) -> int:
    """`store_last` as an int, or a ValueError: from 0 to blocks, and 0 if not "reversible"."""
    try:
        number = -1 if isinstance(store_last, bool) else operator.index(store_last)
    except TypeError:
        number = -1
    if not 0 <= number <= blocks:
        raise ValueError(
            f"store_last={store_last!r}: give a number from 0 to {blocks}, as there are so many "
            "reversible blocks."
        )
    if number and backward != "reversible":
        raise ValueError(
            f'store_last={number} and backward="{backward}": leave store_last out, which is an '
            'option of "reversible".'
        )
    return number


def check_pair(name: str, pair: PyTree, hint: str = "") -> PyTree:
    """Return `pair`, or raise a TypeError, with a hint, unless it is a tuple or list of two."""
    if not (isinstance(pair, tuple | list) and len(pair) == 2):
        sentence = f"{name} must be a pair, one entry a half, got {describe(pair)}."
        raise TypeError(f"{sentence} {hint}".rstrip())
    return pair


def check_coupling(coupling: Any) -> Coupling:
    """Return `coupling`, or raise a TypeError if it is none."""
    if not isinstance(coupling, Coupling):
        raise TypeError(
            f"coupling={coupling!r}: give revjax.additive, revjax.affine or a revjax.Coupling."
        )
    return coupling


def check_backward(backward: Any, ways: Sequence[str] = ("reversible", "remat", "store")) -> Any:
    """Return `backward`, or raise a ValueError unless it is one of the ways."""
    if not (isinstance(backward, str) and backward in tuple(ways)):
        raise ValueError(f"backward={backward!r}: give one of {', '.join(ways)}.")
    return backward


def chain_blocks(params: PyTree, xs: PyTree, gates: PyTree) -> tuple[int | None, list, list]:
    """The depth of stacked params, None for a list of blocks; and what is run in turn.

    Returns:
        `(depth, params, xs)`: lists with one entry a block, or with the stacked trees alone; each
        of xs is `(xs, gates)`.

    Raises:
        TypeError: params, gates or an entry of their lists is not a pair, or a gate is not bool of
            the rank that is due.
        ValueError: leading axes disagree, or there are none, or the lists differ in length.
    """
    for name, tree in (("params", params), ("xs", xs)):
        check_arrays(name, tree)
    if isinstance(params, list):
        for name, value in (("xs", xs), ("gates", gates)):
            if value is not None and not (isinstance(value, list) and len(value) == len(params)):
                raise ValueError(
                    f"params is a list of {len(params)} blocks: {name} must be one too, got "
                    f"{describe(value)}."
                )
        hint = "A list holds one pair a block; stacked parameters are a tuple, (f's, g's)."
        # As plain tuples, which is what the rule gives for their cotangents.
        params = [tuple(check_pair(f"params[{i}]", pair, hint)) for i, pair in enumerate(params)]
        none = [None] * len(params)
        all_gates = [_check_gates(pair, 0) for pair in gates or none]
        return None, params, list(zip(xs or none, all_gates, strict=True))
    check_pair("params", params)
    gates = _check_gates(gates, 1)
    leaves = jax.tree.leaves((params, xs, gates))
    if not leaves:
        raise ValueError(
            "params and xs hold no array that would tell the depth of the chain: give params as a "
            "list with one pair a block."
        )
    depths = {leaf.shape[0] if jnp.ndim(leaf) else None for leaf in leaves}
    if len(depths) > 1 or None in depths:
        raise ValueError(
            "Every leaf of params, xs and gates must have the depth of the chain as its leading "
            f"axis, got params {describe(params)}, xs {describe(xs)} and gates {describe(gates)}."
        )
    # NumPy's arrays have no traced index.
    params, xs, gates = jax.tree.map(jnp.asarray, (tuple(params), xs, gates))
    return depths.pop(), [params], [(xs, gates)]


def _check_gates(gates, rank):
    """Gates as a pair, each None or a bool array of that rank."""
    if gates is None:
        return None, None
    check_pair("gates", gates, "Give (for f, for g), each bool or None.")
    for gate in gates:
        if gate is not None and not _is_bool(gate, rank):
            raise TypeError(
                f"a gate must be bool{['[]', '[depth]'][rank]} or None, got {describe(gates)}."
            )
    return tuple(gates)


def _is_bool(gate, rank):
    try:
        kind = jax.typeof(gate)
    except TypeError:  # of a list, a string, an array of objects
        return False
    return kind.dtype == jnp.bool_ and kind.ndim == rank


def residual_function(
    role: str,
    h: Callable,
    half: PyTree,
    coupling: Coupling,
    grid_bits: int | None,
    has_aux: bool,
    has_xs: bool,
) -> Callable[..., tuple[PyTree, PyTree]]:
    """Wrap f or g to check what it returns, and to round its residual to the grid.

    Args:
        role: "f" or "g", for messages.
        h: the function.
        half: the half of the stream that the residual joins.
        coupling: says what the residual must be like.
        grid_bits: see `round_to_grid`.
        has_aux: h returns `(residual, aux)`.
        has_xs: h takes the block's entry of xs as its last argument.

    Returns:
        `(params, half, xs, args) -> (residual, aux)`; aux is None without has_aux.
    """
    check_function(role, h)
    name = f"{role} ({getattr(h, '__name__', type(h).__name__)})"
    due = jax.eval_shape(coupling.residual_like, half)
    for part in ("combine", "separate"):
        _check_half(part, jax.eval_shape(getattr(coupling, part), half, due), half)

    def residual_and_aux(params, half, xs, args):
        out = h(params, half, *args, xs) if has_xs else h(params, half, *args)
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(f"{name} must return (residual, aux), got {describe(out)}.")
        residual, aux = out if has_aux else (out, None)
        check_arrays(f"the aux of {name}", aux)
        if _types(residual) != _types(due):
            raise TypeError(
                f"{name} returned {describe(residual)} where {describe(due)} was due: a residual "
                "has the structure, shapes and dtypes that the half of the stream it joins asks "
                f"for. {_remedy(residual, due, has_aux)}"
            )
        return round_to_grid(residual, grid_bits), aux

    return residual_and_aux


def _remedy(residual, due, has_aux):
    """What to do about a residual that is not what was due."""
    is_pair = isinstance(residual, tuple) and len(residual) == 2
    if is_pair and not has_aux and _types(residual[0]) == _types(due):
        return "If the second of the two is an auxiliary value, pass has_aux=True."
    for leaf, wanted in zip(*map(jax.tree.leaves, (residual, due)), strict=False):
        found = getattr(leaf, "dtype", jnp.bool_)
        if jnp.issubdtype(found, jnp.inexact) and not is_inexact(wanted):
            return (
                f"The stream x is {wanted.dtype} there, which has no gradient: cast it to {found}."
            )
    return (
        "Cast a residual computed in another dtype; a block that changes shape (stride, width) "
        "cannot be reversible and belongs outside the chain."
    )


def _check_half(part, found, half):
    if _types(found) != _types(half):
        raise TypeError(
            f"the coupling's {part} returned {describe(found)} for a half of the stream that is "
            f"{describe(half)}: it must keep structure, shapes and dtypes."
        )


def _types(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [_type(leaf) for leaf in leaves]


def _type(leaf):
    if isinstance(leaf, bool | int | float | complex):
        return jnp.shape(leaf), jnp.result_type(leaf)
    return getattr(leaf, "shape", None), getattr(leaf, "dtype", type(leaf))
