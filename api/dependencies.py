"""What handlers are given by name: the job service behind the application, and the owner and id of the caller's key."""

from __future__ import annotations

from typing import Any

from litestar import Request
from litestar.datastructures import State
from litestar.di import NamedDependency, Provide
from litestar.params import SkipValidation
from litestar.types import Dependencies

from jobs.auth.api_keys import OPERATOR, KeyRecord
from jobs.service import JobService

# Not validated, so that tests may inject another object with the same methods.
Service = NamedDependency[SkipValidation[JobService]]
Owner = NamedDependency[str]
KeyId = NamedDependency[str]
IsOperator = NamedDependency[bool]


def service_of(state: State) -> Any:
    """The service the application was made with."""
    return state.service


def owner_of(request: Request[KeyRecord, Any, Any]) -> str:
    """Whose key the request came with: every look-up goes by it."""
    return request.user.owner


def key_id_of(request: Request[KeyRecord, Any, Any]) -> str:
    """The id of the caller's key."""
    return request.user.id


def is_operator(request: Request[KeyRecord, Any, Any]) -> bool:
    """Whether the caller's key is an operator's, who sees what is other owners'."""
    return OPERATOR in request.user.scopes


PROVIDERS: Dependencies = {
    "service": Provide(service_of, sync_to_thread=False),
    "owner": Provide(owner_of, sync_to_thread=False),
    "key_id": Provide(key_id_of, sync_to_thread=False),
    "operator": Provide(is_operator, sync_to_thread=False),
}
