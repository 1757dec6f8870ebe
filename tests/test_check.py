"""The report on functions of one's own says what is wrong with them, and what errors grow to."""

import itertools
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import revjax
from revjax import check, check_reversible, drift
from revjax.error_growth import DriftRow

DEPTH, WIDTH = 3, 4


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


PARAMS: Any = tuple(0.3 * normal(seed, DEPTH, WIDTH, WIDTH) for seed in (0, 1))
X: Any = tuple(normal(2, 2, 5, WIDTH))


def dense(w, x):
    return jnp.tanh(x @ w)


def test_a_sound_chain_is_ok():
    report = check_reversible(dense, dense, PARAMS, X)
    assert report.ok
    assert (report.depth, report.num_parameters, report.grid_bits) == (3, 96, 14)
    assert (report.inverse_wrong, report.inverse_error) == (0, 0.0)
    assert report.gradient_error_params < 1e-6
    assert report.gradient_error_x < 1e-6
    peaks = [jnp.abs(jnp.stack(X)).max()]
    x1, x2 = X
    for w_f, w_g in zip(*PARAMS, strict=True):
        x1 = x1 + dense(w_f, x2)
        x2 = x2 + dense(w_g, x1)
        peaks += [jnp.abs(x1).max(), jnp.abs(x2).max()]
    np.testing.assert_allclose(report.stream_peak, max(peaks), rtol=1e-3)
    assert str(report).count(" ok: ") == 6


def test_all_inputs_of_a_chain_are_handed_on():
    def shifted(w, x, scale, shift):
        return scale * dense(w, x) + shift, jnp.sum(x)

    blocks: Any = [tuple(w[i] for w in PARAMS) for i in range(2)]
    shifts = [normal(3, 1, 1), normal(4, 1, 1)]
    gates: Any = [(True, None), (None, jnp.bool_(False))]
    report = check_reversible(
        shifted, shifted, blocks, X, normal(5, 1, 1), xs=shifts, gates=gates, has_aux=True
    )
    assert report.ok
    assert (report.depth, report.num_parameters) == (2, 64)


def test_functions_that_do_not_repeat_are_named():
    calls = itertools.count()

    def another_each_time(w, x):
        return dense(w, x) + 0.1 * next(calls)

    report = check_reversible(dense, another_each_time, PARAMS, X)
    assert report.repeats == (True, False)
    assert not report.ok
    assert "g did not repeat" in str(report)
    assert report.inverse_wrong > 0  # since it was traced anew
    assert not check_reversible(another_each_time, dense, PARAMS, X).repeats[0]


def test_beyond_the_range_a_grid_is_proposed():
    def large(scale, w, x):
        return scale * dense(w, x)

    report = check_reversible(partial(large, 1000), dense, PARAMS, X)
    assert report.stream_peak > report.stream_bound == 1024
    assert not report.ok
    bits = int(re.findall(r"take grid_bits=(\d+)", str(report))[0])
    assert 2 ** (23 - bits) < report.stream_peak <= 2 ** (24 - bits)
    assert check_reversible(partial(large, 1000), dense, PARAMS, X, grid_bits=bits).ok
    assert "; beyond, sums are rounded: tame the stream" in str(
        check_reversible(partial(large, 1e9), dense, PARAMS, X)
    )


def test_numbers_that_are_none_are_found():
    report = check_reversible(dense, lambda w, x: jnp.log(-1 - x * x) @ w, PARAMS, X)
    assert not report.finite
    assert not report.ok
    assert str(report).count("NOT OK") == 1  # the rest follows from it


def test_infinities_are_found():
    report = check_reversible(dense, dense, PARAMS, (X[0], jnp.full_like(X[1], jnp.inf)))
    assert not report.finite
    assert not report.ok
    assert np.isnan(report.inverse_error)


@pytest.mark.parametrize("coupling", [revjax.additive, revjax.affine])
def test_without_a_grid_errors_are_reported_and_no_fault(coupling):
    def h(w, x):
        return dense(w, x) if coupling is revjax.additive else (dense(w, x), dense(w, x))

    report = check_reversible(h, h, PARAMS, X, coupling=coupling, grid_bits=None)
    assert report.grid_bits is None
    assert report.inverse_wrong > 0
    assert 0 < report.inverse_error < 1e-4
    assert 0 < report.gradient_error_params < 1e-4
    assert report.ok


