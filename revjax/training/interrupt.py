"""SIGTERM and SIGINT: answered when there is a state to save, at once when there is none."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import FrameType
from typing import Any


class Stopped(Exception):
    """A signal asked the run to stop before it had anything to save."""


class StopSignals:
    """Turns the first signal into a request; a second one ends the process at once.

    As a context manager it has the two signals' handlers. They raise nothing, since an exception
    may arise in a callback of Python's or JAX's, which would swallow it: whoever works looks at
    `requested`, between steps or through `wait_for`.
    """

    def __init__(self) -> None:
        """Nothing is asked for yet."""
        self.requested: str | None = None  # the signal's name
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        """Take the two signals' handlers."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = signal.Signals(number).name

    def wait_for(self, *works: Callable[[], Any]) -> list[Any]:
        """Run each of `works` in a thread of its own, and answer a signal meanwhile.

        Loading data or compiling may take minutes, without a moment to look at `requested`.

        Returns:
            What the works return, in their order.

        Raises:
            Stopped: if a signal comes, or came before. The threads are then left behind, and the
                process must end by `exit_now`.
        """
        futures: list[Future[Any]] = [Future() for _ in works]

        def run(work: Callable[[], Any], future: Future[Any]) -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        for work, future in zip(works, futures, strict=True):
            threading.Thread(target=run, args=(work, future), daemon=True).start()
        while True:
            waiting = wait(futures, timeout=0.1).not_done
            if self.requested:
                raise Stopped(self.requested)
            if not waiting:
                return [future.result() for future in futures]


def exit_now(code: int) -> None:
    """End the process without waiting for threads that cannot be cancelled."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
