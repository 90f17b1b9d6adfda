"""Waiting for servers without becoming deaf: each exchange runs beside, while the run looks at what it must obey.

Owns the retries of everything a run asks of Valkey and object storage outside the shipper. Invariants: nothing is
begun once the lease is lost, and an order is heeded within a fraction of a second, whatever a server does meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from typing import Generic, Literal, TypeVar

import structlog

from jobs.errors import Fenced, Unavailable
from jobs.lease import Lease
from jobs.stopping import StopOrder

log = structlog.get_logger()

T = TypeVar("T")

Order = Literal["cancel", "pause", "stop", "deadline"]
"""What can end a wait: the owner's cancel or pause, a worker asked to stop, and the end of its grace."""

LOOK_SECONDS = 0.1
RETRY_SECONDS = 0.5
LONGEST_RETRY_SECONDS = 15.0
"""The first and the longest pause before a server is asked again; the shipper's too."""


class Interrupted(Exception):
    """An order came that the caller said it would heed."""

    def __init__(self, order: Order) -> None:
        self.order: Order = order
        super().__init__(order)


class TooSlow(Exception):
    """The time a caller gave was not enough; what it asked for may still happen."""


class Patience:
    """The patience of one run."""

    def __init__(self, lease: Lease, stop: StopOrder) -> None:
        self._lease = lease
        self._stop = stop

    def check(self, heed: Collection[Order]) -> None:
        """Raise `Fenced` where the lease is lost, and `Interrupted` for an order that is to be heeded."""
        if self._lease.lost:
            raise Fenced("the lease is lost")
        given: dict[Order, bool] = {
            "cancel": self._lease.cancelled,
            "pause": self._lease.pausing,
            "stop": self._stop.asked,
            "deadline": self._stop.over,
        }
        for order in heed:
            if given[order]:
                raise Interrupted(order)

    def __call__(
        self,
        action: Callable[[], T],
        heed: Collection[Order],
        *,
        seconds: float | None = None,
        until: float | None = None,
    ) -> T:
        """Do something that may raise `Unavailable` until it works. Raises as `check` does, and `TooSlow`.

        It may take so many seconds, or until a monotonic moment. What is given up goes on in its thread to the end
        of the exchange at hand, so it must do no harm.
        """
        if seconds is not None:
            until = time.monotonic() + seconds
        delay = RETRY_SECONDS
        while True:
            attempt = _Attempt(action)
            self.wait(attempt.done.wait, heed, until=until)
            try:
                return attempt.result()
            except Unavailable as error:
                log.warning("waiting", reason=str(error))
            retry_at = time.monotonic() + delay
            self.wait(lambda slice_, at=retry_at: _sleep_until(at, slice_), heed, until=until)
            delay = min(delay * 2, LONGEST_RETRY_SECONDS)

    def wait(self, is_done: Callable[[float], bool], heed: Collection[Order], *, until: float | None = None) -> None:
        """Wait in small slices, each `is_done(seconds)`, until one is true. Raises as above; `until` is monotonic."""
        while True:
            self.check(heed)
            if is_done(LOOK_SECONDS):
                return
            if until is not None and time.monotonic() > until:
                raise TooSlow


class _Attempt(Generic[T]):
    """One try in a thread of its own, so that a hung socket holds up nobody else."""

    def __init__(self, action: Callable[[], T]) -> None:
        self._action = action
        self._value: list[T] = []
        self._error: BaseException | None = None
        self.done = threading.Event()
        threading.Thread(target=self._run, name="attempt", daemon=True).start()

    def _run(self) -> None:
        try:
            self._value.append(self._action())
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits for it
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
