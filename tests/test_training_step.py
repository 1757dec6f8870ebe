"""The compiled training steps: the same bits however they are dispatched, on what is due."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from revjax.data import batch_indices, hold_out, load_dataset, random_crop_flip
from revjax.training.config import check_config
from revjax.training.evaluation import Evaluator
from revjax.training.feed import MemoryFeed
from revjax.training.interrupt import StopSignals
from revjax.training.mesh import get, make_mesh, put, replicated
from revjax.training.optimizer import learning_rate_schedule, make_optimizer
from revjax.training.state import abstract_model, draw, initial_state
from revjax.training.step import make_train_step, make_train_steps, put_on_device
from revjax.training.votes import cast

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
        "mesh": {"data": 1},
        "log_every": 5,
        "eval_every": 50,
        "checkpoint_every": 50,
        "keep_checkpoints": 1,
        "precise_bn_batches": 0,
    }
    return check_config(ConfigDict(values))


@pytest.fixture(scope="module")
def data(config):
    return put_on_device(config.data, load_dataset("digits"), make_mesh(config))


@pytest.fixture(scope="module")
def begin(config):
    """The state before the first step; a new copy a call, as training steps consume theirs."""
    optimizer = make_optimizer(config.optim)
    mesh = make_mesh(config)
    state = get(draw(lambda: initial_state(config, optimizer), mesh))
    return lambda: put(state, replicated(mesh))


@pytest.fixture(scope="module")
def train_steps(config, data, begin):
    """`train_steps(state, step, num_steps) -> state, report`, compiled once."""
    program = make_train_steps(
        config,
        abstract_model(config),
        make_optimizer(config.optim),
        learning_rate_schedule(config.optim),
        make_mesh(config),
    )
    votes = cast(make_mesh(config), stop=True, pace=7)
    indices = np.zeros((MOST, config.batch_size), np.int32)
    compiled = program.lower(begin(), data["train"], indices, np.int32(0), votes).compile()

    def run(state, step, num_steps):
        indices = np.zeros((MOST, config.batch_size), np.int32)
        for index in range(num_steps):
            indices[index] = batch_indices(config.seed, step + index, config.batch_size, 1437)
        return compiled(state, data["train"], indices, np.int32(num_steps), votes)

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


def test_a_step_without_loops_is_the_same(config, data):
    """config.model.unroll: no scan over the units, and the same numbers but for how they round."""
    images, labels = (jnp.asarray(a[:8]) for a in (data["train"].images, data["train"].labels))

    def step_of(unroll):
        model = dataclasses.replace(config.model, unroll=unroll, units=(3,))
        deeper = dataclasses.replace(config, model=model, batch_size=8)
        optimizer, mesh = make_optimizer(config.optim), make_mesh(config)
        step = make_train_step(deeper, abstract_model(deeper), optimizer, mesh)
        arguments = initial_state(deeper, optimizer), images.astype(jnp.float32) / 16, labels
        lowered = jax.jit(step).lower(*arguments)
        return lowered.as_text().count("stablehlo.while"), jax.jit(step)(*arguments)

    (scanned, due), (unrolled, got) = step_of(False), step_of(True)
    assert unrolled == 0 < scanned
    chex.assert_trees_all_close(got.params, due.params, rtol=1e-5, atol=1e-6)


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
    images, labels = np.asarray(data["train"].images), np.asarray(data["train"].labels)
    batch = batch_indices(config.seed, 0, config.batch_size, 1437)
    mean = images.astype(np.float64).mean(axis=0).astype(np.float32)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 2**31), 0)
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


def test_steps_that_are_not_finite_can_be_skipped(begin, config, data):
    """Bit for bit the run without them; one more than the option allows is a failure."""
    config = dataclasses.replace(config, skip_nonfinite=2, log_every=3)
    optimizer = make_optimizer(config.optim)
    step = make_train_step(config, abstract_model(config), optimizer, make_mesh(config))
    images = data["train"].images[:50].astype(jnp.float32)
    labels = data["train"].labels[:50]
    poisoned = images.at[7, 0, 0, 0].set(jnp.nan)
    step = jax.jit(step).lower(begin(), images, labels).compile()

    state = due = begin()
    for number, batch in enumerate([images, poisoned, images, poisoned, images]):
        state = step(state, batch, labels)
        kept = due._replace(step=due.step + 1)  # what leaves the step out
        due = step(due, batch, labels) if batch is images else kept
        assert (int(state.step), int(state.failed_step)) == (number + 1, 0)
        if number == 3:  # where the sums begin anew, with nothing to sum
            assert int(state.interval.steps) == 0
            due = due._replace(interval=state.interval)
    assert (int(state.skipped), int(due.skipped)) == (2, 0)
    chex.assert_trees_all_equal(state._replace(skipped=due.skipped), due)

    state = step(state, poisoned, labels)
    assert (int(state.failed_step), int(state.skipped)) == (6, 2)


def held_out(config):
    """The config with validation, and what that makes of the digits."""
    data = dataclasses.replace(config.data, validation=237, normalize="mean_image_std")
    splits = put_on_device(data, load_dataset("digits"), make_mesh(config))
    return dataclasses.replace(config, data=data), splits


def test_validation_takes_from_training_and_statistics_are_of_what_is_left(config, data):
    """Each example is in one split, by the mask; the test split is the same with and without."""
    _, splits = held_out(config)
    assert list(splits) == ["train", "validation", "test"]
    mask = hold_out("digits", np.asarray(data["train"].labels), 237)
    for name, members in (("train", ~mask), ("validation", mask)):
        np.testing.assert_array_equal(splits[name].images, data["train"].images[members])
        np.testing.assert_array_equal(splits[name].labels, data["train"].labels[members])
    chex.assert_trees_all_equal(splits["test"][:2], data["test"][:2])
    left = np.asarray(data["train"].images, np.float64)[~mask]
    for split in splits.values():
        np.testing.assert_allclose(split.normalization.mean, left.mean(0), rtol=1e-6)
        np.testing.assert_allclose(split.normalization.std.item(), left.std(), rtol=1e-6)


def test_evaluation_counts_every_example_once(begin, config):
    """A batch size that does not divide the splits, against one call on all of each."""
    config, data = held_out(dataclasses.replace(config, batch_size=100))
    model, state = abstract_model(config), begin()
    assert_evaluates(evaluator(config, model, data), state, state, data, ["validation", "test"])


def test_precise_bn_evaluates_by_the_mean_of_batch_statistics(begin, config, data):
    """Against the statistics of each batch, found from how far they move the running averages."""
    config = dataclasses.replace(config, batch_size=100, precise_bn_batches=3)
    model, state = abstract_model(config), begin()

    @jax.jit
    def statistics(indices):
        images = data["train"].images[indices].astype(jnp.float32)
        images = images - data["train"].normalization.mean[None]
        module = nnx.merge(model.train_graph, state.params, state.variables, copy=True)
        module(images)
        moved = nnx.state(module, nnx.BatchStat)
        old = nnx.filter_state(state.variables, nnx.BatchStat)
        return jax.tree.map(lambda new, old: (new - 0.99 * old) / 0.01, moved, old)

    batches = [batch_indices(config.seed, step, 100, 1437) for step in range(3)]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *map(statistics, batches))
    precise = state._replace(variables=nnx.merge_state(state.variables, mean))
    before = jax.device_get(state.variables)
    evaluate = evaluator(config, model, data)
    assert_evaluates(evaluate, state, precise, data, ["test"], rtol=1e-3)
    chex.assert_trees_all_equal(jax.device_get(state.variables), before)
    (first,) = evaluate(state, ["test"], StopSignals())
    evaluate.compile(state)
    (again,) = evaluate(state, ["test"], StopSignals())
    assert (first["loss"], first["accuracy"]) == (again["loss"], again["accuracy"])


def evaluator(config, model, data):
    mesh = make_mesh(config)
    return Evaluator(config, model, MemoryFeed(config, data, mesh), mesh)


def assert_evaluates(evaluate, state, evaluated, splits, names, rtol=1e-5):
    """The evaluation of a state is that of `evaluated`'s statistics in one batch a split."""
    rows = list(evaluate(state, names, StopSignals()))
    assert [row["split"] for row in rows] == names
    for row in rows:
        data = splits[row["split"]]
        mean, std = data.normalization
        images = (data.images.astype(jnp.float32) - mean[None]) / std[None]
        logits = apply(evaluate.model.eval_graph, evaluated, images)
        labels = np.asarray(data.labels)
        log_softmax = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        losses = -log_softmax[np.arange(len(labels)), labels]
        np.testing.assert_allclose(row["loss"], losses.mean(), rtol=rtol)
        assert row["accuracy"] == (logits.argmax(axis=-1) == labels).mean()


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
