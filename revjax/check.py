"""Whether a function of one's own is fit for the rule, and what comes of it: in one report."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from revjax.contract import Gates, describe
from revjax.coupling import Coupling, additive
from revjax.grid import GridBits
from revjax.reversible import Backward, Pair, rev_chain_apply, rev_chain_inverse
from revjax.segments import lay_out
from revjax.trees import PyTree, check_concrete, is_inexact, partition, vjp

TOLERANCE = 1e-5

ROUNDS_OTHERWISE = (
    "gave other bits where differentiated: write x * jax.lax.rsqrt(v) for x / jnp.sqrt(v), and put "
    "jax.checkpoint around other such layers within the function, as around jax.nn.gelu"
)


@dataclasses.dataclass(frozen=True)
class ReversibilityReport:
    """What `check_reversible` found; `str()` of it is a table with a verdict a line.

    Attributes:
        depth: the number of blocks.
        num_parameters: of all blocks.
        stream: structure, dtypes and shapes of the two halves.
        grid_bits: k of the grid `2**-k`; None without one.
        repeats: whether f, and g, of the first block gave the same bits twice.
        repeats_differentiated: whether they gave them where they were differentiated, too.
        finite: whether values and gradients are.
        stream_peak: the largest |stream|.
        stream_bound: up to which the grid is exact; infinite without a grid.
        inverse_error: the largest |inverse(y) - x|, x on the grid.
        inverse_wrong: elements of x that the inverse did not give back.
        gradient_error_params: |reversible - stored| / |stored|, of all parameters together.
        gradient_error_x: the same of x.
        rounding_alone: the errors are more than is due, and yet backward="remat" has the same
            gradient.

    Example:
        >>> def dense(w, x): return jnp.tanh(x @ w)
        >>> w, x = 0.1 * jnp.ones((10, 3, 3)), (jnp.ones((2, 3)), jnp.ones((2, 3)))
        >>> report = check_reversible(dense, dense, (w, w), x)
        >>> isinstance(report, ReversibilityReport), report.ok, report.stream_bound
        (True, True, 1024.0)
    """

    depth: int
    num_parameters: int
    stream: str
    grid_bits: int | None
    repeats: tuple[bool, bool]
    repeats_differentiated: tuple[bool, bool]
    finite: bool
    stream_peak: float
    stream_bound: float
    inverse_error: float
    inverse_wrong: int
    gradient_error_params: float
    gradient_error_x: float
    rounding_alone: bool

    @property
    def ok(self) -> bool:
        """Whether there is nothing to mend.

        Without a grid, errors of the inverse and of the gradient do not count, since they are due;
        nor does a gradient that differs from the stored one alone, see `rounding_alone`.
        """
        return not any(problem for *_, problem in self._lines())

    def __str__(self) -> str:
        grid = "no grid" if self.grid_bits is None else f"grid 2^-{self.grid_bits}"
        blocks = "1 reversible block" if self.depth == 1 else f"{self.depth} reversible blocks"
        lines = [f"{blocks}, {self.num_parameters:,} parameters, {grid}", f"stream {self.stream}"]
        for name, found, problem in self._lines():
            verdict = f"NOT OK: {found}; {problem}" if problem else f"ok: {found}"
            lines.append(f"  {name:<17} {verdict}")
        return "\n".join(lines)

    def _lines(self) -> list[tuple[str, str, str]]:
        """Of each thing checked: its name, what was found, and what is wrong with it, if it is."""
        lines = []

        def add(name, found, wrong, problem):
            lines.append((name, found, problem if wrong else ""))

        exact = self.grid_bits is not None and self.finite  # so that it ought to be
        others = _names(self.repeats)
        differentiated = _names(self.repeats_differentiated)
        add(
            "same bits",
            f"{' and '.join(others)} did not repeat" if others else "f and g repeat themselves",
            others,
            "the same inputs must give the same bits: take randomness from keys, and round narrow "
            "dtypes by jax.lax.reduce_precision",
        )
        add(
            "finite",
            f"{'' if self.finite else 'not '}all values and gradients",
            not self.finite,
            "look for overflow, or a logarithm or quotient that has no value",
        )
        bound = "" if self.grid_bits is None else f" of {self.stream_bound:.4g}"
        add(
            "range",
            f"|stream| up to {self.stream_peak:.4g}{bound}",
            self.finite and self.stream_peak > self.stream_bound,
            f"beyond, sums are rounded: {self._smaller_grid()}",
        )
        wrong = f"{self.inverse_wrong:,} elements of x differ, by at most {self.inverse_error:.2g}"
        add(
            "inverse",
            wrong if self.inverse_wrong else "every bit of x",
            exact and self.inverse_wrong,
            "on a grid none should",
        )
        gradients = {"params": self.gradient_error_params, "x": self.gradient_error_x}
        for of, error in gradients.items():
            add(
                f"gradient, {of}",
                f"relative difference from stored backprop {error:.2g}"
                + (", though not from jax.checkpoint" if self.rounding_alone else ""),
                exact and not (error <= TOLERANCE or self.rounding_alone),
                f"on a grid at most {TOLERANCE:g} is due"
                + (
                    f"; {' and '.join(differentiated)} {ROUNDS_OTHERWISE}" if differentiated else ""
                ),
            )
        return lines

    def _smaller_grid(self) -> str:
        times = self.stream_peak / self.stream_bound
        bits = (self.grid_bits or 0) - math.ceil(math.log2(times)) if 1 < times < math.inf else -1
        return f"take grid_bits={bits}, or tame the stream" if bits >= 0 else "tame the stream"


def check_reversible(
    f: Callable,
    g: Callable,
    params: Pair | list[Pair],
    x: Pair,
    *args: PyTree,
    xs: PyTree = None,
    gates: Gates | list[Gates] = None,
    coupling: Coupling = additive,
    grid_bits: GridBits = "default",
    has_aux: bool = False,
    store_last: int = 0,
) -> ReversibilityReport:
    """Apply, invert and differentiate a chain, and say what is wrong with f and g, if anything is.

    Programs are compiled apart, as a training step and an evaluation are: one for values, one for
    the inverse, one for each of the two gradients, and three for one call of f and of g. The
    gradient is that of `<y, c>` for a normal c, by backward="reversible" and by "store". Where
    these differ, a compiler may have rounded what is evaluated again in another way: so a gradient
    that is that of "remat" is in order, too. What all have wrong, as by a faulty derivative rule of
    f's own, is not seen.

    Args:
        f, g, params, x, *args: as for `rev_chain_apply`; a single block is a list of one pair.
        xs, gates, coupling, grid_bits, has_aux, store_last: as there.

    Returns:
        A `ReversibilityReport`: print it, or assert its `ok`.

    Raises:
        TypeError, ValueError: what `rev_chain_apply` raises: structures, shapes and dtypes are
            checked by it.

    Example:
        >>> def dense(w, x): return jnp.tanh(x @ w)
        >>> w, x = 0.1 * jnp.ones((10, 3, 3)), (jnp.ones((2, 3)), jnp.ones((2, 3)))
        >>> print(check_reversible(dense, dense, (w, w), x))
        10 reversible blocks, 180 parameters, grid 2^-14
        stream (float32[2,3], float32[2,3])
          same bits         ok: f and g repeat themselves
          finite            ok: all values and gradients
          range             ok: |stream| up to 8.57 of 1024
          inverse           ok: every bit of x
          gradient, params  ok: relative difference from stored backprop 0
          gradient, x       ok: relative difference from stored backprop 0
    """
    check_concrete("check_reversible", params, x, args, xs, gates)
    options: Any = dict(coupling=coupling, grid_bits=grid_bits, has_aux=has_aux)
    chain = f, g, params, xs, gates
    bits, due, segments, operands = lay_out([chain], x, args, coupling, grid_bits, has_aux)
    if not segments or segments[0].depth == 0:
        raise ValueError("the chain has no blocks: give params of at least one to check.")
    (_, depth, *_), (own, (own_xs, _), _) = segments[0], operands[0]
    _, _, (off_grid, *_), _ = lay_out([chain], x, args, coupling, None, has_aux)

    def apply(params, x, args, xs, backward: Backward = "reversible"):
        ranges = []
        storing: Any = {"store_last": store_last} if backward == "reversible" else {}
        out = rev_chain_apply(
            f,
            g,
            params,
            x,
            *args,
            xs=xs,
            gates=gates,
            backward=backward,
            range_check=lambda *found: ranges.append(found),
            **options,
            **storing,
        )
        (peak, bound), y = ranges[0], out[0] if has_aux else out
        bounds.append(bound)
        return y, peak

    def inverse(params, y, args, xs):
        return rev_chain_inverse(f, g, params, y, *args, xs=xs, gates=gates, **options)

    def gradient(params, x, args, xs, c, backward: Backward):
        y, pullback = vjp(lambda p, x: apply(p, x, args, xs, backward)[0], params, x)
        return y, pullback(c)

    bounds: list[float] = []
    y, peak = jax.jit(apply)(params, x, args, xs)
    back = jax.jit(inverse)(params, y, args, xs)
    c = normal_like(y)
    _, reversible = jax.jit(partial(gradient, backward="reversible"))(params, x, args, xs, c)
    values, stored = jax.jit(partial(gradient, backward="store"))(params, x, args, xs, c)
    if depth is not None:
        own, own_xs = jax.tree.map(lambda leaf: leaf[0], (own, own_xs))
    f_off_grid, g_off_grid, _ = off_grid.block
    found = [
        _repeats(f_off_grid, own[0], due[1], own_xs, args),
        _repeats(g_off_grid, own[1], due[0], own_xs, args),
    ]
    repeats, repeats_differentiated = zip(*found, strict=True)
    errors = [relative_error(got, due) for got, due in zip(reversible, stored, strict=True)]
    rounding_alone = False
    if bits is not None and max(errors) > TOLERANCE:
        _, remat = jax.jit(partial(gradient, backward="remat"))(params, x, args, xs, c)
        rounding_alone = relative_error(reversible, remat) <= TOLERANCE
    pairs = zip(jax.tree.leaves(back), jax.tree.leaves(due), strict=True)
    return ReversibilityReport(
        depth=len(segments) if depth is None else depth,
        num_parameters=sum(jnp.size(leaf) for leaf in jax.tree.leaves(params)),
        stream=describe(tuple(due)),
        grid_bits=bits,
        repeats=repeats,
        repeats_differentiated=repeats_differentiated,
        finite=_all_finite((y, values, reversible, stored)),
        stream_peak=float(peak),
        stream_bound=float(bounds[0]),
        inverse_error=largest_difference(back, due),
        inverse_wrong=sum(int((a != b).sum()) for a, b in pairs),
        gradient_error_params=errors[0],
        gradient_error_x=errors[1],
        rounding_alone=rounding_alone,
    )


def _names(same):
    """Which of f and g are not the same."""
    return [name for name, one in zip("fg", same, strict=True) if not one]


def relative_error(got: PyTree, due: PyTree) -> float:
    """`|got - due| / |due|`, the 2-norm over all leaves together, in float64; NaN of infinities."""
    got, due = _flat(got), _flat(due)
    difference, size = np.linalg.norm(_minus(got, due)), np.linalg.norm(due)
    if not size:  # as of functions without parameters
        return math.inf if difference else 0.0
    return float(difference / size)


def _flat(tree):
    leaves = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)]
    wide = [a.astype(np.complex128 if np.iscomplexobj(a) else np.float64) for a in leaves]
    return np.concatenate([*wide, np.zeros(0)])


def largest_difference(a: PyTree, b: PyTree) -> float:
    """The largest `|a - b|` of floating leaves; NaN of infinities."""
    (a, _), (b, _) = partition(a), partition(b)
    return float(np.abs(_minus(_flat(a), _flat(b))).max(initial=0.0))


def _minus(a, b):
    with np.errstate(invalid="ignore"):  # infinity minus infinity, which is NaN
        return a - b


def _all_finite(tree):
    return bool(np.isfinite(_flat(partition(tree)[0])).all())


def normal_like(tree: PyTree) -> PyTree:
    """A normal number for each element of a floating leaf; None for the other leaves."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(0), max(1, len(leaves)))

    def normal(key, leaf):
        return jax.random.normal(key, leaf.shape, leaf.dtype) if is_inexact(leaf) else None

    return structure.unflatten([normal(*pair) for pair in zip(keys, leaves, strict=False)])


def _repeats(h, *operands):
    """Whether h gives the same residual, bit for bit, when it is compiled and called again.

    And whether it does where it is differentiated, by parameters and half.
    """

    def alone(*operands):
        return h(*operands)[0]

    def differentiated(params, half, *others):
        residual, pullback = vjp(lambda *both: alone(*both, *others), params, half)
        return residual, pullback(
            jax.tree.map(lambda a: a + 0 if is_inexact(a) else None, residual)
        )

    first, second, (third, _) = (
        jax.jit(lambda *ops, call=call: call(*ops))(*operands)
        for call in (alone, alone, differentiated)
    )
    return _same_bits(first, second), _same_bits(first, third)


def _same_bits(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(_bits(a) == _bits(b) for a, b in leaves)


def _bits(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()
