"""What the death of a training process means for its job.

Owns the reading of exit statuses, last words and the machine's own signs (a full disk, the kernel's kills). Decides
nothing of what is written where. Invariant: what may go better elsewhere or later is a lapse, and only what would fail
again is a failure.
"""

from __future__ import annotations

import errno
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_core import micro_batch
from grpo_core.errors import (
    EXIT_CHECKPOINTED,
    EXIT_DONE,
    RETRYABLE,
    FailureReport,
    failure_class_of_exit,
)
from grpo_core.saved_run import UNREADABLE
from grpo_core.spec import JobSpec
from jobs.archive import Ending
from jobs.ending import STOPPED, Lapse
from jobs.ledger import JobEvent
from jobs.lineage import Base
from jobs.oom_kills import OomKills
from jobs.resumption import skipped
from jobs.stopping import StopOrder
from jobs.tail import EventTail

FULL_BYTES = 1024 * 1024
"""With less room than that on the scratch disk, a child's death is the disk's doing."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run ended, before anything is written of it."""

    status: Ending | None
    """None: the job goes back, as `lapse` says."""
    error: FailureReport | None = None
    lapse: Lapse = STOPPED
    unreadable: bool = False
    """The checkpoint it was to go on from cannot be read."""


class Verdict:
    """Judges the exit of one child by what is known of its run."""

    def __init__(
        self, folder: Path, spec: JobSpec, base: Base, *, tail: EventTail, oom_kills: OomKills, stop: StopOrder
    ) -> None:
        self._folder = folder
        self._spec = spec
        self._base = base
        self._tail = tail
        self._oom_kills = oom_kills
        self._stop = stop

    def __call__(self, code: int, *, asked: bool) -> Ended:
        """Read an exit status; `asked`: the child was told to save and leave."""
        if code == EXIT_DONE:
            return Ended(status="succeeded")
        if code == EXIT_CHECKPOINTED or (code < 0 and asked):
            return Ended(status=None, lapse=self._left_saved(asked=asked))
        report = self._report(code)
        unreadable = report.code == UNREADABLE and report.failure_class != "user_config"
        if unreadable and self._base.resumed is not None:
            told = skipped(self._base.resumed, report.message.rstrip("."))
            return Ended(status=None, lapse=Lapse(counts=False, events=(told,)), unreadable=True)
        if report.failure_class == "oom":
            return self._out_of_memory(report, by_kernel=code < 0)
        if report.failure_class in RETRYABLE:
            return Ended(status=None, lapse=Lapse(report=report))
        return Ended(status="failed", error=report)

    def _left_saved(self, *, asked: bool) -> Lapse:
        """Of a child that saved and left. One that nobody here asked must not come back for ever."""
        if self._stop.asked:
            return STOPPED
        if asked:
            return Lapse(counts=False)
        report = FailureReport(
            failure_class="preempted",
            code="stopped_from_outside",
            message="Something other than the worker asked the training process to stop.",
            hint="Look for what sends TERM to processes on the worker's host.",
            retryable=True,
        )
        return Lapse(report=report)

    def _out_of_memory(self, report: FailureReport, *, by_kernel: bool) -> Ended:
        """Split the step further. The kernel kills for the host's memory, which the split of a GPU job hardly needs."""
        before = self._base.gradient_accumulation or self._spec.sampling.gradient_accumulation
        useless = (by_kernel and self._spec.resources.gpus) or not micro_batch.can_cure(report.code, self._tail.phase)
        lowered = None if useless else micro_batch.smaller(self._spec, before)
        if lowered is None and by_kernel:
            return Ended(status=None, lapse=Lapse(report=report))
        if lowered is None:
            return Ended(status="failed", error=report)
        message = (
            f"{report.message} The job goes on with each step's {self._spec.completions_per_step} completions trained "
            f"on in {lowered} parts instead of {before}; the objective and the effective batch stay the same."
        )
        data = {"code": "micro_batch_lowered", "message": message, "before": before, "after": lowered}
        told = JobEvent(type="warning", data=data)
        # A run that splits further is no attempt: the ladder has an end of its own.
        return Ended(status=None, lapse=Lapse(counts=False, fields={"accumulation": lowered}, events=(told,)))

    def _report(self, code: int) -> FailureReport:
        """What the child said of its failure, or what its exit status and the machine tell."""
        said = self._tail.last_error if code > 0 else None
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
        if code == -9 and self._oom_kills.rose:
            return FailureReport(
                failure_class="oom",
                code="killed_for_memory",
                message="The kernel killed the training process because the machine's memory was used up.",
                hint="Give the worker more memory, or lower model, sequence length or prompts per step.",
                retryable=True,
            )
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        return FailureReport(
            failure_class=failure_class_of_exit(code),
            code="child_died",
            message=f"The training process ended by {how} and gave no reason.",
            hint="Its output is the artifact stderr.log.",
            retryable=code < 0,
        )

    def _disk_is_full(self, said: dict[str, Any] | None) -> bool:
        if said is not None and "No space left on device" in said["message"]:
            return True
        return (said is None or said["class"] == "internal") and shutil.disk_usage(self._folder).free < FULL_BYTES


def disk_full(root: Path) -> FailureReport:
    """The failure of a run whose scratch disk has no room."""
    return FailureReport(
        failure_class="infra",
        code="disk_full",
        message=f"The worker's scratch disk is full ({root}).",
        hint="Make room below GRPO_WORK_DIR, or point it to a larger disk; the job needs room for a few checkpoints.",
        retryable=True,
    )


def machine_failure(error: Exception, root: Path) -> FailureReport:
    """What an error of the worker itself, or of the machine under it, means for the job it hit."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full(root)
    how = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
    return FailureReport(
        failure_class="infra",
        code="worker_error",
        message=f"The worker could not run the job ({how}).",
        hint="The worker's log has the details.",
        retryable=True,
    )


def broken_machine(error: Exception, root: Path, *, log: Any) -> Ended:
    """The end of a run that the machine failed, which another may cure. `root`: where its scratch folders are."""
    log.error("machine_failed", error=repr(error))
    return Ended(status=None, lapse=Lapse(report=machine_failure(error, root)))
