"""Runs of two processes on this machine: what they compute, how they stop, and how they die."""

import re
import signal
import time

import pytest
from processes import differing, finish, losses, run_all, wait_for_checkpoint

pytestmark = pytest.mark.slow
LAYOUTS = ((1, 1), (1, 8), (2, 4))  # processes, and devices of each
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


@pytest.mark.parametrize("fsdp", [1, 8])
def test_losses_do_not_depend_on_the_layout(start, tmp_path, fsdp):
    """1 device, 8 devices, 2 processes of 4; and of three steps saved by two, one goes on."""
    for processes, devices in LAYOUTS:
        flags = [f"--config.mesh.fsdp={fsdp}"] if processes * devices > 1 else []
        run_all(start, processes, devices, *flags, workdir=f"{processes}x{devices}")
    due = losses(tmp_path / "1x1")
    assert len(due) == 6
    assert losses(tmp_path / "1x8") == pytest.approx(due, rel=1e-4)
    assert losses(tmp_path / "2x4") == pytest.approx(due, rel=1e-4)

    run_all(start, 2, 4, f"--config.mesh.fsdp={fsdp}", "--config.steps=3")
    assert "going on from step 3 of 6" in run_all(start, 1, 1)[0]
    assert losses(tmp_path / "run") == pytest.approx(due, rel=1e-4)


@pytest.mark.parametrize(("processes", "devices"), LAYOUTS)
def test_the_reconstruction_is_exact(start, tmp_path, processes, devices):
    """Six steps end in the very bits of those that keep every block's input and rebuild none."""
    for backward in ("reversible", "remat"):
        flag = f"--config.model.backward={backward}"
        run_all(start, processes, devices, flag, workdir=backward)
    assert differing(tmp_path / "reversible", tmp_path / "remat", 6) == []


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
