"""Data sets that lie in object storage as they are: `s3://bucket/key`.

Owns which objects a job may name. They are read with this process's own credentials, so what is allowed is what every
owner may see: the buckets the operator listed, and in the service's own bucket nothing but what is below `data/`.
Invariant: no name leads to an object that this service wrote, whoever's it is.
"""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from grpo_core.datasets import MAX_BYTES, DatasetError, DatasetTooLargeError, JsonlChecker
from grpo_core.spec import S3_URL, Problem
from jobs.errors import Denied
from jobs.settings import CommaSeparated, StorageSettings
from jobs.storage import ObjectStore

OWN_PREFIX = "data/"
"""Where an operator puts data sets in the service's own bucket; the service writes nothing there."""


class SourceSettings(BaseSettings):
    """Which buckets jobs may read data sets from; the same for the API and the workers."""

    model_config = SettingsConfigDict(frozen=True, populate_by_name=True, extra="ignore")

    buckets: CommaSeparated[frozenset[str]] = Field(default=frozenset(), validation_alias="GRPO_S3_DATASET_BUCKETS")
    """Every owner of a key may train on every object in them."""


class Sources:
    """The objects that jobs may name."""

    def __init__(self, storage: StorageSettings, settings: SourceSettings | None = None) -> None:
        self._storage = storage
        self._allowed = (settings or SourceSettings()).buckets
        self._buckets: dict[str, ObjectStore] = {}

    def check(self, url: str) -> list[Problem]:
        """What is wrong with a data set before its job is accepted, as far as this process may look."""
        bucket, key = _parts(url)
        if not self._may_read(bucket, key):
            return [self._refusal(url)]
        try:
            head = self._bucket(bucket).head(key)
        except Denied:
            return []  # the workers' credentials may open what ours do not
        if head is None:
            return [_problem("no_such_dataset", f"{url} does not exist", "Check the bucket and the key.")]
        if head.size > MAX_BYTES:
            return [_too_large(url, head.size)]
        return []

    def fetch(self, url: str, path: Path) -> None:
        """Copy a data set to a file; raises `DatasetError` for one that cannot be used, and `Unavailable`."""
        bucket, key = _parts(url)
        if not self._may_read(bucket, key):  # again: this worker may be set otherwise than the API was
            raise DatasetError([self._refusal(url)])
        try:
            head = self._bucket(bucket).head(key)
            if head is None:
                raise DatasetError([_problem("no_such_dataset", f"{url} does not exist", "Was it deleted?")])
            if head.size > MAX_BYTES:
                raise DatasetTooLargeError([_too_large(url, head.size)])
            checker = JsonlChecker()
            self._bucket(bucket).stream(key, path, checker.feed)
            checker.finish()
        except Denied as error:
            remedy = "Give the worker's credentials s3:GetObject on it."
            raise DatasetError([_problem("access_denied", f"{url} cannot be read ({error})", remedy)]) from error

    def _may_read(self, bucket: str, key: str) -> bool:
        if bucket == self._storage.bucket:  # also where it is listed
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


def _parts(url: str) -> tuple[str, str]:
    """Bucket and key. Checked here too: a key with `..` in it could lead anywhere, whoever made the spec."""
    match = re.fullmatch(S3_URL, url)
    if match is None:
        raise DatasetError([_problem("bad_name", "is not the address of an object", "Use s3://bucket/key.jsonl.")])
    return match["bucket"], match["key"]


def _too_large(url: str, size: int) -> Problem:
    return _problem("too_many_bytes", f"{url} has {size} bytes; at most {MAX_BYTES} are accepted", "Split the file.")


def _problem(code: str, detail: str, remedy: str) -> Problem:
    return Problem(pointer="/data/dataset", code=code, detail=detail, remedy=remedy)
