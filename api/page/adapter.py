"""A finished job's adapter as one archive, for the page's button.

Scripts use the links of `/jobs/{id}/artifacts`, which lead to storage itself. Invariant: only files that the job's
manifest lists below `adapter/` are in the archive.
"""

from __future__ import annotations

import re
from typing import Any

from litestar import Response, get
from litestar.params import FromPath
from litestar.response import Stream

from api.audit import audited
from api.auth import scope
from api.dependencies import Owner, Service
from grpo_core.spec import JOB_ID
from jobs.errors import NotFound


@get(
    "/page/adapters/{job_id:str}",
    operation_id="downloadAdapter",
    opt={**scope("jobs:read"), **audited("downloadAdapter")},
    include_in_schema=False,
    sync_to_thread=True,
)
def adapter(job_id: FromPath[str], owner: Owner, service: Service) -> Any:
    """The archive; 204 where a job has left no adapter."""
    if not re.fullmatch(JOB_ID, job_id):
        raise NotFound("job", job_id[:80])
    archive = service.archive(job_id, owner, "adapter/")
    if archive is None:
        return Response(None, status_code=204)
    headers = {
        "Content-Disposition": f'attachment; filename="{job_id}-adapter.tar"',
        "Content-Length": str(archive.size),
    }
    return Stream(archive.chunks(), media_type="application/x-tar", headers=headers)
