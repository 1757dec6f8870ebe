"""Time and memory of a gradient, or of a training step, by each way to it, side by side.

Command:   python benchmarks/speed.py [chain] [network] [deep] [compile] [--models NAME] [--help]
Hardware:  a CPU with 24 GB of memory, on which nothing else should run; 40 minutes on 2 cores
Figures:   benchmarks/results/speed.json, .md and .png, told in docs/performance.md

chain      the gradient, by parameters and input, of a chain of blocks of two residual functions
           BN-ReLU-conv3x3-BN-ReLU-conv3x3, 32 images of 32x32 and 16 + 16 channels, float32
network    the training step of a network of create_model, as revjax.memory has it
deep       the same of a RevNet of 1,000 reversible units, which is 4,002 layers
compile    the time to trace and compile the reversible chain of 1,024 blocks, and of 16, in turns

Chains and networks are there in PyTorch and by MemCNN, too, where the extra "bench" is installed.

"Dear" is what products, convolutions and sums give. A stored form that keeps that alone evaluates
the rest, normalisation and ReLU, again; an unrolled one XLA:CPU makes the stored, unrolled one.
"unroll=4" has four blocks an iteration of a scan, where it has so many. The compiler is asked for
what train.py asks of it (revjax/training/compiler.py), but by the way of "XLA's defaults".

Each way is a process of its own. They take turns, step by step and in an order drawn for each
round, so that what else the machine does, and what one leaves to the next, falls on all of them; a
time is the median of their rounds, with the quartiles, after a round that is not counted. Long
chains have fewer rounds, and beyond 64 blocks none that is not counted. What stores more than 0.7
of the machine's memory, by the compiler's account of the scanned form, is left out. The peak of a
network's process is without what compilers had freed before it steps.
--smoke makes all of it small, and records nothing.

The floor of a time is the operations over the rate of a product of two 2048x2048 matrices in this
run, beside which stands that of a convolution of the chains, 16 to 16 channels. That of a chain's
temporary memory is what must live as a block is differentiated: the stream and its cotangent, the
output of a function's first convolution, and its cotangent: six halves of the stream; and before,
for each block that has yet to be, what is kept of it: its input (two halves), or the inputs of its
four convolutions.

The gradient error is that against stored activations, in the same framework and on the same grid:
|difference| / |gradient|, with convolutions in float32, and in bfloat16 where there are two.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from gradients import shown_error
from record import RESULTS, environment

from revjax import list_models
from revjax.conv import conv
from revjax.memory.network import usual_image
from revjax.memory.report import compile_with_report
from revjax.training.compiler import compiler_options

matplotlib.use("agg")
from matplotlib import pyplot as plt

CHANNELS = 16
UNROLLED = 16  # blocks, at most: longer programs take minutes to compile
ERRORS = 64  # blocks, at most, of the chains whose gradients are compared
STUDIES = ("chain", "network", "deep", "compile")
GRID = "reversible, grid 2^-14"
DEFAULTS = f"{GRID}, XLA's defaults"

STORED, STORED_UNROLLED = "stored, scanned", "stored, unrolled"
STORED_DEAR = "stored, what is dear alone"
# Of rev_chain_apply and create_model; dear and xla_defaults are contestant.py's.
WAYS: dict[str, dict[str, Any]] = {
    STORED: dict(backward="store", grid_bits=None),
    STORED_DEAR: dict(backward="store", grid_bits=None, dear=True),
    STORED_UNROLLED: dict(backward="store", grid_bits=None, unroll=True),
    "jax.checkpoint a block, scanned": dict(backward="remat", grid_bits=None),
    "jax.checkpoint a block, unrolled": dict(backward="remat", grid_bits=None, unroll=True),
    "reversible, no grid": dict(backward="reversible", grid_bits=None),
    GRID: dict(backward="reversible", grid_bits=14),
    f"{GRID}, unroll=4": dict(backward="reversible", grid_bits=14, unroll=4),
    DEFAULTS: dict(backward="reversible", grid_bits=14, xla_defaults=True),
}
TORCH_WAYS = {"PyTorch": "plain", "PyTorch, checkpoint a block": "checkpoint", "MemCNN": "memcnn"}
STORING = (STORED, STORED_UNROLLED, "PyTorch")
KEPT_HALVES = {"store": 4, "remat": 2, "reversible": 0}
# Colours of Okabe and Ito.
STYLES = {
    STORED: dict(color="#D55E00", marker="s"),
    STORED_DEAR: dict(color="#CC79A7", marker="D"),
    "jax.checkpoint a block, scanned": dict(color="#E69F00", marker="^"),
    GRID: dict(color="#0072B2", marker="o"),
    "PyTorch": dict(color="#999999", marker="s", linestyle="--"),
    "PyTorch, checkpoint a block": dict(color="#999999", marker="^", linestyle="--"),
    "MemCNN": dict(color="#999999", marker="o", linestyle="--"),
}


class Contestant:
    """The process of one way: see contestant.py."""

    def __init__(self, spec: dict[str, Any]):
        program = Path(__file__).parent / "contestant.py"
        command = [sys.executable, "-W", "ignore", program, json.dumps(spec)]
        pipe: Any = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, **pipe)
        self.spec = spec
        self.facts = self.hear()

    def hear(self) -> Any:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise RuntimeError(f"{self.spec} ended with status {self.process.wait()}.")
        return json.loads(line)

    def ask(self, word: str) -> Any:
        print(word, file=self.process.stdin, flush=True)
        return self.hear()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def memory_of_machine() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def operations_per_second() -> dict[str, float]:
    """The rate of a product of two large matrices, and that of a convolution of the chains."""
    a = jnp.ones((2048, 2048))
    x, kernel = jnp.ones((32, 32, 32, CHANNELS)), jnp.ones((3, 3, CHANNELS, CHANNELS))
    functions: dict[str, tuple[Callable, tuple[jax.Array, ...]]] = {
        "product": (jnp.matmul, (a, a)),
        "convolution": (conv, (x, kernel)),
    }
    rates = {}
    for name, (function, operands) in functions.items():
        compiled, report = compile_with_report(
            function, *operands, compiler_options=compiler_options("cpu")
        )
        seconds = []
        for _ in range(20):
            began = time.perf_counter()
            compiled(*operands).block_until_ready()
            seconds.append(time.perf_counter() - began)
        rates[name] = report.operations / min(seconds)
    return rates


def measure(specs: dict[str, dict[str, Any]], rounds: int, warm: bool) -> dict[str, dict[str, Any]]:
    """A row for each way, without seconds for one that the compiler says needs too much memory.

    After such a one, those of STORING are not tried and have no row.
    """
    contestants: dict[str, Contestant] = {}
    rows: dict[str, dict[str, Any]] = {}
    too_large = False
    try:
        for label, spec in specs.items():
            if label in STORING and too_large:
                continue
            print(f"  {label}", file=sys.stderr, flush=True)
            contestant = Contestant(spec)
            rows[label] = contestant.facts
            if contestant.facts.get("temporary_bytes", 0) > 0.7 * memory_of_machine():
                too_large = True
                contestant.end()
            else:
                contestants[label] = contestant
        seconds = {label: [] for label in contestants}
        draw_order = random.Random(0)
        for left in reversed(range(rounds + warm)):
            for label in draw_order.sample(list(contestants), len(contestants)):
                contestant = contestants[label]
                seconds[label].append(contestant.ask("step"))
                if not left:  # what long chains hold would together be too much
                    rows[label]["process_peak_bytes"] = contestant.ask("end")
                    contestant.end()
        for label, taken in seconds.items():
            low, median, high = np.percentile(taken[warm:], [25, 50, 75]).tolist()
            rows[label] |= {"seconds": median, "quartiles": [low, high]}
    finally:
        for contestant in contestants.values():
            contestant.end()
    stored = (STORED, STORED_DEAR, STORED_UNROLLED)
    if stored := [rows[label]["seconds"] for label in stored if "seconds" in rows.get(label, {})]:
        for row in rows.values():
            if "seconds" in row:
                row["time_against_stored"] = row["seconds"] / min(stored)
    return rows


def chain_specs(depth: int, batch: int, side: int, torch: bool) -> dict[str, dict[str, Any]]:
    shape = dict(depth=depth, batch=batch, side=side, channels=CHANNELS)
    specs = {
        label: dict(study="chain", **shape, **options)
        for label, options in WAYS.items()
        if depth <= UNROLLED or "unroll" not in options
    }
    return specs | (torch_specs("chain in PyTorch", **shape) if torch else {})


def network_specs(
    name: str, batch: int, side: int, torch: bool, **options: Any
) -> dict[str, dict[str, Any]]:
    shape = dict(name=name, batch=batch, side=side)
    specs = {
        label: dict(study="network", **shape, **way, **options)
        for label, way in WAYS.items()
        if label != "jax.checkpoint a block, unrolled"
    }
    return specs | (torch_specs("network in PyTorch", **shape) if torch else {})


def torch_specs(study: str, **shape: Any) -> dict[str, dict[str, Any]]:
    return {label: dict(study=study, **shape, way=way) for label, way in TORCH_WAYS.items()}


def measure_compilation(batch: int, side: int, rounds: int) -> dict[str, dict[str, Any]]:
    """A row for each depth, whose seconds to compile are the median of the rounds."""
    facts: dict[int, list[dict[str, Any]]] = {16: [], 1024: []}
    for _ in range(rounds):
        for depth, found in facts.items():
            contestant = Contestant(chain_specs(depth, batch, side, torch=False)[GRID])
            found.append(contestant.facts)
            contestant.end()
    rows = {}
    for depth, found in facts.items():
        low, median, high = np.percentile(
            [one["compile_seconds"] for one in found], [25, 50, 75]
        ).tolist()
        quartiles = {"compile_seconds": median, "compile_quartiles": [low, high]}
        rows[f"{depth:,} blocks"] = found[0] | quartiles
    return rows


def add_errors(rows: dict[str, Any], specs: dict[str, Any]) -> None:
    """The relative error of each way's gradient against that by stored activations."""
    for label, row in rows.items():
        spec = specs[label]
        if label in STORING or label == DEFAULTS or "unroll" in spec:
            continue
        torch = label in TORCH_WAYS
        stored = {"way": "plain"} if torch else {"backward": "store", "dear": False}
        for dtype in ("float32",) if torch else ("float32", "bfloat16"):
            compute = {} if torch else {"dtype": dtype}
            contestant = Contestant(spec | compute | {"error_against": stored})
            row.setdefault("gradient_error", {})[dtype] = contestant.facts
            contestant.end()


