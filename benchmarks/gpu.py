"""Exactness, time and memory of every way to a gradient on the GPU at hand, side by side.

Command:   python benchmarks/gpu.py [exactness] [network] [--models revnet38,revnet110] [--help]
Hardware:  one GPU on which nothing else runs, and some cores, as all programs are compiled at once
Figures:   benchmarks/results/gpu.json and .md, told in docs/performance.md and docs/numerics.md

exactness  of a chain of blocks of two residual functions BN-ReLU-conv3x3-BN-ReLU-conv3x3, 32 images
           of 32x32 and 16 + 16 channels: what of the chain's input the inverse gives back, and the
           error of the reversible gradient against that of jax.checkpoint, which evaluates the same
           function, and against stored activations
network    the training step of networks of create_model, as revjax.memory has it: its time, memory
           and the error of its gradient against those of jax.checkpoint and of stored activations;
           and the loop of train.py around a reversible one, with its augmentation and sums

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
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from basic_block import residual
from gradients import flatten, relative_error, shown_error
from record import RESULTS, ROOT, environment

import revjax
from revjax.data import Dataset
from revjax.memory.network import abstract_network, training_step, usual_image, ways_of
from revjax.memory.report import compile_with_report
from revjax.training.command_line import parse_arguments
from revjax.training.compiler import compiler_options
from revjax.training.config import check_config
from revjax.training.mesh import make_mesh
from revjax.training.optimizer import learning_rate_schedule, make_optimizer
from revjax.training.state import abstract_model, draw, initial_state
from revjax.training.step import make_train_steps, put_on_device
from revjax.training.votes import cast

STUDIES = ("exactness", "network")
MODELS = ("revnet38", "revnet110")
DTYPES = ("tf32", "bfloat16")
STEPS, TURNS = 40, 5
LOOP = "train.py, reversible, unrolled"
TINY = dict(depths=[2], images=2, side=8)
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


def loop(model: str, batch: int, dtype: str) -> None:
    """The same of the loop of train.py by the recipe for CIFAR-10, on images of noise."""
    sys.path.insert(0, str(ROOT))  # for what the files of configs/ share
    flags = [f"--config.model.dtype={'bfloat16' if dtype == 'bfloat16' else 'float32'}"]
    flags += ["--config.model.unroll=true", f"--config.batch_size={batch}"]
    arguments: Any = parse_arguments(["", "--config", f"{ROOT}/configs/cifar10_{model}.py", *flags])
    config = check_config(arguments.config)
    mesh, optimizer = make_mesh(config), make_optimizer(config.optim)
    schedule = learning_rate_schedule(config.optim)
    steps = make_train_steps(config, abstract_model(config), optimizer, schedule, mesh)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (50_000, 32, 32, 3), np.uint8)
    labels = random.integers(0, 10, 50_000, np.int32)
    dataset = Dataset("noise", images, labels, images[:100], labels[:100], 10)
    data = put_on_device(config.data, dataset, mesh)["train"]
    state = draw(partial(initial_state, config, optimizer), mesh)
    indices = random.integers(0, 50_000, (100, batch), np.int32)
    compiled, report = compile_with_report(
        steps, state, data, indices, np.int32(0), cast(mesh, False)
    )
    state, _ = compiled(state, data, indices, np.int32(2), cast(mesh, False))
    jax.block_until_ready(state)
    tell(report._asdict())
    for line in sys.stdin:
        began = time.perf_counter()
        state, _ = compiled(state, data, indices, np.int32(line), cast(mesh, False))
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


def run(chosen: list[str], models: list[tuple[str, int]], depths: list[int]) -> Iterator[Row]:
    """Figures as they are there: of a study a table, by its title its rows, by their labels."""
    chains: dict[str, Way] = {}
    if "exactness" in chosen:
        spec = dict(depths=depths, images=32, side=32)
        chains = {dtype: Way("exactness", dtype=dtype, **spec) for dtype in ("float32", *DTYPES)}
    with tempfile.TemporaryDirectory() as folder:
        networks = itertools.product(models, DTYPES) if "network" in chosen else ()
        for (model, batch), dtype in networks:
            title, ways = f"{model}, batch {batch}, {dtype}", dict[str, Way]()
            for backward, unroll in itertools.product(ways_of(model), (False, True)):
                label = backward + ", unrolled" * unroll
                spec = dict(model=model, batch=batch, dtype=dtype)
                how = dict(backward=backward, unroll=unroll, keep=f"{folder}/{title}{label}")
                ways[label] = Way("network", **spec, **how)
            if (ROOT / f"configs/cifar10_{model}.py").exists() and "reversible" in ways:
                ways[LOOP] = Way("loop", model=model, batch=batch, dtype=dtype)
            rows = heard(title, ways)
            yield from exactness_of(chains)  # before anything is timed
            chains = {}
            timed(title, ways, rows, STEPS)
            yield {"network": {title: rows}}
    yield from exactness_of(chains)


def smoke() -> Iterator[Row]:
    """The same of little."""
    yield from exactness_of({"bfloat16": Way("exactness", dtype="bfloat16", **TINY)})
    title, spec = "revnet38, batch 2, bfloat16", dict(model="revnet38", batch=2, dtype="bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        ways = {}
        for backward in ("remat", "reversible"):
            how = dict(backward=backward, unroll=False, keep=f"{folder}/{backward}")
            ways[backward] = Way("network", **spec, **how)
        rows = heard(title, ways)
        timed(title, ways, rows, steps=1)
        yield {"network": {title: rows}}


def exactness_of(chains: dict[str, Way]) -> Iterator[Row]:
    for dtype, way in chains.items():
        yield {"exactness": {dtype: list(iter(way.hear, None))}}


def heard(title: str, ways: dict[str, Way]) -> dict[str, Row]:
    """What each way says of itself, once it is compiled; nothing of one that has failed."""
    facts = {}
    for label, way in ways.items():
        if said := way.hear():
            facts[label] = said | {"seconds": []}
        print(f"  {title}: {label}{'' if said else ': failed'}", file=sys.stderr, flush=True)
    return facts


def timed(title: str, ways: dict[str, Way], rows: dict[str, Row], steps: int) -> None:
    """Give the rows the times of all ways in turns, and gradient errors; the ways are ended."""
    for _ in range(TURNS):
        for label, row in rows.items():
            row["seconds"].append(ways[label].seconds(steps))
    rate = product_rate(title.split(", ")[-1])
    gradients = {
        label: np.load(f"{ways[label].spec['keep']}.npy")
        for label in rows
        if "keep" in ways[label].spec
    }
    for label, row in rows.items():
        row["floor_seconds"] = row["operations"] / rate
        for other in ("store", "remat"):  # of the same loops
            due = gradients.get(label.replace(label.split(",")[0], other))
            if label in gradients and due is not None:
                row[f"error_against_{other}"] = relative_error(gradients[label], due)
    for way in ways.values():
        way.process.kill()


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
                    shown_error(row[f"error_against_{way}"])
                    if f"error_against_{way}" in row
                    else ""
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
    parser.add_argument("--depths", default="27,100", help="of the chains, in blocks")
    parser.add_argument("--batch", type=int, help="images a step; 100, or 32 of 224x224")
    parser.add_argument("--smoke", action="store_true", help="small, anywhere, nothing recorded")
    parser.add_argument("--json", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--process", help="for its own use")
    arguments = parser.parse_args()
    if arguments.process:
        study, spec = json.loads(arguments.process)
        return {"exactness": exactness, "network": network, "loop": loop}[study](**spec)
    chosen = arguments.studies or [*STUDIES]
    if unknown := set(chosen) - set(STUDIES):
        parser.error(f"there is no study {', '.join(unknown)}; there are {', '.join(STUDIES)}.")
    names = arguments.models.split(",")
    if unknown := set(names) - set(revjax.list_models()):
        parser.error(f"there is no model {', '.join(unknown)}; see revjax.list_models().")
    if not arguments.smoke and jax.default_backend() != "gpu":
        sys.exit("gpu.py: JAX finds no GPU here; --smoke runs anywhere.")
    usual = {32: 100, 224: 32}  # images a step, by their side
    models = [(name, arguments.batch or usual[usual_image(name)]) for name in names]
    depths = [int(depth) for depth in arguments.depths.split(",")]
    record = {}
    if arguments.json.exists() and not arguments.smoke:
        record = json.loads(arguments.json.read_text())
    for found in smoke() if arguments.smoke else run(chosen, models, depths):
        for study, rows in found.items():
            record.setdefault(study, {}).update(rows)
        print(tables(found), flush=True)
        if not arguments.smoke:
            record["environment"] = environment()
            arguments.json.write_text(json.dumps(record, indent=1) + "\n")
            arguments.json.with_suffix(".md").write_text(tables(record))


if __name__ == "__main__":
    main()
