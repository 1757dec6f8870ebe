"""What the training step of a network needs, by each way to its gradient: see --help."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from revjax.memory.network import (
    Network,
    abstract_network,
    batch_unit,
    largest_batch,
    stage_gradients,
    training_step,
    usual_image,
    ways_of,
)
from revjax.memory.report import MemoryReport, memory_report
from revjax.memory.target import find_device, is_tpu
from revjax.models import list_models

UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
FACTORS = (1, 2, 4)  # of depth and of batch, in the plot
# Colours of Okabe and Ito.
STYLES = {
    "store": dict(color="#D55E00", marker="s"),
    "remat": dict(color="#E69F00", marker="^"),
    "reversible": dict(color="#0072B2", marker="o"),
}


def parse_bytes(text: str) -> int:
    """Parse a size such as "16GB", a power of ten, or "16GiB", a power of two."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Za-z]*)", text)
    if match is None or match[2] not in UNITS or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give one such as 16GB or 900MiB.")
    return int(float(match[1]) * UNITS[match[2]])


def positive(text: str, least: int = 1) -> int:
    """Parse a positive integer, or one from another least."""
    if not text.isdecimal() or int(text) < least:
        due = "positive integer" if least == 1 else f"integer from {least}"
        raise argparse.ArgumentTypeError(f"{text!r} is no {due}.")
    return int(text)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m revjax.memory",
        description="What the training step of a network needs, by each way to its gradient. "
        "Programs are compiled and not run: none of the memory is taken.",
    )
    parser.add_argument("--model", required=True, choices=list_models(), metavar="NAME")
    parser.add_argument("--batch", type=positive, default=100, help="images a step [100]")
    parser.add_argument("--image", type=positive, help="their height and width [32 or 224]")
    parser.add_argument("--classes", type=positive, default=10, help="[10]")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--backward", help="ways, with commas between [all that the model has]")
    parser.add_argument(
        "--topology", help="what to compile for: cpu, gpu, tpu, h100, v5e:2x2 [JAX's default]"
    )
    parser.add_argument(
        "--deeper", type=positive, default=1, help="multiplies units a stage, or blocks [1]"
    )
    parser.add_argument("--unroll", action="store_true", help="no loop over units: slow to compile")
    parser.add_argument(
        "--store_last",
        type=partial(positive, least=0),
        help="how many of the last units store, of the reversible way [the network's own number]",
    )
    parser.add_argument("--whole", action="store_true", help="the training step, and no stages")
    parser.add_argument("--fits", type=parse_bytes, help="find the largest batch in, say, 16GB")
    parser.add_argument("--plot", type=Path, help="peak against depth and batch, a .png")
    arguments = parser.parse_args(argv)
    arguments.image = arguments.image or usual_image(arguments.model)
    possible = ways_of(arguments.model)
    asked = arguments.backward.split(",") if arguments.backward else possible
    arguments.ways = list(dict.fromkeys(asked))
    if unknown := [way for way in arguments.ways if way not in possible]:
        parser.error(
            f"--backward: {arguments.model} has {', '.join(possible)}, not {unknown[0]!r}."
        )
    if arguments.store_last is not None and "reversible" not in arguments.ways:
        parser.error(
            f"--store_last={arguments.store_last}: no way of {', '.join(arguments.ways)} stores; "
            "leave it out, or add reversible to --backward."
        )
    if arguments.plot:
        check_plot(arguments.plot, parser.error)
    return arguments


