"""The rule against stored backpropagation of the block's equations, written out in `reference`."""

# Calls with options chosen at run time, which no type checker can follow.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

from functools import cache, partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import revjax
from revjax import rev_block_apply, rev_block_inverse, rev_chain_apply, rev_chain_inverse
from revjax.conv import conv


def reference(f, g, blocks, x, *args, xs=None, coupling="additive", grid_bits=14, has_aux=False):
    """Gomez et al. 2017, eq. 6, block by block, to be differentiated with stored activations."""

    def residual(h, *inputs):
        out = h(*inputs)
        out, aux = out if has_aux else (out, None)
        return revjax.round_to_grid(out, grid_bits), aux

    def join(x, r):
        if coupling == "affine":
            return jax.tree.map(lambda x, s, t: x * jnp.exp(s) + t, x, *r)
        return jax.tree.map(lambda x, r: x + r, x, r)

    x1, x2 = revjax.round_to_grid(x, grid_bits)
    auxes = []
    for i, (params_f, params_g) in enumerate(blocks):
        extra = () if xs is None else (xs[i],)
        r, aux_f = residual(f, params_f, x2, *args, *extra)
        x1 = join(x1, r)
        r, aux_g = residual(g, params_g, x1, *args, *extra)
        x2 = join(x2, r)
        auxes.append((aux_f, aux_g))
    return ((x1, x2), auxes) if has_aux else (x1, x2)


def unstack(tree, depth):
    return [jax.tree.map(lambda a, i=i: a[i], tree) for i in range(depth)]


def dense(w, x, *_):
    return jnp.tanh(x @ w)


def normal(seed, *shape, dtype=jnp.float64, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape, dtype)


def value(tree):
    """A scalar that depends on every element of `tree`, nonlinearly."""
    return sum(jnp.sum(jnp.sin(leaf + 0.1 * i)) for i, leaf in enumerate(jax.tree.leaves(tree)))


def relative_error(a, b):
    """`|a - b| / |b|` over all leaves, in float64."""
    leaves = [
        np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(t)])
        for t in (a, b)
    ]
    return float(np.linalg.norm(leaves[0] - leaves[1]) / np.linalg.norm(leaves[1]))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


# Inverse ----------------------------------------------------------------------------------------


def stream(shape, dtype, kind):
    x = normal(0, *shape, dtype=dtype), normal(1, *shape, dtype=dtype)
    if kind == "array":
        return x
    if kind == "dict":
        return tuple({"a": half, "b": [half[:1] * 2]} for half in x)
    return x[0], (x[1], {"n": jnp.arange(3)})  # halves of different structure


def mixing(shape, kind, coupling):
    """F and g for a stream of that kind, whose residuals depend on all of the other half."""

    def f(w, x2, *_):
        total = sum(jnp.mean(leaf.astype(w.dtype)) for leaf in jax.tree.leaves(x2))
        like = stream(shape, w.dtype, kind)[0]
        r = jax.tree.map(lambda a: jnp.tanh(w[0, 0] * a + total), like)
        return r if coupling == "additive" else (jax.tree.map(lambda a: 0.3 * a, r), r)

    def g(w, y1, *_):
        total = sum(jnp.mean(leaf) for leaf in jax.tree.leaves(y1))
        like = stream(shape, w.dtype, kind)[1]

        def leaf(a):
            return jnp.tanh(w[0, 1] * a + total) if jnp.issubdtype(a.dtype, jnp.floating) else a

        r = jax.tree.map(leaf, like)
        return (
            r
            if coupling == "additive"
            else (jax.tree.map(lambda a: a / 3 if a.dtype == w.dtype else a, r), r)
        )

    return f, g


@pytest.mark.optimised
@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("coupling", ["additive", "affine"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(
    "shape,kind", [((2, 3), "array"), ((1, 4, 4, 2), "dict"), ((5,), "mixed"), ((), "array")]
)
def test_inverse_of_apply_is_the_identity(shape, dtype, kind, coupling, scanned):
    with jax.enable_x64(dtype == jnp.float64):
        f, g = mixing(shape, kind, coupling)
        w = normal(2, 4, 2, 2, dtype=dtype)
        params = (w, w[::-1])
        params = params if scanned else unstack(params, 4)
        options = {"coupling": getattr(revjax, coupling)}
        x = stream(shape, dtype, kind)

        @jax.jit
        def there_and_back(params, x):
            y = rev_chain_apply(f, g, params, x, **options)
            return y, rev_chain_inverse(f, g, params, y, **options)

        y, back = there_and_back(params, x)
        assert any(
            np.any(np.asarray(a) != np.asarray(b))
            for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
        )
        if coupling == "additive":
            chex.assert_trees_all_equal(back, revjax.round_to_grid(x, 14))
        else:
            tolerance = 1e4 * float(jnp.finfo(dtype).eps)
            chex.assert_trees_all_close(back, x, rtol=tolerance, atol=tolerance)


def test_block_is_a_chain_of_one(x64):
    x, params = (normal(0, 2, 3), normal(1, 2, 3)), (normal(2, 3, 3), normal(3, 3, 3))
    y = rev_block_apply(dense, dense, params, x)
    chex.assert_trees_all_equal(y, reference(dense, dense, [params], x))
    chex.assert_trees_all_equal(
        rev_block_inverse(dense, dense, params, y), revjax.round_to_grid(x, 14)
    )


# Gradients in float64 ---------------------------------------------------------------------------


def with_aux(params, x, *_):
    """Convolution with BatchNorm on batch statistics, which leave as aux."""
    mean, var = jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))
    shape = (1, 1, 1, -1)
    x = (x - mean.reshape(shape)) / jnp.sqrt(var.reshape(shape) + 1e-3) * params["scale"]
    return conv(jnp.tanh(x), params["kernel"]), {"mean": mean, "var": var}


