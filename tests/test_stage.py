"""Stages of any modules: gradients, statistics, random streams, keys, inputs and inverses."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from networks import COMPILE_FAST, relative_error

import revjax
from revjax import ReversibleStage

WIDTH, DEPTH = 4, 3


def key(seed):
    """A key of the generator that compiles fastest."""
    return jax.random.key(seed, impl="unsafe_rbg")


def rngs():
    return nnx.Rngs(key(0))


@pytest.fixture(scope="module")
def drawn():
    """A stage whose functions draw from streams of their own; tests take copies of it."""
    return ReversibleStage(Residual, Residual, DEPTH, rngs=rngs())


class Residual(nnx.Module):
    """Statistics, a random stream, a key and a condition: all that a residual function may need."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.own = nnx.Dropout(0.2, rngs=rngs)
        self.given = nnx.Dropout(0.2)

    def __call__(self, x, condition=None, key=None):
        x = self.own(jnp.tanh(self.linear(self.norm(x))))
        if key is not None:
            x = self.given(x, rngs=key)
        return x if condition is None else x * condition


class Plain(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.linear(x))


def stream(seed=0):
    x = np.random.default_rng(seed).standard_normal((2, 8, WIDTH))
    return revjax.round_to_grid(tuple(jnp.asarray(x, jnp.float32)), 14)


def step_of(stage, backward, gates, store_last=0):
    """The loss, the gradient of parameters, x and the condition, and the state after one call."""
    stage = nnx.clone(stage)
    stage.backward, stage.store_last = backward, store_last
    graphdef, params, state = nnx.split(stage, nnx.Param, ...)
    condition = jnp.float32(np.random.default_rng(1).uniform(0.5, 1, (1, WIDTH)))

    def loss(params, x, condition):
        stage = nnx.merge(graphdef, params, state, copy=True)
        y1, y2 = stage(x, condition, key=key(5), gates=gates)
        return jnp.sum(y1 * y1 + jnp.sin(y2)), nnx.state(stage, nnx.Not(nnx.Param))

    step = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), compiler_options=COMPILE_FAST
    )
    (value, state), gradient = step(params, stream(), condition)
    return value, gradient, jax.tree.map(_numbers, nnx.to_pure_dict(state))


@pytest.mark.parametrize(("depth", "gated"), [(DEPTH, False), (None, True)])
def test_gradients_and_state_are_those_of_stored_backprop(drawn, depth, gated):
    stage = drawn if depth else ReversibleStage(Residual, Residual, rngs=rngs())
    count = stage.f.own.rngs.count[...]
    gate = jnp.asarray(np.resize([False, True, True], count.shape))
    gates = (gate, ~gate) if gated else (None, None)
    value, gradient, state = step_of(stage, "store", gates)
    assert np.isfinite(value)
    ways = [("reversible", 0), ("reversible", 1), *[("remat", 0)] * gated]
    for backward, store_last in ways:
        got = step_of(stage, backward, gates, store_last)
        assert got[0] == value
        assert relative_error(got[1], gradient) < 1e-6
        chex.assert_trees_all_equal(got[2], state)
    # Everything moved once, and where a function did not run nothing did.
    moved = state["f"]["own"]["rngs"]["count"] - count
    np.testing.assert_array_equal(moved, gate if gated else np.ones(depth))


