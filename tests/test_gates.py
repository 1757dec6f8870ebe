"""Chains with gates against loops that leave closed functions out, and under transformations."""

# Calls with options chosen at run time, which no type checker can follow.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

import functools
from collections import Counter
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from networks import (
    COMPILE_FAST,
    relative_error,
)

import revjax
from revjax import (
    rev_block_apply,
    rev_block_inverse,
    rev_chain_apply,
    rev_chain_inverse,
)
from revjax.conv import conv
from revjax.layers import rounded
from revjax.stochastic_depth import apply_gated

compiled = partial(jax.jit, compiler_options=COMPILE_FAST)


DEPTH = 4
GATES_F, GATES_G = np.array([1, 0, 1, 0], bool), np.array([1, 1, 0, 0], bool)
BACKWARDS = ["reversible", "remat", "store"]


def loop(f, g, blocks, x, args, xs, gates, affine=False):
    """The chain's blocks one by one, on the grid if they add; a closed function is not called."""

    def join(h, gate, params, x, half, extra):
        if not gate:
            return x, None
        residual, aux = h(params, half, *args, extra)
        if affine:
            return x * jnp.exp(residual[0]) + residual[1], aux
        return x + revjax.round_to_grid(residual, 14), aux

    (x1, x2), auxes = x if affine else revjax.round_to_grid(x, 14), []
    for (params_f, params_g), extra, (gate_f, gate_g) in zip(blocks, xs, gates, strict=True):
        x1, aux_f = join(f, gate_f, params_f, x1, x2, extra)
        x2, aux_g = join(g, gate_g, params_g, x2, x1, extra)
        auxes.append((aux_f, aux_g))
    return (x1, x2), auxes


def f(w, x2, scale, shift):
    r = scale * jnp.tanh(x2 @ w + shift)
    return r, {"mean": r.mean(), "count": jnp.int32(1)}


def g(w, y1, scale, shift):
    return f(1.5 * w, y1, scale, 2 * shift)


def affine_f(w, x2, scale, shift):
    r, aux = f(w, x2, scale, shift)
    return (0.3 * r, r), aux


def affine_g(w, y1, scale, shift):
    return affine_f(1.5 * w, y1, scale, 2 * shift)


def unstack(tree, depth=DEPTH):
    return [jax.tree.map(lambda a, i=i: a[i], tree) for i in range(depth)]


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def operands():
    """Params, x, args and xs of a chain: all that has a gradient."""
    params = normal(2, DEPTH, 3, 3), normal(3, DEPTH, 3, 3)
    x = normal(0, 5, 3), normal(1, 5, 3)
    return params, x, (np.float64(0.7),), normal(4, DEPTH, 1, 3)


def value(y):
    return jnp.sum(jnp.sin(y[0])) + jnp.sum(jnp.cos(y[1]))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@functools.cache
