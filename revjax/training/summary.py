"""What a finished run amounts to: `summary.json`, and the same as a table."""

import importlib.metadata
import os
import platform
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def device_name() -> str:
    """Return what the run computes on, as in "cpu (2 cores)" or "NVIDIA H100 80GB HBM3"."""
    device = jax.devices()[0]
    return f"cpu ({os.cpu_count()} cores)" if device.platform == "cpu" else device.device_kind


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a run's numbers."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in PACKAGES
    }


def summary_table(summary: dict[str, Any]) -> str:
    """Return the lines to print for a `summary.json`."""
    batches = summary["precise_bn_batches"]
    statistics = f"precise BN, {batches} batches" if batches else "running averages"
    lines = {
        "model": f"{summary['model']}, {summary['parameters']:,} parameters",
        "data": summary["data"],
        "steps": f"{summary['steps']:,}",
        "test accuracy": f"{summary['test_accuracy']:.2%} (by {statistics})",
        "test error": f"{summary['test_error']:.2%}",
        "time": f"{summary['wall_seconds']:,.0f} s on {summary['device']}",
    }
    if summary["stream_peak"] is not None:
        lines["largest |stream|"] = (
            f"{summary['stream_peak']:.4g}, exact up to {summary['stream_bound']:.4g}"
        )
    width = max(map(len, lines))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in lines.items())
