"""The Celery application. A message is only a wake-up for a job that is stored elsewhere.

Owns the Celery settings; `jobs.store.queues` owns the names of queues. Invariant: a lost, repeated or forged message
changes nothing, because a worker must claim the job in the job store before it does anything.
"""

from __future__ import annotations

from celery import Celery
from kombu.exceptions import OperationalError

from jobs.errors import Unavailable
from jobs.settings import QueueSettings
from jobs.store.job_store import SOCKET_SECONDS

TASK = "jobs.run"


def make_celery(settings: QueueSettings) -> Celery:
    """Return a Celery application on the broker in the settings, for wake-ups only.

    It uses early acknowledgement, no prefetch and no result backend; docs/why/architecture.md explains why.
    """
    app = Celery("grpo", broker=settings.redis_url.get_secret_value(), set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        broker_connection_max_retries=None,
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            "socket_timeout": SOCKET_SECONDS,
            "socket_connect_timeout": SOCKET_SECONDS,
            "socket_keepalive": True,
            "global_keyprefix": settings.broker_prefix,
        },
        task_acks_late=False,
        task_create_missing_queues=True,
        task_ignore_result=True,
        task_publish_retry_policy={"max_retries": 1, "interval_start": 0.1, "interval_max": 0.2},
        task_serializer="json",
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_concurrency=1,
        worker_disable_prefetch=True,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        worker_pool="solo",
        worker_prefetch_multiplier=1,
        worker_send_task_events=False,
    )
    return app


class WakeupSender:
    """Publishes wake-ups for jobs."""

    def __init__(self, settings: QueueSettings) -> None:
        self._app = make_celery(settings)

    def send(self, job_id: str, queue: str) -> None:
        """Publish one wake-up. Raises `Unavailable` if the broker does not accept it within seconds."""
        try:
            self._app.send_task(TASK, args=[job_id], queue=queue, ignore_result=True)
        except (OperationalError, OSError) as error:
            raise Unavailable("Valkey", type(error).__name__) from error
