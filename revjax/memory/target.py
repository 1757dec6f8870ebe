"""What to compile for: a backend of this process, or a device that this machine does not have.

Neither a TPU nor a GPU is needed to compile for one: their compilers are Python packages, and
`jax.experimental.topologies` describes the device to them.
"""

import functools
import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies

BACKENDS = ("cpu", "gpu", "tpu")

# XLA's description of an NVIDIA H100 SXM, 80 GB (openxla/xla, h100_sxm.txtpb): facts of the device.
# The version of cuDNN is one that the present jax[cuda13] brings, not that of XLA's file.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def is_tpu(topology: str | None) -> bool:
    """Whether a topology, as `find_device` takes it, is one of TPUs."""
    return topology is not None and (topology == "tpu" or ":" in topology)


@functools.cache
def find_device(topology: str) -> Any:
    """Return a device to compile for.

    Args:
        topology: a backend of this process, "cpu", "gpu" or "tpu"; "h100"; or a topology of TPUs as
            libtpu names it, such as "v5e:2x2", of which the first chip is taken.

    Raises:
        ValueError: there is no such device.
        RuntimeError: the package with its compiler is not installed, or another process has it.
    """
    if topology in BACKENDS:
        try:
            return jax.devices(topology)[0]
        except RuntimeError as error:
            raise ValueError(
                f"topology={topology!r}: this process has no such backend, its own is "
                f'{jax.default_backend()}; "h100" and "v5e:2x2", say, need not be there.'
            ) from error
    if topology == "h100":
        return _describe_gpu(H100)
    if ":" in topology:
        return find_chips(topology)[0]
    raise ValueError(
        f'topology={topology!r}: give "cpu", "gpu" or "tpu" for a backend of this process, "h100", '
        'or a topology of TPUs such as "v5e:2x2".'
    )


def _describe_gpu(description: str) -> Any:
    plugins = "jax_cuda13_plugin", "jax_cuda12_plugin"
    if all(importlib.util.find_spec(plugin) is None for plugin in plugins):
        raise RuntimeError(
            "to compile for an H100, install the compiler for it, CUDA's for JAX: "
            'pip install "jax[cuda13]".'
        )
    jax.devices()  # the first call registers the plugin
    options: dict[str, Any] = {"topology": "1x1x1", "target_config": description}
    try:
        return topologies.get_topology_desc("", platform="cuda", **options).devices[0]
    except NotImplementedError as error:
        raise RuntimeError(
            "JAX has set CUDA aside, as there is no GPU here: start Python with JAX_PLATFORMS=cpu."
        ) from error


@functools.cache
def find_chips(name: str) -> tuple[Any, ...]:
    """Return all chips of a topology of TPUs, to lay a mesh on: 256 of "v5e:16x16".

    Args:
        name: as libtpu names it.

    Raises:
        ValueError, RuntimeError: as `find_device` does.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError(
            f"to compile for {name}, install the compiler for TPUs: "
            'pip install "revjax[tpu-aot]" (it is the package libtpu).'
        )
    # Else libtpu looks for a TPU, and for the metadata server of its machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        return tuple(topologies.get_topology_desc(name, platform="tpu").devices)
    except Exception as error:  # libtpu's own, of no common class
        if "lockfile" in str(error):
            raise RuntimeError(
                f"to compile for {name}, wait for the process that uses libtpu to end, or, where "
                f"none needs a TPU, set ALLOW_MULTIPLE_LIBTPU_LOAD=1 ({error})."
            ) from error
        raise ValueError(
            f'topology={name!r}: libtpu does not describe it ({error}); "v5e:2x2" is one that it '
            "knows."
        ) from error
