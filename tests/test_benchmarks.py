"""The benchmarks run, in their smallest form, and leave the recorded figures alone."""

import subprocess
import sys
from pathlib import Path

import pytest

import revjax

ROOT = Path(revjax.__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, expected",
    [
        ("speed.py --smoke --results {tmp}", "| reversible, grid 2^-14 |"),
        ("grid_bits.py untrained --smoke", "| (3, 3, 3) |"),
        ("memory_against_depth.py --depths 2 --png {tmp}/a.png --json {tmp}/a.json", "a list"),
        ("drift.py --depths 2 --seeds 1 --png {tmp}/a.png --json {tmp}/a.json", "| 2 blocks |"),
    ],
)
def test_smoke(command, expected, tmp_path):
    results = {path: path.read_bytes() for path in (ROOT / "benchmarks/results").iterdir()}
    script, *flags = command.format(tmp=tmp_path).split()
    run = [sys.executable, str(ROOT / "benchmarks" / script), *flags]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert {path: path.read_bytes() for path in (ROOT / "benchmarks/results").iterdir()} == results
