"""What must outlive Valkey, kept in the bucket: the job as asked, its epochs, orders, outcome and manifests.

Owns the put-once objects that decide what is true of a job. Invariant: `job.json`, each epoch ticket, each order
and `outcome.json` are written once and never changed; the first outcome wins over every record.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from jobs import layout
from jobs.storage import ObjectStore

ARCHIVE_VERSION = 1
Order = Literal["cancel", "pause", "resume"]
Ending = Literal["succeeded", "failed", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended."""

    job: str
    status: Ending
    epoch: int
    time: str
    """ISO 8601 UTC."""
    by: str
    """The worker or API process that wrote it."""
    error: dict[str, Any] | None = None
    manifest: str | None = None
    """Key of the manifest of what may be read."""

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"v": ARCHIVE_VERSION, **self.__dict__}


@dataclass(frozen=True, kw_only=True)
class ManifestEntry:
    """One object that may be read."""

    path: str
    """Its name below the job, as a reader knows it."""
    key: str
    sha256: str
    size: int

    @property
    def name(self) -> str:
        """The file's own name: the rest comes from the training process, and must not lead out of a folder."""
        return self.key.rsplit("/", 1)[-1]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Every valid object of a job."""

    job: str
    epoch: int
    objects: list[ManifestEntry] = field(default_factory=list)


class Archive:
    """The put-once objects of all jobs in one bucket."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def put_job(self, job_id: str, body: dict[str, Any]) -> bool:
        """Write down what was asked for."""
        return self.store.put_json_once(layout.job(job_id), {"v": ARCHIVE_VERSION, **body})

    def job(self, job_id: str) -> dict[str, Any] | None:
        """What was asked for, or None where nothing was written down."""
        return self.store.get_json(layout.job(job_id))

    def allocate_epoch(self, job_id: str, worker: str, time: str, *, attempts: int = 0) -> int | None:
        """The next epoch number, now owned by `worker`; None where another worker took it first.

        `attempts` is the record's, kept here for the day when Valkey is lost.
        """
        number = self.latest_epoch(job_id) + 1
        ticket: dict[str, Any] = {"v": ARCHIVE_VERSION, "job": job_id, "epoch": number, "worker": worker}
        ticket |= {"time": time, "attempts": attempts}
        return number if self.store.put_json_once(layout.epoch(job_id, number), ticket) else None

    def latest_epoch(self, job_id: str) -> int:
        """The highest epoch that was ever begun; 0 before the first."""
        prefix = layout.epochs(job_id)
        numbers = [item.key.removeprefix(prefix).removesuffix(".json") for item in self.store.list(prefix)]
        return max((int(number) for number in numbers if number.isdecimal()), default=0)

    def put_order(self, job_id: str, order: Order, by: str, time: str) -> int:
        """Append an order to the job's control log; returns its number."""
        number = sum(1 for _ in self.store.list(layout.controls(job_id))) + 1
        body = {"v": ARCHIVE_VERSION, "job": job_id, "order": order, "by": by, "time": time}
        while not self.store.put_json_once(layout.control(job_id, number), {**body, "seq": number}):
            number += 1
        return number

    def orders(self, job_id: str, *, after: int = 0) -> list[tuple[int, Order]]:
        """The orders numbered above `after`, first to last."""
        prefix = layout.controls(job_id)
        names = [item.key.removeprefix(prefix).removesuffix(".json") for item in self.store.list(prefix)]
        numbers = sorted(int(name) for name in names if name.isdecimal() and int(name) > after)
        bodies = ((number, self.store.get_json(layout.control(job_id, number))) for number in numbers)
        return [(number, body["order"]) for number, body in bodies if body]

    def put_outcome(self, outcome: Outcome) -> Outcome:
        """Try to write how the job ended; returns the outcome that stands, which may be another's."""
        if self.store.put_json_once(layout.outcome(outcome.job), outcome.as_dict()):
            return outcome
        standing = self.outcome(outcome.job)
        assert standing is not None, "a put-once object that exists can be read"
        return standing

    def outcome(self, job_id: str) -> Outcome | None:
        """How the job ended, or None while it has not."""
        body = self.store.get_json(layout.outcome(job_id))
        return Outcome(**{key: value for key, value in body.items() if key != "v"}) if body else None

    def put_manifest(self, manifest: Manifest) -> str:
        """Write a manifest; returns its key."""
        key = layout.manifest(manifest.job, manifest.epoch)
        objects = [entry.__dict__ for entry in manifest.objects]
        self.store.put_json(
            key, {"v": ARCHIVE_VERSION, "job": manifest.job, "epoch": manifest.epoch, "objects": objects}
        )
        return key

    def manifest(self, key: str) -> Manifest | None:
        """Read a manifest by its key."""
        body = self.store.get_json(key)
        if body is None:
            return None
        objects = [ManifestEntry(**entry) for entry in body["objects"]]
        return Manifest(job=body["job"], epoch=body["epoch"], objects=objects)
