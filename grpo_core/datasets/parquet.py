"""Reads the columns of a Parquet file page by page, after a check of the size of every page.

Owns the checks of a Parquet file's metadata, also for files that other modules decode (`require_bounded`). The footer
may claim anything, and a page of some kilobytes may decompress to gigabytes, so the headers of all pages are read
first, without decoding data. Invariant: columns are decoded page by page, and no page larger than `MAX_PAGE_BYTES` is
decoded.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from grpo_core.datasets.card import is_plain_feature, not_plain, require_plain
from grpo_core.datasets.row_reader import Columns
from grpo_core.datasets.rows import DatasetTooLargeError, problem

MAX_PAGE_BYTES: Final = 256 * 1024**2
"""Largest page after decompression; most writers make pages of 1 MiB."""
MAX_FOOTER_BYTES: Final = 64 * 1024**2
MAX_WALKED_FOOTER_BYTES: Final = 8 * 1024**2
"""Largest footer that this module parses without pyarrow: about 2,000 row groups of rollouts."""

MAX_NESTED_VALUES: Final = 16 * 1024**2
"""Largest number of values in the lists of one column of a row group."""
MAX_NESTED_BYTES: Final = 256 * 1024**2
"""Largest size of the Python lists and objects of one batch of rows."""

_BATCH = 1024
_NESTED_BATCH = 64
_BUFFER_BYTES = 1024**2
_HEADER_BYTES = 64 * 1024
_MAX_DEPTH = 8
_REMEDY = "Try another revision, or upload the rows as JSONL."

# Accepted values of Parquet's `Encoding`. DELTA_BYTE_ARRAY (7) is left out: in it, each text can repeat the whole text
# before it, so a page can decode to a thousand times its size.
_ENCODINGS = frozenset((0, 2, 3, 4, 5, 6, 8, 9))


def read_parquet(raw: BinaryIO, columns: Columns) -> Iterator[Mapping[str, Any]]:
    """Yield the records. The first has every column of the file as a key."""
    import pyarrow.parquet as pq

    _require_small_footer(raw)
    metadata = pq.ParquetFile(raw).metadata
    schema = metadata.schema.to_arrow_schema()
    if any(name not in schema.names for name in columns.required):
        yield dict.fromkeys(schema.names)
        return
    _require_plain(schema, columns)
    names = _names(schema, columns)
    leaves = _leaves(schema, names)
    paths = [metadata.schema.column(leaf).path for leaf in leaves]
    everything = {} if columns.everything else dict.fromkeys(schema.names)
    # Read texts as indices into a dictionary: a text that a page repeats a million times takes memory once.
    file = pq.ParquetFile(raw, metadata=metadata, read_dictionary=paths, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    rows = _BATCH if not any(leaves.values()) else _NESTED_BATCH
    for group in range(file.num_row_groups):
        _require_small_pages(raw, file.metadata.row_group(group), leaves)
        for batch in file.iter_batches(rows, row_groups=[group], columns=paths, use_threads=False):
            values = [_values(batch.column(name)) for name in names]
            for record in zip(*values, strict=True):
                yield {**everything, **dict(zip(names, record, strict=True))}


def _names(schema: Any, columns: Columns) -> list[str]:
    """Return the columns to read: the required ones, and those of the others that can be read."""
    declared = _declared(schema, schema.names)
    found = list(columns.required)
    for name in schema.names:
        is_wanted = columns.everything or name in columns.optional
        is_plain = name not in declared or is_plain_feature(declared[name])
        if is_wanted and name not in columns.required and is_plain and _is_readable(schema.field(name).type):
            found.append(name)
    return found


def _leaves(schema: Any, names: Sequence[str]) -> dict[int, bool]:
    """Return the index of each leaf column to read, and whether it is inside a list."""
    import pyarrow as pa

    found: dict[int, bool] = {}
    at = 0
    for field in schema:
        count = _count_leaves(field.type)
        if field.name in names:
            found |= dict.fromkeys(range(at, at + count), bool(pa.types.is_nested(field.type)))
        at += count
    return found


def _count_leaves(kind: Any) -> int:
    import pyarrow as pa

    if not pa.types.is_nested(kind):
        return 1
    return sum(_count_leaves(kind.field(index).type) for index in range(kind.num_fields))


def require_bounded(raw: BinaryIO, *, rows: int, group_bytes: int) -> None:
    """Raise `ValueError` if a column has more than `rows` values, or a row group more bytes after decompression.

    Decodes no data and needs no pyarrow, so every reader of a file that training wrote can call it first. A text that a
    column repeats counts once: read texts with `read_dictionary`, or with polars, which does not copy them.
    """
    groups = _row_groups(raw)
    if sum(group.rows for group in groups) > rows:
        raise ValueError(f"it has more than {rows} rows")
    values: Counter[int] = Counter()
    for group in groups:
        size = 0
        for column, (start, length) in enumerate(group.chunks):
            for page in _pages(raw, start, length):
                size += page.uncompressed
                values[column] += page.values
                if not page.encodings <= _ENCODINGS:
                    raise ValueError("a page has an encoding that is not read")
                if size > group_bytes:
                    raise ValueError(f"a row group has more than {group_bytes} bytes")
                if values[column] > rows:
                    raise ValueError(f"it has more than {rows} rows")
    raw.seek(0)


def read_bounded(
    source: Path, *, rows: int, group_bytes: int, group: int | None = None, columns: list[str] | None = None
) -> Any:
    """Read an untrusted file, or one row group of it, as a table.

    Raises `ValueError` as `require_bounded` does, for nested columns, and if repeated texts would take more than
    `group_bytes`.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with source.open("rb") as raw:
        require_bounded(raw, rows=rows, group_bytes=group_bytes)
    schema = pq.read_schema(source)
    if nested := [field.name for field in schema if pa.types.is_nested(field.type)]:
        raise ValueError(f"the column {nested[0]} is nested")
    plain = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    texts = [field.name for field in schema if any(matches(field.type) for matches in plain)]
    with pq.ParquetFile(source, read_dictionary=texts) as file:
        groups = range(file.num_row_groups) if group is None else [group]
        table = file.read_row_groups(list(groups), columns=columns, use_threads=False)
    size = 0
    for name in {*texts} & {*table.column_names}:
        for chunk in table.column(name).chunks:
            lengths = pc.cast(pc.call_function("binary_length", [chunk.dictionary]), pa.int64())
            size += pc.call_function("sum", [lengths.take(chunk.indices)]).as_py() or 0
    if size > group_bytes:
        raise ValueError(f"its texts have more than {group_bytes} bytes")
    return table.cast(pa.schema([schema.field(name) for name in table.column_names], schema.metadata))


