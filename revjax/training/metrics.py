"""What a run measured: `metrics.jsonl`, one JSON object a row, and the same for TensorBoard."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from revjax.training.errors import TrainingError
from revjax.training.processes import from_first

proto: Any = event_pb2  # whose classes are made at run time


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    """Return the rows of `metrics.jsonl`, without a last line that was not written to its end.

    Raises:
        TrainingError: if any other line is not a row.
    """
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    rows = []
    lines = path.read_bytes().split(b"\n")  # the last is empty, or a row without its end
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            is_row = isinstance(row, dict) and isinstance(row.get("step"), int)
            if not is_row or not isinstance(row.get("split"), str):
                raise ValueError("a row is an object with a step and a split")
            rows.append(row)
        except ValueError as error:
            if number == len(lines) - 1:
                break
            raise TrainingError(
                f"line {number} of {path} is not a row of metrics; mend or remove the line."
            ) from error
    return rows


class MetricsLog:
    """The rows of a run, in `metrics.jsonl` and as TensorBoard events."""

    def __init__(self, workdir: Path, step: int, *, writes: bool = True):
        """Open the log of a run that goes on from `step`; later rows are dropped.

        Args:
            workdir: of the run.
            step: up to which rows are kept.
            writes: whether this process does; all keep the rows, by which they decide.
        """
        kept = [row for row in read_rows(workdir) if row["step"] <= step] if writes else None
        self.rows: list[dict[str, Any]] = from_first(kept)
        self._writes = writes
        if not writes:
            return
        self._path = workdir / "metrics.jsonl"
        temporary = self._path.with_name("metrics.jsonl.tmp")
        temporary.write_text("".join(map(_line, self.rows)))
        os.replace(temporary, self._path)
        self._file = open(self._path, "a")  # noqa: SIM115 (close() closes it)
        # Not SummaryWriter: its thread dies on a full disk, and the run would wait for it forever.
        (workdir / "tensorboard").mkdir(exist_ok=True)
        self._events = EventsWriter(str(workdir / "tensorboard" / "events"), f".{step}")
        forget = proto.SessionLog(status=proto.SessionLog.START)  # what was read from there on
        self._events.write_event(proto.Event(step=step + 1, session_log=forget))

    def write(self, row: dict[str, Any]) -> None:
        """Add a row; `step` and `split` say what it is about, the rest are numbers."""
        self.rows.append(row)
        if not self._writes:
            return
        self._file.write(_line(row))
        self._file.flush()
        for name, value in row.items():
            if name not in ("step", "split"):
                summary = scalar(f"{row['split']}/{name}", value)
                event = proto.Event(wall_time=time.time(), step=row["step"], summary=summary)
                self._events.write_event(event)

    def last(self, split: str) -> dict[str, Any] | None:
        """Return the newest row of a split, if there is one."""
        return next((row for row in reversed(self.rows) if row["split"] == split), None)

    def has(self, split: str, step: int) -> bool:
        """Whether there is a row of a split at a step."""
        return any((row["split"], row["step"]) == (split, step) for row in self.rows)

    def sync(self) -> None:
        """Return when every row is on the disk; a checkpoint must not be ahead of its rows."""
        if not self._writes:
            return
        os.fsync(self._file.fileno())
        self._events.flush()

    def close(self) -> None:
        """Close both files.

        What a full disk then keeps out are rows after the newest checkpoint, since `sync` comes
        before each: the next start makes them again.
        """
        if not self._writes:
            return
        for file in (self._file, self._events):
            with contextlib.suppress(OSError):
                file.close()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
