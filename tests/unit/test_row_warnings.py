"""Warnings that come from looking at the rows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from grpo_core.row_warnings import warnings_of_lines
from grpo_core.spec import parse_spec

ENGLISH = "How many apples does she have now?"
DATA: dict[str, Any] = {"source": "upload", "dataset": "ds-01ARZ3NDEKTSV4RRFFQ69G5FAV"}


def codes(rows: list[dict[str, Any]], data: dict[str, Any] | None = None, **spec: Any) -> list[str]:
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    found = warnings_of_lines(parse_spec({"data": {**DATA, **(data or {})}, **spec}), lines)
    assert all(ENGLISH not in warning.message for warning in found)
    return [warning.code for warning in found]


def test_the_recipes_own_rows_give_no_warning() -> None:
    assert codes([{"question": "小明有3个苹果，一共几个？", "answer": 7}, {"question": "6+6=?", "answer": "12"}]) == []


def test_a_chinese_prompt_beside_english_questions() -> None:
    rows = [{"question": ENGLISH, "answer": "7"}] * 5
    assert codes(rows) == ["prompt_in_other_language"]
    assert codes(rows, {"system_prompt": "Think in <reasoning></reasoning>, then <answer></answer>."}) == []


def test_solutions_in_the_place_of_answers() -> None:
    rows = [{"question": "一共几个？", "answer": "3+4 = <<3+4=7>>7\n#### 7"}] * 5
    assert codes(rows) == ["answers_hold_solutions"]
    assert codes(rows, {"answer_pattern": "#### *(.+)"}) == []
    assert codes([{"question": "一共几个？", "answer": "because " * 30}]) == ["long_answers", "answers_are_no_integers"]


def test_labels_beside_the_reward_for_integers() -> None:
    rows = [{"question": "好吗？", "answer": "positive"}, {"question": "好吗？", "answer": "negative"}]
    assert codes(rows) == ["answers_are_no_integers"]
    assert codes(rows, rewards={"weights": {"integer": 0}}) == []


def test_a_chat_that_would_be_ignored() -> None:
    rows = [{"messages": [{"role": "user", "content": "几个？"}], "question": "几个？", "answer": "1"}]
    assert codes(rows) == ["chat_ignored"]
    assert codes(rows, {"format": "messages"}) == ["format_not_asked"]


@pytest.mark.parametrize("tags", [{"reasoning": None, "answer": None}, {"reasoning": "think"}])
def test_a_prompt_that_asks_for_the_tags_is_right(tags: dict[str, Any]) -> None:
    rows = [{"messages": [{"role": "user", "content": "几个？"}], "answer": "1"}]
    prompt = {} if tags["reasoning"] is None else {"system_prompt": "Use <think></think> and <answer></answer>."}
    assert codes(rows, {"format": "messages", **prompt}, rewards={"tags": tags}) == []


def test_graders_alone_ask_for_no_tags_and_no_answer() -> None:
    rows = [{"question": ENGLISH}]
    grader = {"type": "length", "maximum": 100}
    assert codes(rows, {"system_prompt": ""}, rewards={"graders": {"short": grader}}) == []


def test_lines_that_cannot_be_read_are_passed_over() -> None:
    assert warnings_of_lines(parse_spec({"data": DATA}), b"\xff\nnull\n[]\n{}\n") == []
