"""What handlers are given by name: the job service behind the application, and the owner and id of the caller's key."""

from __future__ import annotations

import re
from typing import Any

from litestar import Request
from litestar.concurrency import sync_to_thread
from litestar.datastructures import State
from litestar.di import NamedDependency, Provide
from litestar.params import SkipValidation
from litestar.types import Dependencies

from api.places import Places
from grpo_core.spec import DATASET_ID, JOB_ID
from jobs.auth.api_keys import OPERATOR, KeyRecord
from jobs.service import JobService

# Not validated, so that tests may inject another object with the same methods.
Service = NamedDependency[SkipValidation[JobService]]
Owner = NamedDependency[str]
KeyId = NamedDependency[str]
IsOperator = NamedDependency[bool]
Searches = NamedDependency[SkipValidation[Places]]


def service_of(state: State) -> Any:
    """The service the application was made with."""
    return state.service


async def owner_of(request: Request[KeyRecord, Any, Any]) -> str:
    """Whose key the request came with: every look-up goes by it. An operator acts on a job or data set as its owner."""
    if OPERATOR not in request.user.scopes:
        return request.user.owner
    job_id, dataset_id = (request.path_params.get(name, "") for name in ("job_id", "dataset_id"))
    service: JobService = request.app.state.service
    if re.fullmatch(JOB_ID, job_id):
        return await sync_to_thread(service.owner_of, job_id) or request.user.owner
    if re.fullmatch(DATASET_ID, dataset_id):
        return await sync_to_thread(service.dataset_owner, dataset_id) or request.user.owner
    return request.user.owner


def key_id_of(request: Request[KeyRecord, Any, Any]) -> str:
    """The id of the caller's key."""
    return request.user.id


def is_operator(request: Request[KeyRecord, Any, Any]) -> bool:
    """Whether the caller's key is an operator's, who sees what is other owners'."""
    return OPERATOR in request.user.scopes


def searches_of(state: State) -> Places:
    """Limits concurrent searches through lists."""
    return state.searches


PROVIDERS: Dependencies = {
    "service": Provide(service_of, sync_to_thread=False),
    "owner": Provide(owner_of),
    "key_id": Provide(key_id_of, sync_to_thread=False),
    "operator": Provide(is_operator, sync_to_thread=False),
}
