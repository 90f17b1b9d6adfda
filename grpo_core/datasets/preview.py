"""A preview of a data set: its columns, and the prompts that its first rows become.

Owns what a preview says about columns and rows; the caller reads the lines from storage. Invariant: a row that a job
could not use is shown with the reason, and never left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

from grpo_core.datasets.prompts import messages_for
from grpo_core.datasets.row_reader import Needs, RowReader, UnusableRow, is_chat
from grpo_core.datasets.rows import Message, text_of
from grpo_core.spec import DataSection, JobSpec

MOST_RECORDS: Final = 200
"""Number of records that decide the type of a column."""

Holds = Literal["text", "chat", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewedColumn:
    """One column of a data set."""

    name: str
    holds: Holds
    """`text`: text or a number in every row. `chat`: a chat that ends with the user's turn in every row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewedRow:
    """One row with its prompt, or with the reason why it has none."""

    row: int
    values: Mapping[str, Any]
    """Every column as it is stored."""
    messages: Sequence[Message] = ()
    answer: str = ""
    """Empty if the row has no answer."""
    problem: UnusableRow | None = None


def records_of(lines: bytes, most: int = MOST_RECORDS) -> list[Mapping[str, Any]]:
    """Return the objects in the first lines of a JSONL file. Other lines are left out."""
    records: list[Mapping[str, Any]] = []
    for line in lines.splitlines()[:most]:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            records.append(cast("dict[str, Any]", value))
    return records


def preview_columns(records: Sequence[Mapping[str, Any]]) -> list[PreviewedColumn]:
    """Return every column, in order of first occurrence."""
    names = dict.fromkeys(name for record in records for name in record)
    return [PreviewedColumn(name=name, holds=_holds([record.get(name) for record in records])) for name in names]


def preview_rows(spec: JobSpec, records: Sequence[Mapping[str, Any]]) -> list[PreviewedRow]:
    """Return each record with the prompt that a job would make from it."""
    return [preview_row(spec.data, number, record) for number, record in enumerate(records)]


def preview_row(data: DataSection, number: int, record: Mapping[str, Any]) -> PreviewedRow:
    """Return a record with the prompt that a job would make from it; `number` is its place among the rows."""
    try:
        row = RowReader(data, Needs(answer=False)).row(number, record)
    except UnusableRow as problem:
        return PreviewedRow(row=number, values=record, problem=problem)
    return PreviewedRow(row=number, values=record, messages=messages_for(row, data), answer=row.answer)


def _holds(values: Sequence[Any]) -> Holds:
    if all(text_of(value) is not None for value in values):
        return "text"
    return "chat" if all(is_chat(value) for value in values) else "other"
