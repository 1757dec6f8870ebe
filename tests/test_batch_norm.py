"""BatchNorm against Flax's own, and the number of its sums over the batch."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from revjax.batch_norm import BatchNorm
from revjax.conventions import CONVENTIONS

SHAPE = (6, 4, 4, 3)


def both(training, dtype):
    """The same parameters and averages here and in Flax's BatchNorm."""
    conventions = CONVENTIONS["revnet"]
    ours = BatchNorm(3, conventions=conventions, dtype=dtype, rngs=nnx.Rngs(0))
    constants: Any = dict(momentum=conventions.decay, epsilon=conventions.epsilon)
    theirs = nnx.BatchNorm(3, **constants, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    for name in ("scale", "bias", "mean", "var"):
        value = jnp.asarray(random.uniform(0.5, 1.5, 3), dtype)
        kind = nnx.Param if name in ("scale", "bias") else nnx.BatchStat
        for norm in (ours, theirs):  # anew, as Flax's averages are float32
            setattr(norm, name, kind(value))
    for norm in (ours, theirs):
        norm.set_attributes(use_running_average=not training)
    return ours, theirs


def outcome(norm, x, dy):
    """What it returns, its averages after that, and its gradients by parameters and by x."""
    graph, params, averages = nnx.split(norm, nnx.Param, ...)

    def apply(params, x):
        module = nnx.merge(graph, params, averages, copy=True)
        y = module(x)
        return y, nnx.state(module, nnx.BatchStat)

    y, pullback, averages_after = jax.vjp(apply, params, x, has_aux=True)
    dparams, dx = pullback(dy)
    return y, dx, *map(nnx.to_pure_dict, (averages_after, dparams))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 2e-5)])
def test_it_is_that_of_flax(training, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("standard"):
        x, dy = 2 + jnp.asarray(np.random.default_rng(1).normal(size=(2, *SHAPE)), dtype)
        ours, theirs = both(training, dtype)
        chex.assert_trees_all_close(
            outcome(ours, x, dy), outcome(theirs, x, dy), rtol=tolerance, atol=tolerance
        )


def test_means_far_above_deviations_cost_no_more_than_in_flax():
    """A hundred times: both take the variance for a difference of squares, which is what rounds."""
    random = np.random.default_rng(1)
    x, dy = (100 + random.normal(size=SHAPE)).astype(np.float32), random.normal(size=SHAPE)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        due, *_ = outcome(both(True, "float64")[0], jnp.asarray(x, "float64"), jnp.asarray(dy))
        args = jnp.asarray(x), jnp.asarray(dy, "float32")
        found = [outcome(norm, *args)[0] for norm in both(True, "float32")]
    ours, theirs = (np.abs(np.float64(y) - np.float64(due)).max() for y in found)
    assert ours <= 2 * theirs


def test_constant_channels_have_finite_gradients():
    ours, _ = both(True, "float32")
    chex.assert_tree_all_finite(outcome(ours, jnp.full(SHAPE, 7.25), jnp.ones(SHAPE)))


def test_the_gradient_sums_over_the_batch_twice():
    """Its own share: forward there are two sums as well."""
    ours, _ = both(True, "float32")
    graph, state = nnx.split(ours)
    x = jnp.ones(SHAPE)

    def apply(state, x):
        return nnx.merge(graph, state, copy=True)(x)

    def sums(function, *args):
        equations = jax.make_jaxpr(function)(*args).jaxpr.eqns
        return sum(
            e.primitive.name == "reduce_sum" and e.invars[0].aval.size == x.size for e in equations
        )

    assert sums(apply, state, x) == 2
    assert sums(lambda state, x, dy: jax.vjp(apply, state, x)[1](dy), state, x, x) == 4
