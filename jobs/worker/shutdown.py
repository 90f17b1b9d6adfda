"""Graceful shutdown of a worker after TERM, as sent by `docker stop` and at a spot preemption; and of one run alone.

Owns the grace time and its division: most of it is for the child to finish its step and save; the rest is for uploading
the checkpoint. Invariant: after a second TERM or the end of the grace time, the worker waits for nothing.
"""

from __future__ import annotations

import time

CHILD_SHARE = 0.75
"""Share of the grace time after which a child that has not saved is killed."""


class GracefulShutdown:
    """Set from a signal handler, read by the run."""

    def __init__(self, grace_seconds: float) -> None:
        self._grace = grace_seconds
        self._asked_at: float | None = None
        self._hurried = False
        self._released = False

    def give(self) -> None:
        """Request the stop; the second time, an immediate one."""
        if self._asked_at is None:
            self._asked_at = time.monotonic()
        else:
            self._hurried = True

    @property
    def asked(self) -> bool:
        """Whether the worker must stop."""
        return self._asked_at is not None

    @property
    def leaves(self) -> bool:
        """Whether the current run must save and go back to the queue: the worker stops, or only gives up its job."""
        return self.asked or self._released

    def release(self) -> None:
        """Request that the current run be handed back, without a time limit; the worker goes on."""
        self._released = True

    def keep(self) -> None:
        """Forget that request, once the run has ended."""
        self._released = False

    @property
    def child_is_late(self) -> bool:
        """Whether the child's share of the grace time is over."""
        return self._hurried or self._elapsed() > self._grace * CHILD_SHARE

    @property
    def over(self) -> bool:
        """Whether the grace time is over."""
        return self._hurried or self._elapsed() > self._grace

    def _elapsed(self) -> float:
        return 0.0 if self._asked_at is None else time.monotonic() - self._asked_at
