"""Checkpoints that are either whole or not used."""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from revjax.training.errors import TrainingError
from revjax.training.state import TrainState


class Restored(NamedTuple):
    """What the newest whole checkpoint holds."""

    state: TrainState
    step: int
    wall_seconds: float  # spent on the run until this step, over all its starts


class Checkpoints:
    """The folder `checkpoints/` of a run: a folder a step, of which the newest few are kept.

    Orbax writes a checkpoint under a temporary name and renames it, so that it is there whole or
    not at all, whenever the process is killed. What a disk does to a file later is noticed by the
    CRC-32 of every array, which stands in the checkpoint's record.
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
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=not read_only,
                cleanup_tmp_directories=not read_only,
                enable_async_checkpointing=False,
            ),
        )

    def save(self, step: int, state: TrainState, wall_seconds: float) -> None:
        """Write the state of a step; it is on the disk when this returns."""
        state = jax.device_get(state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                record=ocp.args.JsonSave({"wall_seconds": wall_seconds, "crc32": _crc32s(state)}),
            ),
        )

    def restore_newest(self, template: TrainState, tell: Callable[[str], None]) -> Restored | None:
        """Return the newest checkpoint that is whole, or None where there is none at all.

        Newer ones that are not are set aside in `damaged_checkpoints/`, unless the folder is
        read-only.

        Args:
            template: a state of the same structure, shapes and dtypes.
            tell: called with a sentence for every checkpoint that is not whole.

        Raises:
            TrainingError: if there are checkpoints and none of them is whole; they stay in place.
        """
        damaged = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._restore(step, template)
            except Exception as error:  # whatever orbax makes of files that are not its own
                reason = str(error).partition("\n")[0]
                damaged[step] = f"the checkpoint of step {step} is not whole: {reason}"
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

    def _restore(self, step: int, template: TrainState) -> Restored:
        arrays = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), template)
        restored: Any = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(arrays), record=ocp.args.JsonRestore()
            ),
        )
        if _crc32s(restored.state) != restored.record["crc32"]:
            raise ValueError("an array is not what was saved")
        state = jax.tree.map(jnp.array, restored.state)
        return Restored(state, step, restored.record["wall_seconds"])

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
        """Free what the manager holds."""
        self._manager.close()


def _crc32s(state: TrainState) -> list[int]:
    return [zlib.crc32(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(state)]
