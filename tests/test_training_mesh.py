"""Training on a mesh: what moves between devices, and that results are those of one device."""

import dataclasses
import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from revjax.data import load_dataset
from revjax.training.config import MeshConfig, check_config
from revjax.training.errors import ConfigError
from revjax.training.feed import MemoryFeed
from revjax.training.mesh import get, make_mesh, put, split_over_fsdp
from revjax.training.optimizer import learning_rate_schedule, make_optimizer
from revjax.training.state import abstract_model, draw, initial_state, state_shardings
from revjax.training.step import make_train_steps, put_on_device
from revjax.training.votes import cast

BATCH = 44  # no other axis of an array has this length, nor the parts of a batch, 22 and 11
VALUES = {
    "data": {"name": "digits", "padding": 1, "flip": False},
    "model": {
        "name": "revnet",
        "units": (3,),
        "filters": (16, 32),
        "bottleneck": False,
        "backward": "reversible",
        "grid_bits": 14,
        "dtype": "float32",
    },
    "optim": {
        "learning_rate": 0.1,
        "boundaries": (),
        "decay_factor": 0.1,
        "momentum": 0.9,
        "weight_decay": 2e-4,
    },
    "seed": 3,
    "steps": 100,
    "batch_size": BATCH,
    "log_every": 5,
    "eval_every": 50,
    "checkpoint_every": 50,
    "keep_checkpoints": 1,
    "precise_bn_batches": 0,
}
CONFIG = check_config(ConfigDict(VALUES))
LAYOUTS = {"1": (1, 1), "4": (4, 1), "2x2": (2, 2)}


def layout(name, **model):
    """The config on a mesh, its statistics by each device where the name says so."""
    data, fsdp = LAYOUTS[name.removesuffix(" device")]
    scope = "device" if name.endswith("device") else "global"
    model = dataclasses.replace(CONFIG.model, bn_scope=scope, **model)
    return dataclasses.replace(CONFIG, model=model, mesh=MeshConfig(data, fsdp))


class Run:
    """The first steps of a config, a dispatch each."""

    def __init__(self, config):
        self.mesh = make_mesh(config)
        optimizer = make_optimizer(config.optim)
        schedule = learning_rate_schedule(config.optim)
        initial = partial(initial_state, config, optimizer)
        self.state = draw(initial, self.mesh)
        self.shardings = state_shardings(self.mesh, jax.eval_shape(initial))
        data = put_on_device(config.data, load_dataset("digits"), self.mesh)
        self.feed = MemoryFeed(config, data, self.mesh)
        self.votes = cast(self.mesh, False)
        program = make_train_steps(config, abstract_model(config), optimizer, schedule, self.mesh)
        batches = self.feed.training(0, 1)
        self.compiled = program.lower(self.state, *batches, np.int32(0), self.votes).compile()

    def steps(self, start, stop):
        for step in range(start, stop):
            batches = self.feed.training(step, 1)
            self.state, self.report = self.compiled(self.state, *batches, np.int32(1), self.votes)
        return self


@pytest.fixture(scope="module")
def runs():
    """After two steps, on each layout."""
    names = (*LAYOUTS, "4 device")
    return {name: Run(layout(name)).steps(0, 2) for name in names}


@pytest.mark.parametrize("name", ["4", "2x2", "4 device"])
def test_only_parameters_gradients_and_statistics_move(runs, name):
    """Not an activation, neither forward nor in the reconstruction: the batch is in no shape."""
    text = runs[name].compiled.as_text()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    moved = re.findall(rf"= (\S.*?) ({kinds})(?:-start)?\(", text)
    assert moved
    shapes = [
        tuple(map(int, re.findall(r"\d+", shape)))
        for shapes, _ in moved
        for shape in re.findall(r"\w+\[([\d,]*)\]", shapes)
    ]
    assert not {length for shape in shapes for length in shape} & {44, 22, 11}
    assert max(int(np.prod(shape)) for shape in shapes) <= 3 * 3 * 3 * 16 * 16  # a stage's kernels
    kinds = {kind for _, kind in moved}
    assert kinds <= {"all-reduce", "all-gather", "reduce-scatter"}
    assert ("all-gather" in kinds) == (name == "2x2")


