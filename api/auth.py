"""Who is calling and what their key allows: bearer keys and their scopes.

Owns the check, not the keys (`jobs.keys`). Invariants: a route without a scope in its `opt` must be public or it
is refused, and every refused key gets the same answer, whatever is wrong with it.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from litestar.concurrency import sync_to_thread
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler
from litestar.middleware import AbstractAuthenticationMiddleware, AuthenticationResult

from api.problems import ApiError

Scope = Literal["jobs:read", "jobs:write", "datasets:write"]

PUBLIC = {"exclude_from_auth": True}
"""The `opt` of a route that needs no key."""
ANY_SCOPE = {"scope": None}
"""The `opt` of a route that any valid key may use."""

_BEARER = re.compile(r"[Bb]earer +([A-Za-z0-9._~+/=-]{1,256})")


def scope(name: Scope) -> dict[str, Any]:
    """The `opt` of a route that needs this scope."""
    return {"scope": name}


class BearerAuth(AbstractAuthenticationMiddleware):
    """Finds the key's record, or answers 401."""

    async def authenticate_request(self, connection: ASGIConnection[Any, Any, Any, Any]) -> AuthenticationResult:
        given = _BEARER.fullmatch(connection.headers.get("authorization", ""))
        record = await sync_to_thread(connection.app.state.service.authenticate, given[1]) if given else None
        if record is None:
            raise ApiError(
                "unauthorized",
                "The request has no valid API key. Send 'Authorization: Bearer KEY' with a key that `grpo keys create` "
                "printed and that is neither revoked nor expired.",
                headers={"WWW-Authenticate": 'Bearer realm="grpo"'},
            )
        return AuthenticationResult(user=record, auth=None)


def is_open(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> bool:
    """Whether the route needs no key; asking for its methods with OPTIONS never does."""
    return bool(handler.opt.get("exclude_from_auth")) or connection.scope.get("method") == "OPTIONS"


async def check_scope(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Guard of the whole application: the key must have the scope that the route names."""
    if is_open(connection, handler):
        return
    # A KeyError here is a route whose author forgot to say who may use it: nobody.
    needed = handler.opt["scope"]
    if needed is None or needed in connection.user.scopes:
        return
    raise ApiError(
        "forbidden",
        f"This needs the scope {needed}, and the key has {', '.join(connection.user.scopes) or 'none'}. "
        f"Create a key with it: grpo keys create --owner NAME --scope {needed}.",
    )
