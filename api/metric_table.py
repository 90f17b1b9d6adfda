"""A job's training metrics as CSV (RFC 4180): one line per step, one column per number.

Nested values get a column each, named by their path: `rewards.correctness`, `seconds.generation`. Invariant: a job's
columns and their order are the same before its first step and after its last; a missing value is empty.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from grpo_core.run_dir.metrics import described

MEDIA_TYPE = "text/csv"
_LINES_AT_ONCE = 200


def columns(reward_names: Iterable[str]) -> list[str]:
    """The header: what a step's metrics hold, with the run that trained it."""
    every, names = described(), list(reward_names)
    nested = {one.path[0] for one in every.values() if len(one.path) > 1}
    found = ["step", "epoch"]
    for name, one in every.items():
        if name not in nested:
            found += [f"{name}.{reward}" for reward in names] if one.is_by_name else [name]
    return found


def to_csv(metrics: Sequence[Mapping[str, Any]], reward_names: Iterable[str]) -> Iterator[str]:
    """The header and then the lines, some at a time."""
    header = columns(reward_names)
    buffer = io.StringIO()
    writer = csv.writer(buffer)  # of the kind that RFC 4180 describes, with CRLF
    writer.writerow(header)
    for number, step in enumerate(metrics, start=1):
        writer.writerow([_value(step, column) for column in header])
        if number % _LINES_AT_ONCE == 0:
            yield _taken(buffer)
    yield _taken(buffer)


def _value(step: Mapping[str, Any], column: str) -> Any:
    field, _, key = column.partition(".")
    value = step.get(field)
    return value.get(key) if key and value is not None else value


def _taken(buffer: io.StringIO) -> str:
    text = buffer.getvalue()
    buffer.seek(0)
    buffer.truncate()
    return text
