"""The bucket: reading and writing whole objects, write-once, listing, presigned links.

Owns the S3 client and its retries; `object_keys` has the names of a job's objects. Invariants: exactly one caller of
`put_once` succeeds, and the store checks the SHA-256 of every written object.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from grpo_core import strict_json
from grpo_core.retry import AT_ONCE, retry
from grpo_core.run_dir.layout import new_file, sha256_of
from jobs.errors import Damaged, Denied, Unavailable, Unreadable, UnsafeStorage
from jobs.settings import StorageSettings
from jobs.store import object_keys
from jobs.store.sentinel import Sentinel

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

SINGLE_PUT_BYTES = 64 * 1024 * 1024
"""Larger files are uploaded in parts."""
CHUNK_BYTES = 1024 * 1024
SERVER = "Object storage"
"""Its name in `Unavailable`."""
MAX_HELD_BYTES = 64 * 1024 * 1024
"""Largest object that is read whole, because training can write objects of any size."""
PING_SECONDS = 3.0
_CONNECTING = threading.Lock()
"""A session makes one client at a time."""


@cache
def _session() -> boto3.session.Session:
    """One for all clients of a process: each session reads the description of S3, for a third of a second."""
    return boto3.session.Session()


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object in a listing."""

    key: str
    size: int
    modified: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class ObjectHead:
    """Size and time of an object."""

    size: int
    modified: datetime


class _Collided(Unavailable):
    """AWS: two conditional writes met, and the loser must ask again."""


