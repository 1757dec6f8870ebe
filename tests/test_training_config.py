"""Command lines and configs that cannot be run: one sentence, exit code 2, nothing done."""

import ast
import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train
from revjax.data import HOLD_OUT_SIZES
from revjax.residual import PLACEMENTS
from revjax.shortcut import NUMBERS as SHORTCUTS
from revjax.training.command_line import Arguments, parse_arguments
from revjax.training.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    check_config,
)
from revjax.training.errors import ConfigError
from revjax.training.state import abstract_model

ROOT = Path(train.__file__).parent
DIGITS = f"--config={ROOT}/configs/digits_revnet.py"
REVVIT = f"--config={ROOT}/configs/digits_revvit.py"
CIFAR = f"--config={ROOT}/configs/cifar10_revnet38.py"
VARIANTS = f"--config={ROOT}/configs/digits_resnet.py"
RESNET = f"--config={ROOT}/configs/cifar100_resnet32.py"
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*_*.py"))
TABLES = ("identity_mappings", "stochastic_depth")  # whose rows are configs


@pytest.fixture
def refused(monkeypatch, tmp_path, capsys):
    """Run a command line that must be refused before any work, and return its sentence."""

    def forbidden(*_, **__):
        raise AssertionError("a refused run did some work")

    def run(*arguments: str) -> str:
        workdir = tmp_path / "run"
        for work in ("open_feed", "initial_state", "make_train_steps", "write_json"):
            monkeypatch.setattr(train, work, forbidden)
        assert train.run(["train.py", f"--workdir={workdir}", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert not workdir.exists()
        assert re.fullmatch(r"train\.py: [^\n]+\.\n", err), f"not one sentence: {err!r}"
        assert "Traceback" not in err
        return err

    return run


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        # flags and files
        ([], "no config"),
        (["--config"], "Missing value"),
        (["--config=configs/none.py"], "there is no file"),
        (["--config=README"], "there is no file"),
        ([DIGITS, "--evalonly"], "evalonly"),
        # layouts
        ([DIGITS, "--config.mesh.fsdp=0"], "config.mesh.fsdp is 0; a number of devices is due"),
        ([DIGITS, "--config.mesh.data=-2"], "config.mesh.data is -2; a number of devices or -1, "),
        ([DIGITS, "--config.mesh.fsdp=8"], "config.mesh is 1 x 8 (data x fsdp), and there are 4"),
        ([DIGITS, "--config.mesh.data=3"], "batch_size is 100, which 3 devices cannot share even"),
        ([DIGITS, "stray"], "'stray' is no flag"),
        ([DIGITS, "--eval_only=perhaps"], "eval_only"),
        # unknown keys
        ([DIGITS, "--config.stepz=3"], "config has no key 'stepz'; it has batch_size"),
        ([DIGITS, "--config.data.nam=digits"], "config.data has no key 'nam'"),
        ([DIGITS, "--config.steps.more=3"], "config.steps is a value"),
        ([DIGITS, "--config.data.source=/tmp"], "no key 'source'"),
        ([RESNET, "--config.model.grid_bits=14"], "no key 'grid_bits'"),
        ([CIFAR, "--config.model.units=(1,1,1)"], "no key 'units'"),
        ([REVVIT, "--config.model.name=revnet"], "config.model.depth is a key that nothing reads"),
        ([REVVIT, "--config.model.name=revvit_small"], "config.model.depth is a key that nothing"),
        ([DIGITS, "--config.model.name=revvit"], "config.model.units is a key that nothing"),
        # types
        ([DIGITS, "--config.steps=many"], "config.steps"),
        ([DIGITS, "--config.steps=1.5"], "config.steps"),
        ([DIGITS, "--config.data=3"], "config.data"),
        ([DIGITS, "--config.data.flip=perhaps"], "config.data.flip"),
        ([DIGITS, "--config.model.grid_bits=14.5"], "config.model.grid_bits is 14.5"),
        ([DIGITS, "--config.model.units=(1,'a')"], "config.model.units"),
        ([DIGITS, "--config.optim.boundaries=(1.5,)"], "config.optim.boundaries"),
        ([REVVIT, "--config.model.depth=2.5"], "config.model.depth"),
        # names
        ([REVVIT, "--config.optim.name=adam"], "config.optim.name is 'adam'; one of sgd, adamw"),
        ([DIGITS, "--config.data.name=digitz"], "config.data.name is 'digitz'"),
        ([DIGITS, "--config.model.name=revnet39"], "config.model.name is 'revnet39'"),
        ([DIGITS, "--config.model.name=revnet38"], "config.model.units"),
        ([DIGITS, "--config.model.dtype=float16"], "config.model.dtype is 'float16'"),
        ([DIGITS, "--config.model.backward=forward"], "one of reversible, remat, store is due"),
        ([RESNET, "--config.model.backward=reversible"], "one of remat, store is due"),
        ([VARIANTS, "--config.model.conventions=ours"], "config.model.conventions is 'ours'; one"),
        ([f"{VARIANTS}:original", "--config.model.placement=x"], "config.model.placement is 'x'"),
        (
            [f"{VARIANTS}:dropout", "--config.model.shortcut.rate=1.5"],
            "config.model.shortcut: shortcut rate=1.5",
        ),
        (
            [f"{VARIANTS}:drop_path", "--config.model.stochastic_depth.p_last=0.0"],
            "config.model.stochastic_depth: p_last=0.0",
        ),
        # numbers
        ([DIGITS, "--config.steps=0"], "config.steps is 0"),
        ([DIGITS, "--config.steps=-5"], "config.steps is -5"),
        ([DIGITS, "--config.steps=3000000000"], "config.steps is 3000000000"),
        ([DIGITS, "--config.seed=-1"], "config.seed is -1"),
        ([DIGITS, "--config.seed=2147483648"], "config.seed is 2147483648"),
        ([DIGITS, "--config.batch_size=0"], "config.batch_size is 0"),
        ([DIGITS, "--config.batch_size=1438"], "config.batch_size is 1438; at most 1437"),
        ([DIGITS, "--config.log_every=0"], "config.log_every is 0"),
        ([DIGITS, "--config.eval_every=-1"], "config.eval_every is -1"),
        ([DIGITS, "--config.checkpoint_every=0"], "config.checkpoint_every is 0"),
        ([DIGITS, "--config.keep_checkpoints=0"], "config.keep_checkpoints is 0"),
        ([REVVIT, "--config.precise_bn_batches=9"], "config.precise_bn_batches is 9; 0, as revvit"),
        ([DIGITS, "--config.precise_bn_batches=-1"], "config.precise_bn_batches is -1"),
        ([DIGITS, "--config.optim.learning_rate=1e39"], "config.optim.learning_rate is 1e+39"),
        ([DIGITS, "--config.optim.decay_factor=1e300"], "config.optim.decay_factor is 1e+300"),
        ([DIGITS, "--config.optim.decay_factor=1e30"], "config.optim.decay_factor is 1e+30"),
        ([DIGITS, "--config.data.padding=-1"], "config.data.padding is -1"),
        ([DIGITS, "--config.data.padding=8"], "config.data.padding is 8"),
        ([DIGITS, "--config.optim.learning_rate=-0.1"], "config.optim.learning_rate is -0.1"),
        ([DIGITS, "--config.optim.learning_rate=nan"], "config.optim.learning_rate is nan"),
        ([DIGITS, "--config.optim.momentum=1"], "config.optim.momentum is 1.0"),
        ([DIGITS, "--config.optim.weight_decay=-1"], "config.optim.weight_decay is -1.0"),
        ([DIGITS, "--config.optim.decay_factor=0"], "config.optim.decay_factor is 0.0"),
        ([DIGITS, "--config.optim.boundaries=(20,10)"], "config.optim.boundaries is (20, 10)"),
        ([DIGITS, "--config.optim.boundaries=(0,)"], "config.optim.boundaries is (0,)"),
        ([DIGITS, "--config.model.grid_bits=40"], "config.model.grid_bits is 40"),
        ([DIGITS, "--config.model.store_last=-2"], "config.model.store_last is -2; a number of"),
        ([DIGITS, "--config.model.store_last=99"], "config.model: store_last=99: give a number"),
        ([RESNET, "--config.model.store_last=1"], "config.model.store_last is a key that nothing"),
        # what the network refuses
        ([DIGITS, "--config.model.filters=(15,15,30,60)"], "config.model: "),
        ([DIGITS, "--config.model.units=(1,1)"], "config.model: "),
        ([DIGITS, "--config.model.units=(0,1,1)"], "config.model: "),
        ([REVVIT, "--config.model.patch=3"], "config.model: image_size=8 and patch=3"),
        ([REVVIT, "--config.model.heads=5"], "config.model: width=64 and heads=5"),
    ],
)
def test_refuses(refused, arguments, named):
    assert named in refused(*arguments)


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("def get_config(: pass", "SyntaxError"),
        ("x = 1", "get_config"),
        ("def get_config(): return 5", "returned 5"),
        ("def get_config(): raise KeyError('why')", "KeyError: 'why'"),
        ("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict()", "config."),
    ],
)
def test_refuses_config_file(refused, tmp_path, source, named):
    path = tmp_path / "wrong.py"
    path.write_text(source)
    assert named in refused(f"--config={path}")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("config.warmup = 10", "config.warmup is a key that nothing reads"),
        ("config.model.bn_scope = 'host'", "config.model.bn_scope is 'host'; one of global, dev"),
        ("config.data.normalize = 'mean'", "config.data.normalize is 'mean'; one of mean_image,"),
        ("config.data.validation = -1", "config.data.validation is -1; a number from 0 to 1436"),
        ("config.data.validation = 1437", "config.data.validation is 1437; a number from 0 to"),
        ("config.data.validation = 1400", "config.batch_size is 100; at most 37, the examples of"),
        ("config.optim.beta = 0.9", "config.optim.beta is a key that nothing reads"),
        ("config.optim.nesterov = 1", "config.optim.nesterov is 1; bool is due"),
        ("config.optim.nesterov, config.optim.momentum = True, 0.0", "config.optim.nesterov is"),
        (
            "config.optim.name, config.optim.nesterov = 'adamw', True",
            "config.optim.nesterov is True; False, as config.optim.name is not 'sgd', is due",
        ),
        ("config.optim.decay = 'biases'", "config.optim.decay is 'biases'; one of kernels, all"),
        ("config.optim.warmup_steps = -1", "config.optim.warmup_steps is -1; a number from 0"),
        ("config.optim.warmup_steps = 9", "config.optim.warmup_rate is None; a number above 0"),
        ("config.optim.warmup_rate = 0.01", "config.optim.warmup_rate is 0.01; None, as config."),
        (
            "config.optim.warmup_steps, config.optim.warmup_rate = 9, 0.0",
            "config.optim.warmup_rate is 0.0; a number above 0 for the warm-up's steps is due",
        ),
        ("config.data.source = '/tmp'", "config.data.source is a key that nothing reads"),
        ("config.model.name = 'resnet'", "config.model.grid_bits is a key that nothing reads"),
        ("del config.optim.momentum", "config.optim.momentum is missing"),
        ("del config.model.grid_bits", "config.model.grid_bits is missing"),
        ("del config.model.units", "config.model.units is missing"),
        ("del config.data", "config.data is missing"),
        ("config.model.units = '3,3,3'", "config.model.units is '3,3,3'"),
    ],
)
def test_refuses_config_of_file(refused, tmp_path, line, named):
    path = tmp_path / "edited.py"
    path.write_text(
        "from configs import digits_revnet\n"
        "def get_config():\n"
        "    config = digits_revnet.get_config()\n"
        f"    with config.ignore_type(): {line}\n"
        "    return config\n"
    )
    assert named in refused(f"--config={path}")


