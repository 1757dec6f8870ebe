"""Memory of training steps on accelerators that need not be there, as their compilers tell it.

Command:   python benchmarks/accelerators.py h100|v5e [--largest 16GB] [--only TEXT] [--json FILE]
Hardware:  a CPU; the compilers are in the extras cuda13 and tpu-aot
Figures:   benchmarks/results/h100.json and v5e.json, and .md, told in docs/performance.md

The training step of `revjax.memory` by each way to the gradient; "unrolled" is without a loop
over the units of a stage, "by images" is no step, but the loss's gradient by the images alone.
Programs are compiled and not run. What the file of figures has is not compiled again, so an
interrupted run goes on: delete the file to begin anew. A program for an H100 takes one to three
minutes on 2 cores, one for a TPU four to twelve.

--largest SIZE finds the largest batch of which the step fits, a multiple of 128 or 8, to 4%, by one
to four programs, compiled with little effort (JAX_OPTIMIZATION_LEVEL=O1) in a fraction of the time.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx
from record import RESULTS, environment

from revjax.memory.__main__ import parse_bytes, reported
from revjax.memory.network import (
    Compilable,
    Network,
    abstract_network,
    batch_unit,
    largest_batch,
    training_step,
    usual_image,
    ways_of,
)
from revjax.memory.report import MemoryReport
from revjax.memory.target import find_device

WAYS = ("store", "remat", "reversible")
TOPOLOGIES = {"h100": "h100", "v5e": "v5e:2x2"}


class Case(NamedTuple):
    """A training step."""

    model: str
    batch: int
    dtype: str
    way: str
    unroll: bool = False
    times_deeper: int = 1
    of_images: bool = False  # not a step: the loss's gradient by the images, and by nothing else

    def __str__(self) -> str:
        side = usual_image(self.model)
        deeper = f" with {self.times_deeper} times its units" if self.times_deeper > 1 else ""
        way = self.way + ", unrolled" * self.unroll + ", by images" * self.of_images
        return f"{self.model}{deeper}, batch {self.batch}, {side}x{side}, {self.dtype}: {way}"


def ways(model: str, batch: int, dtype: str, **options: Any) -> list[Case]:
    return [Case(model, batch, dtype, way, **options) for way in ways_of(model)]


DEEPER = (1, 2, 4)  # times the units of revnet110, which has 9 a stage


def growth(**options: Any) -> list[Case]:
    """The reversible step at several depths."""
    return [
        Case("revnet110", 100, "float32", "reversible", times_deeper=times, **options)
        for times in DEEPER
    ]


CASES = {
    "h100": [
        *ways("revnet110", 100, "float32"),
        Case("revnet110", 100, "float32", "store", unroll=True),
        Case("revnet110", 100, "float32", "remat", unroll=True),
        *ways("revnet110", 100, "float32", times_deeper=4),
        *growth(),
        *growth(of_images=True),
        *ways("revnet110", 100, "bfloat16"),
        *ways("revnet104", 32, "float32"),
        *ways("resnet101", 32, "float32"),
        *ways("revnet104", 32, "bfloat16"),
        *ways("resnet101", 32, "bfloat16"),
        *ways("revnet38", 100, "float32"),
        *ways("revnet164", 100, "float32"),
        *ways("revnet38", 100, "bfloat16"),
        *ways("revnet164", 100, "bfloat16"),
    ],
    "v5e": [
        *ways("revnet110", 128, "bfloat16"),
        *ways("revnet104", 32, "bfloat16"),
        *ways("resnet101", 32, "bfloat16"),
        *ways("revnet110", 4096, "bfloat16"),
    ],
}


def report_of(case: Case, topology: str) -> MemoryReport:
    """What a case needs; infinite where the compiler says that it does not fit."""
    network = abstract_network(
        case.model,
        case.way,
        case.dtype,
        num_classes=10,
        times_deeper=case.times_deeper,
        unroll=case.unroll or 1,
        topology=topology,
    )
    compilable = image_gradient if case.of_images else training_step
    step, arguments = compilable(network, case.batch, usual_image(case.model))
    return reported(step, *arguments, topology=topology)


def image_gradient(network: Network, batch: int, image: int) -> Compilable:
    """The gradient of the loss by the images: what the rule needs where no parameter has one."""
    _, (_, images, labels) = training_step(network, batch, image)
    graph, params, variables = nnx.split(network, nnx.Param, ...)

    def loss(images, params, variables, labels):
        logits = nnx.merge(graph, params, variables, copy=True)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return jax.jit(jax.grad(loss)), (images, params, variables, labels)


def largest(
    case: Case, topology: str, available: int, figures: dict[str, Any]
) -> tuple[int, dict[int, float | None]]:
    """The largest batch of a case that fits, to 4% or to what is tried, and peaks by batch.

    A peak is nearly affine in the batch, so few programs are compiled, the first for a batch that
    about fits by the figures that there are. A TPU pads large batches to multiples of 128: only
    those are tried, or multiples of 8 where fewer than 1,024 images fit.
    """
    peaks: dict[int, float | None] = {}  # None: refused
    guess = guess_batch(case, available, figures)
    unit = batch_unit(guess)

    def peak_bytes(units: int) -> float:
        batch = unit * units
        peak = report_of(case._replace(batch=batch), topology).peak_bytes
        print(f"    batch {batch}: {peak}", flush=True)
        peaks[batch] = peak if peak < math.inf else None
        return peak

    first = max(1, guess // unit)
    return unit * largest_batch(peak_bytes, available, {first: peak_bytes(first)}, 0.04), peaks


def guess_batch(case: Case, available: int, figures: dict[str, Any]) -> int:
    """The batch that fits if temporaries grow with it from the largest that is in the figures."""
    for batch in sorted({other.batch for others in CASES.values() for other in others})[::-1]:
        row = figures.get(str(case._replace(batch=batch)), {})
        if row.get("fits"):
            return int(batch * (available - row["argument_bytes"]) / row["temporary_bytes"])
    return case.batch


def tables(figures: dict[str, Any]) -> str:
    """The figures in Markdown: what is compiled by what is kept for the gradient."""
    cells: dict[str, dict[str, str]] = {}
    for label, row in figures.items():
        if label.endswith(", by images"):
            continue
        step, way = label.split(": ")
        way, *unrolled = way.split(", ")
        cell = "does not fit"
        if "largest_batch" in row:
            cell = f"{row['largest_batch']:,}"
        elif row["fits"]:
            cell = f"{row['temporary_bytes'] / 1e6:,.1f}"
        cells.setdefault(", ".join([step, *unrolled]), {})[way] = cell
    lines = []
    for title, largest in (("temporary MB of the training step", False), ("largest batch", True)):
        if not any(("largest" in step) == largest for step in cells):
            continue
        lines += [f"| {title} | {' | '.join(WAYS)} |", "|---" * (len(WAYS) + 1) + "|"]
        for step, row in cells.items():
            if ("largest" in step) == largest:
                lines.append(f"| {step} | {' | '.join(row.get(way, '') for way in WAYS)} |")
        lines.append("")
    return "\n".join([*lines, *growth_table(figures)])


def growth_table(figures: dict[str, Any]) -> list[str]:
    """What depth adds to the reversible step, beside the gradients that wait for the optimiser."""
    lines = [
        "| units a stage of revnet110, batch 100, float32 | temporary MB of the step "
        "| gradients, MB | temporary less gradients | temporary of the gradient by images |",
        "|---|---|---|---|---|",
    ]
    for case in growth():
        labels = str(case), f"{case}, by images"
        if not all(label in figures for label in labels):
            return []
        step, by_images = (figures[label]["temporary_bytes"] for label in labels)
        gradients = parameter_bytes(case)
        sizes = step, gradients, step - gradients, by_images
        cells = [f"{size / 1e6:,.1f}" for size in sizes]
        lines.append(f"| {9 * case.times_deeper} | {' | '.join(cells)} |")
    return [*lines, ""]


def parameter_bytes(case: Case) -> int:
    """Of the parameters of a network, and so of their gradients."""
    network = abstract_network(
        case.model, case.way, case.dtype, num_classes=10, times_deeper=case.times_deeper
    )
    leaves = jax.tree.leaves(nnx.state(network, nnx.Param))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of training steps on accelerators.")
    parser.add_argument("accelerator", choices=TOPOLOGIES)
    parser.add_argument("--largest", type=parse_bytes, help="the largest batch in, say, 16GB")
    parser.add_argument("--only", default="", help="cases with this in their label")
    parser.add_argument("--json", type=Path, help="the file of figures")
    arguments = parser.parse_args()
    path = arguments.json or RESULTS / f"{arguments.accelerator}.json"
    topology = TOPOLOGIES[arguments.accelerator]
    jax.config.update("jax_platforms", "cpu")  # the device is described, not looked for
    try:
        find_device(topology)
    except RuntimeError as error:
        sys.exit(f"accelerators.py: {error}")
    figures: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    chosen = [case for case in CASES[arguments.accelerator] if arguments.only in str(case)]
    if not chosen:
        sys.exit(f"--only {arguments.only}: no case has that in its label.")
    if arguments.largest:
        jax.config.update("jax_optimization_level", "O1")
    for case in chosen:
        label = str(case)
        if arguments.largest:
            label = label.replace(
                f"batch {case.batch}", f"largest in {arguments.largest / 1e9:g} GB"
            )
        if label in figures:
            continue
        print(label, flush=True)
        if arguments.largest:
            batch, peaks = largest(case, topology, arguments.largest, figures)
            row = {"largest_batch": batch, "peak_bytes": peaks}
        else:
            report = report_of(case, topology)
            fits = report.peak_bytes < math.inf
            row = {"fits": fits, **(report._asdict() if fits else {})}
        figures[label] = {**environment(), **row}
        path.write_text(json.dumps(figures, indent=2) + "\n")
    path.with_suffix(".md").write_text(tables(figures))
    print(tables(figures))


if __name__ == "__main__":
    main()
