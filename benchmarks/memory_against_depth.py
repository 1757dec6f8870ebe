"""Memory for the gradient of a chain of residual blocks against its depth, as the compiler says.

Command:   python benchmarks/memory_against_depth.py [--depths 4 8 16] [--png FILE] [--json FILE]
Hardware:  any: programs are compiled for it, none is run
Figures:   benchmarks/results/memory_against_depth.json, drawn in docs/memory.png

A block has two residual functions BN-ReLU-conv3x3-BN-ReLU-conv3x3, one for each half of a float32
stream of 32 images of 32x32 and 16 + 16 channels. The gradient of the chain by its parameters and
input is compiled in five forms of `revjax.rev_chain_apply`; "stored, unrolled" is there because a
scan stores more than a Python loop, "a list" is how blocks that differ are chained, and both end at
32 blocks because longer programs take minutes and gigabytes to compile. Counted are the temporary
buffers, `memory_analysis().temp_size_in_bytes`, and nothing is subtracted; parameters and input are
arguments of the program and their gradients its results, neither of which is a temporary.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
from basic_block import residual
from record import RESULTS, ROOT, environment

import revjax
from revjax.reversible import Backward

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator

BATCH, SIDE, CHANNELS = 32, 32, 16
UNROLLED_BLOCKS = 32  # at most
MIB = 2**20

# Label: backward of rev_chain_apply, whether a scan runs the blocks, line style (Okabe and Ito's
# colours).
FORMS: dict[str, tuple[Backward, bool, dict[str, Any]]] = {
    "stored, scanned": ("store", True, dict(color="#999999", marker="v", linestyle="--")),
    "stored, unrolled": ("store", False, dict(color="#D55E00", marker="s")),
    "jax.checkpoint a block, scanned": ("remat", True, dict(color="#E69F00", marker="^")),
    "reversible, scanned": ("reversible", True, dict(color="#0072B2", marker="o")),
    "reversible, a list": ("reversible", False, dict(color="#56B4E9", marker="D", linestyle=":")),
}


def temporary_bytes(depth: int, backward: Backward, scanned: bool) -> int:
    """What the compiled gradient needs beside its arguments and results."""

    def struct(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def loss(params, x):
        y1, y2 = revjax.rev_chain_apply(residual, residual, params, x, backward=backward)
        return (y1**2).sum() + (y2**2).sum()

    axis = (depth,) if scanned else ()
    vector, kernel = struct(*axis, CHANNELS), struct(*axis, 3, 3, CHANNELS, CHANNELS)
    block = ((((vector, vector, kernel),) * 2),) * 2  # two layers a function, two functions
    x = (struct(BATCH, SIDE, SIDE, CHANNELS),) * 2
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    lowered = gradient.lower(block if scanned else [block] * depth, x)
    memory = lowered.compile().memory_analysis()
    if memory is None:
        raise SystemExit("The compiler of this platform does not say what memory a program needs.")
    return memory.temp_size_in_bytes


def draw(depths: list[int], mib: dict[str, list[float]], device: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for label, values in mib.items():
        axes.plot(
            depths[: len(values)],
            values,
            label=label,
            linewidth=1.8,
            markersize=5,
            **FORMS[label][2],
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.set_yticks([10, 30, 100, 300, 1000, 3000, 10000], minor=False)
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(10, 2.5 * max(map(max, mib.values())))
    axes.set_xlabel("reversible blocks, each of four 3x3 convolutions")
    axes.set_ylabel("temporary memory of the gradient, MiB")
    axes.set_title(
        f"Compiled for {device} by JAX {jax.__version__}: "
        f"{BATCH} images of {SIDE}x{SIDE}x{2 * CHANNELS}, float32",
        fontsize=9,
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compiled memory of the gradient against depth.")
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--png", type=Path, default=ROOT / "docs/memory.png")
    parser.add_argument("--json", type=Path, default=RESULTS / "memory_against_depth.json")
    arguments = parser.parse_args()
    depths = sorted(arguments.depths)
    device = jax.devices()[0].device_kind

    width = max(map(len, FORMS))
    print(f"temporary memory of the gradient, MiB, compiled for {device}")
    print(f"{'blocks':<{width}}" + "".join(f"{depth:>9}" for depth in depths))
    temporary: dict[str, list[int]] = {}
    for label, (backward, scanned, _) in FORMS.items():
        print(f"{label:<{width}}", end="", flush=True)
        temporary[label] = []
        for depth in depths:
            if not scanned and depth > UNROLLED_BLOCKS:
                break
            temporary[label].append(temporary_bytes(depth, backward, scanned))
            print(f"{temporary[label][-1] / MIB:>9.1f}", end="", flush=True)
        print()

    mib = {label: [count / MIB for count in counts] for label, counts in temporary.items()}
    draw(depths, mib, device, arguments.png)
    options = " ".join(map(str, depths))
    record = {
        "command": f"python benchmarks/memory_against_depth.py --depths {options}",
        **environment(),
        "batch": BATCH,
        "image": [SIDE, SIDE, 2 * CHANNELS],
        "blocks": depths,  # a shorter list below ends at UNROLLED_BLOCKS
        "temporary_bytes": temporary,
    }
    arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
