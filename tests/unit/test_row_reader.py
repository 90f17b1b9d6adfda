"""How a record becomes a row: chats, answers inside columns, the columns that graders see."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from grpo_core.datasets import Needs, RowReader, UnusableRow
from grpo_core.datasets.prompts import messages_for
from grpo_core.datasets.row_reader import item_of
from grpo_core.spec import DataSection, SpecError, parse_spec
from tests.clock import patience

USER = {"role": "user", "content": "6+6=?"}


def data(**fields: Any) -> DataSection:
    return parse_spec({"data": {"source": "file", "dataset": "x", **fields}}).data


def row(record: dict[str, Any], *, answer: bool = True, item: bool = False, **fields: Any) -> Any:
    return RowReader(data(**fields), Needs(answer=answer, everything=item)).row(0, record)


def test_gsm8k_answers_are_found_by_a_pattern() -> None:
    text = "She has 3 #### no\n<<3*24=72>> so it is 72.\n#### 72"
    found = row({"question": "q", "answer": text}, answer_pattern=r"####\s*(.+)", item=True)
    assert found.answer == "72"
    assert item_of(found)["answer"] == "72"
    with pytest.raises(UnusableRow, match=r"no match of data\.answer_pattern"):
        row({"question": "q", "answer": "72"}, answer_pattern=r"####\s*(.+)")


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"ground_truth": "72", "style": "rule"}, "ground_truth"),
        ('{"ground_truth": 72}', "ground_truth"),
        ({"a": [{"text": "x"}, {"text": "72"}]}, "a[1].text"),
        (["72"], "[0]"),
    ],
)
def test_answers_are_found_by_a_path(value: Any, path: str) -> None:
    found = row({"question": "q", "answer": value}, answer_path=path, item=True)
    assert found.answer == "72"
    assert item_of(found)["answer"] == value


@pytest.mark.parametrize("path", ["nothing", "a[7].text", "a.text", "[0]"])
def test_a_path_that_leads_nowhere_is_said(path: str) -> None:
    with pytest.raises(UnusableRow, match=r"nothing at data\.answer_path"):
        row({"question": "q", "answer": {"a": [1]}}, answer_path=path)


@pytest.mark.parametrize("pattern", ["(", "(?=a)", r"(a)\1", "a" * 600])
def test_a_pattern_that_cannot_be_read_is_refused_with_the_spec(pattern: str) -> None:
    with pytest.raises(SpecError) as caught:
        data(answer_pattern=pattern)
    assert caught.value.problems[0].pointer == "/data/answer_pattern"


@pytest.mark.parametrize("path", [".", "a..b", "a[", "a[x]", ""])
def test_a_path_that_cannot_be_read_is_refused_with_the_spec(path: str) -> None:
    with pytest.raises(SpecError) as caught:
        data(answer_path=path)
    assert caught.value.problems[0].pointer == "/data/answer_path"


def test_a_hostile_pattern_is_as_quick_as_any() -> None:
    began = time.perf_counter()
    with pytest.raises(UnusableRow):
        row({"question": "q", "answer": "a" * 60_000 + "!"}, answer_pattern=r"(a|aa)+$")
    assert time.perf_counter() - began < patience(2)


def test_a_chat_is_asked_as_it_is() -> None:
    turns = [{"role": "developer", "content": "Be brief."}, {"role": "assistant", "content": "?"}, USER]
    found = row({"messages": turns, "answer": 12, "level": 3}, format="messages", item=True)
    assert found.question == "system: Be brief.\n\nassistant: ?\n\nuser: 6+6=?"
    assert found.answer == "12"
    assert item_of(found) == {"answer": 12, "level": 3}
    asked = messages_for(found, data(format="messages", system_prompt="Other."))
    assert [(turn["role"], turn["content"]) for turn in asked] == [
        ("system", "Be brief."),
        ("assistant", "?"),
        ("user", "6+6=?"),
    ]


def test_a_chat_without_a_system_turn_gets_the_system_prompt_and_examples() -> None:
    found = row({"messages": [USER]}, format="messages", answer=False)
    assert (found.question, found.answer) == ("6+6=?", "")
    section = data(format="messages", system_prompt="S", examples=[{"question": "1+1=?", "answer": "2"}])
    assert [turn["content"] for turn in messages_for(found, section)] == ["S", "1+1=?", "2", "6+6=?"]
    assert messages_for(found, data(format="messages")) == [USER]  # no Chinese prompt by default


def test_text_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "6+"}, {"type": "input_text", "text": "6=?"}]
    assert row({"messages": [{"role": "user", "content": parts}]}, format="messages", answer=False).question == "6+6=?"


@pytest.mark.parametrize(
    "turns",
    [
        None,
        "6+6=?",
        [],
        [USER, {"role": "assistant", "content": "12"}],
        [{"role": "tool", "content": "x"}, USER],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        [{"role": "user", "content": "a\0b"}],
        [{"role": "user", "content": "x" * 70_000}],
        [USER] * 300,
        ["6+6=?"],
    ],
)
def test_what_is_no_chat_is_refused(turns: Any) -> None:
    with pytest.raises(UnusableRow) as caught:
        row({"messages": turns}, format="messages", answer=False)
    assert caught.value.code == "bad_messages"


def test_every_column_reaches_graders() -> None:
    record = {"question": "q", "answer": "1", "n": 1.5, "nested": {"a": [None, True]}, "bad": float("nan")}
    assert item_of(row(record, item=True)) == {**record, "bad": None}
    assert row(record).item == "{}"


def test_only_columns_that_templates_name_are_kept_where_no_grader_sees_the_whole_row() -> None:
    check = {"type": "string_check", "input": "{{sample.output_text}}", "operation": "eq"}
    graders: dict[str, Any] = {"same": {**check, "reference": "{{item.extra.label}}"}}
    needs = Needs.of(parse_spec({"rewards": {"graders": graders}}))
    assert (needs.answer, dict(needs.columns)) == (False, {"extra": "/rewards/graders/same/reference"})
    reader = RowReader(data(), needs)
    assert reader.columns.required["extra"] == "/rewards/graders/same/reference"
    found = reader.row(0, {"question": "q", "extra": {"label": "x"}, "other": 1})
    assert (found.answer, item_of(found)) == ("", {"extra": {"label": "x"}})
    graders["own"] = {"type": "python", "source": "def grade(sample, item): return 1"}
    assert Needs.of(parse_spec({"rewards": {"graders": graders}})).everything
    formula = {"graders": graders, "formula": "same + correctness"}
    assert Needs.of(parse_spec({"rewards": formula})).answer


def test_a_row_too_long_for_graders_is_refused() -> None:
    with pytest.raises(UnusableRow) as caught:
        row({"question": "q", "answer": "1", **{f"c{n}": "x" * 60_000 for n in range(5)}}, item=True)
    assert caught.value.code == "row_too_long"


def test_no_error_repeats_the_data() -> None:
    secret = "a-secret-in-the-data"
    records: list[dict[str, Any]] = [
        {"question": secret, "answer": None},
        {"question": secret, "answer": {"x": secret}},
        {"question": {"x": secret}, "answer": "1"},
    ]
    for record in records:
        with pytest.raises(UnusableRow) as caught:
            row(record)
        assert secret not in json.dumps([caught.value.detail, caught.value.remedy])
