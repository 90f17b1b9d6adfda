"""The job whose adapters another job serves or exports: whether it may, and what it takes over.

Owns the rules for `serving.job` and `export.job`. The look-up of adapters in the bucket is `jobs.store.adapters`.
Invariant: the spec of an accepted job names a job of the same owner, which had the adapters at that time, and has that
job's model, adapter settings and prompts, so that a worker reads nothing but this spec.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from grpo_core.spec import JobSpec, Problem, SpecError, parse_spec
from grpo_core.spec.sections import SourceReference
from jobs.errors import NotFound, Rejected
from jobs.store.adapters import AdapterFinder
from jobs.store.bucket import ObjectStore
from jobs.store.job import JobRecord

TAKEN_OVER: Final = ("model", "lora", "engine", "sampling")
"""Sections that are the source job's."""
PROMPT: Final = ("system_prompt", "examples")
"""Fields of `data` that are the source job's."""


class SourceJobs:
    """Checks and resolves the specs of jobs that serve or export another job's adapters."""

    def __init__(self, find: Callable[[str, str], JobRecord | None], store: ObjectStore) -> None:
        """`find` returns an owner's job by its id."""
        self._find = find
        self._store = store

    def resolve(self, spec: JobSpec, owner: str) -> JobSpec:
        """Return the spec with what it takes over from its source job; other specs are returned unchanged.

        Raises `NotFound` for a job that is not the owner's, and `Rejected` if it lacks an adapter that is named.
        """
        source = spec.source
        if source is None:
            return spec
        record = self._find(source.job, owner)
        if record is None:
            raise NotFound("job", source.job)
        trained = _trained(record, source)
        problems = [*self._missing(record, source), *_contradictions(spec, trained)]
        if problems:
            raise Rejected(*problems)
        return _taken_over(spec, trained)

    def _missing(self, record: JobRecord, source: SourceReference) -> list[Problem]:
        finder = AdapterFinder(self._store, record.id, record.best_step, record.manifest)
        steps = finder.steps()
        if not steps and finder.main() is None:
            return [
                _no_adapter(source, "job", "has no adapter yet", "Wait for its first checkpoint, or use another job.")
            ]
        there = f"Use one of {', '.join(map(str, steps))}." if steps else "It has no checkpoints: leave the step out."
        field = "steps" if source.section == "serving" else "step"
        return [
            _no_adapter(source, f"{field}/{place}" if field == "steps" else field, f"{step} was not kept", there)
            for place, step in enumerate(source.steps)
            if step not in steps
        ]


def _trained(record: JobRecord, source: SourceReference) -> JobSpec:
    """Return the source job's spec. Raises `Rejected` if it trained nothing."""
    try:
        trained = parse_spec(record.spec)
    except SpecError as error:  # of a newer release
        detail = "was accepted by a newer release, whose spec this one cannot read"
        raise Rejected(_no_adapter(source, "job", detail, "Upgrade this service.")) from error
    if trained.kind != "training":
        detail = f"is of kind {trained.kind}, which has no adapter"
        raise Rejected(_no_adapter(source, "job", detail, "Use a job that trained."))
    return trained


def _contradictions(spec: JobSpec, trained: JobSpec) -> list[Problem]:
    """Return the sections that the request gives and that are not the source job's."""
    return [
        Problem(
            pointer=f"/{name}",
            code="other_adapter",
            detail="is not what the job trained with",
            remedy="Leave it out: it is taken from that job.",
        )
        for name in TAKEN_OVER
        if name in spec.requested and getattr(spec, name) != getattr(trained, name)
    ]


def _taken_over(spec: JobSpec, trained: JobSpec) -> JobSpec:
    given, source = spec.as_dict(), trained.as_dict()
    # A default that the source left out is written for it here, since the request may have another value.
    data: dict[str, Any] = {**given["data"], **{name: source["data"][name] for name in PROMPT}}
    resources = given["resources"] if "resources" in spec.requested else source["resources"]
    resolved = JobSpec.model_validate(
        {
            **given,
            **{name: source[name] for name in TAKEN_OVER},
            "data": data,
            "resources": {**resources, "gpus": min(1, resources["gpus"])},
        }
    )
    vars(resolved)["requested"] = spec.requested
    return resolved


def _no_adapter(source: SourceReference, field: str, detail: str, remedy: str) -> Problem:
    return Problem(pointer=f"/{source.section}/{field}", code="no_such_checkpoint", detail=detail, remedy=remedy)
