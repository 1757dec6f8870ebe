"""SIGTERM and SIGINT: answered when there is a state to save, at once when there is none."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


class Stopped(BaseException):
    """A signal asked the run to stop before it had anything to save."""


class StopSignals:
    """Turns the first signal into a request; a second one ends the process at once.

    As a context manager it has the two signals' handlers. The request raises `Stopped`, or,
    inside `with deferred():`, only sets `requested`, for the training loop to answer.
    """

    def __init__(self) -> None:
        """Nothing is asked for yet."""
        self.requested: str | None = None  # the signal's name
        self._deferred = False
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

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """For code that looks at `requested` itself."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = signal.Signals(number).name
        if not self._deferred:
            raise Stopped(self.requested)


def in_background(*works: Callable[[], T]) -> list[T]:
    """Run each of `works` in a thread of its own, so that a signal is answered meanwhile.

    Python handles signals between the main thread's instructions, and compiling a program is one
    instruction that may take minutes. If a signal raises `Stopped`, the threads are left behind:
    the process must then end by `exit_now`.

    Returns:
        What the works return, in their order.
    """
    futures: list[Future[T]] = [Future() for _ in works]

    def run(work: Callable[[], T], future: Future[T]) -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    for work, future in zip(works, futures, strict=True):
        threading.Thread(target=run, args=(work, future), daemon=True).start()
    while wait(futures, timeout=0.1).not_done:
        pass
    return [future.result() for future in futures]


def exit_now(code: int) -> None:
    """End the process without waiting for threads that cannot be cancelled."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
