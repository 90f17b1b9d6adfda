"""A usage report as CSV (RFC 4180): one line per period, owner and kind of GPU.

Owns the columns. Invariant: no cell is a formula to a spreadsheet, whatever an owner or a GPU is called.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator

from api.schemas import GpuHours

MEDIA_TYPE = "text/csv"
COLUMNS = ("start", "owner", "gpu", "gpu_hours", "jobs", "cost", "currency")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def to_csv(rows: Iterable[GpuHours], currency: str | None) -> Iterator[str]:
    """The header and then a line for each row."""
    yield _line(COLUMNS)
    for row in rows:
        cost = "" if row.cost is None else f"{row.cost:.4f}"
        hours = f"{row.gpu_hours:.6f}"
        label = currency if row.cost is not None else None
        yield _line((row.start.isoformat(), as_text(row.owner), as_text(row.gpu or ""), hours, row.jobs, cost, label))


def as_text(name: str) -> str:
    """A name that spreadsheets show as it is: one that they would compute gets an apostrophe."""
    return f"'{name}" if name.lstrip(" ").startswith(_FORMULA) or name.startswith(_FORMULA) else name


def _line(cells: Iterable[object]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerow(["" if cell is None else cell for cell in cells])
    return buffer.getvalue()
