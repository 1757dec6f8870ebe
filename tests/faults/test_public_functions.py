"""Public functions, given what they are not for: a sentence of ours, or the right answer.

The right answer of a chain is that of a Python loop over its blocks, in NumPy.
"""

import traceback
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from fuzzing import few
from hypothesis import given
from hypothesis import strategies as st

import revjax

PACKAGE = str(Path(revjax.__file__).parent)

ONE = jnp.ones((2, 3))
WEIGHTS = 0.1 * jnp.ones((2, 3, 3))
PARAMS, STREAM = (WEIGHTS, WEIGHTS), (ONE, ONE)

ODD = {
    "None": None,
    "integer": 3,
    "number": 2.5,
    "bool": True,
    "text": "abc",
    "object": object(),
    "no list": [],
    "no tuple": (),
    "no dict": {},
    "list": [1, "a", None],
    "scalar": jnp.float32(1),
    "key": jax.random.key(0),
    "integers": jnp.ones((2, 3), jnp.int32),
    "float16": jnp.ones((2, 3), jnp.float16),
    "complex": jnp.ones((2, 3), jnp.complex64),
    "no batch": jnp.ones((0, 3)),
    "no features": jnp.ones((2, 0)),
    "NaN": jnp.full((2, 3), jnp.nan),
    "infinity": jnp.full((2, 3), jnp.inf),
    "objects": np.array([None]),
    "texts": np.array(["a"]),
}
VALUES = st.sampled_from(list(ODD)).map(ODD.get)
FORMS = st.sampled_from([lambda v: v, lambda v: (v, v), lambda v: (ONE, v), lambda v: [v, v]])


def dense(w, x, *_):
    return jnp.tanh(x @ w)


def half(_, x):
    return jax.tree.map(lambda leaf: leaf * jnp.asarray(0.5, leaf.dtype), x)


class Dense(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.linear(x))


def attempt(function, *args: Any, **options: Any) -> Any:
    """What a call returns; None where it raises as is documented, or where f itself does."""
    try:
        return function(*args, **options)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = ("dense", "half", "__call__")
        if any(frame.filename == __file__ and frame.name in own for frame in frames):
            return None
        assert isinstance(error, TypeError | ValueError), repr(error)
        assert frames[-1].filename.startswith(PACKAGE), f"not ours: {error!r}"
        assert str(error).rstrip(")").endswith((".", "own", "large")), error
        return None


CHAINS = [revjax.rev_chain_apply, revjax.rev_chain_inverse]
BLOCKS = [revjax.rev_block_apply, revjax.rev_block_inverse]
ARGUMENTS = ["f", "g", "params", "x", "xs", "gates", "coupling", "grid_bits", "has_aux", "unroll"]
ARGUMENTS += ["backward", "range_check"]


@given(st.sampled_from(CHAINS + BLOCKS), st.sampled_from(ARGUMENTS), VALUES, FORMS)
@few(60)
def test_odd_arguments_of_chains_and_blocks(function, name, value, form):
    block = function in BLOCKS
    known = ARGUMENTS[: -2 if function is revjax.rev_chain_inverse else None]
    if name not in known or (block and name in ("xs", "unroll", "backward", "range_check")):
        return
    f, g, params, x = dense, dense, PARAMS, STREAM
    if block:
        params = (WEIGHTS[0], WEIGHTS[0])
    options = {"f": f, "g": g, "params": params, "x": x} | {name: form(value)}
    given = [options.pop(key) for key in ("f", "g", "params", "x")]
    attempt(function, *given, **options)


def loop(params, x, inverse):
    """A chain of `half` or `dense`, a block after another."""
    x1, x2 = (np.asarray(a, np.float64) for a in x)
    blocks = list(zip(*map(np.asarray, params), strict=True))
    for w1, w2 in reversed(blocks) if inverse else blocks:
        if inverse:
            x2 = x2 - np.tanh(x1 @ w2)
            x1 = x1 - np.tanh(x2 @ w1)
        else:
            x1 = x1 + np.tanh(x2 @ w1)
            x2 = x2 + np.tanh(x1 @ w2)
    return x1, x2


SIZES = st.integers(0, 3)


@given(
    SIZES, SIZES, SIZES, st.booleans(), st.sampled_from([None, 14]), st.sampled_from([0, np.nan])
)
@few(10)
def test_chains_of_any_size(depth, batch, width, as_list, grid_bits, poison):
    """Without blocks, examples or features, or with a NaN: as the loop has it, and its inverse."""
    rng = np.random.default_rng(0)
    params = tuple(rng.normal(size=(2, depth, width, width)).astype(np.float32))
    x = tuple((poison + rng.normal(size=(2, batch, width))).astype(np.float32))
    given = list(zip(*params, strict=True)) if as_list else params
    for inverse, function in enumerate(CHAINS):
        got = function(dense, dense, given, x, grid_bits=grid_bits)
        for mine, due in zip(got, loop(params, x, inverse), strict=True):
            np.testing.assert_allclose(mine, due, atol=1e-3 * (1 + depth))


@pytest.mark.parametrize("backward", ["reversible", "remat", "store"])
@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("batch", [0, 2])
def test_gradients_of_nothing(backward, depth, batch):
    """A chain without blocks is the identity; a batch without examples has no gradient."""

    def loss(params, x):
        y1, y2 = revjax.rev_chain_apply(dense, dense, params, x, backward=backward)
        return y1.sum() + 2 * y2.sum()

    params = (jnp.ones((depth, 3, 3)),) * 2
    dparams, (dx1, dx2) = jax.grad(loss, (0, 1))(params, (jnp.ones((batch, 3)),) * 2)
    if not depth:
        np.testing.assert_array_equal(dx1, np.ones((batch, 3)))
        np.testing.assert_array_equal(dx2, np.full((batch, 3), 2.0))
    if not batch:
        assert not any(leaf.any() for leaf in dparams)


