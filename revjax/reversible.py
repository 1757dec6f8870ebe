"""The reversible block and chain, their inverses, and the rule that differentiates them.

A block (Gomez et al. 2017, eq. 6 and 7), here with the additive coupling:

    y1 = x1 + f(params_f, x2, *args)          x2 = y2 - g(params_g, y1, *args)
    y2 = x2 + g(params_g, y1, *args)          x1 = y1 - f(params_f, x2, *args)

The rule saves the parameters, the arguments and the *output* of a chain of blocks, nothing in
between. Backward it goes from the last block to the first (their algorithm 1); one `jax.vjp` a
function both reconstructs the block's input and differentiates the block. So each function is
evaluated twice a step, and activation memory does not grow with depth. The last `store_last` blocks
are left out of this: they store, are evaluated once, and what is output of the others is saved.

Not supported: forward mode. `jax.jvp` of a chain raises JAX's error for custom_vjp functions.
`jvp` of `grad` (Hessian-vector products) works and stores nothing more; `grad` of `grad` works and
stores the activations of the chain. Where blocks change shape, or parameters outweigh activations,
`jax.checkpoint` is the better tool.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypedDict, Unpack

import jax
import jax.numpy as jnp

from revjax.contract import (
    Gates,
    check_backward,
    check_function,
    check_pair,
    check_store_last,
    check_unroll,
)
from revjax.coupling import Coupling, additive
from revjax.gate import keep_dear, run_if
from revjax.grid import GridBits, stream_bound, stream_peak
from revjax.recompute import after, apart, checkpoint_step, recompute, stays_loop, store
from revjax.segments import (
    close,
    concatenate,
    last_operands,
    lay_out,
    put_after,
    split_last,
)
from revjax.trees import PyTree, add, is_inexact, merge, partition, vjp

Pair = tuple[PyTree, PyTree]
Backward = Literal["reversible", "remat", "store"]

# So many blocks of a scan that store are unrolled, and no more. A loop would stack what they keep,
# which takes more memory on a GPU; but without one programs take time to compile for each block.
LONGEST_INLINE = 8


class BlockOptions(TypedDict, total=False):
    """The options of `rev_chain_apply` that a single block has too."""

    coupling: Coupling
    grid_bits: GridBits
    has_aux: bool
    gates: Gates


def rev_block_apply(
    f: Callable, g: Callable, params: Pair, x: Pair, *args: PyTree, **options: Unpack[BlockOptions]
) -> Any:
    """Apply one reversible block (Gomez et al. 2017, eq. 6).

    Args:
        f, g, params, x, *args: as for `rev_chain_apply`, without the leading axis.
        **options: coupling, grid_bits, has_aux, gates, as `rev_chain_apply` has them.

    Returns:
        `y = (y1, y2)`, each like its half of x; with has_aux, `(y, (aux_f, aux_g))`. Raises what
        `rev_chain_apply` raises.

    Example:
        >>> def dense(w, x): return jnp.tanh(x @ w)
        >>> x, params = (jnp.ones((2, 3)), jnp.zeros((2, 3))), (jnp.eye(3), jnp.eye(3))
        >>> y = rev_block_apply(dense, dense, params, x)
        >>> print(rev_block_inverse(dense, dense, params, y)[0][0])
        [1. 1. 1.]
    """
    out = rev_chain_apply(f, g, [check_pair("params", params)], x, *args, **_of_chain(options))
    return (out[0], out[1][0]) if options.get("has_aux") else out


def rev_block_inverse(
    f: Callable, g: Callable, params: Pair, y: Pair, *args: PyTree, **options: Unpack[BlockOptions]
) -> Pair:
    """Recover x from `y = rev_block_apply(f, g, params, x, *args)` (Gomez et al. 2017, eq. 7).

    Args:
        f, g, params, y, *args: as for `rev_chain_inverse`, without the leading axis.
        **options: coupling, grid_bits, has_aux, gates, as `rev_block_apply` was given them.

    Returns:
        `x = (x1, x2)`, like y. Raises what `rev_chain_apply` raises.

    Example:
        >>> def dense(w, x): return jnp.tanh(x @ w)
        >>> y, params = (jnp.ones((2, 3)), jnp.ones((2, 3))), (jnp.eye(3), jnp.eye(3))
        >>> x = rev_block_inverse(dense, dense, params, y)
        >>> print(rev_block_apply(dense, dense, params, x)[0][0])
        [1. 1. 1.]
    """
    blocks = [check_pair("params", params)]
    return rev_chain_inverse(f, g, blocks, y, *args, **_of_chain(options))


def _of_chain(options: BlockOptions) -> Any:
    if unknown := options.keys() - BlockOptions.__annotations__.keys():
        raise TypeError(
            f"a single block has no option {', '.join(sorted(unknown))}: give "
            f"{', '.join(BlockOptions.__annotations__)}, or rev_chain_apply a list of one block."
        )
    gates = options.get("gates")
    return options if gates is None else options | {"gates": [gates]}


def rev_chain_apply(
    f: Callable,
    g: Callable,
    params: Pair | list[Pair],
    x: Pair,
    *args: PyTree,
    xs: PyTree = None,
    gates: Gates | list[Gates] = None,
    coupling: Coupling = additive,
    grid_bits: GridBits = "default",
    has_aux: bool = False,
    unroll: int | bool = 1,
    backward: Backward = "reversible",
    store_last: int = 0,
    range_check: Callable[[jax.Array, float], object] | None = None,
) -> Any:
    """Apply a chain of reversible blocks, whose gradient needs the activations of one block only.

    A block is eq. 6 of Gomez et al. 2017, its gradient their algorithm 1; gates are those of Huang
    et al. 2016.

    f and g must be pure, and give the same bits for the same inputs: randomness comes from keys in
    args or xs. Traced values that they close over get their gradients. Integer and PRNG-key leaves
    are allowed everywhere and have no gradient. Call it under `jax.jit`: it traces f and g anew.

    Args:
        f: `(params_f, x2, *args) -> residual` like x1; with has_aux, `-> (residual, aux)`. If xs is
            given, the block's entry of it comes last: `f(params_f, x2, *args, xs_i)`.
        g: `(params_g, y1, *args) -> residual` like x2, in the same way.
        params: `(params_f, params_g)`, every leaf `[depth, ...]`, run by `lax.scan`; or a list of
            such pairs without that axis, for blocks that differ, run by a Python loop, which takes
            time to compile for each block.
        x: `(x1, x2)`, the two halves of the stream, any pytrees.
        *args: further inputs of every f and g, any pytrees; bind static ones by functools.partial.
        xs: inputs that differ by block (keys, statistics), any pytree with every leaf
            `[depth, ...]`; where params is a list, a list with an entry a block.
        gates: which functions run (stochastic depth, Huang et al. 2016): `(for f, for g)`, each
            bool `[depth]`, or None for always; where params is a list, a list of such pairs of
            bool `[]`. A closed function does not run, forward or backward: its half of the stream
            stays as it is, its gradients and its aux are zero. Of an open one "store" keeps what
            products, convolutions and sums give, and evaluates the rest again. Under `shard_map`
            all devices must have the same gates; under `vmap` over gates closed functions run, too.
        coupling: how a residual joins the stream. `revjax.additive`: y = x + residual.
            `revjax.affine`: f and g return `(log_scale, shift)`, each like the half, and
            y = x * exp(log_scale) + shift. Or a `Coupling` of your own.
        grid_bits: k rounds x and every residual to multiples of `2**-k`, so that gradient and
            inverse are exact while the stream stays within `stream_bound(k)`; x must be float32 or
            float64. None does not round, and the error grows with depth. The default is the
            coupling's own: 14 for additive, None for affine, which cannot keep to a grid.
        has_aux: f and g return `(residual, aux)`; the aux of the forward pass is returned, carries
            no gradient, and is dropped in the recomputation (so BatchNorm counts a batch once).
        unroll: as in `lax.scan`; blocks that store, if eight or fewer, are unrolled at any rate.
        backward: "reversible" reconstructs activations from the output; "remat" keeps the input of
            each block and recomputes the rest; "store" keeps all. Values are the same.
        store_last: of so many blocks, the last, "reversible" keeps what products, convolutions and
            sums give, and does not compute that again. These blocks are differentiated first: what
            they keep is gone before the others need memory, so that the last blocks of a network
            whose first are larger store at no cost. f and g must not print sums then, nor be
            complex, as `jax.checkpoint` with a policy differentiates neither.
        range_check: called with the largest |stream| of the forward pass (float32 scalar, traced)
            and its bound: `warn_out_of_range`, `check_in_range`, or your own. None costs nothing.

    Returns:
        `y = (y1, y2)`, each like its half of x; with has_aux, `(y, (aux_f, aux_g))`, with leaves
        `[depth, ...]`, or `(y, [(aux_f, aux_g), ...])` where params is a list.

    Raises:
        TypeError: a pair or a gate is not one, a residual differs from what is due in structure,
            shape or dtype, or the stream's dtype cannot hold the grid.
        ValueError: leaves disagree on the depth, an option has no such value, or gates differ
            between devices.

    Example:
        >>> def dense(w, x): return jnp.tanh(x @ w)
        >>> w, x = jnp.zeros((100, 3, 3)), (jnp.ones((2, 3)), jnp.ones((2, 3)))  # 100 blocks
        >>> y = rev_chain_apply(dense, dense, (w, w), x)
        >>> print(rev_chain_inverse(dense, dense, (w, w), y)[0][0])
        [1. 1. 1.]
    """
    chain = f, g, params, xs, gates
    y, (aux,) = apply_chains(
        [chain], x, args, coupling, grid_bits, has_aux, unroll, backward, store_last, range_check
    )
    return (y, aux) if has_aux else y


def apply_chains(
    chains: list[tuple[Callable, Callable, Pair | list[Pair], PyTree, Gates | list[Gates]]],
    x: Pair,
    args: tuple[PyTree, ...],
    coupling: Coupling,
    grid_bits: GridBits,
    has_aux: bool,
    unroll: int | bool,
    backward: Backward,
    store_last: int,
    range_check: Callable[[jax.Array, float], object] | None,
) -> tuple[Pair, list[Any]]:
    """Apply chains `(f, g, params, xs, gates)` in turn, as one: nothing is saved in between.

    All else is as for `rev_chain_apply`. Returns y, and what each chain has for its aux.
    """
    check_backward(backward)
    check_unroll(unroll)
    if range_check is not None:
        check_function("range_check", range_check)
    bits, x, segments, operands = lay_out(chains, x, args, coupling, grid_bits, has_aux)
    depths = [1 if segment.depth is None else segment.depth for segment in segments]
    store_last = check_store_last(store_last, sum(depths), backward)
    track = range_check is not None
    if backward == "reversible" and 0 not in depths:
        y, auxes, peaks = _reversible(segments, operands, x, unroll, track, store_last)
    else:
        remat = backward == "remat"
        y, auxes, peaks = _forward_chain(segments, operands, x, unroll, track, remat)
    if track:
        bounds = [stream_bound(bits, a.dtype) for a in jax.tree.leaves(partition(x)[0])]
        range_check(stream_peak((x, peaks)), min(bounds, default=float("inf")))
    each = iter(jax.lax.stop_gradient(auxes))
    return y, [
        [next(each) for _ in p] if isinstance(p, list) else next(each) for _, _, p, *_ in chains
    ]


def rev_chain_inverse(
    f: Callable,
    g: Callable,
    params: Pair | list[Pair],
    y: Pair,
    *args: PyTree,
    xs: PyTree = None,
    gates: Gates | list[Gates] = None,
    coupling: Coupling = additive,
    grid_bits: GridBits = "default",
    has_aux: bool = False,
    unroll: int | bool = 1,
) -> Pair:
    """Recover x from `y = rev_chain_apply(f, g, params, x, *args, xs=xs, gates=gates)`.

    The blocks are inverted from the last to the first (Gomez et al. 2017, eq. 7). On the grid it is
    bit for bit x rounded to the grid; off it, x up to an error that grows with depth.
    Differentiable in both modes, with stored activations.

    Args:
        f, g, params, y, *args, xs, gates: what `rev_chain_apply` was given and returned.
        coupling, grid_bits, has_aux, unroll: as there; aux outputs are dropped.

    Returns:
        `x = (x1, x2)`, of y's structure, shapes and dtypes. Raises what `rev_chain_apply` raises.

    Example:
        >>> def dense(w, x): return jnp.tanh(x @ w)
        >>> y, w = (jnp.ones((2, 3)), jnp.ones((2, 3))), 0.1 * jnp.ones((5, 3, 3))
        >>> x = rev_chain_inverse(dense, dense, (w, w), y)
        >>> print(rev_chain_apply(dense, dense, (w, w), x)[0][0])
        [1. 1. 1.]
    """
    check_unroll(unroll)
    chain = f, g, params, xs, gates
    _, y, segments, operands = lay_out([chain], y, args, coupling, grid_bits, has_aux)
    for segment, (params, xs, shared) in zip(reversed(segments), reversed(operands), strict=True):

        def step(y, per_block, block=segment.block, shared=shared):
            params, xs = per_block
            return _inverse(block, y, params, xs, shared), None

        y, _ = _run(step, y, segment, params, xs, unroll, reverse=True)
    return y


# One block --------------------------------------------------------------------------------------


def _forward(block, x, params, xs, shared, stores=False):
    """The block's output, and aux; of one that stores, gradients keep what is dear (`gate.py`)."""
    f, g, coupling = block
    (x1, x2), (xs, (gate_f, gate_g)) = x, xs
    y1, x2, f_aux = _do(f, coupling, gate_f, x1, params[0], x2, xs, *shared[0], stores=stores)
    y2, y1, g_aux = _do(g, coupling, gate_g, x2, params[1], y1, xs, *shared[1], stores=stores)
    return (y1, y2), (f_aux, g_aux)


