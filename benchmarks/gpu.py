"""Exactness, time and memory of every way to a gradient on the GPU at hand, side by side.

Command:   python benchmarks/gpu.py [exactness] [network] [--models revnet38,revnet110] [--help]
Hardware:  one GPU on which nothing else runs, and some cores, as all programs are compiled at once
Figures:   benchmarks/results/gpu.json and .md, told in docs/performance.md and docs/numerics.md

exactness  of a chain of blocks of two residual functions BN-ReLU-conv3x3-BN-ReLU-conv3x3, 32 images
           of 32x32 and 16 + 16 channels: what of the chain's input the inverse gives back, and the
           error of the reversible gradient against that of jax.checkpoint, which evaluates the same
           function, and against stored activations
network    the training step of networks of create_model, as revjax.memory has it: its time, memory
           and the error of its gradient against that of stored activations

"float32" multiplies in float32, "tf32" is what JAX does with float32 on such GPUs by default, and
"bfloat16" has convolutions in bfloat16. Networks are in tf32 and in bfloat16.

Each way is a process of its own. When all are compiled they take turns, many steps at a time; a time
is the median of the turns. They ask of the compiler what train.py does: CUDA graphs. --smoke makes
all of it small, runs anywhere, and records nothing.

The floor of a time is the operations over the rate of a product of two 8192x8192 matrices of that
dtype in this run.
"""

# Calls with options chosen at run time, which no type checker can follow.
# pyright: reportArgumentType=false, reportCallIssue=false

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from basic_block import residual
from flax import nnx
from gradients import flatten, relative_error, shown_error
from record import RESULTS, environment

import revjax
from revjax.memory.network import abstract_network, training_step, usual_image, ways_of
from revjax.memory.report import compile_with_report
from revjax.training.compiler import compiler_options

STUDIES = ("exactness", "network")
MODELS = ("revnet38", "revnet110")
DTYPES = ("tf32", "bfloat16")
STEPS, TURNS = 20, 5
Row = dict[str, Any]


# What a process does ----------------------------------------------------------------------------


def exactness(dtype: str, depths: list[int], images: int, side: int) -> None:
    """Print a row for each depth, on the grid and off it."""
    compute = "bfloat16" if dtype == "bfloat16" else None
    with jax.default_matmul_precision("float32" if dtype == "float32" else None):
        for depth, grid_bits in itertools.product(depths, (14, None)):
            tell(exactness_row(depth, grid_bits, partial(residual, dtype=compute), images, side))


def exactness_row(depth: int, grid_bits: int | None, f: Callable, images: int, side: int) -> Row:
    """How exact a chain of f is."""
    channels, random = 16, np.random.default_rng(0)
    ones = np.ones((depth, 1, 1, 1, channels), np.float32)

    def layer():
        kernel = random.normal(size=(depth, 3, 3, channels, channels)) / (4.5 * channels) ** 0.5
        return ones, 0 * ones, kernel.astype(np.float32)

    params = tuple(tuple(layer() for _ in range(2)) for _ in range(2))
    x = tuple(random.normal(size=(2, images, side, side, channels)).astype(np.float32))

    def gradient(backward: str) -> np.ndarray:
        @jax.jit
        @partial(jax.grad, argnums=(0, 1))
        def compute(params, x):
            options = dict(grid_bits=grid_bits, backward=backward)
            y1, y2 = revjax.rev_chain_apply(f, f, params, x, **options)
            return (y1**2).sum() + (y2**2).sum()

        return flatten(compute(params, x))

    @jax.jit
    def errors(params, x):
        y = revjax.rev_chain_apply(f, f, params, x, grid_bits=grid_bits)
        back = revjax.rev_chain_inverse(f, f, params, y, grid_bits=grid_bits)
        due = x if grid_bits is None else revjax.round_to_grid(x, grid_bits)
        differences = [jnp.abs(a - b) for a, b in zip(back, due, strict=True)]
        return jnp.stack(differences).max(), sum((d > 0).sum() for d in differences)

    largest, number = jax.device_get(errors(params, x))
    reversible, remat, stored = map(gradient, ("reversible", "remat", "store"))
    return {
        "depth": depth,
        "grid_bits": grid_bits,
        "reconstruction": float(largest),
        "not_reconstructed": int(number),  # of the numbers of x
        "against_remat": relative_error(reversible, remat),
        "against_stored": relative_error(reversible, stored),
        "remat_against_stored": relative_error(remat, stored),
    }


