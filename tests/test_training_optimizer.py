"""SGD, AdamW and their schedule against the equations, in float64 numpy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from revjax.training.config import OptimConfig
from revjax.training.optimizer import learning_rate_schedule, make_optimizer

CONFIG = OptimConfig(
    learning_rate=0.1, boundaries=(1, 3), decay_factor=0.1, momentum=0.8, weight_decay=0.05
)


RATES = (0.1, 0.01, 0.01)


def three_steps(**options):
    """The parameters and gradients that were drawn, and the parameters after three updates."""
    rng = np.random.default_rng(0)
    shapes = {
        "conv": {"kernel": (3, 3, 2, 4)},
        "stack": {"kernel": (5, 3, 3, 2, 4)},  # units of a scanned stage, along the first axis
        "norm": {"scale": (4,), "bias": (4,)},
        "dense": {"kernel": (4, 10), "bias": (10,)},
        "stem": {"positions": (1, 6, 4)},
    }

    def draw(shape):
        return rng.normal(size=shape).astype(np.float32)

    def is_shape(node):
        return isinstance(node, tuple)

    params = jax.tree.map(draw, shapes, is_leaf=is_shape)
    gradients = [jax.tree.map(draw, shapes, is_leaf=is_shape) for _ in range(3)]

    optimizer = make_optimizer(dataclasses.replace(CONFIG, **options))
    result: Any = params
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = jax.jit(optimizer.update)(gradient, state, result)
        result = optax.apply_updates(result, updates)
    return params, gradients, result


@pytest.mark.parametrize("decay", ["kernels", "all"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_three_steps_are_those_of_the_equations(nesterov, decay):
    """D = g + wd w where w decays, d = g elsewhere; v <- m v + d; w <- w - rate (v or d + m v)."""
    params, gradients, result = three_steps(nesterov=nesterov, decay=decay)
    for module, names in params.items():
        for name in names:
            w = params[module][name].astype(np.float64)
            v = np.zeros_like(w)
            for rate, gradient in zip(RATES, gradients, strict=True):
                d = gradient[module][name].astype(np.float64)
                if decay == "all" or name == "kernel":
                    d = d + 0.05 * w
                v = 0.8 * v + d
                w = w - rate * (d + 0.8 * v if nesterov else v)
            np.testing.assert_allclose(result[module][name], w, rtol=0, atol=3e-7, err_msg=name)


@pytest.mark.parametrize("decay", ["kernels", "all"])
@jax.numpy_dtype_promotion("standard")  # optax's Adam is not strict
def test_three_steps_of_adamw_are_those_of_the_equations(decay):
    """The decay moves w by rate wd w, and is in neither of the averages m and v."""
    params, gradients, result = three_steps(name="adamw", decay=decay)
    for module, names in params.items():
        for name in names:
            w = params[module][name].astype(np.float64)
            m, v = np.zeros_like(w), np.zeros_like(w)
            for t, (rate, gradient) in enumerate(zip(RATES, gradients, strict=True), 1):
                g = gradient[module][name].astype(np.float64)
                m = 0.8 * m + 0.2 * g
                v = 0.999 * v + 0.001 * g**2
                step = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
                w = w - rate * (step + (0.05 * w if decay == "all" or name == "kernel" else 0))
            np.testing.assert_allclose(result[module][name], w, rtol=0, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.1), (39_999, 0.1), (40_000, 0.01), (59_999, 0.01), (60_000, 0.001)]
)
def test_schedule_drops_at_its_boundaries(step, rate):
    config = OptimConfig(0.1, (40_000, 60_000), 0.1, 0.9, 2e-4)
    assert jax.jit(learning_rate_schedule(config))(jnp.int32(step)) == np.float32(rate)


def test_schedule_without_boundaries_is_constant():
    config = OptimConfig(0.3, (), 0.1, 0.9, 2e-4)
    assert learning_rate_schedule(config)(jnp.int32(10**9)) == np.float32(0.3)


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.01), (399, 0.01), (400, 0.1), (31_999, 0.1), (32_000, 0.01)]
)
def test_a_warm_up_has_a_rate_of_its_own(step, rate):
    """As He et al. 2016 train: 0.01 for 400 steps, and nothing else is moved by that."""
    config = OptimConfig(0.1, (32_000, 48_000), 0.1, 0.9, 1e-4, warmup_steps=400, warmup_rate=0.01)
    assert jax.jit(learning_rate_schedule(config))(jnp.int32(step)) == np.float32(rate)


def test_a_boundary_within_the_warm_up_counts_after_it():
    config = OptimConfig(0.1, (100,), 0.5, 0.9, 1e-4, warmup_steps=400, warmup_rate=0.01)
    rates = [learning_rate_schedule(config)(step) for step in (99, 100, 399, 400)]
    np.testing.assert_array_equal(rates, np.array([0.01, 0.01, 0.01, 0.05], np.float32))
