"""The objects of a job that must survive a loss of Valkey: its request, epochs, commands, outcome and manifests.

Owns the write-once objects that are authoritative about a job. Invariant: `job.json`, each epoch ticket, each command
and `outcome.json` are written once and never change; the first outcome overrides every record.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from jobs.store import object_keys
from jobs.store.bucket import ObjectStore

WRITE_ONCE_VERSION = 1
Command = Literal["cancel", "pause", "resume"]
FinalStatus = Literal["succeeded", "failed", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended."""

    job: str
    status: FinalStatus
    epoch: int
    time: str
    """ISO 8601 UTC."""
    by: str
    """Name of the worker or API process that wrote it."""
    error: dict[str, Any] | None = None
    manifest: str | None = None
    """Key of the manifest of readable objects."""

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"v": WRITE_ONCE_VERSION, **self.__dict__}


@dataclass(frozen=True, kw_only=True)
class ManifestEntry:
    """One readable object."""

    path: str
    """Its path below the job, as readers see it."""
    key: str
    sha256: str
    size: int

    @property
    def name(self) -> str:
        """The file name alone. The path comes from the training process and must not lead out of a folder."""
        return self.key.rsplit("/", 1)[-1]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Every valid object of a job."""

    job: str
    epoch: int
    objects: list[ManifestEntry] = field(default_factory=list)
    best_step: int | None = None
    """The step whose evaluation was best: its checkpoint, with its adapter, is among the objects."""


class WriteOnceStore:
    """The write-once objects of all jobs in one bucket."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def put_job(self, job_id: str, body: dict[str, Any]) -> bool:
        """Write a job's request."""
        return self.store.put_json_once(object_keys.job(job_id), {"v": WRITE_ONCE_VERSION, **body})

    def job(self, job_id: str) -> dict[str, Any] | None:
        """Return a job's request; None if it was not written."""
        return self.store.get_json(object_keys.job(job_id))

    def allocate_epoch(
        self,
        job_id: str,
        worker: str,
        time: str,
        *,
        attempts: int = 0,
        run_ms: int = 0,
        orders: int = 0,
        gpu: str = "",
        hosts: int = 0,
        gpu_ms: dict[str, Any] | None = None,
    ) -> int | None:
        """Take the next epoch number for `worker`; None if another worker took it first.

        `attempts`, `run_ms`, `orders` and `gpu_ms` are copied from the record, for a loss of Valkey; `gpu` is the name
        of the worker's GPUs, and `hosts` how many hosts the run has, 0 for as many as the job asks for.
        """
        number = self.latest_epoch(job_id) + 1
        ticket: dict[str, Any] = {"v": WRITE_ONCE_VERSION, "job": job_id, "epoch": number, "worker": worker}
        ticket |= {"time": time, "attempts": attempts, "run_ms": run_ms, "orders": orders}
        ticket |= {name: value for name, value in (("gpu", gpu), ("hosts", hosts), ("gpu_ms", gpu_ms)) if value}
        return number if self.store.put_json_once(object_keys.epoch(job_id, number), ticket) else None

    def latest_epoch(self, job_id: str) -> int:
        """Return the highest epoch number that was taken; 0 before the first."""
        prefix = object_keys.epochs(job_id)
        numbers = [item.key.removeprefix(prefix).removesuffix(".json") for item in self.store.list(prefix)]
        return max((int(number) for number in numbers if number.isdecimal()), default=0)

    def put_command(self, job_id: str, command: Command, by: str, time: str, *, after: int = 0) -> int:
        """Append a command after the `after` known ones. Returns its number."""
        number = after + 1 + sum(1 for _ in self._order_numbers(job_id, after))
        body = {"v": WRITE_ONCE_VERSION, "job": job_id, "order": command, "by": by, "time": time}
        while not self.store.put_json_once(object_keys.control(job_id, number), {**body, "seq": number}):
            number += 1
        return number

    def commands(self, job_id: str, *, after: int = 0) -> list[tuple[int, Command]]:
        """Return the commands numbered above `after`, in order."""
        numbers = self._order_numbers(job_id, after)
        bodies = ((number, self.store.get_json(object_keys.control(job_id, number))) for number in numbers)
        return [(number, body["order"]) for number, body in bodies if body]

    def _order_numbers(self, job_id: str, after: int) -> list[int]:
        prefix = object_keys.controls(job_id)
        # Only new ones are listed, because a job may have been paused and resumed a thousand times.
        start = object_keys.control(job_id, after) if after else ""
        names = [item.key.removeprefix(prefix).removesuffix(".json") for item in self.store.list(prefix, after=start)]
        return sorted(int(name) for name in names if name.isdecimal() and int(name) > after)

    def put_outcome(self, outcome: Outcome) -> Outcome:
        """Write how the job ended, unless an outcome exists. Returns the outcome in the bucket."""
        if self.store.put_json_once(object_keys.outcome(outcome.job), outcome.as_dict()):
            return outcome
        standing = self.outcome(outcome.job)
        assert standing is not None, "a write-once object that exists can be read"
        return standing

    def outcome(self, job_id: str) -> Outcome | None:
        """Return how the job ended; None if it has not ended."""
        body = self.store.get_json(object_keys.outcome(job_id))
        return Outcome(**{key: value for key, value in body.items() if key != "v"}) if body else None

    def put_manifest(self, manifest: Manifest) -> str:
        """Write a manifest and return its key."""
        key = object_keys.manifest(manifest.job, manifest.epoch)
        objects = [entry.__dict__ for entry in manifest.objects]
        best = {} if manifest.best_step is None else {"best_step": manifest.best_step}
        body = {"v": WRITE_ONCE_VERSION, "job": manifest.job, "epoch": manifest.epoch, **best, "objects": objects}
        self.store.put_json(key, body)
        return key

    def manifest(self, key: str) -> Manifest | None:
        """Return a manifest by its key."""
        body = self.store.get_json(key)
        if body is None:
            return None
        objects = [ManifestEntry(**entry) for entry in body["objects"]]
        return Manifest(job=body["job"], epoch=body["epoch"], objects=objects, best_step=body.get("best_step"))
