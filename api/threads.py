"""Threads for calls that wait or compute, shared fairly: one owner's slow calls leave room for everyone else's.

Owns which call is next. `OWNER`, set by the authentication, says whose a call is.
Invariants: no owner has more than a share of the threads, owners take turns, and what one may have waiting is bounded.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import ParamSpec, TypeVar

from api.problems import ApiError

P = ParamSpec("P")
T = TypeVar("T")

OWNER: ContextVar[str] = ContextVar("grpo_owner", default="")
"""Whose request is being served; empty before that is known, which counts as one owner more."""


class FairThreads(ThreadPoolExecutor):
    """An executor that serves owners in turn."""

    def __init__(self, threads: int, *, per_owner: int, waiting: int | None = None, name: str) -> None:
        """`waiting`: how many calls of one owner may wait for a thread; None is any number."""
        super().__init__(threads, thread_name_prefix=name)
        self._threads_in_all, self._per_owner, self._most_waiting = threads, min(per_owner, threads), waiting
        self._turns: threading.Lock = threading.Lock()
        self._waiting: OrderedDict[str, deque[tuple[Future[object], Callable[[], object]]]] = OrderedDict()
        """By owner; the one whose turn is next comes first."""
        self._running: Counter[str] = Counter()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call it in a thread when it is its owner's turn. Raises `ApiError` where too many wait."""
        owner = OWNER.get()
        future: Future[T] = Future()
        with self._turns:
            waiting = self._waiting.setdefault(owner, deque())
            if self._most_waiting is not None and len(waiting) >= self._most_waiting:
                raise ApiError(
                    "too_many_requests",
                    f"{self._most_waiting} of your requests wait to be served by this process, as many as one owner's "
                    "may (GRPO_MAX_OWNER_REQUESTS). Send fewer at once.",
                    headers={"Retry-After": "1"},
                )
            waiting.append((future, partial(fn, *args, **kwargs)))  # type: ignore[arg-type]
        self._go_on()
        return future

    def _go_on(self) -> None:
        """Give free threads to those who wait."""
        with self._turns:
            while self._running.total() < self._threads_in_all:
                owner = next((name for name in self._waiting if self._running[name] < self._per_owner), None)
                if owner is None:
                    return
                future, call = self._waiting[owner].popleft()
                self._waiting.move_to_end(owner)
                if not self._waiting[owner]:
                    del self._waiting[owner]
                self._running[owner] += 1
                try:
                    super().submit(self._run, owner, future, call)
                except RuntimeError:  # shut down
                    self._running[owner] -= 1
                    future.cancel()

    def _run(self, owner: str, future: Future[object], call: Callable[[], object]) -> None:
        try:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # noqa: BLE001 - passed to the waiting caller
                    future.set_exception(error)
        finally:
            with self._turns:
                self._running[owner] -= 1
                if not self._running[owner]:
                    del self._running[owner]
            self._go_on()
