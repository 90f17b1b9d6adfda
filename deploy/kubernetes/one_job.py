"""`python -m deploy.kubernetes.one_job IDLE_SECONDS`: a worker that ends after one job, for KEDA's ScaledJob.

It also ends when no job came in that time; wake-ups for jobs that others have taken do not count. Either way it ends as
on a TERM from outside, so a run that is at hand is handed back and not lost.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from jobs import logs
from jobs.record import JobRecord
from jobs.settings import QueueSettings, StorageSettings
from jobs.worker import Worker, WorkerSettings


class OneJobWorker(Worker):
    """Tells itself to stop when its first run is over."""

    def __init__(self, idle_seconds: float) -> None:
        super().__init__(WorkerSettings(), StorageSettings(), QueueSettings())
        self._idle = threading.Timer(idle_seconds, _stop)
        self._idle.daemon = True

    def serve(self) -> None:
        """Listen for one job, for so long, or until TERM."""
        self._idle.start()
        super().serve()

    def _run(self, record: JobRecord) -> None:
        self._idle.cancel()
        try:
            super()._run(record)
        finally:
            _stop()


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    logs.configure()
    OneJobWorker(idle_seconds=float(sys.argv[1])).serve()
