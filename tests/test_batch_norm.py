"""BatchNorm against Flax's own: its values to the bit, its derivatives, and what these cost."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import revjax
from revjax.batch_norm import BatchNorm, batch_norm

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

    @jax.jit
    def apply(params, x):
        module = nnx.merge(graph, params, averages, copy=True)
        y = module(x)
        return y, nnx.state(module, nnx.BatchStat)

    y, pullback, averages_after = jax.vjp(apply, params, x, has_aux=True)
    dparams, dx = pullback(dy)
    return (y, nnx.to_pure_dict(averages_after)), (nnx.to_pure_dict(dparams), dx)


@pytest.mark.optimised
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 2e-5)])
def test_it_is_that_of_flax(training, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("standard"):
        x, dy = 2 + jnp.asarray(np.random.default_rng(1).normal(size=(2, *SHAPE)), dtype)
        (values, gradients), due = (outcome(norm, x, dy) for norm in both(training, dtype))
        chex.assert_trees_all_equal(values, due[0])
        chex.assert_trees_all_close(gradients, due[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mean", [10, 100])
@pytest.mark.parametrize("training", [True, False])
def test_means_far_above_deviations(mean, training):
    """As in Flax where both take the variance for a difference of squares, which rounds most.

    Where the variance is given there is one difference here that Flax does not have.
    """
    random = np.random.default_rng(1)
    x, dy = (mean + random.normal(size=SHAPE)).astype(np.float32), random.normal(size=SHAPE)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        args = jnp.asarray(x, "float64"), jnp.asarray(dy)
        _, due = outcome(both(training, "float64")[1], *args)
        args = jnp.asarray(x), jnp.asarray(dy, "float32")
        found = [outcome(norm, *args)[1] for norm in both(training, "float32")]

    def errors(gradients):
        pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(due), strict=True)
        pairs = ((np.float64(a), np.float64(b)) for a, b in pairs)
        return np.array([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs])

    ours, theirs = map(errors, found)
    assert np.all(ours <= 1.2 * theirs + (1e-7 if training else 1e-6 * mean))


def test_averages_have_no_gradient():
    norm, _ = both(True, "float32")
    graph, state = nnx.split(norm)

    def averages(state, x):
        module = nnx.merge(graph, state, copy=True)
        module(x)
        return module.mean[...].sum() + module.var[...].sum()

    assert not np.any(jax.grad(averages, 1)(state, jnp.arange(288.0).reshape(SHAPE)))


@pytest.mark.parametrize("option, value", [("axis_name", "data"), ("use_fast_variance", False)])
def test_options_of_flax_that_are_not_read_are_refused(option, value):
    norm, _ = both(True, "float32")
    norm.set_attributes(**{option: value})
    with pytest.raises(ValueError, match=rf"{option}={value!r}.*take nnx.BatchNorm"):
        norm(jnp.ones(SHAPE))


def test_narrow_images_are_normalised_in_the_dtype_of_the_parameters():
    ours, theirs = both(True, "float32")
    x = jnp.asarray(np.random.default_rng(1).normal(size=SHAPE), jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        chex.assert_trees_all_equal(ours(x), theirs(x))


@pytest.mark.parametrize("training", [True, False])
def test_under_shard_map(training):
    """A part of the batch on each device, with the same parameters, as the plain formula has it."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.asarray(np.random.default_rng(1).normal(size=SHAPE), jnp.float32)

    def gradient(norm):
        graph, params, averages = nnx.split(norm, nnx.Param, ...)

        @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
        def loss(params, x):
            y = nnx.merge(graph, params, averages, copy=True)(x)
            return jax.lax.psum((y**3).sum(), "data")

        return nnx.to_pure_dict(jax.jit(jax.grad(loss))(params, x))

    ours, theirs = map(gradient, both(training, "float32"))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-4)


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


def ours(x, scale, bias):
    return batch_norm(x, scale, bias, epsilon=1e-3)[0]


def plain(x, scale, bias):
    mean, variance = (a.reshape(1, 1, 1, -1) for a in (x.mean((0, 1, 2)), x.var((0, 1, 2))))
    scale, bias = (a.reshape(1, 1, 1, -1) for a in (scale, bias))
    return (x - mean) * jax.lax.rsqrt(variance + 1e-3) * scale + bias


def test_second_derivatives_in_a_loop_and_in_the_rule():
    """A custom derivative's own derivative has been wrong inside of scan in JAX 0.10."""

    def residual(norm, params, x):
        scale, bias, kernel = params
        return jnp.tanh(norm(x, scale, bias) @ kernel)

    f, due = partial(residual, ours), partial(residual, plain)
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
        for function in (f, jax.checkpoint(f)):
            close(second(loop(function)), second(loop(due)))
        close(second(chain(f)), second(chain(due, backward="store")))
