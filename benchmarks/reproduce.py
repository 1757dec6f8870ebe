"""The papers' tables, run to the end in slices, and reported beside what was published.

    python benchmarks/reproduce.py --table revnet_cifar [--rows revnet38,resnet32] [--seeds 0,1,2]
                                   [--budget 9m] [--source DIR] [--data_dir DIR] [--workdir DIR]
                                   [--unroll]
    python benchmarks/reproduce.py --report [--table revnet_cifar]

Each row of a table (benchmarks/tables.py) is a run of train.py for each seed. A call goes through
them in order, seed by seed, and skips those that are complete; when its budget is spent it asks
the run for a checkpoint and ends, and the next call goes on from there. A run's folder holds all
that this takes, on another machine, too: for the networks of `revnet_cifar` at most 16 MB.

Each call appends a line for every run that it touched to benchmarks/results/reproduction.jsonl.
The report takes the newest line of each row and seed, and only those of the config as it is today.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, environment
from tables import TABLES, Row

from revjax.training.command_line import parse_arguments
from revjax.training.config import check_config
from revjax.training.errors import ConfigError
from revjax.training.interrupt import StopSignals
from revjax.training.metrics import read_rows
from revjax.training.workdir import FREE_KEYS, write_json

sys.path.insert(0, str(ROOT))  # for what the files of configs/ share
RECORDS = RESULTS / "reproduction.jsonl"
CARRIED = 16  # MB, at most, of a folder that is to be carried between machines
TO_END = 60  # seconds that a run may take to save and end

# Of tables whose published figures are no means: what they are.
CENTRES = {"identity_mappings": ("median", statistics.median)}

Record = dict[str, Any]


def main() -> None:
    arguments = parse()
    if arguments.report:
        names = [arguments.table] if arguments.table else list(TABLES)
        print("\n".join(report(name, read_records()) for name in names), end="")
        return
    flags = [f"--config.data.source={arguments.source}"] if arguments.source else []
    flags += [f"--config.data.dir={arguments.data_dir}"] if arguments.data_dir else []
    flags += ["--config.model.unroll=true"] if arguments.unroll else []
    failed = []
    keys = ("table", "row", "seed", "config_hash", "complete")
    done = {tuple(record[key] for key in keys) for record in read_records(arguments.records)}
    with StopSignals() as stop:
        end = time.monotonic() + arguments.budget

        def over() -> bool:
            return stop.requested is not None or time.monotonic() >= end

        for seed in arguments.seeds:
            for name, row in arguments.rows.items():
                due = (arguments.table, name, seed, config_hash(row), True)
                if over() or due in done:
                    continue
                workdir = arguments.workdir / arguments.table / f"{name}-{seed}"
                record = run_slice(row, seed, flags, workdir, over)
                record = {"table": arguments.table, "row": name, "seed": seed, **record}
                with arguments.records.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(f"{name}, seed {seed}: {outcome(record)}", flush=True)
                failed += [f"{name}, seed {seed}"] if "failed" in record else []
    if failed:
        sys.exit(f"reproduce.py: these runs failed: {'; '.join(failed)}.")


# Running ----------------------------------------------------------------------------------------


def run_slice(
    row: Row, seed: int, flags: list[str], workdir: Path, over: Callable[[], bool]
) -> Record:
    """Run a row until it is complete or its time is over, and say where it stands.

    Of one that was complete before, train.py says so, or that it was of another config.
    """
    flags = [*command_line(row), f"--config.seed={seed}", "--config.keep_checkpoints=1", *flags]
    due = config_of(flags)["steps"]
    began = time.monotonic()
    errors, code = train([*flags, f"--workdir={workdir.absolute()}"], over)
    place = environment()
    slices = workdir / "slices.json"  # how long the run took, wherever it was; it travels with it
    parts = json.loads(slices.read_text()) if slices.exists() else []
    parts.append({"seconds": round(time.monotonic() - began, 1), "device": place["device"]})
    if workdir.is_dir():
        write_json(slices, parts)
    rows = [] if code == 2 else read_rows(workdir)  # what is refused may have those of another run
    tests = [100 - 100 * metric["accuracy"] for metric in rows if metric["split"] == "test"]
    rates = [metric.get("images_per_second") for metric in rows if metric["split"] == "train"]
    rates = [rate for rate in rates if rate]
    finished = code == 0 and complete(workdir, due)
    saved = [int(folder.name) for folder in (workdir / "checkpoints").glob("[0-9]*")]
    record = {
        "config_hash": config_hash(row),
        "complete": finished,
        "steps": max(saved, default=0),
        "steps_due": due,
        "test_error_last": round(tests[-1], 4) if tests else None,  # %
        "test_error_best": round(min(tests), 4) if tests else None,
        "wall_seconds": round(sum(part["seconds"] for part in parts), 1),
        "devices": sorted({part["device"] for part in parts}),
        "images_per_second": round(statistics.median(rates), 1) if rates else None,
        "folder_megabytes": megabytes(workdir),
        **place,
    }
    if finished:
        best = json.loads((workdir / "summary.json").read_text()).get("best_validation")
        if best:  # what Huang et al. 2016 report
            record["test_error_at_best_validation"] = round(100 * best["test_error"], 4)
    if code:
        record["failed"] = (errors.strip().splitlines() or [f"exit code {code}"])[-1]
    return record


def train(flags: list[str], over: Callable[[], bool]) -> tuple[str, int | None]:
    """Run train.py, which is asked to save and end when its time is over: its stderr and code.

    The latter is None where it ended before it could listen, which is no failure.
    """
    child = subprocess.Popen(
        [sys.executable, "train.py", *flags],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for this process, which passes it on once
    )
    patience = None
    while True:
        try:
            _, errors = child.communicate(timeout=0.5)
            unheard = patience is not None and child.returncode == -signal.SIGTERM
            return errors, None if unheard else child.returncode
        except subprocess.TimeoutExpired:
            if patience is None and over():
                child.terminate()
                patience = time.monotonic() + TO_END
            elif patience is not None and time.monotonic() > patience:
                child.kill()  # what it saved before is whole, and told as failed


def complete(workdir: Path, due: int) -> bool:
    summary = workdir / "summary.json"
    return summary.exists() and json.loads(summary.read_text())["steps"] == due


def command_line(row: Row) -> list[str]:
    return ["--config", row.config, *row.flags]


def config_of(flags: list[str]) -> dict[str, Any]:
    """The config that a command line gives, which must be one that train.py takes."""
    arguments = parse_arguments(["train.py", *flags])
    assert not isinstance(arguments, str)  # no --help
    check_config(arguments.config)
    return arguments.config.to_dict()


def config_hash(row: Row) -> str:
    """Of all that decides a row's numbers beside its seed."""
    values = config_of(command_line(row))
    for key in ("seed", *FREE_KEYS):
        *path, last = key.split(".")
        group = values
        for part in path:
            group = group.get(part, {})
        group.pop(last, None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def megabytes(folder: Path) -> float:
    return round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6, 1)


