"""How a sweep becomes specs, and how a group of jobs becomes a table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from grpo_core.spec import SpecError
from grpo_core.spec.sweep import MAX_JOBS, parse_sweep
from jobs.read.groups import summarise
from jobs.store.job import member_ids, new_group_id
from tests.unit.fakes import make_record

SPEC = {"name": "s", "training": {"seed": 7}}


def test_each_combination_is_repeated_with_the_next_seed() -> None:
    grid = {"lr": [1e-5, 3e-5], "sampling.generations": [4, 8]}
    specs = parse_sweep({"spec": SPEC, "grid": grid, "repeat": 3})
    assert [(s.optimizer.learning_rate, s.sampling.generations, s.training.seed) for s in specs] == [
        (rate, generations, seed) for rate in (1e-5, 3e-5) for generations in (4, 8) for seed in (7, 8, 9)
    ]
    for one, other in ((specs[0], specs[1]), (specs[1], specs[2])):
        seed = other.training.model_copy(update={"seed": one.training.seed})
        assert other.model_copy(update={"training": seed}).as_dict() == one.as_dict(), "repeats differ by the seed only"
    assert parse_sweep({"spec": SPEC, "grid": grid, "repeat": 3}) == specs


def test_a_sweep_without_anything_is_the_recipe_once() -> None:
    assert [spec.as_dict() for spec in parse_sweep({})] == [spec.as_dict() for spec in parse_sweep({"spec": {}})]
    assert len(parse_sweep({})) == 1


def test_a_field_of_an_absent_section_is_set() -> None:
    reference = {"from_checkpoint": None}
    grid = {"from_checkpoint.step": [5, 10], "from_checkpoint.job": ["job-01ARZ3NDEKTSV4RRFFQ69G5FAV"]}
    steps = [s.from_checkpoint and s.from_checkpoint.step for s in parse_sweep({"spec": reference, "grid": grid})]
    assert steps == [5, 10]


@pytest.mark.parametrize(
    ("body", "pointer", "code"),
    [
        ([], "", "not_an_object"),
        ({"training": {}}, "/training", "unknown_field"),
        ({"grid": []}, "/grid", "bad_type"),
        ({"grid": {"lr": 1e-5}}, "/grid/lr", "bad_type"),
        ({"grid": {"lr": []}}, "/grid/lr", "bad_type"),
        ({"grid": {"lr": [1e-5, 1e-5]}}, "/grid/lr", "repeated"),
        ({"grid": {"lr": [1e-5], "optimizer.learning_rate": [2e-5]}}, "/grid/optimizer.learning_rate", "repeated"),
        ({"grid": {"training.seed": [1, 2]}, "repeat": 2}, "/grid/training.seed", "conflict"),
        ({"repeat": 0}, "/repeat", "bad_value"),
        ({"repeat": True}, "/repeat", "bad_value"),
        ({"repeat": MAX_JOBS, "grid": {"lr": [1e-5, 2e-5]}}, "/grid", "too_large"),
        ({"spec": {"lora": {"rnak": 1}}}, "/spec/lora/rnak", "unknown_field"),
        ({"grid": {"optimizer.learning_rte": [1]}}, "/grid/optimizer.learning_rte", "unknown_field"),
        ({"grid": {"lora.rank": [8, "x"]}}, "/grid/lora.rank", "bad_type"),
        ({"spec": [], "grid": {"lr": [1e-5]}}, "/spec", "not_an_object"),
    ],
)
def test_what_is_wrong_with_a_sweep_is_named(body: Any, pointer: str, code: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_sweep(body)
    assert [problem.pointer for problem in caught.value.problems] == [pointer]
    assert caught.value.problems[0].remedy
    if code != "bad_type":
        assert caught.value.problems[0].code == code


def test_the_ids_of_a_group_follow_from_it_and_sort_in_its_order() -> None:
    group = new_group_id()
    ids = member_ids(group, MAX_JOBS)
    assert ids == sorted(set(ids)) == member_ids(group, MAX_JOBS)
    assert ids[:3] == member_ids(group, 3)
    assert not set(ids) & set(member_ids(new_group_id(), MAX_JOBS))


def test_repeats_are_one_row_with_mean_and_spread() -> None:
    specs = parse_sweep({"spec": SPEC, "grid": {"lr": [1e-5, 3e-5]}, "repeat": 3})
    records = [replace(make_record(owner="ann", spec=spec), reward=float(n)) for n, spec in enumerate(specs)]
    after = {
        record.id: {"paired": {"strict": {"after": share, "difference": share - 0.25}}}
        for record, share in zip(records, (0.5, 0.6, 0.7, 0.9), strict=False)
    }
    table = summarise(records, after)
    assert table.fields == ["optimizer.learning_rate"]
    first, second = table.rows
    assert (first.settings, second.settings) == ({"optimizer.learning_rate": 1e-5}, {"optimizer.learning_rate": 3e-5})
    assert first.jobs == records[:3]
    strict = first.figures["strict_accuracy"]
    assert (strict.n, strict.mean, strict.sd, strict.least, strict.most) == (
        3, pytest.approx(0.6), pytest.approx(0.1), 0.5, 0.7
    )  # fmt: skip
    assert (second.figures["strict_accuracy"].n, second.figures["strict_accuracy"].sd) == (1, None)
    assert second.figures["reward"].n == 3
    assert "metric" not in first.figures
