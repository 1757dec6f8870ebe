"""What is asked of the compiler has names that this version of it knows."""

import jax
import jax.numpy as jnp
import pytest

from revjax.conv import conv
from revjax.training import compiler
from revjax.training.compiler import compiler_options


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_the_compiler_knows_the_options(platform):
    """It reads those for a GPU where there is none, too."""
    options = compiler_options(platform)
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1.0) == 2
    ((name, value),) = options.items()
    for unknown in ({name: f"{value},UNKNOWN"}, {f"{name}s": value}):
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"not a valid|No such"):
            jax.jit(lambda x: x + 2, compiler_options=unknown)(1.0)


def test_options_that_the_compiler_does_not_know_are_left_out_with_a_warning(monkeypatch):
    monkeypatch.setattr(compiler, "_OPTIONS", {"cpu": {"xla_cpu_of_another_version": "1"}})
    compiler._known.cache_clear()
    try:
        with pytest.warns(UserWarning, match="xla_cpu_of_another_version"):
            assert compiler_options("cpu") == {}
    finally:
        compiler._known.cache_clear()


def test_no_caller_changes_the_options_of_another():
    compiler_options("cpu").clear()
    assert compiler_options("cpu")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of the CPU's compiler")
def test_on_a_cpu_convolutions_are_none_of_ynnpack():
    arguments = jnp.ones((8, 16, 16, 32)), jnp.ones((3, 3, 32, 32))
    lowered = jax.jit(conv, compiler_options=compiler_options("cpu")).lower(*arguments)
    text = lowered.compile().as_text() or ""
    assert "convolution(" in text and "__ynn_fusion" not in text
