"""What training asks of the compiler beside its defaults."""

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


def compiler_options(platform: str) -> dict[str, str]:
    """Options for `jax.jit(..., compiler_options=...)` of the programs of a run.

    On a GPU a step of a small network is a thousand kernels of some microseconds, and the host
    takes longer to launch one than the GPU to run it. So programs become CUDA graphs, whole, whose
    kernels start one another. Numbers stay what they are.

    Args:
        platform: "gpu", or another, for which there are no options.

    Example:
        >>> compiler_options("cpu")
        {}
    """
    if platform != "gpu":
        return {}
    return {"xla_gpu_enable_command_buffer": ",".join(_IN_GRAPHS)}
