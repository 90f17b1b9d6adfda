"""How a job or a data set is deleted: everything about it, from the bucket and from the ledger, for good.

Owns the order of those steps. Invariant: a deletion is written down (`erased/{id}.json`, which stays and holds no
data) before anything goes, and the ledger forgets last; so one that is cut off is finished by asking again, by the
sweeper (`unfinished`) or by `admin rebuild`, and no rebuild brings back what was deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from jobs import layout
from jobs.datasets import DatasetRecord
from jobs.errors import Conflict, InUse
from jobs.ledger import Ledger
from jobs.record import TERMINAL, JobRecord, JobStatus
from jobs.storage import ObjectStore

THREADS = 8
"""Objects deleted at once: a job of many steps has hundreds."""
SCAN = 200


class Erasure:
    """Deletes what owners ask to be deleted."""

    def __init__(self, ledger: Ledger, store: ObjectStore) -> None:
        self._ledger = ledger
        self._store = store

    def erase_job(self, record: JobRecord) -> None:
        """Delete a job that has ended, with all it left. Raises `Conflict` where it has not, and `InUse`."""
        if record.status not in TERMINAL:
            raise Conflict(record.id, record.status.value, "deleted", "Cancel it, wait until it has ended, and repeat.")
        self._require_unused(f"Job {record.id}", record.owner, lambda spec: _start_of(spec) == record.id)
        self._erase(record.id, record.owner)

    def erase_dataset(self, record: DatasetRecord) -> None:
        """Delete an upload. Raises `InUse` where a job that has not ended names it."""
        self._require_unused(f"Data set {record.id}", record.owner, lambda spec: spec["data"]["dataset"] == record.id)
        self._erase(record.id, record.owner)

    def is_erased(self, name: str) -> bool:
        """Whether a deletion was written down."""
        return self._store.get(layout.erased(name)) is not None

    def finish(self, name: str) -> None:
        """Delete what is still there of a job or a data set whose deletion was written down."""
        if name.startswith("job-"):
            self._empty(layout.folder(name))
            self._ledger.forget(name)
        else:
            # The description first: without it nobody finds the rows.
            self._store.delete(layout.dataset(name))
            self._store.delete(layout.dataset_rows(name))
            mark = self._store.get_json(layout.erased(name))
            if mark is not None:
                self._store.delete(layout.dataset_of(mark["owner"], name))

    def erased(self) -> set[str]:
        """Ids of all jobs and data sets whose deletion was written down."""
        return {item.key.removeprefix(layout.ERASED).removesuffix(".json") for item in self._store.list(layout.ERASED)}

    def _erase(self, name: str, owner: str) -> None:
        # Stays noted: a worker that was cut off, or ships what a cancel did not wait for, may yet put something there.
        self._ledger.begin("erasing", name)
        self._write_down(name, owner)
        self.finish(name)

    def _require_unused(self, what: str, owner: str, uses: Callable[[dict[str, Any]], bool]) -> None:
        """Raise `InUse` where a job of the owner that has not ended needs it; only they may name it."""
        # Queued ones last once more: a job that is handed back or resumed meanwhile is among them then.
        for status in (*(status for status in JobStatus if status not in TERMINAL), JobStatus.QUEUED):
            for record in self._jobs(owner, status):
                if uses(record.spec):
                    raise InUse(what, record.id, record.status.value)

    def _jobs(self, owner: str, status: JobStatus) -> Iterator[JobRecord]:
        before = None
        while ids := self._ledger.list_ids(owner, limit=SCAN, before=before, status=status):
            yield from self._ledger.get_many(ids)
            before = ids[-1]

    def _write_down(self, name: str, owner: str) -> None:
        self._store.put_json_once(
            layout.erased(name), {"v": 1, "id": name, "owner": owner, "time": datetime.now(UTC).isoformat()}
        )

    def _empty(self, prefix: str) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(self._store.delete, [item.key for item in self._store.list(prefix)]):
                pass


def _start_of(spec: dict[str, Any]) -> str | None:
    """The job whose checkpoint a job starts from."""
    start = spec.get("from_checkpoint")
    return start["job"] if start else None
