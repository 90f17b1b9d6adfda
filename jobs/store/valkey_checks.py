"""Checks that a Valkey server is safe for jobs: no eviction, an append-only file, one shard, not too old.

Reads only INFO, which managed services allow even if they forbid CONFIG. API and worker refuse to start on an unsafe
server and repeat the checks while they run. Then a fault is a warning of `/readyz` and a metric, because stopping would
lose more. Invariant: a value that the server does not show is reported as unknown and never assumed to be safe.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict
from redis.exceptions import NoPermissionError

from jobs.errors import JobsError, Unavailable
from jobs.store.job_store import JobStore, guarded

log = structlog.get_logger()

OLDEST = (6, 2)
LOOK_AGAIN_SECONDS = 15.0

FAULTS: dict[str, str] = {
    "valkey_evicts": "It drops keys when its memory is full (maxmemory-policy {policy}), and with them jobs. Set "
    "`maxmemory-policy noeviction`.",
    "valkey_volatile": "It keeps no append-only file, so a restart loses records until `grpo admin rebuild`. "
    "Set `appendonly yes`; or set GRPO_ALLOW_VOLATILE_VALKEY=1 to accept that, for example for a managed service with "
    "replicas.",
    "valkey_sharded": "It is a cluster of {shards} shards, and one script changes keys of several. Use a server "
    "without cluster mode, or a cluster of one shard.",
    "valkey_too_old": "It has version {version}. Use Valkey 7.2 or newer, or Redis 6.2 or newer.",
    "valkey_append_fails": "It could not write its append-only file. Look at its disk and its log.",
    "valkey_replica": "It is a replica, which accepts no writes. Name the primary in REDIS_URL.",
}
"""Faults of a server, with their remedies."""

_PASSING = frozenset({"valkey_append_fails", "valkey_replica"})
"""Temporary faults, which do not prevent a start."""


class ValkeySettings(BaseSettings):
    """Exceptions that the operator allows."""

    model_config = SettingsConfigDict(frozen=True, populate_by_name=True, extra="ignore")

    volatile: bool = Field(default=False, validation_alias="GRPO_ALLOW_VOLATILE_VALKEY")
    """Whether a server without an append-only file is accepted."""


class UnsafeValkey(JobsError):
    """The server would lose jobs."""

    def __init__(self, faults: Mapping[str, str]) -> None:
        self.codes = list(faults)
        super().__init__("REDIS_URL names a server that this service cannot use. " + " ".join(faults.values()))


@dataclass(frozen=True, kw_only=True)
class ValkeyState:
    """The result of one check of the server."""

    faults: Mapping[str, str]
    """Messages with remedies, by code."""
    unknown: tuple[str, ...] = ()
    """Values that the server does not show."""
    memory_bytes: int = 0
    max_memory_bytes: int = 0
    """Memory limit; 0 without a limit."""
    replicas: int = 0
    replica_lag_seconds: float = 0.0
    """Time since the slowest replica was heard."""


def judge(info: Mapping[str, Any], shards: int | None, settings: ValkeySettings) -> ValkeyState:
    """Check the values of INFO, and the number of shards of a cluster."""
    version = str(info.get("valkey_version") or info.get("redis_version") or "")
    facts = {"policy": info.get("maxmemory_policy"), "version": version, "shards": shards}
    wrong = {
        "valkey_evicts": info.get("maxmemory_policy") not in (None, "noeviction"),
        "valkey_volatile": info.get("aof_enabled") == 0 and not settings.volatile,
        "valkey_sharded": shards is not None and shards > 1,
        "valkey_too_old": bool(version) and _parsed(version) < OLDEST,
        "valkey_append_fails": info.get("aof_enabled") == 1 and info.get("aof_last_write_status", "ok") != "ok",
        "valkey_replica": info.get("role") in ("slave", "replica"),
    }
    replicas = [value for name, value in info.items() if name.startswith("slave") and isinstance(value, dict)]
    needed = {"maxmemory_policy": "maxmemory-policy", "aof_enabled": "appendonly", "redis_version": "its version"}
    return ValkeyState(
        faults={code: FAULTS[code].format(**facts) for code, is_wrong in wrong.items() if is_wrong},
        unknown=tuple(text for name, text in needed.items() if name not in info),
        memory_bytes=int(info.get("used_memory", 0)),
        max_memory_bytes=int(info.get("maxmemory", 0)),
        replicas=len(replicas),
        replica_lag_seconds=max((float(each.get("lag", 0)) for each in replicas), default=0.0),
    )


def look(job_store: JobStore, settings: ValkeySettings) -> ValkeyState:
    """Check the server. Raises `Unavailable`."""
    info: dict[str, Any] = guarded(lambda: _unless_forbidden(job_store.client.info)) or {}
    shards = None
    if info.get("cluster_enabled") == 1 or info.get("redis_mode") == "cluster":
        shards = int(guarded(lambda: _unless_forbidden(lambda: _cluster(job_store))) or 1)
    return judge(info, shards, settings)


class ValkeyWatch:
    """Checks one server at the start and regularly. Thread-safe."""

    def __init__(self, job_store: JobStore, settings: ValkeySettings | None = None) -> None:
        self._job_store = job_store
        self._settings = settings or ValkeySettings()
        self._lock = threading.Lock()
        self._state: ValkeyState | None = None
        self._looked = 0.0
        self._passed = False

    def require(self) -> None:
        """Check the server. Raises `UnsafeValkey` if it would lose jobs, and `Unavailable` if it does not answer."""
        state = self._look()
        self.refuse()
        if state.unknown:
            log.warning("valkey_not_known", settings=", ".join(state.unknown))

    def refuse(self) -> None:
        """Raise `UnsafeValkey` if the latest check found a permanent fault. Sends no request."""
        if self._state and (lasting := _lasting(self._state)):
            raise UnsafeValkey(lasting)

    def require_passed(self) -> None:
        """Raise `Unavailable` until one check found no permanent fault. Sends no request; later faults are warnings."""
        if self._state is None:
            raise Unavailable("Valkey", "it has not answered since this process started")
        if not self._passed:
            raise Unavailable("Valkey", "it is not safe for jobs: " + " ".join(self._state.faults.values()))

    def state(self) -> ValkeyState:
        """Return the result of a check, at most some seconds old. Raises `Unavailable`."""
        with self._lock:
            known = self._state if time.monotonic() - self._looked < LOOK_AGAIN_SECONDS else None
        return known or self._look()

    def warnings(self) -> list[str]:
        """Return the codes of the latest check's faults. Sends no request, so that callers never wait."""
        return sorted(self._state.faults) if self._state else []

    def _look(self) -> ValkeyState:
        state = look(self._job_store, self._settings)
        with self._lock:
            before, self._state, self._looked = self._state, state, time.monotonic()
            self._passed = self._passed or not _lasting(state)
        for code, text in state.faults.items():
            if before is None or code not in before.faults:
                log.error("valkey_unsafe", code=code, remedy=text)
        return state


def _lasting(state: ValkeyState) -> dict[str, str]:
    return {code: text for code, text in state.faults.items() if code not in _PASSING}


def _cluster(job_store: JobStore) -> Any:
    told: Any = job_store.client.execute_command("CLUSTER INFO")
    return told.get("cluster_size")


def _unless_forbidden(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except NoPermissionError:
        return None


def _parsed(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
