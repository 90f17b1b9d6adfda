"""Classifies how a training process ended: done, failed, or to be handed back to the queue.

Owns the interpretation of exit statuses, reported errors and the state of the machine (a full disk, OOM kills). Writes
nothing. Invariant: if another worker or a later run may succeed, the job is handed back; only what would fail again is
a failure.
"""

from __future__ import annotations

import errno
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_core.errors import (
    EXIT_CHECKPOINTED,
    EXIT_DONE,
    RETRYABLE,
    FailureReport,
    failure_class_of_exit,
)
from grpo_core.hardware import micro_batch
from grpo_core.reasons import EventType, FailureClass, FailureCode, WarningCode
from grpo_core.spec import JobSpec
from jobs.lifecycle.outcomes import STOPPED, HandBack
from jobs.store.commits import ResumeBase
from jobs.store.job_store import JobEvent
from jobs.store.write_once import FinalStatus
from jobs.worker.event_forwarder import EventTail
from jobs.worker.guardian import EXIT_MEMORY, EXIT_NOT_STARTED
from jobs.worker.oom_kills import OomKills
from jobs.worker.prepare import skipped
from jobs.worker.shutdown import GracefulShutdown

FULL_BYTES = 1024 * 1024
"""With less free space on the scratch disk, the end of the training process counts as caused by the full disk."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended, before anything is written."""

    status: FinalStatus | None
    """Final status of the job; None: it is handed back, as `handback` says."""
    error: FailureReport | None = None
    handback: HandBack = STOPPED
    unreadable: bool = False
    """Whether the checkpoint from which it should resume cannot be read."""


class ExitClassifier:
    """Classifies the exit status of one training process."""

    def __init__(
        self,
        folder: Path,
        spec: JobSpec,
        base: ResumeBase,
        *,
        tail: EventTail,
        oom_kills: OomKills,
        stop: GracefulShutdown,
    ) -> None:
        self._folder = folder
        self._spec = spec
        self._base = base
        self._tail = tail
        self._oom_kills = oom_kills
        self._stop = stop

    def __call__(self, code: int, *, asked: bool, known: FailureReport | None = None) -> RunResult:
        """Classify an exit status. `asked`: the process was asked to save and exit; `known`: why it ended, if that is
        known beside what it wrote."""
        if code == EXIT_DONE:
            return RunResult(status="succeeded")
        if code == EXIT_CHECKPOINTED or (code < 0 and asked):
            return RunResult(status=None, handback=self._left_saved(asked=asked))
        report = known or self._report(code)
        damaged = (
            report.code == FailureCode.CHECKPOINT_UNREADABLE.value and report.failure_class != FailureClass.USER_CONFIG
        )
        if damaged and self._base.resumed is not None:
            warning = skipped(self._base.resumed, report.message.rstrip("."))
            return RunResult(status=None, handback=HandBack(counts=False, events=(warning,)), unreadable=True)
        if report.failure_class == FailureClass.OOM:
            return self._out_of_memory(report, killed=code < 0 or code == EXIT_MEMORY)
        if report.failure_class in RETRYABLE:
            return RunResult(status=None, handback=HandBack(report=report))
        return RunResult(status="failed", error=report)

    def _left_saved(self, *, asked: bool) -> HandBack:
        """The child saved a checkpoint and exited. If nothing here asked it to, count it as preempted, so that it
        cannot loop."""
        if self._stop.leaves:
            return STOPPED
        if asked:
            return HandBack(counts=False)
        report = FailureReport.of(
            FailureCode.STOPPED_FROM_OUTSIDE,
            "Something other than the worker asked the training process to stop.",
            hint="Look for what sends TERM to processes on the worker's host.",
        )
        return HandBack(report=report)

    def _out_of_memory(self, report: FailureReport, *, killed: bool) -> RunResult:
        """Hand the job back with a higher gradient accumulation, or fail it if that cannot help."""
        before = self._base.gradient_accumulation or self._spec.sampling.gradient_accumulation
        useless = (
            not self._spec.has_steps
            or (killed and self._spec.resources.gpus)
            or not micro_batch.can_cure(report.code, self._tail.phase)
        )
        lowered = None if useless else micro_batch.smaller(self._spec, before)
        if lowered is None and killed:
            return RunResult(status=None, handback=HandBack(report=report))
        if lowered is None:
            return RunResult(status="failed", error=report)
        message = (
            f"{report.message} The job resumes, and trains on each step's {self._spec.completions_per_step} "
            f"completions in {lowered} parts instead of {before}; the objective and the effective batch stay the same."
        )
        data = {"code": WarningCode.MICRO_BATCH_LOWERED, "message": message, "before": before, "after": lowered}
        warning = JobEvent(type=EventType.WARNING, data=data)
        # Not an attempt, because the number of such changes is limited anyway.
        return RunResult(
            status=None, handback=HandBack(counts=False, fields={"accumulation": lowered}, events=(warning,))
        )

    def _report(self, code: int) -> FailureReport:
        """Return the failure that the process reported, or one derived from its exit status and the machine."""
        said = self._tail.last_error if code > 0 and code not in (EXIT_MEMORY, EXIT_NOT_STARTED) else None
        if self._disk_is_full(said):
            return disk_full(self._folder.parent)
        if said is not None:
            return FailureReport(
                failure_class=said["class"],
                code=said["code"],
                message=said["message"],
                hint=said.get("hint", ""),
                retryable=said.get("retryable", False),
            )
        if code == EXIT_MEMORY:
            return FailureReport.of(
                FailureCode.MEMORY_LIMIT,
                "The training process and its children used more memory than the worker allows.",
                hint="Raise GRPO_CHILD_MEMORY_MB, or lower model, sequence length or prompts per step.",
                retryable=True,
            )
        if code == EXIT_NOT_STARTED:
            return FailureReport.of(
                FailureCode.WORKER_ERROR,
                "The worker could not start the training process.",
                hint="The reason is at the end of the artifact stderr.log.",
            )
        if code == -9 and self._oom_kills.rose:
            return FailureReport.of(
                FailureCode.KILLED_FOR_MEMORY,
                "The kernel killed the training process because the machine's memory was used up.",
                hint="Give the worker more memory, or lower model, sequence length or prompts per step.",
                retryable=True,
            )
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        return FailureReport.of(
            FailureCode.CHILD_DIED,
            f"The training process ended by {how} and gave no reason.",
            hint="Its output is the artifact stderr.log.",
            failure_class=failure_class_of_exit(code),
            retryable=code < 0,
        )

    def _disk_is_full(self, said: dict[str, Any] | None) -> bool:
        if said is not None and "No space left on device" in said["message"]:
            return True
        return (said is None or said["class"] == "internal") and shutil.disk_usage(self._folder).free < FULL_BYTES


def disk_full(root: Path) -> FailureReport:
    """Return the failure of a run whose scratch disk is full."""
    return FailureReport.of(
        FailureCode.DISK_FULL,
        f"The worker's scratch disk is full ({root}).",
        hint="Make room below GRPO_WORK_DIR, or point it to a larger disk; the job needs room for a few checkpoints.",
    )


def broken_machine(error: Exception, root: Path) -> RunResult:
    """Return the result of a run after an error of the worker or its machine; another worker may succeed.

    `root` is the folder of run folders.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunResult(status=None, handback=HandBack(report=disk_full(root)))
    how = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
    report = FailureReport.of(
        FailureCode.WORKER_ERROR,
        f"The worker could not run the job ({how}).",
        hint="The worker's log has the details.",
    )
    return RunResult(status=None, handback=HandBack(report=report))
