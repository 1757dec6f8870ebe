"""Couplings invert, and the grid makes the additive one exact: bit for bit, over pytrees."""

import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import revjax
from revjax.grid import resolve_grid_bits


def trees(seed, dtype):
    """A pytree of floats with a scalar, an empty array and some structure."""
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    return {
        "a": jax.random.normal(a, (3, 4), dtype) * 3,
        "b": (jax.random.normal(b, (), dtype), [jax.random.normal(c, (2, 1, 5), dtype)]),
        "empty": jnp.zeros((0, 3), dtype),
    }


def assert_same_bits(a, b):
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), a, b)


@pytest.mark.optimised
@pytest.mark.parametrize("bits", [0, 8, 14, 20])
def test_additive_on_the_grid_is_exact(bits):
    x, r = revjax.round_to_grid((trees(0, jnp.float32), trees(1, jnp.float32)), bits)
    y = revjax.additive.combine(x, r)
    assert_same_bits(revjax.additive.separate(y, r), x)


@pytest.mark.optimised
def test_additive_off_the_grid_is_not_exact():
    # Were float addition exact, this library would have no reason for its grid.
    x, r = trees(0, jnp.float32)["a"], trees(1, jnp.float32)["a"]
    back = revjax.additive.separate(revjax.additive.combine(x, r), r)
    assert np.any(np.asarray(back) != np.asarray(x))
    np.testing.assert_allclose(back, x, rtol=1e-5)


@pytest.mark.optimised
def test_the_grid_is_exact_up_to_its_bound_and_not_beyond():
    bound, r = revjax.stream_bound(20), jnp.float32(2.0**-20)  # the smallest residual
    for x, exact in ((jnp.float32(bound) - r, True), (jnp.float32(bound), False)):
        y = revjax.additive.combine(x, r)
        assert (y != x) == exact  # beyond, the residual is lost
        assert float(y) == bound
        assert (revjax.additive.separate(y, r) == x) == exact


@pytest.mark.parametrize("bits", [0, 14, 23])
def test_rounding_is_that_of_float64_at_any_magnitude(bits):
    x = np.concatenate([s * np.logspace(-6, 38, 200) for s in (-1, 1)])
    x = np.append(x, [0, np.inf, -np.inf]).astype(np.float32)
    due = np.round(x.astype(np.float64) * 2.0**bits) / 2.0**bits
    np.testing.assert_array_equal(jax.jit(revjax.round_to_grid, static_argnums=1)(x, bits), due)
    assert float(revjax.round_to_grid(0.3, 2)) == 0.25  # a Python number


def test_rounding_refuses_what_cannot_hold_the_grid():
    for dtype in (jnp.float16, jnp.bfloat16):
        with pytest.raises(TypeError, match=f"{jnp.dtype(dtype)}, which cannot hold a grid"):
            revjax.round_to_grid(jnp.ones(3, dtype), 14)
    with pytest.raises(ValueError, match="grid_bits=24: give an integer from 0 to 23"):
        revjax.round_to_grid(jnp.ones(3), 24)


