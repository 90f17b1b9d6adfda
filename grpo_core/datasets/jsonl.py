"""JSONL data sets: the check during an upload, and reading in a run.

The user can correct a JSONL file, so each bad line is reported, up to `MAX_PROBLEMS`. Invariant: memory is bounded by
one line and the rows that are kept, for any input.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from grpo_core import strict_json
from grpo_core.datasets.row_reader import Needs, RowReader, UnusableRow, is_chat
from grpo_core.datasets.rows import (
    MAX_BYTES,
    MAX_COLUMNS,
    MAX_FIELD_CHARACTERS,
    MAX_ROWS,
    DatasetError,
    DatasetTooLargeError,
    Row,
    error,
    problem,
    text_of,
)
from grpo_core.spec import DataSection, Problem, pointer_of

MAX_LINE_BYTES = 256 * 1024
MAX_COLUMN_NAME = 128
MAX_PROBLEMS = 20
"""Largest number of bad lines that are reported. Reading stops at the next one, to report that there are more."""

_READ_BYTES = 64 * 1024
_BOM = b"\xef\xbb\xbf"
_WHITE_SPACE = b" \t\r\n"
_LINE_REMEDY = 'Put one JSON object on each line, such as {"question": "6+6=?", "answer": "12"}.'


@dataclass(frozen=True, kw_only=True)
class DatasetSummary:
    """Rows and columns of a checked JSONL file."""

    rows: int
    bytes: int
    sha256: str
    columns: list[str]
    """Columns with text or a number in every row, which a job may name, in order of first appearance."""
    fields: list[str] = field(default_factory=list[str])
    """Columns of any type that every row has, which graders may name."""
    chats: list[str] = field(default_factory=list[str])
    """Columns that hold a chat which ends with the user's turn in every row."""


class JsonlChecker:
    """Checks a JSONL data set as it arrives, in memory bounded by one line.

    `feed` raises as soon as the file is too large or 21 lines are bad, `finish` for fewer bad lines. Accepted: UTF-8
    with or without a byte order mark, LF or CRLF, blank lines (which do not count as rows), and columns of any JSON
    type. At least one column must hold text, a finite number or a chat in every row.
    """

    def __init__(
        self, *, max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES, max_line_bytes: int = MAX_LINE_BYTES
    ) -> None:
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._lines = _LineSplitter(max_line_bytes)
        self._problems = _LineProblems()
        self._hash = hashlib.sha256()
        self._bytes = 0
        self._rows = 0
        self._columns: list[str] = []
        self._fields: list[str] = []
        self._chats: list[str] = []
        self._incomplete: dict[str, int] = {}

    def feed(self, chunk: bytes) -> None:
        """Check the next bytes, which may be split anywhere."""
        self._bytes += len(chunk)
        if self._bytes > self._max_bytes:
            raise _too_large("too_many_bytes", f"the file has more than {self._max_bytes} bytes")
        self._hash.update(chunk)
        self._take(self._lines.feed(chunk))

    def finish(self) -> DatasetSummary:
        """Return the summary. Raises `DatasetError` if any line was bad."""
        self._take(self._lines.finish())
        self._problems.raise_any()
        if not self._rows:
            raise error("empty", "the file has no rows", _LINE_REMEDY)
        if not self._columns and not self._chats:
            remedy = "Give every line a question: a text, or a chat that ends with the user's turn."
            raise error("no_columns", self._why_no_columns(), remedy)
        return DatasetSummary(
            rows=self._rows,
            bytes=self._bytes,
            sha256=self._hash.hexdigest(),
            columns=list(self._columns),
            fields=list(self._fields),
            chats=list(self._chats),
        )

    def _take(self, lines: Iterable[_Line]) -> None:
        for line in lines:
            try:
                record = _parse(line)
            except _BadLineError as bad:
                self._problems.add(line.number, bad)
                continue
            if record is not None:
                self._add(line.number, record)

    def _add(self, number: int, record: dict[str, Any]) -> None:
        self._rows += 1
        if self._rows > self._max_rows:
            raise _too_large("too_many_rows", f"the file has more than {self._max_rows} rows")
        if self._rows == 1:
            self._columns, self._fields, self._chats = list(record), list(record), list(record)
        self._fields = [name for name in self._fields if name in record]
        self._chats = [name for name in self._chats if is_chat(record.get(name))]
        lost = [name for name in self._columns if text_of(record.get(name)) is None]
        for name in lost:
            self._columns.remove(name)
            self._incomplete[name] = number

    def _why_no_columns(self) -> str:
        lost = ", ".join(f"{name} has none in line {number}" for name, number in list(self._incomplete.items())[:5])
        return "no column holds text or a number in every row" + (f" ({lost})" if lost else "")


