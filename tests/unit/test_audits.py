from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_core.monitoring.audits import RULES, Auditor, Finding
from grpo_core.monitoring.audits.auditor import _Alarm
from grpo_core.run_dir.records import Completion
from grpo_core.spec import JobSpec, parse_spec
from tests.unit.traces import HEALTHY, LEARNING, STILL, Behaviour, flat, learnt, slope, spec_of, trace

RECIPE, WIDE = (1, 6), (8, 8)
DOCS = Path(__file__).resolve().parents[2] / "docs" / "why" / "audits.md"

SICK: dict[str, Behaviour] = {
    "no_variance": STILL.but(in_format=flat(0.0), right=flat(0.0)),
    "format_gaming": STILL.but(in_format=learnt(0.1, 0.98, 0.3), right=slope(0.12, 0.01)),
    "truncation": STILL.but(cut=flat(0.5)),
    "length_collapse": STILL.but(tokens=slope(150.0, 10.0)),
    "length_growth": STILL.but(tokens=slope(80.0, 300.0)),
    "duplicates": STILL.but(repeated=slope(0.2, 0.95)),
    "entropy_collapse": STILL.but(entropy=slope(0.3, 0.005)),
    "kl_runaway": STILL.but(kl=slope(0.0, 8.0)),
}


def audit(spec: JobSpec, lines: Sequence[dict[str, Any]]) -> list[Finding]:
    auditor = Auditor(spec)
    return [finding for line in lines for finding in auditor.add(line)]


def steps_of(spec: JobSpec, behaviour: Behaviour, seed: int = 1) -> list[dict[str, Any]]:
    lines = list(trace(spec, behaviour, seed))
    if behaviour is SICK["no_variance"]:
        # A model that never meets the format is paid nothing at all.
        for line in lines:
            line |= {"zero_variance_share": 1.0, "reward": 0.0, "rewards": dict.fromkeys(line["rewards"], 0.0)}
    return lines


def line(step: int, **changes: Any) -> dict[str, Any]:
    still = {
        "step": step,
        "reward": 1.0 + 0.01 * (step % 3),
        "rewards": {"correctness": 0.4},
        "zero_variance_share": 0.2,
        "duplicate_share": 0.1,
        "truncated_share": 0.0,
        "completion_tokens_mean": 100.0 + step % 3,
        "entropy": 0.3,
        "kl": 0.1,
    }
    return {**still, **changes}


def test_every_rule_has_a_sick_trace_here() -> None:
    assert [rule.name for rule in RULES] == list(SICK)


@pytest.mark.parametrize("size", [RECIPE, WIDE], ids=str)
@pytest.mark.parametrize("name", SICK)
def test_a_sick_run_is_told_by_its_rule_and_few_times(name: str, size: tuple[int, int]) -> None:
    spec = spec_of(*size)
    found = [finding for finding in audit(spec, steps_of(spec, SICK[name])) if finding.audit == name]
    assert 1 <= len(found) <= 8, [finding.steps for finding in found]
    first, last = found[0].steps
    assert 1 <= first <= last <= spec.training.steps
    assert found[0].message.endswith(".")
    assert found[0].rollouts["step"] <= last
    assert set(found[0].rollouts) <= {"step", "prompt", "order", "finish"}


@pytest.mark.parametrize("size", [RECIPE, WIDE], ids=str)
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_hears_nothing(name: str, size: tuple[int, int]) -> None:
    """A few seeds of what docs/why/audits.md measures with hundreds (`false_alarms` below)."""
    spec = spec_of(*size, steps=120)
    told = [f.audit for seed in range(3) for f in audit(spec, list(trace(spec, HEALTHY[name], 100 + seed)))]
    assert told == []


def false_alarms(traces: int) -> str:
    """How many of so many healthy runs of each kind hear what: `python -m tests.unit.test_audits 200`."""
    rows: list[str] = []
    for size, (name, behaviour) in itertools.product((RECIPE, WIDE), HEALTHY.items()):
        spec = spec_of(*size)
        heard = [{f.audit for f in audit(spec, list(trace(spec, behaviour, seed)))} for seed in range(traces)]
        by_rule = {rule.name: sum(rule.name in found for found in heard) for rule in RULES}
        rows.append(f"{size} {name}: {sum(map(bool, heard))} of {traces} { ({n: c for n, c in by_rule.items() if c}) }")
    return "\n".join(rows)


# Not applicable.


