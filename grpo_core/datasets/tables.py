"""Reads a data file record by record: JSON lines, JSON lists, CSV, and Parquet (by `parquet`).

Owns the decoding of untrusted files: a file is never read whole, and no value in it is interpreted. Invariant: memory
is bounded by one record and one block, no matter how large a file becomes when it is decompressed.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import json
import lzma
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, BinaryIO, Final, Protocol, cast

from grpo_core.datasets.card import Subset
from grpo_core.datasets.files import DataFile
from grpo_core.datasets.parquet import read_parquet
from grpo_core.datasets.row_reader import Columns
from grpo_core.datasets.rows import DatasetTooLargeError, error, problem

MAX_RECORD_BYTES: Final = 8 * 1024**2
"""Largest line, record or CSV field: eight thousand times the size of a usual question."""
MAX_DECODED_BYTES: Final = 16 * 1024**3
"""Largest part of one file that is read, after decompression."""

_LARGE_RECORD = f"a record of more than {MAX_RECORD_BYTES // 1024**2} MiB"
_SPACE = re.compile(r"\s*")
_CHUNK = 256 * 1024
_XZ_MEMORY = 256 * 1024**2
_TYPED_TOGETHER = 10_000
"""Number of CSV rows that decide together whether a column holds numbers."""
_TYPED_BYTES = 64 * 1024**2
_NO_VALUE = frozenset(
    ("", *"#N/A #NA -1.#IND -1.#QNAN -NaN -nan 1.#IND 1.#QNAN <NA> N/A NA NULL NaN None n/a nan null".split())
)

Record = Mapping[str, Any]


class _Source(Protocol):
    def read(self, size: int, /) -> bytes: ...


def read_records(
    raw: BinaryIO, file: DataFile, subset: Subset, columns: Columns, *, typed: bool = True
) -> Iterator[Record]:
    """Yield the records of a file. The first has every column as a key, so that missing columns can be reported.

    With `typed`, CSV columns that hold only numbers become numbers; otherwise CSV values stay text.
    """
    if file.kind == "parquet":
        return read_parquet(raw, columns)
    chunks = _chunks(raw, file.compression)
    if file.kind == "json":
        return _read_json(_Text(chunks))
    text = _Text(chunks)
    separator = subset.separator or ("\t" if file.kind == "tsv" else "," if typed else _separator(text))
    return _read_csv(text, separator, columns, typed=typed)


def _chunks(raw: BinaryIO, compression: str | None) -> Iterator[bytes]:
    """Yield the bytes of a file, decompressed in pieces."""
    total = 0
    with closing(cast("Any", _decompressed(raw, compression))) as source:
        while chunk := cast("_Source", source).read(_CHUNK):
            total += len(chunk)
            if total > MAX_DECODED_BYTES:
                raise _too_large(f"a file of more than {MAX_DECODED_BYTES // 1024**3} GiB")
            yield chunk


def _decompressed(raw: BinaryIO, compression: str | None) -> _Source:
    match compression:
        case "gz":
            return gzip.GzipFile(fileobj=raw)
        case "bz2":
            return bz2.BZ2File(raw)
        case "xz":
            return _Xz(raw)
        case "zst":
            import pyarrow as pa

            return pa.CompressedInputStream(raw, "zstd")
        case _:
            return raw


class _Xz:
    """An xz file, with a memory limit. The file's header sets how much memory is needed, and `lzma.LZMAFile` has no
    limit."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._decoder = self._new()

    def _new(self) -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(memlimit=_XZ_MEMORY)

    def read(self, size: int) -> bytes:
        while True:
            if self._decoder.eof:
                rest = self._decoder.unused_data or self._raw.read(_CHUNK)
                if not rest:
                    return b""
                self._decoder = self._new()
            else:
                rest = self._raw.read(_CHUNK) if self._decoder.needs_input else b""
                if self._decoder.needs_input and not rest:
                    raise EOFError("the compressed file ends before its end mark")
            if chunk := self._decoder.decompress(rest, size):
                return chunk

    def close(self) -> None:
        self._raw.close()


