"""Checkpoints come back bit for bit, or are named as damaged and the one before is used."""

import os
import resource
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from revjax.training.checkpoints import Checkpoints
from revjax.training.errors import TrainingError
from revjax.training.mesh import get
from revjax.training.optimizer import OptimConfig, make_optimizer
from revjax.training.state import Interval, TrainState


@pytest.fixture(scope="module")
def states():
    """The states of a run, by step."""
    optimizer = make_optimizer(OptimConfig(0.1, (), 0.1, 0.9, 2e-4))

    def state(step: int) -> TrainState:
        rng = np.random.default_rng(step)
        kernel = jnp.asarray(rng.normal(size=(3, 3, 8, 16)), jnp.float32)
        params = nnx.State({"conv": {"kernel": nnx.Param(kernel)}})
        return TrainState(
            step=jnp.int32(step),
            params=params,
            variables=nnx.State({"norm": {"mean": nnx.BatchStat(kernel[0, 0, 0])}}),
            opt_state=optimizer.init(params),
            interval=Interval(jnp.int32(3), jnp.float32(0.7), jnp.int32(9), jnp.float32(2)),
            stream_peak=jnp.float32(2.5),
            failed_step=jnp.int32(0),
            skipped=jnp.int32(0),
        )

    return {step: state(step) for step in (0, 10, 20, 30)}


