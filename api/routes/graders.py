"""The routes below /graders: check a grader, and run graders on given completions before a job pays by them.

`run` and `validate` take and return OpenAI's objects; `score` takes rows and a spec. Owns the limits of these requests
and the form of their answers; graders run in a separate process (`grpo_core.scoring`). Invariant: this process
never runs a grader.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final, TypeVar

from litestar import Request, Router, post
from litestar.datastructures import State
from litestar.di import NamedDependency, Provide
from litestar.params import SkipValidation

from api.auth import scope
from api.bodies import JSON_ERRORS, MAX_VALUES, read_json
from api.dependencies import KeyId, Owner, Service
from api.places import Places
from api.problems import ApiError, responses
from api.schemas import (
    FieldProblem,
    GraderErrorFlags,
    GraderRun,
    GraderRunMetadata,
    RowScore,
    RowScores,
    ScoreError,
    UnavailableGrader,
    ValidatedGrader,
)
from grpo_core.reasons import FailureCode
from grpo_core.rewards.graders.columns import missing_columns
from grpo_core.rewards.graders.models import LabelModel, ScoreModel, members_of
from grpo_core.rewards.graders.operator import calls_servers, unregistered
from grpo_core.scoring.process import score_apart
from grpo_core.scoring.requests import GRADER, ScoreRequest, read_rows, read_run, read_validation
from grpo_core.spec import JobSpec, SpecError

MAX_BYTES: Final = 2 * 1024**2
"""Of a request's body."""
MAX_ROWS_VALUES: Final = 50_000
"""Of the JSON of `score`: 200 rows with nested columns."""
_DETAIL: Final = "`errors` names each field and its remedy."

T = TypeVar("T")
Runs = NamedDependency[SkipValidation[Places]]
Request_ = NamedDependency[SkipValidation[ScoreRequest]]
GraderSpec = NamedDependency[SkipValidation[JobSpec]]

_ERRORS = (
    *("bad_query", *JSON_ERRORS),
    *("invalid_grader", "grader_failed", "too_many_grader_runs"),
)


def runs_of(state: State) -> Places:
    """Dependency: limits the processes that run graders at the same time."""
    return state.grader_runs


async def read_run_body(request: Request[Any, Any, Any]) -> ScoreRequest:
    """Dependency: the body of `run`."""
    return await read_body(request, read_run, "grader, item and model_sample")


async def read_validation_body(request: Request[Any, Any, Any]) -> JobSpec:
    """Dependency: the body of `validate`."""
    return await read_body(request, read_validation, "grader")


async def read_rows_body(request: Request[Any, Any, Any]) -> ScoreRequest:
    """Dependency: the body of `score`."""
    return await read_body(request, read_rows, "spec and rows", max_values=MAX_ROWS_VALUES)


@post(
    "/run",
    operation_id="runGrader",
    summary="Run a grader on one completion",
    opt=scope("jobs:write"),
    status_code=200,
    dependencies={"request_": Provide(read_run_body)},
    response_description="Its score, or what went wrong, in OpenAI's fields",
    responses=responses(*_ERRORS, "grader_unavailable"),
    sync_to_thread=True,
)
def run_grader(request_: Request_, owner: Owner, key_id: KeyId, runs: Runs, service: Service) -> GraderRun:
    """Score `model_sample` against `item` with one grader: OpenAI's request and answer. Judges and endpoints run
    if the operator has set the API up for it (otherwise 409 `grader_unavailable`)."""
    return run_once(request_, owner, key_id, runs, service)


@post(
    "/validate",
    operation_id="validateGrader",
    summary="Check a grader",
    opt=scope("jobs:write"),
    status_code=200,
    dependencies={"spec": Provide(read_validation_body)},
    response_description="It can be used in a job",
    responses=responses(*_ERRORS),
    sync_to_thread=True,
)
def validate_grader(spec: GraderSpec, owner: Owner, runs: Runs) -> ValidatedGrader:
    """Check one grader as a job's would be, and load it where it can run here."""
    return validate_once(spec, owner, runs)


def run_once(request_: ScoreRequest, owner: str, key_id: str, runs: Places, service: Any) -> GraderRun:
    """Run a grader on one completion. Raises `ApiError`."""
    found = _scored(request_, owner, key_id, runs, service)
    _require_available(found)
    return _run_of(request_.spec, found)


def validate_once(spec: JobSpec, owner: str, runs: Places) -> ValidatedGrader:
    """Check a grader. Raises `ApiError`."""
    unknown = [
        FieldProblem(pointer=_in_request(pointer), code="not_registered", detail=detail, remedy=remedy)
        for pointer, detail, remedy in unregistered(spec.rewards.graders, os.environ)
    ]
    if unknown:
        raise ApiError("invalid_grader", _DETAIL, errors=unknown)
    with runs.take(owner):
        found = score_apart(spec, ())
    for one in found["unavailable"]:
        if one["code"] == FailureCode.GRADER_NOT_LOADED:
            raise _problem("invalid_grader", [one])
    return ValidatedGrader(grader=spec.as_dict()["rewards"]["graders"][GRADER])