@pytest.mark.parametrize("dtype,bound", [(jnp.float32, 2.0**10), (jnp.float64, 2.0**39)])
def test_stream_bound(dtype, bound):
    assert revjax.stream_bound(14, dtype) == bound
    assert revjax.stream_bound(None, dtype) == float("inf")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_affine_inverts_up_to_rounding(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        x, log_scale, shift = trees(0, dtype), trees(1, dtype), trees(2, dtype)
        y = revjax.affine.combine(x, (log_scale, shift))
        expected = jax.tree.map(lambda x, s, t: np.exp(s) * x + t, x, log_scale, shift)
        chex.assert_trees_all_close(y, expected, rtol=1e-5)
        back = revjax.affine.separate(y, (log_scale, shift))
        tolerance = 1e3 * float(jnp.finfo(dtype).eps)
        chex.assert_trees_all_close(back, x, rtol=tolerance, atol=tolerance)


def test_integers_add_modulo_and_keys_and_booleans_are_carried():
    key = jax.random.key(3)
    x = {"n": jnp.uint8(250), "flag": jnp.array([True, False]), "key": key}
    r = {"n": jnp.uint8(10), "flag": jnp.array([True, True]), "key": jax.random.key(4)}
    y = revjax.additive.combine(x, r)
    assert int(y["n"]) == 4
    assert jnp.all(y["flag"] == x["flag"]) and jnp.all(y["key"] == key)
    back = revjax.additive.separate(y, r)
    assert int(back["n"]) == 250 and jnp.all(back["flag"] == x["flag"])
    carried = revjax.affine.combine(x, (r, r))
    assert int(carried["n"]) == 250 and jnp.all(carried["key"] == key)


@pytest.mark.parametrize("bits", [0, 3, 14])
def test_rounding_is_to_the_nearest_multiple(bits):
    x = np.random.default_rng(0).uniform(-5, 5, 1000).astype(np.float32)
    expected = np.round(x.astype(np.float64) * 2**bits) / 2**bits
    for round_to_grid in (revjax.round_to_grid, jax.jit(revjax.round_to_grid, static_argnums=1)):
        np.testing.assert_array_equal(round_to_grid(jnp.asarray(x), bits), expected)


def test_rounding_is_straight_through_in_every_derivative():
    def f(x):
        return jnp.sum(revjax.round_to_grid(x, 2) ** 3)

    x = jnp.array([0.3, -1.4])
    rounded = np.array([0.25, -1.5])
    np.testing.assert_allclose(jax.grad(f)(x), 3 * rounded**2)
    np.testing.assert_allclose(jax.jvp(f, (x,), (jnp.ones(2),))[1], np.sum(3 * rounded**2))
    np.testing.assert_allclose(jax.hessian(f)(x), np.diag(6 * rounded))


def test_stream_peak_sees_nan_and_ignores_integers():
    assert float(revjax.stream_peak((jnp.array([1.0, -7.0]), jnp.int32(100)))) == 7.0
    assert np.isnan(revjax.stream_peak((jnp.array([1.0, jnp.nan]), jnp.ones(3))))
    assert float(revjax.stream_peak(jnp.int32(3))) == 0.0
    assert float(revjax.stream_peak(jnp.zeros((0,)))) == 0.0


def test_stream_peak_has_no_gradient():
    chex.assert_trees_all_equal(jax.grad(revjax.stream_peak)(jnp.array([1.0, -3.0])), jnp.zeros(2))


def test_the_bound_itself_is_in_range():
    found, _ = checkify.checkify(revjax.check_in_range)(1024.0, 1024.0)
    found.throw()
    with pytest.raises(checkify.JaxRuntimeError, match="The stream reached 2000"):
        revjax.check_in_range(2000.0, 1024.0)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("coupling", [revjax.additive, revjax.affine])
def test_a_coupling_can_be_pickled(coupling):
    assert pickle.loads(pickle.dumps(coupling)).grid_bits == coupling.grid_bits


def test_grid_bits_that_cannot_be_are_refused():
    f32, bf16 = jnp.zeros(2), jnp.zeros(2, jnp.bfloat16)
    assert resolve_grid_bits("default", 14, f32) == 14
    assert resolve_grid_bits("default", None, bf16) is None
    assert resolve_grid_bits(None, 14, bf16) is None
    with pytest.raises(TypeError, match="bfloat16, which cannot hold a grid: cast it to float32"):
        resolve_grid_bits("default", 14, bf16)
    with pytest.raises(TypeError, match=r"grid_bits=14\.0: give an integer"):
        resolve_grid_bits(14.0, 14, f32)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="grid_bits=True"):
        resolve_grid_bits(True, 14, f32)
    with pytest.raises(ValueError, match="grid_bits=24: give an integer from 0 to 23"):
        resolve_grid_bits(24, 14, f32)
    with pytest.raises(ValueError, match="cannot keep the stream on a grid"):
        resolve_grid_bits(14, revjax.affine.grid_bits, f32)