@pytest.fixture
def saved(tmp_path, states):
    """The folder of a run that saved at steps 10, 20 and 30 and kept the newest two."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (10, 20, 30):
        checkpoints.save(step, states[step], wall_seconds=1.5 * step)
    checkpoints.close()
    return tmp_path / "checkpoints"


def restore(directory, template, *, read_only=False):
    told = []
    checkpoints = Checkpoints(directory, keep=2, read_only=read_only)
    try:
        return checkpoints.restore_newest(template, told.append), told
    finally:
        checkpoints.close()


def steps(directory):
    return sorted(int(path.name) for path in directory.iterdir())


def test_newest_comes_back_bit_for_bit(saved, states):
    restored, told = restore(saved, states[0])
    assert restored is not None
    assert (restored.step, restored.wall_seconds, told) == (30, 45.0, [])
    assert jax.tree.structure(restored.state) == jax.tree.structure(states[30])
    chex.assert_trees_all_equal(restored.state, states[30])
    assert steps(saved) == [20, 30]


def test_one_of_another_network_is_refused(saved, states):
    def wider(leaf):
        return jnp.zeros((*leaf.shape[:-1], leaf.shape[-1] + 1)) if leaf.ndim > 1 else leaf

    template = states[0]._replace(params=jax.tree.map(wider, states[0].params))
    for seal in (True, False):
        with pytest.raises(TrainingError, match=r"step 30 in .* is of another network: .*kernel"):
            restore(saved, template)
        if seal:
            (saved / "30" / "files.json").unlink()
    assert steps(saved) == [20, 30]


def test_what_is_saved_may_be_donated_at_once(tmp_path, states):
    """What the writing thread holds is no view, for which JAX would, silently, not donate."""
    state = jax.tree.map(jnp.copy, states[10])
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    given = get(state)
    checkpoints.save(10, given, wall_seconds=0.0)
    for leaf, copy in zip(jax.tree.leaves(state), jax.tree.leaves(given), strict=True):
        assert not np.shares_memory(np.asarray(leaf), copy)
    jax.block_until_ready(step(state))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    checkpoints.close()
    restored, _ = restore(tmp_path / "checkpoints", states[0])
    assert restored is not None
    chex.assert_trees_all_equal(restored.state, states[10])


FAILURES = [  # the second as tensorstore has it
    OSError("no space left on device"),
    ValueError("OUT_OF_RANGE: Failed to write 16 bytes to file 1: no space left on device"),
]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("waiting", [True, False])
def test_a_save_that_fails_is_an_error(tmp_path, states, monkeypatch, waiting, failure):
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr("revjax.training.checkpoints.write_json", fail)
    with (
        pytest.raises(TrainingError, match=r"step 10 could not be written: .*no space left"),
        Checkpoints(tmp_path / "checkpoints") as checkpoints,
    ):
        checkpoints.save(10, states[10], wall_seconds=0.0)
        if waiting:
            checkpoints.wait()


def test_the_newest_is_so_by_its_step_whatever_the_clock_says(saved, states):
    """The clock was set back: what there is comes from the future, the oldest most of all."""
    for step, year in ((20, 2300), (30, 2200)):
        for path in (saved / str(step)).rglob("*"):
            seconds = (year - 1970) * 31_556_952
            os.utime(path, (seconds, seconds))
    restored, told = restore(saved, states[0])
    assert restored is not None
    assert (restored.step, told) == (30, [])
    with Checkpoints(saved, keep=2) as checkpoints:
        checkpoints.save(40, states[10], wall_seconds=0.0)
    assert steps(saved) == [30, 40]


def test_none_without_checkpoints(tmp_path, states):
    assert restore(tmp_path / "checkpoints", states[0]) == (None, [])


def largest_file(directory):
    """The file with the numbers of the state."""
    return max(directory.rglob("d/*"), key=lambda path: path.stat().st_size)


def truncate(directory):
    path = largest_file(directory / "state")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(directory):
    path = largest_file(directory / "state")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lose_a_file(directory):
    largest_file(directory / "state").unlink()


def lose_the_record(directory):
    shutil.rmtree(directory / "record")


def seal_with(text):
    return lambda directory: (directory / "files.json").write_text(text)


def lose_the_seal_and(damage):
    def do(directory):
        (directory / "files.json").unlink()
        damage(directory)

    return do


def lose_all(directory):
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# Of tensorstore, whose reads and writes end after orbax has given up on them.
late = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

DAMAGES = [truncate, flip_a_bit, lose_a_file, lose_the_record, lose_all]
DAMAGES += [seal_with(text) for text in ("", "[]", "{}", "\0")]
DAMAGES += [lose_the_seal_and(damage) for damage in (truncate, lose_a_file, lose_the_record)]


@late
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_set_aside(saved, states, damage):
    damage(saved / "30")
    restored, told = restore(saved, states[0])
    assert restored is not None
    assert restored.step == 20
    chex.assert_trees_all_equal(restored.state, states[20])
    assert len(told) == 1
    assert "the checkpoint of step 30 is not whole: " in told[0]
    assert steps(saved) == [20]
    assert (saved.parent / "damaged_checkpoints" / "30").is_dir()


def test_what_was_set_aside_can_be_saved_again(saved, states):
    truncate(saved / "30")
    restore(saved, states[0])
    checkpoints = Checkpoints(saved, keep=2)
    checkpoints.save(30, states[30], wall_seconds=0.0)
    checkpoints.close()
    assert steps(saved) == [20, 30]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_damage_to_any_file_is_named(saved, states, how, tmp_path):
    """Each file of a checkpoint in turn, the seal too: all but a missing seal are noticed."""
    files = [path.relative_to(saved / "30") for path in (saved / "30").rglob("*") if path.is_file()]
    assert len(files) > 10
    for number, name in enumerate(files):
        run = shutil.copytree(saved, tmp_path / str(number) / "checkpoints")
        path = run / "30" / name
        data = path.read_bytes()
        path.unlink()
        if how == "truncated" and data:
            path.write_bytes(data[: len(data) // 2])
        elif how == "flipped" and data:
            path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        restored, told = restore(run, states[0])
        assert restored is not None
        if name.name == "files.json" and how == "missing":
            assert (restored.step, told) == (30, [])
            continue
        assert restored.step == 20, name
        assert name.name in told[0]
        chex.assert_trees_all_equal(restored.state, states[20])
        assert (run.parent / "damaged_checkpoints" / "30").is_dir()


def test_a_folder_that_is_no_checkpoint_is_set_aside_or_left(saved, states):
    (saved / "40").mkdir()
    (saved / "notes").mkdir()
    restored, told = restore(saved, states[0])
    assert restored is not None
    assert restored.step == 30
    assert [
        sentence for sentence in told if "step 40 is not whole: it has no files.json" in sentence
    ]
    assert sorted(path.name for path in saved.iterdir()) == ["20", "30", "notes"]
    chex.assert_trees_all_equal(restored.state, states[30])


@late
@pytest.mark.parametrize("limit", [0, 2_000])
def test_a_disk_without_room(saved, states, limit):
    """By the kernel: no file of this process may grow beyond the limit while it saves."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with (
            pytest.raises(TrainingError, match="the checkpoint of step 40 could not be written: "),
            Checkpoints(saved, keep=2) as checkpoints,
        ):
            checkpoints.save(40, states[10], wall_seconds=0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    restored, told = restore(saved, states[0])
    assert restored is not None
    assert (restored.step, told) == (30, [])
    chex.assert_trees_all_equal(restored.state, states[30])
    with Checkpoints(saved, keep=2) as checkpoints:  # room was made
        checkpoints.save(40, states[10], wall_seconds=0.0)
    assert 40 in steps(saved)


def test_a_reader_leaves_a_damaged_checkpoint_alone(saved, states):
    truncate(saved / "30")
    restored, told = restore(saved, states[0], read_only=True)
    assert restored is not None
    assert restored.step == 20
    assert len(told) == 1
    assert steps(saved) == [20, 30]


def test_nothing_but_damaged_checkpoints_is_an_error(saved, states):
    for step in (20, 30):
        truncate(saved / str(step))
    for _ in range(2):  # at a second start too, since all is left in place
        with pytest.raises(TrainingError, match=r"no checkpoint in .* is whole .*30.*20"):
            restore(saved, states[0])
        assert steps(saved) == [20, 30]


def test_a_checkpoint_whose_process_was_killed_before_the_seal_is_whole(saved, states):
    (saved / "30" / "files.json").unlink()
    restored, told = restore(saved, states[0])
    assert restored is not None
    assert (restored.step, told) == (30, [])
    chex.assert_trees_all_equal(restored.state, states[30])


def test_a_save_that_was_killed_is_no_checkpoint(saved, states):
    """A process killed while it saves leaves a folder under orbax's temporary name.

    Orbax removes it in the background and has done so when the next save returns.
    """
    shutil.copytree(saved / "30", saved / "40.orbax-checkpoint-tmp")
    told = []
    checkpoints = Checkpoints(saved, keep=2)
    restored = checkpoints.restore_newest(states[0], told.append)
    assert restored is not None
    assert (restored.step, told) == (30, [])
    checkpoints.save(40, states[10], wall_seconds=0.0)
    checkpoints.close()
    assert steps(saved) == [30, 40]
    restored, told = restore(saved, states[0])
    assert restored is not None
    assert (restored.step, told) == (40, [])
    chex.assert_trees_all_equal(restored.state, states[10])
