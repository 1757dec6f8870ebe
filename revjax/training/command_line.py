"""`train.py --config FILE[:ROW] [--workdir DIR] [--config.KEY=VALUE ...]` as a record."""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from revjax.training.config import optional_keys
from revjax.training.errors import ConfigError


class Arguments(NamedTuple):
    """What the command line asks for."""

    config: Any  # ConfigDict: the file's values under the command line's overrides, unchecked
    config_name: str  # the config file's name without its suffix, and the row after a dash
    workdir: Path
    eval_only: bool
    coordinator: str | None  # of a run of several processes, as join_processes takes all three
    processes: int | None
    process: int | None


def parse_arguments(argv: Sequence[str]) -> Arguments | str:
    """Read the command line, the config file it names, and its overrides of that config.

    The flags live in tables of their own, not in absl's global one, so a process may parse as
    many command lines as it likes.

    Args:
        argv: the command line; `argv[0]` is the program's name.

    Returns:
        The arguments, or the text to print where the command line asks for `--help`.

    Raises:
        ConfigError: for an unknown flag or key, a value of the wrong type, or a config file that
            cannot be loaded.
    """
    own = flags.FlagValues()
    flags.DEFINE_string("config", None, "A file of configs/, or FILE:ROW.", flag_values=own)
    flags.DEFINE_string("workdir", None, "Default: runs/<config name>.", flag_values=own)
    flags.DEFINE_bool("eval_only", False, "Only evaluate the newest checkpoint.", flag_values=own)
    flags.DEFINE_string("coordinator", None, "host:port of process 0.", flag_values=own)
    flags.DEFINE_integer("processes", None, "How many processes there are.", flag_values=own)
    flags.DEFINE_integer("process", None, "Which of them this is, from 0.", flag_values=own)
    flags.DEFINE_bool("help", False, "Print this text.", flag_values=own)
    try:
        rest = own(list(argv), known_only=True)
    except flags.Error as error:
        raise ConfigError(_last_line(error)) from error
    if own.help:
        return f"{__doc__}\n{own.get_help(include_special_flags=False)}"
    if not own.config:
        raise ConfigError(
            "no config is given; name a file, as in --config configs/digits_revnet.py."
        )

    config = _load_config(own.config)
    given: set[str] = set()
    for argument in rest:
        if override := re.match(r"--?(?:no)?config\.([^=]*)", argument):
            _add_optional(config, override[1])
            _check_key(config, override[1], given)
            given.add(override[1])
    overrides = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=overrides, sys_argv=rest)
    try:
        stray = overrides(rest)[1:]
    except (flags.Error, TypeError, ValueError) as error:
        raise ConfigError(_last_line(error)) from error
    if stray:
        raise ConfigError(
            f"{stray[0]!r} is no flag; a value of the config is set by --config.KEY=VALUE."
        )
    path, row = _file_and_row(own.config)
    name = f"{path.stem}-{row}" if row else path.stem
    workdir = Path(own.workdir) if own.workdir else Path("runs") / name
    processes = own.coordinator, own.processes, own.process
    return Arguments(config, name, workdir, own.eval_only, *processes)


def _file_and_row(config: str) -> tuple[Path, str]:
    """The file that `--config` names, and what it has after a colon, or nothing."""
    if Path(config).is_file() or ":" not in config:
        return Path(config), ""
    file, _, row = config.rpartition(":")
    return Path(file), row


def _load_config(config: str) -> ConfigDict:
    """Run a config file, which is Python, and return what its `get_config()` returns.

    What stands behind a colon, as in "configs/identity_mappings.py:ROW", is its argument.
    """
    path, row = _file_and_row(config)
    if not path.is_file():
        raise ConfigError(f"--config={config}: there is no file {path}.")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={config}: a config is a Python file, whose name ends in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        values = module.get_config(*([row] if row else []))
    except Exception as error:  # whatever a user's Python may raise
        what = f"{type(error).__name__}: {_last_line(error)[:-1]}"
        raise ConfigError(f"--config={config}: its get_config() cannot be run ({what}).") from error
    if not isinstance(values, ConfigDict):
        raise ConfigError(
            f"--config={config}: get_config() returned {values!r}; a ConfigDict is due."
        )
    return values


def _add_optional(config: ConfigDict, key: str) -> None:
    """Give the config a key that it may leave out, so that the command line can change it."""
    *path, last = key.split(".")
    if key not in (known := optional_keys()):
        return
    with config.unlocked():
        group: Any = config
        for part in path:
            if part not in group:
                group[part] = ConfigDict()
            group = group[part]
        if isinstance(group, ConfigDict) and last not in group:
            group[last] = known[key]


def _check_key(config: ConfigDict, key: str, given: set[str]) -> None:
    """Raise unless `key`, as in "data.name", leads to a value in `config`, and is not yet given."""
    group, path = config, "config"
    for part in key.split("."):
        if not isinstance(group, ConfigDict):
            raise ConfigError(f"--config.{key}: {path} is a value and has no keys of its own.")
        if part not in group:
            raise ConfigError(
                f"--config.{key}: {path} has no key {part!r}; it has {', '.join(sorted(group))}."
            )
        group, path = group[part], f"{path}.{part}"
    if isinstance(group, ConfigDict):
        raise ConfigError(f"--config.{key}: {path} is a group; set its keys one by one.")
    if key in given:  # the values of a tuple would be joined
        raise ConfigError(f"--config.{key} is given twice; give it once.")


def _last_line(error: Exception) -> str:
    """The line of an exception's text that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".") + "." if lines else f"{type(error).__name__}."
