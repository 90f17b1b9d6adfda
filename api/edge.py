"""The outermost layer: gives every answer an id and its security headers, and writes one log line for each request.

An ASGI wrapper around the whole application, since Litestar's middleware is not run for a path without a route.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import structlog

from api.audit import RequestAudit
from api.requests import (
    REQUEST_ID_HEADER,
    allowed_methods,
    client_address,
    note_client_gone,
    request_id,
    root_of,
    stack_of,
)
from api.telemetry import ServiceMetrics
from jobs.auth.rate_limit import SPENT, Allowance

if TYPE_CHECKING:
    from litestar.types import ASGIApp, Message, Receive, Scope, Send

log = structlog.get_logger(__name__)

SECURITY_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
)
"""On every answer, unless a route sets its own."""

PREVIEW = "/v1"
"""Where the routes are served too, under the promises of docs/reference/stability.md."""
VERSIONED = frozenset(
    {
        *(
            "comparison",
            "datasets",
            "exports",
            "graders",
            "groups",
            "healthz",
            "jobs",
            "keys",
            "metrics",
            "readyz",
            "rewards",
        ),
        *("schema", "serving", "usage", "webhooks", "workers"),
    }
)
"""First parts of the paths that are; other paths below `PREVIEW` are separate routes."""

_QUIET = frozenset({"/healthz", "/readyz"})


class AnswerBrokenOffError(Exception):
    """An answer failed after it had begun; the log's line before this has the cause."""


class Edge:
    """Wraps the ASGI application."""

    def __init__(self, app: ASGIApp, metrics: ServiceMetrics, audit: RequestAudit) -> None:
        self._app, self._metrics, self._audit = app, metrics, audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        status = 0
        path = scope["path"]
        scope["path"] = _route_of(path)
        spent: dict[str, Allowance] = {}
        SPENT.set(spent)

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._metrics.observe(scope, status, time.perf_counter() - begun)
                headers = list(message["headers"])
                if scope["method"] == "OPTIONS":
                    headers = [(name, value) for name, value in headers if name.lower() != b"allow"]
                    headers.append((b"allow", ", ".join(allowed_methods(scope)).encode()))
                present = {name.lower() for name, _ in headers}
                headers += [(name, value) for name, value in SECURITY_HEADERS if name not in present]
                headers += limit_headers(spent.values())
                headers.append((REQUEST_ID_HEADER, request_id(scope).encode()))
                message["headers"] = headers
                self._audit.record(scope, status, headers)  # before its client hears of it
            await send(message)

        async def receive_and_look() -> Any:
            message = await receive()
            if message["type"] == "http.disconnect" and not status:
                note_client_gone(scope)
            return message

        try:
            await self._app(scope, receive_and_look, send_with_headers)
        except Exception as error:  # noqa: BLE001 - raised again, as what may be logged
            self._log_broken_off(scope, root_of(error))
            # The server must cut the connection, and logs what it is given: this, and no one's text.
            raise AnswerBrokenOffError from None
        finally:
            self._log(scope, path, status, time.perf_counter() - begun)
            if not status:
                self._audit.record(scope, status, ())

    @staticmethod
    def _log_broken_off(scope: Any, error: Exception) -> None:
        """Errors of an answer that had begun: nothing else sees them."""
        name = type(error).__qualname__
        log.error("request.broken_off", error=name, stack=stack_of(error), request_id=request_id(scope))

    @staticmethod
    def _log(scope: Any, path: str, status: int, seconds: float) -> None:
        write = log.debug if path in _QUIET and status < 500 else log.info
        write(
            "request",
            method=scope["method"],
            path=path[:200],
            status=status,
            ms=round(seconds * 1000, 1),
            request_id=request_id(scope),
            owner=getattr(scope.get("user"), "owner", None),
            key=getattr(scope.get("user"), "id", None),
            client=client_address(scope),
        )


def limit_headers(allowances: Iterable[Allowance]) -> list[tuple[bytes, bytes]]:
    """`RateLimit-Policy` and `RateLimit`, as draft-ietf-httpapi-ratelimit-headers has them, in its version 10."""
    policies, states = [], []
    for one in allowances:
        unit = ';qu="concurrent-requests"' if one.window_seconds is None else f";w={one.window_seconds:.0f}"
        full = "" if one.full_seconds is None else f";t={one.full_seconds:.0f}"
        policies.append(f'"{one.name}";q={one.most}{unit}')
        states.append(f'"{one.name}";r={one.left}{full}')
    found = {"ratelimit-policy": policies, "ratelimit": states} if policies else {}
    return [(name.encode(), ", ".join(values).encode()) for name, values in found.items()]


def _route_of(path: str) -> str:
    """The path as the router knows it."""
    root, _, rest = path.partition(f"{PREVIEW}/")
    return f"/{rest}" if not root and rest.partition("/")[0] in VERSIONED else path