def read_jsonl(data: DataSection, path: Path, needs: Needs) -> list[Row]:
    """Return the rows of a file. Raises `DatasetError` if a line lacks anything that the job needs."""
    rows: list[Row] = []
    reader = RowReader(data, needs)
    problems = _LineProblems()
    seen: dict[str, None] = {}
    for line in _file_lines(path):
        if data.max_rows is not None and len(rows) >= data.max_rows:
            break
        try:
            record = _parse(line)
            if record is None:
                continue
            seen |= dict.fromkeys(list(record)[: MAX_COLUMNS - len(seen)])
            rows.append(reader.row(len(rows), record))
        except (_BadLineError, UnusableRow) as bad:
            if seen and not rows:
                reader.require_columns(list(seen))
            problems.add(line.number, bad)
    problems.raise_any()
    if not rows:
        raise error("empty", "the file has no rows", _LINE_REMEDY)
    return rows


def _file_lines(path: Path) -> Iterator[_Line]:
    splitter = _LineSplitter(MAX_LINE_BYTES)
    try:
        with path.open("rb") as file:
            while chunk := file.read(_READ_BYTES):
                yield from splitter.feed(chunk)
    except OSError as reason:
        detail = f"the file {path.name!r} cannot be read: {reason.strerror or reason}"
        raise error("unreadable_file", detail, "Check data.dataset.") from reason
    yield from splitter.finish()


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    """Line number, from 1."""
    raw: bytes | None
    """The bytes of the line; None if it is too long."""
    limit: int


class _BadLineError(Exception):
    def __init__(self, code: str, detail: str, remedy: str = _LINE_REMEDY) -> None:
        super().__init__(detail)
        self.code, self.detail, self.remedy = code, detail, remedy


class _LineProblems:
    """Collects bad lines, and raises once there are too many."""

    def __init__(self) -> None:
        self._found: list[Problem] = []

    def add(self, number: int, bad: _BadLineError | UnusableRow) -> None:
        if len(self._found) == MAX_PROBLEMS:
            raise DatasetError(self._found, more=True) from None
        pointer = pointer_of(("lines", number))
        self._found.append(Problem(pointer=pointer, code=bad.code, detail=bad.detail[:300], remedy=bad.remedy))

    def raise_any(self) -> None:
        if self._found:
            raise DatasetError(self._found) from None


class _LineSplitter:
    """Splits chunks into lines. Keeps at most one line, and no part of a line that is too long."""

    def __init__(self, max_line_bytes: int) -> None:
        self._limit = max_line_bytes
        self._held = bytearray()
        self._overflown = False
        self._number = 0

    def feed(self, chunk: bytes) -> Iterator[_Line]:
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            self._hold(chunk, start, end)
            yield self._line()
            start = end + 1
        self._hold(chunk, start, len(chunk))

    def finish(self) -> Iterator[_Line]:
        if self._held or self._overflown:
            yield self._line()

    def _hold(self, chunk: bytes, start: int, end: int) -> None:
        if self._overflown or len(self._held) + end - start > self._limit:
            self._overflown = True
            self._held.clear()
        else:
            self._held += memoryview(chunk)[start:end]

    def _line(self) -> _Line:
        self._number += 1
        raw = None if self._overflown else bytes(self._held)
        if raw is not None and self._number == 1:
            raw = raw.removeprefix(_BOM)
        self._held.clear()
        self._overflown = False
        return _Line(self._number, raw, self._limit)


