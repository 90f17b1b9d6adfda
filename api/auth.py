"""Authentication and scopes: bearer keys, or a browser's session instead of a key.

Owns the check, not the keys (`jobs.auth.api_keys`) or the sessions (`jobs.auth.sessions`). Invariants: a route without
a scope in its `opt` must be public or it is refused; every refused key gets the same answer; a cookie alone authorizes
no change, because any site can make a browser send it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Any, Literal

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler
from litestar.middleware import AbstractAuthenticationMiddleware, AuthenticationResult

from api.problems import ApiError
from api.threads import OWNER
from jobs.auth.api_keys import KeyRecord

Scope = Literal["jobs:read", "jobs:write", "datasets:write", "metrics:read", "operator", "keys:write"]

PUBLIC = {"exclude_from_auth": True}
"""The `opt` of a route that needs no key."""
ANY_SCOPE = {"scope": None}
"""The `opt` of a route that any valid key may use."""

COOKIE = "grpo_session"
PAGE_HEADER = "X-GRPO-Page"
"""Sent by our page with whatever changes something: another site's page cannot, without leave that nobody gives."""

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")
_BEARER = re.compile(r"[Bb]earer +([A-Za-z0-9._~+/=-]{1,256})")


def scope(name: Scope) -> dict[str, Any]:
    """The `opt` of a route that needs this scope."""
    return {"scope": name}


class BearerAuth(AbstractAuthenticationMiddleware):
    """Finds the key's record by the bearer key or else by the session's cookie, or answers 401."""

    async def authenticate_request(self, connection: ASGIConnection[Any, Any, Any, Any]) -> AuthenticationResult:
        service = connection.app.state.service
        token = session_token(connection)
        record, again = None, None
        if "authorization" in connection.headers or token is None:
            given = _BEARER.fullmatch(connection.headers.get("authorization", ""))
            scrapes = connection.route_handler.opt.get("scope") == "metrics:read"
            check = service.authenticate_scraper if scrapes else service.authenticate
            again = partial(check, given[1]) if given else None
        else:
            check_same_origin(connection)
            again = partial(service.authenticate_session, token)
        record = await _in_thread(connection, again) if again else None
        if record is None:
            raise ApiError(
                "unauthorized",
                "The request has no valid API key. Send 'Authorization: Bearer KEY' with a key that `grpo keys create` "
                "printed and that is neither revoked nor expired.",
                headers={"WWW-Authenticate": 'Bearer realm="grpo"'},
            )
        OWNER.set(record.owner)
        # Called again by answers that last long: a key may be revoked meanwhile.
        return AuthenticationResult(user=record, auth=again)


async def _in_thread(
    connection: ASGIConnection[Any, Any, Any, Any], check: Callable[[], KeyRecord | None]
) -> KeyRecord | None:
    """In separate threads, because the owner must be known before a request can wait for its turn."""
    threads = connection.app.state.key_threads
    context = copy_context()  # where the limits that it counts for are noted
    return await asyncio.get_running_loop().run_in_executor(threads, lambda: context.run(check))


def session_token(connection: ASGIConnection[Any, Any, Any, Any]) -> str | None:
    """The token in the cookie, if there is one that could be ours."""
    token = connection.cookies.get(COOKIE, "")
    return token if _TOKEN.fullmatch(token) else None


def check_same_origin(connection: ASGIConnection[Any, Any, Any, Any]) -> None:
    """Refuse what another site, or another port of this host, made the browser send."""
    if connection.scope.get("method") in _SAFE_METHODS:
        return
    # Browsers send this one where the connection is trustworthy; the other needs a preflight that is never granted.
    elsewhere = connection.headers.get("sec-fetch-site", "same-origin") != "same-origin"
    if elsewhere or PAGE_HEADER not in connection.headers:
        raise ApiError(
            "forbidden",
            "With a session's cookie only this service's own page may change something. Send 'Authorization: Bearer "
            "KEY' instead.",
        )


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
