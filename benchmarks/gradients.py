"""Gradients as vectors, and how far they are from each other."""

from typing import Any

import jax
import numpy as np

from revjax.check import relative_error as relative_error


def flatten(tree: Any) -> np.ndarray:
    """All leaves as one float64 vector."""
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def shown_error(value: float) -> str:
    """As a cell of a table: zero is zero, and not merely small."""
    return f"{value:.1e}" if value else "0"