def _inverse(block, y, params, xs, shared):
    f, g, coupling = block
    (y1, y2), (xs, (gate_f, gate_g)) = y, xs
    inverse = coupling._replace(combine=coupling.separate)
    x2, *_ = _do(g, inverse, gate_g, y2, params[1], y1, xs, *shared[1])
    x1, *_ = _do(f, inverse, gate_f, y1, params[0], x2, xs, *shared[0])
    return x1, x2


def _backward(block, y, dy, params, xs, shared):
    f, g, coupling = block
    (y1, y2), (dy1, dy2), (xs, (gate_f, gate_g)) = y, dy, xs
    x2, dx2, from_g = _undo(g, coupling, gate_g, y2, dy2, dy1, params[1], y1, xs, *shared[1])
    dparams_g, dy1, dxs_g, *dshared_g = from_g
    x1, dx1, from_f = _undo(f, coupling, gate_f, y1, dy1, dx2, params[0], x2, xs, *shared[0])
    dparams_f, dx2, dxs_f, *dshared_f = from_f
    dparams, dshared = (dparams_f, dparams_g), [dshared_f, dshared_g]
    dxs = add(dxs_f, dxs_g), (None, None)
    return (x1, x2), (dx1, dx2), dparams, dxs, dshared


def _do(h, coupling, gate, x, params, half, *operands, stores=False):
    """`combine(x, residual)`, half, and h's aux; where the gate is closed, x, half and zeros.

    Where it stores, half is handed through, as in `_undo`.
    """

    def run(x, params, half, *operands):
        residual, aux = h(params, apart(half), *operands)
        return coupling.combine(x, residual), aux

    def run_and_hand_through(x, params, half, *operands):
        return run(x, params, half, *operands), half

    if stores and gate is None:  # an open gate keeps what is dear by itself
        (y, aux), half = keep_dear(run_and_hand_through)(x, params, half, *operands)
    else:
        operands = params, half, *operands
        y, aux = run_if(gate, run, lambda zeros, x, *_: (x, zeros[1]), x, *operands)
    return y, half, aux


