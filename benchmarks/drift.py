"""Error of reconstructed gradients and inputs against depth, on the grid and off it.

Command:   python benchmarks/drift.py [--depths 3 27] [--seeds 1] [--png FILE] [--json FILE]
Hardware:  any
Figures:   benchmarks/results/drift.json, drawn in docs/drift.png, told in docs/numerics.md

A block has two residual functions BN-ReLU-conv3x3-BN-ReLU-conv3x3, one for each half of 16 channels
of a stream of 8 images of 8x8; the chain is a scan over stacked blocks with random kernels, and its
input and the cotangent of its output are normal. The gradient by parameters and input with
backward="reversible" is held against that with backward="store" of the same function: same dtypes,
same grid, so what differs is the reconstruction alone. The inverse of the chain is held against its
input. Each figure is the median over seeds.
"""

# Calls with options chosen at run time, which no type checker can follow.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from basic_block import residual
from gradients import flatten, relative_error, shown_error
from record import RESULTS, ROOT, environment

import revjax
from revjax.training.summary import device_name

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator

BATCH, SIDE, CHANNELS = 8, 8, 16
BACKWARDS = ("reversible", "store")


class Form(NamedTuple):
    """Dtype of the stream, dtype of the convolutions, grid, and the style of its line."""

    stream: Any
    compute: Any
    grid_bits: int | None
    style: dict[str, Any]


# Colours of Okabe and Ito.
FORMS = {
    "float32": Form(
        jnp.float32, jnp.float32, None, dict(color="#E69F00", marker="^", linestyle="--")
    ),
    "float32 stream, bfloat16 compute": Form(
        jnp.float32, jnp.bfloat16, None, dict(color="#D55E00", marker="s", linestyle="--")
    ),
    "bfloat16": Form(
        jnp.bfloat16, jnp.bfloat16, None, dict(color="#999999", marker="v", linestyle="--")
    ),
    "grid 2^-14, float32": Form(jnp.float32, jnp.float32, 14, dict(color="#0072B2", marker="o")),
    "grid 2^-14, bfloat16 compute": Form(
        jnp.float32, jnp.bfloat16, 14, dict(color="#009E73", marker="D")
    ),
}
MEASURES = {
    "gradient_error": "Relative error of the gradient",
    "cosine": "Cosine of the gradient with the stored one",
    "inverse_error": "Largest error of the reconstructed input",
}


def draw_inputs(depth: int, seed: int) -> tuple[Any, Any, Any]:
    """Stacked parameters, the pair x, and the cotangent of y, all float32."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    shape = (depth, 3, 3, CHANNELS, CHANNELS)

    def layer():
        kernel = jax.random.normal(next(keys), shape) * (2 / (9 * CHANNELS)) ** 0.5
        return jnp.ones((depth, CHANNELS)), jnp.zeros((depth, CHANNELS)), kernel

    def pair():
        return jax.random.normal(next(keys), (2, BATCH, SIDE, SIDE, CHANNELS))

    params = tuple(tuple(layer() for _ in range(2)) for _ in range(2))
    return params, tuple(pair()), tuple(pair())


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def measure(form: Form, depth: int, seeds: int) -> dict[str, float]:
    """The medians over seeds of `MEASURES`."""
    h = partial(residual, dtype=form.compute)

    def gradient(params, x, dy, *, backward):
        def loss(params, x):
            y = revjax.rev_chain_apply(h, h, params, x, grid_bits=form.grid_bits, backward=backward)
            return sum((y * dy).astype(jnp.float32).sum() for y, dy in zip(y, dy, strict=True))

        return jax.grad(loss, argnums=(0, 1))(params, x)

    def inverse_error(params, x):
        chain = dict(grid_bits=form.grid_bits)
        y = revjax.rev_chain_apply(h, h, params, x, **chain)
        # A barrier, so that no sum of one direction is fused with its difference in the other.
        y = jax.lax.optimization_barrier(y)
        again = revjax.rev_chain_inverse(h, h, params, y, **chain)
        x = revjax.round_to_grid(x, form.grid_bits)
        return jnp.stack([jnp.abs(a - b).max() for a, b in zip(x, again, strict=True)]).max()

    gradient = jax.jit(gradient, static_argnames="backward")
    inverse_error = jax.jit(inverse_error)
    rows = []
    for seed in range(seeds):
        params, x, dy = draw_inputs(depth, seed)
        params, x, dy = jax.tree.map(lambda a: a.astype(form.stream), (params, x, dy))
        found, due = (flatten(gradient(params, x, dy, backward=way)) for way in BACKWARDS)
        rows.append([relative_error(found, due), cosine(found, due), inverse_error(params, x)])
    return dict(zip(MEASURES, np.median(rows, axis=0).tolist(), strict=True))


def shown(measure: str, value: float) -> str:
    if measure == "cosine":
        return f"{value:.4f}"
    return shown_error(value)


def print_tables(depths: list[int], results: dict[str, list[dict[str, float]]]) -> None:
    for name, title in MEASURES.items():
        print(f"\n| {title} | {' | '.join(f'{depth} blocks' for depth in depths)} |")
        print("|---" * (len(depths) + 1) + "|")
        for label, values in results.items():
            cells = [shown(name, value[name]) for value in values]
            print(f"| {label} | {' | '.join(cells)} |")


def draw(depths: list[int], results: dict[str, list[dict[str, float]]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for label, values in results.items():
        errors = [value["gradient_error"] for value in values]
        if any(errors):
            axes.plot(depths, errors, label=label, **FORMS[label].style)
        else:
            axes.plot([], [], label=f"{label}: 0 at every depth", **FORMS[label].style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("reversible blocks, each of four 3x3 convolutions")
    axes.set_ylabel("relative error of the gradient")
    axes.set_title(f"Against stored backprop of the same function; {device_name()}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Gradient and inverse error against depth.")
    parser.add_argument("--depths", type=int, nargs="+", default=[3, 27, 100, 300])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--png", type=Path, default=ROOT / "docs/drift.png")
    parser.add_argument("--json", type=Path, default=RESULTS / "drift.json")
    arguments = parser.parse_args()
    depths = sorted(arguments.depths)

    results = {}
    for label, form in FORMS.items():
        results[label] = [measure(form, depth, arguments.seeds) for depth in depths]
    print_tables(depths, results)
    draw(depths, results, arguments.png)
    record = {
        "command": f"python benchmarks/drift.py --depths {' '.join(map(str, depths))} "
        f"--seeds {arguments.seeds}",
        **environment(),
        "batch": BATCH,
        "image": [SIDE, SIDE, 2 * CHANNELS],
        "seeds": arguments.seeds,
        "depths": depths,
        "results": results,
    }
    arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
