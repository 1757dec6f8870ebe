"""Random command lines and configs: refused in a sentence before any program is compiled, or sound.

Sound is a config whose training step can be traced: what is wrong with it would come up there.
"""

import contextlib
import io
import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from fuzzing import few
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

import train
from revjax.data import load_dataset
from revjax.training.command_line import parse_arguments
from revjax.training.config import Config, check_config
from revjax.training.errors import ConfigError
from revjax.training.mesh import make_mesh
from revjax.training.optimizer import learning_rate_schedule, make_optimizer
from revjax.training.state import abstract_model, initial_state
from revjax.training.step import make_train_steps, put_on_device
from revjax.training.votes import cast

ROOT = Path(train.__file__).parent
BASES = {
    "revnet": f"--config={ROOT}/configs/digits_revnet.py",
    "resnet": f"--config={ROOT}/configs/digits_resnet.py:constant_scaling",
    "depth": f"--config={ROOT}/configs/digits_resnet.py:revnet_drop_path",
    "revvit": f"--config={ROOT}/configs/digits_revvit.py",
}


def keys_of(config: ConfigDict, prefix: str = "") -> list[str]:
    """Every key of a config, those of groups and the groups themselves, as in "data.name"."""
    found = []
    for key, value in config.items():
        found.append(prefix + key)
        if isinstance(value, ConfigDict):
            found += keys_of(value, f"{prefix}{key}.")
    return found


def parsed(*arguments: str):
    found = parse_arguments(["train.py", *arguments])
    assert not isinstance(found, str)
    return found.config


KEYS = {name: keys_of(parsed(base)) for name, base in BASES.items()}
NAMED = st.sampled_from(sorted(BASES)).flatmap(
    lambda base: st.tuples(st.just(base), st.sampled_from(KEYS[base]))
)
INTEGERS = st.sampled_from((0, 1, -1, 2, 7, 23, 24, 2**31 - 1, 2**31, 2**63, 10**30, -(10**30)))
FLOATS = st.sampled_from((0.0, -0.0, 0.5, 1.0, -1.5, 1e-45, 1e39, 1e308, math.nan, math.inf))
TEXTS = st.sampled_from(("", "a", "digits", "revnet", "x" * 9_999, "two\nlines", "\0", "é", "%s{}"))
SCALARS = st.one_of(INTEGERS, FLOATS, TEXTS, st.none(), st.booleans())
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3).map(tuple),
    st.lists(st.integers(-1, 40), max_size=4).map(tuple),
    st.lists(SCALARS, max_size=2),
    st.just({}),
    st.just({"more": 1}),
    st.sampled_from((object(), int, np.float32(1), np.int64(3), 1j, b"bytes")),
)
SPELLINGS = st.one_of(
    SCALARS.map(str),
    VALUES.map(repr),
    st.sampled_from(("", " ", "(", ")", "1,", "1e", "0x10", "True", "--", "=", "'", "__import__")),
    st.text(max_size=12),
)


class Begun(Exception):
    """The command line was found in order, and the run would take its folder now."""


@pytest.fixture
def sentence(monkeypatch):
    """The function that returns the sentence by which a command line is refused, or nothing."""
    compiled = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    def begin(*_: Any) -> None:
        raise Begun

    def run(arguments: list[str]) -> str:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = train.run(["train.py", *arguments])
            except Begun:
                return ""
            finally:
                assert not compiled
        if code == 0:
            assert out.getvalue()  # --help
            return ""
        assert (code, out.getvalue()) == (2, "")
        assert re.fullmatch(r"train\.py: [^\n]+[.!]\n", err.getvalue()), err.getvalue()
        return err.getvalue()

    for name in ("lock_workdir", "check_same_config"):
        monkeypatch.setattr(train, name, begin)
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield run
    jax.monitoring.unregister_event_duration_listener(listen)


@jax.numpy_dtype_promotion("standard")  # optax's Adam is not strict
def trace(config: Config) -> None:
    """Trace the program of a run, whose numbers are then known to fit their dtypes."""
    model, optimizer = abstract_model(config), make_optimizer(config.optim)
    schedule = learning_rate_schedule(config.optim)
    mesh = make_mesh(config)
    train_steps = make_train_steps(config, model, optimizer, schedule, mesh)
    state = jax.eval_shape(lambda: initial_state(config, optimizer))
    indices = np.zeros((1, config.batch_size), np.int32)
    data = put_on_device(config.data, load_dataset("digits"), mesh)
    jax.eval_shape(train_steps, state, data["train"], indices, np.int32(0), cast(mesh, False))


@given(NAMED, SPELLINGS, st.booleans())
@few(25)
def test_a_value_on_the_command_line(sentence, named, spelling, apart):
    base, key = named
    flag = [f"--config.{key}", spelling] if apart else [f"--config.{key}={spelling}"]
    if not sentence([BASES[base], *flag]):
        trace(check_config(parsed(BASES[base], *flag)))


@given(NAMED, VALUES)
@few(15)
def test_a_value_of_a_config_file(named, value):
    """Given as Python has it, of a type that the command line would not let through."""
    base, key = named
    config = parsed(BASES[base])
    *groups, last = key.split(".")
    group: Any = config
    for name in groups:
        group = group[name]
    with config.unlocked(), config.ignore_type(), contextlib.suppress(TypeError, ValueError):
        group[last] = value  # suppressed is what ConfigDict itself refuses
    try:
        checked = check_config(config)
        abstract_model(checked)
    except ConfigError as error:
        assert re.fullmatch(r"[^\n]+\.", str(error))
    else:
        trace(checked)


FLAGS = (
    "--config",
    "--config.",
    "--config.=",
    "--config.data",
    "--configs.seed=1",
    "-config.seed=1",
)
FLAGS += (
    "--noconfig.seed",
    "--noconfig.data.flip",
    "--config.seed",
    "--config.seed=1",
    "--workdir",
)
FLAGS += ("--workdir=", "--eval_only=2", "--noeval_only", "--", "-", "", "--help=no", "--helpfull")
FLAGS += (
    "--flagfile=none",
    "--undefok=x",
    "--config.model.units=(1,1,1)",
    "--config.data.name.x=1",
)


@given(st.lists(st.one_of(st.sampled_from(FLAGS), st.text(max_size=9)), max_size=4))
@few(25)
def test_odd_flags(sentence, flags):
    sentence([BASES["revnet"], *flags])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--config.model=0", "--config.model.units=(1,)"], "config.model is a group"),
        (["--config.data={}"], "config.data is a group; set its keys one by one"),
        (["--config.model.units=(4,)", "--config.model.units=(5,)"], "units is given twice"),
        (["--config.log_every=2147483648"], "log_every is 2147483648; an integer of at most 32"),
        (["--config.model.filters=(8,8,8,9223372036854775808)"], "an integer of at most 32 bits"),
    ],
)
def test_what_fuzzing_has_found(sentence, flags, named):
    assert named in sentence([BASES["revnet"], *flags])


def test_a_number_that_float32_has_not(sentence):
    flag = "--config.model.shortcut.branch_scale=1e39"
    assert "branch_scale=1e+39" in sentence([BASES["resnet"], flag])


def test_too_little_memory_is_a_sentence(monkeypatch, capsys):
    def fail(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(train, "main", fail)
    assert train.run(["train.py"]) == 1
    err = capsys.readouterr().err
    assert "memory is too small (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes); " in err
