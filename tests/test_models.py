"""The networks against an unscanned transcription of their equations, and against each other.

The transcription, `Oracle`, is plain `jax.numpy` on a network's arrays: unit by unit, derived by
storing everything. It also moves the running averages and measures the stream, so that one
comparison of trees covers all that a network changes.
"""

# Calls with options chosen at run time, which no type checker can follow.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

import functools
import itertools
import math
import pickle
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
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
from scipy.stats import truncnorm

from revjax import ResNet, RevNet, RevViT, StreamPeak, create_model, list_models, round_to_grid
from revjax.conventions import CONVENTIONS
from revjax.layers import Conv
from revjax.models import architecture_of

CLASSES = 5
BATCH = 4

# units, filters, bottleneck, large_images, side of the images. Between them they have a first unit
# that keeps the shape and one that does not, scanned units and none, and strides of 1 and 2.
NETWORKS = {
    "revnet": ((3, 1), (8, 8, 12), False, False, 6),
    "revnet of long stages": ((2, 3), (4, 4, 6), False, False, 6),
    "revnet bottleneck": ((3,), (8, 4), True, False, 6),
    "revnet large": ((1,), (8, 8), False, True, 10),
    "resnet": ((3, 1), (4, 4, 7), False, False, 6),
    "resnet bottleneck": ((1, 1), (4, 4, 8), True, False, 6),
}


# The oracle -------------------------------------------------------------------------------------


