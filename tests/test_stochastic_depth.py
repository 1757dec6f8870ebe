"""Stochastic depth against loops that leave closed functions out, and against constant depth."""

# Calls with options chosen at run time, which no type checker can follow.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

import functools
from collections import Counter
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_identity_mappings
import test_models
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from networks import (
    COMPILE_FAST,
    Step,
    cross_entropy,
    draw_arrays,
    relative_error,
    restrict,
    setting,
    with_arrays,
)

import revjax
from revjax import (
    ReversibleStage,
    Shortcut,
    StochasticDepth,
    create_model,
    draw_gates,
    expected_depth,
    rev_block_apply,
    rev_block_inverse,
    rev_chain_apply,
    rev_chain_inverse,
    survival_probabilities,
)
from revjax.conv import conv
from revjax.layers import Conv
from revjax.residual import Residual
from revjax.stochastic_depth import apply_gated

compiled = partial(jax.jit, compiler_options=COMPILE_FAST)


# Probabilities and draws ------------------------------------------------------------------------


@pytest.mark.parametrize("count, p_last", [(1, 0.5), (54, 0.5), (54, 0.2), (10, 1)])
def test_survival_probabilities(count, p_last):
    """Huang et al. 2016, eq. 4, function by function; and its sum, the expected depth."""
    linear = survival_probabilities(count, p_last)
    assert linear.dtype == np.float64 and linear.shape == (count,)
    for i, p in enumerate(linear, 1):
        np.testing.assert_allclose(p, 1 - i / count * (1 - p_last), rtol=1e-15)
    uniform = survival_probabilities(count, p_last, "uniform")
    assert uniform.dtype == np.float64 and uniform.tolist() == [p_last] * count
    due = count - (1 - p_last) * (count + 1) / 2
    np.testing.assert_allclose(expected_depth(linear), due, rtol=1e-14)
    np.testing.assert_allclose(expected_depth(uniform), count * p_last, rtol=1e-14)


def test_expected_depth_of_the_paper():
    """Section 3: the 110 layers of 54 functions are 40 of them, (3 L - 1) / 4, on average."""
    assert expected_depth(survival_probabilities(54, 0.5)) == 40.25


PROBABILITIES = [1.0, 0.75, 0.5, 0.1]


def within_chance(frequency, p, draws):
    assert np.all(np.abs(frequency - p) <= 5 * np.sqrt(p * (1 - p) / draws))


def test_gates_are_drawn_with_their_probabilities():
    keys = jax.random.split(jax.random.key(0), 4000)
    gates = np.asarray(compiled(jax.vmap(partial(draw_gates, probabilities=PROBABILITIES)))(keys))
    assert gates.dtype == bool and gates.shape == (4000, 4)
    within_chance(gates.mean(0), np.array(PROBABILITIES), 4000)
    together = np.corrcoef(gates[:, 1:].T.astype(float)) - np.eye(3)
    assert np.abs(together).max() < 5 / np.sqrt(4000)  # each for itself
    chex.assert_trees_all_equal(gates[3], draw_gates(keys[3], PROBABILITIES))


