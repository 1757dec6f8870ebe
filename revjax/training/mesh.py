"""The mesh of devices that a run is laid out on, and what lies where.

    batches                          split over both axes, "data" and "fsdp"
    the data set                     whole on every device
    parameters, optimiser's state    whole on every device, or split over "fsdp"
    all else of the state            whole on every device

Parameters that are split are joined for a step, all at once, and their gradients split again: what
is kept between steps takes less memory, and activations never leave their device.

The axes are automatic: the compiler divides the programs, which are those of one device, and adds
what has to be exchanged. So a result depends on the layout by the order of float32 sums alone; or,
of a model that computes in bfloat16, by how the parts of its kernels' gradients are rounded, too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from revjax.training.config import Config
from revjax.training.errors import ConfigError

BATCH_AXES = ("data", "fsdp")
SMALL = 1024  # elements of a leaf that is not worth splitting


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a config, of all devices of all processes, or of some of a single process.

    Args:
        config: how many devices there are along each axis, and the batch that they share.
        devices: those there are to choose from, described ones to compile for, for instance;
            None: those of all processes.

    Raises:
        ConfigError: there are not as many devices, or the batch cannot be split evenly.
    """
    devices = jax.devices() if devices is None else devices
    data, fsdp = config.mesh.data, config.mesh.fsdp
    if data == -1:
        data = max(len(devices) // fsdp, 1)
    number, there = data * fsdp, f"there are {len(devices)} devices"
    if number > len(devices) or (number < len(devices) and jax.process_count() > 1):
        due = f"{len(devices)} in all" if jax.process_count() > 1 else f"at most {len(devices)}"
        raise ConfigError(
            f"config.mesh is {data} x {fsdp} (data x fsdp), and {there}: choose numbers whose "
            f"product is {due}."
        )
    if config.batch_size % number:
        raise ConfigError(
            f"config.batch_size is {config.batch_size}, which {number} devices cannot share "
            f"evenly: choose a multiple of {number}, or fewer devices by config.mesh.data."
        )
    return jax.make_mesh(
        (data, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices[:number]
    )


def platform_of(mesh: Mesh) -> str:
    """Of its devices: "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Along the first axis, that of the examples of a batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def split_over_fsdp(mesh: Mesh, tree: Any) -> Any:
    """The shardings of parameters, or of the optimiser's state, as a tree of the same structure.

    A leaf is split along the larger of its last two axes, which are those of the channels, not of
    the blocks of a stage; where "fsdp" does not divide that, along the other; else it is whole.
    """

    def sharding(leaf: Any) -> NamedSharding:
        size, spec = mesh.shape["fsdp"], [None] * leaf.ndim
        axes = sorted(range(leaf.ndim)[-2:], key=lambda axis: leaf.shape[axis], reverse=True)
        fitting = [axis for axis in axes if leaf.shape[axis] % size == 0]
        if size > 1 and leaf.size >= SMALL and fitting:
            spec[fitting[0]] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(sharding, tree)


def on_each_device(mesh: Mesh, function: Callable, parts: tuple[bool, ...]) -> Callable:
    """`function` as each device calls it: for a batch of its own, not for a part of a larger one.

    What it returns must be the same on all devices: means and sums over `BATCH_AXES`.

    Args:
        mesh: the devices.
        function: of arrays.
        parts: for each argument whether it is split among the devices, or whole on each.
    """
    specs = tuple(PartitionSpec(BATCH_AXES) if part else PartitionSpec() for part in parts)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())


def put(tree: Any, shardings: Any) -> Any:
    """Host arrays, which every process has whole, on the devices of all.

    Args:
        tree: of arrays.
        shardings: one for all of them, or a tree of the same structure.
    """

    def place(array: Any, sharding: NamedSharding) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda array: place(array, shardings), tree)
    return jax.tree.map(place, tree, shardings)


def get(tree: Any) -> Any:
    """Copies of the arrays as numpy's, whole, in every process.

    One that is split is joined on the devices for that, one after another.
    """

    def fetch(leaf: jax.Array) -> np.ndarray:
        if not leaf.is_fully_replicated:
            sharding: Any = leaf.sharding
            leaf = jax.jit(lambda leaf: leaf, out_shardings=replicated(sharding.mesh))(leaf)
        return np.array(leaf.addressable_data(0))  # asarray may share the device's memory

    return jax.tree.map(fetch, tree)
