"""The life of a training process, from its start to its death.

Owns the orders it is given and how long it may hang; `verdict` says what its death means. Knows nothing of storage.
Invariant: the process and its group are dead when `run` returns, however it returns.
"""

from __future__ import annotations

import time
from pathlib import Path

import structlog

from grpo_core.errors import FailureReport
from grpo_core.spec import JobSpec
from jobs.child import Child
from jobs.ending import Lapse
from jobs.errors import Fenced
from jobs.lease import Lease
from jobs.ledger import JobEvent
from jobs.lineage import Base
from jobs.oom_kills import OomKills
from jobs.relay import Relay
from jobs.stall import StallLimits, StallWatch
from jobs.stopping import StopOrder
from jobs.verdict import Ended, Verdict

log = structlog.get_logger()

LOOK_SECONDS = 0.2
DUMP_SECONDS = 2.0
"""For a stalled child to write down where it hangs."""
PAUSE_SECONDS = 600.0
"""How long a child that is to pause may take to finish its step and save."""


class Watch:
    """Watches one child."""

    def __init__(
        self,
        child: Child,
        relay: Relay,
        lease: Lease,
        stop: StopOrder,
        *,
        folder: Path,
        spec: JobSpec,
        base: Base,
        limits: StallLimits,
    ) -> None:
        self._child = child
        self._relay = relay
        self._tail = relay.tail
        self._lease = lease
        self._stop = stop
        self._folder = folder
        self._stall = StallWatch(folder, limits)
        self._oom_kills = OomKills()
        self._verdict = Verdict(folder, spec, base, tail=relay.tail, oom_kills=self._oom_kills, stop=stop)
        self._asked_at: float | None = None

    def run(self) -> Ended:
        """Watch until it ends or is ended; raises `Fenced` where the job is no longer ours."""
        try:
            while (ended := self._look()) is None:
                self._child.wait(LOOK_SECONDS)
            return ended
        finally:
            self._child.kill()

    def _look(self) -> Ended | None:
        exit_code = self._child.exit_code
        self._oom_kills.read()
        self._relay.send_new()
        if self._lease.lost:
            raise Fenced("the lease is lost")
        if self._lease.cancelled:
            return Ended(status="cancelled")
        if exit_code is not None:
            return self._verdict(exit_code, asked=self._asked_at is not None)
        if self._stop.asked or self._lease.pausing:
            return self._wind_down()
        self._stall.look(self._tail.phase)
        reason = self._stall.stalled()
        return self._end_stalled(reason) if reason else None

    def _wind_down(self) -> Ended | None:
        """Ask the child to save and leave, and give it its time."""
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            self._child.terminate()
        if self._stop.asked:
            self._relay.note_stop()
        late = self._stop.child_is_late if self._stop.asked else time.monotonic() - self._asked_at > PAUSE_SECONDS
        if not late:
            return None
        message = "The run took too long to save; what came after its last checkpoint is trained again."
        told = JobEvent(type="warning", data={"code": "not_saved", "message": message})
        return Ended(status=None, lapse=Lapse(counts=False, events=(told,)))

    def _end_stalled(self, reason: str) -> Ended:
        log.warning("stalled", folder=self._folder.name, reason=reason)
        self._child.dump_stacks()
        self._child.wait(DUMP_SECONDS)
        report = FailureReport(
            failure_class="stalled",
            code="no_progress",
            message=reason,
            hint="Where each thread hung is at the end of the run's stderr log, unless the process was stopped.",
            retryable=True,
        )
        return Ended(status=None, lapse=Lapse(report=report))
