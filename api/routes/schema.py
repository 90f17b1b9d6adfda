"""The routes below /schema besides the OpenAPI document: the job spec's JSON Schema and the page's script."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from litestar import MediaType, Response, get

from api.auth import PUBLIC
from grpo_core.spec import json_schema

SCRIPT = Path(__file__).resolve().parents[1] / "static" / "redoc.standalone.js"


@get(
    "/schema/job",
    operation_id="jobSchema",
    summary="The JSON Schema of a job spec",
    tags=["schema"],
    opt=PUBLIC,
    security=[{}],
    sync_to_thread=False,
)
def job_schema() -> dict[str, Any]:
    """For editors and for checking a spec before it is sent."""
    return json_schema()


@get("/schema/redoc.js", opt=PUBLIC, include_in_schema=False, media_type=MediaType.TEXT, sync_to_thread=False)
def script() -> Response[bytes]:
    """The documentation page's script, served from our own address, so that no content network is needed or trusted."""
    return Response(_script(), media_type="text/javascript", headers={"Cache-Control": "max-age=86400"})


@cache
def _script() -> bytes:
    """Read once at start-up, because clients without a key may request it and should occupy no thread."""
    return SCRIPT.read_bytes()