def _undo(h, coupling, gate, y, dy, dhalf, params, half, *operands):
    """Reconstruct x of `y = combine(x, h(params, half, ...))`, and differentiate, by one vjp of h.

    Half is handed through, so that the cotangent it has already is the first term of the sum, as in
    stored backprop: the order of a float sum matters, in bf16 to far more than the last bit.
    """

    def with_half(params, half, *operands):
        return h(params, apart(half), *operands)[0], half

    def run(y, dy, dhalf, params, half, *operands):
        (residual, _), h_vjp = vjp(with_half, params, half, *operands)
        x = coupling.separate(y, residual)
        _, combine_vjp = vjp(coupling.combine, x, residual)
        dx, dresidual = combine_vjp(dy)
        return x, dx, h_vjp((dresidual, dhalf))

    def skip(zeros, y, dy, dhalf, *_):
        dparams, _, *rest = zeros[2]
        return y, dy, (dparams, dhalf, *rest)

    return run_if(gate, run, skip, y, dy, dhalf, params, half, *operands)


# The chain: segments; and apart, as they are traced, their operands `(params, xs, shared)` ------


def _run(step, carry, segment, params, xs, unroll, reverse=False, last=None):
    """The last carry, and what the steps return.

    Where only the first blocks of a scan run, last is what the steps of the others returned: what
    is returned is of all blocks then.
    """
    if segment.depth is None:
        return step(carry, (params, xs))
    scan = partial(jax.lax.scan, reverse=reverse, unroll=unroll)
    if segment.run == segment.depth:
        return scan(step, carry, (params, xs))

    # Some of the blocks: read in place, and written beside last, where slices would be copies.
    def step_at(carry, i):
        return step(carry, jax.tree.map(lambda leaf: leaf[i], (params, xs)))

    def step_into(carry, i):
        carry, into = carry
        carry, out = step_at(carry, i)
        put = partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
        return (carry, jax.tree.map(put, into, out)), None

    indices = jnp.arange(segment.run, dtype=jnp.uint32)
    if last is None or not stays_loop(segment.run, unroll):
        carry, out = scan(step_at, carry, indices)
        return carry, out if last is None else concatenate(out, last)
    (carry, out), _ = scan(step_into, (carry, put_after(segment.run, last)), indices)
    return carry, out


