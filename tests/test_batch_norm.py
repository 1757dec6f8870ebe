"""BatchNorm against Flax's own: its values to the bit, its derivatives, and what these cost."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import revjax
from revjax.batch_norm import BatchNorm, normalize, statistics

SHAPE = (6, 4, 4, 3)


def both(training, dtype):
    """The same parameters and averages here and in Flax's BatchNorm."""
    ours = BatchNorm(3, decay=0.9, epsilon=1e-3, dtype=dtype, rngs=nnx.Rngs(0))
    constants: Any = dict(momentum=0.9, epsilon=1e-3)
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
    """What it returns and its averages after that; and its gradients by parameters and by x."""
    graph, params, averages = nnx.split(norm, nnx.Param, ...)

    def apply(params, x):
        module = nnx.merge(graph, params, averages, copy=True)
        y = module(x)
        return y, nnx.state(module, nnx.BatchStat)

    y, pullback, averages_after = jax.vjp(apply, params, x, has_aux=True)
    dparams, dx = pullback(dy)
    return (y, nnx.to_pure_dict(averages_after)), (nnx.to_pure_dict(dparams), dx)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 2e-5)])
def test_it_is_that_of_flax(training, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("standard"):
        x, dy = 2 + jnp.asarray(np.random.default_rng(1).normal(size=(2, *SHAPE)), dtype)
        (values, gradients), due = (outcome(norm, x, dy) for norm in both(training, dtype))
        chex.assert_trees_all_equal(values, due[0])
        chex.assert_trees_all_close(gradients, due[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mean", [10, 100])
def test_means_far_above_deviations_cost_no_more_than_in_flax(mean):
    """As both take the variance for a difference of squares, which is what rounds."""
    random = np.random.default_rng(1)
    x, dy = (mean + random.normal(size=SHAPE)).astype(np.float32), random.normal(size=SHAPE)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        _, due = outcome(both(True, "float64")[1], jnp.asarray(x, "float64"), jnp.asarray(dy))
        args = jnp.asarray(x), jnp.asarray(dy, "float32")
        found = [outcome(norm, *args)[1] for norm in both(True, "float32")]

    def errors(gradients):
        pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(due), strict=True)
        pairs = ((np.float64(a), np.float64(b)) for a, b in pairs)
        return np.array([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs])

    ours, theirs = map(errors, found)
    assert np.all(ours <= 1.2 * theirs + 1e-7)


def test_constant_channels_have_finite_gradients():
    ours, _ = both(True, "float32")
    chex.assert_tree_all_finite(outcome(ours, jnp.full(SHAPE, 7.25), jnp.ones(SHAPE)))


def test_the_gradient_sums_over_the_batch_twice_and_keeps_less():
    """Its own share: forward there are two sums as well."""
    x = jnp.ones(SHAPE)

    def costs(norm):
        graph, state = nnx.split(norm)

        def apply(state, x):
            return nnx.merge(graph, state, copy=True)(x)

        def gradient(state, x, dy):
            return jax.vjp(apply, state, x)[1](dy)

        equations = jax.make_jaxpr(gradient)(state, x, x).jaxpr.eqns
        sums = [e for e in equations if e.primitive.name == "reduce_sum"]
        kept = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(apply, *a)[1], state, x))
        return (
            sum(e.invars[0].aval.size == x.size for e in sums),
            sum(leaf.size == x.size for leaf in kept),
        )

    ours, theirs = both(True, "float32")
    assert costs(ours) == (4, 1)
    assert np.all(np.array(costs(theirs)) > costs(ours))


def plain(x, mean, factor, bias):
    mean, factor, bias = (jnp.expand_dims(a, (0, 1, 2)) for a in (mean, factor, bias))
    return (x - mean) * factor + bias


def residual(normalize, params, x):
    scale, bias, kernel = params
    mean, variance = statistics(x)
    return jnp.tanh(normalize(x, mean, jax.lax.rsqrt(variance + 1e-3) * scale, bias) @ kernel)


def test_second_derivatives_in_a_loop_and_in_the_rule():
    """A custom derivative's own derivative has been wrong inside of scan in JAX 0.10."""
    ours, theirs = partial(residual, normalize), partial(residual, plain)
    with jax.enable_x64(True):
        random = np.random.default_rng(0)
        shapes = (4, 3), (4, 3), (4, 3, 3)
        params, along = (
            tuple(jnp.asarray(random.normal(size=shape)) for shape in shapes) for _ in range(2)
        )
        x = jnp.asarray(random.normal(size=SHAPE))

        def second(apply):
            """The gradient, and its derivative along a direction."""

            def loss(params):
                return sum((y**3).sum() for y in jax.tree.leaves(apply(params)))

            return jax.jit(lambda p: jax.jvp(jax.grad(loss), (p,), (along,)))(params)

        def loop(f):
            return lambda params: jax.lax.scan(lambda x, p: (x + f(p, x), None), x, params)[0]

        def chain(f, **options):
            return lambda params: revjax.rev_chain_apply(
                f, f, (params, params), (x, 2 * x), grid_bits=None, **options
            )

        close = partial(chex.assert_trees_all_close, rtol=1e-7)
        for f in (ours, jax.checkpoint(ours)):
            close(second(loop(f)), second(loop(theirs)))
        close(second(chain(ours)), second(chain(theirs, backward="store")))
