"""Supervises a training process from its start to its end.

Owns the signals it gets and how long it may hang; `exit_status` interprets its end. Uses no storage. Invariant: the
process and its group have ended when `run` returns or raises.
"""

from __future__ import annotations

import time

from grpo_core.errors import FailureReport
from grpo_core.reasons import EventType, FailureCode, WarningCode
from grpo_core.spec import JobSpec
from jobs.errors import Fenced
from jobs.lifecycle.outcomes import HandBack
from jobs.store.commits import ResumeBase
from jobs.store.job_store import JobEvent
from jobs.worker.exit_status import ExitClassifier, RunResult
from jobs.worker.oom_kills import OomKills
from jobs.worker.run_context import RunContext
from jobs.worker.serving import ServingSession
from jobs.worker.stall_detector import StallDetector
from jobs.worker.trainer_process import Training

LOOK_SECONDS = 0.2
DUMP_SECONDS = 2.0
"""Time for a stalled child to write its stack traces."""
PAUSE_SECONDS = 600.0
"""Time for a child to finish its step and save before a pause."""


class Supervisor:
    """Supervises one child."""

    def __init__(
        self,
        context: RunContext,
        child: Training,
        base: ResumeBase,
        *,
        spec: JobSpec,
        until: float | None,
        too_long: FailureReport,
        serving: ServingSession | None = None,
    ) -> None:
        """`until` is the monotonic time at which the job exceeds its limit, and `too_long` its failure then.

        `serving` is the session of a process that answers requests.
        """
        self._serving = serving
        self._child = child
        self._forwarder = context.forwarder
        self._lease = context.lease
        self._stop = context.deps.stop
        self._log = context.log
        self._stall = StallDetector(context.folder, context.deps.stall_limits)
        self._oom_kills = OomKills()
        self._classify = ExitClassifier(
            context.folder, spec, base, tail=self._forwarder.tail, oom_kills=self._oom_kills, stop=self._stop
        )
        self._asked_at: float | None = None
        self._until = until
        self._too_long = too_long

    def run(self) -> RunResult:
        """Watch until the process ends or is killed. Raises `Fenced` if another run holds the job."""
        try:
            while (result := self._look()) is None:
                self._child.wait(LOOK_SECONDS)
            return result
        finally:
            self._child.kill()

    def _look(self) -> RunResult | None:
        exit_code = self._child.exit_code
        self._oom_kills.read()
        self._forwarder.send_new()
        if self._lease.lost:
            raise Fenced("the lease is lost")
        if self._lease.cancelled:
            return RunResult(status="cancelled")
        if exit_code is not None:
            asked = self._asked_at is not None
            return self._judge(self._classify(exit_code, asked=asked, known=self._child.failure))
        if self._stop.leaves or self._lease.pausing or self._over_time:
            return self._wind_down()
        self._stall.look(self._forwarder.tail.phase)
        reason = self._stall.stalled()
        if self._serving is not None:
            self._serving.look()
            reason = self._serving.stalled() if self._serving.is_ready else reason
        return self._end_stalled(reason) if reason else None

    @property
    def _over_time(self) -> bool:
        return self._until is not None and time.monotonic() > self._until

    def _judge(self, result: RunResult) -> RunResult:
        """Fail a job that exceeded its time limit instead of handing it back."""
        if result.status is None and self._over_time:
            return RunResult(status="failed", error=self._too_long)
        return result

    def _wind_down(self) -> RunResult | None:
        """Ask the child to save and exit, and wait for its end."""
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            self._child.terminate()
        if self._stop.leaves:
            self._forwarder.note_stop()
        late = self._stop.child_is_late if self._stop.asked else time.monotonic() - self._asked_at > PAUSE_SECONDS
        if not late:
            return None
        message = "The run took too long to save; the steps after its last checkpoint are trained again."
        warning = JobEvent(type=EventType.WARNING, data={"code": WarningCode.NOT_SAVED, "message": message})
        return self._judge(RunResult(status=None, handback=HandBack(counts=False, events=(warning,))))

    def _end_stalled(self, reason: str) -> RunResult:
        self._log.warning("stalled", reason=reason)
        self._child.dump_stacks()
        self._child.wait(DUMP_SECONDS)
        report = FailureReport.of(
            FailureCode.NO_PROGRESS,
            reason,
            hint="Where each thread hung is at the end of the run's stderr log, unless the process was stopped.",
        )
        return RunResult(status=None, handback=HandBack(report=report))