@pytest.mark.parametrize("name", ["4", "2x2"])
def test_results_are_those_of_one_device(runs, name):
    ours, due = get(runs[name].state), get(runs["1"].state)
    np.testing.assert_allclose(ours.interval.loss, due.interval.loss, rtol=1e-4)
    chex.assert_trees_all_close(ours.params, due.params, rtol=1e-2, atol=1e-3)
    chex.assert_trees_all_close(ours.variables, due.variables, rtol=1e-2, atol=1e-3)


def test_the_reconstruction_is_exact(runs):
    """With the batch split the rule has the very gradients of remat."""
    remat = Run(layout("4", backward="remat")).steps(0, 2)
    chex.assert_trees_all_equal(get(runs["4"].state), get(remat.state))


def test_statistics_of_each_device(runs):
    """The running averages have moved towards the mean of the parts' statistics."""
    ours, whole = (get(runs[name].state) for name in ("4 device", "4"))
    assert ours.interval.loss != whole.interval.loss
    np.testing.assert_allclose(ours.interval.loss, whole.interval.loss, rtol=0.1)
    # The variance within parts is smaller than that of the whole, which has that of their means.
    ours, whole = (
        sum(
            leaf.sum()
            for path, leaf in jax.tree_util.tree_leaves_with_path(state.variables)
            if "var" in jax.tree_util.keystr(path)
        )
        for state in (ours, whole)
    )
    assert 0.8 * whole < ours < whole


def test_a_run_goes_on_on_another_layout(runs):
    """To the last bit it begins where the other has come to, and ends near it."""
    saved = get(runs["2x2"].state)
    other = runs["4"]
    state = put(saved, other.shardings)
    chex.assert_trees_all_equal(get(state), saved)
    state, _ = other.compiled(state, *other.feed.training(2, 1), np.int32(1), other.votes)
    due, _ = runs["2x2"].compiled(
        put(saved, runs["2x2"].shardings), *other.feed.training(2, 1), np.int32(1), other.votes
    )
    assert int(state.step) == 3
    np.testing.assert_allclose(get(state).interval.loss, get(due).interval.loss, rtol=1e-4)


def test_what_is_split(runs):
    state, mesh = runs["2x2"].state, runs["2x2"].mesh
    split = [leaf.sharding.spec for leaf in jax.tree.leaves(state.params)]
    momentum = [leaf.sharding.spec for leaf in jax.tree.leaves(state.opt_state)]
    assert any("fsdp" in spec for spec in split)
    assert sum("fsdp" in spec for spec in split) == sum("fsdp" in spec for spec in momentum)

    def spec(*shape):
        return split_over_fsdp(mesh, jax.ShapeDtypeStruct(shape, jnp.float32)).spec

    assert spec(4, 3, 3, 16, 32) == P(None, None, None, None, "fsdp")
    assert spec(4, 3, 3, 32, 16) == P(None, None, None, "fsdp", None)
    assert spec(4, 3, 3, 32, 33) == P(None, None, None, "fsdp", None)
    assert spec(4, 3, 3, 31, 33) == P(None, None, None, None, None)
    assert spec(1000) == P(None)  # too small
    assert spec() == P()


def test_put_and_get_keep_every_bit(runs):
    mesh = runs["2x2"].mesh
    bits = np.random.default_rng(0).integers(0, 2**32, (32, 64), np.uint32)
    bits[0, :2] = 0x80000000, 0x7FC00001  # -0.0, and a NaN with something to say
    array = bits.view(np.float32)
    there = put(array, split_over_fsdp(mesh, array))
    assert {shard.data.shape for shard in there.addressable_shards} == {(32, 32)}
    np.testing.assert_array_equal(get(there).view(np.uint32), bits)


@pytest.mark.parametrize(
    ("data", "fsdp", "sentence"),
    [
        (8, 1, r"mesh is 8 x 1 \(data x fsdp\), and there are 4 devices: .* is at most 4"),
        (-1, 8, r"mesh is 1 x 8"),
        (3, 1, r"batch_size is 44, which 3 devices cannot share evenly: choose a multiple of 3"),
    ],
)
def test_impossible_meshes_are_refused(data, fsdp, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make_mesh(dataclasses.replace(CONFIG, mesh=MeshConfig(data, fsdp)))
    assert make_mesh(dataclasses.replace(CONFIG, mesh=MeshConfig(-1, 2))).devices.shape == (2, 2)
