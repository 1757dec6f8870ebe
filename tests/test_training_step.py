"""The compiled training steps: the same bits however they are dispatched, on what is due."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from revjax.data import batch_indices, load_dataset, random_crop_flip
from revjax.training.config import check_config
from revjax.training.evaluation import make_eval_batch
from revjax.training.optimizer import learning_rate_schedule, make_optimizer
from revjax.training.state import abstract_model, draw, initial_state
from revjax.training.step import make_train_steps, put_on_device

MOST = 7  # steps a dispatch


@pytest.fixture(scope="module")
def config():
    values = {
        "data": {"name": "digits", "padding": 1, "flip": False},
        "model": {
            "name": "revnet",
            "units": (2,),
            "filters": (8, 8),
            "bottleneck": False,
            "backward": "reversible",
            "grid_bits": 14,
            "dtype": "float32",
        },
        "optim": {
            "learning_rate": 0.1,
            "boundaries": (4,),
            "decay_factor": 0.1,
            "momentum": 0.9,
            "weight_decay": 2e-4,
        },
        "seed": 3,
        "steps": 100,
        "batch_size": 50,
        "log_every": 5,
        "eval_every": 50,
        "checkpoint_every": 50,
        "keep_checkpoints": 1,
    }
    return check_config(ConfigDict(values))


@pytest.fixture(scope="module")
def data():
    return put_on_device(load_dataset("digits"))


@pytest.fixture(scope="module")
def begin(config):
    """The state before the first step; a new copy a call, as training steps consume theirs."""
    optimizer = make_optimizer(config.optim)
    state = jax.device_get(draw(lambda: initial_state(config, optimizer)))
    return lambda: jax.tree.map(jnp.array, state)


@pytest.fixture(scope="module")
def train_steps(config, data, begin):
    """`train_steps(state, step, num_steps) -> state, report`, compiled once."""
    program = make_train_steps(
        config,
        abstract_model(config),
        make_optimizer(config.optim),
        learning_rate_schedule(config.optim),
    )
    indices = np.zeros((MOST, config.batch_size), np.int32)
    compiled = program.lower(begin(), data[0], indices, np.int32(0)).compile()

    def run(state, step, num_steps):
        indices = np.zeros((MOST, config.batch_size), np.int32)
        for index in range(num_steps):
            indices[index] = batch_indices(config.seed, step + index, config.batch_size, 1437)
        return compiled(state, data[0], indices, np.int32(num_steps))

    return run


@pytest.mark.parametrize("dispatches", [(1,) * MOST, (3, 4), (6, 1)])
def test_dispatches_do_not_change_a_bit(train_steps, begin, dispatches):
    expected = train_steps(begin(), 0, MOST)
    state, report, step = begin(), None, 0
    for num_steps in dispatches:
        state, report = train_steps(state, step, num_steps)
        step += num_steps
    assert step == MOST
    chex.assert_trees_all_equal((state, report), expected)


def test_report(train_steps, begin, config, data):
    """The sums are over the steps since the last logged one, here 6 and 7 of log_every 5."""
    state, step, losses, peaks = begin(), 0, [], []
    previous = 0.0
    while step < MOST:
        state, report = train_steps(state, step, 1)
        step += 1
        if step % config.log_every == 1:
            previous = 0.0
        total = float(report.loss) * int(state.interval.steps)
        losses.append(total - previous)
        previous = total
        peaks.append(float(report.stream_peak))
    assert int(state.interval.steps) == 2
    _, report = train_steps(begin(), 0, MOST)
    np.testing.assert_allclose(report.loss, np.mean(losses[5:]), rtol=1e-5)
    assert report.learning_rate == np.float32(0.01)  # the boundary is 4
    assert report.stream_peak == max(peaks[5:])
    assert report.run_peak == max(peaks)
    assert report.failed_step == 0
    assert 0 <= report.accuracy <= 1


def apply(graph, state, images):
    """The network's logits in float64, by itself."""

    @jax.jit
    def logits(params, variables):
        return nnx.merge(graph, params, variables, copy=True)(images)

    return np.asarray(logits(state.params, state.variables), np.float64)


def test_first_loss_is_that_of_the_model(train_steps, begin, config, data):
    """The first step's loss, from its parts: order, augmentation, mean image, model, softmax."""
    state = begin()
    images, labels = np.asarray(data[0].images), np.asarray(data[0].labels)
    batch = batch_indices(config.seed, 0, config.batch_size, 1437)
    mean = images.astype(np.float64).mean(axis=0).astype(np.float32)
    key = jax.random.fold_in(jax.random.key(config.seed), jnp.int32(0))
    inputs = random_crop_flip(
        key, jnp.asarray(images[batch].astype(np.float32) - mean), padding=1, flip=False
    )
    logits = apply(abstract_model(config).train_graph, state, inputs)
    log_softmax = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = -log_softmax[np.arange(config.batch_size), labels[batch]].mean()
    right = (logits.argmax(axis=-1) == labels[batch]).mean()
    _, report = train_steps(state, 0, 1)
    np.testing.assert_allclose(report.loss, expected, rtol=1e-5)
    np.testing.assert_allclose(report.accuracy, right, rtol=1e-6)


def test_a_step_that_is_not_finite_is_the_last(train_steps, begin):
    state, _ = train_steps(begin(), 0, 3)
    spoiled = state._replace(params=jax.tree.map(lambda leaf: leaf * jnp.inf, state.params))
    state, report = train_steps(spoiled, 3, 4)
    assert report.failed_step == 4
    assert state.step == 4
    state, report = train_steps(state, 4, 3)
    assert (int(state.step), int(report.failed_step)) == (4, 4)


def test_evaluation_counts_every_example_once(begin, config, data):
    """A batch size that does not divide the data, against one call on all of it."""
    model, state = abstract_model(config), begin()
    eval_batch = make_eval_batch(model, 100)
    sums = [
        eval_batch(state.params, state.variables, data[1], jnp.int32(start))
        for start in range(0, 360, 100)
    ]
    images = data[1].images.astype(jnp.float32) - data[1].mean[None]
    logits = apply(model.eval_graph, state, images)
    labels = np.asarray(data[1].labels)
    log_softmax = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    losses = -log_softmax[np.arange(360), labels]
    np.testing.assert_allclose(sum(float(loss) for loss, _ in sums), losses.sum(), rtol=1e-5)
    assert sum(int(correct) for _, correct in sums) == (logits.argmax(axis=-1) == labels).sum()


def test_only_kernels_decay(config, begin):
    """With a gradient of zero, what moves is what decays."""
    params, optimizer = begin().params, make_optimizer(config.optim)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    moved = {
        jax.tree_util.keystr(path): bool(np.any(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(updates))
    }
    assert {path for path, is_moved in moved.items() if is_moved} == {
        path for path in moved if "kernel" in path
    }
    assert any(moved.values())
    assert not all(moved.values())
