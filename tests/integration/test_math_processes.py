"""A step with many answers is verified by several processes, and each answer's grade is its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing

import pytest

from grpo_core.rewards.graders import mathematics
from grpo_core.rewards.graders.confined import why_not_confined
from grpo_core.rewards.graders.mathematics import MathGrader
from grpo_core.rewards.graders.models import GraderLimits, Math
from grpo_core.rewards.graders.protocol import GraderContext, GraderRow

pytestmark = pytest.mark.skipif(bool(why_not_confined()), reason=why_not_confined())
COUNT = 18


def rows(step: int) -> list[GraderRow]:
    """Every third answer is right, and none is a number that is compared without a process."""
    answers = [rf"\boxed{{\log({step})+\sin({n + 2 if n % 3 == 0 else n + 3}x)}}" for n in range(COUNT)]
    return [
        GraderRow(
            sample={"output_text": answer},
            item={"gold": rf"\sin({n + 2}x)+\log({step})"},
            prompt_id=str(n),
            number=0,
            step=step,
        )
        for n, answer in enumerate(answers)
    ]


@pytest.fixture
def grader(monkeypatch: pytest.MonkeyPatch) -> Iterator[MathGrader]:
    """A grader on a host with 24 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(3 * mathematics.CORES_EACH)))
    monkeypatch.setattr(mathematics, "LEAST_EACH", COUNT // 3)
    model = Math(type="math", input="{{sample.output_text}}", reference="{{item.gold}}")
    limits = GraderLimits(step_seconds=120, row_seconds=60)
    with closing(mathematics.make(model, GraderContext(name="m", limits=limits, environment={}, seed=0))) as grader:
        assert isinstance(grader, MathGrader)
        yield grader


def test_each_process_gets_a_share_and_grades_stay_in_order(grader: MathGrader) -> None:
    right = [float(n % 3 == 0) for n in range(COUNT)]
    assert [grade.score for grade in grader.grade(rows(2)[: COUNT // 3])] == right[: COUNT // 3]
    assert [process.starts for process in grader._processes] == [1, 0, 0], "few answers need one process"
    for step in (3, 4):
        assert [grade.score for grade in grader.grade(rows(step))] == right
    assert [process.starts for process in grader._processes] == [1, 1, 1]


def test_a_lost_process_is_replaced(grader: MathGrader) -> None:
    grader.grade(rows(2))
    grader._processes[1].close()
    assert [grade.score for grade in grader.grade(rows(3))] == [float(n % 3 == 0) for n in range(COUNT)]
    assert [process.starts for process in grader._processes] == [1, 2, 1]
