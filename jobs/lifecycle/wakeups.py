"""Publishes wake-ups outside the request that created the job, so that a slow broker never delays an answer.

Owns a thread and a list of jobs in memory; it may be lost, because the sweeper publishes wake-ups for every queued job
again. Invariant: `add` never blocks and never raises.
"""

from __future__ import annotations

import queue
import threading

import structlog

from jobs.errors import Unavailable
from jobs.lifecycle.celery_app import WakeupSender
from jobs.store.job_store import JobStore

log = structlog.get_logger()


class WakeupPublisher:
    """The wake-ups to publish."""

    def __init__(self, wakeup_sender: WakeupSender, job_store: JobStore) -> None:
        self._wakeup_sender = wakeup_sender
        self._job_store = job_store
        self._waiting: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._publish, name="wakeups", daemon=True)

    def start(self) -> None:
        """Start publishing."""
        self._thread.start()

    def close(self) -> None:
        """Publish the remaining wake-ups, then stop."""
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join(timeout=5)

    def add(self, job_id: str, queue_name: str) -> None:
        """Publish a wake-up for a job soon."""
        self._waiting.put((job_id, queue_name))

    def _publish(self) -> None:
        while (item := self._waiting.get()) is not None:
            job_id, queue_name = item
            try:
                self._wakeup_sender.send(job_id, queue_name)
            except Unavailable as error:
                log.warning("ring_failed", job_id=job_id, reason=str(error))
            except Exception:  # the thread's outermost loop: no error may end it
                log.exception("ring_broken", job_id=job_id)
