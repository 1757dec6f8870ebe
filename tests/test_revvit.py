"""The reversible Transformer against an unscanned transcription of its equations, and its claims.

The transcription, `oracle`, is plain `jax.numpy` on the network's arrays: block by block, attention
head by head, the patches by a convolution, derived by storing everything.
"""

# Calls with options chosen at run time, which no type checker can follow.
# pyright: reportArgumentType=false, reportCallIssue=false

import functools
import json
import re
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from networks import (
    COMPILE_FAST,
    cross_entropy,
    draw_arrays,
    relative_error,
    restrict,
    setting,
    with_arrays,
)
from scipy.stats import norm

import train
from revjax import (
    RevViT,
    StochasticDepth,
    StreamPeak,
    create_model,
    draw_gates,
    memory_report,
    round_to_grid,
    survival_probabilities,
)
from revjax.data import load_dataset
from revjax.memory.network import training_step
from revjax.models import ARCHITECTURES, Transformer
from revjax.training.config import OptimConfig
from revjax.training.optimizer import make_optimizer
from revjax.transformer import gelu, product

ROOT = Path(train.__file__).parent
DEPTH, WIDTH, HEADS, PATCH, SIDE, CLASSES, BATCH = 2, 8, 2, 2, 6, 5, 4
KEY = jax.random.key(7, impl="unsafe_rbg")  # compiles fastest
DROP_PATH = StochasticDepth(p_last=0.5, granularity="sample")


def make(dtype="float32", **options) -> Any:
    """The network without its arrays."""
    own = dict(depth=DEPTH, width=WIDTH, heads=HEADS, patch=PATCH, image_size=SIDE)
    options = own | dict(dtype=dtype) | options
    return nnx.eval_shape(lambda: create_model("revvit", CLASSES, rngs=nnx.Rngs(0), **options))


def batch(dtype="float32"):
    rng = np.random.default_rng(1)
    images = rng.standard_normal((BATCH, SIDE, SIDE, 3))
    return images.astype("float64" if dtype == "float64" else "float32"), np.arange(BATCH)


# The oracle -------------------------------------------------------------------------------------


def grid(x):
    return x + jax.lax.stop_gradient(jnp.round(x * 2**14) / 2**14 - x)


def layer_norm(v, x):
    x = x - x.mean(-1, keepdims=True)
    return v["scale"] * x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) + v["bias"]


def dense(v, x):
    return x @ v["kernel"] + v["bias"]


def attention(v, x):
    q, k, w = jnp.split(dense(v["qkv"], layer_norm(v["norm"], x)), 3, -1)
    d, heads = WIDTH // HEADS, []
    for own in (slice(i, i + d) for i in range(0, WIDTH, d)):
        scores = jnp.exp(q[..., own] @ k[..., own].swapaxes(1, 2) / np.sqrt(d))
        heads.append(scores / scores.sum(-1, keepdims=True) @ w[..., own])
    return dense(v["out"], jnp.concatenate(heads, -1))


def mlp(v, x):
    x = dense(v["inner"], layer_norm(v["norm"], x))
    return dense(v["outer"], x * jax.scipy.special.ndtr(x))


def oracle(v, images, gates):
    """Logits; gates has a factor for each image and each residual function, in turn."""
    kernel = v["stem"]["dense"]["kernel"].reshape(PATCH, PATCH, 3, WIDTH)
    layout = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(
        images, kernel, (PATCH, PATCH), "VALID", dimension_numbers=layout
    )
    x = x.reshape(BATCH, -1, WIDTH) + v["stem"]["dense"]["bias"] + v["stem"]["positions"]
    x1 = x2 = grid(x)
    for i in range(DEPTH):
        f, g = (jax.tree.map(lambda a, i=i: a[i], v["stages"][0][name]) for name in "fg")
        x1 = x1 + grid(gates[2 * i][:, None, None] * attention(f, x2))
        x2 = x2 + grid(gates[2 * i + 1][:, None, None] * mlp(g, x1))
    x = layer_norm(v["head"]["norm"], jnp.concatenate([x1, x2], -1)).mean(1)
    return dense(v["head"]["dense"], x)


# Faithfulness -----------------------------------------------------------------------------------


