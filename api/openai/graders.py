"""OpenAI's routes of graders, /v1/fine_tuning/alpha/graders: the same as /graders, with its paths and its errors.

Owns nothing of graders: `api.routes.graders` runs them. Invariant: an answer is the one of the native route.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

from litestar import Request, Router, post
from litestar.di import NamedDependency, Provide
from litestar.params import SkipValidation

from api.auth import scope
from api.bodies import JSON_ERRORS
from api.dependencies import KeyId, Owner, Service
from api.openai.errors import responses
from api.places import Places
from api.routes import graders
from api.schemas import GraderRun, ValidatedGrader
from grpo_client.openai_jobs import with_named_members
from grpo_core.scoring.requests import ScoreRequest, read_run, read_validation
from grpo_core.spec import JobSpec

_ERRORS: Final = ("bad_query", *JSON_ERRORS, "invalid_grader", "grader_failed", "too_many_grader_runs")

T = TypeVar("T")
Runs = NamedDependency[SkipValidation[Places]]
Run = NamedDependency[SkipValidation[ScoreRequest]]
Validation = NamedDependency[SkipValidation[JobSpec]]


def _named(parse: Callable[[Any], T]) -> Callable[[Any], T]:
    """Parse a body whose `multi` may list its graders, as typed clients send them."""

    def read(body: Any) -> T:
        if isinstance(body, dict) and isinstance(body.get("grader"), dict):
            body = {**body, "grader": with_named_members(body["grader"])}
        return parse(body)

    return read


async def read_run_body(request: Request[Any, Any, Any]) -> ScoreRequest:
    """Dependency: the body of `run`."""
    return await graders.read_body(request, _named(read_run), "grader, item and model_sample")


async def read_validation_body(request: Request[Any, Any, Any]) -> JobSpec:
    """Dependency: the body of `validate`."""
    return await graders.read_body(request, _named(read_validation), "grader")


@post(
    "/run",
    operation_id="runOpenAIGrader",
    summary="Run a grader on one completion, as with OpenAI's SDK",
    opt=scope("jobs:write"),
    status_code=200,
    dependencies={"run": Provide(read_run_body)},
    response_description="Its score, or what went wrong",
    responses=responses(*_ERRORS, "grader_unavailable"),
    sync_to_thread=True,
)
def run_grader(run: Run, owner: Owner, key_id: KeyId, runs: Runs, service: Service) -> GraderRun:
    """Score `model_sample` against `item` with one grader."""
    return graders.run_once(run, owner, key_id, runs, service)


@post(
    "/validate",
    operation_id="validateOpenAIGrader",
    summary="Check a grader, as with OpenAI's SDK",
    opt=scope("jobs:write"),
    status_code=200,
    dependencies={"validation": Provide(read_validation_body)},
    response_description="It can be used in a job",
    responses=responses(*_ERRORS),
    sync_to_thread=True,
)
def validate_grader(validation: Validation, owner: Owner, runs: Runs) -> ValidatedGrader:
    """Check one grader as a job's would be, and load it where it can run here."""
    return graders.validate_once(validation, owner, runs)


ROUTER = Router(
    "/v1/fine_tuning/alpha/graders",
    route_handlers=[run_grader, validate_grader],
    dependencies={"runs": Provide(graders.runs_of, sync_to_thread=False)},
    request_max_body_size=graders.MAX_BYTES,
    tags=["OpenAI"],
)
