"""GET /usage: the caller's GPU-hours, storage and jobs, and their limits."""

from __future__ import annotations

from litestar import get

from api.auth import scope
from api.dependencies import Owner, Service
from api.problems import responses
from api.schemas import UsageReport, usage_of


@get(
    "/usage",
    operation_id="getUsage",
    summary="What you have used, and your limits",
    tags=["usage"],
    opt=scope("jobs:read"),
    responses=responses("bad_query"),
    sync_to_thread=True,
)
def get_usage(owner: Owner, service: Service) -> UsageReport:
    """GPU-hours of the last days, bytes in storage and unfinished jobs, each with its limit."""
    return usage_of(*service.usage(owner))