def test_without_a_weight_for_correctness_its_rule_is_silent() -> None:
    sick = SICK["format_gaming"]
    for weights in ({"correctness": 0.0}, {"correctness": -1.0}):
        spec = spec_of(*WIDE, rewards={"weights": weights})
        assert "format_gaming" not in {f.audit for f in audit(spec, steps_of(spec, sick))}


def test_published_mode_and_custom_weights_are_audited_too() -> None:
    rewards = {"mode": "published", "weights": {"correctness": 0.5, "xml_count": 3.0}}
    spec = spec_of(*WIDE, rewards=rewards)
    assert "format_gaming" in {f.audit for f in audit(spec, steps_of(spec, SICK["format_gaming"]))}
    assert audit(spec, list(trace(spec, LEARNING, 3))) == []


def test_when_correctness_is_all_that_is_paid_nothing_can_be_gamed() -> None:
    others = dict.fromkeys(("integer", "strict_format", "soft_format", "xml_count"), 0.0)
    spec = spec_of(*WIDE, rewards={"weights": others})
    assert "format_gaming" not in {f.audit for f in audit(spec, steps_of(spec, SICK["format_gaming"]))}


def test_lines_of_other_trainers_that_lack_numbers_are_no_error() -> None:
    spec = spec_of(*WIDE)
    lines = [{"step": step, "reward": 1.0, "rewards": {"correctness": 0.5}} for step in range(1, 60)]
    assert audit(spec, lines) == []
    assert audit(spec, [{"step": step} for step in range(1, 60)]) == []
    assert audit(spec, [line(step, kl=None, entropy=None) for step in range(1, 60)]) == []


@pytest.mark.parametrize("name", SICK)
def test_a_threshold_of_0_turns_a_rule_off(name: str) -> None:
    spec = spec_of(*WIDE, audits={name: 0})
    assert name not in {finding.audit for finding in audit(spec, steps_of(spec, SICK[name]))}


def test_a_model_that_answers_everything_is_not_told_that_it_is_sure_of_itself() -> None:
    solved = STILL.but(
        in_format=flat(1.0), right=flat(0.99), entropy=slope(0.3, 0.001), repeated=flat(0.9), tokens=slope(150.0, 20.0)
    )
    spec = spec_of(*WIDE)
    assert {f.audit for f in audit(spec, list(trace(spec, solved, 1)))} <= {"no_variance"}


def test_shorter_answers_that_are_right_more_often_are_learning() -> None:
    better = LEARNING.but(tokens=slope(190.0, 25.0))
    spec = spec_of(*WIDE)
    assert "length_collapse" not in {f.audit for f in audit(spec, list(trace(spec, better, 1)))}


# What is said.


def test_no_variance_counts_steps_and_starts_again() -> None:
    spec = spec_of(*WIDE, audits={"no_variance": 5})
    silent = [*range(3, 9), *range(40, 60)]
    lines = [line(step, zero_variance_share=1.0 if step in silent else 0.9) for step in range(1, 70)]
    assert [finding.steps for finding in audit(spec, lines)] == [(3, 7), (40, 44), (40, 49), (40, 59)]


def test_values_are_numbers_of_json() -> None:
    spec = spec_of(*WIDE)
    lines = [line(step, entropy=0.3 if step < 30 else 0.0) for step in range(1, 60)]
    [finding, *_] = audit(spec, lines)
    data = finding.as_dict()
    assert data["values"] == {"entropy_first": 0.3, "entropy_now": pytest.approx(0.06, abs=0.01)}
    assert (data["code"], data["audit"], data["steps"]) == ("entropy_collapse", "entropy_collapse", [28, 37])
    assert parse_spec({}).audits.entropy_collapse == 5


def test_a_window_holds_enough_completions() -> None:
    """Ten steps of the recipe are 60 completions: too few to speak of."""
    for size, first in ((WIDE, 10), (RECIPE, 22)):
        lines = [line(step, truncated_share=0.9) for step in range(1, 60)]
        assert audit(spec_of(*size), lines)[0].steps == (1, first)


def completion(**changes: Any) -> Completion:
    usual: dict[str, Any] = {
        "prompt_id": "a",
        "row": 0,
        "sample": 0,
        "seed": 1,
        "prompt": "1+1",
        "answer": "2",
        "completion": "two",
        "rewards": {"correctness": 0.0},
        "reward_total": 1.0,
        "advantage": 0.0,
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "finish_reason": "stop",
        "adapter_version": 0,
    }
    return Completion(**{**usual, **changes})


