"""Places that are limited in number, of one owner and in all: event streams, uploads, searches through a list.

Owns the counting and the refusal, which names the limit and whose it is. Invariant: a place is free again when it is
released or, where nobody could, when nothing refers to it any more.
"""

from __future__ import annotations

import threading
from collections import Counter
from types import TracebackType
from typing import Self

from api.problems import ApiError
from jobs.auth.rate_limit import Allowance, note_allowance


class Place:
    """One place that is taken; use it in a `with` block or release it."""

    def __init__(self, places: Places, owner: str) -> None:
        self._places, self._owner = places, owner
        self._is_taken = True

    def release(self) -> None:
        """Free it; again does nothing."""
        if self._is_taken:
            self._is_taken = False
            self._places.free(self._owner)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


class Places:
    """The places of one kind in one process. Thread-safe."""

    def __init__(self, code: str, what: str, *, per_owner: int, in_all: int, settings: tuple[str, str]) -> None:
        """`what`: in the plural, for the refusal. `settings`: the variables that hold the two limits."""
        self._code, self._what, self._name = code, what, code.removeprefix("too_many_").replace("_", "-")
        self._per_owner, self._in_all = per_owner, in_all
        self._settings = settings
        self._taken: Counter[str] = Counter()
        # Reentrant: a place may be collected, and so freed, while another is being taken.
        self._lock = threading.RLock()

    def take(self, owner: str) -> Place:
        """Raises `ApiError` where none is left."""
        with self._lock:
            if self._taken.total() >= self._in_all:
                raise self._refusal(f"{self._in_all} {self._what} are open here, as many as this process serves", 1)
            if self._taken[owner] >= self._per_owner:
                raise self._refusal(f"You have {self._per_owner} {self._what}, as many as one owner may have here", 0)
            self._taken[owner] += 1
            left = min(self._per_owner - self._taken[owner], self._in_all - self._taken.total())
        note_allowance(Allowance(name=self._name, most=min(self._per_owner, self._in_all), left=left))
        return Place(self, owner)

    def free(self, owner: str) -> None:
        """For `Place` only."""
        with self._lock:
            self._taken[owner] -= 1
            if not self._taken[owner]:
                del self._taken[owner]

    def _refusal(self, reason: str, setting: int) -> ApiError:
        detail = f"{reason} ({self._settings[setting]}). Close some, or wait until one has ended."
        return ApiError(self._code, detail, headers={"Retry-After": "5"})
