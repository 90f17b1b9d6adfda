"""Uploaded data sets in the bucket, the rows and a description of them written last; and fetching what a job names.

Owns their names and who may use them; what a row may hold is `grpo_core.datasets`'s to say. Invariant: a data
set that can be found is whole and never changes.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ulid import ULID

from grpo_core.datasets import DatasetSummary
from grpo_core.spec import DataSection
from jobs import layout
from jobs.errors import NotFound
from jobs.settings import StorageSettings
from jobs.sources import Sources
from jobs.storage import ObjectStore

_READ_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class DatasetRecord:
    """One uploaded data set."""

    id: str
    owner: str
    name: str | None
    rows: int
    bytes: int
    sha256: str
    columns: list[str]
    created_at: datetime


def _record_of(body: dict[str, Any]) -> DatasetRecord:
    fields: dict[str, Any] = {name: value for name, value in body.items() if name != "v"}
    fields["created_at"] = datetime.fromisoformat(body["created_at"])
    return DatasetRecord(**fields)


def new_dataset_id() -> str:
    """A data set's id: random, and later ones sort after earlier ones."""
    return f"ds-{ULID()}"


class DatasetStore:
    """All uploads of one service."""

    def __init__(self, store: ObjectStore, sources: Sources | None = None) -> None:
        """Without `sources` those that the environment allows."""
        self._store = store
        self.sources = sources or Sources(StorageSettings())

    def put(
        self, path: Path, summary: DatasetSummary, owner: str, name: str | None, dataset_id: str | None = None
    ) -> DatasetRecord:
        """Store a checked file; returns its record. An id that is given may hold the same file already."""
        record = DatasetRecord(
            id=dataset_id or new_dataset_id(),
            owner=owner,
            name=name,
            rows=summary.rows,
            bytes=summary.bytes,
            sha256=summary.sha256,
            columns=list(summary.columns),
            created_at=datetime.now(UTC),
        )
        self._store.upload(path, layout.dataset_rows(record.id))
        self._store.put(layout.dataset_of(owner, record.id), b"")
        body: dict[str, Any] = {**record.__dict__, "created_at": record.created_at.isoformat()}
        if not self._store.put_json_once(layout.dataset(record.id), {"v": 1, **body}):
            return self.get(record.id, owner)
        return record

    def get(self, dataset_id: str, owner: str) -> DatasetRecord:
        """An owner's data set; raises `NotFound`."""
        body = self._store.get_json(layout.dataset(dataset_id))
        if body is None or body["owner"] != owner:
            raise NotFound("data set", dataset_id)
        return _record_of(body)

    def list_of(self, owner: str, *, limit: int, before: str | None = None) -> list[DatasetRecord]:
        """An owner's data sets, newest first, of ids below `before`."""
        prefix = layout.datasets_of(owner)
        names = (item.key.removeprefix(prefix) for item in self._store.list(prefix))
        ids = sorted((name for name in names if not before or name < before), reverse=True)
        found: list[DatasetRecord] = []
        with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
            for start in range(0, len(ids), _READ_AT_ONCE):
                bodies = pool.map(self._store.get_json, map(layout.dataset, ids[start : start + _READ_AT_ONCE]))
                found += [_record_of(body) for body in bodies if body is not None and body["owner"] == owner]
                if len(found) >= limit:
                    break
        return found[:limit]

    def fetch(self, data: DataSection, owner: str, path: Path) -> None:
        """Copy the rows a job names to a file; raises `NotFound`, `DatasetError`, `Unavailable`."""
        if data.source == "s3":
            self.sources.fetch(data.dataset, path)
        else:
            self.download(self.get(data.dataset, owner), path)

    def download(self, record: DatasetRecord, path: Path) -> None:
        """Copy the rows to a file, checked against the recorded hash."""
        self._store.download(layout.dataset_rows(record.id), path, record.sha256)
