"""Max-pooling against that of JAX."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import revjax
from revjax.pool import max_pool


def pool_of_jax(x):
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")


@pytest.mark.parametrize("height,width", [(8, 8), (7, 9), (9, 6), (2, 1), (1, 2)])
def test_values_and_derivatives_are_those_of_jax(height, width):
    """With many equal values, of which ReLU makes zeros, and both modes of differentiation."""
    rng = np.random.default_rng(0)
    x, dx = jnp.asarray(rng.integers(-3, 4, (2, 2, height, width, 3)), jnp.float32)
    x = jax.nn.relu(x)
    due, pullback = jax.vjp(pool_of_jax, x)
    got, own_pullback = jax.vjp(max_pool, x)
    chex.assert_trees_all_equal(got, due)
    dy = jnp.asarray(rng.integers(-9, 9, due.shape), jnp.float32)  # whose sums are exact
    chex.assert_trees_all_equal(own_pullback(dy), pullback(dy))
    tangent = jax.jvp(max_pool, (x,), (dx,))[1]
    assert jnp.vdot(tangent, dy) == jnp.vdot(dx, pullback(dy)[0])


@pytest.mark.parametrize("height,width", [(8, 8), (5, 7)])
def test_nan_is_the_largest_wherever_it_is(height, width):
    """Where it is differentiated, too: a loss that is not finite must be seen."""
    for place in range(height * width):
        x = jnp.arange(1.0 * height * width).at[place].set(jnp.nan).reshape(1, height, width, 1)
        due = pool_of_jax(x)
        chex.assert_trees_all_equal(jax.jvp(max_pool, (x,), (x,))[0], due)
        assert jnp.isnan(due).any()


@pytest.mark.optimised
def test_behind_what_a_compiler_may_fuse_with_it():
    """Where it might compute the largest value in one way and compare it in another."""
    x, scale = jax.random.normal(jax.random.key(0), (2, 16, 18, 4)), jnp.full((1, 1, 1, 4), 0.3)

    def gradient(pool):
        def loss(x, scale):
            mean, var = x.mean((0, 1, 2), keepdims=True), x.var((0, 1, 2), keepdims=True)
            x = jax.nn.relu((x - mean) * jax.lax.rsqrt(var + 1e-3) * scale + 0.1)
            return jnp.sum(jnp.sin(pool(x)))

        return jax.jit(jax.grad(loss, (0, 1)))(x, scale)

    chex.assert_trees_all_close(gradient(max_pool), gradient(pool_of_jax), atol=1e-6)


@pytest.mark.optimised
def test_the_gradient_takes_little_memory():
    x = jax.ShapeDtypeStruct((2, 56, 56, 32), jnp.float32)
    own, of_jax = (
        revjax.memory_report(jax.grad(lambda x, pool=pool: (pool(x) ** 2).sum()), x).temporary_bytes
        for pool in (max_pool, pool_of_jax)
    )
    assert own < of_jax / 4
