"""Stochastic depth (Huang et al. 2016): residual functions that are dropped at random in training.

    y = S(x) + b F(x),  b = 1 with the survival probability p_l, else 0      (eq. 2, in training)
    y = S(x) + p_l F(x)                                                      (eq. 5, in evaluation)

A closed F does not run, forward or backward, its batch statistics do not move, and its parameters'
gradient is zero: a step costs the time of the open ones.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from revjax.architecture import integer, number
from revjax.contract import check_key
from revjax.gate import run_if
from revjax.trees import PyTree


@dataclasses.dataclass(frozen=True)
class StochasticDepth:
    """How deep a network is in training (Huang et al. 2016), for `ResNet`, `RevNet` and `RevViT`.

    These raise a ValueError when they are given a probability, mode or granularity that there is
    not.

    Attributes:
        p_last: the survival probability of the last residual function, p_L.
        mode: "linear", `p_l = 1 - (l / L) (1 - p_L)` for l = 1 .. L (eq. 4), or "uniform", p_L for
            all.
        granularity: "batch" draws one gate a residual function for the whole batch, as in the
            paper. "sample" draws one for each image and divides what is left by p_l, so that
            evaluation has no factor; it is known as drop path, and saves no time.

    Example:
        >>> options = dict(units=(2,), filters=(8, 8), rngs=nnx.Rngs(0))
        >>> depth = revjax.StochasticDepth(p_last=0.5)
        >>> model = revjax.create_model("revnet", 10, stochastic_depth=depth, **options)
        >>> model(jnp.zeros((2, 8, 8, 3)), key=jax.random.key(0)).shape
        (2, 10)
    """

    p_last: float = 0.5
    mode: str = "linear"
    granularity: str = "batch"

    def checked(self) -> "StochasticDepth":
        """This, or a ValueError that says what is wrong with it."""
        survival_probabilities(1, self.p_last, self.mode)
        if self.granularity not in ("batch", "sample"):
            raise ValueError(f'granularity={self.granularity!r}: give "batch" or "sample".')
        return self


def survival_probabilities(num_residuals: int, p_last: float, mode: str = "linear") -> np.ndarray:
    """The probability p_l that a residual function is open, in the order of the network.

    Args:
        num_residuals: L; in a RevNet each unit has two, F and then G.
        p_last: p_L, above 0 and at most 1.
        mode: "linear", `p_l = 1 - (l / L) (1 - p_L)` for l = 1 .. L (Huang et al. 2016, eq. 4), or
            "uniform", p_L for all.

    Returns:
        float64 `[L]`.

    Raises:
        ValueError: an argument has no such value.

    Example:
        >>> survival_probabilities(4, 0.5)
        array([0.875, 0.75 , 0.625, 0.5  ])
    """
    num_residuals = integer("num_residuals", num_residuals)
    due = "a survival probability above 0, at most 1"
    p_last = number("p_last", p_last, due, lambda p: 0 < p <= 1)
    if mode not in ("linear", "uniform"):
        raise ValueError(f'mode={mode!r}: give "linear" or "uniform".')
    if mode == "uniform":
        return np.full(num_residuals, p_last)
    return 1 - np.arange(1, num_residuals + 1) / num_residuals * (1 - p_last)


def expected_depth(probabilities: Sequence[float] | np.ndarray) -> float:
    """How many residual functions are open on average (Huang et al. 2016, section 3).

    Args:
        probabilities: `[L]`, from `survival_probabilities`.

    Returns:
        Their sum, a float. Raises nothing but what a sum raises.

    Example:
        >>> expected_depth(survival_probabilities(54, 0.5))  # ResNet-110: (3 L - 1) / 4
        40.25
    """
    return math.fsum(probabilities)


def draw_gates(
    key: jax.Array,
    probabilities: Sequence[float] | np.ndarray,
    batch_size: int | None = None,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Draw the gates of one training step (Huang et al. 2016, section 3).

    Args:
        key: a PRNG key.
        probabilities: `[L]`, from `survival_probabilities`.
        batch_size: None for one gate a residual function; else one for each of so many images.
        dtype: of the latter, and of the uniform numbers that are drawn for either.

    Returns:
        bool `[L]`, True where open; or, by images, `[L, batch_size, 1, 1, 1]`, zero or 1 / p_l.

    Raises:
        TypeError: key is none, or dtype is not a floating one.
        ValueError: probabilities or batch_size has no such value. Traced ones are not looked at.

    Example:
        >>> draw_gates(jax.random.key(0), [1.0, 1.0]).tolist()
        [True, True]
    """
    check_key(key)
    _check_floating(dtype)
    if not isinstance(probabilities, Tracer):
        probabilities = _checked_probabilities(probabilities)
    if batch_size is not None and (isinstance(batch_size, bool) or not _is_size(batch_size)):
        raise ValueError(f"batch_size={batch_size!r}: give None or the number of images.")
    p = jnp.asarray(probabilities, dtype)
    if batch_size is None:
        return jax.random.bernoulli(key, p)
    p = p.reshape(-1, 1, 1, 1, 1)
    open_ = jax.random.bernoulli(key, p, (len(p), batch_size, 1, 1, 1))
    return jnp.where(open_, 1 / p, 0)


