"""What is asked of the compiler has names that this version of it knows."""

import jax
import pytest

from revjax.training.compiler import compiler_options


def test_the_compiler_knows_the_options_for_a_gpu():
    """It reads them where there is no GPU, too."""
    options = compiler_options("gpu")
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1.0) == 2
    ((name, value),) = options.items()
    for unknown in ({name: f"{value},UNKNOWN"}, {f"{name}s": value}):
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"not a valid|No such"):
            jax.jit(lambda x: x + 2, compiler_options=unknown)(1.0)
