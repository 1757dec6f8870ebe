"""Exactness in training: the error of the reversible gradient at every evaluation of a run.

    python benchmarks/drift_in_training.py digits                      # minutes
    python benchmarks/drift_in_training.py cifar10 [--data_dir DIR]    # some minutes more

Four runs of train.py, on the grid and off it, with convolutions in float32 and in bfloat16. At the
step of every evaluation the state is kept, and the gradient of a batch of training images by
backward="reversible" is held against that by "store"; and by "remat", whose forward pass is
compiled like that of the rule, so that what is left is the reconstruction's error, or the order in
which cotangents are summed. Figures go to benchmarks/results/drift_in_training.json, the plot of
both data sets to docs/drift_in_training.png. Called again it goes on where it ended.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
from backward_ways import FORMS, loss_and_gradient
from gradients import relative_error
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from record import RESULTS, ROOT, environment

from revjax.data import load_dataset, normalize
from revjax.training.checkpoints import Checkpoints
from revjax.training.command_line import parse_arguments
from revjax.training.config import check_config
from revjax.training.mesh import make_mesh
from revjax.training.metrics import read_rows
from revjax.training.optimizer import make_optimizer
from revjax.training.state import initial_state
from revjax.training.step import put_on_device

RUNS = {  # the config, and flags that make the run short
    "digits": (
        "configs/digits_revnet.py",
        ["--config.steps=300", "--config.optim.boundaries=(180,255)", "--config.eval_every=20"],
    ),
    "cifar10": (
        "configs/cifar10_revnet38.py",
        [
            "--config.steps=100",
            "--config.batch_size=20",
            "--config.optim.boundaries=(60,85)",
            "--config.eval_every=50",
            "--config.precise_bn_batches=2",
            "--config.log_every=10",
        ],
    ),
}
BATCH = 100


def main() -> None:
    parser = argparse.ArgumentParser(description="The gradient's error over a run of training.")
    parser.add_argument("data", choices=list(RUNS))
    parser.add_argument("--data_dir", help="where the prepared CIFAR-10 lies")
    parser.add_argument("--steps", type=int, help="fewer, for a trial")
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "drift_in_training")
    parser.add_argument("--json", type=Path, default=RESULTS / "drift_in_training.json")
    parser.add_argument("--png", type=Path, default=ROOT / "docs" / "drift_in_training.png")
    arguments = parser.parse_args()
    config, flags = RUNS[arguments.data]
    if arguments.steps:
        flags = [*flags, f"--config.steps={arguments.steps}", "--config.eval_every=1"]
    if arguments.data_dir:
        flags = [*flags, f"--config.data.dir={arguments.data_dir}"]
    flags = ["--config", config, *flags]
    forms = {}
    for bits, dtype in FORMS:
        label = f"{'no grid' if bits is None else f'grid 2^-{bits}'}, {dtype}"
        own = [f"--config.model.grid_bits={bits}", f"--config.model.dtype={dtype}"]
        workdir = arguments.workdir / f"{arguments.data}-{bits}-{dtype}"
        forms[label] = errors_of_run([*flags, *own], workdir)
        print(label, [row["gradient_error"] for row in forms[label]], flush=True)
    record = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    record[arguments.data] = {**environment(), "batch": BATCH, "config": config, "forms": forms}
    arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    draw(record, arguments.png)


def errors_of_run(flags: list[str], workdir: Path) -> list[dict[str, Any]]:
    """Train, then hold the two gradients against each other at each step of an evaluation."""
    arguments = parse_arguments(["", *flags])
    assert not isinstance(arguments, str)
    every = arguments.config.eval_every
    # Every evaluation leaves a checkpoint, and all are kept.
    keep = [f"--config.checkpoint_every={every}", "--config.keep_checkpoints=1000"]
    command = [sys.executable, "train.py", *flags, *keep, "--workdir", str(workdir.absolute())]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    config = check_config(arguments.config)
    dataset = load_dataset(config.data.name, data_dir=config.data.dir)
    data = put_on_device(config.data, dataset, make_mesh(config))
    images = normalize(data["train"].images[:BATCH], data["train"].normalization)
    labels = data["train"].labels[:BATCH]
    compute = {
        way: loss_and_gradient(
            dataclasses.replace(config, model=dataclasses.replace(config.model, backward=way))
        )
        for way in ("reversible", "remat", "store")
    }
    initial = partial(initial_state, config, make_optimizer(config.optim))
    template = jax.eval_shape(initial)
    accuracies = {m["step"]: m["accuracy"] for m in read_rows(workdir) if m["split"] == "test"}
    rows = []
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        for step in (0, *sorted(accuracies)):
            state = checkpoints.restore(step, template).state if step else jax.jit(initial)()
            (_, got), (_, remat), (loss, due) = (
                compute[way](state, images, labels) for way in compute
            )
            row = {"step": step, "loss": loss, "test_accuracy": accuracies.get(step)}
            row["gradient_error"] = relative_error(got, due)
            row["error_against_remat"] = relative_error(got, remat)
            row["remat_against_stored"] = relative_error(remat, due)
            rows.append(row)
    return rows


def draw(record: dict[str, Any], path: Path) -> None:
    """The errors over the steps: a column for each data set, a row for what they are against."""
    errors = {"gradient_error": "stored activations", "error_against_remat": "jax.checkpoint"}
    figure = Figure(figsize=(5 * len(record), 3 * len(errors)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(errors), len(record), sharex="col", sharey=True, squeeze=False)
    for row, (error, against) in zip(panels, errors.items(), strict=True):
        for axes, run in zip(row, record.values(), strict=True):
            _panel(axes, run["forms"], error)
        row[0].set_ylabel(f"gradient's relative error\nagainst {against}")
    for top, bottom, run in zip(panels[0], panels[-1], record.values(), strict=True):
        top.set_title(Path(run["config"]).stem)
        bottom.set_xlabel("training step")
    panels[0, -1].legend(loc="upper right", fontsize=8)
    figure.savefig(path, dpi=80)


def _panel(axes: Axes, forms: dict[str, list[dict[str, Any]]], error: str) -> None:
    for label, rows in forms.items():
        steps, errors = [row["step"] for row in rows], [row[error] for row in rows]
        style = "-o" if label.startswith("grid") else "--s"
        axes.plot(steps, errors, style, label=label, markersize=4, clip_on=False)
    # Linear below, so that an error of zero has a place.
    axes.set_yscale("symlog", linthresh=1e-9)
    axes.set_ylim(0, 10)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
