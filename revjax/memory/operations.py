"""How many floating-point operations a traced function has, every loop multiplied out."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

CONVOLUTIONS = ("conv_general_dilated", "revjax_conv")


def count_operations(jaxpr: Jaxpr) -> int:
    """Count multiplications and additions of matrix products and convolutions.

    The compiler's own `cost_analysis` counts the body of a loop once, whatever its length; here a
    scan counts for all its iterations. A `while_loop`, whose length nobody knows, counts for one,
    and a `cond` for its longest branch. What a convolution multiplies by zeros counts where they
    are its padding, not where they come from a stride. What nothing uses counts too. Products of
    ragged groups are not counted.
    """
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(equation: Any) -> int:
    params, name = equation.params, equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(lhs[axis] for axis in contracted)
    if name in CONVOLUTIONS:
        return _of_convolution(equation)
    if name == "cond":
        return max(count_operations(branch.jaxpr) for branch in params["branches"])
    return params.get("length", 1) * sum(map(count_operations, _inner(params)))


def _of_convolution(equation: Any) -> int:
    kernel = equation.invars[1].aval.shape
    if equation.primitive.name == "revjax_conv":  # HWIO
        window, inputs, dilation = kernel[:2], kernel[2], ()
    else:
        _, features, *spatial = equation.params["dimension_numbers"].rhs_spec
        window, inputs = [kernel[axis] for axis in spatial], kernel[features]
        dilation = equation.params["lhs_dilation"]
    operations = 2 * equation.outvars[0].aval.size * math.prod(window) * inputs
    return operations // math.prod(dilation)


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, Jaxpr):
                yield one