def check_plot(path: Path, refuse: Callable[[str], Any]) -> None:
    """Refuse, before programs are compiled, what the picture could not be written to."""
    if not path.parent.is_dir():
        refuse(f"--plot: there is no folder {path.parent}.")
    if path.suffix != ".png":
        refuse(f"--plot: {path} is no .png.")
    if path.is_dir():
        refuse(f"--plot: {path} is a folder; name a file.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        refuse(f"--plot: {path} cannot be written; choose another folder.")


def report_of(
    arguments: argparse.Namespace, way: str, batch: int, factor: int = 1, **options: Any
) -> MemoryReport:
    """The report of a training step, of a network some times deeper than asked for."""
    network = network_of(arguments, way, factor)
    step, operands = training_step(network, batch, arguments.image)
    return reported(step, *operands, topology=arguments.topology, **options)


def network_of(arguments: argparse.Namespace, way: str, factor: int = 1) -> Network:
    """The network asked for, or one some times deeper."""
    return abstract_network(
        arguments.model,
        way,
        arguments.dtype,
        num_classes=arguments.classes,
        times_deeper=factor * arguments.deeper,
        unroll=arguments.unroll or 1,
        store_last=arguments.store_last,
        topology=arguments.topology,
        image_size=arguments.image,
    )


def only_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of `memory_report` where its seconds are not asked for."""
    if (arguments.topology or jax.default_backend()) != "cpu":
        return {}
    return {"compiler_options": {"xla_backend_optimization_level": 0}}  # of machine code alone


def megabytes(count: float) -> str:
    """Bytes as a cell of the table."""
    return f"{count / 1e6:,.1f}" if count < math.inf else "too much"


def table(arguments: argparse.Namespace) -> dict[str, dict[str, str]]:
    """The cells by row and way; prints what it is about, as compilers take their time."""
    rows: dict[str, dict[str, str]] = {}

    def put(row: str, way: str, cell: str) -> None:
        rows.setdefault(row, {})[way] = cell

    for way in arguments.ways:
        stages = stage_gradients(network_of(arguments, way), arguments.batch, arguments.image)
        for number, (gradient, operands) in enumerate(() if arguments.whole else stages, 1):
            tell(f"compiling {way}, stage {number}")
            report = reported(
                gradient, *operands, topology=arguments.topology, **only_memory(arguments)
            )
            put(f"stage {number} alone, temporary MB", way, megabytes(report.temporary_bytes))
        tell(f"compiling {way}, training step")
        report = report_of(arguments, way, arguments.batch)
        put("training step, temporary MB", way, megabytes(report.temporary_bytes))
        put("its arguments, MB", way, megabytes(report.argument_bytes))
        put("its peak, MB", way, megabytes(report.peak_bytes))
        fits = report.peak_bytes < math.inf
        put("its operations, 10^9", way, f"{report.operations / 1e9:,.1f}" if fits else "")
        put("time to compile, s", way, f"{report.compile_seconds:.1f}" if fits else "")
        if arguments.fits:
            tell(f"compiling {way}, the largest batch")
            batch = find_largest(arguments, way, report.peak_bytes)
            put(f"largest batch in {arguments.fits / 1e9:g} GB", way, f"{batch:,}")
    tell("")
    return rows


def find_largest(arguments: argparse.Namespace, way: str, peak: float) -> int:
    """The largest batch that fits, to 1%, where a peak is known; for a TPU, of those it pads to."""
    guess = arguments.batch * arguments.fits / peak
    unit = batch_unit(guess) if is_tpu(arguments.topology) else 1
    known = {} if arguments.batch % unit else {arguments.batch // unit: peak}

    def peak_of(units: int) -> float:
        return peak_bytes(arguments, way, unit * units)

    return unit * largest_batch(peak_of, arguments.fits, known)


def peak_bytes(arguments: argparse.Namespace, way: str, batch: int) -> float:
    """The peak of a training step."""
    return report_of(arguments, way, batch, **only_memory(arguments)).peak_bytes


def reported(fn: Callable, *operands: Any, **options: Any) -> MemoryReport:
    """What `memory_report` says, or infinite needs where the compiler says that they are too large.

    That for TPUs refuses what does not fit one.
    """
    try:
        return memory_report(fn, *operands, **options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needs: Any = [math.inf] * len(MemoryReport._fields)
        return MemoryReport(*needs)


def tell(text: str) -> None:
    """Show what is being done, in place, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r{text:<60}", end="" if text else "\r", file=sys.stderr, flush=True)


def title(arguments: argparse.Namespace) -> str:
    """What was compiled, and by what."""
    device = arguments.topology or jax.devices()[0].device_kind
    deeper = f" with {arguments.deeper} times its units" if arguments.deeper > 1 else ""
    options = ", unrolled" if arguments.unroll else ""
    if arguments.store_last is not None:
        options += f", store_last={arguments.store_last}"
    side = arguments.image
    return (
        f"{arguments.model}{deeper}{options}, batch {arguments.batch}, {side}x{side}, "
        f"{arguments.dtype}, compiled for {device} by JAX {jax.__version__}"
    )


def draw(arguments: argparse.Namespace) -> None:
    """Plot the peak of the training step against depth and against batch."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (by_depth, by_batch) = plt.subplots(
        1, 2, figsize=(9, 3.6), sharey=True, layout="constrained"
    )
    for way in arguments.ways:
        deeper, larger = [], []
        for factor in FACTORS:
            tell(f"compiling {way} for the plot, {factor}x")
            report = report_of(arguments, way, arguments.batch, factor, **only_memory(arguments))
            deeper.append(report.peak_bytes / 1e6)
            larger.append(peak_bytes(arguments, way, factor * arguments.batch) / 1e6)
        by_depth.plot(FACTORS, deeper, label=way, **STYLES[way])
        by_batch.plot([factor * arguments.batch for factor in FACTORS], larger, **STYLES[way])
    tell("")
    by_depth.set_xlabel("units a stage, times those of the network")
    by_batch.set_xlabel("batch")
    by_depth.set_xticks(FACTORS)
    by_batch.set_xticks([factor * arguments.batch for factor in FACTORS])
    by_depth.set_ylabel("peak memory of the training step, MB")
    by_depth.legend()
    for axes in (by_depth, by_batch):
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3, which="both")
    figure.suptitle(title(arguments), fontsize=10)
    figure.savefig(arguments.plot, dpi=110)


def main(argv: list[str]) -> int | str:
    """Run the command line; return the exit status, or the sentence to end with."""
    arguments = parse_arguments(argv)
    try:
        if arguments.topology == "h100" or ":" in (arguments.topology or ""):
            jax.config.update("jax_platforms", "cpu")  # the device is described, not looked for
        if arguments.topology:
            find_device(arguments.topology)
        print(title(arguments), flush=True)
        rows = table(arguments)
        show(rows, arguments.ways)
        if arguments.plot:
            draw(arguments)
            print(f"\nplot: {arguments.plot}")
    except (ValueError, RuntimeError, OSError) as error:
        return f"revjax.memory: {error}"
    return 0


def show(rows: dict[str, dict[str, str]], ways: list[str]) -> None:
    """Print the cells that `table` returned."""
    width = max(map(len, rows))
    print(f"\n{'':<{width}}" + "".join(f"{way:>14}" for way in ways))
    for row, cells in rows.items():
        print(f"{row:<{width}}" + "".join(f"{cells[way]:>14}" for way in ways))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
