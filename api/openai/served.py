"""The names of served models: what GET /v1/models lists, and which session and adapter a name stands for.

Owns the names. Invariant: a name is only compared with those that sessions of the caller announce; it is no path, and
no part of it goes further.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

from api.openai.errors import refusal, refusals
from api.problems import ApiError
from api.schemas import FieldProblem, ServedModel
from grpo_core.adapters import MAIN
from grpo_core.serving.schemas import fault_of
from grpo_core.serving.wire import BASE, FORMAT
from grpo_core.spec import JOB_ID
from jobs.errors import NotFound
from jobs.service import JobFilter, JobService
from jobs.store.job import JobRecord, JobStatus
from jobs.store.serving import ServedModels

_NAMES: Final = "GET /v1/models lists what is served; a job's are named JOB, JOB:step-50 and JOB:base."
_MOST_LOOKED_AT: Final = 20
"""Largest number of sessions of a status that are searched for one that is starting."""
_OF_A_JOB: Final = re.compile(rf"({JOB_ID[1:-1]})(?::(base|step-[1-9]\d{{0,6}}))?")


def models_of(served: ServedModels) -> Iterator[ServedModel]:
    """Yield the models of one session."""
    return (model_of(served, adapter) for adapter in served.models)


def model_of(served: ServedModels, adapter: str) -> ServedModel:
    """One model of a session."""
    return ServedModel(
        id=_name_of(served, adapter),
        created=int(served.ready_at),
        owned_by=served.owner,
        session=served.session,
        step=served.steps.get(adapter),
        ends_at=int(served.ends_at),
        context=served.context,
        engine=served.engine,
    )


def find(service: JobService, owner: str, name: str) -> tuple[ServedModels, str]:
    """Return the session of a model and the adapter's name in it: the session with the fewest open requests.

    As OpenAI's, a name may begin with `ft:`. Raises `not_serving` for a job of the caller that nothing serves, and
    `not_found` for other names.
    """
    name = name.removeprefix("ft:")
    sessions = service.sessions(owner)
    found = [
        (len(served.active), place, adapter)
        for place, served in enumerate(sessions)
        for adapter in served.models
        if _name_of(served, adapter) == name
    ]
    if found:
        _, place, adapter = min(found)
        return sessions[place], adapter
    match = _OF_A_JOB.fullmatch(name)
    if match is None or not _has(service, owner, match[1]):
        raise _refusal("not_found", "model_not_found", "There is no such model", _NAMES)
    if starting := _starting(service, owner, match[1], {served.session for served in sessions}):
        raise _is_starting(starting)
    raise _not_serving(match[1], (match[2] or "").removeprefix("step-"))


def require_schema(served: ServedModels, schema: Mapping[str, Any]) -> None:
    """Raises `ApiError` if a session cannot make its answers match a schema."""
    if FORMAT not in served.accepts:
        remedy = "Start one of this release, with the engine native or transformers."
        raise refusal(FORMAT, "unsupported_parameter", "is not supported by this session", remedy)
    if fault := fault_of(schema):
        raise refusal(
            FORMAT,
            "bad_schema",
            f"the schema {fault}",
            "Simplify it (anyOf in place of oneOf), or leave response_format out.",
        )


def _name_of(served: ServedModels, adapter: str) -> str:
    if served.source is None:
        return served.model
    return served.source if adapter == MAIN else f"{served.source}:{adapter}"


def _has(service: JobService, owner: str, job: str) -> bool:
    """Whether a job is one of the owner's."""
    try:
        service.get(job, owner)
    except NotFound:
        return False
    return True


def _starting(service: JobService, owner: str, job: str, ready: Collection[str]) -> JobRecord | None:
    """The newest session of a job that will answer, but is not `ready`."""
    for status in (JobStatus.RUNNING, JobStatus.QUEUED):
        for record in service.list_jobs(
            owner, limit=_MOST_LOOKED_AT, status=status, find=JobFilter(kind="serving")
        ).items:
            if record.spec.get("serving", {}).get("job") == job and record.id not in ready:
                return record
    return None


def _is_starting(session: JobRecord) -> ApiError:
    remedy = f"Repeat when GET /v1/models lists it; GET /jobs/{session.id} says how far it is."
    return _refusal("not_serving", "not_serving", f"The session {session.id} that will serve it is starting", remedy)


def _not_serving(job: str, step: str) -> ApiError:
    steps, option = (f', "steps": [{step}]', f" --steps {step}") if step not in ("", BASE) else ("", "")
    remedy = (
        f'Start it with POST /serving {{"job": "{job}"{steps}}}, or grpo serve {job}{option}, and repeat when '
        "GET /v1/models lists it."
    )
    return _refusal("not_serving", "not_serving", "Nothing serves this model now", remedy)


def _refusal(code: str, field_code: str, detail: str, remedy: str) -> ApiError:
    problem = FieldProblem(pointer="", parameter="model", code=field_code, detail=detail, remedy=remedy)
    return ApiError(code, f"{detail}. {remedy}", errors=[problem])


def refusal_of(fault: dict[str, object]) -> ApiError:
    """The error of a session, as an answer."""
    code, message, param = str(fault["code"]), str(fault["message"]), fault["param"]
    if param is not None:
        return refusals([FieldProblem(pointer="", parameter=str(param), code=code, detail=message, remedy="")])
    if code == "overloaded":
        return ApiError("overloaded", message, headers={"Retry-After": "2"})
    return ApiError("session_ended", message, headers={"Retry-After": "2"})