def network(model: str, batch: int, dtype: str, backward: str, unroll: bool, keep: str) -> None:
    """Print what the compiler says; then, for each number read, the seconds of as many steps.

    The gradient of the first step goes to the file `keep`.
    """
    compute = "bfloat16" if dtype == "bfloat16" else "float32"
    net = abstract_network(model, backward, compute, num_classes=10, unroll=unroll or 1)
    step, (state, images, labels) = training_step(net, batch, usual_image(model))
    random = np.random.default_rng(0)
    params, variables, momentum = state
    params = jax.tree_util.tree_map_with_path(partial(drawn, random), params)
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), variables)
    momentum = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), momentum)
    state = jax.device_put((params, variables, momentum))
    images = jnp.asarray(random.normal(size=images.shape), jnp.float32)
    labels = jnp.arange(batch, dtype=jnp.int32) % 10
    options = compiler_options(jax.default_backend())
    compiled, report = compile_with_report(step, state, images, labels, compiler_options=options)
    state = compiled(state, images, labels)
    np.save(keep, flatten(state[2]))  # after one step momentum is the gradient, with weight decay
    tell(report._asdict())
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            state = compiled(state, images, labels)
        jax.block_until_ready(state)
        tell(time.perf_counter() - began)


def drawn(random: np.random.Generator, path: Any, leaf: Any) -> np.ndarray:
    """Numbers for a parameter, as He et al. draw kernels; without a program for each to compile."""
    name = str(path)
    if "kernel" not in name:
        return np.full(leaf.shape, "scale" in name, leaf.dtype)
    *window, _, outputs = leaf.shape[-4:]
    deviation = (2 / (np.prod(window) * outputs)) ** 0.5
    return (random.normal(size=leaf.shape) * deviation).astype(leaf.dtype)


def tell(value: Any) -> None:
    print(json.dumps(value), flush=True)


# The processes ----------------------------------------------------------------------------------


class Way:
    """A process, which begins to compile at once."""

    def __init__(self, study: str, **spec: Any):
        self.spec = spec
        command = [sys.executable, "-W", "ignore", __file__, "--process", json.dumps([study, spec])]
        # Else the first process would take the GPU's memory for itself.
        environ = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        pipe: Any = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)
        self.process = subprocess.Popen(command, **pipe)

    def hear(self) -> Any:
        """What it says next; None once it has ended."""
        line = self.process.stdout.readline() if self.process.stdout else ""
        return json.loads(line) if line else None

    def seconds(self, steps: int) -> float:
        """A step's."""
        print(steps, file=self.process.stdin, flush=True)
        return self.hear() / steps


def product_rate(dtype: str) -> float:
    """Operations a second of a product of two large matrices."""
    size, times = (8192, 20) if jax.default_backend() == "gpu" else (512, 1)
    a = jnp.ones((size, size), "bfloat16" if dtype == "bfloat16" else "float32")
    product = jax.jit(lambda a: jax.lax.fori_loop(0, times, lambda _, b: a @ b / size, a))
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        product(a).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return times * 2 * size**3 / min(seconds)


def run(chosen: list[str], models: dict[str, int], smoke: bool) -> Row:
    """All figures: for each study what it measures, under a label."""
    figures: Row = {}
    depths, images, side = ([2], 2, 8) if smoke else ([9, 27, 100], 32, 32)
    dtypes = ("bfloat16",) if smoke else ("float32", *DTYPES)
    chains, steps = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        if "exactness" in chosen:
            for dtype in dtypes:
                spec = dict(dtype=dtype, depths=depths, images=images, side=side)
                chains[dtype] = Way("exactness", **spec)
        if "network" in chosen:
            for model, dtype in itertools.product(models, dtypes[-2:]):
                for backward, unroll in itertools.product(ways_of(model), (False, True)):
                    if smoke and (unroll or backward == "remat"):
                        continue
                    spec = dict(batch=models[model], dtype=dtype, backward=backward, unroll=unroll)
                    keep = f"{folder}/{len(steps)}.npy"
                    way = Way("network", model=model, **spec, keep=keep)
                    steps[f"{model}, {dtype}", f"{backward}{', unrolled' * unroll}"] = way
        if chains:
            figures["exactness"] = {dtype: list(iter(way.hear, None)) for dtype, way in chains.items()}
        if steps:
            figures["network"] = side_by_side(steps, smoke)
    return figures


