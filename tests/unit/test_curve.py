"""When evaluations are due, which step is best, and when one ends training."""

from __future__ import annotations

import json
from typing import Any

import pytest

from grpo_core.evaluation.curve import Curve, Point, spread
from grpo_core.schedule import COST_SHARE, MOST, fixed_interval, sample_size, spaced
from grpo_core.spec import JobSpec, SpecError, parse_spec

UNKNOWN = (0.0, 1.0)


def spec_of(steps: int = 100, **evaluation: Any) -> JobSpec:
    return parse_spec({"training": {"steps": steps}, "evaluation": {"questions": 200, **evaluation}})


def point(step: int, value: float | None, seconds: float = 1.0) -> Point:
    return Point(
        step=step,
        questions=10,
        metric="strict_accuracy",
        value=value,
        interval=None,
        strict_accuracy=0.5,
        strict_interval=UNKNOWN,
        lenient_accuracy=0.5,
        lenient_interval=UNKNOWN,
        strict_format_share=0.5,
        completion_tokens=9.0,
        seconds=seconds,
    )


def curve_of(*values: float | None, **evaluation: Any) -> Curve:
    """A curve with these values after every tenth step; the first is the base model's."""
    curve = Curve(spec_of(**evaluation))
    for number, value in enumerate(values):
        curve.add(point(10 * number, value))
    return curve


def test_the_best_step_is_the_earliest_with_the_largest_value_of_an_adapter() -> None:
    assert curve_of().best_step is None
    assert curve_of(0.9).best_step is None
    assert curve_of(0.9, 0.2, 0.5, None, 0.5).best_step == 20


def test_a_step_that_is_evaluated_twice_is_one_point() -> None:
    curve = curve_of(0.1, 0.2, 0.3)
    curve.add(point(10, 0.9))
    assert [(p.step, p.value) for p in curve.points] == [(0, 0.1), (10, 0.9), (20, 0.3)]


@pytest.mark.parametrize(
    ("values", "stop_when", "reason"),
    [
        ([0.9, 0.5, 0.7], {"target": 0.7}, "target_reached"),
        ([0.9, 0.5, 0.6], {"target": 0.7}, None),  # the base model's value ends nothing
        ([0.1, 0.5, 0.5, 0.4], {"no_better_for": 2}, "no_better"),
        ([0.1, 0.5, 0.4, 0.6], {"no_better_for": 2}, None),
        ([0.1, 0.5, None, 0.4], {"no_better_for": 2}, None),  # not known is not worse
        ([0.1, 0.5, 0.4, 0.4], {}, None),
    ],
)
def test_when_training_ends(values: list[float | None], stop_when: dict[str, Any], reason: str | None) -> None:
    curve = curve_of(*values, stop_when=stop_when)
    assert curve.stopped == reason
    if reason is not None:
        assert f"after step {10 * (len(values) - 1)}" in curve.sentence()
        assert "evaluation.stop_when." in curve.sentence()


def test_the_evaluation_after_the_last_step_ends_nothing_early() -> None:
    curve = Curve(spec_of(20, every=10, stop_when={"target": 0.5}))
    curve.add(point(10, 0.1))
    curve.add(point(20, 0.9))
    assert curve.stopped is None


def test_a_resumed_run_knows_what_the_earlier_one_knew() -> None:
    curve = curve_of(0.1, 0.5, 0.4, stop_when={"no_better_for": 1}, every=10)
    again = Curve(spec_of(stop_when={"no_better_for": 1}, every=10))
    again.take_over(json.loads(json.dumps(curve.state())))
    assert (again.points, again.every, again.stopped) == (curve.points, 10, "no_better")
    assert again.lines()[1] == {"v": 1, **curve.points[1].as_dict()}


@pytest.mark.parametrize(
    ("spec", "every"),
    [
        (spec_of(100, every=7), 7),
        (spec_of(100, every=0), 0),
        (spec_of(100, stop_when={"target": 1.0}), 10),
        (spec_of(5, stop_when={"target": 1.0}), 1),
        (spec_of(19), 0),
        (spec_of(20), None),
    ],
)
def test_the_interval_that_a_spec_fixes(spec: JobSpec, every: int | None) -> None:
    assert fixed_interval(spec) == every


@pytest.mark.parametrize("one", [0.01, 0.5, 1.0, 2.0, 40.0])
def test_without_an_interval_evaluations_cost_at_most_their_share(one: float) -> None:
    steps, step_seconds, ends = 250, 2.0, 2 * one
    every = spaced(steps, step_seconds=step_seconds, one=one, ends=ends)
    count = (steps - 1) // every if every else 0
    assert count <= MOST
    assert not count or ends + count * one <= COST_SHARE * steps * step_seconds
    assert (every == 0) is (3 * one > COST_SHARE * steps * step_seconds)


def run_through(curve: Curve, *, step_seconds: float, one: float, ends: float) -> list[int]:
    """Every step of the job, in order; returns the evaluated ones."""
    curve.add(point(0, 0.1, ends / 2))
    asked: list[int] = []
    for step in range(1, 101):
        if curve.is_due(step, step_seconds, ends=ends):
            asked.append(step)
            curve.add(point(step, 0.1, one))
    return asked


def test_a_fixed_interval_is_kept_whatever_it_costs() -> None:
    curve = Curve(spec_of(every=25))
    assert run_through(curve, step_seconds=0.001, one=100.0, ends=100.0) == [25, 50, 75]


def test_evaluations_that_take_longer_than_expected_are_left_out() -> None:
    cheap, dear = Curve(spec_of()), Curve(spec_of())
    assert len(run_through(cheap, step_seconds=2.0, one=0.5, ends=1.0)) == 9
    asked = run_through(dear, step_seconds=2.0, one=3.0, ends=1.0)
    assert 1.0 + 3.0 * len(asked) <= COST_SHARE * 100 * 2.0
    assert len(asked) == 3
    assert run_through(Curve(spec_of()), step_seconds=0.1, one=0.5, ends=1.0) == []


def test_the_questions_during_training_are_spread_over_all() -> None:
    assert sample_size(spec_of(), 200) == 64
    assert sample_size(spec_of(sample=50), 30) == 30
    assert spread(3, 10) == [0, 3, 6]
    assert spread(10, 10) == list(range(10))


@pytest.mark.parametrize(
    ("evaluation", "pointer", "code"),
    [
        ({"every": 5}, "/evaluation/every", "no_questions"),
        ({"sample": 5}, "/evaluation/sample", "no_questions"),
        ({"stop_when": {"target": 0.5}}, "/evaluation/stop_when", "no_questions"),
        ({"questions": 5, "sample": 6}, "/evaluation/sample", "sample_too_large"),
        ({"questions": 5, "every": 0, "stop_when": {"target": 0.5}}, "/evaluation/every", "never_evaluates"),
        ({"questions": 5, "every": 250, "stop_when": {"target": 0.5}}, "/evaluation/every", "never_evaluates"),
    ],
)
def test_what_cannot_be_is_refused(evaluation: dict[str, Any], pointer: str, code: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec({"evaluation": evaluation})
    assert [(problem.pointer, problem.code) for problem in caught.value.problems] == [(pointer, code)]


def test_evaluations_during_training_are_of_the_second_format() -> None:
    assert spec_of().needed_format() == 1
    used: list[dict[str, Any]] = [{"every": 0}, {"sample": 9}, {"stop_when": {"target": 1.0}}, {"automatic": True}]
    for evaluation in used:
        assert spec_of(**evaluation).needed_format() == 2
