"""The routes below /workers: the fleet, and drains by operators.

Handlers only translate between HTTP and `jobs.service`. Every key may see the fleet; whose job a worker has is shown to
that owner and to operators alone. Invariant: only a key with the scope `operator` changes anything here.
"""

from __future__ import annotations

from typing import Annotated, Any

from litestar import Request, Response, Router, delete, get, post
from litestar.di import NamedDependency, Provide
from litestar.params import PathParameter, QueryParameter

from api.auth import scope
from api.bodies import JSON_ERRORS, read_fields
from api.dependencies import IsOperator, Owner, Service
from api.fields import Fields
from api.lists import answer
from api.problems import invalid_body, responses
from api.schemas import Worker, WorkerList, worker_of
from jobs.store.drains import MODES, DrainMode

Name = Annotated[str, PathParameter(description="The name of a worker", min_length=1, max_length=200)]
Mode = NamedDependency[str]

READ = scope("jobs:read")
OPERATE = scope("operator")


async def read_mode(request: Request[Any, Any, Any]) -> DrainMode:
    """Dependency: how to drain, from an optional body."""
    body = await read_fields(request, {"mode"}, optional=True)
    mode = body.get("mode", "finish")
    if mode not in MODES:
        raise invalid_body("/mode", f"{str(mode)[:80]!r} is no mode", f"Use {' or '.join(MODES)}.")
    return mode


@get(
    "/",
    operation_id="listWorkers",
    summary="List the workers, by name",
    opt=READ,
    responses=responses("bad_query", "unknown_field"),
    sync_to_thread=True,
)
def list_workers(
    request: Request[Any, Any, Any],
    owner: Owner,
    operator: IsOperator,
    service: Service,
    limit: Annotated[int, QueryParameter(ge=1, le=1000, description="Workers per page")] = 100,
    cursor: Annotated[
        str | None, QueryParameter(max_length=200, description="`next_cursor` of the previous page")
    ] = None,
    fields: Fields = None,
) -> Response[WorkerList]:
    """The workers that are connected, fell silent within the last hour, or are drained."""
    found = service.list_workers(limit=limit, cursor=cursor)
    page = WorkerList(
        data=[worker_of(worker, viewer=None if operator else owner) for worker in found.items],
        has_more=found.next_cursor is not None,
        next_cursor=found.next_cursor,
    )
    return answer(request, page, fields, Worker)


@get(
    "/{name:str}",
    operation_id="getWorker",
    summary="Look at a worker",
    opt=READ,
    responses=responses("bad_query", "not_found"),
    sync_to_thread=True,
)
def get_worker(name: Name, owner: Owner, operator: IsOperator, service: Service) -> Worker:
    """One worker."""
    return worker_of(service.get_worker(name), viewer=None if operator else owner)


@post(
    "/{name:str}/drain",
    operation_id="drainWorker",
    summary="Drain a worker: it takes no new job",
    opt=OPERATE,
    status_code=200,
    dependencies={"mode": Provide(read_mode)},
    response_description="The order stands; `drain.empty` says when nothing is left",
    responses=responses("bad_query", "not_found", "conflict", *JSON_ERRORS, "invalid_body"),
    sync_to_thread=True,
)
def drain_worker(name: Name, mode: Mode, owner: Owner, service: Service) -> Worker:
    """Let its job finish, or with `checkpoint` save and go back to the queue. A second order replaces the
    first."""
    known: Any = mode
    return worker_of(service.drain_worker(name, known, by=owner), viewer=None)


@delete(
    "/{name:str}/drain",
    operation_id="undrainWorker",
    summary="Let a drained worker take jobs again",
    opt=OPERATE,
    status_code=200,
    response_description="It takes jobs again",
    responses=responses("bad_query", "not_found", "conflict"),
    sync_to_thread=True,
)
def undrain_worker(name: Name, owner: Owner, service: Service) -> Worker:
    """Take a drain back. A job that was already asked to save is queued again all the same."""
    return worker_of(service.drain_worker(name, None, by=owner), viewer=None)


ROUTER = Router("/workers", route_handlers=[list_workers, get_worker, drain_worker, undrain_worker], tags=["workers"])