def noisy(w, x, scale, key, index):
    """Uses an argument, a key, and an index of its own block."""
    noise = jax.random.normal(jax.random.fold_in(key, index["i"]), x.shape, x.dtype)
    return scale * index["gate"] * jnp.tanh(x @ w["w"] + noise) * w["repeat"].astype(x.dtype)


def affine_dense(w, x):
    return 0.3 * jnp.tanh(x @ w), jnp.sin(x @ w)


def case(name):
    """`(f, g, stacked params, x, args, options)`, float64."""
    w = normal(2, 3, 3, 3), normal(3, 3, 3, 3)
    x = normal(0, 4, 3), normal(1, 4, 3)
    if name == "dense":
        return dense, dense, w, x, (), {}
    if name == "float coupling":
        return dense, dense, w, x, (), {"grid_bits": None}
    if name == "affine":
        return affine_dense, affine_dense, w, x, (), {"coupling": "affine", "grid_bits": None}
    if name == "conv with BN, aux":
        params = {"kernel": normal(2, 3, 3, 3, 2, 2, scale=0.5), "scale": normal(3, 3, 1, 1, 1, 2)}
        x = normal(0, 2, 6, 6, 2), normal(1, 2, 6, 6, 2)
        return with_aux, with_aux, (params, params), x, (), {"has_aux": True}
    params = tuple({"w": a, "repeat": jnp.arange(3) % 2} for a in w)
    xs = {"i": jnp.arange(3), "gate": normal(5, 3)}
    return noisy, noisy, params, x, (jnp.float64(0.7), jax.random.key(9)), {"xs": xs}


DEPTH = 3
CASES = ["dense", "float coupling", "affine", "conv with BN, aux", "keys, args, xs, integers"]


def split_floats(tree):
    """The float leaves, which are differentiated, and a function that puts them back."""
    leaves, structure = jax.tree.flatten(tree)
    is_float = [jnp.issubdtype(a.dtype, jnp.floating) for a in leaves]

    def join(floats):
        rest = iter(floats)
        both = zip(leaves, is_float, strict=True)
        return jax.tree.unflatten(structure, [next(rest) if yes else a for a, yes in both])

    return [a for a, yes in zip(leaves, is_float, strict=True) if yes], join


@cache
def stored_backprop(name):
    """Loss, output and gradients of a case by the reference."""
    f, g, params, x, args, options = case(name)
    floats, join = split_floats((params, x, args, options.get("xs")))

    def loss(floats):
        params, x, args, xs = join(floats)
        kwargs = options | {"xs": xs and unstack(xs, DEPTH)}
        out = reference(f, g, unstack(params, DEPTH), x, *args, **kwargs)
        return value(out[0] if "has_aux" in options else out), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(floats)


