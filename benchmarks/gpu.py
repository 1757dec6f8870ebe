"""Exactness, time and memory of every way to a gradient on the GPU at hand, side by side.

Command:   python benchmarks/gpu.py [chains] [gradients] [steps] [--models revnet38,revnet110]
Hardware:  one GPU on which nothing else runs, and some cores, as programs are compiled side by side
Figures:   benchmarks/results/gpu.json and .md, told in docs/performance.md and docs/numerics.md

chains     of blocks of two residual functions BN-ReLU-conv3x3-BN-ReLU-conv3x3, 32 images of 32x32
           and 16 + 16 channels: what of the chain's input the inverse gives back, and the error of
           the reversible gradient against that of jax.checkpoint, which has the same forward pass,
           and against stored activations
gradients  of networks of create_model: the same errors, and those of the batch statistics, which
           tell whether two programs have the same forward pass
steps      training steps of networks, as revjax.memory has them: time and memory; the loop of
           train.py around a reversible one, with its augmentation and sums; and four networks in
           one program, by vmap, as seeds of a table could train: a fourth of the program's time
           and of its operations, and all of its memory

"float32" multiplies in float32, "tf32" is what JAX does with float32 on such GPUs by default, and
"bfloat16" has convolutions in bfloat16. Networks are in tf32 and in bfloat16.

Programs whose numbers are compared are compiled by one process, as each chooses the algorithms of
its convolutions by timing them. Steps that are timed are a process each, all compiled before any is
run; they take turns, many steps at a time, and a time is the median of the turns. They ask of the
compiler what train.py does: CUDA graphs. --smoke makes all of it small and records nothing.

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
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from basic_block import residual
from flax import nnx
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

STUDIES = ("chains", "gradients", "steps")
MODELS = ("revnet38", "revnet110")
DTYPES = ("tf32", "bfloat16")
STEPS, TURNS = 40, 5
WAYS = [*itertools.product(("store", "remat", "reversible"), (False, True))]
LOOP = "train.py, reversible, unrolled"
SEEDS = 4
TOGETHER = f"reversible, unrolled, {SEEDS} seeds by vmap"
Row = dict[str, Any]
Found = tuple[str, str, Any, list[str]]  # of a study a table: its title, its rows; what has failed


# What a process does ----------------------------------------------------------------------------


def chains(dtype: str, depths: list[int], images: int, side: int) -> None:
    """Print a row for each depth, on the grid and off it."""
    compute = "bfloat16" if dtype == "bfloat16" else None
    with jax.default_matmul_precision("float32" if dtype == "float32" else None):
        for depth, grid_bits in itertools.product(depths, (14, None)):
            tell(chain_row(depth, grid_bits, partial(residual, dtype=compute), images, side))


def chain_row(depth: int, grid_bits: int | None, f: Callable, images: int, side: int) -> Row:
    """How exact a chain of f is."""
    channels, random = 16, np.random.default_rng(0)
    ones = np.ones((depth, channels), np.float32)

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


def first_step(model: str, batch: int, dtype: str, backward: str, unroll: bool = False) -> Any:
    """The training step of a network, and its arguments before the first one."""
    compute = "bfloat16" if dtype == "bfloat16" else "float32"
    net = abstract_network(model, backward, compute, num_classes=10, unroll=unroll or 1)
    function, (state, images, _) = training_step(net, batch, usual_image(model))
    random = np.random.default_rng(0)
    params, variables, momentum = state
    params = jax.tree_util.tree_map_with_path(partial(drawn, random), params)
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), variables)
    momentum = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), momentum)
    state = jax.device_put((params, variables, momentum))
    images = jnp.asarray(random.normal(size=images.shape), jnp.float32)
    return function, (state, images, jnp.arange(batch, dtype=jnp.int32) % 10)


def gradients(model: str, batch: int, dtype: str) -> None:
    """Print how far the gradients and batch statistics of the three ways are from each other."""
    found = {}
    for backward in ("reversible", "remat", "store"):
        function, arguments = first_step(model, batch, dtype, backward)
        _, variables, momentum = function(*arguments)
        # After one step momentum is the gradient, with weight decay.
        found[backward] = flatten(momentum), flatten(nnx.filter_state(variables, nnx.BatchStat))
    row = {}
    for name, a, b in (
        ("against_remat", "reversible", "remat"),
        ("against_stored", "reversible", "store"),
        ("remat_against_stored", "remat", "store"),
    ):
        row[name], row[f"statistics_{name}"] = map(relative_error, found[a], found[b])
    tell(row)


def steps(
    model: str,
    batch: int,
    dtype: str,
    backward: str,
    unroll: bool,
    xla_defaults: bool = False,
    seeds: int = 1,
) -> None:
    """Print what the compiler says; then, for each number read, the seconds of as many steps.

    With seeds, so many networks train in one program, on a batch each; seconds and operations are
    those of all over their number, bytes those of all. Their numbers are equal, which no compiler
    can tell.
    """
    function, (state, *batch_of) = first_step(model, batch, dtype, backward, unroll)
    if seeds > 1:
        function = jax.jit(jax.vmap(function), donate_argnums=0)
        state, *batch_of = jax.tree.map(
            lambda leaf: jnp.asarray(np.stack([leaf] * seeds)), (state, *batch_of)
        )
    options = {} if xla_defaults else compiler_options(jax.default_backend())
    compiled, report = compile_with_report(function, state, *batch_of, compiler_options=options)
    state = jax.block_until_ready(compiled(state, *batch_of))
    tell(report._asdict() | {"operations": report.operations // seeds})
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            state = compiled(state, *batch_of)
        jax.block_until_ready(state)
        tell((time.perf_counter() - began) / seeds)


def loop(model: str, batch: int, dtype: str) -> None:
    """The same of the loop of train.py by the recipe for CIFAR-10, on images of noise."""
    sys.path.insert(0, str(ROOT))  # for what the files of configs/ share
    flags = [f"--config.model.dtype={'bfloat16' if dtype == 'bfloat16' else 'float32'}"]
    flags += ["--config.model.unroll=true", f"--config.batch_size={batch}"]
    arguments: Any = parse_arguments(["", "--config", f"{ROOT}/configs/cifar10_{model}.py", *flags])
    config = check_config(arguments.config)
    mesh, optimizer = make_mesh(config), make_optimizer(config.optim)
    schedule = learning_rate_schedule(config.optim)
    function = make_train_steps(config, abstract_model(config), optimizer, schedule, mesh)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (50_000, 32, 32, 3), np.uint8)
    labels = random.integers(0, 10, 50_000, np.int32)
    dataset = Dataset("noise", images, labels, images[:100], labels[:100], 10)
    data = put_on_device(config.data, dataset, mesh)["train"]
    state = draw(partial(initial_state, config, optimizer), mesh)
    indices = random.integers(0, 50_000, (100, batch), np.int32)
    compiled, report = compile_with_report(
        function, state, data, indices, np.int32(0), cast(mesh, False)
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
        pipe: Any = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, **pipe)

    def hear(self) -> Any:
        """What it says next; None once it has ended."""
        line = self.process.stdout.readline() if self.process.stdout else ""
        return json.loads(line) if line else None

    def seconds(self, steps: int) -> float:
        """A step's."""
        print(steps, file=self.process.stdin, flush=True)
        seconds = self.hear()
        if seconds is None:
            sys.exit(f"gpu.py: the process of {self.spec} has ended with {self.process.wait()}.")
        return seconds / steps


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


