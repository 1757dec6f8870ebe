"""The training step of a pod of TPUs that need not be there: memory and collectives of a chip.

Command:   python benchmarks/pod.py [--topology v5e:16x16] [--fsdp 16] [--batch 16384]
               [--model revnet104] [--ways store,remat,reversible] [--json FILE]
Hardware:  a CPU; the compiler is in the extra tpu-aot
Figures:   benchmarks/results/pod.json and .md, told in docs/scaling.md

The program is the one that train.py dispatches, of the recipe of configs/imagenet.py in bfloat16,
laid out on a mesh of the chips; it is compiled and not run. What the file of figures has is not
compiled again: delete it to begin anew. A program takes a quarter of an hour on 2 busy cores.

Bytes moved are those of a ring: an array that is summed over the chips passes each of them twice,
one that is gathered once. What moves is told by its shape: that of a parameter or of its part on a
chip, a vector as long as a number of channels, or a single number. Anything else, such as an
activation, would be in a row "others".
"""

import argparse
import json
import math
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from collectives import Collective, read_collectives
from jax.sharding import Mesh
from record import RESULTS, ROOT, environment

from revjax.data import find_normalization
from revjax.memory.report import compile_with_report
from revjax.memory.target import find_chips
from revjax.models import list_models
from revjax.training.config import Config, check_config
from revjax.training.errors import ConfigError
from revjax.training.mesh import make_mesh, split_over_fsdp
from revjax.training.optimizer import is_kernel, learning_rate_schedule, make_optimizer
from revjax.training.state import TrainState, abstract_model, initial_state
from revjax.training.step import Split, make_train_steps
from revjax.training.votes import Votes

WAYS = ("store", "remat", "reversible")

PARAMETERS = "split parameters, joined"
KERNELS = "gradients of kernels"
CHANNELS = "batch statistics, and gradients of scales and biases"
NUMBERS = "single numbers"
OTHERS = "others"  # activations, for instance; there are none


def config_of(model: str, way: str, batch: int, fsdp: int) -> Config:
    """The recipe, on a pod."""
    sys.path.insert(0, str(ROOT))
    from configs.imagenet import recipe

    values: Any = recipe(model)
    values.model.dtype = "bfloat16"
    values.model.backward = way
    if way == "reversible":
        values.model.store_last = 0  # as on TPUs it is by default
    values.batch_size = batch
    values.mesh = {"data": -1, "fsdp": fsdp}
    return check_config(values)


def abstract_program(config: Config, mesh: Mesh) -> tuple[Any, TrainState, tuple[Any, ...]]:
    """The jitted dispatch of training steps, the state it takes, and its other arguments."""
    optimizer, schedule = make_optimizer(config.optim), learning_rate_schedule(config.optim)
    program = make_train_steps(config, abstract_model(config), optimizer, schedule, mesh)
    state = jax.eval_shape(partial(initial_state, config, optimizer))
    batch, image = config.batch_size, config.data.info.image_shape
    images: Any = jax.ShapeDtypeStruct((batch, *image), jnp.uint8)
    labels: Any = jax.ShapeDtypeStruct((batch,), jnp.int32)
    votes = jax.ShapeDtypeStruct((mesh.size,), jnp.int32)
    normalization = find_normalization(config.data.normalize, np.zeros((0, *image), np.uint8))
    data = Split(images, labels, normalization)
    return program, state, (data, None, jax.ShapeDtypeStruct((), jnp.int32), Votes(votes, votes))


def moved(collectives: list[Collective], state: TrainState, mesh: Mesh) -> dict[str, Any]:
    """What a step moves, in groups: how many arrays, and the bytes that a chip sends."""
    fsdp, groups_of, group_of_size = mesh.shape["fsdp"], {}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        part = split_over_fsdp(mesh, leaf).shard_shape(leaf.shape)
        for shape in (leaf.shape, part, (fsdp, *part)):  # the last is joined, and not in order
            for of_stage_or_block in (shape, shape[1:]):
                group = KERNELS if is_kernel(path) else CHANNELS
                groups_of.setdefault(long_axes(of_stage_or_block), group)
                group_of_size.setdefault(math.prod(of_stage_or_block), group)
    channels = {shape[-1] for shape in groups_of if shape}
    groups: dict[str, Any] = {}
    for kind, arrays, times in collectives:
        for array in arrays:
            shape = long_axes(array.shape)
            if not shape:
                group = NUMBERS
            elif kind == "all-gather" and shape in groups_of:
                group = PARAMETERS
            elif kind == "all-reduce" and len(shape) == 1 and shape[0] in channels:
                group = CHANNELS
            elif kind in ("all-reduce", "reduce-scatter"):  # a CPU's are of matrices: `conv.py`
                group = group_of_size.get(math.prod(shape), OTHERS)
            else:
                group = OTHERS
            row = groups.setdefault(f"{group} ({kind}, {array.dtype})", {"arrays": 0, "bytes": 0})
            row["arrays"] += times
            row["bytes"] += times * array.bytes * (2 if kind == "all-reduce" else 1)
    return groups


