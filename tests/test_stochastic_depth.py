"""Networks of stochastic depth, against transcriptions of their equations."""

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
from test_gates import ONE, normal, unstack

import revjax
from revjax import (
    ReversibleStage,
    Shortcut,
    StochasticDepth,
    create_model,
    draw_gates,
    survival_probabilities,
)
from revjax.layers import Conv
from revjax.residual import Residual

compiled = partial(jax.jit, compiler_options=COMPILE_FAST)


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
    "style, backward",
    [
        ("original", "store"),
        pytest.param("full", "store", marks=pytest.mark.slow),
        pytest.param("full", "remat", marks=pytest.mark.slow),
    ],
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


@pytest.mark.parametrize("backward", ["reversible", pytest.param("store", marks=pytest.mark.slow)])
def test_a_revnet_trains_its_open_functions(backward):
    with setting("float64"), jax.numpy_rank_promotion("allow"):
        network, key = make("revnet", HALF, backward=backward), jax.random.key(SEEDS["revnet"])
        got, ran = train(network, key)
        assert relative_error(got, revnet_due()) <= 1e-12
        check_closed("revnet", got, ran, draw_arrays(network), draws("revnet", key))


@pytest.mark.parametrize("name", ["resnet", pytest.param("revnet", marks=pytest.mark.slow)])
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
