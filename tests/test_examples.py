"""The network of docs/examples in each library: exact gradients, statistics, dropout, learning."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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


class Example(NamedTuple):
    """An example that was trained, and what the first of its steps was given."""

    loss: Callable  # (params, stats, images, labels, key, backward=...) -> (loss, stats)
    train_step: Callable  # (state, images, labels, key) -> (state, loss)
    state: Any  # (params, stats, opt_state); the last begins with the gradient of the step before
    batch: Any
    losses: list[float]
    accuracy: float

    def step(self, stats, seed):
        """The statistics, the gradient and the loss that the first parameters have."""
        params, _, opt_state = self.state
        (_, stats, (gradient, *_)), value = self.train_step(
            (params, stats, opt_state), *self.batch, jax.random.key(seed)
        )
        return stats, gradient, float(value)


@pytest.fixture(scope="module", autouse=True)
def as_users_have_it():
    """JAX's default promotion rules."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module", params=NAMES)
def example(request):
    module: Any = importlib.import_module(request.param)
    keep_gradient = optax.GradientTransformation(
        init=lambda params: jax.tree.map(jnp.zeros_like, params),
        update=lambda updates, state, params=None: (updates, updates),
    )
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "OPTIMIZER", optax.chain(keep_gradient, module.OPTIMIZER))
        original = module.train_step
        if request.param == "in_flax_nnx":
            loss, train_step, state_of = of_modules(module)
        else:
            loss, train_step, state_of = module.loss, original, lambda state: state

        def watched(*args):
            *objects, images, labels, _ = args
            calls.append((state_of(*objects), (images, labels)))
            return original(*args)

        patch.setattr(module, "train_step", watched)
        losses, accuracy = module.train(steps=30)
        state, batch = calls[0]
        yield Example(loss, train_step, state, batch, losses, accuracy)


def of_modules(module):
    """`loss`, `train_step` and its state as the other examples have them, of one with modules."""
    original = module.train_step

    def state_of(model, optimizer):
        states = nnx.split(model, nnx.Param, ...)[1:]
        return *jax.tree.map(lambda a: a, states), optimizer.opt_state  # copies of the variables

    def model_of(params, stats, backward="reversible"):
        graph = nnx.graphdef(nnx.eval_shape(lambda: module.Network(nnx.Rngs(0), backward)))
        return nnx.merge(graph, params, stats, copy=True)

    def loss(params, stats, *batch, backward):
        model = model_of(params, stats, backward)
        return module.loss(model, *batch), nnx.state(model, nnx.Not(nnx.Param))

    def train_step(state, *batch):
        model = model_of(*state[:2])
        optimizer = nnx.Optimizer(model, module.OPTIMIZER, wrt=nnx.Param)
        value = original(model, optimizer, *batch)
        return state_of(model, optimizer), value

    return loss, train_step, state_of


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def moving(stats):
    """The moving averages; of Haiku's, those before they are corrected for their start at zero."""
    leaves = jax.tree_util.tree_leaves_with_path(stats)
    keep = [leaf for path, leaf in leaves if "average" not in jax.tree_util.keystr(path)]
    return flat([leaf for leaf in keep if jnp.issubdtype(leaf.dtype, jnp.floating)])


def test_gradient_and_statistics_are_those_of_stored_activations(example, monkeypatch):
    params, stats, _ = example.state
    new_stats, gradient, _ = example.step(stats, seed=1)

    def stored_block(f, g, params, x, *args, has_aux):
        y, (aux,) = revjax.rev_chain_apply(
            f, g, [params], x, *args, has_aux=has_aux, backward="store"
        )
        return y, aux

    monkeypatch.setattr(revjax, "rev_block_apply", stored_block)
    grad = eqx.filter_jit(eqx.filter_grad(example.loss, has_aux=True))
    due, due_stats = grad(params, stats, *example.batch, jax.random.key(1), backward="store")
    assert np.linalg.norm(flat(gradient) - flat(due)) < 1e-6 * np.linalg.norm(flat(due))
    np.testing.assert_array_equal(flat(new_stats), flat(due_stats))


def test_statistics_move_once_a_step(example):
    """To 0.9 s + 0.1 m, with the same m in two steps of the same parameters, batch and key."""
    stats = example.state[1]
    first, *_ = example.step(stats, seed=1)
    second, *_ = example.step(first, seed=1)
    before, first, second = moving(stats), moving(first), moving(second)
    assert np.all(first != before)
    np.testing.assert_allclose(second - first, 0.9 * (first - before), rtol=1e-3, atol=1e-6)


def test_dropout_draws_from_the_key(example):
    losses = [example.step(example.state[1], seed)[2] for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_network_is_that_of_plain_jax(example):
    """Up to the order of axes, and to axes of one, which Haiku's BatchNorm has."""
    init = importlib.import_module("in_plain_jax").init
    params, stats = jax.eval_shape(init, jax.random.key(0))

    def shapes(tree):
        return sorted(sorted(n for n in a.shape if n > 1) for a in jax.tree.leaves(tree))

    assert shapes(eqx.filter(example.state[0], eqx.is_array)) == shapes(params)
    assert moving(example.state[1]).size == sum(a.size for a in jax.tree.leaves(stats))


def test_learns(example):
    assert example.losses[-1] < 0.5 * example.losses[0]
    assert example.accuracy > 0.5  # by the moving statistics, without dropout


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs_as_a_script(name):
    command = [sys.executable, ROOT / f"docs/examples/{name}.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
