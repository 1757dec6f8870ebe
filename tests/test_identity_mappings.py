"""Placements and shortcuts of He et al. 2016 against an unscanned transcription of their equations.

The transcription knows a unit as a string, after figure 4 of the paper: C is a convolution, B
BatchNorm, R ReLU, in the order in which the branch has them.
"""

# Calls with options chosen at run time, which no type checker can follow.
# pyright: reportArgumentType=false, reportCallIssue=false

import functools
import itertools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from networks import COMPILE_FAST, cross_entropy, draw_arrays, relative_error, setting, with_arrays

from revjax import ResNet, Shortcut, create_model
from revjax.conventions import CONVENTIONS

# The branch, and what follows the addition.
BASIC = {
    "original": ("CBRCB", "R"),
    "bn_after_addition": ("CBRC", "BR"),
    "relu_before_addition": ("CBRCBR", ""),
    "relu_only_preactivation": ("RCBRCB", ""),
    "full_preactivation": ("BRCBRC", ""),
}
BOTTLENECK = {
    "original": ("CBRCBRCB", "R"),
    "bn_after_addition": ("CBRCBRC", "BR"),
    "relu_before_addition": ("CBRCBRCBR", ""),
    "relu_only_preactivation": ("RCBRCBRCB", ""),
    "full_preactivation": ("BRCBRCBRC", ""),
}
HEAD = {"relu_only_preactivation": "R", "full_preactivation": "BR"}
SHORTCUTS = [
    Shortcut("constant_scaling", scale=0.5, branch_scale=1.0),
    Shortcut("exclusive_gating"),
    Shortcut("shortcut_only_gating"),
    Shortcut("convolution"),
    Shortcut("dropout", rate=0.4),
]
UNITS, FILTERS, CLASSES, BATCH = (1, 2), (4, 4, 8), 5, 3


