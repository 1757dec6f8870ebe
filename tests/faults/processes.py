"""What the processes of a run have left, when they have ended or while they go on."""

import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from revjax.training.metrics import read_rows

SOON = 300  # what takes seconds may take so many on a machine that is busy
AT_LAST = 1800  # and what takes a minute or two


def finish(processes):
    """The exit code, stdout and stderr of each."""
    ended = []
    for process in processes:
        out, err = process.communicate(timeout=AT_LAST)
        ended.append((process.returncode, out, err))
    return ended


def run_all(start, processes, devices, *flags, workdir="run"):
    """Start a run and wait for its end, which is a good one; what each said on stderr."""
    ended = finish(start(processes, devices, *flags, workdir=workdir))
    assert [code for code, *_ in ended] == [0] * processes, ended
    assert ["Done: " in out for _, out, _ in ended] == [True, False][:processes]
    return [err for *_, err in ended]


def state_of(workdir, step):
    """The arrays of a checkpoint by their names, read by orbax alone."""
    with ocp.StandardCheckpointer() as checkpointer:
        state: Any = checkpointer.restore(
            (workdir / "checkpoints" / str(step) / "state").absolute()
        )
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def differing(workdir, other, step):
    """The names of the arrays whose bits are not the same in two runs' checkpoints."""
    ours, theirs = state_of(workdir, step), state_of(other, step)
    assert ours.keys() == theirs.keys()
    return [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]


def losses(workdir):
    """Those of the training steps."""
    return [row["loss"] for row in read_rows(workdir) if row["split"] == "train"]


def wait_for_checkpoint(processes, workdir):
    """Return when that of step 3 is there, and whole."""
    deadline = time.monotonic() + AT_LAST
    while not (workdir / "checkpoints" / "3" / "files.json").exists():
        assert all(process.poll() is None for process in processes), finish(processes)
        assert time.monotonic() < deadline
        time.sleep(0.1)