def test_a_wrong_gradient_is_found(monkeypatch):
    """As it would be if the rule itself were wrong."""
    right, faulty = check.rev_chain_apply, {"store"}

    def wrong(f, g, params, x, *args, backward, **options):
        y = right(f, g, params, x, *args, backward=backward, **options)
        scale = 1.001 if backward in faulty else 1
        return jax.tree.map(lambda a: a * scale + jax.lax.stop_gradient(a - a * scale), y)

    monkeypatch.setattr(check, "rev_chain_apply", wrong)
    report = check_reversible(dense, dense, PARAMS, X)
    np.testing.assert_allclose(report.gradient_error_params, 1e-3, rtol=0.02)
    np.testing.assert_allclose(report.gradient_error_x, 1e-3, rtol=0.02)
    assert report.rounding_alone  # as "remat" has the same
    assert report.ok
    faulty.add("remat")
    report = check_reversible(dense, dense, PARAMS, X)
    assert not report.rounding_alone
    assert str(report).count("NOT OK") == 2


def test_blocks_that_store_are_checked_as_such(monkeypatch):
    seen = set()

    def spy(*args, **options):
        seen.add((options["backward"], options.get("store_last", 0)))
        return revjax.rev_chain_apply(*args, **options)

    monkeypatch.setattr(check, "rev_chain_apply", spy)
    assert check_reversible(dense, dense, PARAMS, X, store_last=2).ok
    assert seen == {("reversible", 2), ("store", 0)}


def test_what_rounds_otherwise_where_it_is_differentiated_is_told():
    """A quotient by a square root, which compilers make a product where nothing else needs it."""
    rng = np.random.default_rng(0)
    w: Any = tuple(jnp.asarray(0.3 * rng.standard_normal((64, 16, 16)), jnp.float32) for _ in "fg")
    x: Any = tuple(jnp.asarray(rng.standard_normal((2, 20, 16)), jnp.float32))

    def normalised(invert, w, x):
        variance = x.var(-1, keepdims=True) + 1e-6
        return jax.nn.silu(invert(x - x.mean(-1, keepdims=True), variance) @ w)

    by_root = partial(normalised, lambda x, v: x / jnp.sqrt(v))
    report = check_reversible(by_root, by_root, w, x)
    assert report.repeats == (True, True)
    assert report.repeats_differentiated == (False, False)
    assert not report.ok
    assert "f and g gave other bits where differentiated: write x * jax.lax.rsqrt(v)" in str(report)
    by_rsqrt = partial(normalised, lambda x, v: x * jax.lax.rsqrt(v))
    report = check_reversible(by_rsqrt, by_rsqrt, w, x)
    assert report.ok
    assert report.repeats_differentiated == (True, True)


def test_values_are_looked_at_and_not_traced():
    for function in (check_reversible, drift):
        with pytest.raises(TypeError, match=f"{function.__name__} looks at values, .*outside"):
            jax.jit(lambda x, function=function: function(dense, dense, PARAMS, x))(X)


def test_what_the_chain_refuses_is_refused():
    with pytest.raises(ValueError, match="store_last=4: give a number from 0 to 3"):
        check_reversible(dense, dense, PARAMS, X, store_last=4)
    with pytest.raises(TypeError, match="a residual has the structure"):
        check_reversible(dense, lambda w, x: x[:, :1], PARAMS, X)
    for nothing in ([], jax.tree.map(lambda w: w[:0], PARAMS)):
        with pytest.raises(ValueError, match="no blocks"):
            check_reversible(dense, dense, nothing, X)


