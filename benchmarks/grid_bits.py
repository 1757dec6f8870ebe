"""Accuracy, range and exactness against grid_bits: the study behind the default, 14.

Command:   python benchmarks/grid_bits.py [digits] [cifar10] [untrained] [--data_dir DIR] [--smoke]
           (those of the figures stand in docs/numerics.md)
Hardware:  any
Figures:   benchmarks/results/grid_bits.json, told in docs/numerics.md

digits      trains configs/digits_revnet.py at every grid_bits
cifar10     the same for a narrow RevNet and a few steps of the CIFAR recipe
untrained   the largest |stream| of networks of growing depth before training

After the last run of every grid_bits, the gradient of a training batch at the parameters it ended
with is held against backward="remat" of the same function, with float32 and with bfloat16 compute:
the error of the reconstruction, since both have the same forward pass. (A program that stores its
activations is compiled otherwise, and may round otherwise in its forward pass.) And that gradient
is held against the one in float32 without a grid at the same parameters: what rounding to the grid
changes, and beside it what bfloat16 compute changes.

--smoke takes a few steps of everything that needs no download, and writes nothing.
"""

# Calls with options chosen at run time, which no type checker can follow.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from gradients import flatten, relative_error, shown_error
from record import RESULTS, ROOT, environment

import revjax
from revjax.data import Dataset, load_dataset, normalize
from revjax.training.command_line import parse_arguments
from revjax.training.config import Config, check_config
from revjax.training.evaluation import Evaluator
from revjax.training.feed import MemoryFeed
from revjax.training.interrupt import StopSignals
from revjax.training.mesh import make_mesh
from revjax.training.optimizer import learning_rate_schedule, make_optimizer
from revjax.training.state import TrainState, abstract_model, build_model, draw, initial_state
from revjax.training.step import Split, make_train_steps, put_on_device
from revjax.training.votes import cast

sys.path.insert(0, str(ROOT))  # for what the files of configs/ share
Row = dict[str, Any]
DISPATCH = 50  # training steps given to the device at once
NARROW = {"name": "revnet", "units": (3, 3, 3), "filters": (16, 16, 32, 56)}  # on CIFAR-10
TEST_EXAMPLES = 2000  # of CIFAR-10
MANY_UNITS = ((3, 3, 3), (9, 9, 9), (50, 50, 50))


def load_config(name: str, **values: int) -> Config:
    """A config of configs/, with some of its values replaced."""
    overrides = [f"--config.{key}={value}" for key, value in values.items()]
    arguments = parse_arguments(["", "--config", str(ROOT / f"configs/{name}.py"), *overrides])
    assert not isinstance(arguments, str)
    return check_config(arguments.config)


