"""Survival probabilities and the gates that are drawn with them, against the paper."""

# Calls with options chosen at run time, which no type checker can follow.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import (
    COMPILE_FAST,
)

from revjax import (
    draw_gates,
    expected_depth,
    survival_probabilities,
)

compiled = partial(jax.jit, compiler_options=COMPILE_FAST)


@pytest.mark.parametrize("count, p_last", [(1, 0.5), (54, 0.5), (54, 0.2), (10, 1)])
def test_survival_probabilities(count, p_last):
    """Huang et al. 2016, eq. 4, function by function; and its sum, the expected depth."""
    linear = survival_probabilities(count, p_last)
    assert linear.dtype == np.float64 and linear.shape == (count,)
    for i, p in enumerate(linear, 1):
        np.testing.assert_allclose(p, 1 - i / count * (1 - p_last), rtol=1e-15)
    uniform = survival_probabilities(count, p_last, "uniform")
    assert uniform.dtype == np.float64 and uniform.tolist() == [p_last] * count
    due = count - (1 - p_last) * (count + 1) / 2
    np.testing.assert_allclose(expected_depth(linear), due, rtol=1e-14)
    np.testing.assert_allclose(expected_depth(uniform), count * p_last, rtol=1e-14)


def test_expected_depth_of_the_paper():
    """Section 3: the 110 layers of 54 functions are 40 of them, (3 L - 1) / 4, on average."""
    assert expected_depth(survival_probabilities(54, 0.5)) == 40.25


PROBABILITIES = [1.0, 0.75, 0.5, 0.1]


def within_chance(frequency, p, draws):
    assert np.all(np.abs(frequency - p) <= 5 * np.sqrt(p * (1 - p) / draws))


def test_gates_are_drawn_with_their_probabilities():
    keys = jax.random.split(jax.random.key(0), 4000)
    gates = np.asarray(compiled(jax.vmap(partial(draw_gates, probabilities=PROBABILITIES)))(keys))
    assert gates.dtype == bool and gates.shape == (4000, 4)
    within_chance(gates.mean(0), np.array(PROBABILITIES), 4000)
    together = np.corrcoef(gates[:, 1:].T.astype(float)) - np.eye(3)
    assert np.abs(together).max() < 5 / np.sqrt(4000)  # each for itself
    chex.assert_trees_all_equal(gates[3], draw_gates(keys[3], PROBABILITIES))


def test_gates_of_each_image_have_an_expectation_of_one():
    key, p = jax.random.key(0), np.array(PROBABILITIES)
    gates = draw_gates(key, PROBABILITIES, 4000)
    assert gates.dtype == jnp.float32 and gates.shape == (4, 4000, 1, 1, 1)
    flat = np.asarray(gates).reshape(4, 4000)
    assert np.all((flat == 0) | (flat == (1 / p.astype(np.float32))[:, None]))
    within_chance((flat > 0).mean(1), p, 4000)
    chex.assert_trees_all_equal(gates, draw_gates(key, PROBABILITIES, 4000))
    with jax.enable_x64(True):
        assert draw_gates(key, PROBABILITIES, 2, jnp.float64).dtype == jnp.float64


def test_numbers_of_numpy_are_numbers():
    due = survival_probabilities(3, 0.5)
    np.testing.assert_array_equal(survival_probabilities(np.int32(3), np.float32(0.5)), due)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((0, 0.5), "num_residuals=0: give a positive integer"),
        ((2.5, 0.5), "num_residuals=2.5: give a positive integer"),
        ((3, 0), "p_last=0: give a survival probability above 0, at most 1"),
        ((3, 1.5), "p_last=1.5: give a survival"),
        ((3, float("nan")), "p_last=nan: give a survival"),
        ((3, True), "p_last=True: give a survival"),
        ((3, 10**400), "p_last=10*: give a survival"),
        ((3, "half"), "p_last='half': give a survival"),
        ((3, 0.5, "cosine"), 'mode=\'cosine\': give "linear" or "uniform"'),
    ],
)
def test_what_survival_probabilities_refuse(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        survival_probabilities(*arguments)
