"""Loss and gradient of a network by its three backward passes, held against each other.

Command:   python benchmarks/backward_ways.py [--model revnet38] [--batch 100] [--image 32]
Hardware:  any
Figures:   benchmarks/results/backward_ways.json, told in docs/numerics.md

A network as created, in training mode, on normal images with random labels. Its gradient by
backward="reversible" and by "remat" is held against that by "store", on the grid and off it, with
float32 and with bfloat16 compute. The losses tell whether the three programs have made the same
forward pass: where they have not, the gradients differ because the functions do.
"""

# Calls with options chosen at run time, which no type checker can follow.
# pyright: reportArgumentType=false, reportCallIssue=false

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from common import RESULTS, environment, flatten, relative_error, shown_error
from flax import nnx

import revjax

BACKWARDS = ("store", "remat", "reversible")
FORMS = [(k, dtype) for dtype in ("float32", "bfloat16") for k in (14, None)]


def loss_and_gradient(
    name: str, backward: str, grid_bits: int | None, dtype: str, images: jax.Array
) -> tuple[float, np.ndarray]:
    """The loss, and its gradient by the parameters as a vector."""
    model = revjax.create_model(
        name, 10, rngs=nnx.Rngs(0), backward=backward, grid_bits=grid_bits, dtype=dtype
    )
    graph, params, variables = nnx.split(model, nnx.Param, ...)
    labels = jax.random.randint(jax.random.key(1), images.shape[:1], 0, 10)

    @jax.jit
    @jax.value_and_grad
    def compute(params, variables):
        logits = nnx.merge(graph, params, variables, copy=True)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradient = compute(params, variables)
    return float(loss), flatten(gradient)


def compare(name: str, grid_bits: int | None, dtype: str, images: jax.Array) -> dict[str, Any]:
    """A row of the table."""
    found = {way: loss_and_gradient(name, way, grid_bits, dtype, images) for way in BACKWARDS}
    _, due = found["store"]
    return {
        "grid_bits": grid_bits,
        "dtype": dtype,
        "loss": {way: loss for way, (loss, _) in found.items()},
        "gradient_error": {way: relative_error(found[way][1], due) for way in BACKWARDS[1:]},
        "reversible_against_remat": relative_error(found["reversible"][1], found["remat"][1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The three backward passes of a network.")
    parser.add_argument("--model", default="revnet38")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--image", type=int, default=32)
    parser.add_argument("--json", type=Path, default=RESULTS / "backward_ways.json")
    arguments = parser.parse_args()

    shape = (arguments.batch, arguments.image, arguments.image, 3)
    images = jax.random.normal(jax.random.key(0), shape)
    print("| | loss: store | remat | reversible | gradient: remat against store ", end="")
    print("| reversible against store | reversible against remat |\n|---|---|---|---|---|---|---|")
    rows = []
    for grid_bits, dtype in FORMS:
        row = compare(arguments.model, grid_bits, dtype, images)
        rows.append(row)
        errors = [*row["gradient_error"].values(), row["reversible_against_remat"]]
        cells = [f"{loss:.7f}" for loss in row["loss"].values()] + [*map(shown_error, errors)]
        grid = f"grid 2^-{grid_bits}" if grid_bits else "no grid"
        print(f"| {grid}, {dtype} | {' | '.join(cells)} |", flush=True)
    record = {
        "command": f"python benchmarks/backward_ways.py --model {arguments.model} "
        f"--batch {arguments.batch} --image {arguments.image}",
        **environment(),
        "rows": rows,
    }
    arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