def query(name: str, completions: Sequence[Completion], **spec: Any) -> dict[str, Any]:
    of = spec_of(*WIDE, **spec)
    auditor = Auditor(of)
    for metrics in steps_of(of, SICK[name]):
        for finding in auditor.add(metrics, completions):
            if finding.audit == name:
                return finding.rollouts
    raise AssertionError(name)


def test_gaming_points_at_the_best_paid_wrong_completion() -> None:
    right = completion(prompt_id="b", rewards={"correctness": 2.0}, reward_total=4.0)
    gamed = completion(prompt_id="c", reward_total=2.0)
    found = query("format_gaming", [completion(), right, gamed])
    assert (found["prompt"], found["order"]) == ("c", "-reward")
    assert "prompt" not in query("format_gaming", [right])


def test_duplicates_point_at_the_group_that_has_most() -> None:
    group = [completion(prompt_id="b", sample=n) for n in range(3)]
    assert query("duplicates", [completion(), completion(sample=1), *group])["prompt"] == "b"


def test_a_step_that_draws_nothing_points_at_the_one_that_drew() -> None:
    found = query("truncation", [], loss={"iterations": 3})
    assert found["step"] % 3 == 1
    assert (found["finish"], found["order"]) == ("length", "reward")


# How often.


@pytest.mark.parametrize(
    ("severities", "told"),
    [
        ([0.9, 1.0, 1.1, 1.5, 1.9], ["began"]),
        ([1.0, 1.5, 2.0, 3.0, 4.0], ["began", "worse", "worse"]),
        ([1.0, 0.9, 1.1, 0.85, 1.2], ["began"]),
        ([1.0, 0.5, 1.0, 1.0], ["began", "over"]),
        ([1.0, 0.5, 0.1, 0.1, 0.1, 1.0], ["began", "over", "began"]),
    ],
)
def test_hysteresis(severities: list[float], told: list[str]) -> None:
    alarm = _Alarm(RULES[0], window=3)
    assert [change for severity in severities if (change := alarm.take(severity))] == told


def test_patience_waits_for_it_to_last() -> None:
    alarm = _Alarm(replace(RULES[0], patience=1.0), window=3)
    assert [alarm.take(severity) for severity in (1, 1, 0, 1, 1, 1)] == [None] * 5 + ["began"]


@pytest.mark.parametrize("name", SICK)
@pytest.mark.parametrize("cut", [1, 30, 61, 117])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(name: str, cut: int) -> None:
    spec = spec_of(*WIDE, steps=120)
    lines = steps_of(spec, SICK[name])
    whole = audit(spec, lines)
    resumed = Auditor(spec)
    assert [*resumed.replay(lines[:cut]), *(f for metrics in lines[cut:] for f in resumed.add(metrics))] == whole
    assert whole


def silent_between(first: int, last: int, steps: int) -> list[dict[str, Any]]:
    return [line(n, zero_variance_share=1.0 if first <= n <= last else 0.2) for n in range(1, steps + 1)]


def test_a_stretch_that_is_over_is_told_as_past() -> None:
    auditor = Auditor(spec_of(*WIDE))
    lines = silent_between(10, 30, 40)
    (found,) = auditor.replay(lines[:30])
    assert (found.audit, found.steps, auditor.endings) == ("no_variance", (10, 29), [])
    assert auditor.add(lines[30]) == []
    (ending,) = auditor.endings
    assert ending.steps == (10, 30)
    assert ending.message.startswith("Between steps 10 and 30 no group had a signal")
    assert ending.as_dict()["code"] == "audit_over"
    auditor.replay(lines[31:])
    assert auditor.endings == [ending]


@pytest.mark.parametrize("name", ["no_variance", "truncation", "length_growth", "entropy_collapse", "kl_runaway"])
def test_what_lasts_to_the_end_is_not_told_as_past(name: str) -> None:
    auditor = Auditor(spec_of(*WIDE, steps=120))
    auditor.replay(steps_of(spec_of(*WIDE, steps=120), SICK[name]))
    assert not [ending for ending in auditor.endings if ending.audit == name]


# Documented.


def test_every_rule_and_its_threshold_is_in_the_page() -> None:
    page, thresholds = DOCS.read_text(encoding="utf-8"), JobSpec().audits.model_dump()
    assert set(thresholds) == {rule.name for rule in RULES}
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) ", page, re.MULTILINE))
    assert {name: float(value) for name, value in rows.items()} == thresholds


if __name__ == "__main__":
    import sys

    print(false_alarms(int(sys.argv[1])))
