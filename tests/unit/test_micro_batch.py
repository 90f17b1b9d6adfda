"""Which splits of a step are the same training, and which comes next after an out-of-memory."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_core.hardware.micro_batch import can_cure, keeps_objective, smaller, splits
from grpo_core.spec import JobSpec, parse_spec


def spec_of(prompts: int, generations: int, **sections: Any) -> JobSpec:
    return parse_spec({"sampling": {"prompts_per_step": prompts, "generations": generations}, **sections})


def test_the_recipe_can_be_lowered_to_one_completion() -> None:
    spec, tried = parse_spec({}), [1]
    while (parts := smaller(spec, tried[-1])) is not None:
        tried.append(parts)
    assert tried == [1, 2, 3, 6]


def test_parts_are_equal_and_each_split_is_a_legal_spec() -> None:
    spec = spec_of(4, 5)
    assert splits(spec) == [1, 2, 4, 5, 10, 20]
    for parts in splits(spec):
        sampling = {"prompts_per_step": 4, "generations": 5, "gradient_accumulation": parts}
        assert parse_spec({"sampling": sampling}).micro_batch * parts == 20


@pytest.mark.parametrize(("accumulation", "following"), [(1, 2), (2, 3), (3, 4), (4, 6), (5, 6), (6, 12), (12, None)])
def test_the_next_split_is_the_next_divisor(accumulation: int, following: int | None) -> None:
    assert smaller(spec_of(3, 4), accumulation) == following


def test_a_loss_that_averages_over_the_part_is_left_as_asked() -> None:
    spec = spec_of(3, 4, loss={"type": "bnpo"})
    assert not keeps_objective(spec)
    assert smaller(spec, 1) is None


def test_smaller_parts_cure_only_what_training_a_step_needs() -> None:
    assert can_cure("out_of_memory", "training")
    assert can_cure("out_of_memory", "evaluating"), "a step's memory may be what is missing"
    assert not can_cure("out_of_memory", "loading"), "the model itself does not fit"
    assert not can_cure("out_of_memory_in_rollout", "training"), "a step's completions are drawn together"
    assert not can_cure("no_room_for_rollouts", "training")
