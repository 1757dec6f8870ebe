"""Recomputation that the compiler keeps apart from what it repeats.

A program that computes a value twice, to return it and to differentiate it, is one that a compiler
would rather compute once and store. `jax.checkpoint` prevents that by `lax.optimization_barrier`,
which XLA:CPU drops in JAX 0.10. `after` holds there too.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from revjax.trees import PyTree, merge, partition, vary_as, vjp


def after(x: PyTree, dependency: PyTree) -> PyTree:
    """Return x, bit for bit, as values that cannot be had before those of `dependency`.

    Nor can the compiler tell that they are x. Leaves of either that are not floating play no part.
    """
    floating, others = partition(x)
    dependency, _ = partition(dependency)
    for leaf in jax.tree.leaves(dependency):
        floating = jax.tree.map(partial(vary_as, leaf), floating)
    ordered = jax.lax.platform_dependent(floating, dependency, cpu=_branch, default=_barrier)
    return merge(ordered, others)


def _barrier(x, dependency):
    return jax.lax.optimization_barrier((x, dependency))[0]


def _branch(x, dependency):
    """Return x if something holds that is true of all numbers, which the compiler does not know."""

    def zeros(x):
        return jax.tree.map(lambda leaf: vary_as(leaf, jnp.zeros_like(leaf)), x)

    holds = _holds(*map(jax.lax.stop_gradient, jax.tree.leaves(dependency)))
    return jax.lax.cond(holds, lambda x: x, zeros, x)


@jax.custom_batching.custom_vmap
def _holds(*leaves):
    holds = jnp.bool_(True)
    for leaf in leaves:
        bits = jnp.dtype(f"uint{8 * leaf.real.dtype.itemsize}")
        holds &= (jax.lax.bitcast_convert_type(leaf.real, bits) | bits.type(1) != 0).all()
    return holds


@_holds.def_vmap
def _holds_of_all(axis_size, in_batched, *leaves):
    """One for all members: the conditional stays one, and gives no axis to what has none."""
    return _holds(*leaves), False


def apart(x: PyTree) -> PyTree:
    """Return x, bit for bit, as values that are in memory before anything is computed with them.

    A GPU's compiler sums values up in one order as it computes them, and in another as it reads
    them; and of the two evaluations of a residual function only one has its input in memory. On a
    CPU, whose two evaluations are the same bits without it, nothing is done. Nor is anything done
    to the cotangent.
    """
    floating, others = partition(x)
    return merge(jax.tree.map(_apart_p.bind, floating), others)


_apart_p = Primitive("apart")
_apart_p.def_impl(lambda x: x)
_apart_p.def_abstract_eval(lambda x: x)
ad.primitive_jvps[_apart_p] = lambda primals, tangents: (_apart_p.bind(*primals), *tangents)
batching.primitive_batchers[_apart_p] = lambda args, axes: (_apart_p.bind(*args), *axes)
mlir.register_lowering(
    _apart_p, mlir.lower_fun(jax.lax.optimization_barrier, multiple_results=False)
)
mlir.register_lowering(
    _apart_p, mlir.lower_fun(lambda x: x, multiple_results=False), platform="cpu"
)


def checkpoint_step(step: Callable, depth: int, unroll: int | bool) -> Callable:
    """`jax.checkpoint(step)`, for a `lax.scan` of that length and unroll.

    A loop keeps the recomputation apart without a barrier.
    """
    return jax.checkpoint(step, prevent_cse=not stays_loop(depth, unroll))


def stays_loop(depth: int, unroll: int | bool) -> bool:
    """True if a `lax.scan` of that length and unroll is a loop in the compiled program.

    It is sure to be one only for one step an iteration, and two iterations or more.
    """
    return unroll is not True and unroll == 1 and depth > 1


def recompute(fun: Callable, x: PyTree, *operands: PyTree) -> tuple[PyTree, PyTree]:
    """`fun(x, *operands)`, a pair `(y, aux)`, whose gradient keeps x and operands and nothing else.

    As under `jax.checkpoint`, except that aux has no gradient, that fun must not close over traced
    values, and that forward mode is not supported.
    """

    def run(x, *operands):
        return fun(apart(x), *operands)

    def forward(*inputs):
        return run(*inputs), inputs

    def backward(inputs, dy):
        x, *operands = inputs
        _, pullback = vjp(lambda x, *rest: fun(after(x, dy), *rest)[0], x, *operands)
        return pullback(dy)

    return _with_rule(run, forward, backward, x, *operands)


def store(fun: Callable, x: PyTree, *operands: PyTree) -> tuple[PyTree, PyTree]:
    """`fun(x, *operands)`, a pair `(y, aux)`, whose gradient keeps what `jax.vjp` of fun keeps.

    For a fun under `jax.checkpoint` with a policy, and prevent_cse=False: what is not kept is
    evaluated again once the cotangent is there, but for what comes of integers and keys alone, such
    as noise. Otherwise as for `recompute`.
    """

    def forward(*inputs):
        y, pullback, aux = vjp(fun, *inputs, has_aux=True)
        return (y, aux), pullback

    def backward(pullback, dy):
        return after(pullback, dy)(dy)

    return _with_rule(fun, forward, backward, x, *operands)


def _with_rule(run, forward, backward, *inputs):
    """`run(*inputs)`, a pair `(y, aux)`, with a rule for the floating leaves of inputs and of y.

    forward is `*inputs -> (y, aux), saved`, and backward `saved, dy -> cotangents`.
    """
    rule = jax.custom_vjp(lambda *parts: run(*merge(*parts)))
    rule.defvjp(
        lambda *parts: forward(*merge(*parts)),
        lambda saved, cotangents: (backward(saved, partition(cotangents[0])[0]), None),
    )
    return rule(*partition(inputs))
