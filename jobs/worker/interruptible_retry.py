"""Retries calls to Valkey and object storage in a thread, so that cancel, pause and shutdown are still handled.

Owns the retries of a run's requests outside the uploader. Invariants: no request starts after the lease is lost, and an
interrupt is handled within a fraction of a second, no matter what a server does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from typing import Generic, Literal, TypeVar

import structlog

from grpo_core.retry import backoff
from jobs.errors import Fenced, Unavailable
from jobs.worker.lease import Lease
from jobs.worker.shutdown import GracefulShutdown

log = structlog.get_logger()

T = TypeVar("T")

Interrupt = Literal["cancel", "pause", "stop", "deadline"]
"""Reasons to end a wait: the owner's cancel or pause, the worker's shutdown, and the end of its grace time."""

LOOK_SECONDS = 0.1
RETRY_SECONDS = 0.5
LONGEST_RETRY_SECONDS = 15.0
"""Longest pause before a retry, also in the uploader."""


class Interrupted(Exception):
    """One of the caller's interrupts has occurred."""

    def __init__(self, interrupt: Interrupt) -> None:
        self.kind: Interrupt = interrupt
        super().__init__(interrupt)


class TooSlow(Exception):
    """The caller's time limit was exceeded. The request may still succeed."""


class InterruptibleRetry:
    """The retries of one run."""

    def __init__(self, lease: Lease, stop: GracefulShutdown) -> None:
        self._lease = lease
        self._stop = stop

    def check(self, interrupts: Collection[Interrupt]) -> None:
        """Raise `Fenced` if the lease is lost, and `Interrupted` for one of the interrupts."""
        if self._lease.lost:
            raise Fenced("the lease is lost")
        given: dict[Interrupt, bool] = {
            "cancel": self._lease.cancelled,
            "pause": self._lease.pausing,
            "stop": self._stop.leaves,
            "deadline": self._stop.over,
        }
        for interrupt in interrupts:
            if given[interrupt]:
                raise Interrupted(interrupt)

    def __call__(
        self,
        action: Callable[[], T],
        interrupts: Collection[Interrupt],
        *,
        seconds: float | None = None,
        until: float | None = None,
    ) -> T:
        """Repeat an action that may raise `Unavailable` until it succeeds. Raises as `check` does, and `TooSlow`.

        `seconds` or `until` (a monotonic time) limits the time. An abandoned action continues in its thread to the end
        of its current request, which must do no harm.
        """
        if seconds is not None:
            until = time.monotonic() + seconds
        pauses = backoff(RETRY_SECONDS, LONGEST_RETRY_SECONDS)
        while True:
            attempt = _Attempt(action)
            self.wait(attempt.done.wait, interrupts, until=until)
            try:
                return attempt.result()
            except Unavailable as error:
                log.warning("waiting", reason=str(error))
            retry_at = time.monotonic() + next(pauses)
            self.wait(lambda slice_, at=retry_at: _sleep_until(at, slice_), interrupts, until=until)

    def wait(
        self, is_done: Callable[[float], bool], interrupts: Collection[Interrupt], *, until: float | None = None
    ) -> None:
        """Call `is_done` with short waits until it returns true. Raises as a call does; `until` is monotonic."""
        while True:
            self.check(interrupts)
            if is_done(LOOK_SECONDS):
                return
            if until is not None and time.monotonic() > until:
                raise TooSlow


class _Attempt(Generic[T]):
    """One attempt in a separate thread, so that a hung socket does not block the run."""

    def __init__(self, action: Callable[[], T]) -> None:
        self._action = action
        self._value: list[T] = []
        self._error: BaseException | None = None
        self.done = threading.Event()
        threading.Thread(target=self._run, name="attempt", daemon=True).start()

    def _run(self) -> None:
        try:
            self._value.append(self._action())
        except BaseException as error:  # noqa: BLE001 - raised again in the waiting thread
            self._error = error
        finally:
            self.done.set()

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._value[0]


def _sleep_until(moment: float, at_most: float) -> bool:
    left = moment - time.monotonic()
    time.sleep(max(0.0, min(left, at_most)))
    return left <= at_most
