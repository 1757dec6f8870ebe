"""Loss and gradient of a network by its three backward passes, held against each other.

Command:   python benchmarks/backward_ways.py [--batch 100] --config FILE --workdir DIR
Hardware:  any
Figures:   benchmarks/results/backward_ways.json, told in docs/numerics.md

A network in training mode, with the parameters of the newest checkpoint of a run of train.py, whose
flags these are, on the first images of its training data. Its gradient by backward="reversible" and
by "remat" is held against that by "store", on the grid and off it, with float32 and with bfloat16
compute. The losses tell whether the three programs have made the same forward pass: where they have
not, the gradients differ because the functions do.
"""

# Calls with options chosen at run time, which no type checker can follow.
# pyright: reportArgumentType=false, reportCallIssue=false

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from gradients import flatten, relative_error, shown_error
from record import RESULTS, ROOT, environment

from revjax.data import load_dataset, normalize
from revjax.training.checkpoints import Checkpoints
from revjax.training.command_line import parse_arguments
from revjax.training.config import Config, check_config
from revjax.training.mesh import make_mesh
from revjax.training.optimizer import make_optimizer
from revjax.training.state import TrainState, build_model, initial_state
from revjax.training.step import put_on_device

sys.path.insert(0, str(ROOT))  # for what the files of configs/ share
BACKWARDS = ("store", "remat", "reversible")
FORMS = [(k, dtype) for dtype in ("float32", "bfloat16") for k in (14, None)]


def load_run(flags: list[str]) -> tuple[Config, TrainState]:
    """The config and the newest checkpoint of the run that the flags of train.py name."""
    arguments = parse_arguments(["", *flags])
    if isinstance(arguments, str):
        sys.exit(arguments)
    config = check_config(arguments.config)
    template = jax.eval_shape(partial(initial_state, config, make_optimizer(config.optim)))
    checkpoints = Checkpoints(Path(arguments.workdir) / "checkpoints", read_only=True)
    restored = checkpoints.restore_newest(template, print)
    if restored is None:
        sys.exit(f"{arguments.workdir} has no checkpoint: train there first.")
    return config, restored.state


def loss_and_gradient(config: Config) -> Callable[..., tuple[float, np.ndarray]]:
    """A compiled `(state, images, labels)` to the loss and its gradient, as a vector.

    The gradient is that by the parameters, of the network in training mode.
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: build_model(config)))
    kept = nnx.BatchStat if config.model.grid_bits is None else ...  # else the stream's peak too

    @jax.jit
    @jax.value_and_grad
    def compute(params, variables, images, labels):
        logits = nnx.merge(graph, params, variables, copy=True)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def of_state(state, images, labels):
        variables = nnx.filter_state(state.variables, kept)
        loss, gradient = compute(state.params, variables, images, labels)
        return float(loss), flatten(gradient)

    return of_state


def main() -> None:
    parser = argparse.ArgumentParser(description="The three backward passes of a trained network.")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--json", type=Path, default=RESULTS / "backward_ways.json")
    arguments, flags = parser.parse_known_args()
    config, state = load_run(flags)
    dataset = load_dataset(config.data.name, data_dir=config.data.dir)
    data = put_on_device(config.data, dataset, make_mesh(config))["train"]
    images = normalize(data.images[: arguments.batch], data.normalization)
    labels = data.labels[: arguments.batch]

    print("| | loss: store | remat | reversible | gradient: remat against store ", end="")
    print("| reversible against store | reversible against remat |\n|---|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    for grid_bits, dtype in FORMS:
        losses, gradients = {}, {}
        for way in BACKWARDS:
            model = dataclasses.replace(
                config.model, backward=way, grid_bits=grid_bits, dtype=dtype
            )
            compute = loss_and_gradient(dataclasses.replace(config, model=model))
            losses[way], gradients[way] = compute(state, images, labels)
        errors = {
            f"{a} against {b}": relative_error(gradients[a], gradients[b])
            for a, b in (("remat", "store"), ("reversible", "store"), ("reversible", "remat"))
        }
        rows.append({"grid_bits": grid_bits, "dtype": dtype, "loss": losses, "gradient": errors})
        cells = [f"{loss:.7f}" for loss in losses.values()] + [*map(shown_error, errors.values())]
        grid = f"grid 2^-{grid_bits}" if grid_bits else "no grid"
        print(f"| {grid}, {dtype} | {' | '.join(cells)} |", flush=True)
    record = {
        "model": config.model.name,
        "steps_trained": int(state.step),
        "batch": arguments.batch,
        **environment(),
        "rows": rows,
    }
    arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
