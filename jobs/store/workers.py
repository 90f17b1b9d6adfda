"""The connected workers and the queues they serve, for warnings and displays and never for decisions.

Invariants: an entry outlives its worker by at most `EXPIRY_SECONDS`, and the cost of listing workers does not depend on
the number of jobs, because every submission lists them.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

import grpo_core
from grpo_core import strict_json
from grpo_core.spec import SPEC_FORMAT
from jobs.store.job_store import JobStore, guarded

EXPIRY_SECONDS = 60
NAMED_SECONDS = 24 * 3600
"""How long the name of a killed worker is kept: far longer than hosts' clocks differ."""


_FIRST = frozenset({"name", "queues", "device", "job"})
"""The fields of the first release."""


@dataclass(frozen=True, kw_only=True)
class WorkerInfo:
    """One connected worker."""

    name: str
    queues: list[str]
    device: str
    """Its device: `cpu`, or the GPU's name."""
    job: str | None = None
    spec_format: int = SPEC_FORMAT
    """The newest spec format it reads."""
    version: str = grpo_core.__version__
    """Its release; empty for a release that does not announce it."""
    grader_isolation: str = "none"
    """How it confines the code of jobs: `landlock+seccomp`, `unconfined`, or `none`: it runs no code of jobs."""
    host: str = ""
    gpus: list[str] = field(default_factory=list[str])
    """The name of each of its GPUs."""
    gpu_memory_gb: float | None = None
    """Memory of its smallest GPU in 10^9 bytes; None without one."""
    memory_gb: float | None = None
    """Memory of its machine or container in 10^9 bytes."""
    engines: list[str] = field(default_factory=list[str])
    """What it can train and serve with: `native`, `trl`, `unsloth`, `vllm`."""
    drain: str | None = None
    """The drain that it obeys: its mode, or an empty string; None for a release that cannot be drained."""
    busy: bool = False
    """Whether it claims or runs a job."""

    def written(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return its entry, and separately the fields of later releases: the first release refuses unknown fields."""
        body = asdict(self)
        return body, {name: body.pop(name) for name in list(body) if name not in _FIRST}

    @classmethod
    def read(cls, body: str, later: str | None) -> Self:
        """Read what `written` of any release returned; the first release wrote no second part."""
        found: dict[str, Any] = {"spec_format": 1, "version": "", **json.loads(body), **json.loads(later or "{}")}
        return cls(**{one.name: found[one.name] for one in fields(cls) if one.name in found})


class WorkerRegistry:
    """The workers that announced themselves within the last minute."""

    def __init__(self, job_store: JobStore) -> None:
        self._job_store = job_store
        self._prefix = f"{job_store.prefix}:worker:"
        self._later = f"{job_store.prefix}:worker-release:"
        self._names = f"{job_store.prefix}:workers"

    def announce(self, info: WorkerInfo) -> None:
        """Announce a worker."""
        now = time.time()
        body, later = info.written()
        pipeline = self._job_store.client.pipeline(transaction=False)
        pipeline.set(self._later + info.name, strict_json.dumps(later), ex=EXPIRY_SECONDS)
        pipeline.set(self._prefix + info.name, strict_json.dumps(body), ex=EXPIRY_SECONDS)
        pipeline.zadd(self._names, {info.name: now})
        pipeline.zremrangebyscore(self._names, "-inf", now - NAMED_SECONDS)
        guarded(pipeline.execute)

    def withdraw(self, name: str) -> None:
        """Remove a worker that has stopped."""
        pipeline = self._job_store.client.pipeline(transaction=False)
        pipeline.delete(self._prefix + name, self._later + name)
        pipeline.zrem(self._names, name)
        guarded(pipeline.execute)

    def all(self) -> list[WorkerInfo]:
        """Return every connected worker."""
        client = self._job_store.client
        names: list[str] = guarded(lambda: client.zrange(self._names, 0, -1))
        if not names:
            return []
        keys = [prefix + name for prefix in (self._prefix, self._later) for name in names]
        bodies: list[str | None] = guarded(lambda: client.mget(keys))
        pairs = zip(bodies[: len(names)], bodies[len(names) :], strict=True)
        return [WorkerInfo.read(body, later) for body, later in pairs if body]

    def seen(self) -> dict[str, float]:
        """Return when each worker that did not stop by itself was last seen, as a Unix time, for a day."""
        client = self._job_store.client
        pairs: list[tuple[str, float]] = guarded(lambda: client.zrange(self._names, 0, -1, withscores=True))
        return dict(pairs)
