"""The probes: /healthz says that the process answers, /readyz that jobs can be accepted. Neither needs a key."""

from __future__ import annotations

from litestar import Response, get
from litestar.openapi import ResponseSpec

from api.auth import PUBLIC
from api.dependencies import Service
from api.representations import CHANGING
from api.schemas import Health, Readiness


@get(
    "/healthz",
    operation_id="health",
    summary="The process answers",
    tags=["probes"],
    opt={**PUBLIC, **CHANGING},
    security=[{}],
    sync_to_thread=False,
)
def health() -> Health:
    """For a liveness probe: touches nothing, so a lost server does not restart the API."""
    return Health()


@get(
    "/readyz",
    operation_id="readiness",
    summary="Jobs can be accepted",
    tags=["probes"],
    opt={**PUBLIC, **CHANGING},
    security=[{}],
    responses={503: ResponseSpec(Readiness, generate_examples=False, description="A server does not answer")},
    sync_to_thread=False,
)
def readiness(service: Service) -> Response[Readiness]:
    """For a readiness probe: the latest result of the regular checks of Valkey and the object store."""
    checks = service.health()
    ready = all(verdict == "ok" for verdict in checks.values())
    return Response(
        # A probe needs only the result. Why a server is away is in the log, and not for clients without a key.
        Readiness(
            status="ready" if ready else "not_ready",
            checks={name: "ok" if verdict == "ok" else "no answer" for name, verdict in checks.items()},
            warnings=service.valkey.warnings() if ready else [],
        ),
        status_code=200 if ready else 503,
    )