def by_loop(gates_f, gates_g, affine=False):
    """Value, auxes and gradients by stored backprop of `loop`."""
    h = (affine_f, affine_g) if affine else (f, g)

    def loss(params, x, args, xs):
        gates = list(zip(gates_f, gates_g, strict=True))
        y, auxes = loop(*h, unstack(params), x, args, unstack(xs), gates, affine)
        return value(y), (y, auxes)

    return compiled(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(*operands())


def check_against_loop(got, gates_f, gates_g, affine=False):
    (loss, (y, auxes)), (dparams, dx, dargs, dxs) = got
    due = by_loop(tuple(gates_f), tuple(gates_g), affine)
    (due_loss, (due_y, due_auxes)), (due_dparams, *due_others) = due
    assert relative_error((loss, y), (due_loss, due_y)) <= 1e-12
    assert relative_error([dx, dargs, dxs], due_others) <= 1e-12
    for gates, dw, due_dw in zip((gates_f, gates_g), dparams, due_dparams, strict=True):
        assert relative_error(dw, due_dw) <= 1e-12
        assert not np.any(dw[~gates]) and np.all(np.any(dw[gates], (1, 2)))
    auxes = auxes if isinstance(auxes, list) else unstack(auxes)
    both = zip(gates_f, gates_g, strict=True)
    for block, due_block, gates in zip(auxes, due_auxes, both, strict=True):
        for aux, due_aux, is_open in zip(block, due_block, gates, strict=True):
            due_aux = due_aux if is_open else {"mean": 0.0, "count": 0}
            chex.assert_trees_all_close(aux, due_aux, rtol=1e-12)


def with_gradients(backward, listed, affine=False, **options):
    """A compiled function of gates and `operands()`."""
    h = (affine_f, affine_g) if affine else (f, g)
    how = dict(has_aux=True, backward=backward, **options)
    if affine:
        how["coupling"] = revjax.affine

    def loss(operands, gates):
        params, x, args, xs = operands
        if listed:
            params, xs, gates = unstack(params), unstack(xs), unstack(gates)
        y, auxes = rev_chain_apply(*h, params, x, *args, xs=xs, gates=gates, **how)
        return value(y), (y, auxes)

    return compiled(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("backward", BACKWARDS)
def test_a_chain_with_gates_is_that_of_its_open_functions(x64, backward, listed):
    """Values, aux and gradients of params, x, args and xs; which are open is data."""
    step = with_gradients(backward, listed)
    check_against_loop(step(operands(), (GATES_F, GATES_G)), GATES_F, GATES_G)
    check_against_loop(step(operands(), (~GATES_F, GATES_G)), ~GATES_F, GATES_G)


def test_blocks_that_store_with_gates(x64):
    step = with_gradients("reversible", False, store_last=2)
    check_against_loop(step(operands(), (GATES_F, GATES_G)), GATES_F, GATES_G)


def test_affine_coupling_with_gates(x64):
    step = with_gradients("reversible", False, affine=True)
    check_against_loop(step(operands(), (GATES_F, GATES_G)), GATES_F, GATES_G, affine=True)


def test_gates_of_one_function_alone(x64):
    step = with_gradients("reversible", listed=False)
    check_against_loop(step(operands(), (None, GATES_G)), np.ones(DEPTH, bool), GATES_G)


def test_a_block_with_gates(x64):
    params, x, args, xs = operands()
    params, shift = unstack(params)[0], xs[0]
    on_grid = revjax.round_to_grid(x, 14)
    options = dict(has_aux=True)

    @compiled
    def there_and_back(gates):
        y, aux = rev_block_apply(f, g, params, x, *args, shift, gates=gates, **options)
        back = rev_block_inverse(f, g, params, y, *args, shift, gates=gates, **options)
        return y, aux, back

    for gates in ((True, False), (False, True), (False, False)):
        y, aux, back = there_and_back(jax.tree.map(jnp.asarray, gates))
        due, (due_aux,) = loop(f, g, [params], x, args, [shift], [gates])
        chex.assert_trees_all_close(y, due, rtol=1e-14)
        for got, expected in zip(aux, due_aux, strict=True):
            expected = {"mean": 0.0, "count": 0} if expected is None else expected
            chex.assert_trees_all_close(got, expected, rtol=1e-12)
        chex.assert_trees_all_equal(back, on_grid)
    y, _ = rev_block_apply(f, g, params, x, *args, shift, gates=(True, None), **options)
    chex.assert_trees_all_close(
        y, loop(f, g, [params], x, args, [shift], [(True, True)])[0], rtol=1e-14
    )


OPEN, ONE = jnp.ones(DEPTH, bool), jnp.ones((2, 3))
STACK = jnp.ones((DEPTH, 3, 3))


def dense(w, x):
    return jnp.tanh(x @ w)


@pytest.mark.parametrize(
    "params, gates, error, sentence",
    [
        ((STACK, STACK), (OPEN, jnp.ones(DEPTH)), TypeError,
         r"a gate must be bool\[depth\] or None, got \(bool\[4\], float32\[4\]\)"),
        ((STACK, STACK), (OPEN[:, None], None), TypeError, r"bool\[depth\] .* \(bool\[4,1\]"),
        ((STACK, STACK), (OPEN[0], None), TypeError, r"bool\[depth\] .* \(bool\[\], None\)"),
        ((STACK, STACK), ([True] * DEPTH, None), TypeError, r"a gate must be bool\[depth\]"),
        ((STACK, STACK), (np.array([True, None] * 2), None), TypeError, r"got \(object\[4\], None"),
        ((STACK, STACK), ("ab", None), TypeError, r"a gate must be bool\[depth\]"),
        ((STACK, STACK), OPEN, TypeError, r"gates must be a pair.*Give \(for f, for g\)"),
        ((STACK, STACK), (OPEN, OPEN[:3]), ValueError, r"gates must have the depth .*bool\[3\]"),
        ([(STACK[0],) * 2] * 2, [(OPEN[0], OPEN[0])], ValueError,
         "list of 2 blocks: gates must be one too"),
        ([(STACK[0],) * 2] * 2, (OPEN[:2], OPEN[:2]), ValueError, "gates must be one too"),
        ([(STACK[0],) * 2], [(OPEN, None)], TypeError, r"a gate must be bool\[\] or None, got"),
        ([(STACK[0],) * 2], [OPEN[0]], TypeError, "gates must be a pair"),
    ],
)  # fmt: skip
def test_wrong_gates_are_refused_in_a_sentence(params, gates, error, sentence):
    for apply in (rev_chain_apply, rev_chain_inverse):
        with pytest.raises(error, match=sentence):
            jax.eval_shape(lambda apply=apply: apply(dense, dense, params, (ONE, ONE), gates=gates))


# Exactness, memory and time ---------------------------------------------------------------------


def conv_block(params, x, compute):
    """BN-ReLU-conv3x3, the convolution in the dtype `compute`, rounded as docs/numerics.md says."""
    scale, kernel = params
    mean, var = x.mean((0, 1, 2), keepdims=True), x.var((0, 1, 2), keepdims=True)
    x = jax.nn.relu((x - mean) * jax.lax.rsqrt(var + 1e-3) * scale)
    x, kernel = (rounded(a, compute).astype(compute) for a in (x, kernel))
    return rounded(conv(x, kernel).astype(mean.dtype), compute)


def conv_chain(depth, channels=4):
    kernels = 0.25 * normal(0, 2, depth, 3, 3, channels, channels)
    scales = 1 + 0.1 * normal(1, 2, depth, 1, 1, 1, channels)
    params = (scales[0], kernels[0]), (scales[1], kernels[1])
    x = normal(2, 2, 6, 6, channels), normal(3, 2, 6, 6, channels)
    return jax.tree.map(np.float32, (params, x))


@pytest.mark.optimised
@pytest.mark.parametrize("compute, tolerance", [(jnp.float32, 5e-6), (jnp.bfloat16, 1e-6)])
def test_on_the_grid_gradients_and_inverse_are_exact(compute, tolerance):
    """At a depth where without a grid they are not: test_reversible.py."""
    depth = 54
    params, x = conv_chain(depth)
    gates = np.random.default_rng(1).random((2, depth)) < 0.6
    h = partial(conv_block, compute=compute)

    def loss(params, x, gates, backward):
        y = rev_chain_apply(h, h, params, x, gates=tuple(gates), backward=backward)
        return value(y), y

    @compiled
    def steps(params, x, gates):
        ways = [jax.grad(partial(loss, backward=b), (0, 1), has_aux=True) for b in BACKWARDS[::2]]
        (got, y), (due, _) = (step(params, x, gates) for step in ways)
        return got, due, y, rev_chain_inverse(h, h, params, y, gates=tuple(gates))

    got, due, y, back = steps(params, x, gates)
    assert relative_error(got, due) <= tolerance
    chex.assert_trees_all_equal(back, revjax.round_to_grid(x, 14))
    assert relative_error(y, x) > 0.1


@pytest.mark.optimised
def test_memory_is_that_of_an_ungated_chain_at_any_depth():
    def temporary_bytes(depth, gated):
        params, x = conv_chain(depth, channels=8)
        gates = np.ones((2, depth), bool)
        h = partial(conv_block, compute=jnp.float32)

        def loss(params, x, gates):
            return value(rev_chain_apply(h, h, params, x, gates=tuple(gates) if gated else None))

        gradient = jax.jit(jax.grad(loss, (0, 1)))
        return gradient.lower(params, x, gates).compile().memory_analysis().temp_size_in_bytes

    shallow, deep, ungated = (temporary_bytes(*how) for how in ((4, 1), (12, 1), (12, 0)))
    assert shallow == deep <= 1.1 * ungated


def test_a_closed_function_does_not_run():
    """An open one runs twice a step; in "store" the second time without its product."""
    ran = []

    def h(params, x):
        jax.debug.callback(lambda name: ran.append(int(name)), params[0])
        return jnp.tanh(x @ params[1])

    names = jnp.arange(DEPTH), 10 + jnp.arange(DEPTH)
    w = jnp.ones((DEPTH, 3, 3))
    due = Counter([*np.flatnonzero(GATES_F), *(10 + np.flatnonzero(GATES_G))] * 2)
    products = {"reversible": 2 * 4, "store": 2 * 3}  # of two functions, scanned
    for backward, count in products.items():

        def loss(w, gates, backward=backward):
            params = tuple((name, w) for name in names)
            y = rev_chain_apply(h, h, params, (ONE, ONE), gates=gates, backward=backward)
            return value(y)

        ran.clear()
        jax.block_until_ready(compiled(jax.grad(loss))(w, (GATES_F, GATES_G)))
        jax.effects_barrier()
        assert Counter(ran) == due
        jaxpr = jax.make_jaxpr(jax.grad(loss))(w, (GATES_F, GATES_G))
        assert str(jaxpr).count("dot_general[") == count


# Under JAX's transformations --------------------------------------------------------------------


def dense_aux(w, x):
    y = jnp.tanh(x @ w)
    return y, y.sum(1)


def dense_loss(params, x, gates, store_last=0):
    options = dict(gates=gates, store_last=store_last)
    y, aux = rev_chain_apply(dense_aux, dense_aux, params, x, has_aux=True, **options)
    return value(y), aux


def dense_operands():
    params, x = operands()[:2]
    return jax.tree.map(np.float32, (params, tuple(np.tile(half, (2, 1))[:8] for half in x)))


@functools.cache
def on_one_device():
    step = compiled(jax.grad(dense_loss, (0, 1), has_aux=True))
    return jax.device_get(step(*dense_operands(), (GATES_F, GATES_G)))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_a_sharded_mesh(axis_type):
    params, x = dense_operands()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        params, gates = jax.device_put((params, (GATES_F, GATES_G)), NamedSharding(mesh, P()))
        got = compiled(jax.grad(dense_loss, (0, 1), has_aux=True))(params, x, gates)
    assert len(got[0][1][0].sharding.device_set) == 4
    assert relative_error(got, on_one_device()) <= 1e-6


def test_within_shard_map():
    """A stream that differs between devices, gates that may not."""
    params, x = dense_operands()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    out_specs = (P(), (P(None, "data"), P(None, "data")))

    def gradient(gates, specs, store_last=0):
        @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), specs), out_specs=out_specs)
        def loss(params, x, gates):
            y, aux = dense_loss(params, x, gates, store_last)
            return jax.lax.psum(y, "data"), aux

        return compiled(jax.grad(loss, (0, 1), has_aux=True))(params, x, gates)

    for store_last in (0, 2):
        got = gradient((GATES_F, GATES_G), P(), store_last)
        assert relative_error(got, on_one_device()) <= 1e-6
    with pytest.raises(ValueError, match="gates vary over the mesh axes data: give all devices"):
        gradient((jnp.tile(OPEN, 4), None), P("data"))