class ObjectStore:
    """One S3 bucket. Thread-safe. Every method raises `Unavailable` if the store does not answer."""

    def __init__(self, settings: StorageSettings, *, answer_seconds: float = 20, attempts: int = 3) -> None:
        """A request fails after `attempts` attempts without an answer for `answer_seconds` each."""
        self.bucket = settings.bucket
        self._settings = settings
        self._answer_seconds = answer_seconds
        self._attempts = attempts

    @cached_property
    def _client(self) -> S3Client:
        return self._connect(self._settings.endpoint)

    @cached_property
    def _sentinel(self) -> Sentinel:
        # A store that lost its volumes searches for an object for minutes.
        return Sentinel(ObjectStore(self._settings, answer_seconds=PING_SECONDS, attempts=1))

    @cached_property
    def _signer(self) -> S3Client:
        """A client that only signs links, which must have the store's public address."""
        return self._connect(self._settings.public_endpoint or self._settings.endpoint)

    def _connect(self, endpoint: str) -> S3Client:
        settings = self._settings
        with _CONNECTING:
            return _session().client(
                "s3",
                endpoint_url=endpoint or None,
                region_name=settings.region,
                aws_access_key_id=settings.access_key.get_secret_value() or None,
                aws_secret_access_key=settings.secret_key.get_secret_value() or None,
                config=Config(
                    signature_version="s3v4",
                    s3={"addressing_style": "path" if endpoint else "auto"},
                    retries={"mode": "standard", "max_attempts": self._attempts},
                    connect_timeout=3,
                    read_timeout=self._answer_seconds,
                    max_pool_connections=50,
                    # Some compatible stores refuse the trailers that newer SDKs add; we send a SHA-256 instead.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
            )

    def ensure_ready(self) -> None:
        """Create the bucket if it is missing. Raises if the store has no conditional writes."""
        try:
            self._client.head_bucket(Bucket=self.bucket)
        except ClientError as error:
            if _status(error) != 404:
                raise _unavailable(error) from error
            self._create_bucket()
        except BotoCoreError as error:
            raise _unavailable(error) from error
        probe = f"{object_keys.PROBE}{secrets.token_hex(8)}"
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
        """Read an object back. Also raises if the bucket has lost its objects."""
        self._sentinel.check()

    def is_at_fault(self, error: Unavailable) -> bool:
        """Whether storage or Valkey is unavailable; if not, `error` concerns one object alone."""
        if error.server != SERVER:
            return True
        try:
            self.ping()
        except (Unavailable, Damaged):
            return True
        return False

    def put(self, key: str, body: bytes, *, content_type: str = "application/json") -> None:
        """Write an object, and replace an existing one."""
        try:
            self._client.put_object(
                Bucket=self.bucket, Key=key, Body=body, ContentType=content_type, ChecksumSHA256=_checksum(body)
            )
        except (ClientError, BotoCoreError) as error:
            raise _unavailable(error) from error

    def put_once(self, key: str, body: bytes) -> bool:
        """Write an object unless it exists. Returns True for the one caller whose bytes it now holds.

        A retry may find the object that its first attempt wrote, so the stored bytes decide. Callers that may write the
        same bytes must add something unique, such as a worker's name or a time.
        """
        return retry(lambda: self._put_new(key, body), _Collided, [AT_ONCE] * 3)

    def _put_new(self, key: str, body: bytes) -> bool:
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
            if status == 409:
                raise _Collided(SERVER, f"conditional writes of {key} keep colliding") from error
            raise _unavailable(error) from error
        except BotoCoreError as error:
            raise _unavailable(error) from error
        return True

    def get(self, key: str, *, most: int = MAX_HELD_BYTES) -> bytes | None:
        """Return the bytes of an object; None if it does not exist. Raises `Unreadable` for more than `most` bytes."""

        def take(body: StreamingBody) -> bytes:
            held = body.read(most + 1)
            if len(held) > most:
                body.close()
                raise Unreadable(key, f"it has more than {most} bytes")
            return held

        return self._read(key, take)

    def open(self, key: str) -> BinaryIO:
        """Open an object for reading and seeking; one chunk is in memory at a time. Raises `Denied` if it is
        missing."""
        end, size = self._range(key, f"-{CHUNK_BYTES}")
        if len(end) == size:
            return io.BytesIO(end)
        return io.BufferedReader(
            _Places(lambda at, most: self._range(key, f"{at}-{at + most - 1}")[0], size), CHUNK_BYTES
        )

    def _range(self, key: str, places: str) -> tuple[bytes, int]:
        """Return a range of an object's bytes, and its size."""
        try:
            answer = self._client.get_object(Bucket=self.bucket, Key=key, Range=f"bytes={places}")
            return answer["Body"].read(), int(answer["ContentRange"].rpartition("/")[2])
        except ClientError as error:
            raise _meaning(error) from error
        except BotoCoreError as error:
            raise _unavailable(error) from error

    def digest(self, key: str) -> tuple[str, int] | None:
        """Read an object in chunks and return its SHA-256 (hex) and size; None if it does not exist."""
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
        """Return a JSON object that this service wrote; None if it does not exist."""
        body = self.get(key)
        return None if body is None else json.loads(body)

    def put_json(self, key: str, value: object) -> None:
        """Write a JSON object, and replace an existing one."""
        self.put(key, strict_json.dumps(value).encode())

    def put_json_once(self, key: str, value: object) -> bool:
        """Write a JSON object unless it exists; see `put_once`."""
        return self.put_once(key, strict_json.dumps(value).encode())

    def upload(self, path: Path, key: str) -> tuple[str, int]:
        """Upload a file. Returns its SHA-256 (hex) and size."""
        digest, size = sha256_of(path), path.stat().st_size
        try:
            if size <= SINGLE_PUT_BYTES:
                with path.open("rb") as body:
                    self._client.put_object(
                        Bucket=self.bucket,
                        Key=key,
                        Body=body,
                        ContentType=content_type(key),
                        ChecksumSHA256=base64.b64encode(bytes.fromhex(digest)).decode(),
                    )
            else:
                self._client.upload_file(
                    str(path),
                    self.bucket,
                    key,
                    ExtraArgs={"ContentType": content_type(key), "ChecksumAlgorithm": "SHA256"},
                )
                stored = self._client.head_object(Bucket=self.bucket, Key=key)["ContentLength"]
                if stored != size:
                    raise Unavailable(SERVER, f"it kept {stored} of {size} bytes of {key}")
        except (ClientError, BotoCoreError, Boto3Error) as error:
            raise _unavailable(error) from error
        return digest, size

    def head(self, key: str) -> ObjectHead | None:
        """Return size and time of an object; None if it does not exist. Also raises `Denied`."""
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
        """Download an object into an existing folder. Raises `Damaged` if it differs from the recorded SHA-256."""
        try:
            self.stream(key, path, sha256=sha256)
        except Denied as error:
            if error.status == 404:
                raise Damaged(key, "is gone") from error
            raise Unavailable(SERVER, str(error)) from error

    def stream(
        self, key: str, path: Path, feed: Callable[[bytes], object] | None = None, *, sha256: str | None = None
    ) -> None:
        """Download an object to a file, and pass each chunk to `feed`. The file is replaced only if all went well.

        Raises `Denied`, also for a missing object, and `Damaged` if its SHA-256 differs from `sha256`.
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

    def list(self, prefix: str, *, after: str = "") -> Iterator[StoredObject]:
        """Yield the objects below a prefix with keys after `after`, in the order of keys."""
        pages = self._client.get_paginator("list_objects_v2")
        try:
            for page in pages.paginate(Bucket=self.bucket, Prefix=prefix, StartAfter=after):
                for item in page.get("Contents", []):
                    yield StoredObject(item.get("Key", ""), item.get("Size", 0), item.get("LastModified"))
        except (ClientError, BotoCoreError) as error:
            raise _unavailable(error) from error

    def folders(self, prefix: str, *, after: str = "") -> Iterator[str]:
        """Yield the names of folders directly below a prefix, after `after`, in order. Their content is not listed."""
        pages = self._client.get_paginator("list_objects_v2")
        start = f"{prefix}{after}/" if after else ""
        try:
            for page in pages.paginate(Bucket=self.bucket, Prefix=prefix, Delimiter="/", StartAfter=start):
                for item in page.get("CommonPrefixes", []):
                    name = item.get("Prefix", "").removeprefix(prefix).removesuffix("/")
                    if name > after:  # the content of the folder `after` sorts after its name
                        yield name
        except (ClientError, BotoCoreError) as error:
            raise _unavailable(error) from error

    def delete(self, key: str) -> None:
        """Delete an object. A missing object is no error."""
        try:
            self._client.delete_object(Bucket=self.bucket, Key=key)
        except (ClientError, BotoCoreError) as error:
            raise _unavailable(error) from error

    def presign(self, key: str, seconds: int) -> str:
        """Return a link that reads one object for `seconds`, signed for the store's public address. Sends no
        request."""
        # With this header, browsers save the object instead of showing it, so no stored text becomes a page.
        saved = f'attachment; filename="{key.rsplit("/", 1)[-1]}"'
        wanted = {"Bucket": self.bucket, "Key": key, "ResponseContentDisposition": saved}
        return self._signer.generate_presigned_url("get_object", Params=wanted, ExpiresIn=seconds)


class _Places(io.RawIOBase):
    """An object as a file. `fetch` returns a number of bytes from an offset."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        self._fetch, self._size, self._at = fetch, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        most = min(len(buffer), self._size - self._at)
        if most <= 0:
            return 0
        found = self._fetch(self._at, most)
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


def content_type(name: str) -> str:
    """Return the media type of one of the service's files."""
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
    """5xx, 408 and 429 are temporary. Other status codes are permanent."""
    status = _status(error)
    if status >= 500 or status in (0, 408, 429):
        return _unavailable(error)
    return Denied(status)


def _unavailable(error: Exception) -> Unavailable:
    if isinstance(error, ClientError):
        code = error.response.get("Error", {}).get("Code", "")
        return Unavailable(SERVER, code or f"HTTP {_status(error)}")
    return Unavailable(SERVER, type(error).__name__)
