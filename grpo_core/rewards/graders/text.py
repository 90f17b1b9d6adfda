"""The graders that need no other process: `string_check`, `regex`, `length`, `json_schema`.

Invariant: each takes time that is linear in the text, for every text and pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import re2

from grpo_core.reasons import FailureCode
from grpo_core.rewards.graders.models import AnyGrader, JsonSchema, Length, Regex, StringCheck
from grpo_core.rewards.graders.protocol import Grade, Grader, GraderContext, GraderRow
from grpo_core.rewards.graders.registry import GraderUnavailable
from grpo_core.rewards.graders.rows import Schema, SchemaError, parse_json, render
from grpo_core.rewards.graders.templates import Template


class TextGrader:
    """Scores rendered texts with a function that never raises."""

    waits = False

    def __init__(self, templates: Sequence[str], score: Callable[..., float]) -> None:
        self._templates = [Template(text) for text in templates]
        self._score = score

    def grade(self, rows: Sequence[GraderRow]) -> list[Grade]:
        return [self._grade(row) for row in rows]

    def close(self) -> None:
        """Do nothing: there is nothing to close."""

    def _grade(self, row: GraderRow) -> Grade:
        texts = render(self._templates, row)
        return texts if isinstance(texts, Grade) else Grade(score=self._score(*texts))


def make(model: AnyGrader, context: GraderContext) -> Grader:
    """Return the grader for one of these types."""
    templates = [text for _, text in model.templates]
    if isinstance(model, StringCheck):
        return TextGrader(templates, _OPERATIONS[model.operation])
    if isinstance(model, Regex):
        return TextGrader(templates, _matcher(model))
    if isinstance(model, Length):
        return TextGrader(templates, _measure(model))
    assert isinstance(model, JsonSchema), "the registry's table"
    return TextGrader(templates, _validator(model, context))


_OPERATIONS: dict[str, Callable[[str, str], float]] = {
    "eq": lambda given, wanted: float(given == wanted),
    "ne": lambda given, wanted: float(given != wanted),
    "like": lambda given, wanted: float(wanted in given),
    "ilike": lambda given, wanted: float(wanted.casefold() in given.casefold()),
}


def _matcher(model: Regex) -> Callable[[str], float]:
    options = re2.Options()
    options.log_errors = False
    pattern = re2.compile(model.pattern, options)
    find = pattern.fullmatch if model.match == "full" else pattern.search
    return lambda text: float(find(text) is not None)


def _measure(model: Length) -> Callable[[str], float]:
    def score(text: str) -> float:
        length = _COUNTS[model.unit](text)
        short, long = model.minimum - length, 0 if model.maximum is None else length - model.maximum
        outside = max(short, long, 0)
        return 1.0 if outside == 0 else max(0.0, 1.0 - outside / (model.falloff + 1))

    return score


_COUNTS: dict[str, Callable[[str], int]] = {
    "characters": len,
    "words": lambda text: len(text.split()),
    "lines": lambda text: len(text.splitlines()),
}


def _validator(model: JsonSchema, context: GraderContext) -> Callable[[str], float]:
    try:
        schema = Schema(model.json_schema)
    except SchemaError as error:
        raise GraderUnavailable(
            FailureCode.BAD_SCHEMA, f"The schema of the grader {context.name} {error}.", "Correct it."
        ) from error

    def score(text: str) -> float:
        value = parse_json(text.strip())
        return float(value is not ... and schema.fits(value))

    return score