class _Text:
    """Decoded text in a window from the read position on, which holds little more than one record and one chunk."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.window = ""
        self.at = 0
        """Read position in the window."""

    def more(self) -> bool:
        """Drop the text that was read and add a chunk; False at the end. Raises if a record is too large."""
        self.window, self.at = self.window[self.at :], 0
        if len(self.window) > MAX_RECORD_BYTES:
            raise _too_large(_LARGE_RECORD)
        chunk = next(self._chunks, None)
        self.window += self._decode(chunk or b"", chunk is None)
        return chunk is not None

    def lines(self) -> Iterator[str]:
        """Yield each line with its line end."""
        looked = self.at
        while True:
            end = self.window.find("\n", looked)
            if end >= 0:
                line = self.window[self.at : end + 1]
                self.at = looked = end + 1
                yield line
                continue
            looked = len(self.window) - self.at
            if not self.more():
                break
        if self.window:
            yield self.window

    def skip_space(self) -> str:
        """Move to the next character that is not white space, and return it; empty at the end."""
        while True:
            self.at = cast("re.Match[str]", _SPACE.match(self.window, self.at)).end()
            if self.at < len(self.window) or not self.more():
                return self.window[self.at : self.at + 1]


def _read_json(text: _Text) -> Iterator[Record]:
    return _listed(text) if text.skip_space() == "[" else _lined(text)


def _lined(text: _Text) -> Iterator[Record]:
    for number, line in enumerate(text.lines(), 1):
        if len(line) > MAX_RECORD_BYTES:
            raise _too_large(_LARGE_RECORD)
        if line.strip():
            yield _object(line, number)


def _object(line: str, number: int) -> Record:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as reason:
        why = "is nested too deeply" if isinstance(reason, RecursionError) else "is not JSON"
        raise _bad_record(number, why) from reason
    return _require_object(value, number)


def _listed(text: _Text) -> Iterator[Record]:
    """Yield the objects of a JSON list."""
    decoder = json.JSONDecoder()
    text.at += 1
    number = 0
    while (first := text.skip_space()) != "]":
        if number:
            if first != ",":
                raise _bad_record(number, "is not followed by another, nor by the end of the list")
            text.at += 1
            text.skip_space()
        number += 1
        value = _next_value(text, decoder, number)
        yield _require_object(value, number)


def _next_value(text: _Text, decoder: json.JSONDecoder, number: int) -> Any:
    while True:
        # A number may continue in the next chunk; every other value has an end mark.
        try:
            value, text.at = decoder.raw_decode(text.window, text.at)
        except RecursionError as reason:
            raise _bad_record(number, "is nested too deeply") from reason
        except ValueError as reason:
            if not text.more():
                raise _bad_record(number, "is not JSON") from reason
            continue
        return value


def _require_object(value: Any, number: int) -> Record:
    if not isinstance(value, dict):
        raise _bad_record(number, "is not a JSON object")
    return cast("Record", value)


def _separator(text: _Text) -> str:
    """Return the most likely separator of a spreadsheet program, by the first line."""
    while "\n" not in text.window and text.more():
        pass
    first = text.window.partition("\n")[0]
    return max(",;\t", key=first.count)


def _read_csv(text: _Text, separator: str, columns: Columns, *, typed: bool) -> Iterator[Record]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    lines = _Lines(text.lines())
    reader = csv.reader(lines, delimiter=separator)
    header = next(reader, [])
    if any(name not in header for name in columns.required):
        yield dict.fromkeys(header)
        return
    # A column without a name holds row numbers, which some programs write first.
    every = [name for name in dict.fromkeys(header) if name.strip()]
    names = [name for name in every if columns.everything or name in columns.required or name in columns.optional]
    places = [header.index(name) for name in names]
    held: list[list[str | None]] = []
    size = 0
    for fields in reader:
        size += lines.taken()
        if not fields:
            continue
        held.append([fields[place] if place < len(fields) else None for place in places])
        if len(held) == _TYPED_TOGETHER or size > _TYPED_BYTES:
            yield from _made(held, header, names, typed=typed)
            held, size = [], 0
    yield from _made(held, header, names, typed=typed)


class _Lines:
    """Lines for the CSV reader, which joins lines to one record while a quotation mark is open."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._taken = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._taken += len(line)
        if self._taken > MAX_RECORD_BYTES:
            raise _too_large(_LARGE_RECORD)
        return line

    def taken(self) -> int:
        """Number of characters of the record that was read."""
        taken, self._taken = self._taken, 0
        return taken


def _made(
    rows: Sequence[Sequence[str | None]], header: Sequence[str], names: Sequence[str], *, typed: bool
) -> Iterator[Record]:
    """Make records from rows. With `typed`, columns of numbers become numbers, and 12.0 becomes 12, as in a column of
    integers with gaps."""
    if not rows:
        return
    if not typed:
        yield from ({name: value or None for name, value in zip(names, row, strict=True)} for row in rows)
        return
    converted = [_column(column) for column in zip(*rows, strict=True)]
    everything = dict.fromkeys(header)
    for values in zip(*converted, strict=True):
        yield {**everything, **dict(zip(names, values, strict=True))}


def _column(values: Sequence[str | None]) -> list[str | int | float | None]:
    present = [None if value is None or value.strip() in _NO_VALUE else value for value in values]
    numbers: list[str | int | float | None] = []
    for value in present:
        number = None if value is None else _number(value)
        if value is not None and number is None:
            return list(present)
        numbers.append(number)
    return numbers


def _number(text: str) -> int | float | None:
    if "_" in text or len(text) > 400:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


def _bad_record(number: int, why: str) -> Exception:
    remedy = "Try another revision, or upload the rows as JSONL."
    return error("unreadable", f"record {number} of a file of the data set {why}", remedy, "/data/dataset")


def _too_large(what: str) -> DatasetTooLargeError:
    remedy = "Set data.max_rows to use only the first rows, or upload the rows that you need as JSONL."
    return DatasetTooLargeError([problem("too_large", f"the data set has {what}", remedy, "/data/dataset")])