def _forward_chain(segments, operands, x, unroll, track, remat=False):
    auxes, peaks, like = [], [], x
    for segment, own in zip(segments, operands, strict=True):
        alone = remat and segment.depth is None
        segment, (params, xs, shared) = close(segment, own, like) if alone else (segment, own)
        apply: Any = partial(_forward, segment.block)
        own_unroll = unroll
        if segment.stores:
            apply = partial(apply, stores=True)
            depth = segment.depth or 1
            own_unroll = True if depth <= LONGEST_INLINE else unroll
            if not stays_loop(depth, own_unroll):
                apply = partial(store, apply)
        elif alone:
            apply = partial(recompute, apply)

        def step(x, per_block, apply=apply, shared=shared):
            y, aux = apply(x, *per_block, shared)
            return y, (aux, stream_peak(y) if track else None)

        if remat and segment.depth is not None:
            step = checkpoint_step(step, segment.depth, unroll)
        x, (aux, peak) = _run(step, x, segment, params, xs, own_unroll)
        auxes.append(aux)
        peaks.append(peak)
    return x, auxes, peaks


def _backward_chain(segments, operands, y, dy, unroll, dlast):
    """The cotangents of x and of the operands, of which dlast are those of the last blocks."""
    doperands, ready = [], (dy, dlast)  # what is there before the next segment begins
    for segment, (params, xs, shared) in zip(reversed(segments), reversed(operands), strict=True):

        def step(carry, per_block, block=segment.block, shared=shared):
            y, dy, dshared = carry
            params, xs = per_block
            x, dx, dparams, dxs, dshared_i = _backward(block, y, dy, params, xs, shared)
            return (x, dx, add(dshared, dshared_i)), (dparams, dxs)

        y, dy = after((y, dy), ready)
        if segment.run == segment.depth:
            last, dshared = None, jax.tree.map(jnp.zeros_like, partition(shared)[0])
        else:
            last, dshared = tuple(dlast[0][:2]), dlast[0][2]
        carry = y, dy, dshared
        options: Any = dict(reverse=True, last=last)
        carry, (dparams, dxs) = _run(step, carry, segment, params, xs, unroll, **options)
        y, dy, dshared = carry
        ready = dparams, dxs, dshared
        doperands.append((dparams, dxs, dshared))
    return dy, doperands[::-1]


