"""Which networks there can be: the checks that ResNet and RevNet share."""

import math
import numbers
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from revjax.contract import check_backward, check_flag, check_unroll, describe

FLOAT32_MAX = float(jnp.finfo(jnp.float32).max)


def integers(name: str, values: Any) -> tuple[int, ...]:
    """`values` as a tuple of positive ints, NumPy's among them, or a ValueError that names them."""
    try:
        found = tuple(operator.index(value) for value in values)
        if found and min(found) > 0 and not any(isinstance(value, bool) for value in values):
            return found
    except TypeError:  # no sequence, or not of integers
        pass
    raise ValueError(f"{name}={values!r}: give positive integers.")


def integer(name: str, value: Any) -> int:
    """`value` as a positive int, or a ValueError that names it."""
    try:
        return integers(name, [value])[0]
    except ValueError:
        raise ValueError(f"{name}={value!r}: give a positive integer.") from None


def number(
    name: str,
    value: Any,
    due: str = "a finite number",
    fits: Callable[[float], bool] = math.isfinite,
) -> float:
    """`value` as a float, if it is a finite float32 number, NumPy's among them, that fits.

    Raises:
        ValueError: it is none, or a bool; the sentence names it, and what is due.
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        found = float(value) if real else math.nan
    except OverflowError:  # of an integer or a fraction
        found = math.inf
    if abs(found) <= FLOAT32_MAX and fits(found):  # no comparison with NaN holds
        return found
    raise ValueError(f"{name}={value!r}: give {due}.")


def one_of(name: str, value: Any, choices: Iterable[str]) -> str:
    """`value`, or a ValueError that names it and the strings that it may be."""
    if isinstance(value, str) and value in choices:
        return value
    raise ValueError(f"{name}={value!r}: give one of {', '.join(choices)}.")


def check_architecture(
    units: Sequence[int],
    filters: Sequence[int],
    *,
    bottleneck: bool,
    backward: str,
    unroll: int | bool,
    ways: Sequence[str],
    halves: bool = False,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Raise a ValueError that names what no network can have.

    Args:
        units, filters, bottleneck, backward, unroll: as `ResNet` and `RevNet` take them.
        ways: what backward may be.
        halves: the channels are split into two halves.

    Returns:
        units and filters as tuples of ints.
    """
    units, filters = integers("units", units), integers("filters", filters)
    check_flag("bottleneck", bottleneck)
    check_backward(backward, ways)
    check_unroll(unroll)
    if len(filters) != len(units) + 1:
        raise ValueError(
            f"filters={filters} and units={units}: give one width more than stages, the first for "
            "the stem."
        )
    widths = [filters[0], *(4 * width if bottleneck else width for width in filters[1:])]
    if halves and any(width % 2 for width in widths):
        raise ValueError(f"filters={filters}: channels must be even, to be split into two halves.")
    if bottleneck and halves and any(width % 2 for width in filters[1:]):
        raise ValueError(f"filters={filters}: a bottleneck takes a quarter of each half.")
    if not bottleneck and sorted(filters) != list(filters):
        raise ValueError(
            f"filters={filters}: channels must not decrease, since shortcuts without parameters "
            "can only add channels."
        )
    return units, filters


def check_images(images: Any, channels: int) -> None:
    """Raise a ValueError unless `images` is `[B, H, W, channels]`."""
    if getattr(images, "ndim", None) != 4 or images.shape[3] != channels:
        raise ValueError(
            f"images are {describe(images)}: give [B, H, W, {channels}], or make the network "
            "with another in_channels."
        )
