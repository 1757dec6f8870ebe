"""What stochastic depth saves, and what the deepest networks cost.

Command:   python benchmarks/stochastic_depth.py [saving] [deep] [--smoke]
Hardware:  any
Figures:   benchmarks/results/stochastic_depth.json and .md, told in docs/papers.md

saving: the whole training step of ResNet-110 (original units) and RevNet-110 at constant depth,
with p_L = 0.5 and with p_L = 0.2, in turns in one run, medians. The steps are ones in which as many
residual functions are open as are on average, 40 and 32 of 54.

deep: each network in a process of its own compiles its step for 8 images and takes it: seconds to
trace and compile, the step, temporary memory, and the peak of the process.
"""

# Calls with options chosen at run time, which no type checker can follow.
# pyright: reportArgumentType=false

import argparse
import json
import resource
import subprocess
import sys
import time
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from record import RESULTS, ROOT, environment

from revjax import RevNet
from revjax.stochastic_depth import expected_depth, survival_probabilities
from revjax.training.command_line import parse_arguments
from revjax.training.compiler import compiler_options, set_xla_flags
from revjax.training.config import Config, check_config
from revjax.training.mesh import make_mesh
from revjax.training.optimizer import make_optimizer
from revjax.training.state import abstract_model, build_model, draw, initial_state
from revjax.training.step import MODEL_STREAM, make_train_step, stream_key

STOCHASTIC, IDENTITY = "configs/stochastic_depth.py", "configs/identity_mappings.py"
SAVING = {
    "resnet110": f"{STOCHASTIC}:cifar10_resnet110",
    "revnet110": f"{STOCHASTIC}:cifar10_revnet110",
}
DEEP = {
    "resnet110, original": (f"{STOCHASTIC}:cifar10_resnet110_constant", None),
    "resnet1001, full pre-activation": (f"{IDENTITY}:resnet1001_full_preactivation", None),
    "resnet1202, stochastic depth": (f"{STOCHASTIC}:cifar10_resnet1202", 0.5),
    "revnet110, stochastic depth": (f"{STOCHASTIC}:cifar10_revnet110", 0.5),
}


def load_config(name: str, batch: int, p_last: float | None) -> Config:
    """A row of configs/ with another batch size and depth."""
    flags = ["", f"--config={ROOT / name}", f"--config.batch_size={batch}"]
    arguments: Any = parse_arguments(flags)
    values = arguments.config
    if p_last is not None:
        values.model.stochastic_depth.p_last = p_last
    elif "stochastic_depth" in values.model:
        with values.unlocked():
            del values.model.stochastic_depth
    return check_config(values)


class Step:
    """The whole training step of a config, compiled; the state is not donated."""

    def __init__(self, config: Config):
        self.config, shape = config, (config.batch_size, 32, 32, 3)
        optimizer = make_optimizer(config.optim)
        mesh = make_mesh(config)
        self.state = draw(partial(initial_state, config, optimizer), mesh)
        self.images = jax.random.normal(jax.random.key(0), shape)
        self.labels = jax.random.randint(jax.random.key(1), shape[:1], 0, 10)
        step = jax.jit(
            make_train_step(config, abstract_model(config), optimizer, mesh),
            compiler_options=compiler_options(jax.default_backend()),
        )
        began = time.perf_counter()
        self.compiled = step.lower(self.state, self.images, self.labels).compile()
        self.compile_seconds = time.perf_counter() - began
        memory: Any = self.compiled.memory_analysis()
        self.temporary_bytes = memory.temp_size_in_bytes

    def __call__(self, number: int) -> float:
        """Seconds of the step of that number, which decides its gates."""
        state = self.state._replace(step=jax.numpy.int32(number))
        began = time.perf_counter()
        jax.block_until_ready(self.compiled(state, self.images, self.labels))
        return time.perf_counter() - began

    def typical_steps(self, count: int) -> list[int]:
        """The first steps with as many open gates as are expected."""
        if self.config.model.stochastic_depth is None:
            return list(range(count))
        model: Any = nnx.eval_shape(lambda: build_model(self.config))
        batch = self.config.batch_size

        @jax.jit
        def num_open(number):
            gates = model.gates(batch, stream_key(self.config.seed, MODEL_STREAM, number))
            return sum(leaf.sum() for leaf in jax.tree.leaves(gates))

        opens = np.asarray(jax.vmap(num_open)(np.arange(50 * count)))
        return np.flatnonzero(opens == round(self.expected_depth()))[:count].tolist()

    def num_residuals(self) -> int:
        """Residual functions of the network, each of which may have a gate."""
        model: Any = nnx.eval_shape(lambda: build_model(self.config))
        return sum(model.units) * (2 if isinstance(model, RevNet) else 1)

    def expected_depth(self) -> float:
        """How many of them run on average."""
        depth, number = self.config.model.stochastic_depth, self.num_residuals()
        if depth is None:
            return number
        return expected_depth(survival_probabilities(number, depth.p_last, depth.mode))


