"""The bucket: whole-object reads and writes, put-once, listing, presigned links.

Owns the S3 client and its retries; knows nothing of jobs (names are in `layout`). Invariant: `put_once` has
exactly one winner, and every object written carries a SHA-256 that the store was asked to check.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from grpo_core import strict_json
from grpo_core.runfolder import new_file, sha256_of
from jobs import layout
from jobs.errors import Damaged, Denied, Unavailable, UnsafeStorage
from jobs.settings import StorageSettings

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

SINGLE_PUT_BYTES = 64 * 1024 * 1024
"""Larger files go up in parts."""
CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as listed."""

    key: str
    size: int


@dataclass(frozen=True, kw_only=True)
class ObjectHead:
    """What is known of an object without reading it."""

    size: int
    modified: datetime


class ObjectStore:
    """One S3 bucket. Thread-safe; every method raises `Unavailable` when the store does not answer."""

    def __init__(self, settings: StorageSettings) -> None:
        self.bucket = settings.bucket
        self._settings = settings

    @cached_property
    def _client(self) -> S3Client:
        return self._connect(self._settings.endpoint)

    @cached_property
    def _signer(self) -> S3Client:
        """A client that only signs: links must name the store as the reader reaches it."""
        return self._connect(self._settings.public_endpoint or self._settings.endpoint)

    def _connect(self, endpoint: str) -> S3Client:
        settings = self._settings
        return boto3.session.Session().client(
            "s3",
            endpoint_url=endpoint or None,
            region_name=settings.region,
            aws_access_key_id=settings.access_key.get_secret_value() or None,
            aws_secret_access_key=settings.secret_key.get_secret_value() or None,
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path" if endpoint else "auto"},
                retries={"mode": "standard", "max_attempts": 3},
                connect_timeout=3,
                read_timeout=20,
                max_pool_connections=50,
                # Some compatible stores refuse the trailers newer SDKs add; we send our own SHA-256 instead.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def ensure_ready(self) -> None:
        """Create the bucket if it is missing, and refuse a store without conditional writes."""
        try:
            self._client.head_bucket(Bucket=self.bucket)
        except ClientError as error:
            if _status(error) != 404:
                raise _unavailable(error) from error
            self._create_bucket()
        except BotoCoreError as error:
            raise _unavailable(error) from error
        probe = f"{layout.PROBE}{secrets.token_hex(8)}"
        self.put(probe, b"first")
        if self.put_once(probe, b"second"):
            raise UnsafeStorage(UnsafeStorage.__doc__)
        self.delete(probe)

    def _create_bucket(self) -> None:
        try:
            if self._settings.endpoint or self._settings.region == "us-east-1":
                self._client.create_bucket(Bucket=self.bucket)
            else:
                self._client.create_bucket(
                    Bucket=self.bucket,
                    CreateBucketConfiguration={"LocationConstraint": self._settings.region},  # pyright: ignore[reportArgumentType]
                )
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise _unavailable(error) from error
        except BotoCoreError as error:
            raise _unavailable(error) from error

    def ping(self) -> None:
        """Ask for the bucket's head, nothing more."""
        try:
            self._client.head_bucket(Bucket=self.bucket)
        except (ClientError, BotoCoreError) as error:
            raise _unavailable(error) from error

    def put(self, key: str, body: bytes, *, content_type: str = "application/json") -> None:
        """Write an object, replacing any there was."""
        try:
            self._client.put_object(
                Bucket=self.bucket, Key=key, Body=body, ContentType=content_type, ChecksumSHA256=_checksum(body)
            )
        except (ClientError, BotoCoreError) as error:
            raise _unavailable(error) from error

    def put_once(self, key: str, body: bytes) -> bool:
        """Write an object unless it exists. True for the one caller whose bytes it now holds.

        A retried request may find its own first try: the stored bytes decide, so callers put in something
        of their own (a worker's name, a time) where two may write the same thing.
        """
        for _ in range(4):
            try:
                self._client.put_object(
                    Bucket=self.bucket,
                    Key=key,
                    Body=body,
                    ContentType="application/json",
                    IfNoneMatch="*",
                    ChecksumSHA256=_checksum(body),
                )
            except ClientError as error:
                status = _status(error)
                if status == 412:
                    return self.get(key) == body
                if status == 409:  # AWS: two conditional writes met; the loser must ask again
                    continue
                raise _unavailable(error) from error
            except BotoCoreError as error:
                raise _unavailable(error) from error
            return True
        raise Unavailable("Object storage", f"conditional writes of {key} keep colliding")

    def get(self, key: str) -> bytes | None:
        """The bytes of an object, or None where there is none."""
        return self._read(key, lambda body: body.read())

    def digest(self, key: str) -> tuple[str, int] | None:
        """The SHA-256 (hex) and size of an object as it can be read now, None where there is none; never held whole."""
        return self._read(key, _digest)

    def _read(self, key: str, take: Callable[[StreamingBody], T]) -> T | None:
        try:
            return take(self._client.get_object(Bucket=self.bucket, Key=key)["Body"])
        except ClientError as error:
            if _status(error) == 404:
                return None
            raise _unavailable(error) from error
        except BotoCoreError as error:
            raise _unavailable(error) from error

    def get_json(self, key: str) -> dict[str, Any] | None:
        """A JSON object this service wrote, or None where there is none."""
        body = self.get(key)
        return None if body is None else json.loads(body)

    def put_json(self, key: str, value: object) -> None:
        """Write a JSON object, replacing any there was."""
        self.put(key, strict_json.dumps(value).encode())

    def put_json_once(self, key: str, value: object) -> bool:
        """Write a JSON object unless it exists; see `put_once`."""
        return self.put_once(key, strict_json.dumps(value).encode())

    def upload(self, path: Path, key: str) -> tuple[str, int]:
        """Copy a file into the bucket; returns its SHA-256 (hex) and size."""
        digest, size = sha256_of(path), path.stat().st_size
        try:
            if size <= SINGLE_PUT_BYTES:
                with path.open("rb") as body:
                    self._client.put_object(
                        Bucket=self.bucket,
                        Key=key,
                        Body=body,
                        ContentType=content_type(path.name),
                        ChecksumSHA256=base64.b64encode(bytes.fromhex(digest)).decode(),
                    )
            else:
                self._client.upload_file(
                    str(path),
                    self.bucket,
                    key,
                    ExtraArgs={"ContentType": content_type(path.name), "ChecksumAlgorithm": "SHA256"},
                )
                stored = self._client.head_object(Bucket=self.bucket, Key=key)["ContentLength"]
                if stored != size:
                    raise Unavailable("Object storage", f"it kept {stored} of {size} bytes of {key}")
        except (ClientError, BotoCoreError, Boto3Error) as error:
            raise _unavailable(error) from error
        return digest, size

    def head(self, key: str) -> ObjectHead | None:
        """Size and time of an object, None where there is none; raises `Denied` too."""
        try:
            answer = self._client.head_object(Bucket=self.bucket, Key=key)
        except ClientError as error:
            if _status(error) == 404:
                return None
            raise _meaning(error) from error
        except BotoCoreError as error:
            raise _unavailable(error) from error
        return ObjectHead(size=answer["ContentLength"], modified=answer["LastModified"])

    def download(self, key: str, path: Path, sha256: str | None = None) -> None:
        """Copy an object to a file in a folder that exists; raises `Damaged` where it is not what was recorded."""
        try:
            self.stream(key, path, sha256=sha256)
        except Denied as error:
            if error.status == 404:
                raise Damaged(key, "is gone") from error
            raise Unavailable("Object storage", str(error)) from error

    def stream(
        self, key: str, path: Path, feed: Callable[[bytes], object] | None = None, *, sha256: str | None = None
    ) -> None:
        """Copy an object to a file and each chunk to `feed`; a file of that name is whole, or what it was before.

        Raises `Denied`, also where there is none, and `Damaged` where it does not have the SHA-256 that is given.
        """
        hasher = hashlib.sha256()
        with new_file(path) as part:
            try:
                body = self._client.get_object(Bucket=self.bucket, Key=key)["Body"]
                with part.open("wb") as file:
                    for chunk in body.iter_chunks(CHUNK_BYTES):
                        if feed is not None:
                            feed(chunk)
                        if sha256 is not None:
                            hasher.update(chunk)
                        file.write(chunk)
            except ClientError as error:
                raise _meaning(error) from error
            except BotoCoreError as error:
                raise _unavailable(error) from error
            if sha256 is not None and hasher.hexdigest() != sha256:
                raise Damaged(key, "does not have the SHA-256 that was recorded for it")

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """Every object below a prefix, in the order of keys."""
        try:
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
                for item in page.get("Contents", []):
                    yield StoredObject(item.get("Key", ""), item.get("Size", 0))
        except (ClientError, BotoCoreError) as error:
            raise _unavailable(error) from error

    def folders(self, prefix: str) -> Iterator[str]:
        """The names of the folders right below a prefix, in order; what is in them is not listed."""
        pages = self._client.get_paginator("list_objects_v2")
        try:
            for page in pages.paginate(Bucket=self.bucket, Prefix=prefix, Delimiter="/"):
                for item in page.get("CommonPrefixes", []):
                    yield item.get("Prefix", "").removeprefix(prefix).removesuffix("/")
        except (ClientError, BotoCoreError) as error:
            raise _unavailable(error) from error

    def delete(self, key: str) -> None:
        """Remove an object; no error where there is none."""
        try:
            self._client.delete_object(Bucket=self.bucket, Key=key)
        except (ClientError, BotoCoreError) as error:
            raise _unavailable(error) from error

    def presign(self, key: str, seconds: int) -> str:
        """A link that reads one object for a while, signed for the store's public name. No network is used."""
        # A browser saves it under its name, where it would show what it can: no stored text is ever a page there.
        saved = f'attachment; filename="{key.rsplit("/", 1)[-1]}"'
        wanted = {"Bucket": self.bucket, "Key": key, "ResponseContentDisposition": saved}
        return self._signer.generate_presigned_url("get_object", Params=wanted, ExpiresIn=seconds)


def content_type(name: str) -> str:
    """The media type of one of our own files."""
    kinds = {
        "json": "application/json",
        "jsonl": "application/x-ndjson",
        "md": "text/markdown; charset=utf-8",
        "log": "text/plain; charset=utf-8",
        "parquet": "application/vnd.apache.parquet",
    }
    return kinds.get(name.rsplit(".", 1)[-1], "application/octet-stream")


def _digest(body: StreamingBody) -> tuple[str, int]:
    hasher, size = hashlib.sha256(), 0
    for chunk in body.iter_chunks(CHUNK_BYTES):
        hasher.update(chunk)
        size += len(chunk)
    return hasher.hexdigest(), size


def _checksum(body: bytes) -> str:
    return base64.b64encode(hashlib.sha256(body).digest()).decode()


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _meaning(error: ClientError) -> Denied | Unavailable:
    """A server's own fault passes; what it says about the object or about us does not."""
    status = _status(error)
    if status >= 500 or status in (0, 408, 429):
        return _unavailable(error)
    return Denied(status)


def _unavailable(error: Exception) -> Unavailable:
    if isinstance(error, ClientError):
        code = error.response.get("Error", {}).get("Code", "")
        return Unavailable("Object storage", code or f"HTTP {_status(error)}")
    return Unavailable("Object storage", type(error).__name__)
