"""What a data set yields: rows, errors that say what to do, and the one way a value becomes text.

Owns the limits that every source shares. Invariant: no error repeats the data's text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, cast

from grpo_core.errors import GrpoError
from grpo_core.spec import DataSection, Problem

MAX_ROWS = 1_000_000
MAX_BYTES = 256 * 1024 * 1024
MAX_FIELD_CHARACTERS = 65_536
MAX_COLUMNS = 64


@dataclass(frozen=True, slots=True)
class Row:
    """One question with its answer."""

    row: int
    """Position among the source's rows, from 0; rows that were left out are counted."""
    question: str
    answer: str


class DatasetError(GrpoError):
    """A data set that cannot be read or has nothing to train on; `problems` says what to do.

    With `more` there are others, which were not listed because reading stopped.
    """

    def __init__(self, problems: list[Problem], *, more: bool = False) -> None:
        self.problems = problems
        self.more = more
        text = "; ".join(f"{p.pointer} {p.detail}. {p.remedy}".lstrip() for p in problems[:3])
        unsaid = f"; and {'at least ' if more else ''}{len(problems) - 3 + more} more" if len(problems) > 3 else ""
        super().__init__(text + unsaid)

    @property
    def code(self) -> str:
        """The code of the first problem."""
        return self.problems[0].code


class DatasetTooLargeError(DatasetError):
    """More rows or bytes than are accepted: reading stopped there."""


class DatasetUnreachableError(DatasetError):
    """The hub did not answer: the same job may work later, unchanged."""


def text_of(value: object) -> str | None:
    """A value as the stripped text that a prompt or a comparison uses; None where it cannot be used.

    Numbers become plain digits (12 and 12.0 are "12", since columns with gaps are often stored as floats). Truth
    values, lists, objects, NaN, NUL, blank or over-long text cannot be used.
    """
    if isinstance(value, str):
        text = value.strip() if "\0" not in value else ""
    elif isinstance(value, bool):
        return None
    elif isinstance(value, int | float | Decimal):
        text = _number_text(value)
    else:
        return None
    return text if 0 < len(text) <= MAX_FIELD_CHARACTERS else None


def _number_text(value: float | Decimal) -> str:
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return ""
    # The shortest text that reads back as this float, then without exponent and trailing zeros.
    text = format(Decimal(repr(value)) if isinstance(value, float) else value, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def require_columns(data: DataSection, names: list[str]) -> None:
    """Raise unless both of the job's columns are among `names`."""
    fields: tuple[Literal["question_column", "answer_column"], ...] = ("question_column", "answer_column")
    there = ", ".join(names[:MAX_COLUMNS]) or "none"
    missing = [
        problem("missing_column", f"there is no column {name!r}", f"The columns are: {there}.", f"/data/{field}")
        for field in fields
        if (name := cast("str", getattr(data, field))) not in names
    ]
    if missing:
        raise DatasetError(missing)


def problem(code: str, detail: str, remedy: str, pointer: str = "") -> Problem:
    """A problem, by default of the data set as a whole."""
    return Problem(pointer=pointer, code=code, detail=detail, remedy=remedy)


def error(code: str, detail: str, remedy: str, pointer: str = "") -> DatasetError:
    """An error with one problem."""
    return DatasetError([problem(code, detail, remedy, pointer)])
