"""Runs of two processes on this machine: what they compute, how they stop, and how they die."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import pytest
from processes import SOON, differing, finish, losses, run_all, wait_for_checkpoint

import train

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
    assert time.monotonic() - asked < SOON
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
    assert time.monotonic() - killed < SOON
    code, _, err = ended[1 - victim]
    assert code != 0
    assert f"train.py: process {victim} of the run has ended" in err
    assert "start all of them again" in err

    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    newest = max(int(name) for name in names if name.isdecimal())
    said = run_all(start, 2, 1, f"--config.steps={newest + 3}")
    assert f"going on from step {newest} of {newest + 3}" in said[0]


ALONE = """
import os, sys, time
from revjax.training import processes

_, port, process, what = sys.argv
processes.LEAVE_SECONDS = 3
processes.join_processes(f"127.0.0.1:{port}", 2, int(process))

class Slow:
    def __init__(self, connection):
        self.connection = connection

    def recv(self, number):
        said = self.connection.recv(number)
        time.sleep(2)
        return said

def listen_slowly(self, connection, process, listen=processes.Companions._listen):
    listen(self, Slow(connection), process)

if what == "die":
    processes.Companions._listen = listen_slowly
with processes.Companions():
    processes.from_first("both are there")
    if what == process:
        time.sleep(9)
    if what == "die":
        if process == "1":
            time.sleep(1)
            os._exit(9)
        processes.from_first("one is not")
"""


def two(tmp_path, what):
    """Two processes that do so little; the exit code, stdout and stderr of each."""
    (tmp_path / "alone.py").write_text(ALONE)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = [sys.executable, str(tmp_path / "alone.py"), str(port)]
    environment = os.environ | {"PYTHONPATH": os.path.dirname(train.__file__)}
    pipes: Any = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    return finish([subprocess.Popen([*line, str(process), what], **pipes) for process in (0, 1)])


@pytest.mark.parametrize("longer", ["0", "1"])
def test_a_process_may_take_longer_to_end(tmp_path, longer):
    """As process 0 does with a last checkpoint; JAX alone would abort both."""
    ended = two(tmp_path, longer)
    assert [code for code, *_ in ended] == [0, 0], ended


def test_a_death_is_told_where_it_is_felt_before_it_is_heard_of(tmp_path):
    (code, _, err), _ = two(tmp_path, "die")
    assert code == 1
    assert "train.py: process 1 of the run has ended" in err
