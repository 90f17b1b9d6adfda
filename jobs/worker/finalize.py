"""How a run ends in the bucket and in the record: finished, handed back or cancelled.

Owns what is written at the end of a run, in which order, and how long each write may take. Invariants: nothing is
written after the lease is lost, and the record of a job ends only once its outcome has been read in the bucket, because
a write without an answer may have succeeded. If storage is unavailable during a cancel, the job stays `cancelling`
until this worker or the sweeper reaches storage.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection

from grpo_core.errors import FailureReport
from grpo_core.reasons import FailureCode, Phase
from jobs.errors import Fenced, Unavailable
from jobs.lifecycle.outcomes import HandBack, hand_back, last_failure
from jobs.store import commits, event_log, object_keys
from jobs.store.commits import ResumeBase
from jobs.store.job import HELD, JobStatus
from jobs.store.write_once import FinalStatus, Manifest, ManifestEntry, Outcome
from jobs.worker.exit_status import RunResult, broken_machine
from jobs.worker.interruptible_retry import Interrupt, Interrupted, TooSlow
from jobs.worker.report import write_report
from jobs.worker.run_context import RunContext
from jobs.worker.uploader import Uploader

CANCEL_UPLOAD_SECONDS = 2.0
CANCEL_WRITE_SECONDS = 1.0
"""Time for uploading artifacts of a cancelled job, and then for its outcome, before the sweeper may end the job too."""
LATE_SECONDS = 300.0
"""Time after that for further attempts to write a cancelled job's outcome, and to upload its artifacts."""
LAST_WORDS_SECONDS = 5.0
"""Time for updating the record after the grace time is over."""