def _parse(line: _Line) -> dict[str, Any] | None:
    """Return the object on a line; None for a blank line. Raises `_BadLineError`."""
    if line.raw is None:
        raise _BadLineError("line_too_long", f"is longer than {line.limit} bytes", "Shorten or remove it.")
    if not line.raw.strip(_WHITE_SPACE):
        return None
    try:
        record = strict_json.loads(line.raw)
    except strict_json.StrictJsonError as reason:
        remedy = reason.remedy if reason.path else _remedy(line.number, line.raw)
        raise _BadLineError("bad_json", _json_detail(reason), remedy) from reason
    if not isinstance(record, dict):
        raise _BadLineError("not_an_object", "is not a JSON object", _remedy(line.number, line.raw))
    _check_columns(cast("dict[str, Any]", record))
    return cast("dict[str, Any]", record)


def _remedy(number: int, raw: bytes) -> str:
    """Return the remedy for a line that is not an object, by the format that the file seems to have."""
    start = raw.lstrip(_WHITE_SPACE)
    if number == 1:
        for looks_so, remedy in _OTHER_FORMATS:
            if looks_so(start):
                return remedy
    if _are_objects_in_a_row(start):
        return "Put each object on a separate line; with curl send the file by --data-binary, because -d joins lines."
    if start.startswith(b"{'"):
        return "Write names and text in double quotes: json.dumps does, Python's print does not."
    try:
        raw.decode()
    except UnicodeDecodeError:
        return "Save the file as UTF-8, for example with: iconv -f GB18030 -t UTF-8 (-f names its present encoding)."
    return _LINE_REMEDY


def _are_objects_in_a_row(start: bytes) -> bool:
    """Whether a complete object is followed by the start of another."""
    text = start.decode(errors="replace")
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return text.startswith("{") and text[end:].lstrip().startswith("{")


def _converted(kind: str, reader: str) -> str:
    how = f"import pandas; pandas.{reader}.to_json('data.jsonl', orient='records', lines=True, force_ascii=False)"
    return f'This looks like {kind}; convert it to JSON lines, for example with: python -c "{how}".'


def _is_csv(start: bytes) -> bool:
    return bool(re.match(rb"[^{}\[\]:,;\t]+([,;\t][^{}\[\]:,;\t]+)+\r?$", start))


_OTHER_FORMATS: tuple[tuple[Callable[[bytes], bool], str], ...] = (
    (lambda start: start.startswith(b"PAR1"), _converted("Parquet", "read_parquet('FILE')")),
    (lambda start: start.startswith(b"\x1f\x8b"), "This is compressed; unpack it first, with gunzip."),
    (lambda start: start[:2] in (b"\xff\xfe", b"\xfe\xff"), "Save the file as UTF-8; this is UTF-16."),
    (lambda start: start.startswith(b"["), _converted("one JSON list", "read_json('FILE')")),
    (_is_csv, _converted("CSV", "read_csv('FILE', sep=None, engine='python', encoding='utf-8-sig', dtype=str)")),
)


def _json_detail(reason: strict_json.StrictJsonError) -> str:
    """Return the parser's message without its line number, which is always 1."""
    cause = reason.__cause__
    if isinstance(cause, json.JSONDecodeError):
        return f"is not JSON: {cause.msg} at column {cause.colno}"
    return f"cannot be read: {f'{reason.pointer}: {reason.detail}' if reason.path else str(reason).rstrip('.')}"


def _check_columns(record: dict[str, Any]) -> None:
    if len(record) > MAX_COLUMNS:
        raise _BadLineError(
            "too_many_columns", f"has {len(record)} columns; at most {MAX_COLUMNS} are accepted", "Drop some."
        )
    for name, value in record.items():
        if not 0 < len(name) <= MAX_COLUMN_NAME:
            detail = f"has a column name of {len(name)} characters"
            raise _BadLineError("bad_column_name", detail, f"Use names of 1 to {MAX_COLUMN_NAME} characters.")
        if isinstance(value, str) and len(value) > MAX_FIELD_CHARACTERS:
            detail = f"has {len(value)} characters in {name!r}; at most {MAX_FIELD_CHARACTERS} are accepted"
            raise _BadLineError("field_too_long", detail, "Shorten the text or remove the line.")


def _too_large(code: str, detail: str) -> DatasetTooLargeError:
    return DatasetTooLargeError([problem(code, detail, "Send fewer rows, or split the file.")])
