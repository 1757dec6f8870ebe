"""The papers' tables: rows are configs, runs go on where they stopped, reports say what is."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import revjax

ROOT = Path(revjax.__file__).parent.parent


@pytest.fixture
def reproduce(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("reproduce")


def record(reproduce, row, seed, error, complete=True, **changes):
    table = reproduce.TABLES["revnet_cifar"]()
    return {
        "table": "revnet_cifar",
        "row": row,
        "seed": seed,
        "config_hash": reproduce.config_hash(table[row]),
        "complete": complete,
        "steps": 80_000 if complete else 1_000,
        "steps_due": 80_000,
        "test_error_last": error,
    } | changes


def row_of(report, name):
    (line,) = [line for line in report.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_report_takes_the_newest_of_complete_runs_of_todays_config(reproduce):
    name = "cifar10_revnet38"
    records = [
        record(reproduce, name, 0, 9.0),  # run again below
        record(reproduce, name, 0, 7.0),
        record(reproduce, name, 1, 6.0),
        record(reproduce, name, 2, 50.0, complete=False),
        record(reproduce, name, 3, 80.0, config_hash="another"),
    ]
    report = reproduce.report("revnet_cifar", records)
    cells = row_of(report, name)
    assert cells[1:6] == ["6.86", "6.50", "0.71", "2", "-0.36"]
    assert cells[6] == "seed 2 not finished: step 1,000 of 80,000, 50.00"
    assert row_of(report, "cifar10_resnet32")[1:6] == ["7.26", "not run", "", "", ""]


@pytest.mark.parametrize(
    "table", ["revnet_cifar", "identity_mappings", "stochastic_depth", "digits"]
)
def test_each_row_is_a_config_of_its_own(reproduce, table):
    rows = reproduce.TABLES[table]()
    hashes = {reproduce.config_hash(row) for row in rows.values()}
    assert len(hashes) >= len(rows) - 2  # two names of one row, where two tables share it
    assert all(len(each) == 12 for each in hashes)


def test_rows_are_chosen_by_name_or_its_end(reproduce):
    rows = reproduce.TABLES["revnet_cifar"]()
    assert list(reproduce.choose(rows, "resnet32,revnet38"))[:2] == [
        "cifar10_revnet38",
        "cifar10_resnet32",
    ]
    assert list(reproduce.choose(rows, "cifar100_revnet164")) == ["cifar100_revnet164"]
    with pytest.raises(ValueError, match="no row 'revnet39'"):
        reproduce.choose(rows, "revnet38,revnet39")


def test_readme_has_the_report_of_what_is_recorded(reproduce):
    due = reproduce.report("revnet_cifar", reproduce.read_records())
    assert due in (ROOT / "README.md").read_text()


def test_a_run_that_failed_is_not_complete(reproduce, tmp_path, monkeypatch):
    """Of another config, say, whose finished run has the folder."""
    row = reproduce.TABLES["digits"]()["resnet_store_float32"]
    steps = reproduce.config_of(reproduce.command_line(row))["steps"]
    (tmp_path / "summary.json").write_text(json.dumps({"steps": steps}))
    rates = {"train": 100.0, "test": 900.0}
    lines = [
        {"step": steps, "split": split, "accuracy": 0.75, "images_per_second": rate}
        for split, rate in rates.items()
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for code, complete in ((0, True), (1, False), (2, False), (None, False)):
        monkeypatch.setattr(reproduce, "train", lambda *_, code=code: ("no", code))
        found = reproduce.run_slice(row, 0, [], tmp_path, lambda: False)
        assert found["complete"] is complete
        assert found["test_error_last"] == (None if code == 2 else 25)
        assert found["images_per_second"] == (None if code == 2 else 100)


def test_ours_is_a_median_where_theirs_is_one(reproduce):
    table = reproduce.TABLES["identity_mappings"]()
    name = "resnet110_original"
    records = [
        record(reproduce, "cifar10_revnet38", seed, error)
        | {"table": "identity_mappings", "row": name}
        | {"config_hash": reproduce.config_hash(table[name])}
        for seed, error in enumerate((6.0, 7.0, 20.0))
    ]
    report = reproduce.report("identity_mappings", records)
    assert row_of(report, name)[2:6] == ["7.00", "7.81", "3", "+0.39"]
    assert "ours, median" in report


@pytest.mark.slow
def test_a_run_goes_on_where_its_budget_ended(tmp_path):
    """In another folder, as on another machine; the result is that of one undisturbed run."""

    def call(workdir, *flags):
        records = workdir.with_suffix(".jsonl")  # what is complete in one is not run again
        command = [sys.executable, "benchmarks/reproduce.py", "--table", "digits", *flags]
        command += ["--rows", "resnet_store_float32", "--records", records]
        done = subprocess.run([*command, "--workdir", workdir], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, done.stderr
        lines = records.read_text().splitlines() if records.exists() else []
        return [json.loads(line) for line in lines]

    whole = call(tmp_path / "whole")[-1]
    assert whole["complete"] and whole["steps"] == 300
    budget, records = 4, []
    while not (records and records[-1]["complete"]):
        records = call(tmp_path / "sliced", "--budget", f"{budget}s")
        moved = tmp_path / "elsewhere"
        if (tmp_path / "sliced").exists():  # else the first budget ended before the run began
            (tmp_path / "sliced").rename(moved)
            moved.rename(tmp_path / "sliced")
        budget += 4
    assert len(records) > 2
    assert not records[-2]["complete"]
    assert records[-1]["test_error_last"] == whole["test_error_last"]
    assert len(call(tmp_path / "sliced")) == len(records)  # nothing is left to do
