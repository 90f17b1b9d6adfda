"""Uploaded data sets in the bucket: the rows, and a description that is written last. Also fetches a job's data set.

Owns who may use them; `grpo_core.datasets` defines valid rows. Invariant: a data set that can be found is complete and
never changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Final

from ulid import ULID

from grpo_core.datasets import DatasetSummary
from grpo_core.spec import DataSection
from jobs.errors import NotFound
from jobs.settings import StorageSettings
from jobs.store import object_keys
from jobs.store.bucket import ObjectStore
from jobs.store.row_files import Place, RowFile, RowPage, read_page
from jobs.store.s3_datasets import S3Datasets, first_lines

LOOKED_AT_BYTES: Final = 512 * 1024
"""Number of bytes of the rows that a dry run reads."""
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


@dataclass(frozen=True, kw_only=True)
class DatasetShape:
    """The types of a data set's columns.

    Stored in a separate object, because earlier releases refuse a description with unknown fields.
    """

    fields: list[str]
    """Columns of any type that every row has."""
    chats: list[str]
    """Columns with a chat that ends with the user's turn in every row."""


def _record_of(body: dict[str, Any]) -> DatasetRecord:
    fields: dict[str, Any] = {name: value for name, value in body.items() if name != "v"}
    fields["created_at"] = datetime.fromisoformat(body["created_at"])
    return DatasetRecord(**fields)


def new_dataset_id() -> str:
    """Return a new id: random, and later ids sort after earlier ones."""
    return f"ds-{ULID()}"


class DatasetStore:
    """All uploads of one service."""

    def __init__(self, store: ObjectStore, sources: S3Datasets | None = None) -> None:
        """The default of `sources` is what the environment allows."""
        self._store = store
        self.sources = sources or S3Datasets(StorageSettings())

    def put(
        self,
        path: Path,
        summary: DatasetSummary,
        owner: str,
        name: str | None,
        dataset_id: str | None = None,
        *,
        purpose: str | None = None,
    ) -> DatasetRecord:
        """Store a checked file and return its record. Under a given id, the same file may already be stored."""
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
        self._store.upload(path, object_keys.dataset_rows(record.id))
        shape: dict[str, Any] = {"v": 1, "fields": summary.fields, "chats": summary.chats}
        if purpose is not None:
            shape["purpose"] = purpose
        self._store.put_json(object_keys.dataset_shape(record.id), shape)
        self._store.put(object_keys.dataset_of(owner, record.id), b"")
        body: dict[str, Any] = {**record.__dict__, "created_at": record.created_at.isoformat()}
        if not self._store.put_json_once(object_keys.dataset(record.id), {"v": 1, **body}):
            return self.get(record.id, owner)
        return record

    def get(self, dataset_id: str, owner: str) -> DatasetRecord:
        """Return an owner's data set. Raises `NotFound`."""
        body = self._store.get_json(object_keys.dataset(dataset_id))
        if body is None or body["owner"] != owner:
            raise NotFound("data set", dataset_id)
        return _record_of(body)

    def shape(self, record: DatasetRecord) -> DatasetShape:
        """Return the types of its columns; for an upload of an older release, from its description."""
        body = self._store.get_json(object_keys.dataset_shape(record.id)) or {}
        return DatasetShape(fields=body.get("fields", record.columns), chats=body.get("chats", []))

    def purposes(self, records: Sequence[DatasetRecord]) -> list[str]:
        """Return what each upload is for, in OpenAI's words; `fine-tune` unless its sender said otherwise."""
        keys = [object_keys.dataset_shape(record.id) for record in records]
        with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
            return [(body or {}).get("purpose", "fine-tune") for body in pool.map(self._store.get_json, keys)]

    def open(self, record: DatasetRecord) -> BinaryIO:
        """Open the rows for reading. Raises `NotFound`."""
        try:
            return self._store.open(object_keys.dataset_rows(record.id))
        except FileNotFoundError as error:
            raise NotFound("data set", record.id) from error

    def first_lines(self, data: DataSection, record: DatasetRecord | None) -> bytes:
        """Return the first whole lines of an upload (`record`) or of an S3 object. Raises `Unavailable`."""
        if record is None:
            return self.sources.first_lines(data.dataset, LOOKED_AT_BYTES) if data.source == "s3" else b""
        return first_lines(self._store, object_keys.dataset_rows(record.id), LOOKED_AT_BYTES)

    def owner_of(self, dataset_id: str) -> str | None:
        """Return whose data set it is; None if there is none."""
        body = self._store.get_json(object_keys.dataset(dataset_id))
        return body["owner"] if body else None

    def owners(self) -> list[str]:
        """Return every owner who has uploads."""
        return [object_keys.unquoted(name) for name in self._store.folders(object_keys.DATASETS_OF)]

    def rows(self, record: DatasetRecord, limit: int, place: Place | None = None) -> RowPage:
        """Return the next rows of an upload from a place on, as far as a page reaches. Raises `NotFound`."""
        with self.open(record) as file:
            return read_page(file, limit, place)

    def row_file(self, data: DataSection, owner: str) -> RowFile:
        """Return the rows of a job's data set, to be read from any row on. Raises `NotFound` and `DatasetError`."""
        if data.source == "s3":
            return self.sources.row_file(data.dataset)
        record = self.get(data.dataset, owner)
        return RowFile(name=record.id, open=lambda: self.open(record), rows=record.rows)

    def list_of(
        self, owner: str, *, limit: int, before: str | None = None, oldest_first: bool = False
    ) -> list[DatasetRecord]:
        """Return an owner's data sets with ids below `before`, newest first; or those above it, oldest first."""
        prefix = object_keys.datasets_of(owner)
        names = (item.key.removeprefix(prefix) for item in self._store.list(prefix))
        left = (name for name in names if not before or (name > before if oldest_first else name < before))
        ids = sorted(left, reverse=not oldest_first)
        found: list[DatasetRecord] = []
        with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
            for start in range(0, len(ids), _READ_AT_ONCE):
                bodies = pool.map(self._store.get_json, map(object_keys.dataset, ids[start : start + _READ_AT_ONCE]))
                found += [_record_of(body) for body in bodies if body is not None and body["owner"] == owner]
                if len(found) >= limit:
                    break
        return found[:limit]

    def fetch(self, data: DataSection, owner: str, path: Path) -> None:
        """Download a job's rows to a file. Raises `NotFound`, `DatasetError` and `Unavailable`."""
        if data.source == "s3":
            self.sources.fetch(data.dataset, path)
        else:
            self.download(self.get(data.dataset, owner), path)

    def download(self, record: DatasetRecord, path: Path) -> None:
        """Download the rows to a file, and check them against the recorded SHA-256."""
        self._store.download(object_keys.dataset_rows(record.id), path, record.sha256)