def add_floors(rows: dict[str, Any], specs: dict[str, Any], rate: float) -> None:
    """What the time and, of a chain, the temporary memory cannot be below."""
    for label, row in rows.items():
        spec = specs[label]
        row["floor_seconds"] = row["operations"] / rate
        if spec["study"] == "chain":
            half = 4 * spec["batch"] * spec["side"] ** 2 * spec["channels"]
            kept = KEPT_HALVES[spec["backward"]] * (spec["depth"] - 1)
            row["floor_temporary_bytes"] = (6 + kept) * half


def table(title: str, study: dict[str, Any]) -> str:
    """A study in Markdown."""

    def cell(row, key, unit=1.0, spec=",.1f"):
        return f"{row[key] / unit:{spec}}" if key in row else ""

    versions = ", ".join(f"{name} {version}" for name, version in study["versions"].items())
    rates = f"a matrix product does {cell(study, 'operations_per_second', 1e9, '.0f')}"
    if "convolution_operations_per_second" in study:
        rates += (
            f" and a convolution {cell(study, 'convolution_operations_per_second', 1e9, '.0f')}"
        )
    lines = [
        f"## {title}\n",
        f"{study['rounds']} rounds; {study['device']}, {study['platform']}; {versions}; "
        f"{study['date']}; {rates} x 10^9 operations/s\n",
        "| | time, s (quartiles) | floor | against the fastest stored | temporary MB | floor "
        "| process peak MB | compile, s | operations, 10^9 | gradient error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for label, row in study["forms"].items():
        seconds = "" if "compile_quartiles" in row else "needs more memory than there is"
        if "seconds" in row:
            low, high = row["quartiles"]
            seconds = f"{row['seconds']:.3g} ({low:.3g} to {high:.3g})"
        cells = [
            seconds,
            cell(row, "floor_seconds", spec=".2g"),
            cell(row, "time_against_stored", spec=".2f"),
            cell(row, "temporary_bytes", 1e6),
            cell(row, "floor_temporary_bytes", 1e6),
            cell(row, "process_peak_bytes", 1e6, ",.0f"),
            cell(row, "compile_seconds", spec=".2f"),
            cell(row, "operations", 1e9),
            ", ".join(map(shown_error, row.get("gradient_error", {}).values())),
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(record: dict[str, Any], path: Path) -> None:
    """Time a block and process peak against depth, of the chains that are of one shape, if any."""
    shape = ", batch 32, 32x32"
    chains = [s for title, s in record.items() if title.startswith("chain") and shape in title]
    if not chains:
        return
    figure, (times, peaks) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for label, style in STYLES.items():
        done = [s for s in chains if "seconds" in s["forms"].get(label, {})]
        done.sort(key=lambda study: study["depth"])
        depths = [study["depth"] for study in done]
        forms = [study["forms"][label] for study in done]
        per_block = [1e3 * row["seconds"] / depth for row, depth in zip(forms, depths, strict=True)]
        times.plot(depths, per_block, label=label, **style)
        peaks.plot(depths, [row["process_peak_bytes"] / 1e9 for row in forms], **style)
    for axes in (times, peaks):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("blocks")
        axes.xaxis.set_major_formatter(lambda depth, _: f"{depth:,.0f}")
        axes.grid(alpha=0.3)
    times.set_ylim(bottom=0)
    times.set_ylabel("time a block, ms")
    peaks.set_yscale("log")
    peaks.set_ylabel("peak memory of the process, GB")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory by each way to a gradient.")
    parser.add_argument("studies", nargs="*", help=f"{', '.join(STUDIES)} [all]")
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16, 64, 256, 1024])
    models = ["revnet38", "revnet110", "revnet164", "revnet104"]
    parser.add_argument("--models", nargs="+", default=models)
    parser.add_argument("--batch", type=int, default=32, help="8 for images of 224x224")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--smoke", action="store_true", help="a small form of all")
    parser.add_argument("--results", type=Path, help="the folder to add the figures to")
    arguments = parser.parse_args()
    chosen = arguments.studies or STUDIES
    if unknown := set(chosen) - set(STUDIES):
        parser.error(f"there is no study {', '.join(unknown)}; there are {', '.join(STUDIES)}.")
    revnets = {name for name in list_models() if name.startswith("revnet")}
    if unknown := set(arguments.models) - revnets:
        parser.error(f"--models: {', '.join(unknown)} is no RevNet of revjax.list_models().")
    if min(arguments.depths) < 1 or arguments.batch < 1 or arguments.rounds < 1:
        parser.error("--depths, --batch and --rounds must be 1 or more.")
    if arguments.results is None:  # of the smoke form nothing is recorded
        arguments.results = None if arguments.smoke else RESULTS
    if arguments.results and not arguments.results.is_dir():
        parser.error(f"--results: there is no folder {arguments.results}.")
    batch, side, rounds = arguments.batch, 32, arguments.rounds
    deep: dict[str, Any] = dict(units=(334, 333, 333), filters=(32, 32, 64, 128))
    if arguments.smoke:
        batch, side, rounds = 2, 8, 1
        arguments.depths, arguments.models = [2], ["revnet38"]
        deep = dict(units=(2, 2), filters=(8, 8, 16))
    torch = all(importlib.util.find_spec(name) for name in ("torch", "memcnn"))
    if not torch:
        install = f'{sys.executable} -m pip install -e ".[bench]"'
        print(f"PyTorch and MemCNN are left out: {install} brings them (3 GB, with CUDA).")

    studies: dict[str, tuple[dict[str, Any], int, int]] = {}
    for depth in arguments.depths if "chain" in chosen else ():
        title = f"chain of {depth} blocks, batch {batch}, {side}x{side}"
        fewer = {64: 5, 256: 3}.get(depth, 1 if depth > 256 else rounds)
        studies[title] = chain_specs(depth, batch, side, torch), min(rounds, fewer), depth
    for name in arguments.models if "network" in chosen else ():
        large = usual_image(name) > 32 and not arguments.smoke
        size = (min(batch, 8), usual_image(name)) if large else (batch, side)
        title = f"{name}, training step, batch {size[0]}, {size[1]}x{size[1]}"
        studies[title] = network_specs(name, *size, torch), min(rounds, 3) if large else rounds, 0
    if "deep" in chosen:
        units = sum(deep["units"])
        title = f"RevNet of {units:,} units, training step, batch {batch}, {side}x{side}"
        specs = {GRID: network_specs("revnet", batch, side, torch=False, **deep)[GRID]}
        studies[title] = specs, min(rounds, 2), 0

    path = arguments.results and arguments.results / "speed.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {}
    if "compile" in chosen:
        studies["time to compile a reversible chain"] = {}, min(rounds, 5), 0
    for title in studies:
        if not torch and "MemCNN" in record.get(title, {}).get("forms", {}):
            parser.error(f"{path} has PyTorch's figures: install it, or give --results DIR.")
    for title, (specs, study_rounds, depth) in studies.items():
        print(title, file=sys.stderr, flush=True)
        rates = operations_per_second()
        if specs:
            rows = measure(specs, study_rounds, warm=depth <= 64)
            add_floors(rows, specs, rates["product"])
        else:
            rows = measure_compilation(batch, side, study_rounds)
        if 0 < depth <= ERRORS:
            add_errors(rows, specs)
        found = environment()
        if not specs.keys().isdisjoint(TORCH_WAYS):
            packages = ("torch", "memcnn")
            found["versions"] |= {name: importlib.metadata.version(name) for name in packages}
        record[title] = {
            **found,
            "rounds": study_rounds,
            "depth": depth,
            "operations_per_second": rates["product"],
            "convolution_operations_per_second": rates["convolution"],
            "forms": rows,
        }
        print(table(title, record[title]), flush=True)
        if path:
            path.write_text(json.dumps(record, indent=2) + "\n")
    if not path:
        return
    order = sorted(record, key=lambda title: (record[title]["depth"] == 0, record[title]["depth"]))
    record = {title: record[title] for title in order}
    path.write_text(json.dumps(record, indent=2) + "\n")
    path.with_suffix(".md").write_text("\n".join(table(*item) for item in record.items()))
    draw(record, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