@pytest.mark.parametrize("way", ["shard_map", "explicit"])
def test_a_gated_module_of_a_batch_over_devices(way):
    """What is closed is as much spread over devices as what it stands for."""

    def apply(params, statistics, x):
        y = x @ params
        return y, {"mean": 0.9 * statistics["mean"] + 0.1 * y.mean(0)}

    x, w, old = (
        np.ones((8, 3), np.float32),
        np.ones((3, 3), np.float32),
        {"mean": np.ones(3, np.float32)},
    )
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))

    def run(gate, x):
        y, new = apply_gated(apply, gate, w, old, x)
        return y, jax.lax.pmean(new["mean"], "data") if way == "shard_map" else new["mean"]

    if way == "shard_map":
        run = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P("data"), P()))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        for gate, y, mean in ((True, 3.0, 1.2), (False, 0.0, 1.0)):
            got = compiled(run)(jnp.bool_(gate), x)
            np.testing.assert_allclose(got[0], np.full((8, 3), y))
            np.testing.assert_allclose(got[1], np.full(3, mean), rtol=1e-6)


def test_under_vmap_over_gates(x64):
    """Both sides run there, and the right one is chosen."""
    params, x, *_ = operands()
    gates = np.random.default_rng(2).random((3, 2, DEPTH)) < 0.5
    step = jax.grad(dense_loss, (0, 1), has_aux=True)
    got = compiled(jax.vmap(step, (None, None, 0)))(params, x, (gates[:, 0], gates[:, 1]))
    one = compiled(step)
    for i, (gates_f, gates_g) in enumerate(gates):
        due = one(params, x, (gates_f, gates_g))
        chex.assert_trees_all_close(jax.tree.map(lambda a, i=i: a[i], got), due, rtol=1e-12)


def test_hessian_vector_products(x64):
    """`jvp` of `grad`, by the rule and by stored backprop of the loop."""
    params, x, args, xs = operands()
    v = jax.tree.map(np.cos, params)

    def ours(params):
        y, _ = rev_chain_apply(
            f, g, params, x, *args, xs=xs, gates=(GATES_F, GATES_G), has_aux=True
        )
        return value(y)

    def stored(params):
        gates = list(zip(GATES_F, GATES_G, strict=True))
        return value(loop(f, g, unstack(params), x, args, unstack(xs), gates)[0])

    got, due = (
        compiled(lambda p, v, loss=loss: jax.jvp(jax.grad(loss), (p,), (v,))[1])(params, v)
        for loss in (ours, stored)
    )
    assert relative_error(got, due) <= 1e-11
