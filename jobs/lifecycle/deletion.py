"""Permanent deletion of a job or a data set from the bucket and the job store.

Owns the order of its steps. Invariant: a marker (`erased/{id}.json`, which stays and holds no data) is written before
anything is deleted, and the record in the job store is deleted last. So an interrupted deletion is finished by
repeating it, by the sweeper (`recovery`) or by `admin rebuild`, and no rebuild restores what was deleted.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from jobs.errors import Conflict, InUse
from jobs.store import object_keys
from jobs.store.bucket import ObjectStore
from jobs.store.datasets import DatasetRecord
from jobs.store.job import TERMINAL, JobRecord, JobStatus
from jobs.store.job_store import JobStore

THREADS = 8
"""Number of objects deleted concurrently: a job with many steps has hundreds."""
SCAN = 200
"""Number of jobs examined in one script, which blocks Valkey."""


class Deletion:
    """Deletes jobs and data sets."""

    def __init__(self, job_store: JobStore, store: ObjectStore) -> None:
        self._job_store = job_store
        self._store = store

    def erase_job(self, record: JobRecord) -> None:
        """Delete an ended job with all its files. Raises `Conflict` if it has not ended, and `InUse`."""
        if record.status not in TERMINAL:
            raise Conflict(record.id, record.status.value, "deleted", "Cancel it, wait until it has ended, and repeat.")
        self.begin(record)
        self._erase(record.id, record.owner)

    def begin(self, record: JobRecord) -> None:
        """Mark a job for deletion. Raises `InUse` if an unfinished job reads one of its checkpoints."""
        self._begin(f"Job {record.id}", record.id, record.owner)

    def erase_dataset(self, record: DatasetRecord) -> None:
        """Delete an upload. Raises `InUse` if an unfinished job names it."""
        self._begin(f"Data set {record.id}", record.id, record.owner)
        self._erase(record.id, record.owner)

    def is_erased(self, name: str) -> bool:
        """Whether a job or data set has a marker of deletion."""
        return self._store.get(object_keys.erased(name)) is not None

    def finish(self, name: str) -> None:
        """Delete the rest of a job or a data set that has a marker of deletion."""
        if name.startswith("job-"):
            self._empty(object_keys.folder(name))
            self._job_store.forget(name)
        else:
            # The description first: without it, the rows cannot be found.
            self._store.delete(object_keys.dataset(name))
            self._store.delete(object_keys.dataset_shape(name))
            self._store.delete(object_keys.dataset_rows(name))
            mark = self._store.get_json(object_keys.erased(name))
            if mark is not None:
                self._store.delete(object_keys.dataset_of(mark["owner"], name))

    def erased(self) -> set[str]:
        """Return the ids of all jobs and data sets with a marker of deletion."""
        return {
            item.key.removeprefix(object_keys.ERASED).removesuffix(".json")
            for item in self._store.list(object_keys.ERASED)
        }

    def _begin(self, what: str, name: str, owner: str) -> None:
        # Before the check: a submission that the check misses sees this mark. It stays after the deletion, because a
        # worker that lost its connection, or still uploads after a cancel, may write more objects.
        self._job_store.begin("erasing", name)
        try:
            self._require_unused(what, name, owner)
        except InUse:
            self._job_store.end("erasing", name)
            raise

    def _erase(self, name: str, owner: str) -> None:
        self._write_down(name, owner)
        self.finish(name)

    def _require_unused(self, what: str, name: str, owner: str) -> None:
        """Raise `InUse` if an unfinished job of the owner needs it; jobs of other owners cannot name it."""
        for job_id, names in self._job_store.references(owner).items():
            if name in names:
                raise InUse(what, job_id, "being submitted")
        # Queued jobs once more at the end, because a job may have been handed back or resumed meanwhile.
        for status in (*(status for status in JobStatus if status not in TERMINAL), JobStatus.QUEUED):
            for record in self._jobs(owner, status, name):
                if name in used_by(record.spec).values():
                    raise InUse(what, record.id, record.status.value)

    def _jobs(self, owner: str, status: JobStatus, name: str) -> Iterator[JobRecord]:
        """Yield jobs whose spec contains the name. Valkey searches, because most of thousands do not."""
        before, is_first = None, True
        while is_first or before is not None:
            is_first = False
            ids, before = self._job_store.search(owner, limit=SCAN, before=before, status=status, text=name)
            yield from self._job_store.get_many(ids)

    def _write_down(self, name: str, owner: str) -> None:
        self._store.put_json_once(
            object_keys.erased(name), {"v": 1, "id": name, "owner": owner, "time": datetime.now(UTC).isoformat()}
        )

    def _empty(self, prefix: str) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(self._store.delete, [item.key for item in self._store.list(prefix)]):
                pass


def used_by(spec: dict[str, Any]) -> dict[str, str]:
    """Return the ids of uploads and jobs that a job with this spec reads, by the pointer to each."""
    start, data, apart = spec.get("from_checkpoint"), spec["data"], spec["evaluation"].get("dataset")
    used: dict[str, str] = {"/from_checkpoint/job": start["job"]} if start else {}
    for section in ("serving", "export"):
        if source := spec.get(section, {}).get("job"):
            used[f"/{section}/job"] = source
    if data["source"] == "upload":
        used |= {"/data/dataset": data["dataset"]} | ({"/evaluation/dataset": apart} if apart else {})
    return used
