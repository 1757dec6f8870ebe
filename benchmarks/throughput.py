"""Images a second of train.py beside those of its bare training step.

Command:   python benchmarks/throughput.py --config FILE [--config.KEY=VALUE ...] [--json FILE]
Hardware:  any; nothing else should run on it
Figures:   printed; added to FILE if one is given

The run is train.py's own main(), in a folder of its own that is removed. It has the config's data,
augmentation, dispatches and logs; its evaluations are not counted. In their place, every --segment
steps, the bare step is timed: the step of revjax/training/step.py, as often as the run has made
steps since, from a copy of the run's state, on one batch that lies on the device, without
augmentation, logs or checkpoints. It has two forms, a call each step and a loop in one call, as
either may be the faster. So run and bare steps take turns in one process, and what else the machine
does falls on all. Compilation is not counted, nor is the run's first turn.

Checkpoints come as the config has them where a turn is a multiple of config.checkpoint_every. Where
it is not, each turn has one, which is waited for and timed apart; its time counts once every
config.checkpoint_every steps, as if the run did nothing meanwhile. A turn has at least one log, and
starts and ends with no work on the device, which a run does only where it evaluates or saves: all
this counts too much rather than too little.

A cost is the median, over the turns, of the run's time against that of the bare steps before and
after it, with the quartiles. --smoke makes all of it small.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from record import ROOT, environment

from revjax.data import DataError, normalize
from revjax.training.checkpoints import Checkpoints
from revjax.training.command_line import parse_arguments
from revjax.training.compiler import compiler_options, set_xla_flags
from revjax.training.config import Config, check_config
from revjax.training.errors import ConfigError, TrainingError
from revjax.training.feed import Feed
from revjax.training.interrupt import StopSignals
from revjax.training.optimizer import make_optimizer
from revjax.training.state import Abstract, TrainState
from revjax.training.step import make_train_step

sys.path.insert(0, str(ROOT))  # for train.py, and what the files of configs/ share
import train

BARE = ("bare step, a call each", "bare step, all in one call")
SMOKE = ["--config.model.units=(1,)", "--config.model.filters=(4,4)", "--config.batch_size=4"]


class Clock:
    """Seconds that a run has spent on each of `kinds`, a list of one entry a turn for each."""

    def __init__(self, *kinds: str):
        self.seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        self.began = 0.0

    def start(self) -> None:
        self.began = time.perf_counter()

    def stop(self, kind: str) -> None:
        self.seconds[kind].append(time.perf_counter() - self.began)


def take_turns(segment: int, clock: Clock, apart: bool) -> None:
    """Have train.py time the bare step where it would evaluate; its checkpoints, too, if apart."""

    class BareSteps:
        """In the place of `Evaluator`: called every `segment` steps, the device being idle."""

        def __init__(self, config: Config, model: Abstract, feed: Feed, mesh: Mesh):
            self.step = make_train_step(config, model, make_optimizer(config.optim), mesh)
            (batch,) = feed.statistics(1)
            self.batch = normalize(batch.images, batch.normalization), batch.labels

        def steps(self, state: TrainState, num_steps: jax.Array) -> TrainState:
            """In one call."""
            return jax.lax.fori_loop(0, num_steps, lambda _, s: self.step(s, *self.batch), state)

        def compile(self, state: TrainState) -> None:
            options: Any = dict(
                donate_argnums=0, compiler_options=compiler_options(jax.default_backend())
            )
            self.call: Any = jax.jit(self.step, **options).lower(state, *self.batch).compile()
            self.loop: Any = (
                jax.jit(self.steps, **options).lower(state, np.int32(segment)).compile()
            )

        def __call__(
            self, state: TrainState, names: list[str], stop: StopSignals
        ) -> list[dict[str, Any]]:
            jax.block_until_ready(state)
            clock.stop("run")
            for kind in BARE:
                copy = jax.block_until_ready(jax.tree.map(lambda leaf: leaf.copy(), state))
                clock.start()
                if kind == BARE[0]:
                    for _ in range(segment):
                        copy = self.call(copy, *self.batch)
                else:
                    copy = self.loop(copy, np.int32(segment))
                jax.block_until_ready(copy)
                clock.stop(kind)
            clock.start()  # of what is left of an evaluation, and of a checkpoint
            row = {"loss": 0.0, "accuracy": 0.0, "images_per_second": 0.0}
            return [row | {"split": name} for name in names]

    class TimedCheckpoints(Checkpoints):
        """The end of a turn: the evaluation's row, and a checkpoint until it is on the disk."""

        def save(self, *arguments: Any) -> None:
            super().save(*arguments)
            self.wait()
            clock.stop("save")
            clock.start()

    train.Evaluator = BareSteps
    if apart:
        train.Checkpoints = TimedCheckpoints


