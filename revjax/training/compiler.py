"""What training asks of the compiler beside its defaults."""

import functools
import warnings

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
# And what YNNPACK computes on a CPU: its default less convolutions, so that Eigen computes those.
_BY_YNNPACK = ("LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT", "LIBRARY_FUSION_TYPE_REDUCE")
_OPTIONS = {
    "gpu": {"xla_gpu_enable_command_buffer": ",".join(_IN_GRAPHS)},
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": ",".join(_BY_YNNPACK)},
}


def compiler_options(platform: str) -> dict[str, str]:
    """Options for `jax.jit(..., compiler_options=...)` of the programs of a run.

    On a GPU a step of a small network is a thousand kernels of some microseconds, and the host
    takes longer to launch one than the GPU to run it. So programs become CUDA graphs, whole, whose
    kernels start one another. Numbers stay what they are.

    On a CPU float32 convolutions of more than 16 channels are YNNPACK's by default. In JAX 0.10.2,
    the last one for Python 3.11, those are much slower than Eigen's (docs/performance.md); with
    later ones networks take no longer with Eigen's.

    What the compiler does not know, as it may be of another version, is left out with a warning:
    options make a run faster, and not different.

    Args:
        platform: "gpu", "cpu", or another, for which there are no options.

    Example:
        >>> step = jax.jit(lambda x: x + 1, compiler_options=compiler_options("cpu"))
        >>> compiler_options("tpu")
        {}
    """
    return dict(_OPTIONS[platform]) if platform in _OPTIONS and _known(platform) else {}


@functools.cache
def _known(platform: str) -> bool:
    """Whether the compiler takes the options; warns, once, where it does not."""
    try:
        jax.jit(lambda: 0, compiler_options=_OPTIONS[platform]).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        warnings.warn(
            f"Programs are compiled by XLA's defaults, and so slower than they could be: {error}",
            stacklevel=3,
        )
        return False
    return True
