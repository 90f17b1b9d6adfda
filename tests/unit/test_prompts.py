"""The turns a model is asked, and the prompts that are too long to be asked."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_core.datasets import DatasetError, Row
from grpo_core.datasets.prompts import build_prompts, messages_for
from grpo_core.spec import SYSTEM_PROMPT, JobSpec, parse_spec


class CharacterTokenizer:
    """One token a character, two for each turn's marks, one that asks for the answer."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        assert options == {"add_generation_prompt": True, "tokenize": False}
        return ["".join(f"<{turn['content']}>" for turn in turns) + ">" for turns in conversation]

    def __call__(self, text: Any, **options: Any) -> Any:
        assert options == {"add_special_tokens": False}
        return {"input_ids": [[0] * len(one) for one in text]}


def spec_of(**sections: dict[str, object]) -> JobSpec:
    return parse_spec({"data": {"system_prompt": ""}, **sections})


def rows_of(*questions: str) -> list[Row]:
    return [Row(10 + index, question, "1") for index, question in enumerate(questions)]


def test_the_recipe_asks_with_its_system_prompt() -> None:
    assert messages_for("几个？", parse_spec({}).data) == [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": "几个？"},
    ]


def test_worked_examples_come_first_as_earlier_turns() -> None:
    data = parse_spec({"data": {"system_prompt": "", "examples": [{"question": "q", "answer": "a"}] * 2}}).data
    assert [turn["role"] for turn in messages_for("x", data)] == ["user", "assistant", "user", "assistant", "user"]
    assert messages_for("x", data)[-1] == {"role": "user", "content": "x"}


def test_prompts_are_named_after_their_row() -> None:
    built = build_prompts(rows_of("a", "b"), spec_of(), CharacterTokenizer())
    assert [(p.prompt_id, p.row, p.question, p.answer) for p in built.prompts] == [
        ("10", 10, "a", "1"),
        ("11", 11, "b", "1"),
    ]
    assert (built.dropped, built.longest_kept, built.longest_dropped) == (0, 4, 0)


def test_prompts_over_the_limit_are_dropped_and_counted_with_their_template() -> None:
    spec = spec_of(sampling={"max_prompt_tokens": 10})
    built = build_prompts(rows_of("1234567", "12345678", "1"), spec, CharacterTokenizer())
    assert [p.question for p in built.prompts] == ["1234567", "1"]
    assert (built.dropped, built.longest_kept, built.longest_dropped) == (1, 10, 11)


def test_no_prompt_left_names_the_length_that_would_do() -> None:
    spec = spec_of(sampling={"max_prompt_tokens": 10})
    with pytest.raises(DatasetError, match="max_prompt_tokens to 13") as error:
        build_prompts(rows_of("x" * 20, "x" * 10), spec, CharacterTokenizer())
    assert error.value.code == "all_prompts_too_long"


def test_a_step_needs_as_many_prompts_as_it_asks() -> None:
    spec = spec_of(sampling={"prompts_per_step": 3})
    with pytest.raises(DatasetError, match="to 2 or less") as error:
        build_prompts(rows_of("a", "b"), spec, CharacterTokenizer())
    assert error.value.code == "too_few_prompts"


def test_many_rows_are_counted_in_several_batches() -> None:
    built = build_prompts(rows_of(*("x" * (n % 7) for n in range(1500))), spec_of(), CharacterTokenizer())
    assert len(built.prompts) == 1500
    assert built.longest_kept == 9
