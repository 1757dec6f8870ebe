"""What the residual functions of a chain are given and must return, checked while tracing."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from revjax.coupling import Coupling
from revjax.grid import round_to_grid
from revjax.trees import PyTree


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


def check_pair(name: str, pair: PyTree) -> None:
    """Raise a TypeError unless `pair` is a tuple or list of two."""
    if not (isinstance(pair, tuple | list) and len(pair) == 2):
        raise TypeError(f"{name} must be a pair, one entry a half, got {describe(pair)}.")


def stacked_depth(params: PyTree, xs: PyTree) -> int:
    """The size that the leading axes of params and xs agree on, or a ValueError."""
    leaves = jax.tree.leaves((params, xs))
    if not leaves:
        raise ValueError(
            "params and xs hold no array that tells the depth of the chain: give params as a list "
            "with one pair a block."
        )
    depths = {leaf.shape[0] if jnp.ndim(leaf) else None for leaf in leaves}
    if len(depths) > 1 or None in depths:
        raise ValueError(
            "Every leaf of params and xs must have the depth of the chain as its leading axis, got "
            f"params {describe(params)} and xs {describe(xs)}."
        )
    return depths.pop()


def residual_function(
    role: str, h: Callable, half: PyTree, coupling: Coupling, bits: int | None, has_aux: bool
) -> Callable[..., tuple[PyTree, PyTree]]:
    """Wrap `h` to check what it returns against `half`, and to round its residual to the grid.

    Returns:
        A function of the arguments of h that returns `(residual, aux)`, aux None without has_aux.
    """
    name = f"{role} ({getattr(h, '__name__', type(h).__name__)})"
    due = jax.eval_shape(coupling.residual_like, half)

    def residual_and_aux(*args):
        out = h(*args)
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(f"{name} must return (residual, aux), got {describe(out)}.")
        residual, aux = out if has_aux else (out, None)
        if _types(residual) != _types(due):
            raise TypeError(
                f"{name} returned {describe(residual)} where {describe(due)} was due: a residual "
                "has the structure, shapes and dtypes that the half of the stream it joins asks "
                "for. Cast a residual computed in another dtype. A block that changes shape "
                "(stride, width) cannot be reversible: apply it outside the chain."
            )
        return round_to_grid(residual, bits), aux

    return residual_and_aux


def _types(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [
        (jnp.shape(a), a.dtype if hasattr(a, "dtype") else jnp.result_type(a)) for a in leaves
    ]
