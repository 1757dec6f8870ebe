"""What training asks of the compiler beside its defaults."""

import functools
import os
import warnings
from typing import Any

import jax

# Of XLA's DebugOptions: what may be part of a CUDA graph. By default convolutions may not, so that
# each of them ends one, nor loops.
_IN_GRAPHS = (
    "FUSION",
    "CUBLAS",
    "CUBLASLT",
    "CUDNN",
    "CUSTOM_CALL",
    "DYNAMIC_SLICE_FUSION",
    "CONVOLUTION",
    "CONDITIONAL",
    "WHILE",
)
# And what YNNPACK computes on a CPU: its default less convolutions. oneDNN takes those, and some
# products, where jaxlib has them from it.
_BY_YNNPACK = ("LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT", "LIBRARY_FUSION_TYPE_REDUCE")
# A flag, as a compiler option cannot set a map.
_NO_UNROLLING = "xla_cpu_disable_loop_unrolling"
_OPTIONS: dict[str, dict[str, Any]] = {
    "gpu": {"xla_gpu_enable_command_buffer": ",".join(_IN_GRAPHS)},
    "cpu": {
        "xla_cpu_experimental_ynn_fusion_type": ",".join(_BY_YNNPACK),
        "xla_cpu_experimental_onednn_custom_call": True,
    },
}


def compiler_options(platform: str) -> dict[str, Any]:
    """Options for `jax.jit(..., compiler_options=...)` of the programs of a run.

    On a GPU a step of a small network is a thousand kernels of some microseconds, and the host
    takes longer to launch one than the GPU to run it. So programs become CUDA graphs, whole, whose
    kernels start one another. Numbers stay what they are.

    On a CPU convolutions, and the products of which the gradients of their kernels are sums, are
    oneDNN's, where jaxlib has them from it (seen on x86, from JAX 0.11 on), and else Eigen's. By
    default convolutions of more than 16 channels are YNNPACK's, with which steps of networks take
    longer (docs/performance.md).

    Other libraries round otherwise; and oneDNN adds what is added to a convolution in the dtype of
    the convolution. So what one in bfloat16 gives to a float32 stream is rounded by
    `lax.reduce_precision` before it is added, as all layers of revjax do it: else the stream is
    rounded to bfloat16.

    What the compiler does not know, as it may be of another version, is left out with a warning.

    Args:
        platform: "gpu", "cpu", or another, for which there are no options.

    Example:
        >>> step = jax.jit(lambda x: x + 1, compiler_options=compiler_options("cpu"))
        >>> compiler_options("tpu")
        {}
    """
    known = {}
    for name, value in _OPTIONS.get(platform, {}).items():  # no comprehension: its frame counts
        if _known(name, value):
            known[name] = value
    return known


def set_xla_flags() -> None:
    """Ask in XLA_FLAGS for what no compiler option can ask for, and keep what it has.

    That is of programs on a CPU: that LLVM unrolls no loops before it makes vectors of them. XLA
    lets it make none of what is unrolled, so a loop over a few channels would become as many single
    operations: normalisation, ReLU and sums take longer so (docs/performance.md).

    XLA reads the variable once, when a process first uses a device: call it before, as later it has
    no effect. Processes that this one starts inherit it. The name of a file of flags is left alone.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if _NO_UNROLLING not in flags and (not flags or flags.startswith("-")):
        os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_extra_options={_NO_UNROLLING}".strip()


@functools.cache
def _known(name: str, value: Any) -> bool:
    """Whether the compiler takes the option; warns, once, where it does not."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        warnings.warn(
            f"Programs are compiled without {name}, and so slower than they could be: {error}",
            stacklevel=3,
        )
        return False
    return True