def _values(column: Any) -> list[Any]:
    """Convert a column to Python values. A text that it repeats becomes one object."""
    import pyarrow as pa

    if pa.types.is_nested(column.type):
        if _size(column) > MAX_NESTED_BYTES:
            raise _too_large(f"lists of more than {MAX_NESTED_BYTES // 1024**2} MiB in {_NESTED_BATCH} rows")
        return column.to_pylist()
    if not hasattr(column, "dictionary"):
        return column.to_pylist()
    texts: dict[int | None, Any] = {None: None}
    numbers: list[int | None] = column.indices.to_pylist()
    for number in numbers:
        if number not in texts:
            texts[number] = column.dictionary[number].as_py()
    return [texts[number] for number in numbers]


def _size(column: Any) -> int:
    """Estimate the bytes that a column of lists and objects takes in Python, where each text becomes a new object."""
    import pyarrow as pa
    import pyarrow.compute as pc

    size, kind = 64 * len(column), column.type
    if pa.types.is_struct(kind):
        return size + sum(map(_size, column.flatten()))
    if pa.types.is_nested(kind):
        return size + sum(map(_size, [column.keys, column.items] if pa.types.is_map(kind) else [column.flatten()]))
    if pa.types.is_dictionary(kind) and len(column.dictionary):
        lengths = pc.cast(pc.call_function("binary_length", [column.dictionary]), pa.int64())
        return size + (pc.call_function("sum", [lengths.take(column.indices)]).as_py() or 0)
    return size


