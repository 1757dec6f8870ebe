"""A workdir belongs to one run at a time, and to one config for good."""

import copy
import json
import os

import pytest

from revjax.training.errors import ConfigError, TrainingError
from revjax.training.workdir import (
    check_same_config,
    check_same_terms,
    lock_workdir,
    read_json,
    write_json,
)

CONFIG = {
    "steps": 100,
    "seed": 0,
    "checkpoint_every": 10,
    "data": {"name": "digits", "dir": None},
    "model": {"unroll": False},
    "mesh": {"data": -1, "fsdp": 1},
    "optim": {"boundaries": (10, 20), "learning_rate": 0.1},
}


def changed(**changes):
    config = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        *groups, last = key.split("__")
        group = config
        for name in groups:
            group = group[name]
        group[last] = value
    return config


@pytest.fixture
def workdir(tmp_path):
    write_json(tmp_path / "config.json", CONFIG)
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    return tmp_path


def test_a_second_run_is_refused_while_the_first_has_the_folder(tmp_path):
    held = lock_workdir(tmp_path / "run")
    with pytest.raises(TrainingError, match=rf"in use by .* \(process {os.getpid()}\)"):
        lock_workdir(tmp_path / "run")
    held.close()
    lock_workdir(tmp_path / "run").close()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match=r"cannot be written \(Not a directory\)"):
        lock_workdir(tmp_path / "file" / "run")


def test_the_same_config_goes_on(workdir):
    check_same_config(workdir, CONFIG)


@pytest.mark.parametrize(
    "free",
    [
        {"data__dir": "/elsewhere"},
        {"checkpoint_every": 3},
        {"steps": 200},
        {"steps": 10},
        {"model__unroll": True},
        {"model__store_last": 0},
        {"mesh__fsdp": 2},
        {"data__workers": 2},
        {"data__source": "/elsewhere"},
    ],
)
def test_what_may_change(workdir, free):
    check_same_config(workdir, changed(**free))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "config.seed is 1, there 0"),
        ({"steps": 9}, "config.steps is 9, and it has made 10"),
        ({"optim__learning_rate": 0.2}, "config.optim.learning_rate is 0.2, there 0.1"),
        ({"optim__boundaries": (10,)}, "config.optim.boundaries is [10], there [10, 20]"),
        ({"warmup": 5}, "config.warmup is 5, there not set"),
        (
            {"data__name": "cifar10", "seed": 2},
            "config.data.name is 'cifar10', there 'digits'; config.seed is 2, there 0",
        ),
    ],
)
def test_another_config_is_refused_with_the_keys_that_differ(workdir, change, named):
    with pytest.raises(ConfigError) as refused:
        check_same_config(workdir, changed(**change))
    assert f"has another config: {named}; give another --workdir" in str(refused.value)


def test_more_may_differ_for_who_only_evaluates(workdir):
    check_same_config(workdir, changed(seed=1, steps=200), free=("seed",))


def test_a_run_that_saved_nothing_has_no_config_to_keep(workdir):
    (workdir / "checkpoints" / "10").rmdir()
    check_same_config(workdir, changed(seed=1))
    (workdir / "summary.json").touch()
    with pytest.raises(ConfigError, match=r"config\.seed is 1, there 0"):
        check_same_config(workdir, changed(seed=1))


def test_a_default_may_be_given_or_left_out(workdir):
    defaults = {"model.bn_scope": "global"}
    spelt_out = changed(model__bn_scope="global", model__store_last=None)
    check_same_config(workdir, spelt_out, defaults=defaults)
    write_json(workdir / "config.json", spelt_out)
    check_same_config(workdir, CONFIG, defaults=defaults)
    with pytest.raises(ConfigError, match="bn_scope is 'device', there 'global'"):
        check_same_config(workdir, changed(model__bn_scope="device"), defaults=defaults)


def test_other_terms_are_refused_once_something_is_saved(workdir):
    terms = {"classes": "2", "training images": "20"}
    check_same_terms(workdir, terms)  # of a workdir from before there were any
    assert read_json(workdir / "terms.json") == terms
    check_same_terms(workdir, terms)
    with pytest.raises(ConfigError, match="classes: '3', there '2'; training images: not set"):
        check_same_terms(workdir, {"classes": "3"})
    check_same_terms(workdir, {"classes": "2"}, writes=False)  # who only evaluates asks for less
    with pytest.raises(ConfigError, match="classes: '3', there '2'; give it back"):
        check_same_terms(workdir, {"classes": "3"}, writes=False)
    assert read_json(workdir / "terms.json") == terms
    check_same_terms(workdir, {"another": "3"}, writes=False)  # trained on what has no such term
    (workdir / "checkpoints" / "10").rmdir()
    check_same_terms(workdir, {})
    assert read_json(workdir / "terms.json") == {}


@pytest.mark.parametrize("text", ["garbage", "[1]", '{"other": 1}', '{"st'])
def test_a_damaged_file_is_named(workdir, text):
    (workdir / "config.json").write_text(text)
    with pytest.raises(TrainingError, match=r"config\.json is damaged \(.*; put back what it was"):
        check_same_config(workdir, CONFIG)


def test_checkpoints_of_an_unknown_config_are_refused(tmp_path):
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    with pytest.raises(TrainingError, match=r"no config\.json"):
        check_same_config(tmp_path, CONFIG)


def test_json_is_written_whole_or_not_at_all(workdir):
    before = (workdir / "config.json").read_text()
    with pytest.raises(TypeError):
        write_json(workdir / "config.json", {"steps": 1, "unwritable": object()})
    assert (workdir / "config.json").read_text() == before
    assert json.loads(before) == json.loads(json.dumps(CONFIG))
    with open(workdir / "config.json") as reader:  # a reader has the old file or the new one
        write_json(workdir / "config.json", changed(steps=1))
        assert reader.read() == before
