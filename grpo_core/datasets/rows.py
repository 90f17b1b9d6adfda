"""Rows of a data set, the errors of reading it, and the conversion of values to text.

Owns the limits that all sources share; `row_reader` makes rows from records. Invariant: no error quotes text from the
data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal

from grpo_core.errors import GrpoError
from grpo_core.spec import Problem

MAX_ROWS = 1_000_000
MAX_BYTES = 256 * 1024 * 1024
MAX_FIELD_CHARACTERS = 65_536
MAX_COLUMNS = 64


Message = dict[str, str]
"""A turn of a chat: `role` and `content`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One question with its answer."""

    row: int
    """Position among the source's rows, from 0; rows that were left out count too."""
    question: str
    """The question as people read it; for a chat, all its turns."""
    answer: str
    """Empty if the row has no answer and the job needs none."""
    turns: tuple[tuple[str, str], ...] = ()
    """Role and text of each turn, if the row is a chat."""
    item: str = "{}"
    """The row's columns as a JSON object, if graders read them."""

    @property
    def characters(self) -> int:
        """Number of characters in the row."""
        return len(self.question) + len(self.answer) + len(self.item) + sum(len(text) for _, text in self.turns)


Question = Row | str
"""A question for a model: a row, or a text."""


class DatasetError(GrpoError):
    """The data set cannot be read or has no usable rows. `problems` says what to do.

    With `more` there are further problems, which are not listed because reading stopped.
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
    """The data set has more rows or bytes than are accepted; reading stopped there."""


class DatasetUnreachableError(DatasetError):
    """The hub did not answer; the same job may succeed later."""


def text_of(value: object) -> str | None:
    """Convert a value to the stripped text that prompts and comparisons use; None if it cannot be used.

    Numbers become plain digits (12 and 12.0 become "12", because columns with gaps are often stored as floats).
    Booleans, lists, objects, NaN, and text that is blank, too long or has NUL cannot be used.
    """
    if isinstance(value, str):
        if len(value) > 2 * MAX_FIELD_CHARACTERS:
            return None  # too long to convert
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
    # The shortest text that parses as this float, without exponent and trailing zeros.
    text = format(Decimal(repr(value)) if isinstance(value, float) else value, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def problem(code: str, detail: str, remedy: str, pointer: str = "") -> Problem:
    """Return a problem; by default, of the whole data set."""
    return Problem(pointer=pointer, code=code, detail=detail, remedy=remedy)


def error(code: str, detail: str, remedy: str, pointer: str = "") -> DatasetError:
    """Return an error with one problem."""
    return DatasetError([problem(code, detail, remedy, pointer)])