def saving(batch: int, rounds: int) -> dict[str, Any]:
    """Seconds a step, at constant and at stochastic depth, of each network."""
    results = {}
    for network, row in SAVING.items():
        steps = {p: Step(load_config(row, batch, p)) for p in (None, 0.5, 0.2)}
        numbers = {p: step.typical_steps(rounds + 1) for p, step in steps.items()}
        times: dict[Any, list[float]] = {p: [] for p in steps}
        for i in range(rounds + 1):
            for p, step in steps.items():
                seconds = step(numbers[p][i])
                if i:  # the first is to warm up
                    times[p].append(seconds)
        constant = np.median(times[None])
        for p, step in steps.items():
            label = f"{network}, {f'p_L = {p}' if p else 'constant depth'}"
            results[label] = {
                "seconds": float(np.median(times[p])),
                "quartiles": np.quantile(times[p], [0.25, 0.75]).tolist(),
                "of_constant": float(np.median(times[p]) / constant),
                "open": round(step.expected_depth()) / step.num_residuals(),
                "temporary_bytes": step.temporary_bytes,
            }
            print(label, results[label])
    return results


def deep(batch: int) -> dict[str, Any]:
    """What the deepest networks cost, each in a process of its own."""
    results = {}
    for label in DEEP:
        command = [sys.executable, __file__, "--one", label, "--batch", str(batch)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[label] = json.loads(out.splitlines()[-1])
        print(label, results[label])
    return results


def one(label: str, batch: int) -> None:
    """Compile and take a step, and print what it cost as JSON."""
    row, p_last = DEEP[label]
    step = Step(load_config(row, batch, p_last))
    seconds = step(0)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    costs = {
        "compile_seconds": step.compile_seconds,
        "step_seconds": seconds,
        "temporary_bytes": step.temporary_bytes,
        "process_peak_bytes": peak,
    }
    print(json.dumps(costs))


def table(figures: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = []
    if "saving" in figures:
        batch = figures["saving"]["batch"]
        lines += [
            f"| training step, batch {batch} | open | s (quartiles) | of constant | temporary MB |"
        ]
        lines += ["|---|---|---|---|---|"]
        for label, row in figures["saving"]["rows"].items():
            low, high = row["quartiles"]
            lines.append(
                f"| {label} | {row['open']:.3f} | {row['seconds']:.3f} ({low:.3f} to {high:.3f}) | "
                f"{row['of_constant']:.3f} | {row['temporary_bytes'] / 1e6:,.1f} |"
            )
        lines.append("")
    if "deep" in figures:
        batch = figures["deep"]["batch"]
        lines += [
            f"| batch {batch} | trace and compile, s | step, s | temporary MB | process peak, MB |"
        ]
        lines += ["|---|---|---|---|---|"]
        for label, row in figures["deep"]["rows"].items():
            lines.append(
                f"| {label} | {row['compile_seconds']:.1f} | {row['step_seconds']:.1f} | "
                f"{row['temporary_bytes'] / 1e6:,.0f} | {row['process_peak_bytes'] / 1e6:,.0f} |"
            )
    return "\n".join(lines).strip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of stochastic and deep networks.")
    parser.add_argument("studies", nargs="*", help="saving, deep; both by default")
    parser.add_argument("--batch", type=int, help="32 images for saving, 8 for deep")
    parser.add_argument("--rounds", type=int, default=13, help="steps timed, each way in turn")
    parser.add_argument("--smoke", action="store_true", help="2 images, a round; records nothing")
    parser.add_argument("--one", choices=DEEP, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return one(arguments.one, arguments.batch)
    studies = arguments.studies or ["saving", "deep"]
    if not {"saving", "deep"} >= set(studies):
        sys.exit(f"stochastic_depth.py: {studies}: give saving, deep or both.")
    path = RESULTS / "stochastic_depth.json"
    figures = json.loads(path.read_text()) if path.exists() and not arguments.smoke else {}
    if "saving" in studies:
        batch, rounds = arguments.batch or 32, arguments.rounds
        batch, rounds = (2, 1) if arguments.smoke else (batch, rounds)
        rows = saving(batch, rounds)
        figures["saving"] = {**environment(), "batch": batch, "rounds": rounds, "rows": rows}
    if "deep" in studies:
        batch = 2 if arguments.smoke else arguments.batch or 8
        figures["deep"] = {**environment(), "batch": batch, "rows": deep(batch)}
    if not arguments.smoke:
        path.write_text(json.dumps(figures, indent=2) + "\n")
        path.with_suffix(".md").write_text(table(figures))
    print(table(figures))


if __name__ == "__main__":
    set_xla_flags()  # before a device is used
    main()
