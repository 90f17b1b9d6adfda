"""The Celery application and the queues: a message is only a wake-up for a job that is written down elsewhere.

Owns queue names, which worker serves which, and the Celery settings. Invariant: losing, repeating or inventing a
message changes nothing, because a worker must claim the job in the ledger before it does anything.
"""

from __future__ import annotations

from celery import Celery
from kombu.exceptions import OperationalError

from grpo_core.spec import JobSpec
from jobs.errors import Unavailable
from jobs.ledger import SOCKET_SECONDS
from jobs.settings import QueueSettings

TASK = "jobs.run"
MEMORY_CLASSES_GB = (16, 24, 40, 48, 80, 96, 141, 192, 288, 1024)
"""Sizes cards are sold in. A request is rounded up to one, so that there are few queues."""


def queue_for(spec: JobSpec, prefix: str = "grpo") -> str:
    """The queue of a job's resource class."""
    resources = spec.resources
    if resources.gpus == 0:
        return f"{prefix}.cpu"
    memory = resources.min_gpu_memory_gb
    suffix = "" if memory is None else f".{_memory_class(memory)}gb"
    return f"{prefix}.gpu{resources.gpus}{suffix}"


def queues_served(gpu_memory_gb: float | None, prefix: str = "grpo") -> list[str]:
    """The queues of every class that a card of so much memory (10^9 bytes) can run; None is a host without a card.

    How many cards there are does not matter: a job takes one at most, and a worker has one job at a time.
    """
    if gpu_memory_gb is None:
        return [f"{prefix}.cpu"]
    classes = [size for size in MEMORY_CLASSES_GB if size <= gpu_memory_gb]
    return [*(f"{prefix}.gpu1.{size}gb" for size in reversed(classes)), f"{prefix}.gpu1"]


def _memory_class(gigabytes: int) -> int:
    return next((size for size in MEMORY_CLASSES_GB if size >= gigabytes), MEMORY_CLASSES_GB[-1])


def make_celery(settings: QueueSettings) -> Celery:
    """A Celery application on the broker named in the settings, configured as a doorbell.

    Early acknowledgement, no prefetch, no result backend: what each prevents is in docs/architecture.md.
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


class Doorbell:
    """Wakes a worker for a job."""

    def __init__(self, settings: QueueSettings) -> None:
        self._app = make_celery(settings)

    def ring(self, job_id: str, queue: str) -> None:
        """Publish one wake-up; raises `Unavailable` when the broker does not take it within seconds."""
        try:
            self._app.send_task(TASK, args=[job_id], queue=queue, ignore_result=True)
        except (OperationalError, OSError) as error:
            raise Unavailable("Valkey", type(error).__name__) from error