class Finalizer:
    """Finalizes one run."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._deps = context.deps
        self._retry = context.retry
        self._job_id, self._epoch = context.job_id, context.epoch

    def write(self, result: RunResult) -> None:
        """Write how the run ended. A cancel that arrives meanwhile takes precedence."""
        try:
            if result.status is None:
                self._hand_back(result)
            elif result.status == "cancelled":
                self._cancel()
            else:
                self._finish(result.status, result.error)
        except Interrupted as interrupt:
            if interrupt.kind == "cancel":
                self._cancel()
            else:
                self._release(result.handback)  # for its own reason, although the time is over

    def _finish(self, status: FinalStatus, error: FailureReport | None, *, otherwise: HandBack | None = None) -> None:
        """Upload the rest, write manifest and outcome, then the record.

        If this machine cannot do that, hand the job back, with `otherwise` or because of the error.
        """
        interrupts: Collection[Interrupt] = ("cancel", "deadline")
        self._retry(self._context.forwarder.send_all, interrupts)
        self._set_phase(Phase.UPLOADING)
        try:
            manifest = self._upload_all(status, error, interrupts)
        except OSError as broken:
            self._context.log.error("machine_failed", error=repr(broken))  # noqa: TRY400 - the error says it all
            self._release(otherwise or broken_machine(broken, self._context.folder.parent).handback)
            return
        uploader = self._context.uploader
        if status == "succeeded" and uploader is not None and uploader.not_sent:
            status, error = "failed", _too_large(uploader.not_sent)
        if not self._retry(self._is_mine, interrupts):
            raise Fenced(f"epoch {self._epoch} of {self._job_id} is over")
        if self._retry(self._is_cancelled, interrupts):
            self._cancel()
            return
        outcome = self._outcome(status, error, manifest)
        standing = self._retry(lambda: self._deps.write_once.put_outcome(outcome), interrupts)
        self._context.lease.stop()
        self._settle(standing)

    def _is_mine(self) -> bool:
        """Whether no later run holds the job. A later ticket alone does not count: its claim may have failed."""
        # A change, not a read: a server that is now a replica would answer a read with what was.
        change = self._deps.job_store.change(self._job_id, from_statuses=HELD, epoch=self._epoch)
        if change.refusal == "missing":
            return self._deps.write_once.latest_epoch(self._job_id) == self._epoch
        if change.epoch < self._epoch:
            raise Unavailable("Valkey", "it has lost the claim")  # the lease restores it
        return change.done

    def _is_cancelled(self) -> bool:
        """Whether its owner has cancelled it, by the bucket, because Valkey may have lost the command."""
        record = self._deps.commands.apply_pending(self._job_id)
        if record is None:  # not restored yet
            return any(order == "cancel" for _, order in self._deps.write_once.commands(self._job_id))
        return record.status is JobStatus.CANCELLING

    def _upload_all(
        self,
        status: FinalStatus,
        error: FailureReport | None,
        interrupts: Collection[Interrupt],
        *,
        until: float | None = None,
    ) -> str:
        """Upload everything and write the manifest. Returns its key."""
        uploader = self._context.uploader or self._start_uploader(interrupts, until)
        write_report(self._context, status, error, interrupts, until=until)
        uploader.finish(whole=True)
        self._retry.wait(uploader.wait, interrupts, until=until)
        if uploader.error is not None:
            raise uploader.error
        manifest = Manifest(
            job=self._job_id,
            epoch=self._epoch,
            objects=uploader.objects,
            best_step=self._context.forwarder.tail.best_step,
        )
        return self._retry(lambda: self._deps.write_once.put_manifest(manifest), interrupts, until=until)

    def _start_uploader(self, interrupts: Collection[Interrupt], until: float | None) -> Uploader:
        """Start an uploader for a run that ended before it had a base: objects of earlier runs stay valid."""
        store, job_id, epoch = self._deps.store, self._job_id, self._epoch

        def find() -> list[ManifestEntry]:
            return commits.inherited(store, job_id, epoch, commits.newest_commit(store, job_id, epoch - 1))

        left = self._retry(find, interrupts, until=until)
        return self._context.upload_from(ResumeBase(job=job_id, epoch=epoch, resumed=None, objects=left))

    def _hand_back(self, result: RunResult) -> None:
        """Upload what a later run needs, then hand the job back."""
        interrupts: Collection[Interrupt] = ("cancel", "deadline")
        if self._context.uploader is not None:
            self._context.uploader.finish(whole=False)
        self._retry(self._context.forwarder.send_all, interrupts)
        if self._context.uploader is not None:
            self._retry.wait(self._context.uploader.wait, interrupts)
        base = self._context.base
        if result.unreadable and base is not None and base.resumed is not None:
            store, resumed = self._deps.store, base.resumed
            self._retry(lambda: commits.put_rejected(store, self._job_id, self._epoch, resumed), interrupts)
        # A job without attempts left ends here, with everything of this run and not only with its last commit.
        error = self._retry(lambda: self._last_failure(result.handback), interrupts)
        if error is not None:
            self._finish("failed", error, otherwise=result.handback)
        else:
            self._release(result.handback)

    def _last_failure(self, handback: HandBack) -> FailureReport | None:
        """Return the job's failure if this run may still fail it; a command that arrived meanwhile is handled later."""
        if not handback.counts:
            return None
        record = self._deps.job_store.get(self._job_id)
        if record is None or record.epoch != self._epoch or record.status is not JobStatus.RUNNING:
            return None
        return last_failure(self._deps.write_once, record, handback)

    def _release(self, handback: HandBack) -> None:
        """Hand the job back: to the queue, to its pause, or to its end if it was lost too often or cancelled."""
        over = self._deps.stop.over
        released: list[bool] = []
        try:
            while not released:
                self._retry(
                    lambda: self._try_release(handback, released),
                    () if over else ("deadline",),
                    seconds=LAST_WORDS_SECONDS if over else None,
                )
        except Interrupted:
            self._release(handback)
        except TooSlow:
            self._context.log.warning("not_handed_back")  # the sweeper does it once the lease has expired
        except Fenced:
            if not released:
                raise

    def _try_release(self, handback: HandBack, released: list[bool]) -> None:
        deps = self._deps
        record = deps.job_store.get(self._job_id)
        if record is None:
            raise Unavailable("Valkey", "it has lost the record")
        if record.epoch < self._epoch:
            raise Unavailable("Valkey", "it has lost the claim")
        if record.epoch != self._epoch or record.status not in HELD:
            raise Fenced(f"epoch {self._epoch} of {self._job_id} is over")
        if hand_back(deps.job_store, deps.write_once, deps.wakeups, record, handback, by=deps.worker):
            released.append(True)

    def _cancel(self) -> None:
        """End the job within seconds: artifacts first if that is quick, then the outcome and the record."""
        until = time.monotonic() + CANCEL_UPLOAD_SECONDS
        late = False
        try:
            self._retry(self._context.forwarder.send_all, (), seconds=CANCEL_UPLOAD_SECONDS)
            manifest = self._upload_all("cancelled", None, (), until=until)
        except (TooSlow, OSError) as error:
            self._context.log.warning("cancelled_before_shipped", error=repr(error))
            manifest, late = object_keys.manifest(self._job_id, self._epoch), True
        outcome = self._outcome("cancelled", None, manifest)
        standing = self._put_cancelled(outcome, (), CANCEL_WRITE_SECONDS)
        self._context.lease.stop()
        if standing is None:
            late = True
            self._let_go()
            standing = self._put_cancelled(outcome, ("stop",), LATE_SECONDS)
        if standing is None:
            return  # the sweeper ends it
        self._settle(standing)
        if late and standing == outcome:
            self._upload_late()

    def _put_cancelled(self, outcome: Outcome, interrupts: Collection[Interrupt], seconds: float) -> Outcome | None:
        """Return the outcome in the bucket; None if storage does not answer, and then the job has no final state
        yet."""
        try:
            return self._retry(lambda: self._deps.write_once.put_outcome(outcome), interrupts, seconds=seconds)
        except (TooSlow, Interrupted) as error:
            self._context.log.warning("outcome_not_known", error=repr(error))
            return None

    def _let_go(self) -> None:
        """Let the lease expire now, so that a sweeper that reaches storage ends the job in its next round."""
        with contextlib.suppress(TooSlow):
            self._retry(
                lambda: self._deps.job_store.beat(self._job_id, epoch=self._epoch, lease_seconds=0),
                (),
                seconds=CANCEL_WRITE_SECONDS,
            )

    def _upload_late(self) -> None:
        """Upload the artifacts of a cancelled job after its end. A worker that was asked to stop gives up."""
        try:
            self._upload_all("cancelled", None, ("stop",), until=time.monotonic() + LATE_SECONDS)
        except Interrupted:
            self._context.log.warning("artifacts_lost", reason="the worker was asked to stop")
        except (TooSlow, OSError):
            self._context.log.exception("artifacts_lost")

    def _settle(self, standing: Outcome) -> None:
        """End the record. Without time left, the sweeper does it, by the outcome."""

        with contextlib.suppress(Interrupted):
            return self._retry(lambda: self._context.forwarder.settle(standing), ("deadline",))
        try:
            self._retry(lambda: self._context.forwarder.settle(standing), (), seconds=LAST_WORDS_SECONDS)
        except TooSlow:
            self._context.log.warning("not_settled")

    def _outcome(self, status: FinalStatus, error: FailureReport | None, manifest: str) -> Outcome:
        return Outcome(
            job=self._job_id,
            status=status,
            epoch=self._epoch,
            time=event_log.now_iso(),
            by=self._deps.worker,
            error=error.as_dict() if error else None,
            manifest=manifest,
        )

    def _set_phase(self, phase: Phase) -> None:
        """Set the phase, for displays, without waiting for an answer."""
        with contextlib.suppress(Unavailable):
            self._deps.job_store.change(self._job_id, epoch=self._epoch, fields={"phase": phase})


def _too_large(what: str) -> FailureReport:
    """Return the failure of a run whose files are not all in the bucket."""
    return FailureReport.of(
        FailureCode.RUN_TOO_LARGE,
        f"A file of the run was not uploaded: {what}.",
        hint="Keep fewer or smaller files, or raise GRPO_MAX_RUN_MB on the worker.",
        retryable=False,
    )
