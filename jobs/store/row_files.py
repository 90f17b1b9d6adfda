"""Files of JSON lines in a bucket, read from any row on.

Owns pages of rows and an index of where rows begin, which is kept in memory, since a file of a given name never
changes. Invariant: rows are counted as training counts them, from 0 and without blank lines.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

from grpo_core import strict_json
from jobs.errors import BadCursor

ROWS_BYTES: Final = 1024 * 1024
"""Bytes of rows after which a page ends."""
SEARCHED_BYTES: Final = 16 * 1024 * 1024
"""Bytes of rows after which a page of a search ends, whatever was found."""
_EVERY: Final = 1000
"""Rows from one place in the index to the next."""
_MOST_INDEXES: Final = 64
_BOM: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a page of rows starts in the file."""

    row: int
    byte: int


@dataclass(frozen=True, kw_only=True)
class StoredRow:
    """One row as it is stored."""

    row: int
    values: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RowPage:
    """Some rows, and where the next ones start; None at the end."""

    rows: list[StoredRow]
    next: Place | None


@dataclass(frozen=True, kw_only=True)
class RowFile:
    """A file of JSON lines."""

    name: str
    """What it is and which version: other content has another name."""
    open: Callable[[], BinaryIO]
    rows: int | None
    """How many rows it has, where that is known."""


@dataclass(frozen=True, slots=True)
class RowIndex:
    """How many rows a file has, and where every thousandth begins."""

    rows: int
    bytes: tuple[int, ...]

    def before(self, row: int) -> Place:
        """Where to begin to read, so that the row comes soon."""
        entry = min(row // _EVERY, len(self.bytes) - 1)
        return Place(row=entry * _EVERY, byte=self.bytes[entry]) if entry > 0 else Place(row=0, byte=0)


class RowIndexes:
    """The indexes of the files that were read last. Thread-safe."""

    def __init__(self) -> None:
        self._found: OrderedDict[str, RowIndex] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, file: RowFile) -> RowIndex:
        """Return a file's index; the first time the whole file is read."""
        with self._lock:
            if file.name in self._found:
                self._found.move_to_end(file.name)
                return self._found[file.name]
        index = _index(file)
        with self._lock:
            self._found[file.name] = index
            while len(self._found) > _MOST_INDEXES:
                self._found.popitem(last=False)
        return index


def read_page(
    file: BinaryIO,
    limit: int,
    place: Place | None = None,
    *,
    first: int = 0,
    end: int | None = None,
    matches: Callable[[dict[str, Any]], bool] | None = None,
) -> RowPage:
    """Return the next rows that match, from a place on: from the row `first` on, and up to `end`.

    As far as `ROWS_BYTES` of rows, or `SEARCHED_BYTES` of the file, reach. Raises `BadCursor` and `StrictJsonError`.
    """
    place = place or Place(row=0, byte=0)
    found: list[StoredRow] = []
    # Together with the end of the row before: a place that was made up may lie within a row.
    file.seek(max(0, place.byte - 1))
    if place.byte and file.read(1) != b"\n":
        raise BadCursor("is not of this data set")
    at, row, taken, looked = place.byte, place.row, 0, 0
    while len(found) < limit and taken < ROWS_BYTES and looked < SEARCHED_BYTES:
        if end is not None and row >= end:
            return RowPage(rows=found, next=None)
        line = file.readline()
        if not line:
            return RowPage(rows=found, next=None)
        at += len(line)
        if not line.strip():
            continue
        if row >= first:
            looked += len(line)
            values = strict_json.loads(line.removeprefix(_BOM) if row == 0 else line)
            if matches is None or matches(values):
                taken += len(line)
                found.append(StoredRow(row=row, values=values))
        row += 1
    is_last = (end is not None and row >= end) or not file.read(1)
    return RowPage(rows=found, next=None if is_last else Place(row=row, byte=at))


def _index(file: RowFile) -> RowIndex:
    places: list[int] = []
    rows = at = 0
    with file.open() as lines:
        for line in lines:
            if line.strip():
                if rows % _EVERY == 0:
                    places.append(at)
                rows += 1
            at += len(line)
    return RowIndex(rows, tuple(places))
