"""What is asked of the compiler has names that this version of it knows."""

import os
import platform
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from revjax.conv import conv
from revjax.conventions import CONVENTIONS
from revjax.layers import Conv, pure
from revjax.training import compiler
from revjax.training.compiler import compiler_options, set_xla_flags

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_the_compiler_knows_the_options(kind):
    """It reads those for a GPU where there is none, too."""
    options = compiler_options(kind)
    assert options == compiler._OPTIONS[kind]
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1.0) == 2
    for name, value in options.items():
        for unknown in ({name: f"{value},UNKNOWN"}, {f"{name}s": value}):
            with pytest.raises(jax.errors.JaxRuntimeError, match=r"not a valid|No such"):
                jax.jit(lambda x: x + 2, compiler_options=unknown)(1.0)


def test_an_option_that_the_compiler_does_not_know_is_left_out_with_a_warning(monkeypatch):
    """And no other; the warning is of the line that asks."""
    due = compiler_options("cpu")
    unknown = {"xla_cpu_of_another_version": "1"}
    monkeypatch.setattr(compiler, "_OPTIONS", {"cpu": unknown | due})
    compiler._known.cache_clear()
    with pytest.warns(UserWarning, match="xla_cpu_of_another_version") as caught:
        assert compiler_options("cpu") == due
    assert [warning.filename for warning in caught] == [__file__]


def test_no_caller_changes_the_options_of_another():
    compiler_options("cpu").clear()
    assert compiler_options("cpu")


NO_UNROLLING = "--xla_backend_extra_options=xla_cpu_disable_loop_unrolling"


@pytest.mark.parametrize(
    "before, after",
    [
        (None, NO_UNROLLING),
        ("", NO_UNROLLING),
        ('--xla_dump_to="/a  b"', f'--xla_dump_to="/a  b" {NO_UNROLLING}'),
        (f"{NO_UNROLLING},xla_cpu_fold", f"{NO_UNROLLING},xla_cpu_fold"),
        ("flags.txt", "flags.txt"),
    ],
)
def test_flags_of_the_environment_are_kept(monkeypatch, before, after):
    if before is None:
        monkeypatch.delenv("XLA_FLAGS", raising=False)
    else:
        monkeypatch.setenv("XLA_FLAGS", before)
    for _ in range(2):
        set_xla_flags()
        assert os.environ["XLA_FLAGS"] == after


def test_train_py_sets_the_flags(monkeypatch, capsys):
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(sys, "argv", ["train.py", "--no_such_flag"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert os.environ["XLA_FLAGS"] == NO_UNROLLING


def test_the_flags_reach_the_code_of_a_process_that_has_imported_jax(tmp_path):
    """That of a normalisation of few channels, which is the same without them time and again."""
    code = (
        "import os, sys, jax, jax.numpy as jnp\n"
        "from revjax.training.compiler import set_xla_flags\n"
        "os.environ['XLA_FLAGS'] = '--xla_dump_to=' + sys.argv[1]\n"
        "if sys.argv[1].endswith('set'): set_xla_flags()\n"
        "jax.jit(lambda x, v: jnp.maximum(v * x + v, 0))(jnp.ones((8, 4, 4, 16)), jnp.ones(16))\n"
    )

    def compiled(name):
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        subprocess.run(command, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        [file] = (tmp_path / name).glob("*maximum*.o")
        return file.read_bytes()

    assert compiled("set") != compiled("without") == compiled("again")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of the CPU's compiler")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_on_a_cpu_convolutions_are_of_the_fastest_library(dtype):
    """oneDNN's, also in the body of a loop; of versions that have them for dots alone, Eigen's."""

    def step(x, kernel):
        return jax.lax.scan(lambda x, _: (conv(x, kernel), None), x, None, length=2)[0]

    arguments = jnp.ones((8, 16, 16, 32), dtype), jnp.ones((3, 3, 32, 32), dtype)
    lowered = jax.jit(step, compiler_options=compiler_options("cpu")).lower(*arguments)
    text = lowered.compile().as_text() or ""
    if jax.__version_info__ >= (0, 11) and platform.machine() in ("x86_64", "AMD64"):
        assert "__onednn$convolution" in text
    else:
        assert "convolution(" in text and "__onednn" not in text
    assert "__ynn_fusion" not in text


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of the CPU's compiler")
def test_what_a_bfloat16_convolution_gives_is_added_in_float32():
    """Else oneDNN adds it within the convolution, and rounds the sum to bfloat16."""
    layer = Conv(
        16, 16, 3, 1, conventions=CONVENTIONS["revnet"], dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    apply, params, state = pure(layer)
    x, y = jax.random.normal(jax.random.key(0), (2, 4, 8, 8, 16))

    def add(params, x, y):
        return x + apply(params, state, y)[0]

    due = x + jax.jit(apply)(params, state, y)[0]
    found = jax.jit(add, compiler_options=compiler_options("cpu"))(params, x, y)
    np.testing.assert_allclose(found, due, rtol=0, atol=2**-5)
    narrow = found.astype(jnp.bfloat16).astype(jnp.float32)
    assert (found != narrow).mean() > 0.9