class Oracle:
    """A network on the nested dict `v` of its arrays, in training mode; it moves the averages.

    gates has a factor, or False, for each unit.
    """

    def __init__(
        self,
        bottleneck,
        placement,
        shortcut,
        conventions,
        key=None,
        gates=None,
        units=UNITS,
        filters=FILTERS,
    ):
        self.units, self.filters = units, filters
        self.gates = itertools.repeat(1.0) if gates is None else iter(gates)
        self.table = BOTTLENECK if bottleneck else BASIC
        self.bottleneck, self.placement, self.shortcut = bottleneck, placement, shortcut
        self.epsilon, self.decay = {"revnet": (1e-3, 0.99), "identity_mappings": (1e-5, 0.9)}[
            conventions
        ]
        self.shared = conventions == "identity_mappings"
        if key is not None:
            self.keys = iter(jax.random.split(jax.random.split(key)[1], sum(UNITS)))

    def conv(self, kernel, x, stride=1):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=dimensions
        )

    def norm(self, v, x):
        mean = jnp.mean(x, (0, 1, 2))
        var = jnp.mean((x - mean) ** 2, (0, 1, 2))
        y = v["scale"] * (x - mean) / jnp.sqrt(var + self.epsilon) + v["bias"]
        v["mean"] = self.decay * v["mean"] + (1 - self.decay) * mean
        v["var"] = self.decay * v["var"] + (1 - self.decay) * var
        return y

    def run(self, letters, layers, x, stride=1):
        for letter in letters:
            if letter == "R":
                x = jnp.maximum(x, 0)
            elif letter == "B":
                x = self.norm(layers.pop(0)["norm"], x)
            else:
                x, stride = self.conv(layers.pop(0)["kernel"], x, stride), 1
        assert not layers
        return x

    def resized(self, v, x, stride):
        if self.bottleneck or self.shortcut.kind == "convolution":
            x = self.conv(v["conv"]["kernel"], x, stride)
            return self.norm(v["norm"]["norm"], x) if "norm" in v else x
        b, h, w, c = x.shape
        x = x.reshape(b, h // stride, stride, w // stride, stride, c).mean((2, 4))
        none = jnp.zeros((*x.shape[:3], (self.filters[2] - c) // 2))
        return jnp.concatenate([none, x, none], 3)

    def unit(self, v, x, stride, very_first):
        branch, after = self.table[self.placement]
        leading = branch.index("C")
        if self.shared and stride != 1:  # one activation for both
            x = self.run(branch[:leading], [v["first"]] if "B" in branch[:leading] else [], x)
            branch = branch[leading:]
        elif very_first:
            branch = branch[leading:]
        layers = [v["residual"]["layers"][i] for i in sorted(v["residual"]["layers"])]
        gate = next(self.gates)
        f = 0.0 if gate is False else gate * self.run(branch, layers, x, stride)
        skip = v.get("skip", {})
        h = self.resized(skip["resize"], x, stride) if "resize" in skip else x
        if stride != 1 and "resize" not in skip:  # no arrays, but another shape
            h = self.resized(None, x, stride)
        if "gate" in skip:
            g = 1 / (1 + jnp.exp(-self.conv(skip["gate"]["kernel"], x, stride) - skip["gate_bias"]))
        kind = self.shortcut.kind
        if kind == "constant_scaling":
            y = 0.5 * h + 1.0 * f
        elif kind == "exclusive_gating":
            y = (1 - g) * h + g * f
        elif kind == "shortcut_only_gating":
            y = (1 - g) * h + f
        elif kind == "dropout":
            y = jax.random.bernoulli(next(self.keys), 0.6, h.shape) * h + f
        else:
            y = h + f
        return self.run(after, [v["addition"]] if "B" in after else [], y)

    def __call__(self, v, images):
        v = jax.tree.map(lambda a: a, v)
        x = self.run("CBR", [v["stem"]["conv"], v["stem"]["norm_relu"]], images)
        for i, depth in enumerate(self.units):
            stage = v["stages"][i]
            x = self.unit(stage["first"], x, i + 1, i == 0)
            members = [jax.tree.map(lambda a, j=j: a[j], stage["rest"]) for j in range(depth - 1)]
            for member in members:
                x = self.unit(member, x, 1, False)
            if members:
                stage["rest"] = jax.tree.map(lambda *a: jnp.stack(a), *members)
        head = HEAD.get(self.placement, "")
        x = self.run(head, [v["head"]["activation"]] if "B" in head else [], x).mean((1, 2))
        return x @ v["head"]["dense"]["kernel"] + v["head"]["dense"]["bias"], v


ALIKE = ("shortcut_only_gating", "convolution")  # exclusive gating and projections have it all
CASES = [
    *[(False, placement, Shortcut(), "revnet") for placement in BASIC if placement[0] != "f"],
    *[
        pytest.param(
            False,
            "original",
            shortcut,
            "identity_mappings",
            marks=[pytest.mark.slow] if shortcut.kind in ALIKE else [],
        )
        for shortcut in SHORTCUTS
    ],
    (True, "full_preactivation", Shortcut(), "identity_mappings"),
    pytest.param(True, "original", Shortcut(), "identity_mappings", marks=pytest.mark.slow),
    pytest.param(
        True, "relu_only_preactivation", Shortcut(), "identity_mappings", marks=pytest.mark.slow
    ),
    pytest.param(
        False,
        "full_preactivation",
        Shortcut("exclusive_gating"),
        "revnet",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(
    "bottleneck, placement, shortcut, conventions",
    CASES,
    ids=lambda value: value.kind if isinstance(value, Shortcut) else str(value),
)
def test_training_is_that_of_the_equations(bottleneck, placement, shortcut, conventions):
    """Logits, gradients of all parameters and running averages, in float64."""
    with setting("float64"), jax.numpy_rank_promotion("allow"):
        network = nnx.eval_shape(
            lambda: ResNet(
                UNITS,
                [width // 4 if bottleneck and i else width for i, width in enumerate(FILTERS)],
                CLASSES,
                bottleneck=bottleneck,
                placement=placement,
                shortcut=shortcut,
                conventions=conventions,
                dtype=jnp.float64,
                rngs=nnx.Rngs(0),
            )
        )
        arrays, key = draw_arrays(network), jax.random.key(7)
        rng = np.random.default_rng(1)
        images, labels = rng.standard_normal((BATCH, 4, 4, 3)), rng.integers(0, CLASSES, BATCH)

        def ours(arrays):
            model = with_arrays(network, arrays)
            logits = model(images, key=key)
            return cross_entropy(logits, labels), (logits, nnx.to_pure_dict(nnx.state(model)))

        def theirs(arrays):
            oracle = Oracle(bottleneck, placement, shortcut, conventions, key)
            logits, after = oracle(arrays, images)
            return cross_entropy(logits, labels), (logits, after)

        got, due = (
            jax.jit(jax.value_and_grad(f, has_aux=True), compiler_options=COMPILE_FAST)(arrays)
            for f in (ours, theirs)
        )
        (loss, (logits, after)), gradient = got
        (due_loss, (due_logits, due_after)), due_gradient = due
        np.testing.assert_allclose(logits, due_logits, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(loss, due_loss, rtol=1e-12)
        assert relative_error(after, due_after) < 1e-12
        moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), after, arrays)
        params = nnx.to_pure_dict(nnx.state(network, nnx.Param))
        leaves = jax.tree_util.tree_leaves_with_path(gradient)
        due_leaves = jax.tree.leaves(due_gradient)
        largest = max(float(np.abs(leaf).max()) for leaf in due_leaves)
        for (path, leaf), due_leaf in zip(leaves, due_leaves, strict=True):
            np.testing.assert_allclose(leaf, due_leaf, rtol=1e-8, atol=1e-10 * largest)
            if path[-1].key in ("mean", "var"):
                assert functools.reduce(lambda t, p: t[p.key], path, moved)
        assert len(jax.tree.leaves(params)) < len(leaves)


def small(**options) -> Any:
    options = dict(placement="original") | options
    return create_model("resnet", CLASSES, rngs=nnx.Rngs(0), units=(3,), filters=(4, 4), **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dropout", "exclusive_gating"])
def test_remat_is_the_same(kind):
    """The same draws in the recomputation."""

    def step(backward):
        network = small(shortcut=kind, backward=backward)
        graphdef, params, rest = nnx.split(network, nnx.Param, ...)
        images = jax.random.normal(jax.random.key(1), (BATCH, 4, 4, 3))

        def loss(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            return jnp.sum(model(images, key=jax.random.key(2)) ** 2), nnx.state(model)

        return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=COMPILE_FAST)(
            params
        )

    chex.assert_trees_all_close(step("remat"), step("store"), rtol=1e-5, atol=1e-5)


def test_dropout_in_evaluation_is_its_expectation():
    dropout = small(shortcut=Shortcut("dropout", rate=0.4))
    scaling = small(shortcut=Shortcut("constant_scaling", scale=0.6, branch_scale=1.0))
    images = jax.random.normal(jax.random.key(1), (BATCH, 4, 4, 3))
    for model in dropout, scaling:
        model.eval()
    got, due = (jax.jit(lambda model, images: model(images))(m, images) for m in (dropout, scaling))
    np.testing.assert_allclose(got, due, rtol=1e-5)
    dropout.train()
    with pytest.raises(ValueError, match=r"key=jax.random.key"):
        dropout(images)


@pytest.mark.parametrize("bias, gate", [(-6.0, -6.0), (None, -6.0), (0.0, 0.0)])
def test_gate_bias_is_what_it_is_initialised_to(bias, gate):
    shortcut = Shortcut("shortcut_only_gating", gate_bias=bias)
    stage = small(shortcut=shortcut).stages[0]
    for unit in stage.first, stage.rest:
        assert np.all(np.asarray(unit.skip.gate_bias[...]) == gate)


@pytest.mark.parametrize("conventions", CONVENTIONS)
def test_initialisation(conventions):
    """Deviations and limits by the papers' code."""
    options = dict(units=(1, 1), filters=(64, 64, 128), conventions=conventions)
    model: Any = create_model("resnet", 50, rngs=nnx.Rngs(0), **options)
    kernel = np.asarray(model.stages[1].first.residual.layers[-1].kernel[...])
    inputs, outputs = 128, 128
    fan = 9 * (inputs if conventions == "stochastic_depth" else outputs)
    deviation = math.sqrt(2 / fan)
    if conventions == "revnet":
        assert np.abs(kernel).max() <= 2 * deviation * (1 + 1e-6)
    else:
        np.testing.assert_allclose(kernel.std(), deviation, rtol=0.02)
        assert np.abs(kernel).max() > 3 * deviation
    dense, bias = (np.asarray(model.head.dense.__dict__[name][...]) for name in ("kernel", "bias"))
    limit = math.sqrt((3 if conventions == "revnet" else 1) / 128)
    assert 0.98 * limit < np.abs(dense).max() <= limit
    if conventions == "stochastic_depth":
        assert 0.8 / math.sqrt(128) < np.abs(bias).max() <= 1 / math.sqrt(128)
    else:
        assert not bias.any()


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(placement="middle"), "placement='middle': give one of original, "),
        (dict(placement=["original"]), r"placement=\['original'\]: give one of original, "),
        (dict(shortcut=Shortcut(["dropout"])), r"shortcut kind=\['dropout'\]: give one of"),
        (dict(shortcut=Shortcut("dropout", rate=True)), "shortcut rate=True: give a number"),
        (dict(shortcut="gating"), "shortcut kind='gating': give one of identity, "),
        (dict(shortcut=Shortcut("identity", rate=0.5)), "rate=0.5: identity does not read it"),
        (dict(shortcut=Shortcut("dropout", rate=1.0)), "rate=1.0: give a number from 0 to below 1"),
        (
            dict(shortcut=Shortcut("constant_scaling", scale=math.nan)),
            "scale=nan: give a finite number",
        ),
        (dict(shortcut=Shortcut("exclusive_gating", gate_bias=10**400)), "give a finite number"),
        (dict(conventions="mine"), "conventions='mine': give one of revnet, "),
        (dict(conventions=["revnet"]), r"conventions=\['revnet'\]: give one of revnet, "),
        (dict(backward=["store"]), r"backward=\['store'\]: give one of store, remat"),
    ],
)
def test_what_a_resnet_refuses(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        create_model("resnet32", 10, rngs=nnx.Rngs(0), **options)


def test_numbers_of_a_shortcut_may_be_numpys():
    """They come back as Python's, which take the dtype of any stream."""
    given = Shortcut("constant_scaling", scale=np.float32(0.25), branch_scale=np.int32(2)).checked()
    assert given == Shortcut("constant_scaling", scale=0.25, branch_scale=2.0)
    assert type(given.scale) is type(given.branch_scale) is float


def test_a_shortcut_is_a_name_or_a_record():
    with pytest.raises(TypeError, match=r"shortcut=0.5: give the name of a kind"):
        create_model("resnet32", 10, rngs=nnx.Rngs(0), shortcut=0.5)


@pytest.mark.parametrize(
    "options",
    [dict(placement="original"), dict(shortcut="dropout"), dict(conventions="identity_mappings")],
)
def test_a_reversible_unit_has_no_other_form(options):
    with pytest.raises(ValueError, match="revnet38 is reversible"):
        create_model("revnet38", 10, rngs=nnx.Rngs(0), **options)
