"""Facts about the current request: its id, its methods, and where it failed."""

from __future__ import annotations

import re
import traceback
from typing import TYPE_CHECKING, Any

from ulid import ULID

from api.compat import methods_at

if TYPE_CHECKING:
    from litestar.types import Scope

REQUEST_ID_HEADER = b"x-request-id"
_KEY = "grpo_request_id"
_GONE = "grpo_client_gone"
_ACCEPTED_ID = re.compile(rb"[A-Za-z0-9._-]{8,64}")


def request_id(scope: Scope) -> str:
    """The id of this request: the caller's `X-Request-Id` where it is harmless, else a new one."""
    state: dict[str, Any] = scope["state"]
    if _KEY not in state:
        given = next((value for name, value in scope["headers"] if name == REQUEST_ID_HEADER), b"")
        state[_KEY] = given.decode() if _ACCEPTED_ID.fullmatch(given) else f"req-{ULID()}"
    return state[_KEY]


def client_address(scope: Scope) -> str:
    """Where the request comes from: what a trusted proxy said (`GRPO_TRUSTED_PROXIES`), else the connection's peer."""
    client = scope.get("client")
    return client[0] if client else "unknown"


def note_client_gone(scope: Scope) -> None:
    """Remember that the client closed the connection before it had sent the whole request."""
    scope["state"][_GONE] = True


def is_client_gone(scope: Scope) -> bool:
    """Whether it did."""
    return _GONE in scope["state"]


def allowed_methods(scope: Scope) -> list[str]:
    """The methods that are served at this request's path; what answers GET answers HEAD (`api.representations`)."""
    found = methods_at(scope["litestar_app"], scope["path"].rstrip("/") or "/")
    return [name for method in found for name in (["GET", "HEAD"] if method == "GET" else [method])]


def root_of(error: Exception) -> Exception:
    """The root cause of the errors that were raised for it."""
    while True:
        inner = error.exceptions[0] if isinstance(error, ExceptionGroup) else error.__cause__
        if not isinstance(inner, Exception):
            return error
        error = inner


def stack_of(error: Exception) -> list[str]:
    """Where an error came from, without its message and without any value."""
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-12:]]
