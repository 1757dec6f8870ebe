"""SIGTERM and SIGINT: answered when there is a state to save, at once when there is none."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Stopped(BaseException):
    """A signal asked the run to stop before it had anything to save."""


class StopSignals:
    """Turns the first signal into a request; a second one ends the process at once.

    As a context manager it has the two signals' handlers. They only set `requested`, for whoever
    works to look at: an exception may arise in a callback of Python's or JAX's, which swallows it.
    Works too long for that are for `wait_for` or, where they must tidy up, `raising`.
    """

    def __init__(self) -> None:
        """Nothing is asked for yet."""
        self.requested: str | None = None  # the signal's name
        self._raises = False
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
        if self._raises:
            raise Stopped(self.requested)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Let a signal raise `Stopped` in the work, or at its end where a callback swallowed it."""
        self._raises = True
        try:
            yield
        finally:
            self._raises = False
        if self.requested:
            raise Stopped(self.requested)

    def wait_for(self, *works: Callable[[], Any]) -> list[Any]:
        """Run each of `works` in a thread of its own, and answer a signal meanwhile.

        Python handles signals between the main thread's instructions, and compiling a program is
        one instruction that may take minutes.

        Returns:
            What the works return, in their order.

        Raises:
            Stopped: if a signal comes, or came before. The threads are then left behind, and the
                process must end by `exit_now`.
            Exception: the first that a work raises; the other threads are left behind too.
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
            done, waiting = wait(futures, timeout=0.1, return_when=FIRST_EXCEPTION)
            if self.requested:
                raise Stopped(self.requested)
            if not waiting or any(future.exception() for future in done):
                return [future.result() for future in sorted(done, key=futures.index)]


def exit_now(code: int) -> None:
    """End the process without waiting for threads that cannot be cancelled."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
