"""POST /serving: starts a session that serves a job's adapters, as a job of kind serving.

Owns the short form of such a job's spec; submission is that of `routes.jobs`. Invariant: an error names a field of the
body that was sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final, cast

from litestar import Request, Response, post
from litestar.di import NamedDependency, Provide
from litestar.params import SkipValidation

from api.auth import scope
from api.bodies import JSON_ERRORS, read_json
from api.dependencies import Owner, Service
from api.idempotency import REPLAYED, SUBMISSION_ERRORS, Once, created_headers, submission_key
from api.problems import responses
from api.schemas import SubmittedJob, submitted_job
from grpo_core.estimates import SpecWarning
from grpo_core.spec import JOB_ID, JobSpec, Problem, SpecError, parse_spec
from jobs.errors import Rejected, Unavailable

_OWN: Final = ("job", "steps", "ttl_seconds", "idle_seconds", "engine")
_SPEC: Final = ("name", "metadata", "resources", "data")
_EXPECTED: Final = 'What to serve is expected in the body: {"job": "JOB", "steps": [50], "ttl_seconds": 900}.'


def parse(body: Any) -> JobSpec:
    """The spec of the session that a body asks for."""
    fields = cast("dict[str, Any]", body) if isinstance(body, dict) else {}
    given = {name: value for name, value in fields.items() if value is not None}
    if ("job" in given) == ("model" in given):
        detail = "needs either job or model" if given else "is empty or no object"
        raise SpecError([Problem(pointer="", code="missing_field", detail=detail, remedy=_EXPECTED)])
    for name in given:
        if name not in (*_OWN, *_SPEC, "model"):
            remedy = f"Use {', '.join((*_OWN, 'model', *_SPEC))}."
            raise SpecError([Problem(pointer=f"/{name}", code="unknown_field", detail="is not a field", remedy=remedy)])
    model = given.get("model")
    if isinstance(model, str) and re.match(JOB_ID[:-1], model):
        remedy = "Send the job as job, and its checkpoints in steps."
        raise SpecError(
            [Problem(pointer="/model", code="bad_value", detail="is a job, not a base model", remedy=remedy)]
        )
    spec: dict[str, Any] = {name: given[name] for name in _SPEC if name in given}
    if "model" in given:
        spec["model"] = {"name": model} if isinstance(model, str) else model
    spec |= {"kind": "serving", "serving": {name: given[name] for name in _OWN if name in given}}
    try:
        return parse_spec(spec)
    except SpecError as error:
        raise SpecError(list(_as_sent(error.problems))) from None


async def read_session(request: Request[Any, Any, Any]) -> JobSpec:
    """Dependency: the body as the spec of a session."""
    return await read_json(request, parse, expected=_EXPECTED)


@post(
    "/serving",
    operation_id="serve",
    summary="Serve a job's adapters",
    tags=["chat"],
    opt=scope("jobs:write"),
    dependencies={"spec": Provide(read_session), "once": Provide(submission_key)},
    response_headers=created_headers("session", "created the session; this is the same answer"),
    response_description="The session is queued; GET /v1/models lists its models once it answers",
    responses=responses("not_found", *JSON_ERRORS, *SUBMISSION_ERRORS),
    sync_to_thread=True,
)
def serve(
    spec: NamedDependency[SkipValidation[JobSpec]], once: Once, owner: Owner, service: Service
) -> Response[SubmittedJob]:
    """Queue a job of kind serving, for the adapters of one of your jobs (`job`, `steps`) or for a base model alone
    (`model`). It ends after `ttl_seconds`, after `idle_seconds` without a request, or when a job waits for its worker;
    cancel it to end it now."""
    try:
        record, replayed = service.submit_once(spec, owner, once) if once else (service.submit(spec, owner), False)
    except Rejected as error:
        raise Rejected(*_as_sent(error.problems)) from None
    warnings: list[SpecWarning] = []
    with suppress(Unavailable):  # the session is accepted
        warnings = service.warnings(parse_spec(record.spec))  # with what it takes over from its job, as its GPUs
    job = submitted_job(record, warnings)
    headers = {"Location": job.links.self, **(REPLAYED if replayed else {})}
    return Response(job, status_code=201, headers=headers)


def _as_sent(problems: Iterable[Problem]) -> Iterable[Problem]:
    for problem in problems:
        yield replace(problem, pointer=problem.pointer.removeprefix("/serving"))