def with_model(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


@cache
def initial_of(config: Config) -> TrainState:
    initial = partial(initial_state, config, make_optimizer(config.optim))
    return draw(initial, make_mesh(config))


def initial(config: Config, seed: int) -> TrainState:
    """The state before the first step, which is the same for every grid."""
    seeded = dataclasses.replace(config, seed=seed)
    return initial_of(seeded if config.model.grid_bits is None else with_model(seeded, grid_bits=0))


def train(config: Config, dataset: Dataset, seeds: int) -> tuple[list[Row], TrainState]:
    """Test accuracy and largest |stream| of a run for each seed, and the last run's end.

    The seeds draw the parameters and the order of examples; the augmentation is that of the
    config's seed, so that all runs share one program.
    """
    model, optimizer = abstract_model(config), make_optimizer(config.optim)
    mesh, schedule = make_mesh(config), learning_rate_schedule(config.optim)
    data = put_on_device(config.data, dataset, mesh)
    train_steps = make_train_steps(config, model, optimizer, schedule, mesh)
    evaluate = Evaluator(config, model, MemoryFeed(config, data, mesh), mesh)
    rows = []
    for seed in range(seeds):
        state = jax.tree.map(jnp.copy, initial(config, seed))  # the steps donate it
        feed = MemoryFeed(dataclasses.replace(config, seed=seed), data, mesh)
        for start in range(0, config.steps, DISPATCH):
            steps = range(start, min(start + DISPATCH, config.steps))
            batches = feed.training(start, len(steps))
            number, votes = np.int32(len(steps)), cast(mesh, stop=False)
            state, report = train_steps(state, *batches, number, votes)
            if report.failed_step:
                sys.exit(f"The loss or its gradient is not finite at step {report.failed_step}.")
        (test,) = evaluate(state, ["test"], StopSignals())
        rows.append(
            {
                "test_accuracy": test["accuracy"],
                "train_loss": float(report.loss),
                "stream_peak": float(state.stream_peak) if model.has_stream else None,
            }
        )
    return rows, state


@cache
def make_gradient(config: Config) -> Any:
    """The jitted gradient of a config's network in training mode."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: build_model(config)))

    @jax.jit
    @jax.grad
    def gradient_of_loss(params, variables, images, labels):
        logits = nnx.merge(graph, params, variables, copy=True)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return gradient_of_loss


def gradient(config: Config, data: Split, state: TrainState) -> np.ndarray:
    """The gradient of the first training batch at a state's parameters, as a float64 vector."""
    kept = nnx.BatchStat if config.model.grid_bits is None else ...
    tree = make_gradient(config)(
        state.params,
        nnx.filter_state(state.variables, kept),
        normalize(data.images[: config.batch_size], data.normalization),
        data.labels[: config.batch_size],
    )
    return flatten(tree)


def trained(config: Config, dataset: Dataset, bits: list[int | None], seeds: int) -> Iterator[Row]:
    """A row for every grid_bits, as it is done."""
    for k in bits:
        at_k = with_model(config, grid_bits=k)
        runs, state = train(at_k, dataset, seeds)
        data = put_on_device(config.data, dataset, make_mesh(config))["train"]

        def gradient_of(dtype: str, backward: str, k: int | None = k, at=(data, state)):
            return gradient(with_model(config, dtype=dtype, backward=backward, grid_bits=k), *at)

        plain, row = gradient_of("float32", "remat", None), Row(grid_bits=k, runs=runs)
        for dtype in ("float32", "bfloat16"):
            due, found = gradient_of(dtype, "remat"), gradient_of(dtype, "reversible")
            row[f"gradient_error_{dtype}"] = relative_error(found, due)
            row[f"change_by_grid_and_{dtype}"] = relative_error(due, plain)
        yield row


def print_trained(rows: list[Row]) -> None:
    columns = (
        "grid_bits",
        "test accuracy",
        "largest \\|stream\\|",
        "exact up to",
        "gradient error, float32",
        "gradient error, bfloat16",
        "change of the gradient, float32",
        "change of the gradient, bfloat16",
    )
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for row in rows:
        accuracies = [100 * run["test_accuracy"] for run in row["runs"]]
        cells = [str(row["grid_bits"]), ", ".join(f"{value:.1f}%" for value in accuracies)]
        if row["grid_bits"] is None:
            cells += ["", ""]
        else:
            peak = max(run["stream_peak"] for run in row["runs"])
            cells += [f"{peak:.3g}", f"{revjax.stream_bound(row['grid_bits']):g}"]
        for kind in ("gradient_error_", "change_by_grid_and_"):
            values = [row[kind + dtype] for dtype in ("float32", "bfloat16")]
            cells += [shown_error(value) for value in values]
        print(f"| {' | '.join(cells)} |")


def untrained(many_units: tuple[tuple[int, ...], ...]) -> Iterator[Row]:
    """The largest |stream| of narrow RevNets on a batch of noise, in training mode."""
    images = jax.random.normal(jax.random.key(0), (16, 32, 32, 3))
    for units in many_units:
        filters = (16, 16, 32, 64)
        model = revjax.create_model("revnet", 10, units=units, filters=filters, rngs=nnx.Rngs(0))
        graph, state = nnx.split(model)

        @jax.jit
        def peaks(state, graph=graph):
            model = nnx.merge(graph, state)
            model(images)
            return nnx.state(model, revjax.StreamPeak)

        yield Row(units=units, stream_peak=max(map(float, jax.tree.leaves(peaks(state)))))


def print_untrained(rows: list[Row]) -> None:
    print("\n| units | largest \\|stream\\| before training | largest grid_bits it allows |")
    print("|---|---|---|")
    for row in rows:
        most = max(k for k in range(24) if row["stream_peak"] <= revjax.stream_bound(k))
        print(f"| {row['units']} | {row['stream_peak']:.3g} | {most} |")


def bits_or_none(text: str) -> int | None:
    return None if text == "none" else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="The study behind the default grid_bits.")
    studies = ("digits", "cifar10", "untrained")
    parser.add_argument("studies", nargs="*", default=[], help=", ".join(studies))
    parser.add_argument("--bits", type=bits_or_none, nargs="+", default=[10, 12, 14, 16, 18, None])
    parser.add_argument("--seeds", type=int, default=2, help="runs at every grid_bits, on digits")
    parser.add_argument("--cifar_steps", type=int, default=100)
    parser.add_argument("--data_dir", help="of the prepared CIFAR-10; default: tfds's own")
    parser.add_argument("--smoke", action="store_true", help="a few steps, nothing written")
    parser.add_argument("--json", type=Path, default=RESULTS / "grid_bits.json")
    arguments = parser.parse_args()
    chosen = arguments.studies or [*studies]
    if unknown := set(chosen) - set(studies):
        parser.error(f"there is no study {', '.join(unknown)}; there are {', '.join(studies)}.")
    bits, seeds = arguments.bits, arguments.seeds
    if arguments.smoke:
        chosen, bits, seeds = [name for name in chosen if name != "cifar10"], [14, None], 1

    record = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    for study in chosen:
        settings: Row = {}
        if study == "digits":
            config = load_config("digits_revnet", **({"steps": 4} if arguments.smoke else {}))
            found = trained(config, load_dataset("digits"), bits, seeds)
        elif study == "cifar10":
            config = load_config("cifar10_revnet38", steps=arguments.cifar_steps)
            config = with_model(config, bottleneck=False, **NARROW)
            dataset = load_dataset("cifar10", data_dir=arguments.data_dir)
            dataset = dataclasses.replace(
                dataset,
                test_images=dataset.test_images[:TEST_EXAMPLES],
                test_labels=dataset.test_labels[:TEST_EXAMPLES],
            )
            settings = NARROW | {"steps": config.steps, "test_examples": TEST_EXAMPLES}
            found = trained(config, dataset, bits, seeds=1)
        else:
            found = untrained(MANY_UNITS[:1] if arguments.smoke else MANY_UNITS)

        rows = []
        for row in found:
            rows.append(row)
            record[study] = {
                **environment(),
                **settings,
                "rows": rows,
            }
            if not arguments.smoke:
                arguments.json.write_text(json.dumps(record, indent=2) + "\n")
        print(f"\n{study}")
        (print_untrained if study == "untrained" else print_trained)(rows)


if __name__ == "__main__":
    main()
