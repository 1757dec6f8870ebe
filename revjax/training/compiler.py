"""What training asks of the compiler beside its defaults."""

from jax.sharding import Mesh

# Of XLA's DebugOptions: what may be part of a CUDA graph. The defaults leave out convolutions, so that
# each would end one, and loops.
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


def compiler_options(platform: str) -> dict[str, str]:
    """Options for `jax.jit(..., compiler_options=...)` of the programs of a run.

    On a GPU a small network is a thousand kernels a step, of microseconds each, and the host takes
    longer to launch one than the GPU to run it. So whole programs become CUDA graphs, whose kernels
    start one another, side by side where none waits for the other. Numbers stay what they are.

    Args:
        platform: "gpu", or another, for which there are no options.

    Example:
        >>> compiler_options("cpu")
        {}
    """
    if platform != "gpu":
        return {}
    return {
        "xla_gpu_enable_command_buffer": ",".join(_IN_GRAPHS),
        "xla_gpu_command_buffer_scheduling_mode": "LHS",
    }