def run(
    chosen: list[str], models: list[tuple[str, int]], depths: list[int], xla_defaults: bool
) -> Iterator[Found]:
    """Figures as they are there."""
    exact: list[tuple[str, str, Way]] = []
    if "chains" in chosen:
        spec = dict(depths=depths, images=32, side=32)
        exact += [("chains", d, Way("chains", dtype=d, **spec)) for d in ("float32", *DTYPES)]
    networks = [
        (f"{model}, batch {batch}, {dtype}", dict(model=model, batch=batch, dtype=dtype))
        for (model, batch), dtype in itertools.product(models, DTYPES)
    ]
    if "gradients" in chosen:
        exact += [("gradients", title, Way("gradients", **spec)) for title, spec in networks]
    for study, title, way in exact:
        rows = list(iter(way.hear, None))
        yield study, title, rows, [] if rows else [f"{study}, {title}"]
    for title, spec in networks if "steps" in chosen else ():
        if xla_defaults:
            title, spec = f"XLA's defaults, {title}", spec | {"xla_defaults": True}
        ways = {
            backward + ", unrolled" * unroll: Way("steps", **spec, backward=backward, unroll=unroll)
            for backward, unroll in WAYS
        }
        if (ROOT / f"configs/cifar10_{spec['model']}.py").exists() and not xla_defaults:
            ways[LOOP] = Way("loop", **spec)
            options = dict(backward="reversible", unroll=True, seeds=SEEDS)
            ways[TOGETHER] = Way("steps", **spec, **options)
        yield timed(title, ways, STEPS)


def smoke() -> Iterator[Found]:
    """The same of little."""
    chain = Way("chains", dtype="bfloat16", depths=[2], images=2, side=8)
    title, spec = "revnet38, batch 2, tf32", dict(model="revnet38", batch=2, dtype="tf32")
    gradient = Way("gradients", **spec)
    options = dict(backward="reversible", unroll=False, seeds=2)
    ways = {"reversible, 2 seeds by vmap": Way("steps", **spec, **options)}
    ways[LOOP] = Way("loop", **spec)
    yield "chains", "bfloat16", list(iter(chain.hear, None)), []
    yield "gradients", title, list(iter(gradient.hear, None)), []
    yield timed(title, ways, 1)


def timed(title: str, ways: dict[str, Way], number: int) -> Found:
    """What each way says of itself, with its times in turns; nothing of one that has failed."""
    rows, failed = {}, []
    for label, way in ways.items():
        if said := way.hear():
            rows[label] = said | {"seconds": []}
        else:
            failed.append(f"{title}, {label}")
        print(f"  {title}: {label}{'' if said else ': failed'}", file=sys.stderr, flush=True)
    for _ in range(TURNS):
        for label, row in rows.items():
            row["seconds"].append(ways[label].seconds(number))
    rate = product_rate(title.split(", ")[-1])
    for row in rows.values():
        row["floor_seconds"] = row["operations"] / rate
    for way in ways.values():
        way.process.kill()
    return "steps", title, rows, failed


