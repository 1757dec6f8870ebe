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

UNDONE = """
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import revjax
from revjax.training.mesh import put, replicated
from revjax.training.processes import join_processes

coordinator, number, process = sys.argv[1:]
if number != "1":
    join_processes(coordinator, int(number), int(process))
mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
split = NamedSharding(mesh, PartitionSpec("data"))
x = np.random.default_rng(0).standard_normal((2, 80, 8, 8, 8), np.float32)
x = tuple(put(np.round(half * 2**14) / 2**14 + 0.0, split) for half in x)  # on the grid, no -0.0

@jax.jit
def differing(one, other):
    one, other = (jax.lax.bitcast_convert_type(array, jnp.int32) for array in (one, other))
    return jnp.sum(one != other)

for grid_bits in (14, None):
    options = dict(units=(4,), filters=(16, 16), grid_bits=grid_bits)
    stage = revjax.create_model("revnet", 10, rngs=nnx.Rngs(0), **options).stages[0]
    graph, state = nnx.split(stage)
    state = put(state, replicated(mesh))
    y = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x)
    back = jax.jit(lambda state, y: nnx.merge(graph, state).inverse(y))(state, y)
    print(int(sum(map(differing, back, x))))
"""


def run_script(tmp_path, script, number, devices, *arguments):
    """Run a script in some processes; the exit code, stdout and stderr of each.

    Its arguments are process 0's address, how many there are and which this is, and then others.
    """
    (tmp_path / "script.py").write_text(script)
    with socket.create_server(("127.0.0.1", 0)) as free:
        line = [f"127.0.0.1:{free.getsockname()[1]}", str(number)]
    line = [sys.executable, str(tmp_path / "script.py"), *line]
    environment = os.environ | {"PYTHONPATH": os.path.dirname(train.__file__)}
    environment |= {"JAX_NUM_CPU_DEVICES": str(devices), "NPROC": str(2 * devices), "XLA_FLAGS": ""}
    pipes: Any = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    return finish(
        [subprocess.Popen([*line, str(process), *arguments], **pipes) for process in range(number)]
    )


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


@pytest.mark.parametrize("processes_and_devices", LAYOUTS)
def test_a_stage_is_undone_to_the_bit(tmp_path, processes_and_devices):
    """By an optimised program; without a grid it is not, as is to be seen there."""
    ended = run_script(tmp_path, UNDONE, *processes_and_devices)
    assert [code for code, *_ in ended] == [0] * len(ended), ended
    for _, out, _ in ended:
        on_grid, plain = map(int, out.split()[-2:])
        assert on_grid == 0
        assert plain > 1000


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

coordinator, number, process, what = sys.argv[1:]
processes.LEAVE_SECONDS = 3
processes.join_processes(coordinator, int(number), int(process))

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


@pytest.mark.parametrize("longer", ["0", "1", "2"])
def test_a_process_may_take_longer_to_end(tmp_path, longer):
    """As process 0 does with a last checkpoint; JAX alone would abort all."""
    ended = run_script(tmp_path, ALONE, 3, 1, longer)
    assert [code for code, *_ in ended] == [0, 0, 0], ended


def test_a_death_is_told_where_it_is_felt_before_it_is_heard_of(tmp_path):
    (code, _, err), _ = run_script(tmp_path, ALONE, 2, 1, "die")
    assert code == 1
    assert "train.py: process 1 of the run has ended" in err
