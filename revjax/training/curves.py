"""The picture of a run: loss and accuracy against the step, of each split."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter


def draw_curves(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Write `path`, a PNG with two panels, from the rows of a run's metrics.

    Args:
        rows: as `revjax.training.metrics.read_rows` returns them.
        title: says what was trained on what.
        path: of the PNG.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    loss, accuracy = figure.subplots(1, 2)
    dots = {"marker": "o", "markersize": 3}
    styles = {"train": {"alpha": 0.8}, "validation": dots, "test": dots}
    for split, style in styles.items():
        steps = [row["step"] for row in rows if row["split"] == split]
        if not steps:  # as where nothing is held out for validation
            continue
        for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
            values = [row[name] for row in rows if row["split"] == split]
            axes.plot(steps, values, label=split, linewidth=1.2, **style)
    for axes in (loss, accuracy):
        axes.set_xlabel("training step")
        axes.grid(alpha=0.3)
        axes.legend()
    loss.set_ylabel("cross-entropy")
    if any(row["loss"] > 0 for row in rows):  # which it is not where there is one class alone
        loss.set_yscale("log")
    accuracy.set_ylabel("accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)
