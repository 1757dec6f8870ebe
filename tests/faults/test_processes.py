"""Runs of two processes on this machine: what they compute, how they stop, and how they die."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import train
from revjax.training.metrics import read_rows

pytestmark = pytest.mark.slow
ROOT = Path(train.__file__).parent
CONFIG = """
from configs import digits_revnet

def get_config():
    config = digits_revnet.get_config()
    config.model.units = (2, 2)
    config.model.filters = (8, 8, 16)
    config.optim.learning_rate = 0.01  # what float32 rounds differently stays small
    config.steps = 6
    config.batch_size = 80
    config.log_every = 1
    config.eval_every = 6
    config.checkpoint_every = 3
    return config
"""


@pytest.fixture
def start(tmp_path):
    """`start(processes, devices, *flags)`: the processes of a run, each with as many devices."""
    (tmp_path / "tiny.py").write_text(CONFIG)
    started = []

    def run(processes, devices, *flags, workdir="run"):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_NUM_CPU_DEVICES": str(devices),
            "NPROC": str(2 * devices),  # threads of XLA's, as tests/conftest.py says
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        }
        line = [sys.executable, str(ROOT / "train.py"), f"--config={tmp_path}/tiny.py", *flags]
        for process in range(processes):
            own = [f"--workdir={tmp_path / workdir if process == 0 else '/nowhere'}"]
            if processes > 1:
                own += [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}"]
                own += [f"--process={process}"]
            pipes: Any = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            started.append(subprocess.Popen([*line, *own], env=environment, **pipes))
        return started[-processes:]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def finish(processes, seconds=300):
    """The exit code, stdout and stderr of each."""
    ended = []
    for process in processes:
        out, err = process.communicate(timeout=seconds)
        ended.append((process.returncode, out, err))
    return ended


def losses(workdir):
    return [row["loss"] for row in read_rows(workdir) if row["split"] == "train"]


def run_all(start, processes, devices, *flags, workdir="run"):
    """Start a run and wait for its end, which is a good one; what process 0 said on stderr."""
    ended = finish(start(processes, devices, *flags, workdir=workdir))
    assert [code for code, *_ in ended] == [0] * processes, ended
    return ended[0][2]


def final_state(workdir, step=6):
    """The arrays of a checkpoint by their names, read by orbax alone."""
    with ocp.StandardCheckpointer() as checkpointer:
        state: Any = checkpointer.restore(workdir / "checkpoints" / str(step) / "state")
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


LAYOUTS = ((1, 1), (1, 8), (2, 4))  # processes, and devices of each


@pytest.mark.parametrize("fsdp", [1, 8])
def test_losses_do_not_depend_on_the_layout(start, tmp_path, fsdp):
    """1 device, 8 devices, 2 processes of 4; and of three steps saved by two, one goes on."""
    for processes, devices in LAYOUTS:
        flags = [f"--config.mesh.fsdp={fsdp}"] if processes * devices > 1 else []
        ended = finish(start(processes, devices, *flags, workdir=f"{processes}x{devices}"))
        assert [code for code, *_ in ended] == [0] * processes, ended
        assert ["Done: " in out for _, out, _ in ended] == [True, False][:processes]
    due = losses(tmp_path / "1x1")
    assert len(due) == 6
    assert losses(tmp_path / "1x8") == pytest.approx(due, rel=1e-4)
    assert losses(tmp_path / "2x4") == pytest.approx(due, rel=1e-4)

    run_all(start, 2, 4, f"--config.mesh.fsdp={fsdp}", "--config.steps=3")
    assert "going on from step 3 of 6" in run_all(start, 1, 1)
    assert losses(tmp_path / "run") == pytest.approx(due, rel=1e-4)


@pytest.mark.parametrize(("processes", "devices"), LAYOUTS)
def test_the_reconstruction_is_exact(start, tmp_path, processes, devices):
    """Six steps end in the very bits of those that keep every block's input and rebuild none."""
    for backward in ("reversible", "remat"):
        flag = f"--config.model.backward={backward}"
        run_all(start, processes, devices, flag, workdir=backward)
    ours, due = (final_state(tmp_path / backward) for backward in ("reversible", "remat"))
    assert ours.keys() == due.keys()
    assert [name for name in due if ours[name].tobytes() != due[name].tobytes()] == []


def wait_for_checkpoint(processes, workdir):
    deadline = time.monotonic() + 240
    while not (workdir / "checkpoints" / "3" / "files.json").exists():
        assert all(process.poll() is None for process in processes), finish(processes)
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_stops_both(start, tmp_path, told):
    processes = start(2, 1, "--config.steps=100000")
    wait_for_checkpoint(processes, tmp_path / "run")
    asked = time.monotonic()
    processes[told].send_signal(signal.SIGTERM)
    ended = finish(processes)
    assert time.monotonic() - asked < 30
    assert [code for code, *_ in ended] == [0, 0], ended
    stopped = re.search(r"Stopped by .* at step (\d+) of 100000: saved in", ended[0][1])
    assert stopped
    assert (tmp_path / "run" / "checkpoints" / stopped[1]).is_dir()


@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_one_ends_the_other(start, tmp_path, victim):
    processes = start(2, 1, "--config.steps=100000")
    wait_for_checkpoint(processes, tmp_path / "run")
    killed = time.monotonic()
    processes[victim].kill()
    ended = finish(processes)
    assert time.monotonic() - killed < 60
    code, _, err = ended[1 - victim]
    assert code != 0
    assert f"train.py: process {victim} of the run has ended" in err
    assert "start all of them again" in err