def outcome(record: Record) -> str:
    """A line on where a run stands."""
    if "failed" in record:
        return f"failed at step {record['steps']:,}: {record['failed']}"
    state = "complete" if record["complete"] else "not finished"
    told = f"{state}, step {record['steps']:,} of {record['steps_due']:,}"
    if record["test_error_last"] is not None:
        told += f", test error {record['test_error_last']:.2f} %"
    told += f", {record['wall_seconds']:,.0f} s, its folder {record['folder_megabytes']} MB"
    much = record["folder_megabytes"] > CARRIED and not record["complete"]
    return told + (f" (more than {CARRIED}: too much to be carried)" if much else "")


# Reporting --------------------------------------------------------------------------------------


def read_records(path: Path = RECORDS) -> list[Record]:
    """The lines of a file of records, oldest first."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def report(table: str, records: list[Record]) -> str:
    """A table as Markdown: published, ours (mean, spread, n) and the difference, in percent.

    Where a median is published, so is ours one.
    """
    kind, centre = CENTRES.get(table, ("mean", statistics.fmean))
    lines = [f"| row | published | ours, {kind} | spread | n | difference | |", "|---" * 7 + "|"]
    for name, row in TABLES[table]().items():
        now = config_hash(row)
        newest = {r["seed"]: r for r in records if (r["table"], r["row"]) == (table, name)}
        runs = [r for r in newest.values() if r["config_hash"] == now]
        last = "test_error_last"
        errors = [r.get("test_error_at_best_validation", r[last]) for r in runs if r["complete"]]
        ours = centre(errors) if errors else None
        difference = ""
        if ours is not None and isinstance(row.published, float):
            difference = f"{ours - row.published:+.2f}"
        cells = [
            name,
            f"{row.published:.2f}" if isinstance(row.published, float) else row.published or "",
            "not run" if not runs else "" if ours is None else f"{ours:.2f}",
            f"{statistics.stdev(errors):.2f}" if len(errors) > 1 else "",
            str(len(errors)) if errors else "",
            difference,
            "; ".join(unfinished(r) for r in runs if not r["complete"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines).replace("  |", " |") + "\n"


def unfinished(record: Record) -> str:
    """Of a run that is not complete: where it stands."""
    told = f"seed {record['seed']} not finished: step {record['steps']:,} of "
    told += f"{record['steps_due']:,}"
    if record["test_error_last"] is not None:
        told += f", {record['test_error_last']:.2f}"
    return told + (", failed" if "failed" in record else "")


# The command line -------------------------------------------------------------------------------


def parse() -> Any:
    parser = argparse.ArgumentParser(description="Run the papers' tables, or report them.")
    parser.add_argument("--table", choices=list(TABLES))
    parser.add_argument("--rows", help="some of them, by their names or ends of these: revnet38")
    parser.add_argument("--seeds", type=seeds, default=(0,), help="as in 0,1,2")
    parser.add_argument("--budget", type=seconds, default=float("inf"), help="as in 90s, 9m or 2h")
    parser.add_argument("--source", help="the official files of the data set on disk")
    parser.add_argument("--data_dir", help="where the prepared data set lies, or shall lie")
    parser.add_argument("--unroll", action="store_true", help="config.model.unroll: for a GPU")
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "reproduction")
    parser.add_argument("--records", type=Path, default=RECORDS, help="the file to append to")
    parser.add_argument("--report", action="store_true", help="print the tables; run nothing")
    arguments = parser.parse_args()
    for name in ("source", "data_dir", "workdir", "records"):
        if getattr(arguments, name) is not None:
            setattr(arguments, name, Path(getattr(arguments, name)).absolute())
    os.chdir(ROOT)  # where train.py and configs/ are
    if not arguments.report and arguments.table is None:
        parser.error(f"--table is missing: give one of {', '.join(TABLES)}, or --report.")
    try:
        if not arguments.report:
            arguments.rows = choose(TABLES[arguments.table](), arguments.rows)
    except (ConfigError, ValueError) as error:
        parser.error(str(error))
    return arguments


def choose(rows: dict[str, Row], asked: str | None) -> dict[str, Row]:
    """The rows that are asked for, in the order of the table."""
    if asked is None:
        return rows
    chosen: set[str] = set()
    for end in asked.split(","):
        found = [name for name in rows if name == end or name.endswith(f"_{end}")]
        if not found:
            raise ValueError(f"--rows={asked}: there is no row {end!r}; give some of {list(rows)}.")
        chosen |= set(found)
    return {name: row for name, row in rows.items() if name in chosen}


def seeds(text: str) -> tuple[int, ...]:
    return tuple(int(seed) for seed in text.split(","))


def seconds(text: str) -> float:
    number = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if number is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: give one as in 90s, 9m or 2h")
    return float(number[1]) * {"s": 1, "m": 60, "h": 3600}[number[2]]


if __name__ == "__main__":
    main()