def _require_small_footer(raw: BinaryIO) -> None:
    size = raw.seek(0, io.SEEK_END)
    raw.seek(max(0, size - 8))
    end = raw.read(8)
    length = int.from_bytes(end[:4], "little")
    if end[4:] == b"PAR1" and length > MAX_FOOTER_BYTES:
        raise _too_large(f"a file whose footer has {length} bytes")
    raw.seek(0)


def _require_plain(schema: Any, columns: Columns) -> None:
    """Raise `DatasetError` for a required column that is declared or stored as another type than text, numbers or
    booleans."""
    import pyarrow as pa

    require_plain(_declared(schema, columns.required), columns.required)
    for name, pointer in columns.required.items():
        kind = schema.field(name).type
        is_flat = not pa.types.is_nested(kind) and not pa.types.is_temporal(kind)
        if not _is_readable(kind) or not (is_flat or name in columns.nested):
            raise not_plain(name, pointer)


def _is_readable(kind: Any, depth: int = 0) -> bool:
    """Whether a type is text, numbers, booleans, times, or lists and objects of these."""
    import pyarrow as pa

    plain = (
        *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_boolean),
        *(pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null, pa.types.is_temporal),
    )
    if pa.types.is_dictionary(kind):
        return _is_readable(kind.value_type, depth + 1)
    if pa.types.is_nested(kind):
        fields = [kind.field(index).type for index in range(kind.num_fields)]
        return depth < _MAX_DEPTH and bool(fields) and all(_is_readable(one, depth + 1) for one in fields)
    return any(matches(kind) for matches in plain)


def _declared(schema: Any, columns: Iterable[str]) -> dict[str, Any]:
    """Return the column types that the library `datasets` stored in the file: an image may be stored as text."""
    try:
        written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = written["info"]["features"]
        return {name: features[name] for name in columns if name in features}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def _require_small_pages(raw: BinaryIO, group: Any, leaves: Mapping[int, bool]) -> None:
    for leaf, is_nested in leaves.items():
        chunk = group.column(leaf)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        _walk(raw, min(start, chunk.data_page_offset), chunk.total_compressed_size, is_nested=is_nested)
    raw.seek(0)


def _walk(raw: BinaryIO, start: int, size: int, *, is_nested: bool) -> None:
    values = 0
    for page in _pages(raw, start, size):
        # In a list, one row may have all values.
        values += page.values
        if is_nested and values > MAX_NESTED_VALUES:
            raise _too_large(f"lists of more than {MAX_NESTED_VALUES} values in a row group")
        if max(page.uncompressed, page.compressed) > MAX_PAGE_BYTES:
            raise _too_large(f"a page of more than {MAX_PAGE_BYTES // 1024**2} MiB")
        if not page.encodings <= _ENCODINGS:
            raise ValueError("a page has an encoding that is not read")


def _pages(raw: BinaryIO, start: int, size: int) -> Iterator[_Page]:
    """Yield the header of each page of a column chunk."""
    at, end = start, start + size
    while at < end:
        raw.seek(at)
        page = _Thrift(raw.read(min(_HEADER_BYTES, end - at))).page()
        yield page
        at += page.header + page.compressed


def _row_groups(raw: BinaryIO) -> list[_RowGroup]:
    """Return the row groups that the footer lists."""
    size = raw.seek(0, io.SEEK_END)
    raw.seek(max(0, size - 8))
    end = raw.read(8)
    length = int.from_bytes(end[:4], "little")
    if end[4:] != b"PAR1" or not length <= min(size - 8, MAX_WALKED_FOOTER_BYTES):
        raise ValueError("it is not a Parquet file, or its footer is too long")
    raw.seek(size - 8 - length)
    groups = _Thrift(raw.read(length)).row_groups()
    if sum(length for group in groups for _, length in group.chunks) > size:
        raise ValueError("its columns share their pages")  # each column would walk over them again
    return groups


@dataclass(frozen=True, slots=True)
class _RowGroup:
    rows: int
    chunks: list[tuple[int, int]]
    """Offset and length in bytes of each column's pages."""


