"""One way to a gradient, in a process of its own, which steps when it is told to.

speed.py starts it: `python contestant.py '{"study": "chain", ...}'`. It answers in lines of JSON:
what the compiler says, once it has made all; the seconds of a step for each line "step" that it
reads; and for "end", its last, the most memory that the process has held. With "error_against", the
options of another way, it answers with the relative error of its gradient against that one's.
"""

# Calls with options chosen at run time, which no type checker can follow; PyTorch is in an extra.
# pyright: reportArgumentType=false, reportCallIssue=false, reportMissingImports=false

import ctypes
import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gradients import flatten, relative_error

Made = tuple[Callable[[], Any], dict[str, Any]]  # a step that waits for its results, and facts


def jax_chain(
    depth: int,
    batch: int,
    side: int,
    channels: int,
    dtype: str | None = None,
    dear: bool = False,
    xla_defaults: bool = False,
    **options: Any,
) -> Made:
    """The gradient of a chain of `rev_chain_apply` by its parameters and its input.

    With dear, each residual function keeps what `revjax.gate.keep_dear` says; with xla_defaults the
    compiler is not asked for what train.py asks of it.
    """
    import jax
    import jax.numpy as jnp
    from basic_block import residual

    import revjax
    from revjax.gate import keep_dear
    from revjax.memory.report import compile_with_report

    asked = {} if xla_defaults else ask_as_train_py()
    keys = iter(jax.random.split(jax.random.key(0), 8))
    shape = (depth, 3, 3, channels, channels)

    def layer():
        kernel = jax.random.normal(next(keys), shape) * (2 / (9 * channels)) ** 0.5
        return jnp.ones((depth, channels)), jnp.zeros((depth, channels)), kernel

    params = tuple(tuple(layer() for _ in range(2)) for _ in range(2))
    x = tuple(jax.random.normal(next(keys), (2, batch, side, side, channels)))

    f = partial(residual, dtype=dtype)
    f = keep_dear(f) if dear else f

    def loss(params, x):
        y1, y2 = revjax.rev_chain_apply(f, f, params, x, **options)
        return (y1**2).sum() + (y2**2).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    compiled, report = compile_with_report(gradient, params, x, compiler_options=asked)
    return lambda: jax.block_until_ready(compiled(params, x)), report._asdict()


def jax_network(
    name: str,
    batch: int,
    side: int,
    dear: bool = False,
    xla_defaults: bool = False,
    **options: Any,
) -> Made:
    """The training step of a network of `create_model`; what is not its own is `jax_chain`'s."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import revjax
    from revjax.memory.network import training_step
    from revjax.memory.report import compile_with_report

    asked = {} if xla_defaults else ask_as_train_py()
    if dear:
        let_stages_keep_dear()

    def make():
        return revjax.create_model(name, 10, rngs=nnx.Rngs(0), **options)

    # The program before the numbers, so that what it takes to compile is not held beside them.
    function, arguments = training_step(nnx.eval_shape(make), batch, side)
    compiled, report = compile_with_report(function, *arguments, compiler_options=asked)
    return_freed()
    _, params, variables = nnx.split(make(), nnx.Param, ...)
    momentum = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), arguments[0][2])
    state = [jax.block_until_ready((params, variables, momentum))]
    del params, variables, momentum  # donated
    images = jax.random.normal(jax.random.key(1), arguments[1].shape)
    labels = jnp.arange(batch, dtype=jnp.int32) % 10
    return_freed()

    def step():
        state[0] = jax.block_until_ready(compiled(state[0], images, labels))

    return step, report._asdict()


def ask_as_train_py() -> dict[str, Any]:
    """Ask of XLA what train.py asks of it, before a device is used; return the options."""
    from revjax.training.compiler import compiler_options, set_xla_flags

    set_xla_flags()
    return compiler_options("cpu")


def let_stages_keep_dear() -> None:
    """Have the residual functions of all stages that this process makes under `keep_dear`."""
    import revjax.stage
    from revjax.gate import keep_dear

    pure = revjax.stage.pure

    def pure_and_dear(module):
        apply, *arrays = pure(module)
        return keep_dear(apply), *arrays

    revjax.stage.pure = pure_and_dear


def torch_chain(depth: int, batch: int, side: int, channels: int, way: str) -> Made:
    """The same chain in PyTorch: plain, with its checkpoint around each block, or by MemCNN."""
    import torch
    from torch_models import Chain, count_operations

    torch.manual_seed(0)

    def make(depth):
        chain = Chain(depth, channels, way)
        x = torch.randn(batch, 2 * channels, side, side, requires_grad=True)

        def step():
            chain.zero_grad(set_to_none=True)
            x.grad = None
            (chain(x) ** 2).sum().backward()
            return [x.grad, *(parameter.grad for parameter in chain.parameters())]

        return step

    return make(depth), {"operations": depth * count_operations(make(1))}


def torch_network(name: str, batch: int, side: int, way: str) -> Made:
    """The training step of a RevNet of `create_model` in PyTorch, as torch_chain's."""
    import torch
    from torch_models import RevNet, count_operations

    from revjax.models import architecture_of

    torch.manual_seed(0)
    network = RevNet(num_classes=10, way=way, **architecture_of(name))
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=2e-4)

    def make(batch):
        images = torch.randn(batch, 3, side, side)
        labels = torch.arange(batch) % 10

        def step():
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()

        return step

    operations = batch * count_operations(make(2)) // 2  # of 1 there would be nothing to normalise
    return make(batch), {"operations": operations}


STUDIES: dict[str, Callable[..., Made]] = {
    "chain": jax_chain,
    "network": jax_network,
    "chain in PyTorch": torch_chain,
    "network in PyTorch": torch_network,
}


def return_freed() -> None:
    """Return to the system what compilers have freed, which glibc keeps for the next one."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)


def process_peak_bytes() -> int:
    """The most memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage, whose figure a process inherits from its parent
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    spec = json.loads(sys.argv[1])
    make = STUDIES[spec.pop("study")]
    if "error_against" in spec:
        reference = spec.pop("error_against")
        found, due = (flatten(make(**options)[0]()) for options in (spec, spec | reference))
        print(json.dumps(relative_error(found, due)), flush=True)
        return
    step, facts = make(**spec)
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        if line.strip() != "step":
            break
        began = time.perf_counter()
        step()
        print(json.dumps(time.perf_counter() - began), flush=True)
    print(json.dumps(process_peak_bytes()), flush=True)


if __name__ == "__main__":
    main()
