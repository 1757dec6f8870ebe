"""What a finished run amounts to: `summary.json`, and the same as a table."""

import importlib.metadata
import os
import platform
from typing import Any

import jax
from jax.sharding import Mesh

import revjax

# What a summary always has, as `summary_table` shows it.
SHOWN = ("model", "parameters", "data", "steps", "test_accuracy", "test_error", "wall_seconds")
SHOWN += ("device", "precise_bn_batches", "stream_peak", "stream_bound")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def device_name(mesh: Mesh | None = None) -> str:
    """Return what is computed on, as in "cpu (2 cores)" or "8 x NVIDIA H100 80GB HBM3".

    Args:
        mesh: the devices of a run; None names the first there is.
    """
    device = jax.devices()[0]
    name = f"cpu ({os.cpu_count()} cores)" if device.platform == "cpu" else device.device_kind
    return name if mesh is None or mesh.size == 1 else f"{mesh.size} x {name}"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a run's numbers."""
    return {"python": platform.python_version(), "revjax": revjax.__version__} | {
        name: importlib.metadata.version(name) for name in PACKAGES
    }


def best_validation(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the step of the largest validation accuracy, the earliest of several, and its results.

    Only steps that have a row of the test set, too, count: a run that was stopped between the two,
    and then given more steps, has one without.

    It is what Huang et al. 2016 report: the test error where the validation error is smallest.

    Args:
        rows: of a run with validation, as `revjax.training.metrics.read_rows` returns them.
    """
    tests = {row["step"]: row["accuracy"] for row in rows if row["split"] == "test"}
    validations = [row for row in rows if row["split"] == "validation" and row["step"] in tests]
    best = max(validations, key=lambda row: (row["accuracy"], -row["step"]))
    accuracy = tests[best["step"]]
    return {
        "step": best["step"],
        "validation_accuracy": best["accuracy"],
        "validation_error": 1 - best["accuracy"],
        "test_accuracy": accuracy,
        "test_error": 1 - accuracy,
    }


def summary_table(summary: dict[str, Any]) -> str:
    """Return the lines to print for a `summary.json`."""
    batches = summary["precise_bn_batches"]
    statistics = f" (by precise BN, {batches} batches)" if batches else " (by running averages)"
    if batches is None:  # a network without BatchNorm
        statistics = ""
    lines = {
        "model": f"{summary['model']}, {summary['parameters']:,} parameters",
        "data": summary["data"],
        "steps": f"{summary['steps']:,}",
        "test accuracy": f"{summary['test_accuracy']:.2%}{statistics}",
        "test error": f"{summary['test_error']:.2%}",
    }
    if best := summary.get("best_validation"):
        lines["best validation"] = (
            f"error {best['validation_error']:.2%} at step {best['step']:,}, "
            f"where the test error is {best['test_error']:.2%}"
        )
    lines["time"] = f"{summary['wall_seconds']:,.0f} s on {summary['device']}"
    if summary["stream_peak"] is not None:
        lines["largest |stream|"] = (
            f"{summary['stream_peak']:.4g}, exact up to {summary['stream_bound']:.4g}"
        )
    if "skipped_steps" in summary:
        lines["skipped steps"] = f"{summary['skipped_steps']:,}, which were not finite"
    width = max(map(len, lines))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in lines.items())
