"""Facts about the request being served that no handler has to ask for: its id, its methods, where it failed."""

from __future__ import annotations

import re
import traceback
from typing import TYPE_CHECKING, Any

from litestar.exceptions import MethodNotAllowedException
from ulid import ULID

if TYPE_CHECKING:
    from litestar.types import Method, Scope

REQUEST_ID_HEADER = b"x-request-id"
_KEY = "grpo_request_id"
_ACCEPTED_ID = re.compile(rb"[A-Za-z0-9._-]{8,64}")
_METHODS: tuple[Method, ...] = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")


def request_id(scope: Scope) -> str:
    """The id of this request: the caller's `X-Request-Id` where it is harmless, else a new one."""
    state: dict[str, Any] = scope["state"]
    if _KEY not in state:
        given = next((value for name, value in scope["headers"] if name == REQUEST_ID_HEADER), b"")
        state[_KEY] = given.decode() if _ACCEPTED_ID.fullmatch(given) else f"req-{ULID()}"
    return state[_KEY]


def allowed_methods(scope: Scope) -> list[str]:
    """The methods that the router takes at this request's path; what it says of that itself can be incomplete."""
    router = scope["litestar_app"].asgi_router
    path = scope["path"].rstrip("/") or "/"
    found: list[str] = []
    for method in _METHODS:
        try:
            router.handle_routing(path=path, method=method)
        except MethodNotAllowedException:
            continue
        found.append(method)
    return found


def root_of(error: Exception) -> Exception:
    """The error at the bottom of those that were raised for it."""
    while True:
        inner = error.exceptions[0] if isinstance(error, ExceptionGroup) else error.__cause__
        if not isinstance(inner, Exception):
            return error
        error = inner


def stack_of(error: Exception) -> list[str]:
    """Where an error came from, without its message and without any value."""
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-12:]]
