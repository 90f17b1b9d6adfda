"""Deliveries in Valkey: each event for each webhook, from its queue to its last attempt.

Owns the queue, its order by time, and what owners see of the last days. A body is kept until the delivery has ended.
Invariant: a delivery leaves the queue only when it was accepted, was given up, or its webhook is gone or disabled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from grpo_core import strict_json
from jobs.store.job import utc
from jobs.store.job_store import JobStore, guarded

KEEP_MS = 8 * 86_400_000
"""How long a delivery is listed after it was queued, in ms; more than a week and the day of its attempts."""
LISTED = 1000
"""Largest number of a webhook's deliveries that are listed."""
State = Literal["pending", "delivered", "failed"]


@dataclass(frozen=True, kw_only=True)
class Due:
    """A delivery whose time has come."""

    owner: str
    webhook: str
    event: str


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """One event for one webhook."""

    event_id: str
    type: str
    job: str | None
    state: State
    attempts: int
    created_at: datetime
    last_attempt_at: datetime | None
    last_status: int | None
    """HTTP status of the last attempt; None without an answer."""
    last_error: str | None
    next_attempt_at: datetime | None
    body: str = ""


class Deliveries:
    """All deliveries. Thread-safe. Raises `Unavailable`."""

    def __init__(self, job_store: JobStore, *, lease_seconds: float) -> None:
        """A delivery is due again `lease_seconds` after an attempt was begun, in case its process dies."""
        self._lease_ms = int(lease_seconds * 1000)
        self._job_store = job_store
        self._prefix = job_store.prefix

    def add(self, webhook_id: str, owner: str, body: dict[str, Any]) -> bool:
        """Queue a delivery; False if it was queued before."""
        fields = {
            "type": body["type"],
            "job": str(body["data"]["id"]),
            "body": strict_json.dumps(body),
            "state": "pending",
            "attempts": "0",
        }
        encoded = strict_json.dumps(fields)
        arguments = (body["id"], owner, encoded, str(KEEP_MS), str(LISTED))
        return bool(self._job_store.run_script("deliver", webhook_id, *arguments))

    def due(self, limit: int) -> list[tuple[str, str]]:
        """Return owner and id of webhooks with a due delivery, the longest due first."""
        now = self._job_store.now_ms()
        members: list[str] = guarded(lambda: self._client.zrangebyscore(self._queue, 0, now, start=0, num=limit))
        return [(owner, webhook_id) for owner, webhook_id in map(str.split, members)]

    def begin(self, owner: str, webhook_id: str) -> Due | None:
        """Begin an attempt of a webhook's next due delivery, which is not due while it lasts; None without one."""
        now = self._job_store.now_ms()
        events: list[str] = guarded(
            lambda: self._client.zrangebyscore(self._undelivered(webhook_id), 0, now, start=0, num=1)
        )
        due = Due(owner=owner, webhook=webhook_id, event=events[0] if events else "")
        self._postpone(due, self._lease_ms)
        return due if events else None

    def get(self, webhook_id: str, event_id: str) -> Delivery | None:
        """Return a delivery; None for an unknown one."""
        fields: dict[str, str] = guarded(lambda: self._client.hgetall(self._key(webhook_id, event_id)))
        return _delivery(event_id, fields, None) if "type" in fields else None

    def latest(self, webhook_id: str, limit: int) -> list[Delivery]:
        """Return a webhook's last deliveries, newest first."""
        events: list[str] = guarded(lambda: self._client.zrevrange(self._list(webhook_id), 0, limit - 1))

        def read() -> list[Any]:
            pipeline = self._client.pipeline(transaction=False)
            for event in events:
                pipeline.hgetall(self._key(webhook_id, event))
                pipeline.zscore(self._undelivered(webhook_id), event)
            return pipeline.execute()

        found = guarded(read) if events else []
        pairs = zip(events, found[::2], found[1::2], strict=True)
        return [_delivery(event, fields, next_ms) for event, fields, next_ms in pairs if "type" in fields]

    def pending(self, webhook_id: str) -> int:
        """Return the number of a webhook's deliveries that have not ended."""
        return int(guarded(lambda: self._client.zcard(self._undelivered(webhook_id))))

    def known(self, webhook_id: str, event_ids: Sequence[str]) -> list[bool]:
        """Return for each event whether Valkey knows its delivery."""

        def read() -> list[int]:
            pipeline = self._client.pipeline(transaction=False)
            for event_id in event_ids:
                pipeline.exists(self._key(webhook_id, event_id))
            return pipeline.execute()

        return [bool(found) for found in guarded(read)] if event_ids else []

    def retry(self, due: Due, *, seconds: float, attempts: int, status: int | None, error: str | None) -> None:
        """Record a failed attempt and when the next one is due."""
        self._note(due, "pending", attempts, status, error)
        self._postpone(due, int(seconds * 1000))

    def end(self, due: Due, state: State, *, attempts: int, status: int | None, error: str | None) -> None:
        """Record the last attempt; the body is deleted."""
        self._note(due, state, attempts, status, error)
        guarded(lambda: self._client.hdel(self._key(due.webhook, due.event), "body"))
        self._postpone(due, None)

    def forget(self, due: Due) -> None:
        """Delete a delivery, as if its event had not been reported."""
        guarded(lambda: self._client.delete(self._key(due.webhook, due.event)))
        guarded(lambda: self._client.zrem(self._list(due.webhook), due.event))
        self._postpone(due, None)

    def forget_webhook(self, owner: str, webhook_id: str) -> None:
        """Delete all deliveries of a webhook."""
        listed: list[str] = guarded(lambda: self._client.zrange(self._list(webhook_id), 0, -1))
        pending: list[str] = guarded(lambda: self._client.zrange(self._undelivered(webhook_id), 0, -1))
        for event in {*listed, *pending}:
            self.forget(Due(owner=owner, webhook=webhook_id, event=event))
        guarded(lambda: self._client.delete(self._accepted(webhook_id)))

    def accepted_ms(self, webhook_id: str) -> int:
        """Return when a webhook last accepted an event, in ms since 1970; 0 for never."""
        return int(guarded(lambda: self._client.get(self._accepted(webhook_id))) or 0)

    def note_accepted(self, webhook_id: str) -> None:
        """Record that a webhook has accepted an event now."""
        now = self._job_store.now_ms()
        guarded(lambda: self._client.set(self._accepted(webhook_id), now))

    def _note(self, due: Due, state: State, attempts: int, status: int | None, error: str | None) -> None:
        fields = {
            "state": state,
            "attempts": str(attempts),
            "at_ms": str(self._job_store.now_ms()),
            "status": "" if status is None else str(status),
            "error": error or "",
        }

        def write() -> None:
            pipeline = self._client.pipeline()
            pipeline.hset(self._key(due.webhook, due.event), mapping=fields)
            # Also while it is pending, because the webhook may have been deleted during the attempt.
            pipeline.pexpire(self._key(due.webhook, due.event), KEEP_MS)
            pipeline.execute()

        guarded(write)

    def _postpone(self, due: Due, milliseconds: int | None) -> None:
        wait = "" if milliseconds is None else str(milliseconds)
        self._job_store.run_script("redeliver", due.webhook, due.owner, due.event, wait)

    @property
    def _client(self) -> Any:
        return self._job_store.client

    @property
    def _queue(self) -> str:
        return f"{self._prefix}:deliveries"

    def _key(self, webhook_id: str, event_id: str) -> str:
        return f"{self._prefix}:delivery:{webhook_id}:{event_id}"

    def _accepted(self, webhook_id: str) -> str:
        return f"{self._prefix}:webhook-accepted:{webhook_id}"

    def _undelivered(self, webhook_id: str) -> str:
        return f"{self._prefix}:undelivered:{webhook_id}"

    def _list(self, webhook_id: str) -> str:
        return f"{self._prefix}:deliveries-of:{webhook_id}"


def _delivery(event_id: str, fields: dict[str, str], next_ms: float | None) -> Delivery:
    return Delivery(
        event_id=event_id,
        type=fields["type"],
        job=fields["job"] if fields["job"].startswith("job-") else None,
        state=fields["state"],  # pyright: ignore[reportArgumentType] - `_note` and `add` write it
        attempts=int(fields["attempts"]),
        created_at=utc(int(fields["created_ms"])),
        last_attempt_at=utc(int(fields["at_ms"])) if "at_ms" in fields else None,
        last_status=int(fields["status"]) if fields.get("status") else None,
        last_error=fields.get("error") or None,
        next_attempt_at=utc(int(next_ms)) if next_ms is not None else None,
        body=fields.get("body", ""),
    )