@pytest.mark.parametrize(
    "backward,scanned,options_of_way",
    [
        ("reversible", True, {}),
        ("reversible", False, {}),
        ("reversible", True, {"store_last": 1}),
        ("reversible", True, {"store_last": 2}),
        ("reversible", True, {"store_last": 2, "unroll": True}),
        ("reversible", True, {"store_last": DEPTH}),
        ("reversible", False, {"store_last": 2}),
        ("remat", True, {}),
        ("remat", False, {}),
        ("store", True, {}),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_stored_backprop(x64, name, scanned, backward, options_of_way):
    f, g, params, x, args, options = case(name)
    floats, join = split_floats((params, x, args, options.get("xs")))

    def loss(floats):
        params, x, args, xs = join(floats)
        if not scanned:
            params, xs = unstack(params, DEPTH), xs and unstack(xs, DEPTH)
        kwargs = options | {"xs": xs, "backward": backward} | options_of_way
        if "coupling" in kwargs:
            kwargs["coupling"] = getattr(revjax, kwargs["coupling"])
        out = rev_chain_apply(f, g, params, x, *args, **kwargs)
        return value(out[0] if "has_aux" in options else out), out

    (loss, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(floats)
    (expected_loss, expected), expected_gradients = stored_backprop(name)
    assert relative_error(loss, expected_loss) <= 1e-12
    if "has_aux" in options:
        auxes = unstack(out[1], DEPTH) if scanned else out[1]
        chex.assert_trees_all_close(auxes, expected[1], rtol=1e-12)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient, expected_gradient) <= 1e-12


STORING = partial(rev_chain_apply, store_last=2)


@pytest.mark.parametrize("apply_ours", [rev_chain_apply, STORING])
def test_closures_over_traced_values_get_their_gradients(x64, apply_ours):
    x, w = (normal(0, 4, 3), normal(1, 4, 3)), (normal(2, 3, 3, 3), normal(3, 3, 3, 3))

    @partial(jax.jit, static_argnums=2)
    def loss(bias, count, apply):
        # bias is differentiated; count is an integer and key a key of the enclosing trace
        key = jax.random.fold_in(jax.random.key(0), count)

        def f(w, x2):
            return jnp.tanh(
                x2 @ w + bias + jax.random.normal(key, (1, 3), x2.dtype)
            ) * count.astype(x2.dtype)

        if apply is reference:
            return value(reference(f, dense, unstack(w, 3), x))
        return value(apply(f, dense, w, x))

    ours = jax.grad(loss)(normal(4, 1, 3), 2, apply_ours)
    assert relative_error(ours, jax.grad(loss)(normal(4, 1, 3), 2, reference)) <= 1e-12

    def scanned(bias, apply):  # the enclosing trace is the body of a scan
        def body(carry, count):
            return carry + loss(bias * carry, count, apply), None

        return jax.lax.scan(body, jnp.float64(1), jnp.arange(3))[0]

    ours, stored = (jax.grad(scanned)(normal(4, 1, 3), a) for a in (apply_ours, reference))
    assert relative_error(ours, stored) <= 1e-12


def test_aux_carries_no_gradient_and_integers_a_float0(x64):
    f, g, params, x, _, _ = case("conv with BN, aux")
    for backward in ("reversible", "remat", "store"):

        def loss(x, backward=backward):
            return value(rev_chain_apply(f, g, params, x, has_aux=True, backward=backward)[1])

        chex.assert_trees_all_equal(jax.grad(loss)(x), jax.tree.map(jnp.zeros_like, x))

    def with_integer(w, n):
        x = (normal(0, 2, 3), (normal(1, 2, 3), n))

        def g(w, y1):
            return jnp.tanh(y1 @ w), jnp.int32(2)

        y = rev_block_apply(lambda w, x2: dense(w, x2[0]) * x2[1].astype(w.dtype), g, (w, w), x)
        return value(y[0]), y[1][1]

    (dw, dn), n = jax.grad(with_integer, (0, 1), has_aux=True, allow_int=True)(
        normal(2, 3, 3), jnp.int32(3)
    )
    assert dn.dtype == jax.dtypes.float0 and int(n) == 5 and float(jnp.abs(dw).sum()) > 0


def test_each_function_is_evaluated_twice_a_step():
    """4N: forward N; backward one evaluation and two products of its derivative."""

    def count(jaxpr, name):
        subs = [
            s
            for e in jaxpr.eqns
            for s in jax.tree.leaves(
                list(e.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
            )
        ]
        inner = sum(
            count(getattr(s, "jaxpr", s), name)
            for s in subs
            if hasattr(s, "eqns") or hasattr(s, "jaxpr")
        )
        return inner + sum(e.primitive.name == name for e in jaxpr.eqns)

    x, w = (jnp.ones((2, 3)), jnp.ones((2, 3))), (jnp.ones((3, 3)), jnp.ones((3, 3)))
    ways = {"reversible": 4 * 6, "store": 3 * 6}  # 3 blocks of 2 functions
    ways |= {("reversible", last): 4 * (6 - 2 * last) + 3 * 2 * last for last in (1, 2, 3)}
    for way, products in ways.items():
        backward, store_last = way if isinstance(way, tuple) else (way, 0)
        options = dict(backward=backward, store_last=store_last)

        def loss(w, x, options=options):
            return value(rev_chain_apply(dense, dense, [w, w, w], x, **options))

        jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(w, x)
        assert count(jaxpr.jaxpr, "dot_general") == products


# Exactness in float32 and bf16, at depth --------------------------------------------------------


def basic_block(params, x, compute):
    """BN-ReLU-conv3x3, twice, in the dtype `compute`; statistics in float32 or wider."""
    dtype = x.dtype
    for scale, kernel in params:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean, var = x.mean((0, 1, 2), keepdims=True), x.var((0, 1, 2), keepdims=True)
        x = jax.nn.relu((x - mean) * jax.lax.rsqrt(var + 1e-3) * scale.astype(x.dtype))
        x = conv(x.astype(compute), kernel.astype(compute))
    return x.astype(dtype)


def gradients_of_chain(depth, backward, *, stream=jnp.float32, compute=jnp.float32, grid_bits=14):
    channels, f32 = 8, jnp.float32
    kernels = normal(0, 2, 2, depth, 3, 3, channels, channels, dtype=f32, scale=(2 / 72) ** 0.5)
    scales = 1 + 0.1 * normal(1, 2, 2, depth, 1, 1, 1, channels, dtype=f32)
    params = tuple([(scales[i, j], kernels[i, j]) for j in range(2)] for i in range(2))
    x = normal(2, 4, 8, 8, channels, dtype=f32), normal(3, 4, 8, 8, channels, dtype=f32)
    f = partial(basic_block, compute=compute)

    @jax.jit
    def gradients(params, x):
        def loss(params, x):
            x = jax.tree.map(lambda a: a.astype(stream), x)
            y = rev_chain_apply(f, f, params, x, grid_bits=grid_bits, backward=backward)
            return value(jax.tree.map(lambda a: a.astype(f32), y))

        return jax.grad(loss, (0, 1))(params, x)

    return gradients(params, x)


def gradient_errors(depth, **options):
    """The error of the reversible gradient against the stored one, and that of the compiler.

    The latter is that of `jax.checkpoint`: on some processors XLA sums cotangents in another order
    in another program, which bfloat16 makes much of.
    """
    with jax.numpy_dtype_promotion("standard"):
        reversible, remat, stored = (
            gradients_of_chain(depth, way, **options) for way in ("reversible", "remat", "store")
        )
    return relative_error(reversible, stored), relative_error(remat, stored)


@pytest.mark.optimised
@pytest.mark.parametrize("depth", [pytest.param(3, marks=pytest.mark.slow), 300])
def test_gradients_on_the_grid_are_exact_at_any_depth(depth):
    assert gradient_errors(depth)[0] <= 5e-6
    error, of_compiler = gradient_errors(depth, compute=jnp.bfloat16)
    assert error <= max(1e-6, 2 * of_compiler)
    assert of_compiler < 0.05


@pytest.mark.parametrize("listed", [False, True])
def test_the_input_of_a_residual_function_is_kept_apart_in_every_evaluation(listed):
    """A GPU would sum it up in another order where it is computed than where it is read."""
    x, w = (jnp.ones((2, 3)), jnp.ones((2, 3))), jnp.ones((3, 3))
    params = [(w, w)] * 4 if listed else (jnp.stack([w] * 4),) * 2
    blocks = 4 if listed else 1  # as traced

    def loss(params, x):
        return value(rev_chain_apply(dense, dense, params, x))

    def kept_apart(function):
        return str(jax.make_jaxpr(function)(params, x)).count("= apart ")

    assert kept_apart(loss) == 2 * blocks
    assert kept_apart(jax.grad(loss, (0, 1))) == 4 * blocks
    assert kept_apart(partial(rev_chain_inverse, dense, dense)) == 2 * blocks


@pytest.mark.optimised
@pytest.mark.slow
def test_gradients_of_the_plain_float_coupling_drift():
    """The claim that the grid answers: should this fail, the grid is not needed any more."""
    bf16 = {"stream": jnp.bfloat16, "compute": jnp.bfloat16}
    assert gradient_errors(100, grid_bits=None)[0] > 1e-5
    assert gradient_errors(100, grid_bits=None, compute=jnp.bfloat16)[0] > 0.1
    assert gradient_errors(27, grid_bits=None, **bf16)[0] > 0.1


# Memory and compilation -------------------------------------------------------------------------


def temporary_bytes(depth, backward, transform=jax.grad, listed=False, store_last=0):
    kernel = jax.ShapeDtypeStruct((depth, 3, 3, 8, 8), jnp.float32)
    scale = jax.ShapeDtypeStruct((depth, 1, 1, 1, 8), jnp.float32)
    half = jax.ShapeDtypeStruct((8, 16, 16, 8), jnp.float32)
    f = partial(basic_block, compute=jnp.float32)

    def loss(params, x):
        options = dict(backward=backward, store_last=store_last)
        return value(rev_chain_apply(f, f, params, x, **options))

    params: Any = ([(scale, kernel)] * 2, [(scale, kernel)] * 2)
    if listed:
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params)
        params = [one] * depth
    compiled = jax.jit(transform(loss)).lower(params, (half, half)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


PAIR_BYTES = 2 * 4 * 8 * 16 * 16 * 8
GRADIENT_BYTES = 4 * 4 * (9 * 8 * 8 + 8)  # of one block; XLA may keep a copy


@pytest.mark.optimised
def test_activation_memory_does_not_grow_with_depth():
    shallow, middle, deep = (temporary_bytes(depth, "reversible") for depth in (4, 16, 64))
    assert middle - shallow <= 12 * GRADIENT_BYTES + 0.01 * PAIR_BYTES
    assert deep - middle <= 48 * GRADIENT_BYTES + 0.01 * PAIR_BYTES
    assert temporary_bytes(64, "store") - temporary_bytes(16, "store") > 48 * PAIR_BYTES


@pytest.mark.optimised
def test_blocks_that_store_cost_what_they_keep_and_others_nothing():
    """A block keeps the inputs of its four convolutions, two pairs of halves; at any depth."""
    none, some, more, most = (
        temporary_bytes(16, "reversible", store_last=last) for last in (0, 4, 8, 12)
    )
    a_block = 2 * PAIR_BYTES + 2 * GRADIENT_BYTES
    assert 2 * PAIR_BYTES <= (more - some) / 4 <= 1.1 * a_block
    # A conditional copies what a block keeps, on a CPU, while what its kernel's gradient copies is
    # there too; more than eight are a loop, and have no conditional.
    assert some - none <= 4 * 1.1 * a_block + 4 * PAIR_BYTES
    beside = 2 if jax.__version_info__ >= (0, 11) else 1  # pairs, as measured with 0.12 and 0.10
    assert most - none <= 12 * 1.1 * a_block + beside * PAIR_BYTES
    deep = temporary_bytes(64, "reversible", store_last=4)
    assert deep - some <= 48 * GRADIENT_BYTES + 0.01 * PAIR_BYTES


@pytest.mark.parametrize("store_last, loops", [(0, 2), (8, 2), (9, 4), (20, 2), (12, 4)])
def test_few_blocks_that_store_stand_in_no_loop(store_last, loops):
    """So that a compiler needs no stacked copy of what they keep; of many, time to compile."""
    w, x = jnp.zeros((20, 3, 3)), (ONE, ONE)
    loss = loss_of(partial(rev_chain_apply, store_last=store_last))
    text = jax.jit(jax.grad(loss)).lower((w, w), x).as_text()
    assert text.count("stablehlo.while") == loops


@pytest.mark.optimised
@pytest.mark.slow
def test_activation_memory_of_a_list_does_not_grow_with_depth():
    """Although its blocks are one program, which XLA:CPU would rearrange."""
    shallow, deep = (temporary_bytes(depth, "reversible", listed=True) for depth in (2, 6))
    copies = 2 * GRADIENT_BYTES  # of gradients, and of the flipped kernels
    assert deep - shallow <= 4 * (copies + 0.01 * PAIR_BYTES)
    storing = temporary_bytes(6, "reversible", listed=True, store_last=5)
    beside = 4 if jax.__version_info__ >= (0, 11) else 2  # pairs, as measured with 0.12 and 0.10
    assert storing - deep <= 5 * (1.2 * 2 * PAIR_BYTES + copies) + beside * PAIR_BYTES
    stored = [temporary_bytes(depth, "store", listed=True) for depth in (2, 6)]
    assert stored[1] - stored[0] > 4 * PAIR_BYTES


@pytest.mark.optimised
def test_hessian_vector_products_by_jvp_of_grad_stay_flat():
    def hvp(loss):
        return lambda params, x: jax.jvp(lambda p: jax.grad(loss)(p, x), (params,), (params,))[1]

    growth = temporary_bytes(16, "reversible", hvp) - temporary_bytes(4, "reversible", hvp)
    assert growth <= 12 * (3 * GRADIENT_BYTES + 0.01 * PAIR_BYTES)


def test_functions_are_traced_as_often_at_any_depth():
    counts = []
    for depth in (2, 50):
        calls = []

        def f(w, x2, calls=calls):
            calls.append(1)
            return dense(w, x2)

        w = jnp.zeros((depth, 3, 3))
        x = jnp.zeros((2, 3)), jnp.zeros((2, 3))
        jax.jit(jax.grad(lambda w, x=x, f=f: value(rev_chain_apply(f, f, (w, w), x))))(w)
        counts.append(len(calls))
    assert counts[0] == counts[1] <= 4


# Under JAX's transformations --------------------------------------------------------------------


def small(depth=4):
    return (normal(2, depth, 3, 3), normal(3, depth, 3, 3)), (normal(0, 4, 3), normal(1, 4, 3))


def loss_of(apply):
    def loss(params, x):
        if apply is reference:
            return value(reference(dense, dense, unstack(params, len(params[0])), x))
        return value(apply(dense, dense, params, x))

    return loss


@pytest.mark.parametrize("apply_ours", [rev_chain_apply, STORING])
def test_under_jit_vmap_scan_and_checkpoint(x64, apply_ours):
    params, x = small()
    ours, stored = loss_of(apply_ours), loss_of(reference)
    batch = jax.tree.map(lambda a: jnp.stack([a, a + 1, a * 2]), x)

    def vmapped_gradients(loss, params):
        return jnp.sum(jax.vmap(jax.grad(loss), (None, 0))(params, batch)[0] ** 2)

    def over_params(loss, params):
        stacked = jax.tree.map(lambda a: jnp.stack([a, -a]), params)
        return jnp.sum(jax.vmap(loss, (0, None))(stacked, x))

    def scanned(loss, params):
        return jax.lax.scan(lambda c, x: (c + loss(params, x), None), jnp.float64(0), batch)[0]

    def checkpointed(loss, params):
        return jax.checkpoint(loss)(params, x)

    without_jit = jax.grad(ours)(params, x)
    assert relative_error(without_jit, jax.jit(jax.grad(stored))(params, x)) <= 1e-12
    for wrapped in (vmapped_gradients, over_params, scanned, checkpointed):
        gradients = [jax.jit(jax.grad(partial(wrapped, loss)))(params) for loss in (ours, stored)]
        assert relative_error(*gradients) <= 1e-12, wrapped.__name__


def test_nested_in_another_custom_rule(x64):
    params, x = small()

    def nested(loss):
        rule = jax.custom_vjp(loss)
        rule.defvjp(lambda p, x: jax.vjp(loss, p, x), lambda pull, d: pull(2 * d))
        return rule

    ours, stored = (jax.grad(nested(loss_of(a)))(params, x) for a in (rev_chain_apply, reference))
    assert relative_error(ours, stored) <= 1e-12

    def outer(w, x2):  # a chain within the functions of a chain
        return rev_chain_apply(dense, dense, (w, w), (x2, 0.5 * x2))[0]

    def outer_stored(w, x2):
        return reference(dense, dense, unstack((w, w), 2), (x2, 0.5 * x2))[0]

    w = normal(5, 3, 2, 3, 3)
    ours = jax.grad(lambda w: value(rev_chain_apply(outer, outer, (w, w), x)))(w)
    stored = jax.grad(
        lambda w: value(reference(outer_stored, outer_stored, unstack((w, w), 3), x))
    )(w)
    assert relative_error(ours, stored) <= 1e-12


@pytest.mark.parametrize("scanned,store_last", [(True, 0), (False, 0), (True, 2), (False, 1)])
def test_second_derivatives(x64, scanned, store_last):
    params, x = small()

    def ours(params):
        apply = partial(rev_chain_apply, store_last=store_last)
        return loss_of(apply)(params if scanned else unstack(params, 4), x)

    def stored(params):
        return loss_of(reference)(params, x)

    v = jax.tree.map(jnp.cos, params)

    def jvp_of_grad(loss):
        return jax.jvp(jax.grad(loss), (params,), (v,))[1]

    def grad_of_grad(loss):
        def directional(p):
            return sum(jnp.vdot(a, b) for a, b in zip(jax.grad(loss)(p), v, strict=True))

        return jax.grad(directional)(params)

    expected = jax.jit(partial(jvp_of_grad, stored))()
    for product in (jvp_of_grad, grad_of_grad):
        assert relative_error(jax.jit(partial(product, ours))(), expected) <= 1e-11


def test_forward_mode_raises_the_error_of_jax():
    params, x = (jnp.zeros((2, 3, 3)),) * 2, (jnp.zeros((4, 3)),) * 2
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda p: rev_chain_apply(dense, dense, p, x), (params,), (params,))


@pytest.mark.parametrize("store_last", [0, 2])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_a_sharded_mesh(axis_type, store_last):
    params = tuple(normal(i, 4, 3, 3, dtype=jnp.float32) for i in (2, 3))
    x = tuple(normal(i, 8, 3, dtype=jnp.float32) for i in (0, 1))
    scale = jnp.ones((1, 3))

    def loss(params, x, scale):
        def f(w, x2, scale):
            return jnp.tanh(x2 @ w) * scale

        return value(rev_chain_apply(f, f, params, x, scale, store_last=store_last))

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))
    expected = gradients(params, x, scale)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
        params, scale = jax.device_put((params, scale), NamedSharding(mesh, P()))
        got = gradients(params, sharded, scale)
    assert relative_error(jax.device_get(got), expected) <= 1e-6
    assert got[1][0].sharding.spec == P("data") or got[1][0].sharding.spec == P("data", None)
    chex.assert_trees_all_equal_shapes(got, expected)


