"""What graders cost a step, as `scripts/bench_graders.py` measures it; run by `make alone`."""

from __future__ import annotations

import pytest

from grpo_core.rewards.graders.confined import why_not_confined
from scripts.bench_graders import HOSTILE_SECONDS, ORDINARY, PROMPTS, ROWS, hostile_cost, math_costs, python_cost
from tests.clock import patience

pytestmark = [pytest.mark.alone, pytest.mark.skipif(bool(why_not_confined()), reason=why_not_confined())]


def test_math_grades_256_completions_in_less_than_a_second() -> None:
    for cost in math_costs():
        assert (cost.right, cost.failed) == (PROMPTS, 0), cost
        assert cost.cpu_seconds < 1.0, cost
        assert cost.seconds < patience(1.0), cost
    assert len(ORDINARY) >= 7


def test_256_completions_that_hang_take_no_longer_than_a_step_may() -> None:
    cost = hostile_cost()
    assert cost.seconds < HOSTILE_SECONDS + 0.5, cost
    assert cost.right == PROMPTS, "ordinary answers among them are still graded"
    assert cost.failed > ROWS / 2, "most of the others hung"


def test_three_python_graders_cost_less_than_50_ms() -> None:
    cost = python_cost()
    assert (cost.right, cost.failed) == (ROWS, 0)
    assert cost.cpu_seconds < 0.05, cost
    assert cost.seconds < patience(0.05), cost