def train_once(dtype, backward):
    """The logits, the gradient and the variables of one step, from the same arrays."""
    with setting(dtype):
        network = make(dtype, backward=backward, stochastic_depth=DROP_PATH)

        def step(arrays, images, labels):
            graphdef, params, rest = nnx.split(with_arrays(network, arrays), nnx.Param, ...)

            def loss(params):
                model = nnx.merge(graphdef, params, rest, copy=True)
                logits = model(images, key=KEY)
                variables = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))
                return cross_entropy(logits, labels), (logits, variables)

            gradient, (logits, variables) = jax.grad(loss, has_aux=True)(params)
            return logits, nnx.to_pure_dict(gradient), variables

        return jax.device_get(jax.jit(step)(draw_arrays(network), *batch(dtype)))


def test_training_is_that_of_the_equations():
    """Logits and gradients, with a gate for each image, divided by its probability."""
    logits, gradient, _ = train_once("float64", "reversible")
    with setting("float64"), jax.numpy_rank_promotion("allow"):
        network = make("float64", stochastic_depth=DROP_PATH)
        gates = np.zeros((2 * DEPTH, BATCH))
        for start, drawn in enumerate(network.gates(BATCH, KEY)):
            gates[start::2] = np.reshape(drawn, (DEPTH, BATCH))
        assert 0 < np.count_nonzero(gates) < gates.size

        def loss(arrays, images, labels):
            logits = oracle(arrays, images, gates)
            return cross_entropy(logits, labels), logits

        step = jax.jit(jax.grad(loss, has_aux=True), compiler_options=COMPILE_FAST)
        arrays = draw_arrays(network)
        due = step(restrict(arrays, gradient), *batch("float64"))
    assert relative_error((gradient, logits), due) <= 1e-12


def test_gates_are_in_the_order_of_the_functions():
    """Survival falls over F and G in turn; in evaluation residuals are multiplied by it."""
    network = make(stochastic_depth=StochasticDepth(p_last=0.2))
    p = survival_probabilities(2 * DEPTH, 0.2)
    for start, found in enumerate(network.gates(BATCH, KEY)):
        np.testing.assert_array_equal(found, draw_gates(KEY, p)[start::2])
    network.eval()
    for start, found in enumerate(network.gates(BATCH)):
        np.testing.assert_array_equal(found, p[start::2].astype(np.float32))
    assert make().gates(BATCH) == (None, None)


def test_gelu():
    with jax.enable_x64(True):
        x = np.linspace(-6, 6, 101)
        np.testing.assert_allclose(gelu(jnp.asarray(x)), x * norm.cdf(x), rtol=0, atol=1e-15)


# Exactness --------------------------------------------------------------------------------------


@pytest.mark.optimised
def test_gradients_in_bfloat16_are_those_of_stored_activations():
    got, due = (train_once("bfloat16", backward) for backward in ("reversible", "store"))
    chex.assert_trees_all_equal((got[0], got[2]), (due[0], due[2]))
    assert relative_error(got[1], due[1]) <= 1e-6
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype("float32")}


@pytest.mark.parametrize("equation", ["bni,io->bno", "bqhd,bkhd->bhqk"])
def test_products_round_whatever_the_compiler_keeps(equation):
    """Else two evaluations of a function differ, and with them the reconstruction."""
    shapes = {"bni": (2, 9, 32), "io": (32, 16), "bqhd": (2, 9, 2, 8), "bkhd": (2, 9, 2, 8)}
    a, b = (shapes[part] for part in equation.split("->")[0].split(","))
    rng = np.random.default_rng(0)
    a, b = (jnp.float32(rng.standard_normal(shape)) for shape in (a, b))

    def narrow(a, b):
        return product(equation, a, b, jnp.dtype("bfloat16"))

    # This compiler keeps nothing here; others may, as this one does of convolutions.
    assert str(jax.make_jaxpr(narrow)(a, b)).count("reduce_precision") == 3
    gradient = jax.jit(jax.grad(lambda a, b: jnp.sum(jnp.sin(narrow(a, b))), argnums=(0, 1)))
    y = jax.jit(narrow)(a, b)
    assert 1e-4 < relative_error(y, jnp.einsum(equation, a, b)) < 1e-2
    for found in (y, *gradient(a, b)):
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, found.astype(jnp.bfloat16).astype(jnp.float32))


