"""Makes a row from a record of a data set, by the job's `data` section: its prompt, answer and columns.

Owns the two formats (a question in a column, or a chat), how an answer is found inside a column, and which columns are
read; `tables` and `jsonl` read the files. Invariant: a record either becomes a complete row or raises `UnusableRow`,
which quotes none of its values.
"""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache
from typing import Any, Final, cast

from grpo_core.datasets.rows import MAX_COLUMNS, MAX_FIELD_CHARACTERS, DatasetError, Row, problem, text_of
from grpo_core.errors import GrpoError
from grpo_core.rewards.graders.formula import Formula
from grpo_core.rewards.graders.models import Endpoint, Python, members_of
from grpo_core.rewards.graders.templates import Template
from grpo_core.spec import DataSection, JobSpec

MAX_TURNS: Final = 256
MAX_ITEM_CHARACTERS: Final = 256 * 1024
"""Largest number of characters of the columns of one row as JSON."""

_ROLES: Final = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles in chats, as chat templates know them; they do not know `developer`."""
_TEXT_PARTS: Final = ("text", "input_text", "output_text")
_STEP = re.compile(r"(?:^|\.)([^.\[\]]+)|\[(\d{1,6})\]")
_FILL = "Fill it in or remove the row."


@dataclass(frozen=True, slots=True)
class Needs:
    """The parts of a row that a job's rewards need, beside its prompt."""

    answer: bool = True
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    """Columns that templates of graders name, with their pointers in the spec."""
    everything: bool = False
    """Whether all columns are needed, because a grader reads the whole row."""

    @property
    def item(self) -> bool:
        """Whether graders read columns."""
        return self.everything or bool(self.columns)

    @classmethod
    def of(cls, spec: JobSpec) -> Needs:
        """Return the needs of a job."""
        rewards = spec.rewards
        is_paid = rewards.weights.correctness != 0
        if rewards.formula is not None:
            is_paid = "correctness" in Formula(rewards.formula, rewards.names).used
        columns: dict[str, str] = {}
        everything = False
        for name, grader in rewards.graders.items():
            members = members_of(name, grader).values()
            everything = everything or any(isinstance(member, Python | Endpoint) for member in members)
            for pointer, text in grader.templates:
                for path in Template(text).paths:
                    if path.root == "item" and path.parts:
                        columns.setdefault(str(path.parts[0]), f"/rewards/graders/{name}{pointer}")
                    everything = everything or path.parts == ()
        if spec.data.format == "messages":
            columns.pop(spec.data.question_column, None)
        return cls(answer=is_paid, columns=columns, everything=everything)


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns to read from a file."""

    required: Mapping[str, str]
    """Columns that must exist, with their pointers in the spec."""
    nested: frozenset[str] = field(default_factory=frozenset[str])
    """Required columns that may hold lists and objects."""
    everything: bool = False
    """Whether the other columns are read too, if they hold text, numbers, booleans, or lists and objects of these."""
    optional: frozenset[str] = field(default_factory=frozenset[str])
    """Columns that are read if they exist."""


class UnusableRow(GrpoError):
    """The record cannot become a row. The message says why, and `remedy` what to do."""

    def __init__(self, code: str, detail: str, remedy: str = _FILL) -> None:
        super().__init__(detail)
        self.code, self.detail, self.remedy = code, detail, remedy


class RowReader:
    """Makes rows from records."""

    def __init__(self, data: DataSection, needs: Needs) -> None:
        self._data, self._needs = data, needs

    @property
    def columns(self) -> Columns:
        """The columns to read from a file."""
        data = self._data
        required = {data.question_column: "/data/question_column"}
        nested: set[str] = {data.question_column} if data.format == "messages" else set()
        if self._needs.answer:
            required[data.answer_column] = "/data/answer_column"
        if data.answer_path is not None:
            nested.add(data.answer_column)
        optional = frozenset() if self._needs.answer else frozenset({data.answer_column})
        for column, pointer in self._needs.columns.items():
            nested |= {column} - required.keys()
            required.setdefault(column, pointer)
        return Columns(required, frozenset(nested), everything=self._needs.everything, optional=optional)

    def require_columns(self, names: Sequence[str]) -> None:
        """Raise `DatasetError` unless all required columns are among `names`."""
        there = ", ".join(names[:MAX_COLUMNS]) or "none"
        missing = [
            problem("missing_column", f"there is no column {name!r}", f"The columns are: {there}.", pointer)
            for name, pointer in self.columns.required.items()
            if name not in names
        ]
        if missing:
            raise DatasetError(missing)

    def row(self, number: int, record: Mapping[str, Any]) -> Row:
        """Return the row of a record. Raises `UnusableRow`."""
        data = self._data
        turns: tuple[tuple[str, str], ...] = ()
        if data.format == "messages":
            turns = tuple(chat_turns(record.get(data.question_column)))
            question = _shown(turns)
        else:
            question = _require_text(record.get(data.question_column), data.question_column)
        answer, item = self.for_rewards(record)
        return Row(number, question, answer, turns, item)

    def for_rewards(self, record: Mapping[str, Any]) -> tuple[str, str]:
        """What rewards are given of a record, without its prompt: the answer, and columns as JSON; raises
        `UnusableRow`."""
        answer = self._answer(record)
        return answer, self._item(record, answer) if self._needs.item else "{}"

    def _item(self, record: Mapping[str, Any], answer: str) -> str:
        data, needs = self._data, self._needs
        chosen = record if needs.everything else {name: record[name] for name in needs.columns if name in record}
        fields = {name: _json_value(value) for name, value in chosen.items()}
        if data.format == "messages":
            fields.pop(data.question_column, None)
        if data.answer_pattern is not None and data.answer_path is None and data.answer_column in fields and answer:
            fields[data.answer_column] = answer
        text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
        if len(text) > MAX_ITEM_CHARACTERS:
            detail = f"has columns of {len(text)} characters in all; at most {MAX_ITEM_CHARACTERS} are accepted"
            raise UnusableRow("row_too_long", detail, "Drop columns that no reward reads.")
        return text

    def _answer(self, record: Mapping[str, Any]) -> str:
        data = self._data
        try:
            return find_answer(record.get(data.answer_column), data)
        except UnusableRow:
            if self._needs.answer:
                raise
            return ""


def find_answer(value: object, data: DataSection) -> str:
    """Return the answer in a value of the answer column. Raises `UnusableRow`."""
    name = data.answer_column
    if data.answer_path is not None:
        value = _at(value, data.answer_path, name)
    text = _require_text(value, name)
    if data.answer_pattern is None:
        return text
    found = last_match(data.answer_pattern, text)
    if found is None or not found.strip():
        detail = f"has no match of data.answer_pattern in the column {name!r}"
        raise UnusableRow("no_answer_match", detail, "Correct the pattern, or remove the row.")
    return found.strip()


def last_match(pattern: str, text: str) -> str | None:
    """Return the first group of a pattern's last match, or the whole match if it has no group; None without a match.

    Takes linear time (RE2).
    """
    expression = _compiled(pattern)
    try:
        found = deque(expression.finditer(text), maxlen=1)
    except UnicodeEncodeError:  # a lone surrogate, which JSON can hold
        return None
    return cast("str | None", found[0].group(1 if expression.groups else 0)) if found else None


def chat_turns(value: object) -> list[tuple[str, str]]:
    """Return role and text of each turn of a chat, which must end with the user's turn. Raises `UnusableRow`."""
    if not isinstance(value, list):
        raise _bad_chat("is not a list of turns")
    given = cast("list[object]", value)
    if not 0 < len(given) <= MAX_TURNS:
        raise _bad_chat(f"has {len(given)} turns; 1 to {MAX_TURNS} are accepted")
    turns = [_turn(turn) for turn in given]
    if turns[-1][0] != "user":
        raise _bad_chat(f"ends with the turn of the {turns[-1][0]}")
    return turns


