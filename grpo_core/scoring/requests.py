"""What is to be graded, from a JSON value: one completion by one grader, or rows by all rewards of a spec.

Owns the two forms of a request and the pointers of their errors; the graders themselves are checked as in a job spec.
Invariant: whatever is wrong with a request, reading it raises `SpecError` with a pointer and a remedy.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, cast

from grpo_core.datasets import Needs, RowReader, UnusableRow
from grpo_core.spec import JobSpec, Problem, SpecError, parse_spec
from grpo_core.strict_json import pointer_of

MAX_ROWS: Final = 200
GRADER: Final = "grader"
"""The name of a grader that is tried alone."""
_ANY_JSON: Final = {"type": "json_schema", "json_schema": {"schema": {}}}
"""OpenAI gives a grader `sample.output_json` whenever the completion is JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRow:
    """A completion and the row that it answers."""

    text: str
    answer: str = ""
    item: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """Completions and the rewards that score them."""

    spec: JobSpec
    rows: tuple[ScoredRow, ...]


def read_grader(grader: object) -> JobSpec:
    """A spec with this grader and nothing else; raises `SpecError` with pointers below `/grader`."""
    try:
        return parse_spec({"rewards": {"graders": {GRADER: grader}}, "sampling": {"response_format": _ANY_JSON}})
    except SpecError as error:
        raise SpecError(
            [_moved(problem, pointer_of(("rewards", "graders", GRADER)), "/grader") for problem in error.problems]
        ) from error


def read_validation(body: object) -> JobSpec:
    """The grader in `{"grader": ...}`."""
    return read_grader(_fields(body, ("grader",))["grader"])


def read_run(body: object) -> ScoreRequest:
    """OpenAI's `{"grader": ..., "item": {...}, "model_sample": "..."}`."""
    given = _fields(body, ("grader", "model_sample"), optional=("item",))
    problems: list[Problem] = []
    row = _row({name: given[name] for name in ("item", "model_sample") if name in given}, "", problems)
    try:
        spec = read_grader(given["grader"])
    except SpecError as error:
        raise SpecError([*error.problems, *problems]) from error
    if row is None:
        raise SpecError(problems)
    return ScoreRequest(spec=spec, rows=(ScoredRow(text=row[0], item=row[1]),))


def read_rows(body: object) -> ScoreRequest:
    """`{"spec": {...}, "rows": [{"item": {...}, "model_sample": "..."}]}`; the spec may be partial."""
    given = _fields(body, ("spec", "rows"))
    problems: list[Problem] = []
    rows = _rows(given["rows"], problems)
    try:
        spec = parse_spec(given["spec"])
    except SpecError as error:
        raise SpecError([*(_moved(one, "", "/spec") for one in error.problems), *problems]) from error
    found = _read_as_data(spec, rows, problems)
    if problems:
        raise SpecError(problems)
    return ScoreRequest(spec=spec, rows=tuple(found))


def _read_as_data(spec: JobSpec, rows: list[tuple[str, dict[str, Any]]], problems: list[Problem]) -> list[ScoredRow]:
    """The rows with the answer and the columns that the rewards of a job would be given."""
    reader = RowReader(spec.data, Needs.of(spec))
    found: list[ScoredRow] = []
    for number, (text, record) in enumerate(rows):
        try:
            answer, item = reader.for_rewards(record)
        except UnusableRow as error:
            pointer = pointer_of(("rows", number, "item"))
            problems.append(Problem(pointer=pointer, code=error.code, detail=error.detail, remedy=error.remedy))
        else:
            found.append(ScoredRow(text=text, answer=answer, item=json.loads(item)))
    return found


def _rows(given: object, problems: list[Problem]) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(given, list) or not 0 < len(cast("list[object]", given)) <= MAX_ROWS:
        remedy = f"Send a list of 1 to {MAX_ROWS} rows."
        problems.append(Problem(pointer="/rows", code="bad_value", detail="is no list of rows", remedy=remedy))
        return []
    rows = [_row(row, pointer_of(("rows", number)), problems) for number, row in enumerate(cast("list[object]", given))]
    return [row for row in rows if row is not None]


def _row(given: object, pointer: str, problems: list[Problem]) -> tuple[str, dict[str, Any]] | None:
    """The completion and the columns of a row, or None after adding a problem."""
    try:
        fields = _fields(given, ("model_sample",), optional=("item",), pointer=pointer)
    except SpecError as error:
        problems += error.problems
        return None
    text, item = fields["model_sample"], fields.get("item", {})
    if not isinstance(text, str):
        remedy = "Send the completion as a string."
        problems.append(
            Problem(pointer=f"{pointer}/model_sample", code="bad_value", detail="is no text", remedy=remedy)
        )
    if not isinstance(item, dict):
        remedy = 'Send the columns of the row, such as {"answer": "72"}.'
        problems.append(Problem(pointer=f"{pointer}/item", code="bad_value", detail="is no object", remedy=remedy))
    return (text, cast("dict[str, Any]", item)) if isinstance(text, str) and isinstance(item, dict) else None


def _fields(
    given: object, required: Collection[str], *, optional: Collection[str] = (), pointer: str = ""
) -> dict[str, Any]:
    """The fields of an object, which has all required ones and none but these."""
    known = (*required, *optional)
    example = ", ".join(f'"{name}": ...' for name in known)
    if not isinstance(given, dict):
        raise SpecError(
            [Problem(pointer=pointer, code="bad_value", detail="is no object", remedy=f"Send {{{example}}}.")]
        )
    fields = cast("dict[str, Any]", given)
    problems = [
        Problem(pointer=f"{pointer}/{name}", code="missing_field", detail="is required", remedy=f"Send {{{example}}}.")
        for name in required
        if name not in fields
    ]
    problems += [
        Problem(
            pointer=pointer + pointer_of((name,)),
            code="unknown_field",
            detail="is not a field of this request",
            remedy=f"Remove it; the fields are {', '.join(known)}.",
        )
        for name in fields
        if name not in known
    ]
    if problems:
        raise SpecError(problems)
    return fields


def _moved(problem: Problem, old: str, new: str) -> Problem:
    """The problem with its pointer in the request instead of in a spec."""
    pointer = problem.pointer
    return replace(problem, pointer=new + pointer.removeprefix(old) if pointer.startswith(old) else pointer)