@post(
    "/score",
    operation_id="scoreRows",
    summary="Score rows with all rewards of a spec",
    opt=scope("jobs:write"),
    status_code=200,
    dependencies={"request_": Provide(read_rows_body)},
    response_description="Every reward of every row; graders that cannot run here are named",
    responses=responses(*_ERRORS),
    sync_to_thread=True,
)
def score_rows(request_: Request_, owner: Owner, key_id: KeyId, runs: Runs, service: Service) -> RowScores:
    """Score up to 200 rows, each a completion (`model_sample`) and the data set's columns (`item`), with the rewards of
    a spec, which may lack all other sections."""
    found = _scored(request_, owner, key_id, runs, service)
    return RowScores(
        data=[
            RowScore(
                rewards=row["rewards"],
                reward_total=row["total"],
                errors={name: ScoreError(**error) for name, error in row["errors"].items()},
                details=row["details"],
                missing_columns=missing_columns(request_.spec.rewards.graders, given.item),
            )
            for row, given in zip(found["rows"], request_.rows, strict=True)
        ],
        unavailable=[UnavailableGrader(**one) for one in found["unavailable"]],
        seconds=found["seconds"],
        load_seconds=found["load_seconds"],
        execution_time=found["execution_time"],
        printed=found["printed"],
    )


def _scored(request_: ScoreRequest, owner: str, key_id: str, runs: Places, service: Any) -> dict[str, Any]:
    """What the graders say, counted where they ask others."""
    with runs.take(owner):
        if calls_servers(request_.spec.rewards.graders):
            service.count_judged_run(key_id)
        return score_apart(request_.spec, request_.rows)


async def read_body(
    request: Request[Any, Any, Any], parse: Callable[[Any], T], fields: str, *, max_values: int = MAX_VALUES
) -> T:
    """What `parse` makes of the JSON in the body, which has these fields. Raises `ApiError`."""
    expected = f"A JSON object with {fields} is expected in the body."
    try:
        return await read_json(request, parse, expected=expected, max_values=max_values)
    except SpecError as error:
        raise _invalid(error) from error


def _invalid(error: SpecError) -> ApiError:
    problems = [
        FieldProblem(pointer=one.pointer, code=one.code, detail=one.detail, remedy=one.remedy) for one in error.problems
    ]
    return ApiError("invalid_grader", _DETAIL, errors=problems)


def _require_available(found: dict[str, Any]) -> None:
    """A source that cannot be loaded is the grader's own error, and a flag of the answer; all else is refused."""
    missing = [one for one in found["unavailable"] if one["code"] != FailureCode.GRADER_NOT_LOADED]
    if missing:
        raise _problem("grader_unavailable", missing)


def _problem(code: str, unavailable: list[dict[str, Any]]) -> ApiError:
    errors = [
        FieldProblem(pointer=_pointer(one["grader"]), code=one["code"], detail=one["message"], remedy=one["remedy"])
        for one in unavailable
    ]
    return ApiError(code, f"{errors[0].detail} {errors[0].remedy}", errors=errors)


def _pointer(name: str) -> str:
    member = name.partition(".")[2]
    return f"/grader/graders/{member}" if member else "/grader"


def _in_request(pointer: str) -> str:
    """A pointer into a spec as one into the request."""
    return "/grader" + pointer.removeprefix(f"/rewards/graders/{GRADER}")


def _run_of(spec: JobSpec, found: dict[str, Any]) -> GraderRun:
    """OpenAI's answer for the only row."""
    grader = spec.rewards.graders[GRADER]
    (row,) = found["rows"]
    details: dict[str, dict[str, Any]] = row["details"]
    scores: dict[str, Any] = details.get(GRADER, {}).get("scores", {})
    usage = _usage(spec, details)
    asked = [one["model"] for one in details.values() if "tokens" in one and "model" in one]
    return GraderRun(
        reward=row["rewards"][GRADER] or 0.0,
        metadata=GraderRunMetadata(
            name=grader.name or "",
            type=grader.type,
            errors=_flags(row["errors"]),
            execution_time=found["execution_time"],
            scores=scores,
            token_usage=sum(one["total_tokens"] for one in usage.values()) if usage else None,
            sampled_model_name=asked[0] if asked else None,
            messages=[error["message"] for error in row["errors"].values()],
            printed="\n".join(found["printed"].values()),
        ),
        sub_rewards=scores,
        model_grader_token_usage_per_model=usage,
    )


def _usage(spec: JobSpec, details: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Tokens of each judge, by the name in the grader."""
    usage: dict[str, dict[str, int]] = {}
    for name, leaf in members_of(GRADER, spec.rewards.graders[GRADER]).items():
        if isinstance(leaf, ScoreModel | LabelModel) and name in details:
            spent = usage.setdefault(leaf.model, {"total_tokens": 0})
            spent["total_tokens"] += int(details[name].get("tokens", 0))
    return usage


def _flags(errors: dict[str, dict[str, Any]]) -> GraderErrorFlags:
    kinds = {error["kind"]: error["message"] for error in errors.values()}
    server = kinds.get("python_grader_server_error")
    return GraderErrorFlags(
        **dict.fromkeys(kinds, True),
        python_grader_server_error_type=None if server is None else server.partition(":")[0],
        python_grader_runtime_error_details=kinds.get("python_grader_runtime_error"),
        model_grader_server_error_details=kinds.get("model_grader_server_error"),
    )


ROUTER = Router(
    "/graders",
    route_handlers=[run_grader, validate_grader, score_rows],
    dependencies={"runs": Provide(runs_of, sync_to_thread=False)},
    request_max_body_size=MAX_BYTES,
    tags=["graders"],
)