@pytest.mark.parametrize("store_last", [0, 2])
def test_no_trace_leaks_through_closures(store_last):
    w, x = normal(2, 4, 3, 3, dtype=jnp.float32), (ONE, ONE)

    def loss(w):
        def f(p, x2):
            return dense(w[0], x2)

        return value(rev_chain_apply(f, dense, (w, w), x, store_last=store_last))

    with jax.checking_leaks():
        jax.jit(jax.grad(loss))(w)


@pytest.mark.parametrize("store_last", [0, 2])
def test_within_shard_map(store_last):
    params = tuple(normal(i, 4, 3, 3, dtype=jnp.float32) for i in (2, 3))
    x = tuple(normal(i, 8, 3, dtype=jnp.float32) for i in (0, 1))
    expected = jax.grad(lambda p: value(rev_chain_apply(dense, dense, p, x)))(params)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    def loss(params, x):
        y = rev_chain_apply(dense, dense, params, x, store_last=store_last)
        return jax.lax.psum(value(y), "data")

    assert relative_error(jax.jit(jax.grad(loss))(params, x), expected) <= 1e-6


# Options ----------------------------------------------------------------------------------------


def test_unroll_changes_no_gradient(x64):
    params, x = small()
    once = jax.grad(loss_of(rev_chain_apply))(params, x)
    for unroll, store_last in ((2, 0), (True, 0), (2, 1), (2, 2), (2, 3), (True, 1), (True, 3)):
        apply = partial(rev_chain_apply, unroll=unroll, store_last=store_last)
        assert relative_error(jax.grad(loss_of(apply))(params, x), once) <= 1e-12


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("backward", ["reversible", "remat", "store"])
def test_chain_without_blocks_rounds_its_input(backward, scanned, x64):
    _, x = small()
    empty = (jnp.zeros((0, 3, 3)), jnp.zeros((0, 3, 3))) if scanned else []
    apply = partial(rev_chain_apply, dense, dense, empty, backward=backward)
    y = apply(x)
    chex.assert_trees_all_equal(y, revjax.round_to_grid(x, 14))
    chex.assert_trees_all_equal(rev_chain_inverse(dense, dense, empty, y), y)
    dx = jax.grad(lambda x: value(apply(x)))(x)
    chex.assert_trees_all_close(dx, jax.grad(value)(revjax.round_to_grid(x, 14)))


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize(
    "backward, store_last",
    [("reversible", 0), ("reversible", 1), ("reversible", 2), ("remat", 0), ("store", 0)],
)
def test_range_check_is_given_the_largest_of_the_whole_stream(scanned, backward, store_last):
    # The peak is inside the chain: block 1 adds 50 to y2, block 2 takes it away again.
    params = (jnp.zeros(3), jnp.array([1.0, 50.0, -50.0]))
    params = params if scanned else unstack(params, 3)

    def f(w, x2):
        return jnp.zeros_like(x2)

    def g(w, y1):
        return w + jnp.zeros_like(y1)

    seen = []

    @jax.jit
    def gradient(x):
        def loss(x):
            options = dict(backward=backward, store_last=store_last)
            checked = partial(rev_chain_apply, f, g, params, x, **options)
            peaks = []
            y = checked(range_check=lambda peak, bound: peaks.append((peak, bound)))
            seen.append(peaks[0][1])
            return value(y), peaks[0][0]

        return jax.grad(loss, has_aux=True)(x)

    _, peak = gradient((jnp.full(2, -3.0), jnp.ones(2)))
    assert float(peak) == 52.0 and seen == [1024.0]


