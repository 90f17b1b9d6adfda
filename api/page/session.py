"""Logging in and out of the page: an API key is exchanged for a cookie that scripts cannot read.

Owns the cookie; sessions are `jobs.auth.sessions`'s. Invariant: the key is in the body of one request and nowhere else:
in no address, no cookie and no storage of the browser.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, ParamSpec, TypeVar

import msgspec
from litestar import Request, Response, delete, get, post
from litestar.datastructures import Cookie

from api.audit import audited, note_user
from api.auth import COOKIE, PUBLIC, check_same_origin, session_token
from api.connections import group_of
from api.dependencies import Service
from api.problems import ApiError
from api.representations import SECRET
from api.requests import client_address
from api.threads import OWNER, FairThreads
from grpo_core import strict_json
from jobs.auth.api_keys import KeyRecord
from jobs.auth.sessions import Session, TooManyAttempts

P = ParamSpec("P")
T = TypeVar("T")


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Whose key opened the page, and what it allows."""

    owner: str
    name: str | None
    scopes: list[str]
    expires_at: datetime | None


@post(
    "/session",
    opt={**PUBLIC, **audited("logIn")},
    include_in_schema=False,
    status_code=200,
    request_max_body_size=4096,
)
async def log_in(request: Request[Any, Any, Any], service: Service) -> Response[Holder]:
    """Exchange `{"key": …}` for a cookie."""
    check_same_origin(request)
    key = _key_in(await request.body())
    try:
        session = await _in_thread(request, service.log_in, key, group_of(client_address(request.scope)))
    except TooManyAttempts as error:
        wait = str(math.ceil(error.seconds))
        raise ApiError("rate_limited", str(error), headers={"Retry-After": wait}) from error
    if session is None:
        raise ApiError(
            "unauthorized",
            "This is not a valid API key. `grpo keys create` prints one; it may also be revoked or expired.",
        )
    note_user(request.scope, session.record)
    return Response(_holder(session.record), cookies=[_cookie(request, session)])


@get("/session", opt={**PUBLIC, **SECRET}, include_in_schema=False)
async def who(request: Request[Any, Any, Any], service: Service) -> Response[Holder | None]:
    """Whose session it is; 204 where there is none, which is how every visit begins."""
    token = session_token(request)
    record = await _in_thread(request, service.authenticate_session, token) if token is not None else None
    return Response(_holder(record), status_code=200) if record else Response(None, status_code=204)


@delete("/session", opt={**PUBLIC, **audited("logOut")}, include_in_schema=False, status_code=204)
async def log_out(request: Request[Any, Any, Any], service: Service) -> Response[None]:
    """End the session, also one that nobody would let in any more."""
    check_same_origin(request)
    token = session_token(request)
    if token is not None:
        note_user(request.scope, await _in_thread(request, service.log_out, token))
    return Response(None, status_code=204, cookies=[_cookie(request, None)])


async def _in_thread(request: Request[Any, Any, Any], call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """In separate threads and limited by address, so that requests with arbitrary keys or cookies delay neither owners
    nor each other."""
    OWNER.set(group_of(client_address(request.scope)))
    threads: FairThreads = request.app.state.session_threads
    return await asyncio.wrap_future(threads.submit(call, *args, **kwargs))


def _key_in(body: bytes) -> str:
    given: Any = strict_json.loads(body) if body else None
    key: Any = given.get("key") if isinstance(given, dict) else None
    if not isinstance(key, str):
        raise ApiError("bad_request", 'A JSON object with the key is expected: {"key": "grpo_…"}.')
    return key.strip()


def _holder(record: KeyRecord) -> Holder:
    return Holder(owner=record.owner, name=record.name, scopes=record.scopes, expires_at=record.expires_at)


def _cookie(request: Request[Any, Any, Any], session: Session | None) -> Cookie:
    # Behind a proxy that ends TLS only the browser knows how it came here, and says so in Origin.
    is_https = request.url.scheme == "https" or request.headers.get("origin", "").startswith("https:")
    seconds = int((session.expires_at - datetime.now(UTC)).total_seconds()) if session else 0
    return Cookie(
        key=COOKIE,
        value=session.token if session else "",
        path="/",
        max_age=max(0, seconds),
        httponly=True,
        samesite="strict",
        secure=is_https,
    )
