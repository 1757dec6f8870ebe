"""How many steps to dispatch at once, and how fast they run."""

import time

DISPATCH_SECONDS = 2.0  # aimed at; a signal waits for up to two dispatches
MAX_DISPATCH_STEPS = 100


class Pace:
    """Follows the speed of training, and nothing else: evaluations and checkpoints are left out.

    Attributes:
        steps: how many steps the next dispatch should have, at most. It grows until a dispatch
            takes `DISPATCH_SECONDS`, so that the host's part of a step does not count on a fast
            device and a slow one still answers soon.
    """

    def __init__(self, batch_size: int):
        """Start the clock; `batch_size` images make a step."""
        self.steps = 1
        self._batch_size = batch_size
        self._mark = time.monotonic()
        self._images, self._seconds = 0, 0.0

    def restart(self) -> None:
        """Leave out the time since the last dispatch was finished."""
        self._mark = time.monotonic()

    def finished(self, steps: int) -> None:
        """Count a dispatch of `steps` steps, finished now."""
        now = time.monotonic()
        seconds, self._mark = now - self._mark, now
        self._images += steps * self._batch_size
        self._seconds += seconds
        fitting = int(steps * DISPATCH_SECONDS / max(seconds, 1e-6))
        self.steps = min(max(fitting, 1), 2 * self.steps, MAX_DISPATCH_STEPS)

    def images_per_second(self) -> float:
        """Return the speed since the last call."""
        speed = self._images / max(self._seconds, 1e-6)
        self._images, self._seconds = 0, 0.0
        return speed
