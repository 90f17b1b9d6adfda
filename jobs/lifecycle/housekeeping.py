"""Background work without urgency: saving and counting usage, deleting replaced objects, and retention of ended jobs.

Owns when it is done: in a separate thread of every API and worker process, one of which acts at a time. Invariant: slow
storage here never delays the takeover of a job.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from jobs.errors import Unavailable
from jobs.lifecycle.retention import Retention
from jobs.lifecycle.turns import Turns
from jobs.store.discards import Discards
from jobs.store.job_store import JobStore
from jobs.store.write_once import WriteOnceStore
from jobs.usage.gpu_time import GpuTime
from jobs.usage.stored_bytes import Census

log = structlog.get_logger()

INTERVAL_SECONDS = 5.0


class Housekeeper:
    """The thread of the background work."""

    def __init__(self, job_store: JobStore, write_once: WriteOnceStore) -> None:
        self._turns = Turns(job_store, "housekeeper", INTERVAL_SECONDS)
        self._work: tuple[Callable[[], object], ...] = (
            GpuTime(job_store, write_once.store).save,
            Census(job_store, write_once).step,
            Discards(job_store, write_once.store).step,
            Retention(job_store, write_once).step,
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="housekeeper", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the current step, or abandon it: each step can be repeated."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            self.round()

    def round(self) -> None:
        """Run each step once if it is this process's turn. An error in one step does not prevent the others."""
        is_away = False
        for step in self._work:
            try:
                if self._turns.mine():  # checked each time, because a step may take longer than the turn lasts
                    step()
            except Unavailable as error:
                is_away = True
                log.warning("housekeeping_failed", reason=str(error))
            except Exception:  # the thread's outermost loop: no error may end it
                log.exception("housekeeping_broken")
        if is_away:
            self._turns.pass_on()
