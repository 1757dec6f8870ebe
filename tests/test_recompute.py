"""What is recomputed is recomputed: the same numbers, and the memory of one function at a time."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from revjax.gate import keep_dear
from revjax.recompute import after, apart, checkpoint_step, recompute, store

SPECIAL = [0.0, -0.0, 1.5, jnp.inf, -jnp.inf, jnp.nan]


@pytest.mark.optimised
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_after_returns_the_same_bits(dtype):
    with jax.enable_x64(dtype == "float64"):
        x = {"a": jnp.asarray(SPECIAL, dtype), "key": jax.random.key(0), "n": jnp.int32(7)}
        for dependency in (x, jnp.full((2, 3), jnp.nan), jnp.zeros((0, 3)), (), jnp.int32(0)):
            got = jax.jit(after)(x, dependency)
            assert (got["n"], got["a"].dtype) == (7, x["a"].dtype)
            chex.assert_trees_all_equal(got["key"], x["key"])
            assert np.asarray(got["a"]).tobytes() == np.asarray(x["a"]).tobytes()


def test_after_under_vmap():
    x = jnp.arange(6.0).reshape(3, 2)
    chex.assert_trees_all_equal(jax.vmap(after)(x, x), x)
    chex.assert_trees_all_equal(jax.vmap(after, (None, 0), None)(x, x), x)  # it has no axis then
    twice = jax.vmap(jax.vmap(after, (0, None)), (None, 0))(x, x)
    chex.assert_trees_all_equal(twice, jnp.stack([x] * 3))
    assert "select" not in jax.jit(jax.vmap(after)).lower(x, x).as_text()


def test_apart_is_the_identity_in_every_mode():
    x = {"a": jnp.asarray(SPECIAL), "key": jax.random.key(0), "n": jnp.int32(7)}
    for function in (apart, jax.jit(apart)):
        got = function(x)
        assert np.asarray(got["a"]).tobytes() == np.asarray(x["a"]).tobytes()
        chex.assert_trees_all_equal((got["key"], got["n"]), (x["key"], x["n"]))
    x, dx = jnp.arange(6.0).reshape(3, 2), jnp.ones((3, 2))
    chex.assert_trees_all_equal(jax.vmap(apart)(x), x)
    chex.assert_trees_all_equal(jax.jvp(apart, (x,), (dx,)), (x, dx))
    hessian = jax.hessian(lambda x: jnp.sum(apart(x) ** 3))(x).reshape(6, 6)
    chex.assert_trees_all_equal(hessian, jnp.diag(6 * x.ravel()))


@pytest.mark.parametrize("platform, number", [("cpu", 0), ("cuda", 1), ("tpu", 1)])
def test_apart_is_a_barrier_where_sums_have_several_orders(platform, number):
    """For the value alone: none is put on the cotangent."""
    step = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(apart(x)))))
    text = step.trace(jnp.ones(3)).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("optimization_barrier") == number


def test_the_input_of_what_is_recomputed_is_kept_apart():
    """Forward; backward `after` does it."""
    forward = jax.make_jaxpr(lambda x: recompute(lambda x: (jnp.sin(x), ()), x))(jnp.ones(3))
    assert str(forward).count("= apart ") == 1


def test_a_replicated_input_under_shard_map():
    """Its gradient is the sum over devices."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    x, w = jnp.linspace(-1, 1, 6).reshape(2, 3), jax.random.normal(jax.random.key(1), (4, 3, 3))

    def loss(apply):
        def member(w, x):
            y, _ = apply(lambda x, w: (jnp.sin(x @ w), w.sum()), x, w[0])
            return jnp.sum(y**2)[None]

        def total(x, w):
            members = jax.shard_map(member, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"))
            return members(w, x).sum()

        return jax.jit(jax.grad(total, argnums=(0, 1)))(x, w)

    for apply in (recompute, store_dear):
        chex.assert_trees_all_close(loss(apply), loss(plain), rtol=1e-6)


def wide(x, w, key, scale):
    """A function with many intermediates, noise, and an output beside y."""
    noise = jax.random.normal(key, x.shape, x.dtype)
    for _ in range(6):
        x = jnp.tanh(x @ w)
    return scale * (x + noise), x.mean()


def loss_by(apply):
    def loss(x, w, scale):
        total = 0.0
        for seed in range(4):
            x, _ = apply(wide, x, w, jax.random.key(seed), scale)
            total += jnp.sin(x).sum()
        return total

    return loss


def plain(fun, *operands):
    return fun(*operands)


def store_dear(fun, *operands):
    return store(keep_dear(fun), *operands)


@pytest.mark.parametrize("way", [recompute, store_dear])
def test_gradients_are_those_of_the_function(way):
    with jax.enable_x64(True):
        x, w = jax.random.normal(jax.random.key(9), (2, 5, 5), jnp.float64)
        operands = x, w, jnp.float64(0.7)
        got, due = (
            jax.jit(jax.grad(loss_by(apply), (0, 1, 2)))(*operands) for apply in (way, plain)
        )
        chex.assert_trees_all_close(got, due, rtol=1e-12)
        got, due = (
            jax.jit(
                jax.grad(lambda x, apply=apply: jnp.sum(jax.grad(loss_by(apply))(x, w, 0.7) ** 2))
            )(x)
            for apply in (way, plain)
        )
        chex.assert_trees_all_close(got, due, rtol=1e-12)


@pytest.mark.parametrize("way", [recompute, store_dear])
def test_aux_has_no_gradient(way):
    x = jnp.ones((2, 2))
    gradient = jax.grad(lambda x: way(lambda x: (x, jnp.sin(x).sum()), x)[1])(x)
    chex.assert_trees_all_equal(gradient, jnp.zeros((2, 2)))


@pytest.mark.optimised
def test_memory_is_that_of_one_function():
    x, w = jax.ShapeDtypeStruct((512, 64), jnp.float32), jax.ShapeDtypeStruct((64, 64), jnp.float32)
    bytes_of = {}
    for apply in (recompute, plain):
        gradient = jax.jit(jax.grad(loss_by(apply), (0, 1)))
        memory: Any = gradient.lower(x, w, jnp.float32(1)).compile().memory_analysis()
        bytes_of[apply] = memory.temp_size_in_bytes
    activation = 512 * 64 * 4
    assert bytes_of[recompute] < bytes_of[plain] - 10 * activation


@pytest.mark.optimised
@pytest.mark.parametrize("mapped", [False, True])
def test_what_is_stored_is_what_is_dear(mapped):
    """The products, and no cosine or sine; nor under vmap, which leaves w without an axis."""
    x, w = jax.ShapeDtypeStruct((512, 64), jnp.float32), jax.ShapeDtypeStruct((64, 64), jnp.float32)

    def many(x, w):
        for _ in range(6):
            x = jnp.sin(jnp.cos(jnp.sin(x @ w)))
        return x, ()

    def loss(way, w, x):
        for _ in range(2):
            x, _ = way(many, x, w)
        return x.sum()

    bytes_of = {}
    for way in (store_dear, plain):
        gradient = jax.grad(partial(loss, way))
        if mapped:
            gradient = jax.vmap(gradient, (None, 0))
            x = jax.ShapeDtypeStruct((4, 128, 64), jnp.float32)
        memory: Any = jax.jit(gradient).lower(w, x).compile().memory_analysis()
        bytes_of[way] = memory.temp_size_in_bytes
    activation = 512 * 64 * 4
    # 12 products, of which the conditional copies a function's 6, and what one product takes.
    assert 12 * activation <= bytes_of[store_dear] <= (12 + 6 + 3) * activation
    assert bytes_of[plain] > 23 * activation


def test_what_is_dear(capsys):
    def h(x, kernel, w):
        y = jax.lax.conv(jnp.sin(x), kernel, (1, 1), "SAME")
        return jnp.cos(jnp.tanh(y).sum((2, 3)) @ w).sum()

    x, kernel, w = jnp.ones((2, 3, 4, 4)), jnp.ones((5, 3, 3, 3)), jnp.ones((5, 6))
    print_saved_residuals(keep_dear(h), x, kernel, w)
    lines = [line.split(" from ")[0] for line in capsys.readouterr().out.splitlines()]
    kept = sorted(line.split()[-1] for line in lines if "output of" in line)
    assert kept == ["conv_general_dilated", "dot_general", "reduce_sum"], lines


@pytest.mark.parametrize("unroll", [1, 2, 3, 4, True])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_step_has_a_barrier_unless_a_loop_is_sure(depth, unroll):
    w = jnp.ones((depth, 3, 3))

    def loss(w, x):
        step = checkpoint_step(lambda x, w: (jnp.sin(x @ w), None), depth, unroll)
        return jax.lax.scan(step, x, w, unroll=unroll)[0].sum()

    text = jax.jit(jax.grad(loss)).lower(w, jnp.ones((2, 3))).as_text()
    assert ("optimization_barrier" in text) == (depth == 1 or unroll != 1 or unroll is True)