def test_a_gelu_has_the_same_bits_beside_its_derivative():
    """As in a reconstruction; compiled as fast as these tests are, `jax.nn.gelu` has not."""
    x = jnp.float32(2 * np.random.default_rng(0).standard_normal((16, 512)))

    def beside(x):
        y, pullback = jax.vjp(gelu, x)
        return y, pullback(jnp.sin(y))

    alone = jax.jit(gelu, compiler_options=COMPILE_FAST)(x)
    np.testing.assert_array_equal(alone, jax.jit(beside, compiler_options=COMPILE_FAST)(x)[0])


@pytest.mark.optimised
def test_inverse_restores_the_tokens():
    """Bit for bit, in bfloat16, with a gate for each image."""
    network = make("bfloat16", depth=8, stochastic_depth=DROP_PATH)
    x = np.random.default_rng(2).standard_normal((2, BATCH, 9, WIDTH)).astype(np.float32)

    @jax.jit
    def there_and_back(arrays, x):
        model = with_arrays(network, arrays)
        gates = model.gates(BATCH, KEY)
        y = model.stages[0]((x[0], x[1]), gates=gates)
        return y, model.stages[0].inverse(y, gates=gates)

    y, back = there_and_back(draw_arrays(network), x)
    chex.assert_trees_all_equal(back, round_to_grid((x[0], x[1]), 14))
    assert relative_error(y, back) > 0.1


# Memory, learning, refusals ---------------------------------------------------------------------


def temporary(depth):
    """Temporary bytes of a training step, beyond the gradient of the parameters."""
    network = make(depth=depth, width=32, image_size=16)
    step, operands = training_step(network, 16, 16)
    report = memory_report(step, *operands, compiler_options=COMPILE_FAST)
    params = jax.tree.leaves(nnx.state(network, nnx.Param))
    return report.temporary_bytes - sum(4 * leaf.size for leaf in params)


def test_a_deeper_network_needs_parameters_alone():
    shallow, deep = (temporary(depth) for depth in (4, 16))
    assert deep <= 1.01 * shallow


@functools.cache
def small():
    own = dict(depth=2, width=16, heads=2, patch=2, image_size=8, in_channels=1)
    return create_model("revvit", 10, rngs=nnx.Rngs(KEY), **own)


@jax.numpy_dtype_promotion("standard")  # optax's Adam is not strict
@pytest.mark.slow
def test_it_learns():
    """Sixty steps of AdamW on as many scans as fit a batch, with a narrow network."""
    digits = load_dataset("digits")
    images = jnp.float32(digits.train_images[:100] / 8 - 1)
    labels = jnp.asarray(digits.train_labels[:100])
    graphdef, params, rest = nnx.split(small(), nnx.Param, ...)
    optimizer = make_optimizer(OptimConfig(1e-2, (), 0.1, 0.9, 0.05, name="adamw"))

    @functools.partial(jax.jit, compiler_options=COMPILE_FAST)
    def train_all(params):
        def loss(params):
            logits = nnx.merge(graphdef, params, rest, copy=True)(images)
            return cross_entropy(logits, labels), (logits.argmax(-1) == labels).mean()

        def step(_, carry):
            params, state = carry
            updates, state = optimizer.update(
                jax.grad(loss, has_aux=True)(params)[0], state, params
            )
            return optax.apply_updates(params, updates), state

        params, _ = jax.lax.fori_loop(0, 60, step, (params, optimizer.init(params)))
        return loss(params)[1]

    assert train_all(params) > 0.9


@pytest.mark.slow
def test_the_digits_config_learns(tmp_path):
    """As a user runs it."""
    config = f"--config={ROOT}/configs/digits_revvit.py"
    assert train.run(["train.py", config, f"--workdir={tmp_path}"]) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["test_accuracy"] >= 0.95


@pytest.mark.parametrize("name", ["revvit_small", "revvit_base", "revvit_large"])
def test_parameters_are_those_published(name):
    """Mangalam et al. 2022, table 1, in millions; each count by the layers' arithmetic."""
    network = nnx.eval_shape(lambda: create_model(name, 1000, rngs=nnx.Rngs(0)))
    assert isinstance(network, RevViT)
    how = ARCHITECTURES[name]
    assert isinstance(how, Transformer)
    c, tokens = how.width, (224 // 16) ** 2
    embedding = 16 * 16 * 3 * c + c + tokens * c
    attention, mlp, norms = 4 * (c * c + c), 2 * 4 * c * c + 4 * c + c, 2 * 2 * c
    head = 2 * 2 * c + 2 * c * 1000 + 1000
    found = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))
    assert found == embedding + how.depth * (attention + mlp + norms) + head
    published = {"revvit_small": 22, "revvit_base": 87, "revvit_large": 305}
    assert round(found / 1e6) == published[name]


