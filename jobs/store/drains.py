"""Drains: an operator's order to one worker to take no new job, by the worker's name.

Owns the marks in Valkey, not what a worker does with its own (`jobs.worker.draining`). Invariants: a mark outlives API
and worker processes until an operator takes it back, or for a day after it was made or its worker was last seen,
whichever is later. An order that was taken back leaves a mark too, so that a worker can tell it from a mark that Valkey
has lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, get_args

from grpo_core import strict_json
from jobs.store.job_store import JobStore, guarded
from jobs.store.workers import NAMED_SECONDS

DrainMode = Literal["finish", "checkpoint"]
"""What becomes of its job: it runs to its end, or saves a checkpoint and goes back to the queue."""
MODES: tuple[DrainMode, ...] = get_args(DrainMode)
_NONE = "none"


@dataclass(frozen=True, kw_only=True)
class Drain:
    """An order to a worker."""

    mode: DrainMode | None
    """None: it was taken back."""
    by: str
    """The operator, by the owner of the key."""
    at: datetime

    def written(self) -> str:
        """Return it as JSON."""
        return strict_json.dumps({"mode": self.mode or _NONE, "by": self.by, "at": self.at.isoformat()})


def _read(text: str) -> Drain:
    body = json.loads(text)
    mode = body["mode"]
    # A mode of a later release: at least no new job.
    known: DrainMode | None = None if mode == _NONE else mode if mode in MODES else "finish"
    return Drain(mode=known, by=body["by"], at=datetime.fromisoformat(body["at"]))


class DrainStore:
    """The marks of all workers."""

    def __init__(self, job_store: JobStore) -> None:
        self._client = job_store.client
        self._name = f"{job_store.prefix}:drains"

    def of(self, worker: str) -> Drain | None:
        """Return a worker's mark; None without one."""
        text: str | None = guarded(lambda: self._client.hget(self._name, worker))
        return _read(text) if text else None

    def all(self) -> dict[str, Drain]:
        """Return all marks by worker."""
        found: dict[str, str] = guarded(lambda: self._client.hgetall(self._name))
        return {worker: _read(text) for worker, text in found.items()}

    def put(self, worker: str, drain: Drain) -> None:
        """Write a worker's mark."""
        guarded(lambda: self._client.hset(self._name, worker, drain.written()))

    def restore(self, worker: str, drain: Drain) -> None:
        """Write a mark that Valkey has lost, unless there is a newer one."""
        guarded(lambda: self._client.hsetnx(self._name, worker, drain.written()))

    def forget_old(self, seen: Mapping[str, float]) -> None:
        """Delete the marks of workers that are gone; `seen` has when each was last seen, as `WorkerRegistry.seen`."""
        oldest = datetime.now(UTC) - timedelta(seconds=NAMED_SECONDS)
        old = [worker for worker, drain in self.all().items() if worker not in seen and drain.at < oldest]
        if old:
            guarded(lambda: self._client.hdel(self._name, *old))