def test_gates_of_each_image_have_an_expectation_of_one():
    key, p = jax.random.key(0), np.array(PROBABILITIES)
    gates = draw_gates(key, PROBABILITIES, 4000)
    assert gates.dtype == jnp.float32 and gates.shape == (4, 4000, 1, 1, 1)
    flat = np.asarray(gates).reshape(4, 4000)
    assert np.all((flat == 0) | (flat == (1 / p.astype(np.float32))[:, None]))
    within_chance((flat > 0).mean(1), p, 4000)
    chex.assert_trees_all_equal(gates, draw_gates(key, PROBABILITIES, 4000))
    with jax.enable_x64(True):
        assert draw_gates(key, PROBABILITIES, 2, jnp.float64).dtype == jnp.float64


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((0, 0.5), "num_residuals=0: give a positive integer"),
        ((2.5, 0.5), "num_residuals=2.5: give a positive integer"),
        ((3, 0), "p_last=0: give a survival probability above 0, at most 1"),
        ((3, 1.5), "p_last=1.5: give a survival"),
        ((3, float("nan")), "p_last=nan: give a survival"),
        ((3, True), "p_last=True: give a survival"),
        ((3, "half"), "p_last='half': give a survival"),
        ((3, 0.5, "cosine"), 'mode=\'cosine\': give "linear" or "uniform"'),
    ],
)
def test_what_survival_probabilities_refuse(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        survival_probabilities(*arguments)


@pytest.mark.parametrize("name", ["resnet", "revnet"])
@pytest.mark.parametrize(
    "how, error, sentence",
    [
        (StochasticDepth(0.0), ValueError, "p_last=0.0: give a survival probability"),
        (StochasticDepth(mode="log"), ValueError, "mode='log': give"),
        (StochasticDepth(granularity="pixel"), ValueError, "granularity='pixel': give \"batch\""),
        (0.5, TypeError, r"stochastic_depth=0.5: give None or revjax.StochasticDepth"),
    ],
)
def test_what_networks_refuse(name, how, error, sentence):
    with pytest.raises(error, match=sentence):
        create_model(name, 5, rngs=nnx.Rngs(0), units=(1,), filters=(4, 4), stochastic_depth=how)


# Chains in float64, against a loop --------------------------------------------------------------

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


def with_gradients(backward, listed, affine=False):
    """A compiled function of gates and `operands()`."""
    h = (affine_f, affine_g) if affine else (f, g)
    how = dict(has_aux=True, backward=backward)
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
    """BN-ReLU-conv3x3, the convolution in the dtype `compute`."""
    scale, kernel = params
    mean, var = x.mean((0, 1, 2), keepdims=True), x.var((0, 1, 2), keepdims=True)
    x = jax.nn.relu((x - mean) * jax.lax.rsqrt(var + 1e-3) * scale)
    return conv(x.astype(compute), kernel.astype(compute)).astype(mean.dtype)


def conv_chain(depth, channels=4):
    kernels = 0.25 * normal(0, 2, depth, 3, 3, channels, channels)
    scales = 1 + 0.1 * normal(1, 2, depth, 1, 1, 1, channels)
    params = (scales[0], kernels[0]), (scales[1], kernels[1])
    x = normal(2, 2, 6, 6, channels), normal(3, 2, 6, 6, channels)
    return jax.tree.map(np.float32, (params, x))


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


# Networks, against transcriptions of their equations --------------------------------------------

CLASSES = 5
UNITS = {"resnet": (1, 2), "revnet": (2, 1)}
FILTERS = {"resnet": (4, 4, 8), "revnet": (4, 4, 6)}
FUNCTIONS = {"resnet": ("residual",), "revnet": ("f", "g")}  # of a unit
STYLES: dict[str, Any] = {
    "original": dict(placement="original"),
    "full": dict(conventions="identity_mappings"),  # shortcuts of stage 2 have an activation
}
HALF = StochasticDepth(0.5, "uniform")
BY_IMAGE = StochasticDepth(0.4, granularity="sample")


def make(name, how, dtype="float64", **options) -> Any:
    """The network without its arrays."""
    options = dict(units=UNITS[name], filters=FILTERS[name], dtype=dtype) | options
    return nnx.eval_shape(
        lambda: create_model(name, CLASSES, rngs=nnx.Rngs(0), stochastic_depth=how, **options)
    )


def batch(dtype="float64"):
    rng = np.random.default_rng(1)
    return rng.standard_normal((4, 4, 6, 3)).astype(dtype), rng.integers(0, CLASSES, 4)


def drawn_from(name, key):
    """What a network draws its gates from: a ResNet has other draws to make, too."""
    return key if name == "revnet" else jax.random.split(key)[0]


def draws(name, key):
    """The gates that a network with `HALF` draws from a key in float64."""
    p = survival_probabilities(sum(UNITS[name]) * len(FUNCTIONS[name]), 0.5, "uniform")
    return np.asarray(draw_gates(drawn_from(name, key), p, dtype=jnp.float64))


def step_of(network):
    """A function from a network's arrays, images, labels and a key to its `Step`."""

    def step(arrays, images, labels, key):
        graphdef, params, rest = nnx.split(with_arrays(network, arrays), nnx.Param, ...)

        def loss(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            logits = model(images, key=key)
            return cross_entropy(logits, labels), (logits, nnx.state(model))

        (value, (logits, state)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return Step(value, logits, nnx.to_pure_dict(gradient), nnx.to_pure_dict(state))

    return step


def name_of(kernels):
    """A number that no other residual function has: of the first kernel."""
    return kernels[0][0, 0, 0, 0].astype("float32")  # a callback has no float64


def train(network, key, dtype="float64"):
    """The step, and how often each residual function ran in it."""
    call, ran = Residual.__call__, []

    def recorded(self, x):
        name = name_of([layer.kernel for layer in self.layers if isinstance(layer, Conv)])
        jax.debug.callback(lambda name: ran.append(float(name)), name)
        return call(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Residual, "__call__", recorded)
        step = compiled(step_of(network))
        got = jax.device_get(step(draw_arrays(network), *batch(dtype), key))
        jax.effects_barrier()
    return got, Counter(ran)


def train_oracle(network, oracle, gates):
    """oracle: from gates, False or a factor each, to a function of arrays and images."""
    images, labels = batch()
    factors = None if gates.dtype == bool else gates

    def loss(arrays, factors):
        own = gates.tolist() if factors is None else factors
        logits, after = oracle(own)(arrays, images)
        return cross_entropy(logits, labels), (logits, after)

    step = compiled(jax.value_and_grad(loss, has_aux=True))
    (value, (logits, after)), gradient = jax.device_get(step(draw_arrays(network), factors))
    params = nnx.to_pure_dict(nnx.state(network, nnx.Param))
    return Step(value, logits, restrict(gradient, params), after)


def resnet_oracle(gates, units=UNITS["resnet"], filters=FILTERS["resnet"], **style):
    style = dict(placement="full_preactivation", conventions="revnet") | style
    return test_identity_mappings.Oracle(
        False, shortcut=Shortcut(), gates=gates, units=units, filters=filters, **style
    )


def revnet_oracle(gates, units=UNITS["revnet"], filters=FILTERS["revnet"]):
    oracle = test_models.Oracle("revnet", training=True, gates=gates)
    oracle.units, oracle.filters = units, filters
    return oracle


def functions_of(name, tree):
    """The parts of a nested dict that belong to residual functions, in the network's order."""
    parts = []
    for stage in tree["stages"].values():
        units = [stage["first"]]
        if "rest" in stage:
            rest = {h: stage["rest"][h] for h in FUNCTIONS[name]}
            units += unstack(rest, len(jax.tree.leaves(rest)[0]))
        parts += [unit[h] for unit in units for h in FUNCTIONS[name]]
    return parts


def check_closed(name, got, ran, arrays, gates):
    """Functions run, move statistics, and have a gradient where open; to the bit."""
    before, after = (functions_of(name, tree) for tree in (arrays, got.variables))
    gradients = functions_of(name, got.gradient)
    for gate, *parts in zip(gates, before, after, gradients, strict=True):
        old, new, gradient = (jax.tree.leaves(part) for part in parts)
        moved = [not np.array_equal(a, b) for a, b in zip(old, new, strict=True)]
        assert any(moved) == gate
        assert all(np.any(leaf) == gate for leaf in gradient)
        layers = parts[0]["layers"]
        kernels = [layers[i]["kernel"] for i in sorted(layers) if "kernel" in layers[i]]
        assert (ran[float(name_of(kernels))] > 0) == gate
    assert len(ran) == sum(map(bool, gates))


ORACLES = {"resnet": resnet_oracle, "revnet": revnet_oracle}
SEEDS = {"original": 0, "full": 6, "revnet": 38}  # of gates 010, 101 and 010110


@functools.cache
def resnet_due(style):
    gates = draws("resnet", jax.random.key(SEEDS[style]))
    return train_oracle(
        make("resnet", HALF, **STYLES[style]), partial(resnet_oracle, **STYLES[style]), gates
    )


@pytest.mark.parametrize(
    "style, backward", [("original", "store"), ("full", "store"), ("original", "remat")]
)
def test_a_resnet_trains_its_open_functions(style, backward):
    """Logits, gradients and statistics; the shortcut of a closed function runs."""
    with setting("float64"), jax.numpy_rank_promotion("allow"):
        network = make("resnet", HALF, backward=backward, **STYLES[style])
        key = jax.random.key(SEEDS[style])
        got, ran = train(network, key)
        assert relative_error(got, resnet_due(style)) <= 1e-11
        check_closed("resnet", got, ran, draw_arrays(network), draws("resnet", key))


@functools.cache
def revnet_due():
    gates = draws("revnet", jax.random.key(SEEDS["revnet"]))
    return train_oracle(make("revnet", HALF), revnet_oracle, gates)


@pytest.mark.parametrize("backward", ["reversible", "store"])
def test_a_revnet_trains_its_open_functions(backward):
    with setting("float64"), jax.numpy_rank_promotion("allow"):
        network, key = make("revnet", HALF, backward=backward), jax.random.key(SEEDS["revnet"])
        got, ran = train(network, key)
        assert relative_error(got, revnet_due()) <= 1e-12
        check_closed("revnet", got, ran, draw_arrays(network), draws("revnet", key))


@pytest.mark.parametrize("name", ["resnet", "revnet"])
def test_gates_of_each_image(name):
    """Every function runs, times mask / p_l."""
    size = dict(units=(2,), filters=(4, 4))
    with setting("float64"), jax.numpy_rank_promotion("allow"):
        network, key = make(name, BY_IMAGE, **size), jax.random.key(3)
        p = survival_probabilities(2 * len(FUNCTIONS[name]), 0.4)
        gates = draw_gates(drawn_from(name, key), p, 4, jnp.float64)
        assert 0 < np.mean(np.asarray(gates) == 0) < 1
        oracle = partial(ORACLES[name], **size)
        got, _ = train(network, key)
        assert relative_error(got, train_oracle(network, oracle, gates)) <= 1e-11


def scaled(name, arrays, p):
    """The arrays with what every residual function ends with times its p_l."""
    p = list(p)
    for stage, depth in zip(arrays["stages"].values(), UNITS[name], strict=True):
        own = np.array([[p.pop(0) for _ in FUNCTIONS[name]] for _ in range(depth)])
        for i, h in enumerate(FUNCTIONS[name]):
            for part, factors in (("first", own[0, i]), ("rest", own[1:, i])):
                if part in stage:
                    layers = stage[part][h]["layers"]
                    last = layers[max(layers)]
                    last = last.get("norm", last)
                    for leaf in {"scale", "bias", "kernel"} & set(last):
                        axes = tuple(range(np.ndim(factors), last[leaf].ndim))
                        last[leaf] = last[leaf] * np.expand_dims(factors, axes)
    return arrays


@pytest.mark.parametrize("name, style", [("resnet", "original"), ("revnet", None)])
def test_in_evaluation_residuals_are_multiplied_by_survival_probabilities(name, style):
    """Or, with gates of each image, by nothing: both are networks of constant depth."""
    how = StochasticDepth(0.3)
    with setting("float64"):
        networks = [make(name, h, **STYLES.get(style, {})) for h in (None, how, BY_IMAGE)]
        for network in networks:
            network.eval()
        constant, batchwise, by_image = networks

        @compiled
        def evaluate(arrays, changed, images):
            runs = (constant, changed), (batchwise, arrays), (constant, arrays), (by_image, arrays)
            return [with_arrays(*run)(images) for run in runs]

        p = survival_probabilities(sum(UNITS[name]) * len(FUNCTIONS[name]), 0.3)
        arrays = draw_arrays(constant)
        due, got, whole, got_by_image = evaluate(
            arrays, scaled(name, draw_arrays(constant), p), batch()[0]
        )
    assert relative_error(got, due) <= 1e-12
    assert relative_error(got_by_image, whole) <= 1e-14
    assert relative_error(got, whole) > 1e-3


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("name", ["resnet", "revnet"])
def test_training_asks_for_a_key(name, granularity):
    network = make(name, StochasticDepth(granularity=granularity), "float32")
    with pytest.raises(ValueError, match=r"draws its gates from a key: call model\(images, key="):
        jax.eval_shape(
            lambda arrays: with_arrays(network, arrays)(batch("float32")[0]), draw_arrays(network)
        )


def test_a_stage_is_undone_with_the_gates_of_the_network():
    """In training mode, and by survival probabilities in evaluation mode."""
    x = revjax.round_to_grid(tuple(np.float32(normal(i, 4, 4, 6, 2)) for i in (0, 1)), 14)
    network = make("revnet", HALF, "float32")
    arrays = draw_arrays(network)

    @partial(compiled, static_argnums=2)
    def there_and_back(arrays, key, training):
        model = with_arrays(network, arrays)
        model.train() if training else model.eval()
        stage, gates = model.stages[0], model.gates(4, key)[0]
        y = stage(x, gates)
        moved = nnx.to_pure_dict(nnx.state(stage, nnx.BatchStat))
        back = stage.inverse(y, gates)
        return gates, y, back, moved, nnx.to_pure_dict(nnx.state(stage, nnx.BatchStat))

    for key, dtype in ((jax.random.key(9), jnp.bool_), (None, jnp.float32)):
        gates, y, back, before, after = there_and_back(arrays, key, key is not None)
        chex.assert_trees_all_equal((back, after), (x, before))
        assert relative_error(y, x) > 0.1
        assert [(gate.dtype, gate.shape) for gate in gates] == [(dtype, (2,))] * 2
    assert make("revnet", None, "float32").gates(4) == [(None, None)] * 2


class Shift(nnx.Module):
    """A residual function whose statistics are of several ranks."""

    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (3,)))
        self.count = nnx.BatchStat(jnp.int32(0))
        self.last = nnx.BatchStat(jnp.zeros((2, 3)))

    def __call__(self, x):
        self.count[...] += 1
        self.last[...] = x
        return jnp.tanh(x * self.w[None])


def test_a_chain_of_modules_with_gates_of_either_kind():
    """Statistics of any rank stay where closed; F may have factors where G has gates."""
    depth = 3
    chain = nnx.eval_shape(lambda: ReversibleStage(Shift, Shift, depth, rngs=nnx.Rngs(0)))
    w: Any = {"f": np.float32(normal(0, depth, 3)), "g": np.float32(normal(1, depth, 3))}
    x = revjax.round_to_grid((0.5 * ONE, -ONE), 14)

    @compiled
    def run(w, gates):
        start = {"count": jnp.zeros(depth, jnp.int32), "last": jnp.zeros((depth, 2, 3))}
        model = with_arrays(
            chain, {"peak": jnp.float32(0)} | {h: {"w": w[h]} | start for h in ("f", "g")}
        )
        y = model(x, gates=gates)
        return y, model.inverse(y, gates=gates), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    gate, factor = np.array([True, False, True]), np.float32([0.5, 1, 2])
    for gates in ((gate, ~gate), (None, gate), (gate, None), (factor, gate), (gate, factor)):
        y, back, statistics = run(w, gates)
        chex.assert_trees_all_equal(back, x)
        (x1, x2), lasts = x, {"f": [], "g": []}
        factors: Any = [np.float32(np.ones(depth) if own is None else own) for own in gates]
        for i in range(depth):
            lasts["f"].append(x2)
            x1 = x1 + revjax.round_to_grid(factors[0][i] * jnp.tanh(x2 * w["f"][i][None]), 14)
            lasts["g"].append(x1)
            x2 = x2 + revjax.round_to_grid(factors[1][i] * jnp.tanh(x1 * w["g"][i][None]), 14)
        chex.assert_trees_all_close(y, (x1, x2), rtol=1e-3)
        for h, own in zip(("f", "g"), factors, strict=True):
            np.testing.assert_array_equal(statistics[h]["count"], own != 0)
            due = np.array(lasts[h]) * (own != 0)[:, None, None]
            np.testing.assert_allclose(statistics[h]["last"], due, rtol=1e-3)


# Under JAX's transformations --------------------------------------------------------------------


def dense_aux(w, x):
    y = jnp.tanh(x @ w)
    return y, y.sum(1)


def dense_loss(params, x, gates):
    y, aux = rev_chain_apply(dense_aux, dense_aux, params, x, gates=gates, has_aux=True)
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

    def gradient(gates, specs):
        @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), specs), out_specs=out_specs)
        def loss(params, x, gates):
            y, aux = dense_loss(params, x, gates)
            return jax.lax.psum(y, "data"), aux

        return compiled(jax.grad(loss, (0, 1), has_aux=True))(params, x, gates)

    assert relative_error(gradient((GATES_F, GATES_G), P()), on_one_device()) <= 1e-6
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
