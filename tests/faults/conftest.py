"""Runs of several processes on this machine, for the tests that need some."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import train

ROOT = Path(train.__file__).parent


@pytest.fixture
def start(tmp_path, request):
    """`start(processes, devices, *flags)`: the processes of a run, each with as many devices.

    Its config is the CONFIG of the module that the test is in.
    """
    (tmp_path / "tiny.py").write_text(request.module.CONFIG)
    started = []

    def run(processes, devices, *flags, workdir="run"):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_NUM_CPU_DEVICES": str(devices),
            "NPROC": str(2 * devices),  # threads of XLA's, as tests/conftest.py says
        }
        if request.node.get_closest_marker("optimised") is None:
            environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
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
