"""How a run tells how far it is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 30  # at least, between two lines about training where there is no terminal


class Progress:
    """The progress bar of a run, or its lines."""

    def __init__(self, step: int, steps: int, *, quiet: bool = False):
        """Start at `step` of `steps`; a quiet one tells nothing."""
        self._quiet = quiet
        self._start, self._step, self._steps = step, step, steps
        self._began = self._last_line = time.monotonic()
        self._bar = tqdm(
            desc="train",
            total=steps,
            initial=step,
            disable=quiet or not sys.stderr.isatty(),
            dynamic_ncols=True,
            bar_format="{desc}{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}"
            " [{elapsed}, {remaining} left{postfix}]",
        )

    def advance(self, steps: int) -> None:
        """Count training steps that are done."""
        self._step += steps
        self._bar.update(steps)

    def row(self, row: dict[str, Any]) -> None:
        """Show a row of metrics."""
        text = f"loss {row['loss']:.4f}, accuracy {row['accuracy']:.1%}"
        speed = f"{row['images_per_second']:,.0f} images/s"
        if not self._bar.disable:
            if row["split"] == "train":
                self._bar.set_postfix_str(f"{text}, {speed}")
            else:
                self._bar.set_description(f"{row['split']} {row['accuracy']:.1%}, train")
            return
        now = time.monotonic()
        if row["split"] != "train" or now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            done = self._step - self._start
            left = (now - self._began) / max(done, 1) * (self._steps - self._step)
            left = f", {tqdm.format_interval(round(left))} left" if done else ""
            self.say(f"step {row['step']}/{self._steps}: {row['split']} {text}, {speed}{left}")

    def say(self, sentence: str) -> None:
        """Write a line that is no part of the bar."""
        if self._quiet:
            return
        tqdm.write(sentence, file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
