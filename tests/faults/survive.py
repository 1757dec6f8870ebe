"""A run killed fifty times, on full disks, and of twenty thousand steps: what was lost or grew.

    python tests/faults/survive.py                         # all, about a quarter of an hour
    python tests/faults/survive.py --only=kills --kills=5

Kills: `train.py` on digits is started again and again, and each time ended by SIGKILL at a random
moment, half of them aimed at one of its next six saves, once the temporary folder is there. It
is then run to its end, and its parameters, the rest of its state and its metrics are held, bit for
bit, against those of a run that nobody disturbed.

Disks: a run in a file system of its own (a tmpfs, which root alone can mount) that is too small.
It must end in a sentence, with exit code 1; made read-only, the folder must be refused; given room,
the run must end as if nothing had been.

Soak: a run of many steps with a checkpoint every 200. The memory of the process (its resident set)
is read twice a second, and the mean of the first quarter is held against that of the last: they may
differ by 2%, either way. It is read from a fifth of the steps on: what compiling has taken, a fifth
of the whole, is given back only after some 2,000 steps, and the first two evaluations are over by
then; and up to the last step, after which the curves are drawn. The files of the workdir are held
against what the keep rule leaves.

Figures go to benchmarks/results/faults.json; it exits with 1 where something was lost or grew.
"""

import argparse
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
from processes import state_of  # noqa: E402
from record import RESULTS, environment  # noqa: E402

from revjax.training.metrics import read_rows  # noqa: E402
from revjax.training.workdir import write_json  # noqa: E402

CONFIG = """
from configs import digits_revnet

def get_config():
    config = digits_revnet.get_config()
    config.model.units, config.model.filters = (1,), (8, 8)
    config.data.padding = 0
    config.steps = {steps}
    config.optim.boundaries = ({steps} // 2,)
    config.batch_size = {batch_size}
    config.log_every = 5
    config.eval_every = {every} * 10
    config.checkpoint_every = {every}
    config.keep_checkpoints = 3
    return config
"""


HUNG = 1800  # seconds after which a run, which takes some ten, does not end any more
# Anywhere in a line, as threads of libraries print their own errors meanwhile.
SENTENCE = re.compile(r"train\.py: (?:the checkpoint|the workdir|a file) .*written.*")


class Runs:
    """Starts `train.py` of one config; its programs are compiled once."""

    def __init__(self, folder: Path, **numbers: int):
        self.config = folder / "tiny.py"
        self.config.write_text(CONFIG.format(**numbers))
        self.steps = numbers["steps"]
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def start(self, workdir: Path) -> subprocess.Popen:
        line = [sys.executable, ROOT / "train.py", f"--config={self.config}"]
        return subprocess.Popen(
            [*line, f"--workdir={workdir}"],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, workdir: Path) -> str:
        """Run to the end; what it said."""
        process = self.start(workdir)
        _, said = process.communicate()
        if process.returncode or "Traceback" in said:
            raise SystemExit(f"a run failed with exit code {process.returncode}:\n{said}")
        return said


def newest(workdir: Path) -> int:
    """The step of the newest checkpoint that has its final name, or 0."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def unfinished(workdir: Path) -> set[Path]:
    """The checkpoints that are not sealed, under their final names or orbax's temporary ones."""
    folders = (workdir / "checkpoints").glob("*")
    return {folder for folder in folders if not (folder / "files.json").exists()}


def in_a_save(left: set[Path]) -> str:
    """Where in a save a killed run was that left these: "files", "seal", or "" for in none."""
    return ("files", "seal")[all(folder.name.isdecimal() for folder in left)] if left else ""


def wait_for_save(process: subprocess.Popen, workdir: Path) -> None:
    """Return when a checkpoint is being written that was not before, or the run has ended."""
    before = set((workdir / "checkpoints").glob("*"))
    while process.poll() is None:
        if set((workdir / "checkpoints").glob("*")) - before:
            return
        time.sleep(0.0005)


