"""Reads request bodies: a job spec as strict JSON, a data set as a stream of bounded memory.

Owns content types, encodings and sizes; `grpo_core` checks the content of a spec or a data set. Invariant: a refused
body is parsed no further than the rule it broke.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, TypeVar, cast

from litestar import Request
from litestar.concurrency import sync_to_thread

from api.problems import ApiError, invalid_body
from api.settings import ApiSettings
from api.uploads import Upload as Place
from api.uploads import Uploads
from grpo_core import strict_json
from grpo_core.datasets import DatasetSummary, DatasetTooLargeError, JsonlChecker
from grpo_core.datasets.convert import convert_apart
from grpo_core.datasets.files import Kind
from grpo_core.spec import JobSpec, Problem, SpecError, parse_spec
from grpo_core.spec.sweep import parse_sweep

T = TypeVar("T")

JSON = "application/json"
JSONL = ("application/x-ndjson", "application/jsonl")
CONVERTED: Mapping[str, Kind] = {
    "text/csv": "csv",
    "text/tab-separated-values": "tsv",
    "application/vnd.apache.parquet": "parquet",
    "application/x-parquet": "parquet",
    JSON: "json",
}
"""Content types of data sets that are made into JSON lines, with their forms."""

MAX_VALUES = 5000
"""Limit for a spec. One with every field set and hundreds of worked examples has fewer."""
_BATCH_BYTES = 1024**2
"""Bytes gathered before they are checked and written in a thread: one hop for many small network reads."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A received data set: a checked file that is gone when the request ends."""

    path: Path
    summary: DatasetSummary


JSON_ERRORS: Final = ("bad_request", "invalid_json", "empty_body", "body_too_large", "unsupported_media_type")
"""What a route whose body `read_json` reads can refuse it for."""


async def read_spec(request: Request[Any, Any, Any]) -> JobSpec:
    """Dependency: the body as a job spec."""
    return await read_json(
        request, parse_spec, expected="A job spec is expected in the body. Send {} for the recipe as it is."
    )


async def read_sweep(request: Request[Any, Any, Any]) -> list[JobSpec]:
    """Dependency: the body as the specs of a sweep."""
    return await read_json(
        request, parse_sweep, expected='A sweep is expected in the body: {"spec": {...}, "grid": {...}, "repeat": 3}.'
    )


