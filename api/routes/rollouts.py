"""The routes below /jobs/{id}/rollouts: single completions with their rewards, and the steps there are.

Handlers only translate between HTTP and `jobs.service`. Invariant: at most `READS_AT_ONCE` queries run in a process,
and those that wait hold no thread, so that reading rollouts never keeps others from being served.
"""

from __future__ import annotations

import asyncio
import math
from typing import Annotated, Any

from litestar import Request, Router, get
from litestar.concurrency import sync_to_thread
from litestar.di import NamedDependency, Provide
from litestar.params import FromQuery, QueryParameter

from api.dependencies import Owner, Service
from api.problems import bad_parameter, responses
from api.queries import bad_query
from api.routes.jobs import READ, JobId, check_id
from api.schemas import RolloutList, RolloutStepList, rollout_of, rollout_step_of
from jobs.rollout_query import FinishReason, RolloutOrder, RolloutQuery

READS_AT_ONCE = 2
MAX_STEP = 2**31 - 1

Step = Annotated[int | None, QueryParameter(ge=1, le=MAX_STEP, description="Only this step")]
FirstStep = Annotated[int | None, QueryParameter(ge=1, le=MAX_STEP, description="Only from this step on")]
LastStep = Annotated[int | None, QueryParameter(ge=1, le=MAX_STEP, description="Only up to this step")]
Prompt = Annotated[str | None, QueryParameter(min_length=1, max_length=200, description="Only of this prompt_id")]
Below = Annotated[float | None, QueryParameter(description="Only with a reward_total below")]
Above = Annotated[float | None, QueryParameter(description="Only with a reward_total above")]
Slots = NamedDependency[asyncio.Semaphore]


def read_slots(request: Request[Any, Any, Any]) -> asyncio.Semaphore:
    """Dependency: what a query must hold while it runs."""
    return request.app.state.setdefault("rollout_reads", asyncio.Semaphore(READS_AT_ONCE))


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
    responses=responses("bad_query", "not_found"),
)
async def list_rollouts(
    job_id: JobId,
    owner: Owner,
    service: Service,
    slots: Slots,
    step: Step = None,
    step_from: FirstStep = None,
    step_to: LastStep = None,
    prompt: Prompt = None,
    reward_lt: Below = None,
    reward_gt: Above = None,
    finish: FromQuery[FinishReason | None] = None,
    order: Annotated[
        RolloutOrder, QueryParameter(description="A minus turns it round; reward is reward_total")
    ] = "step",
    limit: Annotated[int, QueryParameter(ge=1, le=500, description="Completions on a page")] = 50,
    cursor: Annotated[
        str | None, QueryParameter(min_length=1, max_length=400, description="`next_cursor` of the page before")
    ] = None,
) -> RolloutList:
    """A page of a job's completions, also while it runs. A step and a prompt make a group; all filters must hold."""
    _require_finite(reward_lt=reward_lt, reward_gt=reward_gt)
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
    async with slots:
        page = await sync_to_thread(service.rollouts, job_id, owner, query, limit=limit, cursor=cursor)
    return RolloutList(
        data=[rollout_of(rollout) for rollout in page.items],
        has_more=page.next_cursor is not None,
        next_cursor=page.next_cursor,
    )


@get(
    "/steps",
    operation_id="listRolloutSteps",
    summary="The steps whose completions can be read",
    opt=READ,
    responses=responses("bad_query", "not_found"),
)
async def list_steps(job_id: JobId, owner: Owner, service: Service, slots: Slots) -> RolloutStepList:
    """Every step that has completions, with its prompts and the spread of its rewards."""
    async with slots:
        found = await sync_to_thread(service.rollout_steps, job_id, owner)
    return RolloutStepList(data=[rollout_step_of(step) for step in found])


ROUTER = Router(
    "/jobs/{job_id:str}/rollouts",
    route_handlers=[list_rollouts, list_steps],
    dependencies={"slots": Provide(read_slots, sync_to_thread=False)},
    guards=[check_id],
    tags=["jobs"],
)
