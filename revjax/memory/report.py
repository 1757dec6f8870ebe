"""What a function needs of memory and arithmetic, by the compiler's own account."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding

from revjax.contract import check_function
from revjax.memory.operations import count_operations
from revjax.memory.target import find_device


class MemoryReport(NamedTuple):
    """What a compiled function needs. Bytes are those of one device.

    Attributes:
        temporary_bytes: beside arguments and results: activations, mostly.
        argument_bytes: of all arguments.
        output_bytes: of the results, the part that takes donated arguments' place included.
        peak_bytes: the most that the program holds at once, all of the above included.
        operations: of matrix products and convolutions as traced, loops multiplied out; those of
            ragged groups (`jax.lax.ragged_dot`) are not counted.
        compile_seconds: tracing included.

    Example:
        >>> x = jax.ShapeDtypeStruct((1000,), jnp.float32)
        >>> report: revjax.MemoryReport = revjax.memory_report(jnp.sum, x)
        >>> report.argument_bytes, report.output_bytes
        (4000, 4)
    """

    temporary_bytes: int
    argument_bytes: int
    output_bytes: int
    peak_bytes: int
    operations: int
    compile_seconds: float


def memory_report(
    fn: Callable,
    *args: Any,
    topology: str | None = None,
    compiler_options: dict[str, Any] | None = None,
) -> MemoryReport:
    """Compile `fn(*args)` and report what it needs; it is not run, and nothing is allocated.

    Args:
        fn: a function that `jax.jit` can compile, or a jitted one, whose donation then counts.
        args: pytrees of arrays or of `jax.ShapeDtypeStruct`, larger than the machine if need be.
            With a topology, there must be an array, and no static argument.
        topology: what to compile for. None is JAX's default device; "cpu", "gpu" or "tpu" another
            backend of this process; "h100", or one of TPUs such as "v5e:2x2", a device that need
            not be there, if its compiler is installed.
        compiler_options: as `jax.jit` takes them.

    Returns:
        A `MemoryReport`. Peak bytes are arguments, results that are not donated arguments, and
        temporaries: all have their places for the whole run of a program.

    Raises:
        TypeError: fn is no function, compiler_options no dict, or JAX's for an argument that is no
            array.
        ValueError: there is no such topology, or no argument to compile for it; or its compiler
            does not tell what memory a program needs.
        RuntimeError: the compiler for the topology is not installed, or another process has it.

    Example:
        >>> a = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
        >>> report = revjax.memory_report(lambda a, b: a @ b, a, a)
        >>> print(report.operations, report.argument_bytes, report.output_bytes)
        2000000000 8000000 4000000
    """
    return compile_with_report(fn, *args, topology=topology, compiler_options=compiler_options)[1]


def compile_with_report(
    fn: Callable,
    *args: Any,
    topology: str | None = None,
    compiler_options: dict[str, Any] | None = None,
) -> tuple[Any, MemoryReport]:
    """The compiled program, as `jax.stages.Compiled`, with what `memory_report` says of it."""
    check_function("fn", fn)
    if not isinstance(compiler_options, dict | None):
        raise TypeError(f"compiler_options={compiler_options!r}: give a dict of names and values.")
    if topology is not None:
        if not jax.tree.leaves(args):
            raise ValueError(
                f"topology={topology!r}: the device goes with the arguments, and there is no array "
                "among them; make a constant of the function an argument."
            )
        sharding = SingleDeviceSharding(find_device(str(topology)))
        args = jax.tree.map(lambda leaf: _abstract(leaf, sharding), args)
    jitted: Any = fn if hasattr(fn, "trace") and hasattr(fn, "lower") else jax.jit(fn)
    began = time.perf_counter()
    traced = jitted.trace(*args)
    compiled = traced.lower().compile(compiler_options)
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    if memory is None:
        raise ValueError(
            f"the compiler for {topology or jax.default_backend()} does not tell what memory a "
            'program needs: give another topology, such as "cpu".'
        )
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    temporary = memory.temp_size_in_bytes
    return compiled, MemoryReport(
        temporary_bytes=temporary,
        argument_bytes=arguments,
        output_bytes=outputs,
        peak_bytes=arguments + outputs - memory.alias_size_in_bytes + temporary,
        operations=count_operations(traced.jaxpr.jaxpr),
        compile_seconds=seconds,
    )


def _abstract(leaf: Any, sharding: SingleDeviceSharding) -> jax.ShapeDtypeStruct:
    aval = jax.eval_shape(lambda leaf: leaf, leaf)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding, weak_type=aval.weak_type)