def kill(runs: Runs, workdir: Path, kills: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Kill and start again; yield where each kill fell."""
    start = 0.0  # seconds until a run saves, at least
    for number in range(kills):
        resumed, before = newest(workdir), unfinished(workdir)
        process, began = runs.start(workdir), time.monotonic()
        if number % 2:
            wait_for_save(process, workdir)
            start = min(start or math.inf, time.monotonic() - began)
            for _ in range(rng.randrange(6)):
                wait_for_save(process, workdir)
            time.sleep(rng.uniform(0, 0.05))
        else:
            time.sleep(rng.uniform(0.5, start + 0.5))
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(f"a run ended before kill {number + 1}; make it longer.\n{said}")
        if "Traceback" in said or "not whole" in said:
            raise SystemExit(f"after kill {number} a start went wrong:\n{said}")
        lasted = time.monotonic() - began
        yield {
            "resumed_from": resumed,
            "newest_after": newest(workdir),
            "after_s": round(lasted, 2),
            "in_a_save": in_a_save(unfinished(workdir) - before),
        }


def differences(workdir: Path, other: Path, step: int) -> dict[str, int]:
    """How many elements of the state, and how many rows of metrics, two runs have not in common."""
    ours, theirs = state_of(workdir, step), state_of(other, step)
    if ours.keys() != theirs.keys():
        raise ValueError(f"{workdir} and {other} hold other arrays at step {step}.")
    elements = sum(differing_elements(ours[name], theirs[name]) for name in ours)

    def rows(run):
        kept = [dict(row, images_per_second=0) for row in read_rows(run)]
        return [json.dumps(row) for row in kept]

    mine, due = rows(workdir), rows(other)
    wrong = sum(a != b for a, b in zip(mine, due, strict=False)) + abs(len(mine) - len(due))
    return {"elements": elements, "rows": wrong, "of_rows": len(due)}


def differing_elements(one: np.ndarray, other: np.ndarray) -> int:
    """How many have not the same bits; all of them where shapes or dtypes differ."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return one.size
    bits = [array.reshape(-1).view(np.uint8).reshape(-1, one.itemsize) for array in (one, other)]
    return int((bits[0] != bits[1]).any(1).sum())


def measure_kills(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    runs = Runs(folder, steps=max(30 * kills, 200), batch_size=20, every=10)
    workdir, undisturbed = folder / "killed", folder / "undisturbed"
    runs.finish(undisturbed)
    found = []
    for where in kill(runs, workdir, kills, random.Random(seed)):
        found.append(where)
        print(f"kill {len(found)}: {where}", flush=True)
    runs.finish(workdir)
    lost = differences(workdir, undisturbed, runs.steps)
    saves = [where["in_a_save"] for where in found]
    return {
        "kills": kills,
        "steps": runs.steps,
        "checkpoint_every": 10,
        "in_a_save_of_files": saves.count("files"),
        "between_files_and_seal": saves.count("seal"),
        "before_anything_was_saved": sum(not where["newest_after"] for where in found),
        "starts_that_did_not_go_on": 0,  # one would have ended this program
        "differing": lost,
        "lost_nothing": not lost["elements"] and not lost["rows"],
        "each": found,
    }


def measure_full_disks(folder: Path, sizes: int, seed: int) -> dict[str, Any] | None:
    """None where no file system can be mounted."""
    disk, undisturbed = folder / "disk", folder / "with_room"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64M", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
        print("full disks: left out, as only root can mount a small one.")
        return None

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)

    runs, rng, each = Runs(folder, steps=60, batch_size=20, every=10), random.Random(seed), []
    try:
        runs.finish(undisturbed)
        files = (path.stat().st_size for path in undisturbed.rglob("*") if path.is_file())
        whole = sum(-(-size // 4096) * 4 for size in files)  # KiB, in pages: too small is below it
        for number in range(sizes):
            workdir, size = disk / str(number), rng.randrange(4, whole, 4)
            remount(f"rw,size={size}k")
            ends = [runs.start(workdir)]
            _, said = ends[0].communicate(timeout=HUNG)
            remount("ro")
            ends.append(runs.start(workdir))
            _, refused = ends[1].communicate(timeout=HUNG)
            remount("rw,size=64M")
            runs.finish(workdir)
            lost = differences(workdir, undisturbed, runs.steps)
            last = [(SENTENCE.findall(text) or ["nothing"])[-1] for text in (said, refused)]
            told = "nothing" not in last
            codes = [process.returncode for process in ends]
            each.append({"KiB": size, "exit_codes": codes, "told": told, "lost": lost})
            print(
                f"disk {number + 1}: {each[-1]}\n  {last[0][:160]}\n  {last[1][:160]}", flush=True
            )
            subprocess.run(["rm", "-rf", str(workdir)], check=True)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    good = [
        one["exit_codes"] == [1, 1]
        and one["told"]
        and not one["lost"]["elements"] + one["lost"]["rows"]
        for one in each
    ]
    return {"disks": sizes, "a_run_takes_KiB": whole, "lost_nothing": all(good), "each": each}


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure_soak(folder: Path, steps: int) -> dict[str, Any]:
    warm_up = steps // 5
    runs = Runs(folder, steps=steps, batch_size=10, every=200)
    workdir, sizes, files = folder / "soak", [], []
    process, began = runs.start(workdir), time.monotonic()
    while process.poll() is None:
        time.sleep(0.5)
        if process.poll() is None and warm_up <= newest(workdir) < steps:
            sizes.append(resident_bytes(process.pid))
            files.append(sum(path.is_dir() for path in (workdir / "checkpoints").glob("*")))
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"the soak failed:\n{said}")
    quarter = len(sizes) // 4
    if not quarter:
        raise SystemExit(f"the soak ended before it was measured; take more than {steps} steps.")
    first, last = (statistics.mean(part) for part in (sizes[:quarter], sizes[-quarter:]))
    kept = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    bounded = kept == [steps - 400, steps - 200, steps] and max(files) <= 5
    return {
        "steps": steps,
        "checkpoints": steps // 200,
        "seconds": round(time.monotonic() - began),
        "measured_from_step": warm_up,
        "samples": len(sizes),
        "first_quarter_MiB": round(first / 2**20, 1),
        "last_quarter_MiB": round(last / 2**20, 1),
        "difference_percent": round(100 * (last / first - 1), 2),
        "range_MiB": [round(size / 2**20, 1) for size in (min(sizes), max(sizes))],
        "most_checkpoints_at_once": max(files),  # three are kept, and those on their way
        "left": kept,
        "flat": abs(last / first - 1) <= 0.02 and bounded,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--disks", type=int, default=10)
    parser.add_argument("--soak_steps", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("kills", "disks", "soak"))
    parser.add_argument("--out", type=Path, default=RESULTS / "faults.json")
    chosen = parser.parse_args()
    results = json.loads(chosen.out.read_text()) if chosen.out.exists() else {}
    good = True
    with tempfile.TemporaryDirectory() as name:
        if chosen.only in (None, "kills"):
            results["kills"] = measure_kills(Path(name), chosen.kills, chosen.seed)
            good &= results["kills"]["lost_nothing"]
        if chosen.only in (None, "disks"):
            found = measure_full_disks(Path(name), chosen.disks, chosen.seed)
            if found:
                results["disks"] = found
                good &= found["lost_nothing"]
        if chosen.only in (None, "soak"):
            results["soak"] = measure_soak(Path(name), chosen.soak_steps)
            good &= results["soak"]["flat"]
    write_json(chosen.out, results | environment())
    for part in ("kills", "disks", "soak"):
        shown = {key: value for key, value in results.get(part, {}).items() if key != "each"}
        print(f"{part}: {json.dumps(shown)}")
    print("nothing was lost and nothing grew." if good else "NOT OK: see above.")
    return not good


if __name__ == "__main__":
    sys.exit(main())
