"""Running a function or not, as a gate says: where it is closed, that costs next to nothing."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from revjax.trees import PyTree


def run_if(gate: jax.Array | None, run: Callable, skip: Callable, *operands: PyTree) -> PyTree:
    """`run(*operands)` where the gate is open, else `skip(zeros, *operands)`.

    Args:
        gate: bool `[]`, or None for one that is open. Under `jax.vmap` over gates both sides run.
        run: any traceable function.
        skip: what is returned instead, like what run returns; zeros is that, all zeros.
        *operands: any pytrees.

    Raises:
        ValueError: under `shard_map` gates differ between devices. The derivative of run may hold a
            sum over devices, which those with a closed gate would not join.
    """
    if gate is None:
        return run(*operands)
    if axes := jax.typeof(gate).mat.varying:
        raise ValueError(
            f"gates vary over the mesh axes {', '.join(sorted(map(str, axes)))}: give all devices "
            "of a shard_map the same gates, or the same key to draw them from."
        )
    due = jax.eval_shape(run, *operands)

    def closed(*operands):
        zeros = jax.tree.map(_zeros, due)
        return jax.tree.map(_vary_as, due, skip(zeros, *operands))

    # What passes from the conditional of a forward pass to that of its backward pass is written to
    # memory, as zeros where closed: so let it be only what is dear to compute again.
    return jax.lax.cond(gate, keep_dear(run), closed, *operands)


def keep_dear(run: Callable) -> Callable:
    """Run, of which stored backpropagation keeps what products, convolutions and sums give.

    The rest, normalisation and activations, is evaluated again, for which a loop, a conditional or
    `recompute.store` keeps it apart.
    """
    return jax.checkpoint(run, policy=_is_dear, prevent_cse=False)


def _is_dear(primitive, *_, **__):
    return primitive.name in ("revjax_conv", "conv_general_dilated", "dot_general", "reduce_sum")


def _zeros(due):
    return jnp.zeros(due.shape, due.dtype, device=due.sharding)  # None, but on an explicit mesh


def _vary_as(due, leaf):
    """Return leaf, under `shard_map` as one that varies over the axes that are due."""
    axes = due.manual_axis_type  # None outside of shard_map
    axes = axes.varying - jax.typeof(leaf).mat.varying if axes else ()
    return jax.lax.pcast(leaf, tuple(axes), to="varying") if axes else leaf
