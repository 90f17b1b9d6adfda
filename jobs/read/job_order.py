"""The order of a list of jobs by one of their fields, and the cursors of its pages.

Owns what is compared and where the next page begins; which jobs are listed is up to the caller. Invariants: jobs with
equal values come newest first in either direction, and those without a value last; a cursor holds the value and the id
of the last job of its page, so that jobs that are added or removed meanwhile move no other to another page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

from jobs.errors import BadCursor
from jobs.read.cursors import decode, encode
from jobs.store.job import JobStatus, Priority

OrderName = Literal[
    "created",
    "-created",
    "updated",
    "-updated",
    "name",
    "-name",
    "status",
    "-status",
    "priority",
    "-priority",
    "owner",
    "-owner",
    "reward",
    "-reward",
]
"""What a list of jobs is sorted by; with a minus, from the largest."""

_STATUSES: Final = [status.value for status in JobStatus]
_PRIORITIES: Final = [Priority.LOW.value, Priority.NORMAL.value, Priority.HIGH.value]


def _number(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


_VALUES: Final[dict[str, tuple[str, Callable[[str], Any]]]] = {
    "created": ("id", str),
    "updated": ("updated_at", int),
    "name": ("name", str.casefold),
    "status": ("status", _STATUSES.index),
    "priority": ("priority", _PRIORITIES.index),
    "owner": ("owner", str),
    "reward": ("reward", _number),
}
"""The field of the record, and what its text is compared by."""


@dataclass(frozen=True)
class JobOrder:
    """What jobs are sorted by."""

    name: str
    """As `OrderName`."""

    @classmethod
    def of(cls, name: str | None) -> Self | None:
        """The order by its name; None for that in which jobs are stored, newest first."""
        return None if name in (None, "-created") else cls(name)

    @property
    def field(self) -> str:
        """The field of the record that is compared; `id` needs no look at the record."""
        return _VALUES[self.name.removeprefix("-")][0]

    def page(self, jobs: Iterable[tuple[str, str]], *, limit: int, cursor: str | None) -> tuple[list[str], str | None]:
        """The ids of a page of jobs, given each with its value as text, and the cursor of the next page.

        Raises `BadCursor`.
        """
        valued = [(self._value(text), job_id) for job_id, text in jobs]
        if cursor is not None:
            last = self._decode(cursor)
            try:
                valued = [each for each in valued if self._is_behind(each, last)]
            except TypeError:
                raise BadCursor("is the cursor of another list") from None
        valued.sort(key=lambda each: each[1], reverse=True)
        known = sorted((each for each in valued if each[0] is not None), key=lambda each: each[0], reverse=self._falls)
        every = [*known, *(each for each in valued if each[0] is None)]
        page = every[:limit]
        return [job_id for _, job_id in page], self._encode(page[-1]) if len(every) > limit else None

    @property
    def _falls(self) -> bool:
        return self.name.startswith("-")

    def _value(self, text: str) -> Any:
        try:
            return _VALUES[self.name.removeprefix("-")][1](text) if text else None
        except ValueError:
            return None

    def _is_behind(self, each: tuple[Any, str], last: tuple[Any, str]) -> bool:
        if each[0] == last[0]:
            return each[1] < last[1]
        if each[0] is None or last[0] is None:
            return each[0] is None
        return bool(each[0] < last[0] if self._falls else each[0] > last[0])

    def _encode(self, last: tuple[Any, str]) -> str:
        return encode([self.name, *last])

    def _decode(self, cursor: str) -> tuple[Any, str]:
        found: Any = decode(cursor)
        if not isinstance(found, list) or len(found) != 3 or found[0] != self.name or not isinstance(found[2], str):
            raise BadCursor("is the cursor of another order")
        return found[1], found[2]
