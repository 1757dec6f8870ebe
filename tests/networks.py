"""Networks in tests: arrays for them, one step of each, and how far two steps are apart."""

from contextlib import ExitStack
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# A program runs once here: what optimisation saves is less than it costs.
COMPILE_FAST = {"xla_backend_optimization_level": 0}


def setting(dtype):
    """Float64 needs x64; the tests' own arithmetic is not strict about promotion there."""
    stack = ExitStack()
    if dtype == "float64":
        stack.enter_context(jax.enable_x64(True))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
    return stack


def draw_arrays(network):
    """Arrays for a network's variables, none of them special: no zero bias, no variance of one."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        if name == "peak":
            return np.float32(-1)
        if name == "kernel":
            value = rng.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[-4:-1]))
        elif name in ("scale", "var"):
            value = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            value = rng.uniform(-0.5, 0.5, leaf.shape)
        return value.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(nnx.state(network)))


def with_arrays(network, arrays):
    graphdef, state = nnx.split(network)
    nnx.replace_by_pure_dict(state, arrays)
    return nnx.merge(graphdef, state)


def cross_entropy(logits, labels):
    labels = jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * labels, -1))


class Step(NamedTuple):
    loss: Any
    logits: Any
    gradient: Any  # with respect to the parameters, a nested dict
    variables: Any  # all of them as the forward pass leaves them, a nested dict


def restrict(tree, like):
    """The part of a nested dict that `like` has too."""
    return {k: restrict(tree[k], like[k]) for k in like} if isinstance(like, dict) else tree


def relative_error(got, due) -> float:
    """The largest |got - due| / |due| of the leaves."""
    chex.assert_trees_all_equal_shapes_and_dtypes(got, due)

    def error(got, due):
        got, due = np.ravel(got).astype(np.float64), np.ravel(due).astype(np.float64)
        if not due.any():  # as the gradient of what did not run: so must it be
            return np.inf if got.any() else 0.0
        return np.linalg.norm(got - due) / np.linalg.norm(due)

    got, due = jax.device_get((got, due))
    return float(np.max(jax.tree.leaves(jax.tree.map(error, got, due))))  # NaN, if one is