def is_chat(value: object) -> bool:
    """Whether a value is a chat that a job can use as a prompt."""
    if not isinstance(value, list):
        return False
    try:
        chat_turns(cast("list[object]", value))
    except UnusableRow:
        return False
    return True


def json_line(record: Mapping[str, Any]) -> bytes:
    """Encode a record as a line of JSON."""
    fields = {name: _json_value(value) for name, value in record.items()}
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n"


def item_of(row: Row) -> dict[str, Any]:
    """Return the columns of a row that graders read."""
    return cast("dict[str, Any]", json.loads(row.item))


def _turn(given: object) -> tuple[str, str]:
    if not isinstance(given, dict):
        raise _bad_chat("has a turn that is not an object")
    turn = cast("dict[str, object]", given)
    role = _ROLES.get(str(turn.get("role")))
    if role is None:
        raise _bad_chat("has a turn whose role is not system, developer, user or assistant")
    text = _content(turn.get("content"))
    if text is None or "\0" in text or not text.strip():
        raise _bad_chat("has a turn without text")
    if len(text) > MAX_FIELD_CHARACTERS:
        raise _bad_chat(f"has a turn of more than {MAX_FIELD_CHARACTERS} characters")
    return role, text


def _content(content: object) -> str | None:
    """Return the text of a turn, which may have parts; None if a part is not text, such as an image."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts: list[str] = []
    for part in cast("list[object]", content):
        if not isinstance(part, dict):
            return None
        named = cast("dict[str, object]", part)
        text = named.get("text")
        if named.get("type") not in _TEXT_PARTS or not isinstance(text, str):
            return None
        texts.append(text)
    return "".join(texts)


def _shown(turns: Sequence[tuple[str, str]]) -> str:
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{role}: {text}" for role, text in turns)


def _bad_chat(detail: str) -> UnusableRow:
    remedy = 'Write [{"role": "user", "content": "..."}], with earlier turns before it and the user\'s turn last.'
    return UnusableRow("bad_messages", f"has a chat that {detail}", remedy)


def _require_text(value: object, column: str) -> str:
    text = text_of(value)
    if text is None:
        raise UnusableRow("no_value", f"has no text or number in the column {column!r}")
    return text


def _at(value: object, path: str, column: str) -> object:
    """Return the value at a path inside a value, which may be JSON in a string."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UnusableRow("no_value", f"has no JSON in the column {column!r}") from None
    for name, index in _STEP.findall(path):
        if index and isinstance(value, list) and int(index) < len(cast("list[object]", value)):
            value = cast("list[object]", value)[int(index)]
        elif name and isinstance(value, dict) and name in value:
            value = cast("dict[str, object]", value)[name]
        else:
            detail = f"has nothing at data.answer_path in the column {column!r}"
            raise UnusableRow("no_value", detail, "Correct the path, or remove the row.")
    return value


def _json_value(value: Any) -> Any:
    """Convert a value to JSON: NaN becomes null, and types that JSON lacks become text."""
    match value:
        case None | bool() | str() | int():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Decimal():
            return float(value) if value.is_finite() else None
        case dict():
            return {str(name): _json_value(one) for name, one in cast("dict[Any, Any]", value).items()}
        case list() | tuple():
            return [_json_value(one) for one in cast("list[Any]", value)]
        case _:
            return str(value)


@cache
def _compiled(pattern: str) -> Any:
    from grpo_core.spec.patterns import compile_pattern

    return compile_pattern(pattern)
