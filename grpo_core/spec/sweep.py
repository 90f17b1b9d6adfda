"""A sweep: one spec, the values that some of its fields take, and how often each is repeated with another seed.

Owns how a sweep becomes specs. Invariants: the same sweep becomes the same specs in the same order, and repeats differ
by `training.seed` only.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from grpo_core.spec.aliases import field_of
from grpo_core.spec.problems import Problem, SpecError, parse_spec
from grpo_core.spec.sections import JobSpec

MAX_JOBS: Final = 100
SEED: Final = "training.seed"
_FIELDS: Final = ("spec", "grid", "repeat")


def parse_sweep(body: object) -> list[JobSpec]:
    """The specs of a sweep `{"spec": {}, "grid": {FIELD: [VALUES]}, "repeat": N}`. Raises `SpecError`."""
    if not isinstance(body, dict):
        raise _refused("", "not_an_object", "is not an object", 'Send {"spec": {...}, "grid": {...}, "repeat": 3}.')
    given = cast("dict[str, Any]", body)
    for name in given:
        if name not in _FIELDS:
            remedy = "The fields of a sweep are spec, grid and repeat; those of a job belong into spec."
            raise _refused(f"/{name}", "unknown_field", "is not a field of a sweep", remedy)
    grid, repeat = _grid_of(given.get("grid", {})), _repeat_of(given.get("repeat", 1))
    if repeat > 1 and SEED in grid:
        raise _refused(f"/grid/{SEED}", "conflict", "is what repeats differ by", "Leave it out, or set repeat to 1.")
    jobs = repeat
    for values in grid.values():
        jobs *= len(values)
    if jobs > MAX_JOBS:
        raise _refused("/grid", "too_large", f"with repeat makes {jobs} jobs", f"Make at most {MAX_JOBS}.")
    return [
        parsed
        for values in itertools.product(*grid.values())
        for parsed in _repeats(given.get("spec", {}), dict(zip(grid, values, strict=True)), repeat)
    ]


def _grid_of(grid: object) -> dict[str, list[Any]]:
    if not isinstance(grid, dict):
        raise _refused("/grid", "bad_type", "is not an object", 'Send {"optimizer.learning_rate": [1e-5, 3e-5]}.')
    found: dict[str, list[Any]] = {}
    for name, values in cast("dict[str, object]", grid).items():
        if not isinstance(values, list) or not values:
            raise _refused(f"/grid/{name}", "bad_type", "is not a list of values", "Give a list with at least one.")
        listed = cast("list[Any]", values)
        if any(value in listed[:place] for place, value in enumerate(listed)):
            raise _refused(f"/grid/{name}", "repeated", "has a value twice", "Give each once, and use repeat.")
        field = field_of(name)
        if field in found:
            raise _refused(f"/grid/{name}", "repeated", f"is {field}, which is in the grid already", "Give it once.")
        found[field] = listed
    return found


def _repeat_of(repeat: object) -> int:
    if type(repeat) is not int or not 1 <= repeat <= MAX_JOBS:
        raise _refused("/repeat", "bad_value", "is not a whole number", f"Give one from 1 to {MAX_JOBS}.")
    return repeat


def _repeats(spec: object, settings: Mapping[str, Any], repeat: int) -> Sequence[JobSpec]:
    """The jobs with these settings, each with the next seed."""
    asked = copy.deepcopy(spec)
    for field, value in settings.items():
        asked = _with(asked, field, value)
    first = _parse(asked, settings)
    seeds = range(first.training.seed, first.training.seed + repeat)
    return [first, *(_parse(_with(asked, SEED, seed), settings) for seed in seeds[1:])]


def _with(spec: Any, field: str, value: Any) -> Any:
    """A spec with one field set. What is no object stays as it is: the check of the spec names it."""
    if not isinstance(spec, dict):
        return spec
    name, _, rest = field.partition(".")
    given = cast("dict[str, Any]", spec)
    inner = {} if given.get(name) is None else given[name]
    return {**given, name: _with(inner, rest, value) if rest else value}


def _parse(asked: object, settings: Mapping[str, Any]) -> JobSpec:
    try:
        spec = parse_spec(asked)
    except SpecError as error:
        raise SpecError([_placed(problem, settings) for problem in error.problems]) from None
    if not spec.has_steps:
        raise SpecError([_placed(_no_kind_for_a_sweep(spec), settings)])
    return spec


def _no_kind_for_a_sweep(spec: JobSpec) -> Problem:
    return Problem(
        pointer="/kind",
        code="not_applicable",
        detail=f"is {spec.kind}, and a sweep compares how jobs train",
        remedy="Submit the job alone, or set kind to training.",
    )


def _placed(problem: Problem, settings: Mapping[str, Any]) -> Problem:
    """A problem of one job's spec, as one of the sweep."""
    field = problem.pointer[1:].replace("/", ".")
    in_grid = next((name for name in settings if field == name or field.startswith(f"{name}.")), None)
    pointer = f"/grid/{in_grid}" if in_grid else f"/spec{problem.pointer}"
    detail = f"{problem.detail} (with {settings[in_grid]!r})" if in_grid else problem.detail
    return Problem(pointer=pointer, code=problem.code, detail=detail, remedy=problem.remedy)


def _refused(pointer: str, code: str, detail: str, remedy: str) -> SpecError:
    return SpecError([Problem(pointer=pointer, code=code, detail=detail, remedy=remedy)])