def long_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The lengths of a shape's axes but for those of 1, in order of size."""
    return tuple(sorted(length for length in shape if length > 1))


def row_of(config: Config, chips: tuple[Any, ...]) -> dict[str, Any]:
    """The figures of a case."""
    mesh = make_mesh(config, chips)
    program, state, others = abstract_program(config, mesh)
    compiled, report = compile_with_report(program, state, *others)
    collectives = read_collectives(compiled.as_text())
    operations = Counter[str]()
    for collective in collectives:
        operations[collective.kind] += collective.times
    return {
        **report._asdict(),
        "collectives": dict(operations),
        "moved": moved(collectives, state, mesh),
    }


def tables(figures: dict[str, Any]) -> str:
    """The figures in Markdown: a table for each network and layout, a column for each way."""
    cells: dict[str, dict[str, dict[str, str]]] = {}
    for label, row in figures.items():
        step, way = label.rsplit(": ", 1)
        column = {
            "temporary MB of a chip": f"{row['temporary_bytes'] / 1e6:,.1f}",
            "arguments, MB of a chip": f"{row['argument_bytes'] / 1e6:,.1f}",
            "peak, MB of a chip": f"{row['peak_bytes'] / 1e6:,.1f}",
            "time to compile, s": f"{row['compile_seconds']:,.0f}",
        }
        for kind, times in row["collectives"].items():
            column[f"{kind} operations"] = f"{times:,}"
        for group, sent in row["moved"].items():
            column[f"{group}: arrays"] = f"{sent['arrays']:,}"
            column[f"{group}: MB a chip sends"] = f"{sent['bytes'] / 1e6:,.3f}"
        for name, cell in column.items():
            cells.setdefault(step, {}).setdefault(name, {})[way] = cell
    lines = []
    for step, rows in cells.items():
        known = [way for way in WAYS if any(way in row for row in rows.values())]
        lines += [f"| {step} | {' | '.join(known)} |", "|---" * (len(known) + 1) + "|"]
        for name, row in rows.items():
            lines.append(f"| {name} | {' | '.join(row.get(way, '') for way in known)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="The training step of a pod, compiled for it.")
    parser.add_argument("--topology", default="v5e:16x16", help="as libtpu names it [v5e:16x16]")
    parser.add_argument("--fsdp", type=int, default=16, help="config.mesh.fsdp [16]")
    parser.add_argument("--batch", type=int, default=16384, help="of all chips together [16384]")
    parser.add_argument("--model", default="revnet104", choices=list_models(), metavar="NAME")
    parser.add_argument("--ways", default=",".join(WAYS), help="with commas between")
    parser.add_argument("--json", type=Path, default=RESULTS / "pod.json", help="of figures")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # the chips are described, not looked for
    try:
        chips = find_chips(arguments.topology)
        configs = [
            config_of(arguments.model, way, arguments.batch, arguments.fsdp)
            for way in arguments.ways.split(",")
        ]
        layouts = [make_mesh(config, chips).devices.shape for config in configs]
    except (RuntimeError, ValueError, ConfigError) as error:
        sys.exit(f"pod.py: {error}")
    path = arguments.json
    figures: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for config, (data, fsdp) in zip(configs, layouts, strict=True):
        label = (
            f"{arguments.model}, batch {arguments.batch}, bfloat16, on {arguments.topology} as "
            f"{data} x {fsdp}: {config.model.backward}"
        )
        if label in figures:
            continue
        print(label, flush=True)
        figures[label] = {**environment(), **row_of(config, chips)}
        path.write_text(json.dumps(figures, indent=2) + "\n")
    path.with_suffix(".md").write_text(tables(figures))
    print(tables(figures))


if __name__ == "__main__":
    main()