# Reporting --------------------------------------------------------------------------------------


def tables(figures: Row) -> str:
    """The figures in Markdown."""
    lines = []

    def table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
        lines.extend(("| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"))
        lines.extend("| " + " | ".join(row) + " |" for row in rows)
        lines.append("")

    errors = ("against_remat", "against_stored", "remat_against_stored")
    heads = ("reversible against remat", "against stored", "remat against stored")
    if "chains" in figures:
        table(
            ("chain", "largest error of x", "numbers of x that differ", *heads),
            (
                (
                    f"{row['depth']} blocks, {shown_grid(row['grid_bits'])}, {dtype}",
                    shown_error(row["reconstruction"]),
                    f"{row['not_reconstructed']:,}",
                    *(shown_error(row[error]) for error in errors),
                )
                for dtype, rows in figures["chains"].items()
                for row in rows
            ),
        )
    if "gradients" in figures:
        table(
            ("gradient; batch statistics", *heads),
            (
                (
                    title,
                    *(
                        f"{shown_error(row[error])}; {shown_error(row[f'statistics_{error}'])}"
                        for error in errors
                    ),
                )
                for title, (row,) in figures["gradients"].items()
            ),
        )
    for title, rows in figures.get("steps", {}).items():
        table(
            (title, "ms a step (quartiles)", "floor, ms", "temporary MB", "compile, s"),
            (
                (
                    label,
                    "{1:.2f} ({0:.2f} to {2:.2f})".format(
                        *(1e3 * second for second in statistics.quantiles(row["seconds"], n=4))
                    ),
                    f"{1e3 * row['floor_seconds']:.2f}",
                    f"{row['temporary_bytes'] / 1e6:,.1f}",
                    f"{row['compile_seconds']:.0f}",
                )
                for label, row in rows.items()
            ),
        )
    return "\n".join(lines)


def shown_grid(grid_bits: int | None) -> str:
    return "no grid" if grid_bits is None else f"grid 2^-{grid_bits}"


def main() -> None:
    parser = argparse.ArgumentParser(description="The ways to a gradient on the GPU at hand.")
    parser.add_argument("studies", nargs="*", default=[], help=", ".join(STUDIES))
    parser.add_argument("--models", default=",".join(MODELS), help="of revjax.list_models()")
    parser.add_argument("--depths", default="27,100", help="of the chains, in blocks")
    parser.add_argument("--batch", type=int, help="images a step; 100, or 32 of 224x224")
    parser.add_argument("--xla_defaults", action="store_true", help="steps with XLA's own options")
    parser.add_argument("--smoke", action="store_true", help="small, anywhere, nothing recorded")
    parser.add_argument("--json", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--process", help="for its own use")
    arguments = parser.parse_args()
    if arguments.process:
        study, spec = json.loads(arguments.process)
        does = {"chains": chains, "gradients": gradients, "steps": steps, "loop": loop}
        return does[study](**spec)
    chosen = arguments.studies or [*STUDIES]
    if unknown := set(chosen) - set(STUDIES):
        parser.error(f"there is no study {', '.join(unknown)}; there are {', '.join(STUDIES)}.")
    names = arguments.models.split(",")
    if unknown := set(names) - set(revjax.list_models()):
        parser.error(f"there is no model {', '.join(unknown)}; see revjax.list_models().")
    if fixed := [name for name in names if "reversible" not in ways_of(name)]:
        parser.error(f"{', '.join(fixed)} is no reversible network: give some as revnet38.")
    # Else the first process would take the GPU's memory for itself.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if not arguments.smoke and jax.default_backend() != "gpu":
        sys.exit("gpu.py: JAX finds no GPU here; --smoke runs anywhere.")
    usual = {32: 100, 224: 32}  # images a step, by their side
    models = [(name, arguments.batch or usual[usual_image(name)]) for name in names]
    depths = [int(depth) for depth in arguments.depths.split(",")]
    record: Row = {}
    if arguments.json.exists() and not arguments.smoke:
        record = json.loads(arguments.json.read_text())
    asked = chosen, models, depths, arguments.xla_defaults
    missing = []
    for study, title, rows, failed in smoke() if arguments.smoke else run(*asked):
        missing += failed
        if not rows:
            continue
        print(tables({study: {title: rows}}), flush=True)
        if not arguments.smoke:
            record.setdefault(study, {})[title] = rows
            record.setdefault("environments", {})[f"{study}: {title}"] = environment()
            arguments.json.write_text(json.dumps(record, indent=1) + "\n")
            arguments.json.with_suffix(".md").write_text(tables(record))
    if missing:
        sys.exit(f"gpu.py: these have failed, as they say above: {'; '.join(missing)}.")


if __name__ == "__main__":
    main()
