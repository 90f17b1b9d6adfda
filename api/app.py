"""Puts the HTTP service together: routes, keys, problems, limits, the edge. Owns no behaviour itself.

Invariant: creating the application does not touch the network; the lifespan starts and closes the job service.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from litestar import Litestar
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.middleware import DefineMiddleware

from api import compat, openapi
from api.audit import RequestAudit
from api.auth import BearerAuth, check_scope
from api.dependencies import PROVIDERS
from api.edge import Edge
from api.openai import chat
from api.openai import files as openai_files
from api.openai import graders as openai_graders
from api.openai import jobs as openai_jobs
from api.openai.errors import handle
from api.page import adapter, assets, curves, guide, report, session
from api.places import Places
from api.queries import check_query
from api.relay import Relay
from api.representations import Representations
from api.routes import (
    datasets,
    exports,
    graders,
    groups,
    health,
    job_rows,
    jobs,
    keys,
    metrics,
    rewards,
    rollouts,
    schema,
    serving,
    usage,
    webhooks,
    workers,
)
from api.routes.rollouts import MAX_WAITING_READS, READS_AT_ONCE
from api.settings import ApiSettings
from api.streams import EventStreams
from api.telemetry import ServiceMetrics
from api.threads import FairThreads
from api.uploads import Uploads
from jobs.service import JobService
from jobs.store.audit_log import AuditLog

KEY_THREADS = 8
"""Checks of keys at once: each is a question to Valkey."""
SESSION_THREADS, ADDRESS_THREADS = 8, 2
"""Log-ins and sessions looked up at once, in all and of one address."""
PACK_THREADS = 2
"""Large answers that are compressed at once."""
SWITCH_SECONDS = 0.001


def create_app(
    service: JobService | None = None, settings: ApiSettings | None = None, audit: AuditLog | None = None
) -> Litestar:
    """The application; without a service it makes one from the environment, without an audit log there is none."""
    settings = settings or ApiSettings()
    app = Litestar(
        route_handlers=[
            jobs.ROUTER,
            exports.ROUTER,
            groups.ROUTER,
            groups.compare_jobs,
            rollouts.ROUTER,
            job_rows.list_job_rows,
            datasets.router(settings.max_dataset_bytes),
            rewards.list_rewards,
            graders.ROUTER,
            serving.serve,
            chat.ROUTER,
            usage.ROUTER,
            keys.ROUTER,
            openai_files.router(settings.max_dataset_bytes),
            openai_jobs.ROUTER,
            openai_graders.ROUTER,
            webhooks.ROUTER,
            workers.ROUTER,
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
            guide.guide,
            report.report,
            adapter.adapter,
        ],
        dependencies=PROVIDERS,
        exception_handlers={HTTPException: handle, Exception: handle},
        guards=[check_scope, check_query],
        middleware=[DefineMiddleware(BearerAuth)],
        lifespan=[_lifespan],
        logging_config=None,
        openapi_config=openapi.config(),
        plugins=[openapi.RecordSchemas()],
        request_max_body_size=settings.max_body_bytes,
        state=State({"service": service or JobService.from_settings(), "settings": settings}),
    )
    state = app.state
    audit = audit or AuditLog(None)
    state.request_audit = RequestAudit(audit)
    state.metrics = ServiceMetrics(
        state.service.telemetry,
        lambda: state.streams.readers,
        lambda: audit.failures,
        state.service.storage_is_up,
    )
    state.key_threads = ThreadPoolExecutor(KEY_THREADS, thread_name_prefix="key")
    state.rollout_threads = FairThreads(READS_AT_ONCE, per_owner=1, waiting=MAX_WAITING_READS, name="rollouts")
    state.session_threads = FairThreads(
        SESSION_THREADS, per_owner=ADDRESS_THREADS, waiting=settings.max_owner_requests, name="session"
    )
    state.uploads = Uploads(settings)
    state.searches = Places(
        "too_many_searches",
        "searches through your jobs under way",
        per_owner=settings.max_owner_searches,
        in_all=settings.threads,
        settings=("GRPO_MAX_OWNER_SEARCHES", "GRPO_API_THREADS"),
    )
    state.grader_runs = Places(
        "too_many_grader_runs",
        "requests to run graders under way",
        per_owner=settings.max_owner_grader_runs,
        in_all=settings.max_grader_runs,
        settings=("GRPO_MAX_OWNER_GRADER_RUNS", "GRPO_MAX_GRADER_RUNS"),
    )
    state.pack_threads = ThreadPoolExecutor(PACK_THREADS, thread_name_prefix="pack")
    compat.wrap(app, lambda inner: Edge(Representations(inner, state.pack_threads), state.metrics, state.request_audit))
    return app


@asynccontextmanager
async def _lifespan(app: Litestar) -> AsyncGenerator[None]:
    service: JobService = app.state.service
    settings: ApiSettings = app.state.settings
    share = settings.owner_threads or max(1, settings.threads // 3)
    threads = FairThreads(settings.threads, per_owner=share, waiting=settings.max_owner_requests, name="request")
    asyncio.get_running_loop().set_default_executor(threads)
    # Calls that compute in Python must let the loop have its turn soon: by itself after 5 ms each.
    sys.setswitchinterval(SWITCH_SECONDS)
    await asyncio.to_thread(service.start)
    app.state.relay = Relay(service)
    app.state.streams = EventStreams(service, limit=settings.max_streams, per_owner=settings.max_owner_streams)
    try:
        yield
    finally:
        app.state.relay.close()
        await app.state.streams.aclose()
        app.state.rollout_threads.shutdown(wait=False)
        app.state.key_threads.shutdown(wait=False)
        app.state.session_threads.shutdown(wait=False)
        app.state.pack_threads.shutdown(wait=False)
        await asyncio.to_thread(service.close)
        app.state.request_audit.close()
