"""`python -m deploy.kubernetes.one_job IDLE_SECONDS`: a worker that ends after one job, for KEDA's ScaledJob.

It also ends if no job arrives in that time; wake-ups for jobs that other workers have taken do not count. In both cases
it ends as after TERM, so a run that it holds goes back to the queue and is not lost.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from celery import signals

from grpo_core.confinement.rights import hide_memory
from grpo_core.signals import end_on_term
from jobs import logs
from jobs.settings import QueueSettings, StorageSettings
from jobs.store.job import JobRecord
from jobs.worker.gang import Reservation
from jobs.worker.worker import Worker, WorkerSettings


class OneJobWorker(Worker):
    """Stops itself after its first run."""

    def __init__(self, idle_seconds: float) -> None:
        super().__init__(WorkerSettings(), StorageSettings(), QueueSettings())
        self._idle = threading.Timer(idle_seconds, _stop)
        self._idle.daemon = True

    def serve(self) -> None:
        """Listen for one job, for `idle_seconds` at most, or until TERM."""

        # Not before the worker listens: until then TERM ends the process at once, which looks like a crash.
        def begin(**_: object) -> None:
            if self._idle.ident is None:  # after a lost connection the worker becomes ready again
                self._idle.start()

        signals.worker_ready.connect(begin, weak=False)
        super().serve()

    def _run(self, record: JobRecord, cards: Reservation | None) -> None:
        self._idle.cancel()
        try:
            super()._run(record, cards)
        finally:
            _stop()


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Serve one job."""
    hide_memory()  # before secrets are read
    end_on_term()
    logs.configure()
    OneJobWorker(idle_seconds=float(sys.argv[1])).serve()


if __name__ == "__main__":
    main()
