"""What the benchmarks share: where results go, what they ran on, a residual function, an error."""

import datetime
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np

from revjax.conv import conv
from revjax.training.summary import device_name, versions

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"


def environment() -> dict[str, Any]:
    """Of a record of figures: when, on what and with what they were measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
    }


def residual(params, x, dtype=None):
    """BN-ReLU-conv3x3 for each (scale, bias, kernel) of params; convolutions compute in `dtype`."""
    for scale, bias, kernel in params:
        mean, variance = x.mean((0, 1, 2), keepdims=True), x.var((0, 1, 2), keepdims=True)
        x = jax.nn.relu((x - mean) * jax.lax.rsqrt(variance + 1e-3) * scale + bias)
        compute = x.dtype if dtype is None else dtype
        x = conv(x.astype(compute), kernel.astype(compute)).astype(x.dtype)
    return x


def flatten(tree: Any) -> np.ndarray:
    """All leaves as one float64 vector."""
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def relative_error(found: np.ndarray, due: np.ndarray) -> float:
    return float(np.linalg.norm(found - due) / np.linalg.norm(due))


def shown_error(value: float) -> str:
    """As a cell of a table: zero is zero, and not merely small."""
    return f"{value:.1e}" if value else "0"
