"""Puts the HTTP service together: routes, keys, problems, limits, the edge. Owns no behaviour of its own.

Invariant: the application is made without touching the network; the lifespan starts and closes the job service.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from litestar import Litestar
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.middleware import DefineMiddleware

from api import openapi
from api.auth import BearerAuth, check_scope
from api.dependencies import PROVIDERS
from api.edge import Edge
from api.page import assets, curves, report, session
from api.problems import handle
from api.queries import check_query
from api.routes import datasets, health, jobs, metrics, rewards, rollouts, schema
from api.settings import ApiSettings
from api.streams import EventStreams
from api.telemetry import ServiceMetrics
from jobs.service import JobService


def create_app(service: JobService | None = None, settings: ApiSettings | None = None) -> Litestar:
    """The application; without a service it makes one from the environment."""
    settings = settings or ApiSettings()
    app = Litestar(
        route_handlers=[
            jobs.ROUTER,
            rollouts.ROUTER,
            datasets.router(settings.max_dataset_bytes),
            rewards.list_rewards,
            health.health,
            health.readiness,
            metrics.service_metrics,
            schema.job_schema,
            schema.script,
            assets.index,
            assets.asset,
            session.log_in,
            session.who,
            session.log_out,
            curves.reward_curves,
            report.report,
        ],
        dependencies=PROVIDERS,
        exception_handlers={HTTPException: handle, Exception: handle},
        guards=[check_scope, check_query],
        middleware=[DefineMiddleware(BearerAuth)],
        lifespan=[_lifespan],
        logging_config=None,
        openapi_config=openapi.config(),
        request_max_body_size=settings.max_body_bytes,
        state=State({"service": service or JobService.from_settings(), "settings": settings}),
    )
    state = app.state
    state.metrics = ServiceMetrics(state.service.telemetry, lambda: state.streams.readers)
    app.asgi_handler = Edge(app.asgi_handler, state.metrics)
    return app


@asynccontextmanager
async def _lifespan(app: Litestar) -> AsyncGenerator[None]:
    service: JobService = app.state.service
    settings: ApiSettings = app.state.settings
    executor = ThreadPoolExecutor(max_workers=settings.threads, thread_name_prefix="request")
    # The loop's own default has a thread for each core and a few more: too few for calls that mostly wait.
    asyncio.get_running_loop().set_default_executor(executor)
    await asyncio.to_thread(service.start)
    app.state.streams = EventStreams(service, limit=settings.max_streams)
    try:
        yield
    finally:
        await app.state.streams.aclose()
        await asyncio.to_thread(service.close)
