"""train.py from end to end, as processes that are stopped, killed and started again."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import train
from revjax.training.interrupt import Stopped, StopSignals
from revjax.training.metrics import read_rows
from revjax.training.workdir import lock_workdir

ROOT = Path(train.__file__).parent
STEPS = 300

# Small enough to compile in seconds, with a transition and a reversible chain. The grid of 2^-20 is
# exact up to 16, which the stream passes: the run must say so, once. Some examples are held out,
# and depth is stochastic, so that whatever is asked of a run is asked of these, too.
CONFIG = f"""
from configs import digits_revnet

def get_config():
    config = digits_revnet.get_config()
    config.data.validation = 237
    config.model.units = (1, 2)
    config.model.filters = (8, 8, 16)
    config.model.grid_bits = 20
    config.model.stochastic_depth = dict(p_last=0.8)
    config.optim.boundaries = (200,)
    config.steps = {STEPS}
    config.log_every = 20
    config.eval_every = 100
    config.checkpoint_every = 50
    return config
"""


# train.py, with our own warnings as errors.
PROGRAM = """
import sys, warnings
warnings.filterwarnings("error", module="revjax|train|configs")
import train
sys.exit(train.run(sys.argv))
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command line of a run, and the environment in which its programs are compiled once."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "tiny.py").write_text(CONFIG)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def start(workdir: Path, *arguments: str) -> subprocess.Popen:
        line = [sys.executable, "-c", PROGRAM, f"--config={folder}/tiny.py"]
        return subprocess.Popen(
            [*line, f"--workdir={workdir}", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    start.config = folder / "tiny.py"
    return start


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in err, err
    return process.returncode, out, err


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """The workdir of an undisturbed run, what it printed, and what it said."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    code, out, err = finish(command(workdir))
    assert code == 0, err
    return workdir, out, err


def final_state(workdir: Path) -> dict:
    """The arrays of the last checkpoint, read by orbax alone."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((workdir / "checkpoints" / str(STEPS) / "state").absolute())


def assert_same_run(workdir: Path, other: Path) -> None:
    """Equal to the last bit in the parameters and all else of the state, and in the metrics."""
    states = final_state(workdir), final_state(other)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for ours, theirs in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))

    def timeless(rows):
        return [
            {key: value for key, value in row.items() if key != "images_per_second"} for row in rows
        ]

    assert timeless(read_rows(workdir)) == timeless(read_rows(other))


def test_learns(finished):
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert summary["test_accuracy"] > 0.7  # chance is 0.1
    assert summary["test_error"] == pytest.approx(1 - summary["test_accuracy"])


def test_metrics_have_what_is_promised(finished):
    rows = read_rows(finished[0])
    train_rows = [row for row in rows if row["split"] == "train"]
    evaluations = [(row["step"], row["split"]) for row in rows if row["split"] != "train"]
    assert [row["step"] for row in train_rows] == list(range(20, STEPS + 1, 20))
    both = ("validation", "test")
    assert evaluations == [(step, split) for step in (100, 200, 300) for split in both]
    fields = {"step", "split", "loss", "accuracy", "learning_rate", "images_per_second"}
    for row in rows:
        assert set(row) == fields | ({"stream_peak"} if row["split"] == "train" else set())
        assert row["images_per_second"] > 0
        assert 0 <= row["accuracy"] <= 1
        assert row["learning_rate"] == np.float32(0.1 if row["step"] <= 200 else 0.01)
    assert train_rows[-1]["loss"] < 0.2 * train_rows[0]["loss"]


def test_the_best_validation_is_reported(finished):
    workdir, out, _ = finished
    rows = {(row["step"], row["split"]): row["accuracy"] for row in read_rows(workdir)}
    best = json.loads((workdir / "summary.json").read_text())["best_validation"]
    step = best["step"]
    highest = max(accuracy for (_, split), accuracy in rows.items() if split == "validation")
    assert best["validation_accuracy"] == rows[step, "validation"] == highest
    assert best["test_accuracy"] == rows[step, "test"]
    assert f"at step {step:,}, where the test error is {best['test_error']:.2%}\n" in out


