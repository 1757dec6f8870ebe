"""What a custom derivative rule needs of pytrees: floating leaves apart, closures made inputs.

A tree is partitioned into two of the same structure: one keeps the floating leaves, the other the
rest, each with None in the holes. Cotangents are trees of the first kind.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer, eval_jaxpr

PyTree = Any


def is_inexact(leaf) -> bool:
    """True for floating and complex leaves: those that are rounded, scaled and differentiated."""
    return jnp.issubdtype(jax.typeof(leaf).dtype, jnp.inexact)


def check_arrays(name: str, tree: PyTree) -> PyTree:
    """Return `tree`, or raise a TypeError unless every leaf is an array or a number."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(f"{name} has a leaf without values, {leaf}: call by jax.eval_shape.")
        try:
            jax.typeof(leaf)
        except TypeError as error:
            raise TypeError(
                f"{name} has a leaf that is no array, {leaf!r}; bind what is static by "
                "functools.partial."
            ) from error
    return tree


def check_concrete(name: str, *trees: PyTree) -> None:
    """Raise a TypeError where a leaf is traced, which `name` could not look at."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees)):
        raise TypeError(
            f"{name} looks at values, and was called under a transform: call it outside."
        )


def partition(tree: PyTree) -> tuple[PyTree, PyTree]:
    """Split into `(floating leaves, other leaves)`, with None in the holes."""
    floating = jax.tree.map(lambda leaf: leaf if is_inexact(leaf) else None, tree)
    others = jax.tree.map(lambda leaf: None if is_inexact(leaf) else leaf, tree)
    return floating, others


def merge(floating: PyTree, others: PyTree) -> PyTree:
    """The inverse of `partition`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, floating, others, is_leaf=lambda leaf: leaf is None
    )


def add(a: PyTree, b: PyTree) -> PyTree:
    """Sum of two cotangents."""
    return jax.tree.map(lambda a, b: a + b, a, b)


def vary_as(other: jax.Array, x: jax.Array) -> jax.Array:
    """Return x, under `shard_map` as one that varies over the axes that `other` varies over too."""
    axes = jax.typeof(other).mat.varying - jax.typeof(x).mat.varying
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def vjp(fun: Callable, *operands: PyTree, has_aux: bool = False) -> Any:
    """`jax.vjp` in which only floating leaves have cotangents.

    Returns:
        `fun(*operands)`, and a function from the cotangent of that to those of the operands, as a
        pytree, so that a rule may save it. With has_aux, of a fun that returns `(out, aux)`, aux
        comes third.
    """
    floating, others = partition(operands)

    def floating_fun(floating):
        out = fun(*merge(floating, others))
        out, aux = out if has_aux else (out, None)
        out, rest = partition(out)
        return out, (rest, aux)

    out, pullback, (rest, aux) = jax.vjp(floating_fun, floating, has_aux=True)
    of_operands = jax.tree_util.Partial(_pull_back, pullback)
    return (merge(out, rest), of_operands, *([aux] if has_aux else []))


def _pull_back(pullback, cotangent):
    return pullback(cotangent)[0]


def hoist_closure(fun: Callable, *operands: PyTree) -> tuple[Callable, list[Any]]:
    """Trace `fun` and make the traced values that it closes over explicit.

    `jax.closure_convert` does so for floats only; an integer or a key of an enclosing trace would
    still leak into the backward pass.

    Args:
        fun: any traceable function.
        *operands: pytrees of arrays or `jax.ShapeDtypeStruct`, as `fun` will be given them.

    Returns:
        `closed` and `captured`, such that `closed(*operands, captured)` is `fun(*operands)`.
    """
    jaxpr: Any
    jaxpr, out = jax.make_jaxpr(fun, return_shape=True)(*operands)
    out_structure = jax.tree.structure(out)
    is_traced = [isinstance(const, Tracer) for const in jaxpr.consts]
    fixed = [None if t else c for c, t in zip(jaxpr.consts, is_traced, strict=True)]
    captured = [c for c, t in zip(jaxpr.consts, is_traced, strict=True) if t]
    # From jax 0.12 on a jaxpr holds its consts, and would keep the enclosing trace alive.
    body = jaxpr.with_consts(fixed) if hasattr(jaxpr, "with_consts") else jaxpr.jaxpr

    def closed(*operands_and_captured):
        *operands, captured = operands_and_captured
        traced = iter(captured)
        consts = [next(traced) if t else c for c, t in zip(fixed, is_traced, strict=True)]
        leaves = eval_jaxpr(body, consts, *jax.tree.leaves(operands))
        return jax.tree.unflatten(out_structure, leaves)

    return closed, captured