def _check_floating(dtype):
    try:
        floating = jnp.issubdtype(dtype, jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise TypeError(f"dtype={dtype!r}: give a floating one, such as float32.")


def _checked_probabilities(probabilities):
    try:
        p = np.asarray(probabilities)
        p = p.astype(np.float64, casting="same_kind") if p.size else np.zeros(p.shape)
    except (TypeError, ValueError, OverflowError):
        p = np.float64(np.nan)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():  # which NaN is not
        raise ValueError(f"probabilities={probabilities!r}: give numbers from 0 to 1, [L].")
    return p


def _is_size(value):
    try:
        return operator.index(value) >= 0
    except TypeError:
        return False


def check_stochastic_depth(how: Any) -> StochasticDepth | None:
    """`how`, or a TypeError or ValueError that says why a network cannot have it."""
    if how is None:
        return None
    if not isinstance(how, StochasticDepth):
        raise TypeError(f"stochastic_depth={how!r}: give None or revjax.StochasticDepth(p_last).")
    return how.checked()


def network_gates(
    how: StochasticDepth | None,
    num_residuals: int,
    batch_size: int,
    dtype: Any,
    *,
    key: jax.Array | None,
    training: bool,
) -> jax.Array | None:
    """The gates of a network's residual functions, with a leading axis L; None: all just run.

    In training they are what `draw_gates` returns, in evaluation p_l, `[L]`, of `dtype`.
    """
    if how is None or (how.granularity == "sample" and not training):
        return None
    probabilities = survival_probabilities(num_residuals, how.p_last, how.mode)
    if not training:
        return jnp.asarray(probabilities, dtype)
    if key is None:
        raise ValueError(
            "a network with stochastic depth draws its gates from a key: call "
            "model(images, key=jax.random.key(step)), or model.eval() first."
        )
    return draw_gates(
        key, probabilities, batch_size if how.granularity == "sample" else None, dtype
    )


def _broadcasts(shape, due):
    fits = len(shape) in (0, len(due))
    return fits and all(n in (1, m) for n, m in zip(shape, due, strict=False))


def apply_gated(
    apply: Callable, gate: jax.Array | None, params: PyTree, statistics: PyTree, *x: PyTree
) -> tuple[PyTree, PyTree]:
    """`gate * residual`, and the statistics as the call leaves them.

    Args:
        apply: `(params, statistics, *x) -> (residual, statistics)`.
        gate: None for one that is open; bool `[]`: where False, nothing runs, the residual is zero
            and the statistics are as they were; floating: a factor, without a gradient.
        params, statistics, *x: what apply takes.
    """
    if gate is None:
        return apply(params, statistics, *x)
    if gate.dtype != bool:
        residual, statistics = apply(params, statistics, *x)
        shapes = {jnp.shape(leaf) for leaf in jax.tree.leaves(residual)}
        if not all(_broadcasts(gate.shape, shape) for shape in shapes):
            raise ValueError(f"a gate {gate.shape} for residuals {shapes}: give one of their rank.")
        gate = jax.lax.stop_gradient(gate)
        return jax.tree.map(lambda r: gate * r, residual), statistics

    def skip(zeros, params, statistics, *_):
        return zeros[0], statistics

    return run_if(gate, apply, skip, params, statistics, *x)