def test_workdir_has_what_is_promised(finished):
    workdir, out, err = finished
    names = {path.name for path in workdir.iterdir()} - {".lock"}
    assert names == {
        "checkpoints",
        "config.json",
        "curves.png",
        "metrics.jsonl",
        "summary.json",
        "tensorboard",
        "terms.json",
    }
    assert json.loads((workdir / "config.json").read_text())["model"]["units"] == [1, 2]
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [200, 250, 300]
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((workdir / "summary.json").read_text())
    peaks = [row["stream_peak"] for row in read_rows(workdir) if row["split"] == "train"]
    assert summary["stream_peak"] == max(peaks)
    assert summary["stream_bound"] == 16
    assert summary["steps"] == STEPS
    assert summary["model"] == "revnet"
    assert summary["wall_seconds"] > 0
    assert {"python", "revjax", "jax", "flax", "optax"} <= set(summary["versions"])
    kernels = final_state(workdir)["params"]
    assert summary["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(kernels))
    assert f"{summary['test_accuracy']:.2%}" in out
    assert "\r" not in err  # no bar where there is no terminal
    assert [line for line in err.splitlines() if "test loss" in line]


def test_a_stream_past_its_bound_is_told_once(finished):
    workdir, _, err = finished
    said = [line for line in err.splitlines() if "config.model.grid_bits" in line]
    assert len(said) == 1
    told = re.match(r"at step (\d+) the stream has reached ([0-9.]+), past 16,", said[0])
    assert told
    reached = {
        row["step"]: row["stream_peak"] for row in read_rows(workdir) if row["split"] == "train"
    }
    assert any(peak > 16 for step, peak in reached.items() if step < int(told[1]) + 20)
    assert all(peak <= 16 for step, peak in reached.items() if step < int(told[1]))


def test_a_finished_run_says_so_without_work(finished, command, monkeypatch, capsys):
    workdir, out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.glob("[cmst]*")}
    for work in ("open_feed", "draw", "make_train_steps", "Checkpoints", "MetricsLog"):
        monkeypatch.setattr(train, work, None)
    assert train.run(["train.py", f"--config={command.config}", f"--workdir={workdir}"]) == 0
    again = capsys.readouterr().out
    assert again.startswith(f"The run in {workdir} is complete.\n")
    assert again.splitlines()[1:] == out.splitlines()[1:]
    after = {path: path.stat().st_mtime_ns for path in workdir.glob("[cmst]*")}
    assert {path.name for path in before if before[path] != after[path]} <= {"config.json"}


def test_another_config_is_refused(finished, command, capsys):
    workdir = finished[0]
    arguments = [f"--config={command.config}", f"--workdir={workdir}"]
    changes = ["--config.seed=7", "--config.optim.momentum=0.5"]
    before = (workdir / "config.json").read_text()
    assert train.run(["train.py", *arguments, *changes]) == 2
    err = capsys.readouterr().err
    assert "config.optim.momentum is 0.5, there 0.9; config.seed is 7, there 0" in err
    assert err.count("\n") == 1
    assert (workdir / "config.json").read_text() == before


def test_eval_only(finished, command, capsys):
    workdir = finished[0]
    before = sorted(workdir.rglob("*"))
    arguments = ["train.py", f"--config={command.config}", f"--workdir={workdir}", "--eval_only"]
    assert train.run(arguments) == 0
    pattern = "".join(
        rf"step 300: {split} loss ([0-9.]+), accuracy ([0-9.]+)%\n"
        for split in ("validation", "test")
    )
    shown = re.fullmatch(pattern, capsys.readouterr().out)
    assert shown
    of_last = [row for row in read_rows(workdir) if row["step"] == 300][-2:]
    due = [value for row in of_last for value in (row["loss"], 100 * row["accuracy"])]
    np.testing.assert_allclose(list(map(float, shown.groups())), due, atol=0.01)
    assert train.run([*arguments, "--config.precise_bn_batches=2"]) == 0  # by other statistics
    assert shown[0] != capsys.readouterr().out
    assert sorted(workdir.rglob("*")) == before


def test_eval_only_without_a_checkpoint(command, tmp_path, capsys):
    arguments = [f"--config={command.config}", f"--workdir={tmp_path}/none", "--eval_only"]
    assert train.run(["train.py", *arguments]) == 1
    assert "none has no checkpoint to evaluate; train there first." in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_tensorflow_is_not_imported(finished):
    """In this process train.py and all that it calls has been imported and has run."""
    assert not [name for name in sys.modules if name.split(".")[0] == "tensorflow"]


