"""The routes below /jobs/{id}/rollouts: single completions with their rewards, and the steps that have any.

Handlers only translate between HTTP and `jobs.service`. Invariant: at most `READS_AT_ONCE` queries run in a process,
one per owner, in separate threads, so that reading rollouts never delays other requests.
"""

from __future__ import annotations

import asyncio
import math
from typing import Annotated, Any

from litestar import Request, Response, Router, get
from litestar.di import NamedDependency, Provide
from litestar.params import FromQuery, QueryParameter, SkipValidation

from api.dependencies import Owner, Service
from api.fields import Fields, wanted
from api.lists import Cursor, Limit, answer, encoded, page_of
from api.problems import bad_parameter, responses
from api.queries import bad_query
from api.routes.jobs import READ, JobId, check_id
from api.schemas import FinishWord, RolloutList, RolloutStepList
from api.threads import FairThreads
from grpo_core.run_dir.records import Rollout
from jobs.read.rollout_query import RolloutOrder, RolloutQuery
from jobs.read.rollouts import RolloutStep

READS_AT_ONCE = 2
MAX_WAITING_READS = 32
"""Of one owner."""
MAX_STEP = 2**31 - 1

Step = Annotated[int | None, QueryParameter(ge=1, le=MAX_STEP, description="Only this step")]
FirstStep = Annotated[int | None, QueryParameter(ge=1, le=MAX_STEP, description="Only this step and later")]
LastStep = Annotated[int | None, QueryParameter(ge=1, le=MAX_STEP, description="Only this step and earlier")]
Prompt = Annotated[str | None, QueryParameter(min_length=1, max_length=200, description="Only of this prompt_id")]
Below = Annotated[float | None, QueryParameter(description="Only with a reward_total below")]
Above = Annotated[float | None, QueryParameter(description="Only with a reward_total above")]
Threads = NamedDependency[SkipValidation[FairThreads]]


def read_threads(request: Request[Any, Any, Any]) -> FairThreads:
    """Dependency: the threads that run queries."""
    return request.app.state.rollout_threads


def _require_finite(**bounds: float | None) -> None:
    wrong = [
        bad_parameter(name, "is not a finite number", "Give one, such as 0.5.")
        for name, bound in bounds.items()
        if bound is not None and not math.isfinite(bound)
    ]
    if wrong:
        raise bad_query(*wrong)


@get(
    "/",
    operation_id="listRollouts",
    summary="Single completions with their rewards",
    opt=READ,
    responses=responses("bad_query", "unknown_field", "not_found"),
)
async def list_rollouts(
    request: Request[Any, Any, Any],
    job_id: JobId,
    owner: Owner,
    service: Service,
    threads: Threads,
    step: Step = None,
    step_from: FirstStep = None,
    step_to: LastStep = None,
    prompt: Prompt = None,
    reward_lt: Below = None,
    reward_gt: Above = None,
    finish: FromQuery[FinishWord | None] = None,
    order: Annotated[
        RolloutOrder, QueryParameter(description="Descending with a minus; reward is reward_total")
    ] = "step",
    limit: Annotated[int, QueryParameter(ge=1, le=500, description="Completions per page")] = 50,
    cursor: Annotated[
        str | None, QueryParameter(min_length=1, max_length=400, description="`next_cursor` of the previous page")
    ] = None,
    fields: Fields = None,
) -> Response[RolloutList]:
    """A page of a job's completions, also while it runs. A step and a prompt select a group; all filters must match."""
    _require_finite(reward_lt=reward_lt, reward_gt=reward_gt)
    wanted(fields, Rollout)
    query = RolloutQuery(
        step=step,
        step_from=step_from,
        step_to=step_to,
        prompt=prompt,
        reward_lt=reward_lt,
        reward_gt=reward_gt,
        finish=finish,
        order=order,
    )

    def read() -> Response[Any]:
        found = service.rollouts(job_id, owner, query, limit=limit, cursor=cursor)
        page = RolloutList(data=found.items, has_more=found.next_cursor is not None, next_cursor=found.next_cursor)
        return encoded(answer(request, page, fields, Rollout))

    return await asyncio.get_running_loop().run_in_executor(threads, read)


@get(
    "/steps",
    operation_id="listRolloutSteps",
    summary="The steps that have completions",
    opt=READ,
    responses=responses("bad_query", "unknown_field", "not_found"),
)
async def list_steps(
    request: Request[Any, Any, Any],
    job_id: JobId,
    owner: Owner,
    service: Service,
    threads: Threads,
    limit: Limit = None,
    cursor: Cursor = None,
    fields: Fields = None,
) -> Response[RolloutStepList]:
    """Every step that has completions, with its prompts and the spread of its rewards."""
    every = await asyncio.get_running_loop().run_in_executor(threads, service.rollout_steps, job_id, owner)
    found, following = page_of(every, lambda each: each.step, limit=limit, cursor=cursor)
    page = RolloutStepList(data=found, has_more=following is not None, next_cursor=following)
    return answer(request, page, fields, RolloutStep)


ROUTER = Router(
    "/jobs/{job_id:str}/rollouts",
    route_handlers=[list_rollouts, list_steps],
    dependencies={"threads": Provide(read_threads, sync_to_thread=False)},
    guards=[check_id],
    tags=["jobs"],
)
