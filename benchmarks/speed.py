"""Time of a gradient, or of a training step, by each way to it, side by side.

Command:   python benchmarks/speed.py [chain] [network] [--depths 16] [--models NAME] [--json FILE]
Hardware:  any; nothing else should run on it
Figures:   benchmarks/results/speed.json, told in docs/performance.md

chain      the gradient, by parameters and input, of a chain of blocks of two residual functions
           BN-ReLU-conv3x3-BN-ReLU-conv3x3, 32 images of 32x32 and 16 + 16 channels, float32
network    the training step of a RevNet of create_model, 32x32 images, as revjax.memory has it

The forms take turns, step by step, so that what else the machine does falls on all of them; each
figure is the median of their times, with the quartiles. Beside it stand the compiler's figures.
--smoke makes all of it small.
"""

# Calls with options chosen at run time, which no type checker can follow.
# pyright: reportArgumentType=false, reportCallIssue=false

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from basic_block import residual
from flax import nnx
from record import environment

import revjax
from revjax import list_models
from revjax.memory.network import abstract_network, training_step
from revjax.memory.report import MemoryReport, compile_with_report

STORED = ("stored, scanned", "stored, unrolled")
UNROLLED_BLOCKS = 16  # at most: longer programs take minutes to compile


class Form(NamedTuple):
    """A jitted function, arguments to run it on, and whether it takes the first one back."""

    function: Any
    arguments: tuple[Any, ...]
    donates: bool


def chain_forms(depth: int, batch: int, side: int, channels: int) -> dict[str, Form]:
    """The ways to the gradient of a chain."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    shape = (depth, 3, 3, channels, channels)

    def layer():
        kernel = jax.random.normal(next(keys), shape) * (2 / (9 * channels)) ** 0.5
        return jnp.ones((depth, 1, 1, 1, channels)), jnp.zeros((depth, 1, 1, 1, channels)), kernel

    stacked = tuple(tuple(layer() for _ in range(2)) for _ in range(2))
    x = tuple(jax.random.normal(next(keys), (2, batch, side, side, channels)))
    listed = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(depth)]

    def form(params, backward, grid_bits):
        def loss(params, x):
            chain = dict(backward=backward, grid_bits=grid_bits)
            y1, y2 = revjax.rev_chain_apply(residual, residual, params, x, **chain)
            return (y1**2).sum() + (y2**2).sum()

        return Form(jax.jit(jax.grad(loss, argnums=(0, 1))), (params, x), donates=False)

    forms = {"stored, scanned": form(stacked, "store", None)}
    if depth <= UNROLLED_BLOCKS:
        forms["stored, unrolled"] = form(listed, "store", None)
    return forms | {
        "jax.checkpoint a block, scanned": form(stacked, "remat", None),
        "reversible, no grid": form(stacked, "reversible", None),
        "reversible, grid 2^-14": form(stacked, "reversible", 14),
    }


def network_forms(name: str, batch: int, image: int) -> dict[str, Form]:
    """The ways of a network's training step, from one initial state."""
    ways = {
        "stored, scanned": ("store", None),
        "jax.checkpoint a block, scanned": ("remat", None),
        "reversible, no grid": ("reversible", None),
        "reversible, grid 2^-14": ("reversible", 14),
    }
    images = jax.random.normal(jax.random.key(1), (batch, image, image, 3))
    labels = jnp.arange(batch, dtype=jnp.int32) % 10
    forms = {}
    for label, (backward, grid_bits) in ways.items():
        network = abstract_network(name, backward, "float32", num_classes=10, grid_bits=grid_bits)
        step, (abstract, _, _) = training_step(network, batch, image)
        made = revjax.create_model(
            name, 10, rngs=nnx.Rngs(0), backward=backward, grid_bits=grid_bits
        )
        _, params, variables = nnx.split(made, nnx.Param, ...)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract[2])
        forms[label] = Form(step, ((params, variables, zeros), images, labels), donates=True)
    return forms


def measure(forms: dict[str, Form], repeats: int) -> dict[str, dict[str, Any]]:
    """A row for each form, after one round that is not counted."""
    compiled: dict[str, Any] = {}
    reports: dict[str, MemoryReport] = {}
    for label, form in forms.items():
        compiled[label], reports[label] = compile_with_report(form.function, *form.arguments)
    arguments = {label: form.arguments for label, form in forms.items()}
    seconds: dict[str, list[float]] = {label: [] for label in forms}
    for _ in range(repeats + 1):
        for label, form in forms.items():
            began = time.perf_counter()
            out = jax.block_until_ready(compiled[label](*arguments[label]))
            seconds[label].append(time.perf_counter() - began)
            if form.donates:
                arguments[label] = (out, *arguments[label][1:])
            del out
    rows = {}
    for label in forms:
        low, median, high = np.percentile(seconds[label][1:], [25, 50, 75]).tolist()
        rows[label] = {"seconds": median, "quartiles": [low, high], **reports[label]._asdict()}
    stored = min(rows[label]["seconds"] for label in STORED if label in rows)
    for row in rows.values():
        row["time_against_stored"] = row["seconds"] / stored
    return rows


def print_table(title: str, rows: dict[str, dict[str, Any]]) -> None:
    print(f"\n{title}\n")
    print("| | time, s (quartiles) | against the faster stored | temporary MB | operations, 10^9 |")
    print("|---|---|---|---|---|")
    for label, row in rows.items():
        low, high = row["quartiles"]
        cells = [
            f"{row['seconds']:.3g} ({low:.3g} to {high:.3g})",
            f"{row['time_against_stored']:.2f}",
            f"{row['temporary_bytes'] / 1e6:,.1f}",
            f"{row['operations'] / 1e9:,.1f}",
        ]
        print(f"| {label} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time by each way to the gradient.")
    parser.add_argument("studies", nargs="*", default=[], help="chain, network [both]")
    parser.add_argument("--depths", type=int, nargs="+", default=[16])
    parser.add_argument("--models", nargs="+", default=["revnet110"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--smoke", action="store_true", help="a small form of all")
    parser.add_argument("--json", type=Path, help="a file to add the figures to")
    arguments = parser.parse_args()
    chosen = arguments.studies or ["chain", "network"]
    if unknown := set(chosen) - {"chain", "network"}:
        parser.error(f"there is no study {', '.join(unknown)}; there are chain, network.")

    if unknown := set(arguments.models) - {name for name in list_models() if "rev" in name}:
        parser.error(f"--models: {', '.join(unknown)} is no RevNet of revjax.list_models().")
    if min(arguments.depths) < 1 or arguments.batch < 1 or arguments.repeats < 1:
        parser.error("--depths, --batch and --repeats must be 1 or more.")
    batch, side, repeats = arguments.batch, 32, arguments.repeats
    if arguments.smoke:
        batch, side, repeats = 2, 8, 1
        arguments.depths, arguments.models = [2], ["revnet38"]
    studies = {}
    if "chain" in chosen:
        for depth in arguments.depths:
            title = f"chain of {depth} blocks, batch {batch}, {side}x{side}"
            studies[title] = partial(chain_forms, depth, batch, side, 16)
    if "network" in chosen:
        for name in arguments.models:
            title = f"{name}, training step, batch {batch}, {side}x{side}"
            studies[title] = partial(network_forms, name, batch, side)

    record: dict[str, Any] = {}
    if arguments.json and arguments.json.exists():
        record = json.loads(arguments.json.read_text())
    for title, make_forms in studies.items():
        rows = measure(make_forms(), repeats)
        print_table(title, rows)
        record[title] = {**environment(), "repeats": repeats, "forms": rows}
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
