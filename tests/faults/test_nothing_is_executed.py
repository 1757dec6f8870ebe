"""Checkpoints and data are read, never executed; archives do not leave their folder."""

import ast
import io
import pickle
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import train
from revjax.data import DataError, load_dataset
from revjax.data.fetch import official_files
from revjax.data.official import OFFICIAL
from revjax.training.checkpoints import Checkpoints
from revjax.training.errors import TrainingError
from revjax.training.optimizer import OptimConfig, make_optimizer
from revjax.training.state import Interval, TrainState

ROOT = Path(train.__file__).parent
SOURCES = [ROOT / "train.py", *sorted((ROOT / "revjax").rglob("*.py"))]

# What executes what it reads, or writes where an archive says. A config file is Python: that
# exec_module, of the file that the command line names, is the one there is.
MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve", "torch"}
FUNCTIONS = {"eval", "exec"}
METHODS = {"exec_module", "extract", "extractall", "unpack_archive"}


def executing(source: str) -> set[str]:
    """The names in a source that execute or unpack what they are given."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").split(".")[0]} & MODULES
        elif isinstance(node, ast.Call):
            found |= {getattr(node.func, "id", "")} & (FUNCTIONS | METHODS)
            found |= {getattr(node.func, "attr", "")} & METHODS
            if any(keyword.arg == "allow_pickle" for keyword in node.keywords):
                found.add("allow_pickle")
    return found


def test_no_source_executes_what_it_reads():
    found = {path.name: executing(path.read_text()) for path in SOURCES}
    assert {name: names for name, names in found.items() if names} == {
        "command_line.py": {"exec_module"}
    }


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from dill import load", "np.load(f, allow_pickle=True)", "tar.extractall()"],
)
def test_such_a_source_would_be_found(source):
    assert executing(source)


class Bomb:
    """Unpickled, it fails the test."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


@pytest.fixture
def unpickling_fails(monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_pickle_in_a_checkpoint_is_not_executed(tmp_path, unpickling_fails):
    """Put in place of each of its files, seal or no seal, and beside them."""
    optimizer = make_optimizer(OptimConfig(0.1, (), 0.1, 0.9, 2e-4))
    params = nnx.State({"kernel": nnx.Param(jnp.ones((3, 3)))})
    zero = jnp.int32(0)
    interval = Interval(zero, jnp.float32(0), zero, jnp.float32(0))
    state = TrainState(
        zero, params, nnx.State({}), optimizer.init(params), interval, jnp.float32(0), zero, zero
    )
    bomb = pickle.dumps(Bomb())
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(10, state, wall_seconds=0.0)
    (tmp_path / "checkpoints" / "10" / "model.pkl").write_bytes(bomb)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        restored = checkpoints.restore_newest(state, print)
    assert restored is not None
    jax.tree.map(np.testing.assert_array_equal, restored.state, state)
    (tmp_path / "checkpoints" / "10" / "files.json").unlink()
    files = [path for path in (tmp_path / "checkpoints" / "10").rglob("*") if path.is_file()]
    for path in files:
        path.write_bytes(bomb)
    with (
        pytest.raises(TrainingError, match=r"no checkpoint in .* is whole"),
        Checkpoints(tmp_path / "checkpoints") as checkpoints,
    ):
        checkpoints.restore_newest(state, print)
    assert all(path.exists() for path in files)


def test_digits_are_not_unpickled(unpickling_fails):
    assert load_dataset("digits").train_images.shape == (1437, 8, 8, 1)


def test_an_archive_does_not_leave_its_folder(tmp_path):
    """Names that lead outside, links and devices: nothing is written, and nothing is followed."""
    folder, archive = OFFICIAL["cifar10"].folder, tmp_path / "in" / "bad.tar.gz"
    archive.parent.mkdir()
    secret = tmp_path / "secret"
    secret.write_text("outside")
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("../evil", str(tmp_path / "evil"), f"{folder}/../../evil"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"evil"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"{folder}/test_batch.bin")
            member.type, member.linkname = kind, str(secret)
            tar.addfile(member)
    before = sorted(tmp_path.rglob("*"))
    with (
        pytest.raises(DataError, match=r"which lacks data_batch_1\.bin, .*test_batch\.bin"),
        official_files("cifar10", str(archive), scratch=str(tmp_path)),
    ):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_the_readme_says_that_a_config_file_is_executed():
    assert "A config file is Python, and `--config` executes it" in (ROOT / "README.md").read_text()
