"""The order to stop that a worker gets from outside: TERM, as `docker stop` and spot preemption send it.

Owns the grace time and how it is shared: most of it is the child's, to finish its step and save; the rest is for
sending what it saved. Invariant: a second order, or the end of the grace time, leaves nothing to wait for.
"""

from __future__ import annotations

import time

CHILD_SHARE = 0.75
"""Of the grace time: after it a child that has not saved is killed."""


class StopOrder:
    """Set from a signal handler, read by the run."""

    def __init__(self, grace_seconds: float) -> None:
        self._grace = grace_seconds
        self._asked_at: float | None = None
        self._hurried = False

    def give(self) -> None:
        """Ask to stop; the second time, at once."""
        if self._asked_at is None:
            self._asked_at = time.monotonic()
        else:
            self._hurried = True

    @property
    def asked(self) -> bool:
        """Whether the worker is to stop."""
        return self._asked_at is not None

    @property
    def child_is_late(self) -> bool:
        """Whether the child has had its share."""
        return self._hurried or self._elapsed() > self._grace * CHILD_SHARE

    @property
    def over(self) -> bool:
        """Whether the grace time has passed."""
        return self._hurried or self._elapsed() > self._grace

    def _elapsed(self) -> float:
        return 0.0 if self._asked_at is None else time.monotonic() - self._asked_at