@dataclass(frozen=True, slots=True)
class _Page:
    header: int
    uncompressed: int
    compressed: int
    values: int
    """Number of values, for a data page."""
    encodings: frozenset[int]


class _Thrift:
    """Parses a page header or a footer in Thrift's compact protocol. Reads sizes and encodings and skips the rest."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def page(self) -> _Page:
        found: dict[int, int] = {}
        encodings: set[int] = set()
        values = 0
        for number, kind in self._fields():
            if number in (1, 2, 3) and kind == 5:
                found[number] = self._integer()
            elif number in (5, 7, 8) and kind == 12:
                # Headers of a data page, a dictionary page and a data page of version 2.
                header = self._integers()
                encodings.add(header.get({5: 2, 7: 2, 8: 4}[number], -1))
                values += 0 if number == 7 else header.get(1, -1)
            else:
                self._skip(kind)
        if found.keys() != {1, 2, 3} or min(found.values()) < 0:
            raise ValueError("a page's header is incomplete")
        if values < 0:
            raise ValueError("a page does not say how many values it has")
        return _Page(self._at, found[2], found[3], values, frozenset(encodings))

    def row_groups(self) -> list[_RowGroup]:
        """Parse the row groups of a footer."""
        groups: list[_RowGroup] = []
        for number, kind in self._fields():
            if number == 4 and kind == 9:
                groups += [self._row_group() for _ in range(self._structs())]
            else:
                self._skip(kind)
        return groups

    def _row_group(self) -> _RowGroup:
        rows, chunks = -1, list[tuple[int, int]]()
        for number, kind in self._fields():
            if number == 1 and kind == 9:
                chunks += [self._chunk() for _ in range(self._structs())]
            elif number == 3 and kind == 6:
                rows = self._integer()
            else:
                self._skip(kind)
        if rows < 0:
            raise ValueError("a row group does not say how many rows it has")
        return _RowGroup(rows, chunks)

    def _chunk(self) -> tuple[int, int]:
        facts: dict[int, int] = {}
        for number, kind in self._fields():
            if number == 3 and kind == 12:
                facts = self._integers()
            else:
                self._skip(kind)
        size, data, dictionary = facts.get(7, -1), facts.get(9, -1), facts.get(11, 0)
        if size < 0 or data < 0 or dictionary < 0:
            raise ValueError("a column does not say where its pages are")
        return min(dictionary or data, data), size

    def _structs(self) -> int:
        """Parse the head of a list of structs and return its length."""
        head = self._byte()
        if head & 15 != 12:
            raise ValueError("the footer cannot be read")
        return self._unsigned() if head >> 4 == 15 else head >> 4

    def _integers(self) -> dict[int, int]:
        """Parse a struct and return its integer fields."""
        found: dict[int, int] = {}
        for number, kind in self._fields():
            if kind in (5, 6):
                found[number] = self._integer()
            else:
                self._skip(kind)
        return found

    def _fields(self) -> Iterator[tuple[int, int]]:
        number = 0
        while (head := self._byte()) != 0:
            number = number + (head >> 4) if head >> 4 else self._integer()
            yield number, head & 15

    def _skip(self, kind: int, depth: int = 0) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        match kind:
            case 1 | 2:  # true and false are stored in the field's head
                pass
            case 3:
                self._at += 1
            case 4 | 5 | 6:
                self._integer()
            case 7:
                self._at += 8
            case 8:
                length = self._unsigned()
                self._at += length
            case 9 | 10:
                head = self._byte()
                for _ in range(self._unsigned() if head >> 4 == 15 else head >> 4):
                    self._skip(head & 15, depth + 1)
            case 12:
                for _, inner in self._fields():
                    self._skip(inner, depth + 1)
            case _:
                raise ValueError("a page's header cannot be read")

    def _byte(self) -> int:
        if self._at >= len(self._data):
            raise ValueError("a page's header is cut off")
        self._at += 1
        return self._data[self._at - 1]

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number in a page's header is too long")

    def _integer(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)


def _too_large(what: str) -> DatasetTooLargeError:
    return DatasetTooLargeError([problem("too_large", f"the data set has {what}", _REMEDY, "/data/dataset")])
