"""A worker's side of a drain: no new job, and its job is finished or handed back with a checkpoint.

Owns what the worker knows of its mark. Invariants: no job is claimed after the mark was read, and the mark is read
after the worker has said that it is busy. If Valkey loses the mark, the worker writes it again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from jobs.errors import Unavailable
from jobs.store.drains import Drain, DrainStore
from jobs.worker.shutdown import GracefulShutdown

log = structlog.get_logger()

LOOK_SECONDS = 2.0
"""Seconds between two looks at the mark."""


class Draining:
    """Whether this worker drains. Thread-safe."""

    def __init__(self, marks: DrainStore, worker: str, stop: GracefulShutdown) -> None:
        self._marks = marks
        self._worker = worker
        self._stop = stop
        self._drain: Drain | None = None
        self._lock = threading.Lock()
        self._busy = False

    @property
    def mode(self) -> str:
        """The mode of the drain that is obeyed; empty without one."""
        return (self._drain and self._drain.mode) or ""

    @property
    def busy(self) -> bool:
        """Whether a job is being claimed or run."""
        return self._busy

    def begin(self) -> bool:
        """Say that a job is about to be claimed. Returns whether it may be. Raises `Unavailable`."""
        with self._lock:
            self._busy = True
        self.look()
        return not self.mode

    def end(self) -> None:
        """Say that it has no job."""
        with self._lock:
            self._busy = False
            self._stop.keep()

    def look(self) -> bool:
        """Read the mark, and ask the current run to leave if it says so. Returns whether anything has changed."""
        found = self._marks.of(self._worker)
        with self._lock:
            before = self.mode
            if found is None and before and self._drain is not None:
                self._marks.restore(self._worker, self._drain)  # Valkey has lost it
            elif found is not None:
                self._drain = found
            if self._busy and self.mode == "checkpoint":
                self._stop.release()
        if self.mode != before:
            log.info("drain", worker=self._worker, mode=self.mode or "none")
        return self.mode != before

    def wait(self, stopped: Callable[[], bool], changed: threading.Event) -> None:
        """Return once there is no drain any more, or `stopped` says so. Sets `changed` when the mark changes."""
        pause = threading.Event()
        while self.mode and not stopped():
            pause.wait(LOOK_SECONDS / 2)
            try:
                if self.look():
                    changed.set()
            except Unavailable as error:
                log.warning("drain_not_read", reason=str(error))