def test_a_data_set_may_fix_how_many_are_held_out(monkeypatch):
    monkeypatch.setitem(HOLD_OUT_SIZES, "digits", 300)
    config = parse(DIGITS).config.unlock()
    for number in (0, 300):
        config.data.validation = number
        assert check_config(config).data.validation == number
    config.data.validation = 200
    with pytest.raises(ConfigError, match=r"validation is 200; 0 or 300, by the rule of digits,"):
        check_config(config)


def test_a_real_process_exits_with_2(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), DIGITS, "--config.steps=0"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "train.py: config.steps is 0; a number from 1 to 2^31 - 1 is due.\n"
    assert not list(tmp_path.iterdir())


def parse(*arguments: str) -> Arguments:
    parsed = parse_arguments(["train.py", *arguments])
    assert isinstance(parsed, Arguments)
    return parsed


def test_overrides():
    parsed = parse(
        DIGITS,
        "--config.steps=7",
        "--config.data.flip",
        "--config.model.units=(4,5,6)",
        "--config.model.grid_bits=None",
        "--config.model.store_last=2",
        "--config.optim.boundaries=()",
        "--eval_only",
    )
    config = check_config(parsed.config)
    assert parsed.eval_only
    assert (config.steps, config.data.flip, config.optim.boundaries) == (7, True, ())
    assert (config.model.units, config.model.grid_bits) == ((4, 5, 6), None)
    assert config.model.store_last == 2


