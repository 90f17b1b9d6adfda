"""Which workers are connected and which queues they serve; for warnings and displays, never for decisions.

Invariants: an entry outlives its worker by at most `EXPIRY_SECONDS`, and finding the workers costs the same however
many jobs there are: every submission does.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass

from grpo_core import strict_json
from jobs.ledger import Ledger, guarded

EXPIRY_SECONDS = 60
NAMED_SECONDS = 24 * 3600
"""How long the name of a worker that was killed is looked up in vain: far longer than hosts' clocks differ."""


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
        self._names = f"{ledger.prefix}:workers"

    def announce(self, info: WorkerInfo) -> None:
        """Say that a worker is there."""
        body, now = strict_json.dumps(asdict(info)), time.time()
        pipeline = self._ledger.client.pipeline(transaction=False)
        pipeline.set(self._prefix + info.name, body, ex=EXPIRY_SECONDS)
        pipeline.zadd(self._names, {info.name: now})
        pipeline.zremrangebyscore(self._names, "-inf", now - NAMED_SECONDS)
        guarded(pipeline.execute)

    def withdraw(self, name: str) -> None:
        """Say that a worker has gone."""
        pipeline = self._ledger.client.pipeline(transaction=False)
        pipeline.delete(self._prefix + name)
        pipeline.zrem(self._names, name)
        guarded(pipeline.execute)

    def all(self) -> list[WorkerInfo]:
        """Every worker that is there."""
        client = self._ledger.client
        names: list[str] = guarded(lambda: client.zrange(self._names, 0, -1))
        bodies = guarded(lambda: client.mget([self._prefix + name for name in names])) if names else []
        return [WorkerInfo(**json.loads(body)) for body in bodies if body]

    def serving(self, queue: str) -> list[WorkerInfo]:
        """The workers that listen on a queue."""
        return [worker for worker in self.all() if queue in worker.queues]