def _reversible(segments, operands, x, unroll, track, store_last):
    """`_forward_chain` under the rule, which saves the operands and the output.

    With store_last the output of the blocks before, and what stored backpropagation keeps of these.
    """
    closed = [close(segment, own, x) for segment, own in zip(segments, operands, strict=True)]
    segments, operands = [segment for segment, _ in closed], [own for _, own in closed]
    head, tail = split_last(segments, store_last)
    in_both = len(head) + len(tail) - len(segments)  # 1 where a scan is

    def chain(floating, others):
        x, operands = merge(floating, others)
        return _forward_chain(segments, operands, x, unroll, track)

    def chain_fwd(floating, others):
        x, operands = merge(floating, others)
        y, auxes, peaks = _forward_chain(head, operands[: len(head)], x, unroll, track)

        def last(y, own):
            z, *aux = _forward_chain(tail, own, y, unroll, track)
            return z, aux

        z, pullback, of_last = vjp(last, y, last_operands(tail, operands), has_aux=True)
        auxes, peaks = (
            [*a[:-1], concatenate(a[-1], b[0]), *b[1:]] if in_both else [*a, *b]
            for a, b in zip((auxes, peaks), of_last, strict=True)
        )
        return (z, auxes, peaks), (operands, y, pullback)

    def chain_bwd(saved, cotangents):
        operands, y, pullback = saved
        dz = jax.tree.map(lambda a, da: da if is_inexact(a) else None, y, cotangents[0])
        dy, dlast = pullback(dz)
        dx, dfirst = _backward_chain(head, operands[: len(head)], y, dy, unroll, dlast)
        return (dx, [*dfirst, *dlast[in_both:]]), None

    rule = jax.custom_vjp(chain)
    rule.defvjp(chain_fwd, chain_bwd)
    return rule(*partition((x, operands)))
