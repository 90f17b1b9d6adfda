"""Rings for jobs outside the request that made them, so that a slow broker never slows an answer.

Owns a thread and a list of jobs still to ring for; nothing in it must last, because the sweeper rings again for
every queued job. Invariant: `add` never blocks and never raises.
"""

from __future__ import annotations

import queue
import threading

import structlog

from jobs.errors import Unavailable
from jobs.ledger import Ledger
from jobs.queue import Doorbell

log = structlog.get_logger()


class Outbox:
    """Wake-ups waiting to be published."""

    def __init__(self, doorbell: Doorbell, ledger: Ledger) -> None:
        self._doorbell = doorbell
        self._ledger = ledger
        self._waiting: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._publish, name="outbox", daemon=True)

    def start(self) -> None:
        """Begin to publish."""
        self._thread.start()

    def close(self) -> None:
        """Publish what is waiting, then stop."""
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join(timeout=5)

    def add(self, job_id: str, queue_name: str) -> None:
        """Ring for a job soon."""
        self._waiting.put((job_id, queue_name))

    def _publish(self) -> None:
        while (item := self._waiting.get()) is not None:
            job_id, queue_name = item
            try:
                self._doorbell.ring(job_id, queue_name)
            except Unavailable as error:
                log.warning("ring_failed", job_id=job_id, reason=str(error))
            except Exception:  # an edge of the process: one bad ring must not silence all later ones
                log.exception("ring_broken", job_id=job_id)