def test_leaving_the_range_is_reported(capfd):
    def apply(range_check, x1):
        x = x1, jnp.ones((1, 3))
        return rev_chain_apply(dense, dense, [(jnp.eye(3),) * 2], x, range_check=range_check)

    inside, outside = jnp.full((1, 3), 1000.0), jnp.full((1, 3), 2000.0)
    warn = jax.jit(partial(apply, revjax.warn_out_of_range))
    jax.block_until_ready(warn(inside))
    jax.effects_barrier()
    assert capfd.readouterr().out == ""
    for bad, shown in ((outside, "2000"), (inside * jnp.nan, "nan")):
        jax.block_until_ready(warn(bad))
        jax.effects_barrier()
        out = capfd.readouterr().out
        assert f"The stream reached {shown}" in out and "beyond the 1024" in out
        assert "smaller grid_bits" in out
    jax.block_until_ready(jax.vmap(warn)(jnp.stack([inside, outside])))
    jax.effects_barrier()
    assert capfd.readouterr().out.count("The stream reached") == 1

    check = jax.jit(checkify.checkify(partial(apply, revjax.check_in_range)))
    check(inside)[0].throw()
    with pytest.raises(checkify.JaxRuntimeError, match="The stream reached 2000"):
        check(outside)[0].throw()