def wait_for_row(process: subprocess.Popen, workdir: Path, step: int) -> None:
    """Return when the run has logged `step`."""
    deadline = time.monotonic() + 240
    while not any(row["step"] >= step for row in read_rows(workdir)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def newest(workdir: Path) -> int:
    return max(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_a_run_in_pieces_is_the_same_run(finished, command, tmp_path):
    """Ended at a smaller number of steps, then stopped by SIGTERM, then run to the end."""
    workdir = tmp_path / "run"
    code, out, err = finish(command(workdir, "--config.steps=100"))
    assert code == 0, err
    assert json.loads((workdir / "summary.json").read_text())["steps"] == 100
    # As if it had ended between the rows of its evaluation: one is there, and one is to come.
    *lines, last = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line)["split"] for line in (lines[-1], last)] == ["validation", "test"]
    (workdir / "metrics.jsonl").write_text("".join(lines))
    process = command(workdir)
    wait_for_row(process, workdir, 120)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 0, err
    assert time.monotonic() - asked < 30
    stopped = re.search(r"Stopped by SIGTERM at step (\d+) of 300: saved in (.*)\.\n", out)
    assert stopped, out
    assert int(stopped[1]) == newest(workdir)
    assert 120 <= newest(workdir) < STEPS
    assert stopped[2] == str(workdir / "checkpoints")
    assert "going on from step 100 of 300" in err

    with open(workdir / "metrics.jsonl", "a") as file:  # what a killed process may leave
        file.write(json.dumps({"step": 299, "split": "train", "loss": 1.0}) + '\n{"step": 30')
    code, out, err = finish(command(workdir))
    assert code == 0, err
    assert_same_run(workdir, finished[0])
    ours, theirs = (
        json.loads((run / "summary.json").read_text()) for run in (workdir, finished[0])
    )
    assert ours["best_validation"] == theirs["best_validation"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_killed_run_is_the_same_run(finished, command, tmp_path, seed):
    """SIGKILL at random moments, among them those of a save."""
    rng, workdir = np.random.default_rng(seed), tmp_path / "run"
    for step in (60, 160, 260):
        process = command(workdir)
        wait_for_row(process, workdir, step)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
    code, _, err = finish(command(workdir))
    assert code == 0, err
    assert_same_run(workdir, finished[0])


def test_a_second_signal_ends_at_once():
    code = "import time; from revjax.training.interrupt import StopSignals\n"
    code += "with StopSignals():\n print('ready', flush=True)\n while True: time.sleep(0.01)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):  # the first one only asks
        process.communicate(timeout=1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_signal_in_work_that_tidies_up():
    """It raises in the work; and where a callback swallows that, at the work's end."""
    with StopSignals() as stop:
        with pytest.raises(Stopped), stop.raising():
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the signal did not raise")
        assert stop.requested == "SIGINT"
    with StopSignals() as stop:
        ended = False
        with pytest.raises(Stopped), stop.raising():
            with contextlib.suppress(Stopped):
                signal.raise_signal(signal.SIGTERM)
            ended = True
        assert ended


def test_waiting_ends_with_the_first_failure():
    def fail():
        raise ValueError("at once")

    with pytest.raises(ValueError, match="at once"):
        StopSignals().wait_for(lambda: time.sleep(60), fail)
    assert StopSignals().wait_for(lambda: time.sleep(0.2), lambda: 2) == [None, 2]


def test_a_signal_before_the_first_step(command, tmp_path):
    process = command(tmp_path / "run", "--config.optim.momentum=0.8")  # nothing compiled of it
    assert process.stderr is not None
    assert "compiling" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    code, out, _ = finish(process)
    assert code == 0
    assert out == "Stopped by SIGINT: there was nothing to save.\n"
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_loss_that_is_not_finite_stops_the_run(command, tmp_path, capsys, monkeypatch):
    """A ResNet, whose learning rate grows without bound at step 25."""
    workdir = tmp_path / "run"
    config = tmp_path / "diverging.py"
    config.write_text(
        CONFIG.replace("(200,)", "(25,)").replace(
            "    return",
            "    config.optim.decay_factor = 1e30\n"
            "    del config.model.grid_bits\n"
            "    config.model.name, config.model.backward = 'resnet', 'store'\n"
            "    config.model.units, config.model.filters = (1,), (8, 8)\n"
            "    config.checkpoint_every = 10\n    return",
        )
    )
    arguments = ["train.py", f"--config={config}", f"--workdir={workdir}"]
    assert train.run(arguments) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    named = re.search(r"the loss, gradient or update is not finite at step (\d+);", err)
    assert named, err
    assert 26 <= int(named[1]) <= 30
    assert "what was saved up to step 20 is kept" in err
    assert "config.optim.learning_rate" in err
    assert newest(workdir) == 20
    assert {row["step"] for row in read_rows(workdir)} == {20}
    assert not (workdir / "summary.json").exists()

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    # From step 20 to the same end, past a checkpoint that is not written: both are told.
    monkeypatch.setattr("revjax.training.checkpoints.write_json", fail)
    assert train.run([*arguments, "--config.checkpoint_every=21"]) == 1
    again = capsys.readouterr().err.splitlines()
    assert "going on from step 20" in again[0]
    assert again[-2] == err.replace("up to step 20", "up to step 21")
    assert "checkpoint of step 21 could not be written: no space left on device;" in again[-1]


def test_two_runs_do_not_share_a_workdir(command, finished, capsys):
    with lock_workdir(finished[0]):
        arguments = [f"--config={command.config}", f"--workdir={finished[0]}"]
        assert train.run(["train.py", *arguments]) == 1
    assert f"is in use by another run (process {os.getpid()})" in capsys.readouterr().err
