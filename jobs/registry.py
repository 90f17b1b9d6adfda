"""Which workers are connected and which queues they serve; for warnings and displays, never for decisions.

Invariant: an entry outlives its worker by at most `EXPIRY_SECONDS`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from grpo_core import strict_json
from jobs.ledger import Ledger, guarded

EXPIRY_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class WorkerInfo:
    """One connected worker."""

    name: str
    queues: list[str]
    device: str
    """What it trains on: `cpu`, or the card's name."""
    job: str | None = None


class WorkerRegistry:
    """The workers that announced themselves within the last minute."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._prefix = f"{ledger.prefix}:worker:"

    def announce(self, info: WorkerInfo) -> None:
        """Say that a worker is there."""
        body = strict_json.dumps(asdict(info))
        guarded(lambda: self._ledger.client.set(self._prefix + info.name, body, ex=EXPIRY_SECONDS))

    def withdraw(self, name: str) -> None:
        """Say that a worker has gone."""
        guarded(lambda: self._ledger.client.delete(self._prefix + name))

    def all(self) -> list[WorkerInfo]:
        """Every worker that is there."""
        client = self._ledger.client
        keys: list[str] = guarded(lambda: list[str](client.scan_iter(f"{self._prefix}*", count=500)))
        bodies = guarded(lambda: client.mget(keys)) if keys else []
        return [WorkerInfo(**json.loads(body)) for body in bodies if body]

    def serving(self, queue: str) -> list[WorkerInfo]:
        """The workers that listen on a queue."""
        return [worker for worker in self.all() if queue in worker.queues]