class Oracle:
    """The networks of the RevNet paper's authors, on the nested dict `v` of a network's arrays.

    The methods are given the part of `v` that is theirs, and write into it what training moves.
    gates has a factor, or False, for each residual function of a RevNet.
    """

    def __init__(self, kind, *, training, gates=None):
        self.gates = itertools.repeat(1.0) if gates is None else iter(gates)
        self.units, self.filters, self.bottleneck, self.large_images, _ = NETWORKS[kind]
        self.reversible = kind.startswith("revnet")
        self.training = training

    def grid(self, x):
        return x + lax.stop_gradient(jnp.round(x * 2**14) / 2**14 - x)

    def conv(self, v, x, stride=1):
        return lax.conv_general_dilated(
            x, v["kernel"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def norm_relu(self, v, x):
        v = v["norm"]
        mean, var = v["mean"], v["var"]
        if self.training:
            mean = jnp.mean(x, (0, 1, 2))
            var = jnp.mean((x - mean) ** 2, (0, 1, 2))  # biased
            v["mean"] = 0.99 * v["mean"] + 0.01 * mean
            v["var"] = 0.99 * v["var"] + 0.01 * var
        return jnp.maximum(0, v["scale"] * (x - mean) / jnp.sqrt(var + 1e-3) + v["bias"])

    def residual(self, v, x, stride=1, preactivate=True):
        v = v["layers"]
        layers = [v[i] for i in range(len(v))]
        if preactivate:
            x = self.norm_relu(layers.pop(0), x)
        x = self.conv(layers.pop(0), x, stride)
        x = self.norm_relu(layers.pop(0), x)
        x = self.conv(layers.pop(0), x)
        if self.bottleneck:
            x = self.norm_relu(layers.pop(0), x)
            x = self.conv(layers.pop(0), x)
        assert not layers
        return x

    def gated(self, v, x, *how):
        gate = next(self.gates)
        return jnp.float64(0) if gate is False else gate * self.residual(v, x, *how)

    def shortcut(self, v, x, outputs, stride):
        inputs = x.shape[3]
        if stride == 1 and inputs == outputs:
            return x
        if self.bottleneck:
            return self.conv(v["conv"], x, stride)
        b, h, w, _ = x.shape
        x = x.reshape(b, h // stride, stride, w // stride, stride, inputs).mean((2, 4))
        low = jnp.zeros((*x.shape[:3], (outputs - inputs) // 2))
        high = jnp.zeros((*x.shape[:3], outputs - inputs - (outputs - inputs) // 2))
        return jnp.concatenate([low, x, high], 3)

    def residual_unit(self, v, x, outputs, stride, very_first):
        residual = self.residual(v["residual"], x, stride, preactivate=not very_first)
        return self.shortcut(v.get("skip", {}).get("resize"), x, outputs, stride) + residual

    def reversible_unit(self, v, x, outputs, stride, very_first):
        x1, x2 = jnp.split(x, 2, 3)
        half = outputs // 2
        if stride == 1 and x.shape[3] == outputs:
            x1, x2 = self.grid(x1), self.grid(x2)
            y1 = x1 + self.grid(self.gated(v["f"], x2, 1, not very_first))
            y2 = x2 + self.grid(self.gated(v["g"], y1))
            if self.training:
                v["peak"] = jnp.max(jnp.abs(jnp.stack([x1, x2, y1, y2]))).astype(jnp.float32)
        else:
            f = self.gated(v["f"], x2, stride, not very_first)
            y1 = self.shortcut(v.get("shortcut1"), x1, half, stride) + f
            y2 = self.shortcut(v.get("shortcut2"), x2, half, stride) + self.gated(v["g"], y1)
        return jnp.concatenate([y1, y2], 3)

    def stage(self, v, x, depth, outputs, stride, first_stage):
        unit = self.reversible_unit if self.reversible else self.residual_unit
        x = unit(v["first"], x, outputs, stride, first_stage)
        if depth > 1:
            v["rest"].pop("peak", None)
            members = [jax.tree.map(lambda a, i=i: a[i], v["rest"]) for i in range(depth - 1)]
            for member in members:
                x = unit(member, x, outputs, 1, False)
            v["rest"] = jax.tree.map(lambda *a: jnp.stack(a), *members)
            if "peak" in v["rest"]:
                v["rest"]["peak"] = jnp.max(v["rest"]["peak"])
            if self.training and "peak" in v["first"]:  # runs as one with the rest
                both = jnp.maximum(v["first"]["peak"], v["rest"]["peak"])
                v["first"]["peak"] = v["rest"]["peak"] = both
        return x

    def __call__(self, v, images):
        """The logits, and `v` as the network leaves it."""
        v = jax.tree.map(lambda a: a, v)
        x = self.conv(v["stem"]["conv"], images, 2 if self.large_images else 1)
        x = self.norm_relu(v["stem"]["norm_relu"], x)
        if self.large_images:
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
        for i, (depth, outputs) in enumerate(zip(self.units, self.filters[1:], strict=True)):
            outputs = 4 * outputs if self.bottleneck else outputs
            x = self.stage(v["stages"][i], x, depth, outputs, 1 if i == 0 else 2, i == 0)
        x = self.norm_relu(v["head"]["activation"], x).mean((1, 2))
        return x @ v["head"]["dense"]["kernel"] + v["head"]["dense"]["bias"], v


# Networks, their arrays, and one step of each ---------------------------------------------------


def make(
    kind, dtype="float32", backward=None, grid_bits: Any = "default", unroll=1, store_last=None
) -> Any:
    """The network without its arrays."""
    units, filters, bottleneck, large_images, _ = NETWORKS[kind]
    options: dict[str, Any] = dict(backward=backward, unroll=unroll, dtype=jnp.dtype(dtype).type)
    if kind.startswith("revnet"):
        options |= dict(grid_bits=grid_bits, store_last=store_last)
    if large_images:  # has no name: a network of one unit instead of the table's
        options.update(backward="reversible", grid_bits=14, large_images=True)
        return nnx.eval_shape(lambda: RevNet(units, filters, CLASSES, rngs=nnx.Rngs(0), **options))
    options.update(units=units, filters=filters, bottleneck=bottleneck)
    name = kind.split()[0]
    return nnx.eval_shape(lambda: create_model(name, CLASSES, rngs=nnx.Rngs(0), **options))


def batch(kind, dtype="float32"):
    rng = np.random.default_rng(1)
    side = NETWORKS[kind][4]
    images = rng.standard_normal((BATCH, side, side + 2, 3))
    labels = rng.integers(0, CLASSES, BATCH)
    return images.astype("float64" if dtype == "float64" else "float32"), labels


def step_of(network):
    """A function from a network's arrays, images and labels to its `Step`."""

    def step(arrays, images, labels):
        graphdef, params, rest = nnx.split(with_arrays(network, arrays), nnx.Param, ...)

        def loss(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            logits = model(images)
            return cross_entropy(logits, labels), (logits, nnx.state(model))

        (value, (logits, state)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return Step(value, logits, nnx.to_pure_dict(gradient), nnx.to_pure_dict(state))

    return step


@functools.cache
def train(kind, dtype, backward, store_last=None) -> Step:
    with setting(dtype):
        network = make(kind, dtype, backward, store_last=store_last)
        step = jax.jit(step_of(network), compiler_options=COMPILE_FAST)
        return jax.device_get(step(draw_arrays(network), *batch(kind, dtype)))


@functools.cache
def train_oracle(kind) -> Step:
    with setting("float64"), jax.numpy_rank_promotion("allow"):
        network = make(kind, "float64")
        images, labels = batch(kind, "float64")

        def loss(arrays):
            logits, after = Oracle(kind, training=True)(arrays, images)
            return cross_entropy(logits, labels), (logits, after)

        step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=COMPILE_FAST)
        (value, (logits, after)), gradient = jax.device_get(step(draw_arrays(network)))
        params = nnx.to_pure_dict(nnx.state(network, nnx.Param))
        return Step(value, logits, restrict(gradient, params), after)


# Faithfulness -----------------------------------------------------------------------------------

WAYS = [
    ("revnet", "reversible"),
    ("revnet", "remat"),
    pytest.param("revnet", "store", marks=pytest.mark.slow),
    ("revnet bottleneck", "reversible"),
    pytest.param("revnet large", "reversible", marks=pytest.mark.slow),
    ("resnet", "store"),
    ("resnet", "remat"),
    ("resnet bottleneck", "store"),
]


@pytest.mark.parametrize("kind, backward", WAYS)
def test_training_is_that_of_the_equations(kind, backward):
    """Logits, gradients, statistics moved once and the stream's peak, in each way of backward."""
    got, due = train(kind, "float64", backward), train_oracle(kind)
    assert relative_error(got, due) <= 1e-12


@pytest.mark.parametrize("kind", ["revnet", "resnet bottleneck"])
def test_evaluation_is_that_of_the_equations(kind):
    """With the averages, which stay as they are, and so does the stream's peak."""
    with setting("float64"):
        network = make(kind, "float64")
        network.eval()
        arrays, (images, _) = draw_arrays(network), batch(kind, "float64")

        def evaluate(arrays, images):
            model = with_arrays(network, arrays)
            return model(images), nnx.to_pure_dict(nnx.state(model))

        got = jax.jit(evaluate, compiler_options=COMPILE_FAST)(arrays, images)
        with jax.numpy_rank_promotion("allow"):
            oracle = jax.jit(Oracle(kind, training=False), compiler_options=COMPILE_FAST)
            logits, _ = oracle(arrays, images)
    assert relative_error(got[0], logits) <= 1e-12
    chex.assert_trees_all_equal(got[1], arrays)


def test_statistics_of_the_stem_move_once():
    """By hand, in NumPy: 0.99 of the old and 0.01 of the batch's mean and biased variance."""
    with setting("float64"):
        arrays = draw_arrays(make("revnet", "float64"))["stem"]
        images = batch("revnet", "float64")[0]
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    x = np.einsum("bhwcij,ijco->bhwo", windows, arrays["conv"]["kernel"])
    old = arrays["norm_relu"]["norm"]
    new = train("revnet", "float64", "reversible").variables["stem"]["norm_relu"]["norm"]
    np.testing.assert_allclose(new["mean"], 0.99 * old["mean"] + 0.01 * x.mean((0, 1, 2)), 1e-12)
    np.testing.assert_allclose(new["var"], 0.99 * old["var"] + 0.01 * x.var((0, 1, 2)), 1e-12)


# Three ways to the gradient ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pytest.param("revnet", marks=pytest.mark.slow), "resnet"])
def test_unrolled_units_are_the_same(kind):
    with setting("float64"):
        network = make(kind, "float64", unroll=True)
        step = jax.jit(step_of(network), compiler_options=COMPILE_FAST)
        arguments = draw_arrays(network), *batch(kind, "float64")
        assert "while" not in step.lower(*arguments).as_text()
        got = jax.device_get(step(*arguments))
    assert relative_error(got, train_oracle(kind)) <= 1e-12


@pytest.mark.parametrize("store_last", [1, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_units_that_store_are_the_same(store_last):
    """A part of the last stage's chain, and a part of the first's, in which its first unit is."""
    kind = "revnet of long stages"
    got = train(kind, "float64", "reversible", store_last)
    assert relative_error(got, train_oracle(kind)) <= 1e-12


def test_units_that_store_are_exact_in_bfloat16():
    """As sums of cotangents are in the order of stored backpropagation."""
    got = train("revnet", "bfloat16", "reversible", store_last=2)
    assert relative_error(got, train("revnet", "bfloat16", "store")) <= 1e-6


def test_networks_of_several_seeds_train_in_one_program():
    """By `jax.vmap` over parameters, statistics and batches, what each does alone."""
    kind = "revnet"
    with setting("float64"):
        network = make(kind, "float64", "reversible", store_last=1)
        one = draw_arrays(network), *batch(kind, "float64")
        other = jax.tree.map(lambda leaf: np.flip(leaf), one)
        both = jax.tree.map(lambda *leaves: np.stack(leaves), one, other)
        step = step_of(network)
        got = jax.jit(jax.vmap(step), compiler_options=COMPILE_FAST)(*both)
        due = jax.jit(step, compiler_options=COMPILE_FAST)(*other)
        first, second = (jax.tree.map(lambda leaf, i=i: leaf[i], got) for i in (0, 1))
    assert relative_error(first, train_oracle(kind)) <= 1e-12
    assert relative_error(second, due) <= 1e-12


@pytest.mark.parametrize(
    "name, stored",
    [
        ("revnet38", [0, 0, 2]),
        ("revnet110", [0, 0, 3]),
        ("revnet164", [0, 0, 3]),
        (("revnet", dict(units=(9, 9, 36), filters=(32, 32, 64, 128))), [0, 0, 3]),
        ("revnet56", [0, 0, 2, 1]),
        ("revnet104", [0, 0, 2, 1]),
    ],
)
def test_units_store_where_a_later_peak_has_room_for_it(name, stored):
    """As docs/performance.md says; test_memory.py has the peaks. Depth plays no part."""
    name, own = (name, {}) if isinstance(name, str) else name

    def stages(**options):
        options |= own
        network = nnx.eval_shape(lambda: create_model(name, 10, rngs=nnx.Rngs(0), **options))
        return [stage.store_last for stage in network.stages]

    assert stages() == stored
    assert stages(backward="remat") == stages(store_last=0) == [0] * len(stored)


def test_a_network_may_be_switched_to_another_way():
    """Whether it stores is the reversible way's matter."""
    model = create_model("revnet", 3, rngs=nnx.Rngs(0), units=(2, 3), filters=(4, 4, 8))
    assert [stage.store_last for stage in model.stages] == [0, 1]
    images = jnp.ones((2, 8, 8, 3))
    model.eval()
    logits = model(images)
    model.set_attributes(backward="store")
    chex.assert_trees_all_equal(model(images), logits)


@pytest.mark.parametrize("backward", ["reversible", "remat"])
def test_ways_give_the_same_bits_but_for_gradients(backward):
    got, due = train("revnet", "float64", backward), train("revnet", "float64", "store")
    chex.assert_trees_all_equal(got.variables, due.variables)
    chex.assert_trees_all_equal((got.loss, got.logits), (due.loss, due.logits))


@pytest.mark.parametrize(
    "dtype, tolerance",
    [pytest.param("float32", 5e-6, marks=pytest.mark.slow), ("bfloat16", 1e-6)],
)
def test_reconstructed_gradients_in_narrow_types(dtype, tolerance):
    got, due = train("revnet", dtype, "reversible"), train("revnet", dtype, "store")
    chex.assert_trees_all_equal(got.variables, due.variables)
    assert relative_error(got, due) <= tolerance
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype("float32")}


def test_bfloat16_is_computed_in_bfloat16():
    got, due = train("revnet", "bfloat16", "store"), train("revnet", "float32", "store")
    assert 1e-4 < relative_error(got.logits, due.logits) < 0.1


def compare_named(name, side):
    """Reversible against stored gradients of a network of the table."""
    images = np.random.default_rng(0).standard_normal((2, side, side, 3)).astype(np.float32)
    steps = []
    for backward in ("reversible", "store"):
        model = nnx.eval_shape(
            lambda way=backward: create_model(name, CLASSES, rngs=nnx.Rngs(0), backward=way)
        )
        step = jax.jit(step_of(model), compiler_options=COMPILE_FAST)
        steps.append(step(draw_arrays(model), images, np.array([1, 0])))
    got, due = steps
    chex.assert_tree_all_finite(got)
    chex.assert_trees_all_equal(got.variables, due.variables)
    assert relative_error(got.gradient, due.gradient) <= 5e-6


@pytest.mark.optimised
@pytest.mark.slow
def test_revnet38_end_to_end():
    compare_named("revnet38", 8)


@pytest.mark.optimised
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, side", [("revnet110", 8), ("revnet164", 8), ("revnet56", 32), ("revnet104", 32)]
)
def test_revnets_end_to_end(name, side):
    compare_named(name, side)


# What the stages offer --------------------------------------------------------------------------


@pytest.mark.optimised
@pytest.mark.parametrize("kind", ["revnet", "revnet bottleneck"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inverse_restores_the_input_of_a_stage(kind, training, dtype):
    """Bit for bit on the grid; behind a unit that changes shape, the input of the one after it."""
    network = make(kind, dtype)
    network.train() if training else network.eval()
    x = np.random.default_rng(2).standard_normal((2, BATCH, 6, 6, 4)).astype(np.float32)

    @jax.jit
    def there_and_back(arrays, x):
        stage = with_arrays(network, arrays).stages[0]
        due = (x[0], x[1])
        if kind == "revnet bottleneck":
            due = with_arrays(network, arrays).stages[0].first(due)
        y = stage((x[0], x[1]))
        before = nnx.to_pure_dict(nnx.state(stage))
        back = stage.inverse(y)
        return round_to_grid(due, 14), y, back, before, nnx.to_pure_dict(nnx.state(stage))

    due, y, back, before, after = there_and_back(draw_arrays(network), x)
    chex.assert_trees_all_equal(back, due)
    chex.assert_trees_all_equal(before, after)
    assert relative_error(y, due) > 0.1


def peaks_of(network):
    return jax.tree.leaves(nnx.state(network, StreamPeak))


def test_stream_peaks():
    """One for each reversible chain on a grid; their values are compared with the oracle's."""
    assert len(peaks_of(make("revnet"))) == 2
    assert len(peaks_of(make("revnet bottleneck"))) == 1
    assert all(leaf.shape == () and leaf.dtype == jnp.float32 for leaf in peaks_of(make("revnet")))
    assert not peaks_of(make("revnet", grid_bits=None))
    assert not peaks_of(make("resnet"))
    variables = train("revnet", "float64", "reversible").variables
    assert variables["stages"][0]["rest"]["peak"] > 1


# Settings in which a network must be the same ---------------------------------------------------


@pytest.mark.parametrize("kind", ["revnet bottleneck", "resnet"])
def test_graph_and_tree_mode_are_one_program(kind):
    """The gradient lowers to the same text, so to the same bits."""

    def lowered(graph_mode):
        with nnx.set_graph_mode(graph_mode):
            network = make(kind)
            step = jax.jit(step_of(network)).lower(draw_arrays(network), *batch(kind))
            return step.as_text()

    assert lowered(True) == lowered(False)


@pytest.mark.slow  # tests/test_training_mesh.py has the like
@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_four_devices_against_one(axis_type):
    """The batch sharded over a mesh; float64, where a sum in another order flips no rounding."""
    devices = jax.device_count()
    if BATCH % devices or devices == 1:
        pytest.skip(f"{devices} devices do not share a batch of {BATCH}.")
    axis_types = (getattr(jax.sharding.AxisType, axis_type),)
    mesh = jax.make_mesh((devices,), ("batch",), axis_types=axis_types)
    with setting("float64"), jax.set_mesh(mesh):
        network = make("revnet", "float64")
        arrays = jax.device_put(draw_arrays(network), NamedSharding(mesh, PartitionSpec()))
        shards = jax.device_put(
            batch("revnet", "float64"), NamedSharding(mesh, PartitionSpec("batch"))
        )
        step = jax.jit(step_of(network), compiler_options=COMPILE_FAST)
        got = step(arrays, *shards)
        assert len(got.logits.sharding.device_set) == devices
    assert relative_error(got, train("revnet", "float64", "reversible")) <= 1e-11


@pytest.mark.slow
def test_creation_without_jit():
    def create():
        model = create_model("revnet", 10, rngs=nnx.Rngs(3), units=(1,), filters=(8, 8))
        return nnx.to_pure_dict(nnx.state(model))

    due = create()
    with jax.disable_jit():
        chex.assert_trees_all_close(create(), due, rtol=1e-5, atol=1e-6)


def test_creation_under_jit_and_for_another_way():
    """The same parameters as without jit, whatever way to the gradient."""

    def create(key, backward="reversible"):
        model = create_model(
            "revnet",
            10,
            rngs=nnx.Rngs(params=key),
            units=(2,),
            filters=(8, 8),
            backward=backward,
        )
        return nnx.to_pure_dict(nnx.state(model))

    key = jax.random.key(3)
    due = create(key)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(create, key), due)
    stored = functools.partial(create, backward="store")
    got = jax.jit(stored, compiler_options=COMPILE_FAST)(key)
    chex.assert_trees_all_close(got, due, rtol=1e-5, atol=1e-6)


# The table, initialisation, and what create_model refuses ---------------------------------------

PARAMETERS = {  # of the authors' code, by number of classes
    "resnet32": {10: 464_154, 100: 470_004},
    "resnet110": {10: 1_727_962, 100: 1_733_812},
    "resnet164": {10: 1_703_258, 100: 1_726_388},
    "resnet50": {1000: 25_549_352},
    "resnet101": {1000: 44_541_480},
    "resnet152": {1000: 60_185_128},
    "revnet38": {10: 464_890, 100: 475_060},
    "revnet110": {10: 1_729_194, 100: 1_740_804},
    "revnet164": {10: 1_748_778, 100: 1_794_948},
    "revnet56": {1000: 27_553_128},
    "revnet104": {1000: 45_428_072},
    "preact_resnet110": {10: 1_727_962},
    "preact_resnet164": {10: 1_703_258, 100: 1_726_388},
    "resnet1001": {10: 10_327_706, 100: 10_350_836},
    "resnet1202": {10: 19_421_274},
    "resnet200": {1000: 64_666_152},
    # Mangalam et al. 2022 publish millions; test_revvit has these by arithmetic.
    "revvit_small": {1000: 22_434_664},
    "revvit_base": {1000: 87_335_656},
    "revvit_large": {1000: 305_350_632},
}


def test_placements_and_conventions_are_those_of_the_papers_code():
    """Which no count of parameters tells; epsilon and decay are those of BatchNorm."""
    of = {name: architecture_of(name).get("conventions") for name in list_models()}
    huang, he = (
        [name for name, code in of.items() if code == kind]
        for kind in ("stochastic_depth", "identity_mappings")
    )
    assert huang == ["resnet1202"]
    assert he == ["preact_resnet110", "preact_resnet164", "resnet1001", "resnet200"]
    assert {name for name in of if "placement" in architecture_of(name)} == {"resnet1202"}
    assert architecture_of("resnet1202")["placement"] == "original"
    constants = {code: (own.epsilon, own.decay) for code, own in CONVENTIONS.items()}
    assert constants == {
        "revnet": (1e-3, 0.99),
        "identity_mappings": (1e-5, 0.9),
        "stochastic_depth": (1e-5, 0.9),
    }


def test_none_store_by_default_where_a_tpu_is(monkeypatch):
    def stored():
        network = nnx.eval_shape(lambda: create_model("revnet38", 10, rngs=nnx.Rngs(0)))
        return sum(stage.store_last for stage in network.stages)

    assert stored() > 0
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert stored() == 0


@pytest.mark.parametrize("name", ["resnet", "revnet"])
def test_a_network_can_be_pickled_and_tabulated(name):
    model = create_model(name, 10, rngs=nnx.Rngs(0), units=(1, 1), filters=(4, 4, 8))
    images = jnp.ones((2, 8, 8, 3))
    again = pickle.loads(pickle.dumps(model))
    chex.assert_trees_all_equal(again(images), nnx.clone(model)(images))
    assert type(model).__name__ in nnx.tabulate(model, images)


def test_list_models():
    assert sorted(list_models()) == sorted(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    for number, due in PARAMETERS[name].items():
        model = nnx.eval_shape(lambda n=number: create_model(name, n, rngs=nnx.Rngs(0)))
        classes = {"revnet": RevNet, "revvit": RevViT}
        assert type(model) is classes.get(name[:6], ResNet)
        params = jax.tree.leaves(nnx.state(model, nnx.Param))
        assert sum(leaf.size for leaf in params) == due


def test_initialisation():
    """Kernels by the authors' distributions, each drawn for itself; the rest zeros and ones."""
    model = create_model("revnet", 50, rngs=nnx.Rngs(0), units=(3, 2), filters=(64, 64, 128))
    variables = nnx.to_pure_dict(nnx.state(model))
    head = variables["head"].pop("dense")
    bound = math.sqrt(3 / 128)
    assert 0.99 * bound < np.abs(head["kernel"]).max() <= bound
    np.testing.assert_allclose(np.std(head["kernel"]), bound / math.sqrt(3), rtol=0.03)
    assert not np.any(head["bias"])

    kernels = []
    constants = {"scale": 1, "bias": 0, "mean": 0, "var": 1, "peak": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        name = path[-1].key
        if name != "kernel":
            np.testing.assert_array_equal(leaf, np.full(leaf.shape, constants[name], leaf.dtype))
            continue
        for kernel in leaf if leaf.ndim == 5 else [leaf]:
            std = math.sqrt(2 / (3 * 3 * kernel.shape[3]))
            assert 1.9 * std < np.abs(kernel).max() <= 2 * std * (1 + 1e-6)
            np.testing.assert_allclose(np.std(kernel), std * truncnorm(-2, 2).std(), rtol=0.05)
            np.testing.assert_allclose(np.mean(kernel), 0, atol=5 * std / math.sqrt(kernel.size))
            kernels.append(kernel)
    assert len(kernels) == 1 + 2 * 2 * 5
    firsts = [float(kernel.flat[0]) for kernel in map(np.asarray, kernels)]
    assert len(set(firsts)) == len(firsts)


OWN = dict(units=(2,), filters=(8, 8))


@pytest.mark.parametrize(
    "name, options, error, sentence",
    [
        ("revnet39", {}, ValueError, "no model 'revnet39': name one of resnet32, "),
        (["revnet38"], {}, ValueError, r"no model \['revnet38'\]: name one of"),
        (
            "resnet32",
            dict(backward="reversible"),
            ValueError,
            "'reversible': give one of store",
        ),
        (
            "revnet38",
            dict(backward="recompute"),
            ValueError,
            "'recompute': give one of rev",
        ),
        ("resnet32", dict(grid_bits=14), ValueError, "grid_bits=14: resnet32 is not reversible"),
        ("revnet", dict(units=(2,), filters=(8, 9)), ValueError, r"\(8, 9\): .*must be even"),
        ("revnet", dict(units=(2,), filters=(7, 8)), ValueError, r"\(7, 8\): .*must be even"),
        (
            "revnet",
            dict(units=(2,), filters=(8, 3), bottleneck=True),
            ValueError,
            r"\(8, 3\): .*a quarter of each half",
        ),
        ("revnet", dict(units=(2,), filters=(8, 4)), ValueError, "must not decrease"),
        ("resnet", dict(units=(2, 1), filters=(8, 8, 4)), ValueError, "must not decrease"),
        ("revnet", dict(units=(2,)), ValueError, '"revnet" needs units and filters'),
        ("resnet", dict(filters=(8, 8)), ValueError, '"resnet" needs units and filters'),
        ("revnet38", dict(units=(2,)), ValueError, 'revnet38 has its own units: leave .* "revnet"'),
        ("resnet32", OWN, ValueError, 'resnet32 has its own units, filters: .* "resnet"'),
        ("resnet164", dict(bottleneck=True), ValueError, "its own bottleneck"),
        ("revnet", dict(units=(2, 2), filters=(8, 8)), ValueError, "one width more than stages"),
        (
            "revnet",
            dict(units=(0,), filters=(8, 8)),
            ValueError,
            r"units=\(0,\): give pos",
        ),
        ("revnet", dict(units=(), filters=(8,)), ValueError, r"units=\(\): give pos"),
        ("revnet", dict(units=5, filters=(8, 8)), ValueError, "units=5: give pos"),
        ("revnet", dict(units=(True,), filters=(8, 8)), ValueError, r"units=\(True,\): give pos"),
        ("revnet", dict(units=(2,), filters=(8, -8)), ValueError, r"filters=\(8, -8\).* positive"),
        ("revnet", dict(units=(2.0,), filters=(8, 8)), ValueError, r"units=\(2.0,\)"),
        ("revnet38", dict(num_classes=0), ValueError, "num_classes=0: give a pos"),
        ("resnet32", dict(in_channels=0), ValueError, "in_channels=0: give a pos"),
        ("resnet32", dict(rngs=0), TypeError, r"rngs=0: give nnx\.Rngs"),
        ("resnet32", dict(dtype=jnp.int32), ValueError, "dtype=.*int32.*: give float32, bfloat16"),
        ("resnet32", dict(dtype="float9"), ValueError, "dtype='float9': give float32, bfloat16"),
        ("resnet32", dict(dtype=None), ValueError, "dtype=None: give float32, bfloat16"),
        ("resnet32", dict(dtype="float64"), ValueError, "float64 needs .*jax_enable_x64"),
        ("revnet38", dict(grid_bits=24), ValueError, "grid_bits=24: give an integer from 0 to 23"),
        ("revnet38", dict(grid_bits=-1), ValueError, "grid_bits=-1: give an integer from 0 to 23"),
        ("resnet32", dict(store_last=1), ValueError, "store_last=1: resnet32 is a ResNet, which"),
        ("revnet38", dict(store_last=8), ValueError, "store_last=8: give a number from 0 to 7"),
        (
            "revnet38",
            dict(store_last=1, backward="store"),
            ValueError,
            'store_last=1 and backward="store": leave store_last out',
        ),
        ("revvit_small", dict(store_last=13), ValueError, "store_last=13: give .* from 0 to 12"),
        ("revnet38", dict(grid_bits=14.0), TypeError, "grid_bits=14.0: give an integer, None or"),
    ],
)
def test_what_create_model_refuses(name, options, error, sentence):
    with pytest.raises(error, match=sentence):
        create_model(name, **{"num_classes": 10, "rngs": nnx.Rngs(0), **options})


@pytest.mark.parametrize(
    "network,options,sentence",
    [
        (ResNet, dict(backward="reversible"), "backward='reversible': give one of store, remat"),
        (RevNet, dict(backward="stroe"), "backward='stroe': give one of reversible, remat, store"),
        (RevNet, dict(filters=(8, 9)), r"filters=\(8, 9\): channels must be even"),
        (RevNet, dict(unroll=0), "unroll=0: give a positive integer"),
        (ResNet, dict(unroll="all"), "unroll='all': give a positive integer"),
        (ResNet, dict(units=()), r"units=\(\): give positive integers"),
    ],
)
def test_what_the_classes_refuse(network, options, sentence):
    options = dict(units=(1,), filters=(8, 8), num_classes=10, rngs=nnx.Rngs(0)) | options
    with pytest.raises(ValueError, match=sentence):
        network(**options)


@pytest.mark.parametrize("name", ["resnet", "revnet"])
@pytest.mark.parametrize("shape", [(8, 8, 3), (2, 8, 8, 1)])
def test_images_of_another_shape(name, shape):
    def logits():
        model = create_model(name, 10, rngs=nnx.Rngs(0), units=(1,), filters=(8, 8))
        return model(jnp.zeros(shape))

    shown = f"images are float32[{','.join(map(str, shape))}]: give [B, H, W, 3]"
    with pytest.raises(ValueError, match=re.escape(shown)):
        jax.eval_shape(logits)


@pytest.mark.parametrize("height, width", [(8, 9), (9, 8)])
def test_images_that_strides_do_not_divide(height, width):
    def logits():
        model = create_model("revnet", 10, rngs=nnx.Rngs(0), units=(1, 1), filters=(8, 8, 8))
        return model(jnp.zeros((2, height, width, 3)))

    with pytest.raises(ValueError, match=f"a stage of stride 2 as {height}x{width}: their sides"):
        jax.eval_shape(logits)


def test_dtype_by_name():
    with jax.enable_x64(True):
        model = nnx.eval_shape(lambda: RevNet((1,), (8, 8), 10, dtype="float64", rngs=nnx.Rngs(0)))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {
            "float64"
        }


@pytest.mark.optimised
def test_bfloat16_convolutions_round_whatever_the_compiler_keeps():
    """Else two evaluations of a function differ, and with them the reconstruction."""
    kind = dict(conventions=CONVENTIONS["revnet"], dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    conv = Conv(8, 8, 3, 1, **kind)
    x = jax.random.normal(jax.random.key(0), (8, 16, 16, 8))
    y = jax.jit(conv)(x)
    dx = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(conv(x)))))(x)
    for found in (y, dx):
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, found.astype(jnp.bfloat16).astype(jnp.float32))
