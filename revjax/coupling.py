"""Couplings: how a residual joins one half of the stream, and how it leaves it again.

A reversible block changes one half of its activations at a time, by a residual computed from the
other half. Combining and separating work leaf by leaf on pytrees.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from revjax.grid import DEFAULT_GRID_BITS
from revjax.trees import PyTree, is_inexact


class Coupling(NamedTuple):
    """An invertible way to combine one half of the stream with a residual.

    Attributes:
        combine: `(x, residual) -> y`, where y has the structure, shapes and dtypes of x.
        separate: `(y, residual) -> x`, its inverse in the first argument.
        residual_like: `x -> residual`: the structure, shapes and dtypes that a residual must have.
        grid_bits: the default grid, or None for a coupling that cannot keep the stream on a grid.

    It raises nothing itself; a chain raises a TypeError where a residual is not like what
    residual_like says. Off the grid, an inverse that is one only up to rounding is allowed.

    Example:
        >>> halve = lambda x, r: jax.tree.map(lambda x, r: x / 2 + r, x, r)
        >>> double = lambda y, r: jax.tree.map(lambda y, r: 2 * (y - r), y, r)
        >>> halving = revjax.Coupling(halve, double, residual_like=lambda x: x, grid_bits=None)
        >>> def dense(w, x): return jnp.tanh(x @ w)
        >>> x, w = (jnp.ones((2, 3)), jnp.ones((2, 3))), jnp.zeros((10, 3, 3))
        >>> y = revjax.rev_chain_apply(dense, dense, (w, w), x, coupling=halving)
        >>> print(revjax.rev_chain_inverse(dense, dense, (w, w), y, coupling=halving)[0][0])
        [1. 1. 1.]
    """

    combine: Callable[[PyTree, PyTree], PyTree]
    separate: Callable[[PyTree, PyTree], PyTree]
    residual_like: Callable[[PyTree], PyTree]
    grid_bits: int | None


# By name, not lambda, all that a coupling holds: so a network with one can be pickled.


def _is_number(leaf) -> bool:
    return jnp.issubdtype(jax.typeof(leaf).dtype, jnp.number)


def _plus(x, residual):
    return x + residual if _is_number(x) else x


def _minus(y, residual):
    return y - residual if _is_number(y) else y


def _alike(x):
    return x


additive = Coupling(
    combine=partial(jax.tree.map, _plus),
    separate=partial(jax.tree.map, _minus),
    residual_like=_alike,
    grid_bits=DEFAULT_GRID_BITS,
)
"""`y = x + r` (NICE, Dinh et al. 2014, section 3.2; RevNet, Gomez et al. 2017): exact on the grid.

Integer leaves add modulo `2**bits`; booleans and PRNG keys cannot be added and pass unchanged. A
residual has the structure, shapes and dtypes of x; a chain raises a TypeError where it has not.

Example:
    >>> additive.separate(additive.combine(2.0, 0.25), 0.25)
    2.0
"""


def _scale_and_shift(x, residual):
    def of_leaf(x, log_scale, shift):
        return x * jnp.exp(log_scale) + shift if is_inexact(x) else x

    return jax.tree.map(of_leaf, x, *residual)


def _unshift_and_unscale(y, residual):
    def of_leaf(y, log_scale, shift):
        return (y - shift) / jnp.exp(log_scale) if is_inexact(y) else y

    return jax.tree.map(of_leaf, y, *residual)


def _two_alike(x):
    return x, x


affine = Coupling(
    combine=_scale_and_shift,
    separate=_unshift_and_unscale,
    residual_like=_two_alike,
    grid_bits=None,
)
"""`y = x * exp(log_scale) + shift`, residual `(log_scale, shift)` (RealNVP, Dinh et al. 2017).

A scale below one drops bits, so no grid makes it exact: it inverts up to float rounding, magnified
by `exp(-log_scale)`. Leaves that are not floating pass unchanged. Both of a residual are like x; a
chain raises a TypeError where they are not, and a ValueError where it is asked for a grid.

Example:
    >>> x, residual = jnp.float32(2), (jnp.float32(0), jnp.float32(1))
    >>> print(affine.combine(x, residual), affine.separate(affine.combine(x, residual), residual))
    3.0 2.0
"""
