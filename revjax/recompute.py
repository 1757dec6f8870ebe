"""Recomputation that the compiler keeps apart from what it repeats.

A program that computes a value twice, to return it and to differentiate it, is one that a compiler
would rather compute once and store. `jax.checkpoint` prevents that by `lax.optimization_barrier`,
which XLA:CPU drops. `after` holds there too.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from revjax.trees import PyTree, merge, partition, vjp


def after(x: PyTree, dependency: PyTree) -> PyTree:
    """Return x, bit for bit, as values that cannot be had before those of `dependency`.

    Nor can the compiler tell that they are x. Leaves that are not floating are left alone.
    """

    def barrier(x, dependency):
        return jax.lax.optimization_barrier((x, dependency))[0]

    def selection(x, dependency):
        leaves = [leaf for leaf in jax.tree.leaves(dependency) if leaf.size]
        return jax.tree.map(lambda leaf: _select(leaf, leaves), x)

    floating, others = partition(x)
    dependency, _ = partition(dependency)
    ordered = jax.lax.platform_dependent(floating, dependency, cpu=selection, default=barrier)
    return merge(ordered, others)


def _select(x: jax.Array, dependencies: list[jax.Array]) -> jax.Array:
    """Where a predicate holds, x: one that is true of all numbers, unknown to the compiler.

    It is asked of one number of a dependency, or of one for each entry of the leading axis that it
    shares with x, by which both may be sharded.
    """
    holds = jnp.bool_(True)
    for array in dependencies:
        shared = array.ndim > 0 and array.shape[:1] == x.shape[:1]
        number = array[(slice(None) if shared else 0, *[0] * (array.ndim - 1))[: array.ndim]].real
        bits = jnp.dtype(f"uint{8 * number.dtype.itemsize}")
        holds_here = jax.lax.bitcast_convert_type(number, bits) | bits.type(1) != 0
        holds &= holds_here.reshape(number.shape + (1,) * (x.ndim - number.ndim))
    return jnp.where(holds, x, jnp.zeros_like(x))


def recompute(fun: Callable, x: PyTree, *operands: PyTree) -> tuple[PyTree, PyTree]:
    """`fun(x, *operands)`, a pair `(y, aux)`, whose gradient keeps x and operands and nothing else.

    As under `jax.checkpoint`, except that aux has no gradient, that fun must not close over traced
    values, and that forward mode is not supported.
    """

    def forward(floating, others):
        return fun(*merge(floating, others))

    def backward(saved, cotangents):
        x, *operands = saved
        dy = partition(cotangents[0])[0]
        _, pullback = vjp(lambda *all: fun(*all)[0], after(x, dy), *operands)
        return pullback(dy), None

    rule = jax.custom_vjp(forward)
    rule.defvjp(lambda *parts: (forward(*parts), merge(*parts)), backward)
    return rule(*partition((x, *operands)))
