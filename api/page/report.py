"""A finished job's `report.json` for the page, which may read from no other address than its own.

The format of the report is described in `docs/reference/run-folder.md`. Invariant: only the file that the job's
manifest lists is read.
"""

from __future__ import annotations

import re

from litestar import Response, get
from litestar.params import FromPath

from api.auth import scope
from api.dependencies import Owner, Service
from grpo_core.spec import JOB_ID
from jobs.errors import NotFound

MAX_BYTES = 16 * 1024**2
"""Size limit of a report, which holds curves of some hundred points and at most some thousand answers."""


@get("/page/reports/{job_id:str}", opt=scope("jobs:read"), include_in_schema=False, sync_to_thread=True)
def report(job_id: FromPath[str], owner: Owner, service: Service) -> Response[bytes]:
    """The report as it was written; 204 where a job has left none so far."""
    if not re.fullmatch(JOB_ID, job_id):
        raise NotFound("job", job_id[:80])
    key = next((file.key for file in service.artifacts(job_id, owner) if file.path == "report.json"), None)
    body = service.store.get(key, most=MAX_BYTES) if key else None
    return Response(body or b"", status_code=200 if body else 204, media_type="application/json")
