"""Every form of residual unit trained for a while: that each runs, and which of them learn.

    python benchmarks/variants.py digits                  # 100 steps each, some minutes in all
    python benchmarks/variants.py cifar10 [--source DIR]  # five networks, 300 steps each

It runs train.py, one run after another, and takes up where it stopped. The first writes
benchmarks/results/variants_digits.json and .md, the second variants_cifar10.json and .md and
docs/learning_curves.png, from the runs' own metrics. On 300 steps of 32 images no network is
trained; they show that the gradients are those of something that learns.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from record import RESULTS, ROOT, environment

from revjax.training.metrics import read_rows

SHORT = ["--config.steps=300", "--config.batch_size=32", "--config.optim.boundaries=(200,)"]
SHORT += ["--config.log_every=10", "--config.eval_every=100", "--config.precise_bn_batches=20"]
RESNET32 = [*SHORT, "--config.model.name=resnet32", "--config.optim.warmup_steps=20"]
CIFAR10 = {  # label: config, its overrides
    "ResNet-32, full pre-activation": (
        "identity_mappings.py:resnet110_full_preactivation",
        RESNET32,
    ),
    "ResNet-32, original": ("identity_mappings.py:resnet110_original", RESNET32),
    "ResNet-32, exclusive gating": ("identity_mappings.py:exclusive_gating_-6", RESNET32),
    "ResNet-32, stochastic depth": (
        "stochastic_depth.py:cifar10_resnet110",
        [*SHORT, "--config.model.units=(5,5,5)", "--config.data.validation=0"],
    ),
    "RevNet-38, stochastic depth": (
        "stochastic_depth.py:cifar10_revnet110",
        [*SHORT, "--config.model.name=revnet38", "--config.data.validation=0"],
    ),
}


def train(config: str, workdir: Path, flags: list[str]) -> dict[str, Any]:
    """What a run comes to: its summary, or the sentence by which it ended."""
    command = [sys.executable, "train.py", f"--config=configs/{config}", f"--workdir={workdir}"]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    summary = json.loads((workdir / "summary.json").read_text())
    kept = ("parameters", "steps", "test_loss", "test_accuracy", "wall_seconds", "stream_peak")
    return {key: summary[key] for key in (*kept, "device", "versions")}  # of when it was run


def digits_variants() -> list[str]:
    """The rows of configs/digits_resnet.py; configs/ is no package that is installed."""
    path = ROOT / "configs" / "digits_resnet.py"
    spec: Any = importlib.util.spec_from_file_location("digits_resnet", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.ROWS)


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = ["| | parameters | test accuracy | test loss |", "|---|---|---|---|"]
    for label, row in results.items():
        cells = (
            [row["failed"], "", ""]
            if "failed" in row
            else [
                f"{row['parameters']:,}",
                f"{row['test_accuracy']:.2%}",
                f"{row['test_loss']:.4f}",
            ]
        )
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(runs: dict[str, Path], path: Path) -> None:
    """Learning curves of several runs in one picture."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, accuracies = figure.subplots(1, 2)
    for label, workdir in runs.items():
        rows = read_rows(workdir)
        points = {
            split: [row for row in rows if row["split"] == split] for split in ("train", "test")
        }
        losses.plot(*_series(points["train"], "loss"), label=label)
        accuracies.plot(*_series(points["test"], "accuracy"), marker="o", label=label)
    losses.set(title="training loss, mean of 10 steps", xlabel="step", ylabel="cross-entropy")
    accuracies.set(title="test accuracy", xlabel="step")
    accuracies.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    losses.legend()
    figure.savefig(path, dpi=90)


def _series(rows, key):
    return [row["step"] for row in rows], [row[key] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train every form of residual unit.")
    parser.add_argument("data", choices=("digits", "cifar10"))
    parser.add_argument("--source", help="the official files of CIFAR-10 on disk")
    parser.add_argument("--data_dir", help="where the prepared CIFAR-10 lies, or shall lie")
    parser.add_argument("--steps", type=int, help="fewer, for a trial; nothing is recorded then")
    parser.add_argument("--only", help="one of the variants, for a trial, too")
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "variants")
    arguments = parser.parse_args()
    if arguments.data == "digits":
        cases = {name: (f"digits_resnet.py:{name}", []) for name in digits_variants()}
    else:
        cases = CIFAR10
    if arguments.only:
        if arguments.only not in cases:
            sys.exit(f"variants.py: --only={arguments.only}: give one of {', '.join(cases)}.")
        cases = {arguments.only: cases[arguments.only]}
    flags = [f"--config.steps={arguments.steps}"] if arguments.steps else []
    flags += [f"--config.data.source={arguments.source}"] if arguments.source else []
    flags += [f"--config.data.dir={arguments.data_dir}"] if arguments.data_dir else []
    results, runs = {}, {}
    for label, (config, own) in cases.items():
        runs[label] = arguments.workdir / f"{arguments.data}-{label.replace(' ', '_')}"
        results[label] = train(config, runs[label], [*own, *flags])
        print(table({label: results[label]}).splitlines()[-1], flush=True)
    if any("failed" in row for row in results.values()):
        sys.exit("variants.py: a run failed; nothing is recorded.")
    if arguments.steps or arguments.only:
        return
    path = RESULTS / f"variants_{arguments.data}.json"
    path.write_text(json.dumps({"date": environment()["date"], "runs": results}, indent=2) + "\n")
    path.with_suffix(".md").write_text(table(results))
    if arguments.data == "cifar10":
        draw(runs, ROOT / "docs" / "learning_curves.png")


if __name__ == "__main__":
    main()
