"""Reads request bodies: a job spec as strict JSON, a data set as a stream of bounded memory.

Owns content types, encodings and sizes; what a spec or a data set may hold is `grpo_core`'s to say. Invariant: a body
that is refused was never parsed further than the rule it broke.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from litestar import Request
from litestar.concurrency import sync_to_thread

from api.problems import ApiError
from api.settings import ApiSettings
from grpo_core import strict_json
from grpo_core.datasets import DatasetSummary, JsonlChecker
from grpo_core.spec import JobSpec, parse_spec

JSON = "application/json"
JSONL = ("application/x-ndjson", "application/jsonl")

_BATCH_BYTES = 1024**2
"""Bytes gathered before they are checked and written in a thread: one hop for many small network reads."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A received data set: a checked file that is gone when the request ends."""

    path: Path
    summary: DatasetSummary


async def read_spec(request: Request[Any, Any, Any]) -> JobSpec:
    """Dependency: the body as a job spec."""
    _check_encoding(request)
    body = await request.body()
    if not body.strip():
        raise ApiError("empty_body", "A job spec is expected in the body. Send {} for the recipe as it is.")
    _check_content_type(request, (JSON,))
    return parse_spec(strict_json.loads(body))


async def receive_dataset(request: Request[Any, Any, Any]) -> AsyncIterator[Upload]:
    """Dependency: the body as a checked JSONL file, kept for as long as the request lasts."""
    _check_encoding(request)
    _check_content_type(request, JSONL)
    settings: ApiSettings = request.app.state.settings
    checker = JsonlChecker(max_rows=settings.max_dataset_rows, max_bytes=settings.max_dataset_bytes)
    with TemporaryDirectory(prefix="grpo-upload-") as folder:
        path = Path(folder) / "dataset.jsonl"
        with path.open("wb") as file:

            def take(batch: bytes) -> None:
                checker.feed(batch)
                file.write(batch)

            async for batch in _batches(request.stream()):
                await sync_to_thread(take, batch)
        yield Upload(path=path, summary=await sync_to_thread(checker.finish))


async def _batches(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    held = bytearray()
    async for chunk in chunks:
        held += chunk
        if len(held) >= _BATCH_BYTES:
            yield bytes(held)
            held.clear()
    if held:
        yield bytes(held)


def _check_encoding(request: Request[Any, Any, Any]) -> None:
    """Nothing is decompressed here: what a body may grow to would be its sender's choice."""
    given = request.headers.get("content-encoding", "").strip().lower()
    if given not in ("", "identity"):
        raise ApiError(
            "unsupported_media_type",
            f"The body is compressed (Content-Encoding: {given[:80]!r}). Send it as it is, without that header.",
            headers={"Accept-Encoding": "identity"},
        )


def _check_content_type(request: Request[Any, Any, Any], accepted: tuple[str, ...]) -> None:
    given = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if given not in accepted:
        is_form = given.startswith("multipart/")
        instead = "Send the file itself as the body (curl's --data-binary @FILE, not -F) with" if is_form else "Send"
        raise ApiError(
            "unsupported_media_type",
            f"The content type is {given[:80]!r}. {instead} the header 'Content-Type: {accepted[0]}'.",
            headers={"Accept-Post": ", ".join(accepted)},
        )