async def read_fields(
    request: Request[Any, Any, Any], names: Collection[str], *, optional: bool = False
) -> dict[str, Any]:
    """The body as a JSON object with no other field than these. With `optional`, an empty body is an empty object."""
    if optional and not (await request.body()).strip():
        return {}
    example = ", ".join(f'"{name}": ...' for name in sorted(names))

    def parse(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise invalid_body("", "the body is not an object", f"Send {{{example}}}.", code="bad_type")
        found = cast("dict[str, Any]", value)
        for name in found.keys() - set(names):
            pointer = f"/{name.replace('~', '~0').replace('/', '~1')[:80]}"
            remedy = f"Remove it; the fields are {', '.join(sorted(names))}."
            raise invalid_body(pointer, "there is no such field", remedy, code="unknown_field")
        return found

    return await read_json(request, parse, expected=f"A JSON object is expected in the body: {{{example}}}.")


async def read_json(
    request: Request[Any, Any, Any], parse: Callable[[Any], T], *, expected: str, max_values: int = MAX_VALUES
) -> T:
    """What `parse` makes of the JSON in the body; `expected` tells a client whose body is empty what to send."""
    check_encoding(request)
    body = await request.body()
    if not body.strip():
        raise ApiError("empty_body", expected)
    _check_content_type(request, (JSON,))

    # In a thread, because many errors take time, and with a limited size, because the thread holds the GIL for part.
    def read() -> T:
        value = strict_json.loads(body)
        if _count(value, max_values) > max_values:
            detail = f"the body has more than {max_values} values"
            remedy = "Send large texts as one string each, and many rows as a data set."
            raise SpecError([Problem(pointer="", code="too_many_values", detail=detail, remedy=remedy)])
        return parse(value)

    return await sync_to_thread(read)


def _count(value: Any, most: int) -> int:
    """How many values a JSON document has, or that they are more than `most`."""
    count, waiting = 0, [value]
    while waiting and count <= most:
        found = waiting.pop()
        count += 1
        if isinstance(found, dict):
            waiting += cast("dict[str, Any]", found).values()
        elif isinstance(found, list):
            waiting += cast("list[Any]", found)
    return count


async def receive_dataset(request: Request[Any, Any, Any]) -> AsyncIterator[Upload]:
    """Dependency: the body as a checked JSONL file, kept for as long as the request lasts."""
    check_encoding(request)
    kind = CONVERTED.get(_check_content_type(request, (*JSONL, *CONVERTED)))
    settings: ApiSettings = request.app.state.settings
    uploads: Uploads = request.app.state.uploads
    size = request.headers.get("content-length", "")
    # A size that is too large is refused as soon as the body is asked for.
    announced = int(size) if size.isdecimal() and len(size) < 20 else None
    bounds = {"max_rows": settings.max_dataset_rows, "max_bytes": settings.max_dataset_bytes}
    made = settings.max_dataset_bytes if kind else 0
    with (
        uploads.begin(request.user.owner, announced, made=made) as place,
        TemporaryDirectory(prefix="grpo-upload-") as folder,
    ):
        path = Path(folder) / "dataset.jsonl"
        if kind is None:
            checker = JsonlChecker(**bounds)
            await _receive(request, place, path, checker.feed)
            yield Upload(path=path, summary=await sync_to_thread(checker.finish))
            return
        raw = Path(folder) / "upload"
        size = _Size(settings.max_dataset_bytes)
        await _receive(request, place, raw, size.add)
        # Of the process's own threads, so that requests that take milliseconds never wait for it.
        yield Upload(path=path, summary=await asyncio.to_thread(convert_apart, raw, kind, path, **bounds))


async def _receive(request: Request[Any, Any, Any], place: Place, path: Path, check: Callable[[bytes], None]) -> None:
    with path.open("wb") as file:

        def take(batch: bytes) -> None:
            check(batch)
            file.write(batch)

        async for batch in batches(request.stream()):
            await sync_to_thread(take, batch)
            place.take(len(batch))


class _Size:
    """How much has come; raises where that is too much."""

    def __init__(self, most: int) -> None:
        self._most, self._come = most, 0

    def add(self, batch: bytes) -> None:
        self._come += len(batch)
        if self._come > self._most:
            problem = Problem(
                pointer="",
                code="too_many_bytes",
                detail=f"the file has more than {self._most} bytes",
                remedy="Send fewer rows, or split the file.",
            )
            raise DatasetTooLargeError([problem])


async def batches(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A body in parts of a megabyte, the last one smaller."""
    held = bytearray()
    async for chunk in chunks:
        held += chunk
        if len(held) >= _BATCH_BYTES:
            yield bytes(held)
            held.clear()
    if held:
        yield bytes(held)


def check_encoding(request: Request[Any, Any, Any]) -> None:
    """Nothing is decompressed here: what a body may grow to would be its sender's choice."""
    given = request.headers.get("content-encoding", "").strip().lower()
    if given not in ("", "identity"):
        raise ApiError(
            "unsupported_media_type",
            f"The body is compressed (Content-Encoding: {given[:80]!r}). Send it as it is, without that header.",
            headers={"Accept-Encoding": "identity"},
        )


def _check_content_type(request: Request[Any, Any, Any], accepted: tuple[str, ...]) -> str:
    given = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if given not in accepted:
        is_form = given.startswith("multipart/")
        instead = "Send the file itself as the body (curl's --data-binary @FILE, not -F) with" if is_form else "Send"
        raise ApiError(
            "unsupported_media_type",
            f"The content type is {given[:80]!r}. {instead} the header 'Content-Type: {accepted[0]}'.",
            headers={"Accept-Post": ", ".join(accepted)},
        )
    return given
