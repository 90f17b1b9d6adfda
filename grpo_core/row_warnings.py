"""What a job's own rows say about its settings: what is accepted, and would waste the run.

Owns the judgement of some rows, read as the job reads them; reading them is `datasets`'. Invariant: a warning says what
would happen and what to set, and repeats nothing of the rows.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from grpo_core.datasets import Needs, Row, RowReader, UnusableRow
from grpo_core.datasets.preview import records_of
from grpo_core.datasets.row_reader import is_chat, last_match
from grpo_core.estimates import SpecWarning
from grpo_core.rewards.number_parser import read_number
from grpo_core.rewards.tags import Tags
from grpo_core.spec import JobSpec

MOST_ROWS: Final = 200
"""Rows that are looked at."""
GSM8K: Final = "#### *(.+)"

_MOSTLY = 0.8
_LONG_ANSWER = 100
_CHINESE = re.compile(r"[\u3400-\u9fff]")
_LATIN_WORDS = re.compile(r"(?:[A-Za-z]{2,}\W+){2}[A-Za-z]{2,}")


@dataclass(frozen=True, slots=True)
class _Looked:
    spec: JobSpec
    rows: Sequence[Row]
    records: Sequence[Mapping[str, Any]]

    @property
    def answers(self) -> list[str]:
        """Those that there are."""
        return [row.answer for row in self.rows if row.answer]


def warnings_of_lines(spec: JobSpec, lines: bytes) -> list[SpecWarning]:
    """The warnings for the first lines of a JSONL file."""
    records = records_of(lines, MOST_ROWS)
    reader, rows = RowReader(spec.data, Needs.of(spec)), list[Row]()
    for number, record in enumerate(records):
        try:
            rows.append(reader.row(number, record))
        except UnusableRow:
            continue
    return row_warnings(spec, rows, records)


def row_warnings(spec: JobSpec, rows: Sequence[Row], records: Sequence[Mapping[str, Any]] = ()) -> list[SpecWarning]:
    """The warnings for some rows; `records` are all of their columns, where these are known."""
    looked = _Looked(spec, rows[:MOST_ROWS], records[:MOST_ROWS])
    return [warning for check in CHECKS for warning in check(looked)] if looked.rows or looked.records else []


def _prompt_has_the_rows_language(looked: _Looked) -> Iterator[SpecWarning]:
    questions = [row.question for row in looked.rows]
    english = sum(_LATIN_WORDS.search(text) is not None and not _CHINESE.search(text) for text in questions)
    if _CHINESE.search(looked.spec.data.system_prompt) and english >= _MOSTLY * len(questions) > 0:
        instead = looked.spec.rewards.tags.as_tags.prompt or "one in English"
        yield SpecWarning(
            pointer="/data/system_prompt",
            code="prompt_in_other_language",
            message=f"The system prompt is Chinese, and {english} of {len(questions)} questions looked at are English: "
            f"the model may reason and answer in Chinese. Set it to {json.dumps(instead)}.",
        )


def _answers_are_bare(looked: _Looked) -> Iterator[SpecWarning]:
    data, answers = looked.spec.data, looked.answers
    if not Needs.of(looked.spec).answer or not answers or data.answer_pattern is not None:
        return
    worked = sum(last_match(GSM8K, answer) is not None for answer in answers)
    if worked >= _MOSTLY * len(answers):
        yield SpecWarning(
            pointer="/data/answer_pattern",
            code="answers_hold_solutions",
            message=f"{worked} of {len(answers)} answers looked at are solutions with the result behind ####: "
            "correctness would compare with the whole text and pay for nothing. Set data.answer_pattern to "
            f'"{GSM8K}".',
        )
    elif statistics.median(map(len, answers)) > _LONG_ANSWER:
        yield SpecWarning(
            pointer="/data/answer_column",
            code="long_answers",
            message=f"Half of the answers looked at have over {_LONG_ANSWER} characters: correctness pays only for "
            "the very same text. Name the column with the final answer, set data.answer_pattern, or use a grader.",
        )


def _integer_fits_the_answers(looked: _Looked) -> Iterator[SpecWarning]:
    answers = looked.answers
    numbers = [read_number(answer) for answer in answers]
    whole = sum(number is not None and number.denominator == 1 for number in numbers)
    has_pattern = any(warning.code == "answers_hold_solutions" for warning in _answers_are_bare(looked))
    if looked.spec.rewards.weights.integer > 0 and answers and 2 * whole < len(answers) and not has_pattern:
        yield SpecWarning(
            pointer="/rewards/weights/integer",
            code="answers_are_no_integers",
            message=f"integer rewards a whole number, and {len(answers) - whole} of {len(answers)} answers looked at "
            "are something else: it would reward wrong answers. Set its weight to 0.",
        )


def _chats_are_used(looked: _Looked) -> Iterator[SpecWarning]:
    data = looked.spec.data
    if data.format != "qa" or not looked.records:
        return
    first = looked.records[0]
    for name in first:
        if all(is_chat(record.get(name)) for record in looked.records):
            yield SpecWarning(
                pointer="/data/format",
                code="chat_ignored",
                message=f"The column {name!r} holds chats, and data.format is qa: it would be ignored, and only "
                f'{data.question_column!r} is sent. Set data.format to "messages"'
                + ("." if name == "messages" else f" and data.question_column to {name!r}."),
            )


def _prompts_name_the_tags(looked: _Looked) -> Iterator[SpecWarning]:
    """Also of rows that bring their own prompt."""
    spec = looked.spec
    weights = spec.rewards.weights
    needs_answer = Needs.of(spec).answer
    if not (weights.strict_format or weights.soft_format or weights.xml_count or weights.integer or needs_answer):
        return
    tags: Tags = spec.rewards.tags.as_tags
    fixed = "\n".join([spec.data.system_prompt, *(example.answer for example in spec.data.examples)])
    missing = tags.missing_from(fixed)
    unasked = [row for row in looked.rows if tags.missing_from(row.question)]
    if missing and len(unasked) >= _MOSTLY * len(looked.rows):
        yield SpecWarning(
            pointer="/data/system_prompt",
            code="format_not_asked",
            message=f"Rewards look for {' and '.join(missing)}, and no prompt mentions it: hardly any completion would "
            "be rewarded. Ask for it in data.system_prompt, "
            f"for example {json.dumps(tags.prompt)}, or set rewards.tags.",
        )


CHECKS: tuple[Callable[[_Looked], Iterator[SpecWarning]], ...] = (
    _prompt_has_the_rows_language,
    _prompts_name_the_tags,
    _answers_are_bare,
    _integer_fits_the_answers,
    _chats_are_used,
)
