"""The recipe's five rewards with other tags than the recipe's."""

from __future__ import annotations

import time

import pytest

from grpo_core.rewards import REWARD_NAMES, Tags, score
from grpo_core.rewards.tags import last_box
from grpo_core.spec import SYSTEM_PROMPT, SpecError, parse_spec
from tests.clock import patience

THINK = Tags("think", "answer")
BOX = Tags("think", "boxed")
BARE_BOX = Tags(None, "boxed")
NO_ANSWER_TAG = Tags("think", None)
NONE = Tags(None, None)


@pytest.mark.parametrize(
    ("tags", "text", "paid"),
    [
        (THINK, "<think>\n6+6\n</think>\n<answer>\n12\n</answer>", (2, 0.5, 0.5, 0.5, 0.5)),
        (THINK, "<think>6+6</think><answer>12</answer>", (2, 0.5, 0, 0.5, 0)),
        (THINK, "<reasoning>\n6+6\n</reasoning>\n<answer>\n12\n</answer>", (2, 0.5, 0, 0, 0.25)),
        (BOX, "<think>\n6+6\n</think>\nIt is \\boxed{12}.", (2, 0.5, 0.5, 0.5, 0.5)),
        (BOX, "<think>\\boxed{3}</think> so \\boxed{12}", (2, 0.5, 0, 0.5, 0)),
        (BOX, "<think>\n6+6\n</think>\n12", (0, 0, 0, 0, 1 / 3)),
        (BARE_BOX, "It is \\boxed{12}.", (2, 0.5, 0.5, 0.5, 0.5)),
        (BARE_BOX, "\\boxed{12", (0, 0, 0, 0, 0.5)),
        (NO_ANSWER_TAG, "<think>\n6+6\n</think>\n12", (2, 0.5, 0.5, 0.5, 0.5)),
        (NO_ANSWER_TAG, "12", (0, 0, 0, 0, 0)),
        (NONE, " 12 ", (2, 0.5, 0, 0, 0)),
        (NONE, "It is 13", (0, 0.5, 0, 0, 0)),
        (Tags(None, "label"), "Because.\n<label>\n12\n</label>", (2, 0.5, 0.5, 0.5, 0.5)),
        (Tags(None, "label"), "<label>12</label> x", (2, 0.5, 0, 0.5, -0.001)),
    ],
)
def test_what_is_paid(tags: Tags, text: str, paid: tuple[float, ...]) -> None:
    rewards = score(text, "12", "fixed", tags)
    assert tuple(rewards[name] for name in REWARD_NAMES) == pytest.approx(paid)


def test_boxes_nest_and_the_last_counts() -> None:
    assert last_box(r"\boxed{1} \boxed{\frac{3}{4}}.") == (r"\frac{3}{4}", 29)
    assert last_box(r"\boxed{{") is None


@pytest.mark.parametrize("tags", [THINK, BOX, BARE_BOX, NO_ANSWER_TAG, NONE])
@pytest.mark.parametrize("piece", ["\\boxed{", "<think>\n", "\n</think>\n", "{", "<answer>", "a"])
def test_hostile_completions_cost_no_more_than_others(tags: Tags, piece: str) -> None:
    began = time.perf_counter()
    score(piece * 20_000, "12", "fixed", tags)
    assert time.perf_counter() - began < patience(2)


def test_the_prompt_follows_the_tags_unless_there_is_one() -> None:
    think = {"rewards": {"tags": {"reasoning": "think", "answer": "boxed"}}}
    prompt = "Answer in this format:\n<think>\n...\n</think>\n\\boxed{...}\n"
    assert parse_spec(think).data.system_prompt == prompt
    assert parse_spec({**think, "data": {"system_prompt": "Mine."}}).data.system_prompt == "Mine."
    assert parse_spec({"rewards": {"tags": {}}}).data.system_prompt == SYSTEM_PROMPT
    none = {"rewards": {"tags": {"reasoning": None, "answer": None}}}
    assert parse_spec(none).data.system_prompt == ""


def test_default_tags_change_no_digest() -> None:
    assert parse_spec({"rewards": {"tags": {"reasoning": "reasoning"}}}).digest() == parse_spec({}).digest()
    assert parse_spec({"rewards": {"tags": {"reasoning": "think"}}}).needed_format() == 2


@pytest.mark.parametrize(
    ("rewards", "pointer"),
    [
        ({"tags": {"reasoning": "<think>"}}, "/rewards/tags/reasoning"),
        ({"tags": {"answers": "x"}}, "/rewards/tags/answers"),
        ({"tags": {"reasoning": "think"}, "mode": "published"}, "/rewards/tags"),
    ],
)
def test_bad_tags_are_refused(rewards: dict[str, object], pointer: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec({"rewards": rewards})
    assert [problem.pointer for problem in caught.value.problems] == [pointer]