def test_initialisation():
    """Each kernel drawn for itself, by Xavier's rule."""
    firsts, state = [], nnx.to_pure_dict(nnx.state(small(), nnx.Param))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = path[-1].key
        if name == "positions":
            np.testing.assert_allclose(np.std(leaf), 0.02, rtol=0.2)
        elif name == "kernel":
            bound = np.sqrt(6 / sum(leaf.shape[-2:]))
            assert 0.9 * bound < np.abs(leaf).max() <= bound
            firsts.extend(np.asarray(leaf).reshape(-1, *leaf.shape[-2:])[:, 0, 0])
        else:
            np.testing.assert_array_equal(leaf, np.full_like(leaf, {"scale": 1, "bias": 0}[name]))
    assert len(set(firsts)) == len(firsts) == 2 + 2 * 4


@pytest.mark.parametrize(
    "name, options, error, sentence",
    [
        (
            "revvit",
            dict(heads=3),
            ValueError,
            "width=8 and heads=3: give a width that can be split",
        ),
        (
            "revvit",
            dict(patch=4),
            ValueError,
            "image_size=6 and patch=4: give a patch that divides",
        ),
        ("revvit", dict(depth=0), ValueError, "depth=0: give a positive integer"),
        ("revvit", dict(width=8.0), ValueError, "width=8.0: give a positive integer"),
        ("revvit", dict(heads=True), ValueError, "heads=True: give a positive integer"),
        (
            "revvit",
            dict(image_size=None),
            ValueError,
            '"revvit" needs depth, .* and image_size, su',
        ),
        ("revvit", dict(units=(2,)), ValueError, r"units=\(2,\): revvit is a RevViT, which has no"),
        ("revvit", dict(placement="original"), ValueError, "is a RevViT, which has no placement"),
        ("revvit", dict(backward="stroe"), ValueError, "backward='stroe': give one of reversible"),
        ("revvit", dict(grid_bits=24), ValueError, "grid_bits=24: give an integer from 0 to 23"),
        ("revvit", dict(unroll=0), ValueError, "unroll=0: give a positive integer"),
        ("revvit", dict(stochastic_depth=0.5), TypeError, "stochastic_depth=0.5: give None or"),
        ("revvit_tiny", {}, ValueError, "no model 'revvit_tiny': name one of .*revvit_small"),
        ("revvit_base", {}, ValueError, 'revvit_base has its own depth, .*or name .* "revvit"'),
        ("revnet38", {}, ValueError, "depth=2: revnet38 is a RevNet, which has no depth; leave it"),
    ],
)
def test_what_create_model_refuses(name, options, error, sentence):
    own = dict(depth=DEPTH, width=WIDTH, heads=HEADS, patch=PATCH, image_size=SIDE)
    with pytest.raises(error, match=sentence):
        create_model(name, CLASSES, rngs=nnx.Rngs(0), **own | options)


@pytest.mark.parametrize("shape", [(6, 6, 3), (2, 6, 8, 3), (2, 8, 8, 3), (2, 6, 6, 1)])
def test_images_of_another_shape(shape):
    with pytest.raises(ValueError, match=re.escape(f"images of shape {shape}: give [B, 6, 6, 3]")):
        nnx.eval_shape(lambda: create_own()(jnp.zeros(shape)))


def create_own():
    return RevViT(1, 8, 2, 5, patch=PATCH, image_size=SIDE, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("bits, peaks", [(14, 1), (None, 0)])
def test_the_grid_is_handed_on(bits, peaks):
    own: Any = dict(depth=1, width=8, heads=2, patch=4, image_size=8, grid_bits=bits)
    network = nnx.eval_shape(lambda: RevViT(num_classes=3, rngs=nnx.Rngs(0), **own))
    assert len(jax.tree.leaves(nnx.state(network, StreamPeak))) == peaks


def test_a_key_is_asked_for():
    with pytest.raises(ValueError, match="draws its gates from a key"):
        images = jnp.zeros((2, SIDE, SIDE, 3))
        nnx.eval_shape(lambda model: model(images), make(stochastic_depth=DROP_PATH))