def _numbers(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def test_blocks_draw_parameters_and_random_numbers_each_for_itself(drawn):
    for leaf in (drawn.f.linear.kernel[...], drawn.g.linear.kernel[...]):
        assert leaf.shape == (DEPTH, WIDTH, WIDTH)
        assert len({row.tobytes() for row in np.asarray(leaf)}) == DEPTH
    assert not np.array_equal(drawn.f.linear.kernel[...], drawn.g.linear.kernel[...])
    keys = np.asarray(jax.random.key_data(drawn.f.own.rngs.key[...]))
    assert len({row.tobytes() for row in keys}) == DEPTH


def test_each_stream_of_rngs_is_split():
    class Noise(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(rngs.params.uniform((3,)))
            self.noise = rngs.noise.fork()

    one, two = (
        ReversibleStage(Noise, Noise, 2, rngs=nnx.Rngs(key(0), noise=key(seed))) for seed in (1, 2)
    )
    np.testing.assert_array_equal(one.f.w[...], two.f.w[...])
    data = [np.asarray(jax.random.key_data(stage.f.noise.key[...])) for stage in (one, two)]
    assert len({row.tobytes() for rows in data for row in rows}) == 4


def test_keys_and_streams_change_the_numbers_and_only_they(drawn):
    stage, other = nnx.clone(drawn), nnx.clone(drawn)

    @nnx.jit
    def call(stage, key):
        return stage(stream(), key=key)

    first = call(stage, key(5))
    chex.assert_trees_all_equal(call(other, key(5)), first)
    assert not np.array_equal(call(other, key(5))[0], first[0])  # its own streams have moved on
    again = nnx.clone(drawn)
    assert not np.array_equal(call(again, key(6))[0], first[0])
    stage.eval()
    chex.assert_trees_all_equal(call(stage, key(5)), call(stage, key(6)))


class Keyed(Residual):
    """Without a random stream of its own."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.own = nnx.Dropout(0)


@pytest.mark.optimised
@pytest.mark.parametrize("depth", [DEPTH, None])
def test_inverse_gives_back_the_very_bits(depth):
    stage = ReversibleStage(Keyed, Keyed, depth, rngs=rngs())
    condition = jnp.full((1, WIDTH), 0.5)

    @nnx.jit
    def there_and_back(stage):
        y = stage(stream(), condition, key=key(5))
        before = jax.tree.leaves(nnx.state(stage))
        back = stage.inverse(y, condition, key=key(5))
        moved = [a is not b for a, b in zip(before, jax.tree.leaves(nnx.state(stage)), strict=True)]
        assert not any(moved)
        return y, back

    y, back = there_and_back(stage)
    assert not np.array_equal(y[0], stream()[0])
    chex.assert_trees_all_equal(back, stream())


def test_inverse_with_a_stream_that_moved_on_is_refused(drawn):
    stage = nnx.clone(drawn)
    with pytest.raises(ValueError, match=r"random stream of its own .* Give the stage key"):
        jax.eval_shape(stage.inverse, stream())
    stage.eval()  # which draws nothing

    @nnx.jit
    def there_and_back(stage):
        return stage.inverse(stage(stream()))

    chex.assert_trees_all_equal(there_and_back(stage), stream())


def test_modules_may_be_given_instead_of_what_makes_them():
    f, g = Plain(rngs()), Plain(nnx.Rngs(key(1)))
    x1, x2 = stream()
    stage = ReversibleStage(f, g)
    assert stage.f is f
    y1 = x1 + f(x2)
    chex.assert_trees_all_close(stage((x1, x2)), (y1, x2 + g(y1)), atol=2**-12)
    # Stacked ones, here of two that are equal.
    graphdef, state = nnx.split(f)
    twice = nnx.merge(graphdef, jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state))
    stage = ReversibleStage(twice, nnx.clone(twice), depth=2)
    y1, y2 = x1, x2
    for _ in range(2):
        y1 = y1 + f(y2)
        y2 = y2 + f(y1)
    chex.assert_trees_all_close(stage((x1, x2)), (y1, y2), atol=2**-11)


class ScaleAndShift(Plain):
    def __call__(self, x):
        return super().__call__(x), jnp.zeros_like(x)


def test_a_coupling_without_a_grid():
    stage = ReversibleStage(ScaleAndShift, ScaleAndShift, 2, rngs=rngs(), coupling=revjax.affine)
    assert stage.peak is None
    y = stage(stream())
    assert not np.allclose(y[0], stream()[0])
    chex.assert_trees_all_close(stage.inverse(y), stream(), atol=1e-5)


def test_a_stage_trains_within_a_model():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.stage = ReversibleStage(Keyed, Keyed, DEPTH, rngs=rngs)
            self.last = nnx.Linear(2 * WIDTH, 1, rngs=rngs)

        def __call__(self, x, key):
            return self.last(jnp.concatenate(self.stage((x, x), key=key), -1))

    model = Model(rngs())
    optimizer = nnx.Optimizer(model, optax.sgd(0.05), wrt=nnx.Param)
    x = stream()[0]
    target = jnp.sum(x, -1, keepdims=True)

    @nnx.jit
    def train_step(model, optimizer, key):
        def loss(model):
            return jnp.mean((model(x, key) - target) ** 2)

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    losses = [train_step(model, optimizer, step_key) for step_key in jax.random.split(key(5), 60)]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    peak: Any = model.stage.peak
    assert peak[...] > 0


WRONG = [
    (TypeError, r"f=3: give a module, or a function", (3, Plain, 2), {}),
    (TypeError, r"rngs=None: f makes modules", (Plain, Plain, 2), {"rngs": None}),
    (TypeError, r"coupling='affine'", (Plain, Plain, 2), {"coupling": "affine"}),
    (ValueError, r"depth=0: give a positive integer", (Plain, Plain, 0), {}),
    (ValueError, r"backward='stored': give one of", (Plain, Plain), {"backward": "stored"}),
    (ValueError, r"unroll='all': give a positive", (Plain, Plain), {"unroll": "all"}),
    (ValueError, r"store_last=3: give a number from 0 to 2", (Plain, Plain, 2), {"store_last": 3}),
    (ValueError, r"f is a single module, and depth=2", (Plain(nnx.Rngs(0)), Plain, 2), {}),
]


@pytest.mark.parametrize(("error", "message", "args", "options"), WRONG)
def test_wrong_arguments_are_refused_in_a_sentence(error, message, args, options):
    with pytest.raises(error, match=message):
        ReversibleStage(*args, **({"rngs": rngs()} | options))


class Shared(nnx.Module):
    def __init__(self, rngs):
        self.rngs = rngs

    def __call__(self, x):
        return jax.random.normal(self.rngs.dropout(), x.shape)


class Sowing(Plain):
    def __call__(self, x):
        y = super().__call__(x)
        self.sow(nnx.Intermediate, "inner", y)
        return y


def test_functions_that_share_a_stream_are_refused():
    with pytest.raises(
        ValueError, match=r"f and g share rngs\.default\.count, rngs\.default\.key,"
    ):
        ReversibleStage(Shared, Shared, rngs=rngs())

    def forked(rngs):
        return Shared(rngs.fork())

    zeros = jnp.zeros((2, WIDTH))
    y1, y2 = ReversibleStage(forked, forked, rngs=rngs())((zeros, zeros))
    assert not jnp.array_equal(y1, y2)


def test_functions_get_keys_of_their_own():
    """Of one block, too."""
    stage = ReversibleStage(Noisy, Noisy, 2, rngs=rngs())
    zeros = jnp.zeros((2, WIDTH)), jnp.zeros((2, WIDTH))
    y1, y2 = stage(zeros, key=key(0), gates=(jnp.array([True, False]), jnp.array([True, False])))
    assert not jnp.array_equal(y1, y2)


class Noisy(Plain):
    def __call__(self, x, key):
        return jax.random.normal(key, x.shape)


def test_a_transform_may_close_over_what_holds_nothing_that_moves():
    stage = ReversibleStage(Plain, Plain, 2, rngs=rngs())
    x = stream()
    y = stage(x)
    seen = stage.peak[...]  # pyright: ignore[reportOptionalSubscript]
    got = jax.grad(lambda x: jnp.sum(stage(x)[0]))(tuple(2 * half for half in x))
    assert jax.tree.all(jax.tree.map(lambda a: jnp.isfinite(a).all(), got))
    chex.assert_trees_all_close(jax.jit(lambda x: stage(x))(x), y, atol=1e-4)
    assert stage.peak[...] == seen  # pyright: ignore[reportOptionalSubscript]


def test_what_is_sown_is_captured_with_gates():
    stage = ReversibleStage(Sowing, Sowing, 2, rngs=rngs())
    gates = jnp.array([True, False]), None
    _, found = nnx.capture(stage, nnx.Intermediate)(stream(), gates=gates)
    (of_f,), (of_g,) = (nnx.to_pure_dict(found)[name]["inner"] for name in "fg")
    assert of_f.shape == of_g.shape == (2, 8, WIDTH)
    assert (of_f != 0).any((1, 2)).tolist() == [True, False]
    assert (of_g != 0).any((1, 2)).all()


def test_factors_of_residuals_have_no_gradient():
    stage = ReversibleStage(Plain, Plain, 2, rngs=rngs())

    def loss(factors):
        return jnp.sum(stage(stream(), gates=(factors, None))[0])

    chex.assert_trees_all_equal(jax.grad(loss)(jnp.array([0.5, 2.0])), jnp.zeros(2))


@pytest.mark.parametrize("bits", [4, None])
def test_the_inverse_is_on_the_grid_of_the_stage(bits):
    stage = ReversibleStage(Plain, Plain, 2, rngs=rngs(), grid_bits=bits)
    x = stream() if bits is None else revjax.round_to_grid(stream(), bits)
    back = stage.inverse(stage(x))
    if bits is None:
        chex.assert_trees_all_close(back, x, atol=1e-5)
    else:
        chex.assert_trees_all_equal(back, x)


def test_flax_can_tabulate_a_stage():
    table = nnx.tabulate(ReversibleStage(Plain, Plain, 2, rngs=rngs()), stream())
    assert "ReversibleStage" in table


def test_one_module_for_both_has_no_state(drawn):
    keyed = Keyed(rngs())
    with pytest.raises(ValueError, match="f and g share "):
        ReversibleStage(keyed, keyed)
    plain = Plain(rngs())
    assert ReversibleStage(plain, plain).f is plain


def test_gates_of_integers_are_refused(drawn):
    with pytest.raises(TypeError, match=r"a gate of int32\[3\]: give an array"):
        drawn(stream(), gates=(jnp.array([1, 0, 1]), None))