def measure(flags: list[str], segment: int, turns: int) -> dict[str, Any]:
    """Train for `turns` turns and one that is not counted; return the figures."""
    arguments = parse_arguments(["", *flags])
    if isinstance(arguments, str):
        sys.exit(arguments)
    config = check_config(arguments.config)
    apart = segment % config.checkpoint_every != 0  # a turn has no whole number of checkpoints
    clock = Clock("run", *BARE, "save")
    take_turns(segment, clock, apart)
    intervals = {
        "steps": segment * (turns + 1),
        "eval_every": segment,
        "checkpoint_every": segment if apart else config.checkpoint_every,
        "log_every": min(segment, config.log_every),
    }
    overrides = [f"--config.{key}={value}" for key, value in intervals.items()]
    quiet = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as workdir,
        contextlib.redirect_stdout(quiet),
        contextlib.redirect_stderr(quiet),
    ):
        train.main(["", *flags, f"--workdir={workdir}", *overrides], StopSignals())
    seconds = {kind: np.array(values) for kind, values in clock.seconds.items()}
    run = seconds["run"][1:]
    if apart:
        run = run + seconds["save"][1:] * (segment / config.checkpoint_every)
    images = segment * config.batch_size
    return {
        "model": config.model.name,
        "data": config.data.name,
        "dtype": config.model.dtype,
        "batch_size": config.batch_size,
        "steps_a_turn": segment,
        "turns": turns,
        "checkpoint_every": config.checkpoint_every,
        "checkpoint_seconds": quartiles(seconds["save"][1:]) if apart else None,
        "images_per_second": {"train.py": quartiles(images / run)}
        | {kind: quartiles(images / seconds[kind][1:]) for kind in BARE},
        # Against the mean of the turns before and after, so that a drift cancels.
        "cost": {
            kind: quartiles(run / ((seconds[kind][:-1] + seconds[kind][1:]) / 2) - 1)
            for kind in BARE
        },
    }


def quartiles(values: np.ndarray) -> list[float]:
    """First quartile, median and third quartile."""
    return np.percentile(values, [25, 50, 75]).tolist()


def shown(figures: list[float], form: str) -> str:
    low, median, high = (format(figure, form) for figure in figures)
    return f"{median} ({low} to {high})"


def print_table(row: dict[str, Any]) -> None:
    network = f"{row['model']} on {row['data']}, {row['dtype']}, batch {row['batch_size']}"
    print(f"\n{network}: {row['turns']} turns of {row['steps_a_turn']} steps\n")
    print("| | images/s (quartiles) | cost of train.py against it |\n|---|---|---|")
    for kind, speed in row["images_per_second"].items():
        cost = shown(row["cost"][kind], ".1%") if kind in row["cost"] else ""
        print(f"| {kind} | {shown(speed, ',.1f')} | {cost} |")
    every = f"once every {row['checkpoint_every']:,} steps"
    if row["checkpoint_seconds"]:
        each = shown(row["checkpoint_seconds"], ".3f")
        print(f"\nA checkpoint takes {each} s until it is on the disk; that counts {every}.")
    else:
        print(f"\nA checkpoint is written {every}, while the run goes on.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Images a second of train.py beside its bare step; other flags are train.py's."
    )
    parser.add_argument("--segment", type=int, default=50, help="steps a turn")
    parser.add_argument("--turns", type=int, default=9, help="turns that count")
    parser.add_argument("--smoke", action="store_true", help="a small network, few steps")
    parser.add_argument("--json", type=Path, help="a file to add the figures to")
    arguments, flags = parser.parse_known_args()
    if arguments.segment < 1 or arguments.turns < 1:
        parser.error("--segment and --turns must be 1 or more.")
    if arguments.smoke:
        arguments.segment, arguments.turns = 2, 2
        flags = ["--config", str(ROOT / "configs/digits_revnet.py"), *SMOKE]
    try:
        row = measure(flags, arguments.segment, arguments.turns)
    except ConfigError as error:
        parser.error(str(error))
    except (DataError, TrainingError) as error:
        sys.exit("\n".join([f"throughput.py: {error}", *getattr(error, "__notes__", ())]))
    print_table(row)
    if arguments.json:
        record: list[Any] = []
        if arguments.json.exists():
            record = json.loads(arguments.json.read_text())
        record.append({**environment(), **row})
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    set_xla_flags()  # before a device is used
    main()