def test_drift_has_a_row_for_every_dtype_grid_and_depth():
    found = drift(dense, dense, PARAMS, X, dtypes=["float32"], depths=(1, 3))
    forms = [row[:3] for row in found.rows]
    assert forms == list(itertools.product(("float32",), (None, 14), (1, 3)))
    for row in found.rows:
        assert (row.inverse_error == 0) == (row.grid_bits is not None)
        assert row.gradient_error < 1e-6
    # It is a prefix of the chain that was measured.
    due = check_reversible(
        dense, dense, jax.tree.map(lambda w: w[:1], PARAMS), X, grid_bits=None
    ).inverse_error
    assert found.rows[0].inverse_error == due
    assert "float32, grid 2^-14" in str(found)


def test_drift_computes_in_the_dtype():
    seen = set()

    def spy(w, x, shift):
        seen.update({w.dtype, x.dtype, shift.dtype})
        return dense(w, x) + shift

    how: Any = dict(dtypes=[jnp.bfloat16], grid_bits=[14], depths=[1])
    found = drift(spy, spy, PARAMS, X, normal(3, 1, 1), **how)
    assert found.rows[0][:3] == ("bfloat16", 14, 1)
    assert seen == {jnp.dtype(jnp.bfloat16)}


def test_drift_draws_zeros_and_others(tmp_path):
    rows = [
        DriftRow("float32", bits, depth, depth * error, error)
        for bits, error in ((None, 1e-6), (14, 0.0))
        for depth in (1, 10)
    ]
    figure = revjax.Drift(tuple(rows)).plot(tmp_path / "drift.png")
    assert (tmp_path / "drift.png").stat().st_size > 5_000
    lines = figure.axes[0].get_lines()
    np.testing.assert_allclose([line.get_ydata() for line in lines], [[1e-6, 1e-5], [0, 0]])
    assert figure.axes[0].get_ylim()[0] == 0


def test_drift_refuses_in_a_sentence():
    with pytest.raises(ValueError, match=r"depths=\(4,\): the chain has 3 blocks"):
        drift(dense, dense, PARAMS, X, depths=[4])
    as_list: Any = [PARAMS]
    with pytest.raises(TypeError, match="params is a list"):
        drift(dense, dense, as_list, X)


def test_leaves_of_any_kind_and_rank():
    """Scalars, integers and keys in the stream, as a chain takes them."""

    def h(w, half):
        return half | {"a": jnp.tanh(w * half["a"])}

    half = {"a": jnp.float32(0.3), "key": jax.random.key(0), "n": jnp.int32(3)}
    weights: Any = (normal(3, DEPTH), normal(4, DEPTH))
    report = check_reversible(h, h, weights, (half, half))
    assert report.ok
    assert report.repeats == (True, True)


def test_functions_without_parameters_are_sound():
    report = check_reversible(lambda _, x: jnp.sin(x), lambda _, x: jnp.sin(x), [((), ())], X)
    assert report.gradient_error_params == 0
    assert report.ok


def test_relative_error():
    zero, one = jnp.zeros(2), jnp.ones(2)
    pairs = (zero, zero), (one, zero), (2 * one, one)
    assert [check.relative_error(*pair) for pair in pairs] == [0, np.inf, 1]


@pytest.mark.parametrize("none", [np.nan, np.inf])
def test_drift_draws_what_is_finite(none):
    rows = DriftRow("float32", None, 1, 1e-6, 1e-6), DriftRow("float32", None, 4, none, none)
    axes = revjax.Drift(rows).plot().axes[0]
    np.testing.assert_array_equal(axes.get_lines()[0].get_ydata(), [1e-6, np.nan])
    np.testing.assert_allclose(axes.get_ylim(), (0, 3e-6))


def test_drift_refuses_what_a_chain_refuses():
    def measure(f=dense, params: Any = PARAMS):
        return drift(f, dense, params, X, depths=[1])

    def pair(w, x):
        return (dense(w, x),)

    with pytest.raises(TypeError, match=r"f \(pair\) returned .* was due"):
        measure(pair)
    with pytest.raises(TypeError, match="was due"):
        measure(lambda w, x: 0.0)
    with pytest.raises(ValueError, match="leading axis"):  # though the prefixes have one length
        measure(params=(PARAMS[0], PARAMS[1][:2]))
    with pytest.raises(ValueError, match="hold no array"):
        measure(params=((), ()))
