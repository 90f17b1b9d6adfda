"""Data sets in object storage that are not uploads: `s3://bucket/key`.

Owns which objects a job may name. They are read with this process's credentials, so every owner may read them: objects
in the buckets that the operator lists, and those below `data/` in the service's bucket. Invariant: no name leads to an
object that this service wrote, for any owner.
"""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from grpo_core.datasets import MAX_BYTES, MAX_ROWS, DatasetError, DatasetTooLargeError, JsonlChecker
from grpo_core.datasets.convert import convert_apart, kind_of
from grpo_core.spec import S3_URL, Problem
from jobs.errors import Denied
from jobs.settings import CommaSeparated, StorageSettings
from jobs.store.bucket import ObjectStore
from jobs.store.row_files import RowFile

OWN_PREFIX = "data/"
"""Prefix of the operator's data sets in the service's bucket; the service writes nothing there."""


class SourceSettings(BaseSettings):
    """Buckets from which jobs may read data sets; equal for the API and the workers."""

    model_config = SettingsConfigDict(frozen=True, populate_by_name=True, extra="ignore")

    buckets: CommaSeparated[frozenset[str]] = Field(default=frozenset(), validation_alias="GRPO_S3_DATASET_BUCKETS")
    """Names of buckets. Every owner may train on every object in them."""


class S3Datasets:
    """The objects that jobs may name."""

    def __init__(self, storage: StorageSettings, settings: SourceSettings | None = None) -> None:
        self._storage = storage
        self._allowed = (settings or SourceSettings()).buckets
        self._buckets: dict[str, ObjectStore] = {}

    def check(self, url: str) -> list[Problem]:
        """Return the problems of a data set, as far as this process can read it."""
        bucket, key = _parts(url)
        if not self._may_read(bucket, key):
            return [self._refusal(url)]
        try:
            head = self._bucket(bucket).head(key)
        except Denied:
            return []  # the workers' credentials may allow more than this process's
        if head is None:
            return [_problem("no_such_dataset", f"{url} does not exist", "Check the bucket and the key.")]
        if head.size > MAX_BYTES:
            return [_too_large(url, head.size)]
        return []

    def fetch(self, url: str, path: Path) -> None:
        """Download a data set to a file. Raises `DatasetError` if it cannot be used, and `Unavailable`."""
        bucket, key = _parts(url)
        if not self._may_read(bucket, key):  # checked again, because this worker's settings may differ from the API's
            raise DatasetError([self._refusal(url)])
        try:
            head = self._bucket(bucket).head(key)
            if head is None:
                raise DatasetError([_problem("no_such_dataset", f"{url} does not exist", "Was it deleted?")])
            if head.size > MAX_BYTES:
                raise DatasetTooLargeError([_too_large(url, head.size)])
            self._fetch(bucket, key, path)
        except Denied as error:
            remedy = "Give the worker's credentials s3:GetObject on it."
            raise DatasetError([_problem("access_denied", f"{url} cannot be read ({error})", remedy)]) from error

    def _fetch(self, bucket: str, key: str, path: Path) -> None:
        kind = kind_of(key)
        if kind is None:
            checker = JsonlChecker()
            self._bucket(bucket).stream(key, path, checker.feed)
            checker.finish()
            return
        raw = path.with_name(f".{path.name}.raw")
        try:
            self._bucket(bucket).download(key, raw)
            convert_apart(raw, kind, path, max_rows=MAX_ROWS, max_bytes=MAX_BYTES)
        finally:
            raw.unlink(missing_ok=True)

    def first_lines(self, url: str, most: int) -> bytes:
        """Return the first whole lines of an allowed object with JSON lines; empty for any other object."""
        bucket, key = _parts(url)
        if not self._may_read(bucket, key) or kind_of(key) is not None:
            return b""
        try:
            return first_lines(self._bucket(bucket), key, most)
        except Denied:
            return b""

    def row_file(self, url: str) -> RowFile:
        """Return the rows of an object with JSON lines. Raises `DatasetError` if they cannot be read here."""
        bucket, key = _parts(url)
        if not self._may_read(bucket, key):
            raise DatasetError([self._refusal(url)])
        if kind_of(key) is not None:
            detail = f"{url} is no file of JSON lines, and only workers read others"
            raise DatasetError([_problem("not_readable_here", detail, "Upload the file to see its rows.")])
        store = self._bucket(bucket)
        try:
            head = store.head(key)
            if head is None:
                raise DatasetError([_problem("no_such_dataset", f"{url} does not exist any more", "Was it deleted?")])
        except Denied as error:
            remedy = "Give this service's credentials s3:GetObject on it."
            raise DatasetError([_problem("access_denied", f"{url} cannot be read here ({error})", remedy)]) from error
        if head.size > MAX_BYTES:
            raise DatasetTooLargeError([_too_large(url, head.size)])
        version = f"{url} {head.size} {head.modified.isoformat()}"
        return RowFile(name=version, open=lambda: store.open(key), rows=None)

    def _may_read(self, bucket: str, key: str) -> bool:
        if bucket == self._storage.bucket:  # also if the operator lists it
            return key.startswith(OWN_PREFIX)
        return bucket in self._allowed

    def _refusal(self, url: str) -> Problem:
        buckets = sorted(self._allowed - {self._storage.bucket})
        places = [f"s3://{self._storage.bucket}/{OWN_PREFIX}", *(f"s3://{name}/" for name in buckets)]
        return _problem("not_allowed", f"{url} is not below {' or '.join(places)}", "Use another place, or upload it.")

    def _bucket(self, name: str) -> ObjectStore:
        if name not in self._buckets:
            self._buckets[name] = ObjectStore(self._storage.model_copy(update={"bucket": name}))
        return self._buckets[name]


def first_lines(store: ObjectStore, key: str, most: int) -> bytes:
    """Return the whole lines among the first bytes of an object; empty if it does not exist."""
    try:
        with store.open(key) as file:
            start = file.read(most)
    except FileNotFoundError:
        return b""
    return start if len(start) < most else start[: start.rfind(b"\n") + 1]


def _parts(url: str) -> tuple[str, str]:
    """Return bucket and key. Checked here too, because a key with `..` could lead elsewhere in an unparsed spec."""
    match = re.fullmatch(S3_URL, url)
    if match is None:
        raise DatasetError([_problem("bad_name", "is not the address of an object", "Use s3://bucket/key.jsonl.")])
    return match["bucket"], match["key"]


def _too_large(url: str, size: int) -> Problem:
    return _problem("too_many_bytes", f"{url} has {size} bytes; at most {MAX_BYTES} are accepted", "Split the file.")


def _problem(code: str, detail: str, remedy: str) -> Problem:
    return Problem(pointer="/data/dataset", code=code, detail=detail, remedy=remedy)
