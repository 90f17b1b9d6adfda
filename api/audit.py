"""Audit log of requests that change something, hand out links, or carry a refused key.

Owns which requests these are and the fields of their lines; the log itself is in `jobs.store.audit_log`. Invariants:
nothing that a client sent is logged except well-formed ids of jobs, data sets, webhooks and keys; and requests without
a valid key add only a limited number of lines per minute, so that a rotated log keeps the actions of owners.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from api.connections import group_of
from api.requests import client_address, request_id
from jobs.auth.api_keys import KeyRecord
from jobs.store.audit_log import AuditLog

if TYPE_CHECKING:
    from litestar.types import HTTPScope, Scope

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
ADDRESS_LINES = 5
"""Lines a minute of requests that showed no valid key, or were one too many, from one address or of one owner."""
LINES = 30
"""The same of all of them."""
_MINUTE = 60.0
_USER = "grpo_audit_user"
_ACTION = "audit"
_ID = re.compile(r"(?:job|ds|webhook|key)-[0-9A-Z]{26}")


def audited(action: str) -> dict[str, Any]:
    """The `opt` of a route that is logged under this name for every method."""
    return {_ACTION: action}


def note_user(scope: Scope, record: KeyRecord | None) -> None:
    """Say whose key it was, where the request was let in without one."""
    scope["state"][_USER] = record


class RequestAudit:
    """Tells the audit log of one process's requests. Thread-safe."""

    def __init__(self, audit: AuditLog) -> None:
        self._audit = audit
        self._lock = threading.Lock()
        self._since = time.monotonic()
        self._lines: Counter[str] = Counter()
        """Of this minute, by address or owner; never more of them than lines."""
        self._left_out = 0

    def record(self, scope: HTTPScope, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Write the line of a request that was answered, if it is one to tell of; a status of 0 is no answer."""
        action = _action(scope, status)
        if action is None:
            return
        user: Any = scope["state"].get(_USER) or scope.get("user")
        owner: str | None = getattr(user, "owner", None)
        if (owner is None or status == 429) and not self._may_tell(owner or group_of(client_address(scope))):
            return
        self._audit.write(
            action,
            _result(status),
            status=status,
            owner=owner,
            key=getattr(user, "id", None),
            client=client_address(scope),
            object=_object(scope, headers),
            request_id=request_id(scope),
        )

    def close(self) -> None:
        """Say what was left out, and close the log."""
        with self._lock:
            self._sum_up()
        self._audit.close()

    def _may_tell(self, whose: str) -> bool:
        with self._lock:
            now = time.monotonic()
            if now - self._since >= _MINUTE:
                self._sum_up()
                self._since = now
            if self._lines.get(whose, 0) >= ADDRESS_LINES or self._lines.total() >= LINES:
                self._left_out += 1
                return False
            self._lines[whose] += 1
            return True

    def _sum_up(self) -> None:
        """One line that counts the requests of a minute without a line."""
        if self._left_out:
            self._audit.write("leftOut", "refused", count=self._left_out)
        self._lines.clear()
        self._left_out = 0


def _action(scope: HTTPScope, status: int) -> str | None:
    handler: Any = scope.get("route_handler")
    named: str | None = handler.opt.get(_ACTION) if handler is not None else None
    if named is not None:
        return named
    operation: str | None = getattr(handler, "operation_id", None)
    if status == 401:
        return operation or "unknown"
    return None if scope["method"] in _SAFE_METHODS else operation


def _result(status: int) -> str:
    if not status:
        return "unanswered"
    if status < 400:
        return "done"
    return "refused" if status < 500 else "failed"


def _object(scope: HTTPScope, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """What it was done to: what was made, or what the path names."""
    made = next((value.decode("latin-1") for name, value in headers if name.lower() == b"location"), "")
    named = [made.rpartition("/")[2], *map(str, scope.get("path_params", {}).values())]
    return next((name for name in named if _ID.fullmatch(name)), None)