def side_by_side(ways: dict[tuple[str, str], Way], smoke: bool) -> Row:
    """The training steps' times in turns, beside what the compiler says, and gradient errors."""
    rows: dict[str, Row] = {}
    for (title, label), way in ways.items():
        facts = way.hear()
        print(f"  {title}: {label}{'' if facts else ': failed'}", file=sys.stderr, flush=True)
        if facts:
            rows.setdefault(title, {})[label] = facts | {"seconds": []}
    for title, label in itertools.chain(*[list(ways)] * (2 if smoke else TURNS)):
        if label in rows.get(title, {}):
            row = rows[title][label]
            row["seconds"].append(ways[title, label].seconds(1 if smoke else STEPS))
    for title, by_label in rows.items():
        rate = product_rate(title.split(", ")[1])
        gradients = {label: np.load(ways[title, label].spec["keep"]) for label in by_label}
        for label, row in by_label.items():
            row["floor_seconds"] = row["operations"] / rate
            for other in ("store", "remat"):  # of the same loops
                due = gradients.get(label.replace(label.split(",")[0], other))
                if due is not None:
                    row[f"error_against_{other}"] = relative_error(gradients[label], due)
    return rows


# Reporting --------------------------------------------------------------------------------------


def tables(figures: Row) -> str:
    """The figures in Markdown."""
    lines = []
    for title, rows in figures.get("network", {}).items():
        columns = "ms a step (quartiles)", "floor, ms", "temporary MB", "compile, s"
        errors = "gradient error against store", "against remat"
        lines += [f"| {title} | {' | '.join((*columns, *errors))} |", "|---" * 7 + "|"]
        for label, row in rows.items():
            low, median, high = statistics.quantiles(row["seconds"], n=4)
            cells = [
                label,
                f"{1e3 * median:.2f} ({1e3 * low:.2f} to {1e3 * high:.2f})",
                f"{1e3 * row['floor_seconds']:.2f}",
                f"{row['temporary_bytes'] / 1e6:,.1f}",
                f"{row['compile_seconds']:.0f}",
                *(
                    shown_error(row[f"error_against_{way}"]) if f"error_against_{way}" in row else ""
                    for way in ("store", "remat")
                ),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    if "exactness" in figures:
        columns = "chain", "largest error of x", "numbers of x that differ"
        columns += "gradient against remat", "against stored", "remat against stored"
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for dtype, rows in figures["exactness"].items():
            for row in rows:
                grid = "no grid" if row["grid_bits"] is None else f"grid 2^-{row['grid_bits']}"
                errors = ("against_remat", "against_stored", "remat_against_stored")
                cells = [
                    f"{row['depth']} blocks, {grid}, {dtype}",
                    shown_error(row["reconstruction"]),
                    f"{row['not_reconstructed']:,}",
                    *(shown_error(row[error]) for error in errors),
                ]
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="The ways to a gradient on the GPU at hand.")
    parser.add_argument("studies", nargs="*", default=[], help=", ".join(STUDIES))
    parser.add_argument("--models", default=",".join(MODELS), help="of revjax.list_models()")
    parser.add_argument("--batch", type=int, help="images a step; 100, or 32 of 224x224")
    parser.add_argument("--smoke", action="store_true", help="small, anywhere, nothing recorded")
    parser.add_argument("--json", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--process", help="for its own use")
    arguments = parser.parse_args()
    if arguments.process:
        study, spec = json.loads(arguments.process)
        return {"exactness": exactness, "network": network}[study](**spec)
    chosen = arguments.studies or [*STUDIES]
    if unknown := set(chosen) - set(STUDIES):
        parser.error(f"there is no study {', '.join(unknown)}; there are {', '.join(STUDIES)}.")
    names = ["revnet38"] if arguments.smoke else arguments.models.split(",")
    if unknown := set(names) - set(revjax.list_models()):
        parser.error(f"there is no model {', '.join(unknown)}; see revjax.list_models().")
    if not arguments.smoke and jax.default_backend() != "gpu":
        sys.exit("gpu.py: JAX finds no GPU here; --smoke runs anywhere.")
    models = {name: arguments.batch or (100, 32)[usual_image(name) > 32] for name in names}
    figures = run(chosen, dict.fromkeys(names, 2) if arguments.smoke else models, arguments.smoke)
    print(tables(figures))
    if arguments.smoke:
        return
    record = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    for study, found in figures.items():
        record.setdefault(study, {}).update({key: found[key] for key in found})
    record["environment"] = environment()
    arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    arguments.json.with_suffix(".md").write_text(tables(record))


if __name__ == "__main__":
    main()
