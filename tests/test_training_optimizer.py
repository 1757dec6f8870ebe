"""SGD and its schedule against the equations, in float64 numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from revjax.training.config import OptimConfig
from revjax.training.optimizer import learning_rate_schedule, make_optimizer

CONFIG = OptimConfig(
    learning_rate=0.1, boundaries=(1, 3), decay_factor=0.1, momentum=0.9, weight_decay=0.05
)


def test_two_steps_are_those_of_the_equations():
    """V <- m v + g + wd w for kernels, v <- m v + g for the rest; w <- w - rate v."""
    rng = np.random.default_rng(0)
    shapes = {
        "conv": {"kernel": (3, 3, 2, 4)},
        "stack": {"kernel": (5, 3, 3, 2, 4)},  # units of a scanned stage, along the first axis
        "norm": {"scale": (4,), "bias": (4,)},
        "dense": {"kernel": (4, 10), "bias": (10,)},
    }

    def draw(shape):
        return rng.normal(size=shape).astype(np.float32)

    def is_shape(node):
        return isinstance(node, tuple)

    params = jax.tree.map(draw, shapes, is_leaf=is_shape)
    gradients = [jax.tree.map(draw, shapes, is_leaf=is_shape) for _ in range(2)]

    optimizer = make_optimizer(CONFIG)
    result: Any = params
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = jax.jit(optimizer.update)(gradient, state, result)
        result = optax.apply_updates(result, updates)

    for module, names in shapes.items():
        for name in names:
            w = params[module][name].astype(np.float64)
            v = np.zeros_like(w)
            for rate, gradient in zip((0.1, 0.01), gradients, strict=True):
                decay = 0.05 * w if name == "kernel" else 0.0
                v = 0.9 * v + gradient[module][name] + decay
                w = w - rate * v
            np.testing.assert_allclose(result[module][name], w, rtol=0, atol=2e-7, err_msg=name)


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.1), (39_999, 0.1), (40_000, 0.01), (59_999, 0.01), (60_000, 0.001)]
)
def test_schedule_drops_at_its_boundaries(step, rate):
    config = OptimConfig(0.1, (40_000, 60_000), 0.1, 0.9, 2e-4)
    assert jax.jit(learning_rate_schedule(config))(jnp.int32(step)) == np.float32(rate)


def test_schedule_without_boundaries_is_constant():
    config = OptimConfig(0.3, (), 0.1, 0.9, 2e-4)
    assert learning_rate_schedule(config)(jnp.int32(10**9)) == np.float32(0.3)
