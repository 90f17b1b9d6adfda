"""How a job or a data set is deleted: everything about it, from the bucket and from the ledger, for good.

Owns the order of those steps. Invariant: a deletion is written down (`erased/{id}.json`, which stays and holds no
data) before anything goes, and the ledger forgets last; so one that is cut off is finished by asking again, by the
sweeper (`unfinished`) or by `admin rebuild`, and no rebuild brings back what was deleted.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

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
        """Delete a job that has ended, with all it left. Raises `Conflict` where it has not."""
        if record.status not in TERMINAL:
            raise Conflict(record.id, record.status.value, "deleted", "Cancel it, wait until it has ended, and repeat.")
        # Stays noted: a worker that was cut off, or ships what a cancel did not wait for, may yet put something there.
        self._ledger.begin("erasing", record.id)
        self._write_down(record.id, record.owner)
        self.finish_job(record.id)

    def is_erased(self, job_id: str) -> bool:
        """Whether a job's deletion was written down."""
        return self._store.get(layout.erased(job_id)) is not None

    def finish_job(self, job_id: str) -> None:
        """Delete what is still there of a job whose deletion was written down."""
        self._empty(layout.folder(job_id))
        self._ledger.forget(job_id)

    def erased_jobs(self) -> set[str]:
        """Ids of all jobs whose deletion was written down."""
        names = (item.key.removeprefix(layout.ERASED).removesuffix(".json") for item in self._store.list(layout.ERASED))
        return {name for name in names if name.startswith("job-")}

    def erase_dataset(self, record: DatasetRecord) -> None:
        """Delete an upload. Raises `InUse` where a job that has not ended names it."""
        user = self._user_of(record)
        if user is not None:
            raise InUse(record.id, user.id, user.status.value)
        self._write_down(record.id, record.owner)
        # The rows first: as long as there is a row, its owner can ask again.
        self._store.delete(layout.dataset_rows(record.id))
        self._store.delete(layout.dataset(record.id))

    def _user_of(self, dataset: DatasetRecord) -> JobRecord | None:
        """An unfinished job that names the data set; only its owner's may."""
        for status in JobStatus:
            before = None
            while status not in TERMINAL:
                ids = self._ledger.list_ids(dataset.owner, limit=SCAN, before=before, status=status)
                for record in self._ledger.get_many(ids):
                    if record.spec["data"]["dataset"] == dataset.id:
                        return record
                if len(ids) < SCAN:
                    break
                before = ids[-1]
        return None

    def _write_down(self, name: str, owner: str) -> None:
        self._store.put_json_once(
            layout.erased(name), {"v": 1, "id": name, "owner": owner, "time": datetime.now(UTC).isoformat()}
        )

    def _empty(self, prefix: str) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(self._store.delete, [item.key for item in self._store.list(prefix)]):
                pass
