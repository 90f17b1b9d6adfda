"""Fields that a spec gains: what older workers are given, and that each one is declared.

`spec_formats.json` holds, for each released format, its fields, the values of its enumerations and its bounds. With a
release, record its format: `python -m tests.unit.test_spec_formats`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel, Field, Strict
from pydantic.fields import FieldInfo

from grpo_core.section import Section, Since, marks
from grpo_core.spec import SPEC_FORMAT, JobSpec, parse_spec
from jobs.store.queues import any_format, queue_for, queues_served, with_formats

FIXTURE = Path(__file__).with_name("spec_formats.json")
Formats = dict[str, dict[str, Any]]


def entries(section: type[BaseModel], place: str = "", since: int = 1) -> Iterator[tuple[str, int, Any]]:
    """Everything that a reader must know: each field with its default, each value, each bound, and its format."""
    for name, field in section.model_fields.items():
        here = f"{place}.{name}" if place else name
        whole = max([since, *(mark.format for mark in marks(field) if mark.whole)])
        yield here, whole, _meaning(field)
        for value in _values(field.annotation):
            yield f"{here}={value}", max([whole, *(m.format for m in marks(field) if value in m.values)]), None
        yield from _bounds(here, field, whole)
        for inner in _inner(field.annotation):
            yield from entries(inner, here, whole)


def _meaning(field: FieldInfo) -> Any:
    """What the absence of a field means in a stored spec; of a section its fields say it."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True, validated_data={})
    return "section" if isinstance(default, BaseModel) else json.loads(json.dumps(default))


