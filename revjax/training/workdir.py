"""The folder of a run: whose it is, which config it was started with, and whole files only."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any, TextIO

from revjax.training.errors import ConfigError, TrainingError

# Keys that cannot change a number of the result: where the same bytes are read from and by whom
# (that they are the same is for checksums, or for `check_same_terms`), and when a checkpoint is
# written and kept.
FREE_KEYS = ("data.dir", "data.source", "data.workers", "checkpoint_every", "keep_checkpoints")
# The layout and the loops are free as well: they change numbers by how they are rounded alone, but
# where BatchNorm is of each device's part, which is for `check_same_terms`.
FREE_KEYS += ("mesh.data", "mesh.fsdp", "model.unroll", "model.store_last")


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """The object of a file that `write_json` wrote.

    Raises:
        TrainingError: it is not one, or has not the keys that are due.
    """
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict) or not value.keys() >= set(keys):
            raise ValueError(f"an object with {', '.join(keys) or 'keys'} is due")
    except ValueError as error:
        raise TrainingError(
            f"{path} is damaged ({error}); put back what it was, or give another --workdir."
        ) from error
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a file that is, at any moment, either what it was before or complete."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def lock_workdir(workdir: Path) -> TextIO:
    """Create the folder if need be and make it this process's own until the process ends.

    Returns:
        The lock's file; the lock ends when it is closed, or with the process, however that ends.

    Raises:
        TrainingError: if another process has the folder, or it cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / ".lock", "a+")  # noqa: SIM115 (the caller's to close)
    except OSError as error:
        raise TrainingError(
            f"the workdir {workdir} cannot be written ({error.strerror}); give another --workdir."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        lock.close()
        raise TrainingError(
            f"the workdir {workdir} is in use by another run (process {owner}); "
            "wait for it, or give another --workdir."
        ) from error
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


def check_same_config(
    workdir: Path,
    config: dict[str, Any],
    free: tuple[str, ...] = FREE_KEYS,
    defaults: dict[str, Any] | None = None,
) -> None:
    """Raise unless the folder has nothing to lose, or what it has is of this config.

    `steps` may be any number that the run has not passed: it then goes on to the new end.

    Args:
        workdir: the run's folder.
        config: the config as nested dicts.
        free: the keys that may differ, beside `steps`.
        defaults: of keys that a config may leave out.

    Raises:
        ConfigError: naming every key that differs, with both values.
        TrainingError: if the folder holds checkpoints of an unknown config.
    """
    path, saved = workdir / "config.json", _saved(workdir)
    if not saved and not (workdir / "summary.json").exists():
        return
    if not path.exists():
        raise TrainingError(
            f"{workdir} has a run but no config.json to say what of; give another --workdir."
        )
    known, config = json.loads(json.dumps((defaults or {}, config)))
    ours, theirs = (known | _flat(values) for values in (config, read_json(path, "steps")))
    differing = [
        f"config.{key} is {_shown(ours, key)}, there {_shown(theirs, key)}"
        for key in sorted(ours.keys() | theirs.keys())
        if key not in (*free, "steps") and ours.get(key) != theirs.get(key)
    ]
    if ours["steps"] < max(saved, default=0):
        differing.append(f"config.steps is {ours['steps']}, and it has made {max(saved)}")
    if differing:
        raise ConfigError(
            f"the run in {workdir} has another config: {'; '.join(differing)}; "
            "give another --workdir, or that run's values (config.steps may grow)."
        )


def _saved(workdir: Path) -> list[int]:
    names = [folder.name for folder in (workdir / "checkpoints").glob("*")]
    return [int(name) for name in names if name.isdecimal()]


def check_same_terms(workdir: Path, terms: dict[str, Any], *, writes: bool = True) -> None:
    """Write down what a run's numbers depend on beside its config, or raise if it was another.

    Args:
        workdir: the run's folder.
        terms: values of JSON, each under a name that says what it is of.
        writes: False looks at those of them that the run wrote down, and writes nothing.

    Raises:
        ConfigError: the folder has checkpoints that came about on other terms, which are named.
    """
    path = workdir / "terms.json"
    theirs = read_json(path) if path.exists() and _saved(workdir) else terms
    differing = [
        f"{name}: {_shown(terms, name)}, there {_shown(theirs, name)}"
        for name in sorted(terms.keys() | theirs.keys() if writes else terms.keys() & theirs.keys())
        if terms.get(name) != theirs.get(name)
    ]
    if differing:
        raise ConfigError(
            f"the run in {workdir} has come so far by something else: {'; '.join(differing)}; "
            "give it back what it had, or give another --workdir."
        )
    if writes:
        write_json(path, terms)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _shown(config: dict[str, Any], key: str) -> str:
    return repr(config[key]) if key in config else "not set"
