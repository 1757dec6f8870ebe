"""The network of docs/examples in each library: exact gradients, statistics, dropout, learning."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import revjax

ROOT = Path(revjax.__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "docs/examples").glob("*.py"))


@pytest.fixture(scope="module", autouse=True)
def as_users_have_it():
    """JAX's default promotion rules; and little optimisation, since a program runs but once."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", params=NAMES)
def example(request):
    """An example whose optimiser keeps the gradient that it is given, and its first state."""
    module: Any = importlib.import_module(request.param)
    record = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, *_: (grads, grads)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "OPTIMIZER", optax.chain(record, module.OPTIMIZER))
        functions = of_modules(module) if request.param == "in_flax_nnx" else module
        params, stats = eqx.filter_jit(functions.init)(jax.random.key(0))
        opt_state = module.OPTIMIZER.init(eqx.filter(params, eqx.is_inexact_array))
        rng = np.random.default_rng(0)
        batch = rng.random((128, 64), np.float32), rng.integers(0, 10, 128)
        yield SimpleNamespace(
            train=module.train,
            loss=functions.loss,
            params=params,
            stats=stats,
            step=lambda stats, key: functions.train_step(
                (params, stats, opt_state), *batch, jax.random.key(key)
            ),
            batch=batch,
        )


def of_modules(module):
    """The functions of the other examples, from those of an example whose modules hold arrays."""

    def split(model):
        return nnx.split(model, nnx.Param, ...)

    def merge(params, stats, backward="reversible"):
        graph = split(module.Network(nnx.Rngs(0), backward))[0]
        return nnx.merge(graph, params, stats, copy=True)

    def loss(params, stats, *batch, backward):
        model = merge(params, stats, backward)
        return module.loss(model, *batch), split(model)[2]

    def train_step(state, *batch):
        model = merge(*state[:2])
        optimizer = nnx.Optimizer(model, module.OPTIMIZER, wrt=nnx.Param)
        value = module.train_step(model, optimizer, *batch)
        return (*split(model)[1:], optimizer.opt_state), value

    return SimpleNamespace(
        init=lambda key: split(module.Network(nnx.Rngs(key)))[1:], loss=loss, train_step=train_step
    )


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def floating(stats):
    """The moving averages; of Haiku's, those before they are corrected for their start at zero."""
    leaves = jax.tree_util.tree_leaves_with_path(stats)
    keep = [leaf for path, leaf in leaves if "average" not in jax.tree_util.keystr(path)]
    return flat([leaf for leaf in keep if jnp.issubdtype(leaf.dtype, jnp.floating)])


def stored_block(f, g, params, x, *args):
    return revjax.rev_chain_apply(f, g, [params], x, *args, has_aux=True, backward="store")


def test_gradient_and_statistics_of_stored_activations(example, monkeypatch):
    (_, stats, (gradient, _)), _ = example.step(example.stats, key=1)

    def apply(f, g, params, x, *args, has_aux):
        y, (aux,) = stored_block(f, g, params, x, *args)
        return y, aux

    monkeypatch.setattr(revjax, "rev_block_apply", apply)
    grad = eqx.filter_jit(eqx.filter_grad(example.loss, has_aux=True))
    due, stats_due = grad(
        example.params, example.stats, *example.batch, jax.random.key(1), backward="store"
    )
    error = np.linalg.norm(flat(gradient) - flat(due)) / np.linalg.norm(flat(due))
    print("error", error)
    assert error < 1e-6
    np.testing.assert_array_equal(flat(stats), flat(stats_due))


def test_statistics_move_once_a_step(example):
    """s' = 0.9 s + 0.1 m, with the same m in two steps of the same parameters, batch and key."""
    (_, first, _), _ = example.step(example.stats, key=1)
    (_, second, _), _ = example.step(first, key=1)
    before, first, second = floating(example.stats), floating(first), floating(second)
    assert np.all(first != before)
    np.testing.assert_allclose(second - first, 0.9 * (first - before), rtol=1e-3, atol=1e-6)


def test_dropout_draws_from_the_key(example):
    values = [float(example.step(example.stats, key)[1]) for key in (1, 1, 2)]
    assert values[0] == values[1] != values[2]


def test_parameters_are_those_of_plain_jax(example):
    """Up to the order of axes, which Equinox has the other way about."""
    due, _ = importlib.import_module("in_plain_jax").init(jax.random.key(0))
    shapes, due_shapes = (
        sorted(sorted(leaf.shape) for leaf in jax.tree.leaves(tree))
        for tree in (example.params, due)
    )
    assert shapes == due_shapes


def test_learns(example):
    losses, accuracy = example.train(steps=30)
    assert losses[-1] < 0.5 * losses[0]
    assert accuracy > 0.5  # with moving statistics, and without dropout


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs_as_a_script(name):
    command = [sys.executable, ROOT / f"docs/examples/{name}.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