@given(VALUES, VALUES)
@few(60)
def test_odd_arguments_of_the_grid(value, bits):
    attempt(revjax.round_to_grid, ONE, bits)
    attempt(revjax.round_to_grid, (value, value), 14)
    attempt(revjax.stream_bound, bits)
    if not isinstance(value, jax.Array):  # which JAX takes for its dtype, and says so
        attempt(revjax.stream_bound, 14, value)


@given(st.integers(-(10**12), 10**12))
@few(40)
def test_a_grid_that_there_is(bits):
    bound = attempt(revjax.stream_bound, bits)
    assert (bound is None) == (not 0 <= bits <= 23)
    assert bound in (None, 2.0 ** (24 - bits) if abs(bits) < 99 else None)


PROBABILITIES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, -0.1, np.nan, 10**400, None, "a"]))


@given(PROBABILITIES, VALUES, st.sampled_from(["key", "probabilities", "batch_size", "dtype"]))
@few(40)
def test_odd_gates(probabilities, value, name):
    key = jax.random.key(0)
    gates = attempt(revjax.draw_gates, key, probabilities)
    fit = all(p in (0.0, 0.5, 1.0) for p in probabilities)
    assert (gates is not None) == fit
    if fit and gates is not None:
        assert gates.shape == (len(probabilities),)
        drawn = zip(gates, probabilities, strict=True)
        assert all(bool(gate) == bool(p) for gate, p in drawn if p != 0.5)
    options = {"key": key, "probabilities": [0.5], "batch_size": 2, "dtype": jnp.float32}
    if not (name == "dtype" and isinstance(value, jax.Array)):
        attempt(revjax.draw_gates, **options | {name: value})
    attempt(revjax.survival_probabilities, value, 0.5)
    attempt(revjax.survival_probabilities, 3, value)
    attempt(revjax.survival_probabilities, 3, 0.5, value)


MODEL = dict(name="revnet", num_classes=3, units=(1,), filters=(4, 4))
MODEL_KEYS = [*MODEL, "rngs", "in_channels", "backward", "grid_bits", "unroll", "bottleneck"]
MODEL_KEYS += ["depth", "placement", "shortcut", "conventions", "stochastic_depth", "image_size"]


@given(st.sampled_from(["revnet", "resnet"]), st.sampled_from(MODEL_KEYS), VALUES)
@few(50)
def test_odd_models(family, key, value):
    options = MODEL | {"name": family}

    def make():
        return attempt(revjax.create_model, **options | {"rngs": nnx.Rngs(0)} | {key: value})

    nnx.eval_shape(make)


@pytest.fixture(scope="module")
def model():
    return revjax.create_model(**MODEL, rngs=nnx.Rngs(0))  # pyright: ignore[reportArgumentType]


def test_odd_images(model):
    for value in ODD.values():
        assert attempt(model, value) is None
    for shape in ((2, 8, 8, 4), (8, 8, 3), (2, 8, 8)):
        with pytest.raises(ValueError, match=r"images are .*: give \[B, H, W, 3\]"):
            model(jnp.ones(shape))
    model.eval()
    assert model(jnp.ones((0, 8, 8, 3))).shape == (0, 3)


@pytest.mark.slow
@given(st.sampled_from(["f", "params", "x"]), VALUES, FORMS)
@few(12)
def test_odd_arguments_of_the_tools(name, value, form):
    options = {"f": dense, "g": dense, "params": PARAMS, "x": STREAM} | {name: form(value)}
    attempt(revjax.check_reversible, *options.values())
    few: Any = {"dtypes": ["float32"], "grid_bits": [14], "depths": [1]}
    attempt(revjax.drift, *options.values(), **few)


@pytest.mark.slow
@given(st.sampled_from(["dtypes", "grid_bits", "depths"]), VALUES, st.booleans())
@few(15)
def test_odd_options_of_drift(name, value, listed):
    if isinstance(value, jax.Array) and name == "dtypes":
        return
    options: Any = {"dtypes": ["float32"], "grid_bits": [14], "depths": [1]}
    attempt(
        revjax.drift, dense, dense, PARAMS, STREAM, **options | {name: [value] if listed else value}
    )


@given(VALUES)
@few(15)
def test_odd_arguments_of_a_memory_report(value):
    attempt(revjax.memory_report, value, ONE)
    if not isinstance(value, jax.Array):
        attempt(revjax.memory_report, jnp.sum, ONE, topology=value)


STAGE = ["f", "g", "depth", "rngs", "coupling", "grid_bits", "backward", "unroll"]


@pytest.mark.slow
@given(st.sampled_from(STAGE), st.sampled_from(["x", "key", "gates", ""]), VALUES, FORMS)
@few(6)
def test_odd_stages(made_with, called_with, value, form):
    options: Any = {"f": Dense, "g": Dense, "depth": 2, "rngs": nnx.Rngs(0)}
    if not called_with:
        stage = attempt(revjax.ReversibleStage, **options | {made_with: value})
        if stage is not None:
            attempt(stage, STREAM)
        return
    stage = revjax.ReversibleStage(**options)
    x, *rest = ({"x": STREAM} | {called_with: form(value)}).items()
    attempt(stage, x[1], **dict(rest))
    attempt(stage.inverse, x[1], **dict(rest))
