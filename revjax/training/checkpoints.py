"""Checkpoints that are either whole or not used."""

import json
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from revjax.training.errors import TrainingError
from revjax.training.state import TrainState
from revjax.training.workdir import write_json

SEAL = "files.json"


class Restored(NamedTuple):
    """What the newest whole checkpoint holds."""

    state: TrainState  # of numpy's arrays
    step: int
    wall_seconds: float  # spent on the run until this step, over all its starts


class Checkpoints:
    """The folder `checkpoints/` of a run: a folder a step, of which the newest few are kept.

    Orbax writes a checkpoint under a temporary name and renames it, so that it is there whole or
    not at all, whenever the process is killed. Then it is sealed by `files.json`, which has the
    CRC-32 of every file: what a disk does to one later is noticed. A checkpoint without a seal is
    one whose process was killed in between: it is whole if it can be read.

    All this is done in a thread, one checkpoint at a time, while the training goes on.

    In a `with` statement it is closed at the end. An error that ends the statement stays the one
    that is raised: that of a checkpoint that could not be written becomes a note of it.
    """

    def __init__(self, directory: Path, *, keep: int = 1, read_only: bool = False):
        """Open the folder.

        Args:
            directory: created unless `read_only`.
            keep: how many checkpoints to keep, the newest.
            read_only: leave everything as it is, for a process that does not own the run.
        """
        self.directory = directory.absolute()
        self._read_only = read_only
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: tuple[int, Future[None]] | None = None
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
        alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=False,
                multiprocessing_options=alone,  # the run's other processes have nothing to write
                cleanup_tmp_directories=not read_only,
                enable_async_checkpointing=False,
            ),
        )

    def save(self, step: int, state: TrainState, wall_seconds: float) -> None:
        """Begin to write the state of a step, once the one before is written.

        Args:
            step: of the state.
            state: numpy's arrays, which nobody may change afterwards.
            wall_seconds: spent on the run until this step.

        Raises:
            TrainingError: the one before could not be written; this one is not either.
        """
        self.wait()
        self._writing = step, self._thread.submit(self._write, step, state, wall_seconds)

    def wait(self) -> None:
        """Return when what was saved is on the disk.

        Raises:
            TrainingError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing:
            step, result = writing
            try:
                result.result()
            except (OSError, ValueError) as error:  # tensorstore's are ValueErrors
                raise TrainingError(
                    f"the checkpoint of step {step} could not be written: {error}; those before it "
                    f"are in {self.directory}."
                ) from error

    def _write(self, step: int, state: TrainState, wall_seconds: float) -> None:
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                record=ocp.args.JsonSave({"wall_seconds": wall_seconds}),
            ),
        )
        folder = self.directory / str(step)
        files = {str(path.relative_to(folder)): _crc(path) for path in _files(folder)}
        write_json(folder / SEAL, files)

    def restore_newest(self, template: TrainState, tell: Callable[[str], None]) -> Restored | None:
        """Return the newest checkpoint that is whole, or None where there is none at all.

        Newer ones that are not are set aside in `damaged_checkpoints/`, unless the folder is
        read-only.

        Args:
            template: a state of the same structure, shapes and dtypes; it may be abstract.
            tell: called with a sentence for every checkpoint that is not whole.

        Raises:
            TrainingError: if there are checkpoints and none of them is whole; they stay in place.
        """
        self.wait()
        damaged = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            damage, restored = _damage(self.directory / str(step)), None
            if damage is None:
                try:
                    restored = self.restore(step, template)
                except TrainingError:  # whole, and of another network
                    raise
                except Exception as error:  # of orbax or tensorstore, of no common class
                    if (self.directory / str(step) / SEAL).exists():
                        raise
                    reason = str(error).partition("\n")[0]
                    damage = f"it has no {SEAL} and cannot be read ({reason})"
            if restored is None:
                damaged[step] = f"the checkpoint of step {step} is not whole: {damage}"
                continue
            for step, sentence in damaged.items():
                place = self.directory / str(step) if self._read_only else self._set_aside(step)
                tell(f"{sentence}; it is left in {place}.")
            return restored
        if damaged:
            raise TrainingError(
                f"no checkpoint in {self.directory} is whole ({'; '.join(damaged.values())}); "
                "train in another --workdir."
            )
        return None

    def restore(self, step: int, template: TrainState) -> Restored:
        """Return the checkpoint of a step, which is not asked whether it is whole.

        Args:
            step: of a checkpoint that is there.
            template: a state of the same structure, shapes and dtypes.

        Raises:
            TrainingError: it has other shapes or dtypes.
        """
        arrays = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), template)
        restored: Any = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(arrays), record=ocp.args.JsonRestore()
            ),
        )
        # Orbax hands on what is there, whatever was asked for.
        found = jax.tree_util.tree_leaves_with_path(restored.state)
        for (path, leaf), due in zip(found, jax.tree.leaves(arrays), strict=True):
            if (leaf.shape, leaf.dtype) != (due.shape, due.dtype):
                raise TrainingError(
                    f"the checkpoint of step {step} in {self.directory} is of another network: "
                    f"{jax.tree_util.keystr(path)} is {leaf.dtype}{list(leaf.shape)} there, and "
                    f"{due.dtype}{list(due.shape)} here. The data may have other classes now; give "
                    "another --workdir."
                )
        return Restored(restored.state, step, restored.record["wall_seconds"])

    def _set_aside(self, step: int) -> Path:
        aside = self.directory.parent / "damaged_checkpoints" / str(step)
        aside.parent.mkdir(exist_ok=True)
        again = 1
        while aside.exists():
            again += 1
            aside = aside.with_name(f"{step}-{again}")
        (self.directory / str(step)).rename(aside)
        self._manager.reload()
        return aside

    def close(self) -> None:
        """Wait for what is being written, and free what the manager holds."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except TrainingError as unwritten:
            if error is None:
                raise
            error.add_note(str(unwritten))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)


def _crc(path: Path) -> int:
    return zlib.crc32(path.read_bytes())


def _damage(folder: Path) -> str | None:
    """What is wrong with a sealed checkpoint's files, or None."""
    try:
        seal = json.loads((folder / SEAL).read_text())
        if not isinstance(seal, dict) or not seal:
            raise ValueError("it names no file")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return f"{SEAL} cannot be read ({error})"
    for name, crc in seal.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _crc(folder / name) != crc:
            return f"{name} is not what was written"
    return None
