"""What is served below /schema beside the OpenAPI document: the job spec's JSON Schema and the page's script."""

from __future__ import annotations

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


@get("/schema/redoc.js", opt=PUBLIC, include_in_schema=False, media_type=MediaType.TEXT, sync_to_thread=True)
def script() -> Response[bytes]:
    """The documentation page's script, from our own address: there is no content network to reach or to trust."""
    return Response(SCRIPT.read_bytes(), media_type="text/javascript", headers={"Cache-Control": "max-age=86400"})