def test_default_workdir_is_named_after_the_config():
    assert parse(DIGITS).workdir == Path("runs/digits_revnet")
    assert parse(DIGITS, "--workdir=there").workdir == Path("there")


def test_help(capsys):
    assert train.run(["train.py", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--workdir" in out
    assert "--[no]eval_only" in out


def test_every_field_of_a_config_is_read():
    """A field that no code reads would be the silence that an unknown key may not be."""
    groups = r"(self\._?)?(config|optim|model|data)(\.(data|mesh|model))?"
    read = {
        node.attr
        for path in [ROOT / "train.py", *(ROOT / "revjax" / "training").glob("*.py")]
        if path.name != "config.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        if re.fullmatch(groups, ast.unparse(node.value))
    }
    for record in (Config, DataConfig, ModelConfig, OptimConfig, MeshConfig):
        for field in dataclasses.fields(record):
            assert field.name in read, field.name


def test_there_is_a_config_for_every_network_and_data_set():
    pairs = {
        f"{data}_{model}"
        for data in ("cifar10", "cifar100")
        for model in ("resnet32", "resnet110", "resnet164", "revnet38", "revnet110", "revnet164")
    }
    assert pairs | {"digits_revnet", "digits_revvit", "cifar10_revvit"} <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_valid(name):
    path = ROOT / "configs" / f"{name}.py"
    row = {"identity_mappings": ":shortcut_dropout", "stochastic_depth": ":cifar10_resnet110"}
    config = check_config(parse(f"--config={path}{row.get(name, '')}").config)
    header = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"python train.py --config configs/{name}.py" in header
    for item in ("Hardware:", "Time:", "Accuracy:", "n:"):
        assert item in header
    if (
        name.startswith("cifar") and "revvit" not in name
    ):  # recipes of Gomez et al. 2017, from their code
        data, model = name.split("_")
        assert (config.data.name, config.model.name) == (data, model)
        assert (config.batch_size, config.steps) == (100, 80_000)
        optim = config.optim
        assert (optim.learning_rate, optim.boundaries) == (0.1, (40_000, 60_000))
        assert (optim.decay_factor, optim.momentum, optim.weight_decay) == (0.1, 0.9, 2e-4)
        assert (config.data.padding, config.data.flip) == (2, True)


ROWS = [
    f"{name}:{row}"
    for name in (*TABLES, "digits_resnet")
    for row in importlib.import_module(f"configs.{name}").ROWS
]


@pytest.mark.parametrize("row", ROWS)
def test_row_is_valid(row):
    """Of the tables of He et al. 2016 and Huang et al. 2016, by their recipes."""
    file, name = row.split(":")
    arguments = parse(f"--config={ROOT}/configs/{file}.py:{name}")
    config = check_config(arguments.config)
    assert arguments.workdir == Path("runs") / f"{file}-{name}"
    model, parts = config.model, name.split("_", 1)
    if file == "digits_resnet" or name in ("resnet110_original", "cifar10_revnet110"):
        assert abstract_model(config).num_parameters > 10_000
    if file == "digits_resnet":
        assert config.data.name == "digits"
        placement = name if name in PLACEMENTS else model.placement
        kind = name if name in SHORTCUTS else None
        assert model.placement == placement
        assert (model.shortcut and model.shortcut.kind) == kind
        assert (model.stochastic_depth is not None) == name.endswith(("_depth", "drop_path"))
        return
    optim, data = config.optim, config.data
    assert (optim.learning_rate, optim.decay_factor, optim.momentum) == (0.1, 0.1, 0.9)
    assert (optim.weight_decay, optim.decay, optim.nesterov) == (1e-4, "all", True)
    if file == "identity_mappings":
        assert (data.padding, data.flip, data.validation) == (4, True, 0)
        due, warmup = (128, 64_000, (32_000, 48_000)), (400, 0.01)
        if name == "resnet1001_batch64":  # by fb.resnet.torch, which has no warm-up
            due, warmup = (64, 200 * 781, (80 * 781, 121 * 781)), (0, None)
        assert (config.batch_size, config.steps, optim.boundaries) == due
        assert (optim.warmup_steps, optim.warmup_rate) == warmup
        assert data.name == (parts[0] if parts[0].startswith("cifar") else "cifar10")
        kinds = [kind for kind in SHORTCUTS if name.startswith((kind, f"shortcut_{kind}"))]
        how = model.shortcut
        assert how is not None
        if name.startswith("shortcut_constant"):
            numbers = tuple(float(number) for number in name.split("_")[2:])
            assert (how.kind, how.scale, how.branch_scale) == ("constant_scaling", *numbers)
        elif kinds:
            assert how.kind == kinds[0]
            if name[-1].isdigit():
                assert how.gate_bias == float(name.rpartition("_")[2])
        else:
            assert how.kind == "identity"
            placements = [placement for placement in PLACEMENTS if name.endswith(placement)]
            assert model.placement == (placements or ["full_preactivation"])[0]
            depth = re.findall(r"resnet(\d+)", name)[0]
            assert model.name.endswith(f"resnet{depth}")
        return
    assert data.name == {"svhn": "svhn_cropped+extra"}.get(parts[0], parts[0])
    epochs, drops = (50, (30, 35)) if data.name.startswith("svhn") else (500, (250, 375))
    left = 604_388 - 6_000 if data.name.startswith("svhn") else 45_000
    assert config.steps == epochs * (left // 128)
    assert optim.boundaries == tuple(drop * (left // 128) for drop in drops)
    assert (model.stochastic_depth is None) == name.endswith("_constant")
    assert (optim.warmup_steps > 0) == ("1202" in name)


def test_every_row_is_told_of():
    told = (ROOT / "docs" / "papers.md").read_text()
    for row in ROWS:
        name = re.sub(r"exclusive_gating_-[1-4]$", "exclusive_gating_-5", row.split(":")[1])
        assert f"`{name}`" in told or row.startswith("digits"), row


def test_config_error_is_raised_for_a_group_that_is_a_value():
    config = parse(DIGITS).config
    with config.unlocked(), config.ignore_type():
        config.optim = 3
    with pytest.raises(ConfigError, match=r"config\.optim is 3; a group of keys is due"):
        check_config(config)