def test_the_range_of_a_stream_of_two_dtypes_is_the_smaller_one(x64):
    seen = []
    halves = jnp.ones((2, 3), jnp.float32), jnp.ones((2, 3), jnp.float64)
    zeros = [lambda _, x, half=half: jnp.zeros_like(half) for half in halves]
    rev_chain_apply(*zeros, [((), ())], halves, range_check=lambda _, bound: seen.append(bound))
    assert seen == [revjax.stream_bound(14, jnp.float32)]


class Both(NamedTuple):
    f: Any
    g: Any


@pytest.mark.parametrize("store_last", [0, 2])
def test_pairs_may_be_of_any_kind(store_last):
    """The gradient of one is of the same kind."""
    w, x = normal(0, 3, 3, 3, dtype=jnp.float32), (jnp.ones((2, 3)), jnp.ones((2, 3)))

    def loss(params):
        return value(rev_chain_apply(dense, dense, params, x, store_last=store_last))

    due = jax.grad(loss)((w, w))
    for params in (Both(w, w), [Both(each, each) for each in w], [[each, each] for each in w]):
        found = jax.grad(loss)(params)
        assert jax.tree.structure(found) == jax.tree.structure(params)
        if isinstance(params, list):
            found = tuple(map(jnp.stack, zip(*found, strict=True)))
        chex.assert_trees_all_close(tuple(found), due, atol=1e-5)
    blocks = jax.grad(lambda pair: value(rev_block_apply(dense, dense, pair, x)))(Both(w[0], w[0]))
    assert isinstance(blocks, Both)


