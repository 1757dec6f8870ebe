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
    """

    combine: Callable[[PyTree, PyTree], PyTree]
    separate: Callable[[PyTree, PyTree], PyTree]
    residual_like: Callable[[PyTree], PyTree]
    grid_bits: int | None


def _is_number(leaf) -> bool:
    return jnp.issubdtype(jax.typeof(leaf).dtype, jnp.number)


additive = Coupling(
    combine=partial(jax.tree.map, lambda x, r: x + r if _is_number(x) else x),
    separate=partial(jax.tree.map, lambda y, r: y - r if _is_number(y) else y),
    residual_like=lambda x: x,
    grid_bits=DEFAULT_GRID_BITS,
)
"""`y = x + r` (NICE, Dinh et al. 2014, section 3.2; RevNet, Gomez et al. 2017): exact on the grid.

Integer leaves add modulo `2**bits`; booleans and PRNG keys cannot be added and pass unchanged."""


def _scale_and_shift(x, log_scale, shift):
    return x * jnp.exp(log_scale) + shift if is_inexact(x) else x


def _unshift_and_unscale(y, log_scale, shift):
    return (y - shift) / jnp.exp(log_scale) if is_inexact(y) else y


affine = Coupling(
    combine=lambda x, residual: jax.tree.map(_scale_and_shift, x, *residual),
    separate=lambda y, residual: jax.tree.map(_unshift_and_unscale, y, *residual),
    residual_like=lambda x: (x, x),
    grid_bits=None,
)
"""`y = x * exp(log_scale) + shift`, residual `(log_scale, shift)` (RealNVP, Dinh et al. 2017).

A scale below one drops bits, so no grid makes it exact: it inverts up to float rounding, magnified
by `exp(-log_scale)`. Leaves that are not floating pass unchanged."""
