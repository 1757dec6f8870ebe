"""The benchmarks run, in their smallest form, and leave the recorded figures alone."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import pod
import pytest
import throughput
from collectives import Array, Collective

import revjax
from revjax.data import DataError
from revjax.training.errors import TrainingError
from revjax.training.mesh import split_over_fsdp

ROOT = Path(revjax.__file__).parent.parent


def run(*command):
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, expected",
    [
        ("speed.py --smoke --results {tmp}", "| reversible, grid 2^-14 |"),
        ("gpu.py --smoke", "| reversible, 2 seeds by vmap |"),
        ("throughput.py --smoke --json {tmp}/a.json", "| bare step, a call each |"),
        ("grid_bits.py untrained --smoke", "| (3, 3, 3) |"),
        ("memory_against_depth.py --depths 2 --png {tmp}/a.png --json {tmp}/a.json", "a list"),
        ("variants.py digits --only original --steps 1 --workdir {tmp}/runs", "| original | "),
        ("stochastic_depth.py --smoke", "| resnet1202, stochastic depth |"),
        (
            "drift_in_training.py digits --steps 2 --workdir {tmp}/runs "
            "--png {tmp}/a.png --json {tmp}/a.json",
            "no grid, bfloat16",
        ),
        ("drift.py --depths 2 --seeds 1 --png {tmp}/a.png --json {tmp}/a.json", "| 2 blocks |"),
    ],
)
def test_smoke(command, expected, tmp_path):
    results = {path: path.read_bytes() for path in (ROOT / "benchmarks/results").iterdir()}
    script, *flags = command.format(tmp=tmp_path).split()
    done = run(ROOT / "benchmarks" / script, *flags)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert {path: path.read_bytes() for path in (ROOT / "benchmarks/results").iterdir()} == results


@pytest.mark.slow
def test_backward_ways_of_a_trained_network(tmp_path):
    flags = "--config", "configs/digits_revnet.py", "--workdir", tmp_path / "run"
    trained = run("train.py", *flags, "--config.steps=2")
    assert trained.returncode == 0, trained.stderr
    command = "benchmarks/backward_ways.py", "--batch", 20, "--json", tmp_path / "ways.json"
    done = run(*command, *flags, "--config.steps=2")
    assert done.returncode == 0, done.stderr
    for row in json.loads((tmp_path / "ways.json").read_text())["rows"]:
        if row["grid_bits"] is not None:
            assert row["gradient"]["reversible against remat"] == 0


@pytest.mark.parametrize("error", [DataError, TrainingError])
def test_throughput_fails_with_a_sentence(error, monkeypatch):
    def fail(*_: object) -> None:
        raise error("the run went wrong.")

    monkeypatch.setattr(throughput, "measure", fail)
    monkeypatch.setattr(sys, "argv", ["throughput.py"])
    with pytest.raises(SystemExit, match=r"^throughput\.py: the run went wrong\.$"):
        throughput.main()


def test_what_a_pod_moves():
    """Each split parameter once, the gradient of each kernel once, and no activation."""
    config = pod.config_of("revnet104", "reversible", 44, 2)
    small = dict(name="revnet", units=(3,), filters=(16, 32), bottleneck=False)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, image_size=16),
        model=dataclasses.replace(config.model, **small),
    )
    chips = tuple(jax.devices())
    row = pod.row_of(config, chips)

    mesh = pod.make_mesh(config, chips)
    params = pod.abstract_program(config, mesh)[1].params
    kernels = split = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        kernels += leaf.size * ("kernel" in jax.tree_util.keystr(path))
        split += leaf.size * (not split_over_fsdp(mesh, leaf).is_fully_replicated)
    moved = {group: figures["bytes"] // 4 for group, figures in row["moved"].items()}  # float32
    assert moved[f"{pod.PARAMETERS} (all-gather, f32)"] == split
    assert moved[f"{pod.KERNELS} (all-reduce, f32)"] == 2 * kernels
    assert {group.split(" (")[0] for group in moved} == {
        pod.PARAMETERS,
        pod.KERNELS,
        pod.CHANNELS,
        pod.NUMBERS,
    }
    assert row["collectives"].keys() == {"all-gather", "all-reduce"}
    activation = Collective("all-gather", (Array("bf16", (44, 16, 16, 16)),), 3)
    found = pod.moved([activation], pod.abstract_program(config, mesh)[1], mesh)
    assert found == {f"{pod.OTHERS} (all-gather, bf16)": {"arrays": 3, "bytes": 1_081_344}}
    table = pod.tables({"net, a pod: remat": row, "net, a pod: store": {**row, "moved": found}})
    assert "| net, a pod | store | remat |" in table
    assert f"| {pod.OTHERS} (all-gather, bf16): MB a chip sends | 1.081 |  |" in table


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_accelerators_name_the_package_that_is_missing():
    done = run("benchmarks/accelerators.py", "v5e")
    assert done.returncode == 1
    assert done.stderr.startswith("accelerators.py: to compile for v5e:2x2, install the compiler")