@pytest.mark.parametrize("store_last", [0, 2, 4])
def test_arrays_may_be_numpys(store_last):
    w, xs = np.asarray(normal(0, 4, 3, 3, dtype=jnp.float32)), np.arange(4, dtype=np.float32)
    gates = np.array([True, False, True, True]), None

    def loss(x, *inputs, **options):
        params, xs, gates = inputs
        f = lambda w, half, shift: dense(w, half) + shift  # noqa: E731
        y = rev_chain_apply(f, f, params, x, xs=xs, gates=gates, store_last=store_last, **options)
        return value(y)

    x = jnp.ones((2, 3)), jnp.ones((2, 3))
    inputs = (w, w), xs, gates
    got, due = (jax.grad(loss)(x, *each) for each in (inputs, jax.tree.map(jnp.asarray, inputs)))
    chex.assert_trees_all_equal(got, due)


def test_grid_bits_may_be_an_integer_of_numpy():
    x = rev_block_apply(dense, dense, (STACK[0],) * 2, (ONE, ONE), grid_bits=np.int64(3))
    chex.assert_trees_all_equal(x, revjax.round_to_grid(x, 3))


# Errors -----------------------------------------------------------------------------------------

ONE = jnp.ones((2, 3))
STACK = jnp.ones((4, 3, 3))


