"""The rank that the others wait for is named, once, and chance is not."""

from __future__ import annotations

import pytest

from grpo_core.monitoring.slow_rank import STEPS, Slow, SlowRank


def told(steps: list[list[float]]) -> list[Slow]:
    ranks = SlowRank()
    return [found for step in steps if (found := ranks.note(step)) is not None]


@pytest.mark.parametrize("others", [[1.0], [1.0, 1.1, 0.9]])
def test_a_rank_that_drags_is_named_once(others: list[float]) -> None:
    steps = [[*others, 1.6]] * (3 * STEPS)
    assert told(steps) == [Slow(len(others), 1.6, sorted(others)[(len(others)) // 2])]
    assert told(steps[: STEPS - 1]) == []


def test_chance_and_small_differences_are_not_told() -> None:
    assert told([[1.0, 1.4]] * 50) == []
    assert told([[1.0, 2.0], [2.0, 1.0]] * 50) == [], "another one each time"
    assert told(([[1.0, 2.0]] * (STEPS - 1) + [[1.0, 1.0]]) * 5) == []
    assert told([[0.0, 1.0]] * 50) == [], "one had nothing to do"


def test_who_drags_again_later_is_named_again() -> None:
    slow, well = [[1.0, 2.0]] * STEPS, [[1.0, 1.0]] * STEPS
    assert len(told(slow + well + slow)) == 2
