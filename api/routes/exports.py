"""The route below /exports: write a job's adapter in another form, as a separate job.

Handlers only translate: an export is a job of kind `export`, read, cancelled and deleted like any other. Invariant: a
problem points into this route's body, not into the spec that the body becomes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final, cast

from litestar import Request, Response, Router, post
from litestar.di import NamedDependency, Provide
from litestar.params import SkipValidation

from api.auth import scope
from api.bodies import JSON_ERRORS, read_json
from api.dependencies import Owner, Service
from api.idempotency import REPLAYED, SUBMISSION_ERRORS, Once, created_headers, export_key
from api.problems import responses
from api.schemas import SubmittedJob, submitted_job
from grpo_core.spec import JobSpec, Problem, SpecError, parse_spec
from jobs.errors import Rejected

OWN: Final = ("job", "step", "format", "type")
"""Fields of the spec's section `export`; the others are the spec's own."""
OTHERS: Final = ("name", "metadata", "resources")

Spec = NamedDependency[SkipValidation[JobSpec]]


async def read_export(request: Request[Any, Any, Any]) -> JobSpec:
    """Dependency: the body as the spec of a job that exports."""
    return await read_json(request, _parse, expected='An export is expected in the body: {"job": "job-..."}.')


def _parse(body: Any) -> JobSpec:
    if not isinstance(body, dict):
        raise SpecError([_problem("", "not_an_object", "is not an object", 'Send {"job": "job-..."}.')])
    given = cast("dict[str, Any]", body)
    unknown = [
        _problem(f"/{name[:80]}", "unknown_field", "is not a field of an export", f"Use {', '.join((*OWN, *OTHERS))}.")
        for name in given
        if name not in (*OWN, *OTHERS)
    ]
    if unknown:
        raise SpecError(unknown)
    others = {name: given[name] for name in OTHERS if name in given}
    try:
        return parse_spec({"kind": "export", **others, "export": {name: given[name] for name in OWN if name in given}})
    except SpecError as error:
        raise SpecError(_outside(error.problems)) from error


def _outside(problems: Any) -> list[Problem]:
    """The problems of a spec as those of the body that it was made from."""
    return [replace(problem, pointer=problem.pointer.removeprefix("/export")) for problem in problems]


def _problem(pointer: str, code: str, detail: str, remedy: str) -> Problem:
    return Problem(pointer=pointer, code=code, detail=detail, remedy=remedy)


@post(
    "/",
    operation_id="submitExport",
    summary="Export a job's adapter: merged into its base, or as GGUF",
    opt=scope("jobs:write"),
    dependencies={"spec": Provide(read_export), "once": Provide(export_key)},
    response_headers=created_headers("job", "created the job; this is the same answer"),
    response_description="The export is accepted and will be run",
    responses=responses("bad_query", "not_found", *JSON_ERRORS, *SUBMISSION_ERRORS),
    sync_to_thread=True,
)
def submit_export(spec: Spec, once: Once, owner: Owner, service: Service) -> Response[SubmittedJob]:
    """Queue a job that writes the adapter in another form, and checks that it answers as the adapter does."""
    try:
        record, replayed = service.submit_once(spec, owner, once) if once else (service.submit(spec, owner), False)
    except Rejected as error:
        raise Rejected(*_outside(error.problems)) from error
    job = submitted_job(record, [])
    headers = {"Location": job.links.self, **(REPLAYED if replayed else {})}
    return Response(job, status_code=201, headers=headers)


ROUTER = Router("/exports", route_handlers=[submit_export], tags=["jobs"])
