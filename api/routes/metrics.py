"""GET /metrics: the service's own metrics for Prometheus. A job's training metrics are in `api.routes.jobs`."""

from __future__ import annotations

from typing import Any

from litestar import Request, Response, get
from litestar.concurrency import sync_to_thread
from litestar.openapi import ResponseSpec

from api.auth import scope
from api.problems import responses
from api.representations import CHANGING
from api.telemetry import ServiceMetrics

TEXT = "text/plain"


@get(
    "/metrics",
    operation_id="serviceMetrics",
    summary="The service's own metrics, for Prometheus",
    tags=["probes"],
    opt={**scope("metrics:read"), **CHANGING},
    media_type=TEXT,
    responses={
        200: ResponseSpec(str, generate_examples=False, description="Prometheus' text format", media_type=TEXT),
        **responses("bad_query"),
    },
)
async def service_metrics(request: Request[Any, Any, Any]) -> Response[bytes]:
    """Queues, leases, workers and step times of the whole service, and what this process has served."""
    metrics: ServiceMetrics = request.app.state.metrics
    body, content_type = await sync_to_thread(metrics.expose, request.headers.get("accept", ""))
    return Response(body, headers={"Content-Type": content_type})
