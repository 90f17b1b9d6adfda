"""The life of a training process, from its start to its death, and what that death means for the job.

Owns the relay of its events, the orders it is given and the verdict on its exit. Knows nothing of storage. Invariant:
the process and its group are dead when `run` returns, however it returns.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from grpo_core import micro_batch
from grpo_core.errors import (
    EXIT_CHECKPOINTED,
    EXIT_CODES,
    EXIT_DONE,
    RETRYABLE,
    FailureReport,
    failure_class_of_exit,
)
from grpo_core.saved_run import UNREADABLE
from grpo_core.spec import JobSpec
from jobs.archive import Ending
from jobs.child import Child
from jobs.ending import STOPPED, Lapse
from jobs.errors import Fenced, Unavailable
from jobs.lease import Lease
from jobs.ledger import JobEvent, Ledger
from jobs.lineage import Base
from jobs.oom_kills import OomKills
from jobs.record import HELD
from jobs.resumption import skipped
from jobs.stall import StallLimits, StallWatch
from jobs.stopping import StopOrder
from jobs.tail import EventTail

log = structlog.get_logger()

LOOK_SECONDS = 0.2
DUMP_SECONDS = 2.0
"""For a stalled child to write down where it hangs."""
PAUSE_SECONDS = 600.0
"""How long a child that is to pause may take to finish its step and save."""
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


class Relay:
    """Sends a child's events to the ledger; what an outage holds up is sent later."""

    def __init__(self, ledger: Ledger, lease: Lease, job_id: str, epoch: int, folder: Path) -> None:
        self._ledger = ledger
        self._lease = lease
        self._job_id = job_id
        self._epoch = epoch
        self._stop_noted = False
        self.tail = EventTail(folder / "events.jsonl")

    def send_new(self) -> None:
        """Send what there is, as far as the ledger takes it now."""
        try:
            self.send_all()
        except Unavailable:
            return

    def send_all(self) -> None:
        """Send everything the child wrote; raises `Unavailable` while the ledger does not take it."""
        self.tail.read()
        while True:
            first, batch = self.tail.batch()
            if not batch:
                return
            change = self._ledger.change(
                self._job_id,
                from_statuses=HELD,
                epoch=self._epoch,
                fields=_progress(batch),
                events=batch,
                first_ordinal=first,
            )
            if change.refusal == "missing":
                raise Unavailable("Valkey", "it has lost the record")
            if not change.done:
                self._lease.lose()
                return
            self.tail.taken(change.shipped)

    def note_stop(self) -> None:
        """Have the record say that this run's worker was asked to stop, in case it is killed before it is done."""
        if self._stop_noted:
            return
        with contextlib.suppress(Unavailable):
            self._ledger.change(self._job_id, epoch=self._epoch, fields={"stopped_epoch": self._epoch})
            self._stop_noted = True


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
        self._spec = spec
        self._base = base
        self._stall = StallWatch(folder, limits)
        self._oom_kills = OomKills()
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
            return self._read_exit(exit_code)
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

    def _read_exit(self, code: int) -> Ended:
        if code == EXIT_DONE:
            return Ended(status="succeeded")
        if code == EXIT_CHECKPOINTED or (code < 0 and self._asked_at is not None):
            return Ended(status=None, lapse=self._left_saved())
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

    def _left_saved(self) -> Lapse:
        """Of a child that saved and left. One that nobody here asked must not come back for ever."""
        if self._stop.asked:
            return STOPPED
        if self._asked_at is not None:
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
            failure_class="oom" if code == EXIT_CODES["oom"] else failure_class_of_exit(code),
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


def _progress(events: list[JobEvent]) -> dict[str, object] | None:
    """What a batch of events says of the job as a whole."""
    fields: dict[str, object] = {}
    for event in events:
        if event.type == "metric":
            fields["step"] = event.step
            if event.data.get("reward") is not None:
                fields["reward"] = event.data["reward"]
        elif event.type == "status" and "phase" in event.data:
            fields["phase"] = event.data["phase"]
    return fields or None
