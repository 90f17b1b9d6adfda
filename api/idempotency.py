"""Reads the Idempotency-Key of a request. What the key does is in `jobs.lifecycle.admission`.

Invariant: a header that cannot be used as it was meant is refused, never ignored.
"""

from __future__ import annotations

import re
from typing import Any

from litestar import Request
from litestar.concurrency import sync_to_thread
from litestar.datastructures import ResponseHeader
from litestar.di import NamedDependency
from litestar.params import SkipValidation

from api.bodies import Upload
from api.problems import ApiError
from grpo_core import strict_json
from grpo_core.spec import JobSpec
from jobs.lifecycle.admission import RequestKey

KEY_PATTERN = r"^[\x21-\x7e]{1,255}$"
REPLAYED = {"Idempotent-Replayed": "true"}

SUBMISSION_ERRORS = (
    "invalid_spec",
    "rejected",
    "idempotency_in_progress",
    "idempotency_key_reused",
    "too_many_jobs",
    "gpu_quota",
    "storage_quota",
)
"""Problems of requests that submit jobs, beside those of any body."""

Once = NamedDependency[SkipValidation[RequestKey | None]]


def created_headers(what: str, replayed: str) -> list[ResponseHeader]:
    """The headers of an answer that tells of something new, for OpenAPI."""
    described = {
        "Location": f"The new {what}",
        "Idempotent-Replayed": f"`true` if an earlier request with the same key {replayed}",
    }
    return [
        ResponseHeader(name=name, value="", description=text, documentation_only=True)
        for name, text in described.items()
    ]


async def submission_key(request: Request[Any, Any, Any], spec: NamedDependency[SkipValidation[JobSpec]]) -> Any:  # noqa: ARG001 - read first
    """Dependency: the key of a submission, if it has one, with the body as it was meant: spaces do not matter.

    The body and not the resolved spec, which a newer release may resolve otherwise between two attempts.
    """
    return await _of_body("submitJob", request)


async def export_key(request: Request[Any, Any, Any], spec: NamedDependency[SkipValidation[JobSpec]]) -> Any:  # noqa: ARG001 - read first
    """Dependency: the same for an export."""
    return await _of_body("submitExport", request)


async def group_key(
    request: Request[Any, Any, Any],
    sweep: NamedDependency[SkipValidation[list[JobSpec]]],  # noqa: ARG001 - read first
) -> Any:
    """Dependency: the same for a group of jobs."""
    return await _of_body("submitGroup", request)


async def _of_body(operation: str, request: Request[Any, Any, Any]) -> RequestKey | None:
    key = read_key(request)
    if key is None:
        return None
    body = await request.body()
    return await sync_to_thread(lambda: RequestKey.of(operation, key, strict_json.canonical(strict_json.loads(body))))


def upload_key(request: Request[Any, Any, Any], upload: NamedDependency[SkipValidation[Upload]]) -> Any:
    """Dependency: the key of an upload, if it has one, with the file's hash and label."""
    key = read_key(request)
    if key is None:
        return None
    return RequestKey.of("uploadDataset", key, f"{upload.summary.sha256}\n{request.query_params.get('name', '')}")


def read_key(request: Request[Any, Any, Any]) -> str | None:
    """The Idempotency-Key of a request, or None. Raises `ApiError` for a header that cannot be used."""
    given = request.headers.getall("idempotency-key", [])
    if not given:
        return None
    if len(given) > 1 or not re.fullmatch(KEY_PATTERN, given[0]):
        raise ApiError(
            "bad_request",
            "The header Idempotency-Key must come once, with 1 to 255 visible ASCII characters; a UUID is good.",
        )
    return given[0]