@pytest.mark.parametrize(
    "error,message,f,params,x,options",
    [
        (TypeError, "coupling='affine': give revjax.additive", dense, (STACK, STACK), (ONE, ONE),
         {"coupling": "affine"}),
        (TypeError, r"params\[0\] must be a pair.*stacked parameters are a tuple", dense,
         [STACK, STACK], (ONE, ONE), {}),
        (TypeError, r"x must be a pair.*float32\[2,3\]", dense, (STACK, STACK), ONE, {}),
        (TypeError, "params must be a pair", dense, STACK, (ONE, ONE), {}),
        (TypeError, r"params\[1\] must be a pair", dense, [(STACK[0],) * 2, 3], (ONE, ONE), {}),
        (TypeError, "f .half_dtype. returned bfloat16.2,3. where float32.2,3. was due.*Cast",
         lambda w, x: dense(w, x).astype(jnp.bfloat16), (STACK, STACK), (ONE, ONE), {}),
        (TypeError, r"returned float32\[1,3\] where float32\[2,3\] was due.*cannot be reversible",
         lambda w, x: dense(w, x)[:1], (STACK, STACK), (ONE, ONE), {}),
        (TypeError, "was due", lambda w, x: {"y": dense(w, x)}, (STACK, STACK), (ONE, ONE), {}),
        (TypeError, "must return .residual, aux.", dense, (STACK, STACK), (ONE, ONE),
         {"has_aux": True}),
        (TypeError, "stream is bfloat16, which cannot hold a grid", dense, (STACK, STACK),
         (ONE.astype(jnp.bfloat16),) * 2, {}),
        (TypeError, "was due", dense, (STACK, STACK), (ONE, ONE), {"coupling": revjax.affine}),
        (TypeError, "second of the two is an auxiliary value, pass has_aux=True",
         lambda w, x: (dense(w, x), 1.0), (STACK, STACK), (ONE, ONE), {}),
        (TypeError, "stream x is int32 there, which has no gradient: cast it to float32",
         dense, (STACK, STACK), (ONE.astype(int), ONE), {"backward": "reversible"}),
        (TypeError, "x has a leaf without values, .*: call by jax.eval_shape", dense,
         (STACK, STACK), (jax.ShapeDtypeStruct((2, 3), jnp.float32), ONE), {}),
        (TypeError, r"combine returned float32\[1,3\] for a half of the stream that is float32.2,3",
         dense, (STACK, STACK), (ONE, ONE),
         {"coupling": revjax.additive._replace(combine=lambda x, r: (x + r)[:1])}),
        (TypeError, "separate returned int32", dense, (STACK, STACK), (ONE, ONE),
         {"coupling": revjax.additive._replace(separate=lambda y, r: (y - r).astype(int))}),
        (ValueError, "cannot keep the stream on a grid", dense, (STACK, STACK), (ONE, ONE),
         {"coupling": revjax.affine, "grid_bits": 14}),
        (ValueError, "depth of the chain as its leading axis", dense, (STACK, STACK[:2]),
         (ONE, ONE), {}),
        (ValueError, "depth of the chain as its leading axis", dense, (STACK, jnp.float32(1)),
         (ONE, ONE), {}),
        (ValueError, "hold no array that would tell the depth", dense, ({}, {}), (ONE, ONE), {}),
        (ValueError, "list of 1 blocks: xs must be one too", dense, [(STACK[0],) * 2], (ONE, ONE),
         {"xs": [1, 2]}),
        (ValueError, "backward='forward': give", dense, (STACK, STACK), (ONE, ONE),
         {"backward": "forward"}),
        (ValueError, "backward=array.*: give", dense, (STACK, STACK), (ONE, ONE),
         {"backward": np.array(["store", "remat"])}),
        (ValueError, "store_last=5: give a number from 0 to 4, as", dense, (STACK, STACK),
         (ONE, ONE), {"store_last": 5, "backward": "reversible"}),
        (ValueError, "store_last=True: give a number", dense, (STACK, STACK), (ONE, ONE),
         {"store_last": True, "backward": "reversible"}),
        (ValueError, 'store_last=1 and backward="remat": leave store_last out', dense,
         (STACK, STACK), (ONE, ONE), {"store_last": 1, "backward": "remat"}),
    ],
)  # fmt: skip
def test_wrong_input_is_refused_in_a_sentence(error, message, f, params, x, options):
    if f is not dense and "half_dtype" in message:
        f.__name__ = "half_dtype"
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: rev_chain_apply(f, dense, params, x, **options))
    if "backward" not in options:
        with pytest.raises(error, match=message):
            jax.eval_shape(lambda: rev_chain_inverse(f, dense, params, x, **options))


@pytest.mark.parametrize("backward", ["reversible", "remat", "store"])
def test_arguments_that_are_no_arrays_are_refused_by_every_way(backward):
    with pytest.raises(TypeError, match="args has a leaf that is no array, 'relu'; bind what is"):
        rev_chain_apply(dense, dense, (STACK, STACK), (ONE, ONE), "relu", backward=backward)


def test_aux_that_is_no_array_is_refused():
    def f(w, x):
        return dense(w, x), "note"

    with pytest.raises(TypeError, match=r"the aux of f .f. has a leaf that is no array, 'note'"):
        rev_chain_apply(f, f, (STACK, STACK), (ONE, ONE), has_aux=True)


def test_a_block_has_fewer_options():
    for apply in (rev_block_apply, rev_block_inverse):
        with pytest.raises(TypeError, match="no option backward, xs: give coupling, grid_bits"):
            apply(dense, dense, (STACK[0],) * 2, (ONE, ONE), xs=1, backward="store")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_no_grid_takes_any_inexact_stream(dtype):
    w, x = (0.3 * STACK[:1]).astype(dtype), (ONE.astype(dtype),) * 2  # one block: no drift yet

    def loss(w, backward):
        y = rev_chain_apply(dense, dense, (w, w), x, grid_bits=None, backward=backward)
        return jnp.sum(jnp.abs(y[0]).astype(jnp.float32))

    got, due = (jax.grad(loss)(w, backward) for backward in ("reversible", "store"))
    assert got.dtype == dtype
    chex.assert_trees_all_close(got.astype(jnp.complex64), due.astype(jnp.complex64), rtol=0.05)