def _values(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for argument in get_args(annotation):
            yield from _values(argument)


def _bounds(place: str, field: FieldInfo, since: int) -> Iterator[tuple[str, int, Any]]:
    raised = max([since, *(mark.format for mark in marks(field) if mark.above is not None)])
    for bound in field.metadata:
        for side, number, names in (("below", raised, _UPPER), ("above", since, _LOWER)):
            yield from ((f"{place} {side}", number, getattr(bound, name)) for name in names if hasattr(bound, name))


_UPPER = ("le", "lt", "max_length")
_LOWER = ("ge", "gt", "min_length")


def _inner(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for argument in get_args(annotation):
            yield from _inner(argument)


def undeclared(section: type[BaseModel], released: Formats, current: int) -> list[str]:
    """What differs from the released formats and is not marked as newer."""
    newest = max(map(int, released))
    known = {place: (int(number), value) for number, found in released.items() for place, value in found.items()}
    faults: list[str] = []
    found = {place: (since, value) for place, since, value in entries(section)}
    for place, (since, value) in found.items():
        if place not in known and since <= newest:
            faults.append(f"{place} is new: mark it Since({newest + 1})")
        if place in known and known[place][1] != value:
            number, was = known[place]
            if " " in place and since <= newest:
                faults.append(f"{place} was {was!r} and is {value!r}: mark it Since({newest + 1}, above={was!r})")
            if " " not in place and number > 1:  # of the first format every value is stored
                faults.append(f"{place} was {was!r} and is {value!r}: stored specs would change their meaning")
        if since > current:
            faults.append(f"{place} is of format {since}: raise SPEC_FORMAT")
    return faults + [f"{place} is gone: stored specs would be refused" for place in known if place not in found]


def test_what_a_spec_gained_since_the_last_release_is_declared() -> None:
    assert undeclared(JobSpec, json.loads(FIXTURE.read_text()), SPEC_FORMAT) == []


class Inner(Section):
    size: int = Field(default=1, le=4)
    later: Annotated[int, Since(2)] = 3


class Outer(Section):
    kind: Annotated[Literal["a", "b"], Since(3, values=("b",))] = "a"
    count: Annotated[int, Since(2, above=4)] = Field(default=1, le=8)
    inner: Inner = Inner()
    others: Annotated[tuple[Inner, ...], Strict(False), Since(2)] = ()


class Grader(Section):
    type: Annotated[Literal["new"], Since(4)]


class Graded(Section):
    graders: Annotated[tuple[Grader, ...], Since(2)] = ()


RELEASED: Formats = {
    "1": {
        "kind": "a",
        "kind=a": None,
        "count": 1,
        "count below": 4,
        "inner": "section",
        "inner.size": 1,
        "inner.size below": 4,
    }
}
OTHERS = {"others.size": 1, "others.size below": 4, "others.later": 3}


def test_a_field_a_value_and_a_bound_that_are_declared_pass() -> None:
    assert undeclared(Outer, RELEASED, 3) == []


@pytest.mark.parametrize(
    ("number", "place", "faults"),
    [
        ("1", "inner.size", []),
        ("2", "inner.later", ["inner.later was 7 and is 3: stored specs would change their meaning"]),
        ("2", "gone", ["gone is gone: stored specs would be refused"]),
    ],
)
def test_a_change_of_what_is_released_is_told(number: str, place: str, faults: list[str]) -> None:
    released = {"1": dict(RELEASED["1"]), "2": {"count below": 8, "inner.later": 3, "others": [], **OTHERS}}
    released[number][place] = 7
    assert undeclared(Outer, released, 3) == faults


def test_a_field_a_value_and_a_bound_without_a_declaration_are_told() -> None:
    class Careless(Section):
        kind: Literal["a", "b", "c"] = "a"
        count: int = Field(default=1, le=8)
        extra: int = 0

    released: Formats = {"1": {"kind": "a", "kind=a": None, "kind=b": None, "count": 1, "count below": 4}}
    assert undeclared(Careless, released, 2) == [
        "kind=c is new: mark it Since(2)",
        "count below was 4 and is 8: mark it Since(2, above=4)",
        "extra is new: mark it Since(2)",
    ]


def test_a_declaration_of_a_format_that_nobody_reads_yet_is_told() -> None:
    assert "kind=b is of format 3: raise SPEC_FORMAT" in undeclared(Outer, RELEASED, 2)


@pytest.mark.parametrize(
    ("section", "needed"),
    [
        (Outer(), 1),
        (Outer(count=4), 1),
        (Outer(count=5), 2),
        (Outer(kind="b"), 3),
        (Outer(inner=Inner(later=4)), 2),
        (Outer(others=(Inner(),)), 2),
        (Graded(), 1),
        (Graded(graders=(Grader(type="new"),)), 4),
    ],
)
def test_a_spec_needs_the_format_of_the_newest_thing_it_uses(section: Section, needed: int) -> None:
    assert section.needed_format() == needed


def test_later_fields_at_their_default_are_left_out() -> None:
    spec = Outer(others=(Inner(size=2), Inner(later=5)))
    assert Outer().model_dump(mode="json") == {"kind": "a", "count": 1, "inner": {"size": 1}}
    stored = spec.model_dump(mode="json")
    assert stored["others"] == [{"size": 2}, {"size": 1, "later": 5}]
    assert Outer.model_validate(stored) == spec


def test_a_stored_spec_is_read_as_the_same_spec() -> None:
    spec = parse_spec({"engine": "native", "data": {"source": "upload", "dataset": "ds-01ARZ3NDEKTSV4RRFFQ69G5FAV"}})
    assert parse_spec(spec.as_dict()) == spec
    assert parse_spec(spec.requested) == spec


def test_what_was_requested_is_kept_as_it_was_sent() -> None:
    request = {"training": {"steps": 3}, "data": {"source": "upload", "dataset": "ds-01ARZ3NDEKTSV4RRFFQ69G5FAV"}}
    assert parse_spec(request).requested == request
    assert parse_spec({}).requested == {}
    graded = {"rewards": {"graders": {"short": {"type": "length", "maximum": 10}}, "weights": {"correctness": 2.0}}}
    assert parse_spec(graded).requested == graded


def test_a_job_that_uses_what_is_new_waits_where_older_workers_do_not_listen() -> None:
    cpu = {"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}}
    assert queue_for(parse_spec(cpu)) == "grpo.cpu"
    assert queue_for(parse_spec({**cpu, "engine": "native"})) == "grpo.cpu.f2"
    assert queue_for(parse_spec({"engine": "native", "resources": {"min_gpu_memory_gb": 20}})) == "grpo.gpu1.24gb.f2"
    assert any_format("grpo.gpu1.24gb.f2") == "grpo.gpu1.24gb"
    assert any_format("grpo.gpu1.24gb") == "grpo.gpu1.24gb"


def test_a_worker_listens_to_the_queues_of_every_format_it_reads() -> None:
    own = queues_served(16.0)
    assert own == ["grpo.gpu1.16gb", "grpo.gpu1"]
    later = [f"{queue}.f{number}" for queue in own for number in range(2, SPEC_FORMAT + 1)]
    assert set(with_formats(own)) == {*own, *later}
    assert with_formats(["mine.f2"]) == ["mine.f2"]


def main() -> None:
    """Record the format of this release."""
    released: Formats = json.loads(FIXTURE.read_text())
    known = {place for number, found in released.items() if int(number) < SPEC_FORMAT for place in found}
    found = {place: value for place, since, value in entries(JobSpec) if place not in known and since <= SPEC_FORMAT}
    FIXTURE.write_text(json.dumps({**released, str(SPEC_FORMAT): found}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()


def test_jobs_of_several_hosts_wait_where_only_workers_in_a_cluster_listen() -> None:
    asked = {"gpus": 4, "min_gpu_memory_gb": 80}
    one, two = (
        parse_spec({"resources": {**asked, "hosts": hosts}, "sampling": {"prompts_per_step": 2}}) for hosts in (1, 2)
    )
    assert (queue_for(one), queue_for(two)) == ("grpo.gpu4.80gb.f2", "grpo.gpu4.80gb.hosts.f2")
    assert "hosts" not in one.as_dict()["resources"], "as a release without the field wrote it"
    alone, within = (with_formats(queues_served(80, gpus=8, hosts=hosts)) for hosts in (False, True))
    assert queue_for(two) in within
    assert queue_for(two) not in alone
    assert set(alone) < set(within)
