"""How a run ends in the bucket and in the record: finished, handed back or cancelled.

Owns what is written when a run is over, in which order, and how long each write may take. Invariants: nothing is
written once the lease is lost, and `outcome.json` is written before the record says that the job has ended; only a
cancel, which was ordered in the bucket, does not wait for storage that has gone away since.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection

from grpo_core.errors import FailureReport
from jobs import journal, layout, lineage
from jobs.archive import Ending, Manifest, ManifestEntry, Outcome
from jobs.ending import Lapse, hand_back, last_failure, settle
from jobs.errors import Fenced, Unavailable
from jobs.lineage import Base
from jobs.patience import Interrupted, Order, TooSlow
from jobs.record import HELD, JobStatus, Phase
from jobs.report import write_report
from jobs.shipper import Shipper
from jobs.tenure import Tenure
from jobs.verdict import Ended, broken_machine

CANCEL_SHIP_SECONDS = 2.0
CANCEL_WRITE_SECONDS = 1.0
"""What a cancel may spend on the artifacts, and then on its outcome, before the record says that it is done."""
LATE_SECONDS = 300.0
"""How long a cancelled job's artifacts are tried for after that."""
LAST_WORDS_SECONDS = 5.0
"""For telling the record how a run ended, once the grace time is over."""


class Conclusion:
    """Ends one tenure."""

    def __init__(self, tenure: Tenure) -> None:
        self._tenure = tenure
        self._tools = tenure.tools
        self._patience = tenure.patience
        self._job_id, self._epoch = tenure.job_id, tenure.epoch

    def write(self, ended: Ended) -> None:
        """Write how the run ended; a cancel that comes meanwhile goes before all else."""
        try:
            if ended.status is None:
                self._give_back(ended)
            elif ended.status == "cancelled":
                self._cancel()
            else:
                self._finish(ended.status, ended.error)
        except Interrupted as order:
            if order.order == "cancel":
                self._cancel()
            else:
                self._release(ended.lapse)  # that time ran out does not change why it goes back

    def _finish(self, status: Ending, error: FailureReport | None, *, otherwise: Lapse | None = None) -> None:
        """Ship the rest, write manifest and outcome, then the record.

        Where this machine cannot, the job goes back: as `otherwise` says, or because of that.
        """
        heed: Collection[Order] = ("cancel", "deadline")
        self._patience(self._tenure.relay.send_all, heed)
        self._set_phase("uploading")
        try:
            manifest = self._ship_all(status, error, heed)
        except OSError as broken:
            machine = broken_machine(broken, self._tenure.folder.parent, log=self._tenure.log)
            self._release(otherwise or machine.lapse)
            return
        if not self._patience(self._is_mine, heed):
            raise Fenced(f"epoch {self._epoch} of {self._job_id} is over")
        outcome = self._outcome(status, error, manifest)
        standing = self._patience(lambda: self._tools.archive.put_outcome(outcome), heed)
        self._tenure.lease.stop()
        self._settle(standing)

    def _is_mine(self) -> bool:
        """Whether no later run has the job. A later ticket alone is none: its worker may have failed to claim."""
        change = self._tools.ledger.beat(self._job_id, epoch=self._epoch, lease_seconds=None)
        if change.refusal == "missing":
            return self._tools.archive.latest_epoch(self._job_id) == self._epoch
        return change.done

    def _ship_all(
        self, status: Ending, error: FailureReport | None, heed: Collection[Order], *, until: float | None = None
    ) -> str:
        """Send everything and write the manifest; returns its key."""
        shipper = self._tenure.shipper or self._start_shipper(heed, until)
        write_report(self._tenure, status, error, heed, until=until)
        shipper.finish(whole=True)
        self._patience.wait(shipper.wait, heed, until=until)
        if shipper.error is not None:
            raise shipper.error
        manifest = Manifest(job=self._job_id, epoch=self._epoch, objects=shipper.objects)
        return self._patience(lambda: self._tools.archive.put_manifest(manifest), heed, until=until)

    def _start_shipper(self, heed: Collection[Order], until: float | None) -> Shipper:
        """For a run that ended before it knew its base: what earlier runs committed stays valid all the same."""
        store, job_id, epoch = self._tools.store, self._job_id, self._epoch

        def find() -> list[ManifestEntry]:
            return lineage.inherited(store, job_id, epoch, lineage.newest_commit(store, job_id, epoch - 1))

        left = self._patience(find, heed, until=until)
        return self._tenure.ship_from(Base(job=job_id, epoch=epoch, resumed=None, objects=left))

    def _give_back(self, ended: Ended) -> None:
        """Send what a later run needs, then return the job."""
        heed: Collection[Order] = ("cancel", "deadline")
        if self._tenure.shipper is not None:
            self._tenure.shipper.finish(whole=False)
        self._patience(self._tenure.relay.send_all, heed)
        if self._tenure.shipper is not None:
            self._patience.wait(self._tenure.shipper.wait, heed)
        base = self._tenure.base
        if ended.unreadable and base is not None and base.resumed is not None:
            store, resumed = self._tools.store, base.resumed
            self._patience(lambda: lineage.put_rejected(store, self._job_id, self._epoch, resumed), heed)
        # A job that has no attempt left ends here, with all that this run did, rather than with what it committed.
        error = self._patience(lambda: self._last_failure(ended.lapse), heed)
        if error is not None:
            self._finish("failed", error, otherwise=ended.lapse)
        else:
            self._release(ended.lapse)

    def _last_failure(self, lapse: Lapse) -> FailureReport | None:
        """How the job fails if it is still this run's to fail; an order that came meanwhile is the hand-back's."""
        if not lapse.counts:
            return None
        record = self._tools.ledger.get(self._job_id)
        if record is None or record.epoch != self._epoch or record.status is not JobStatus.RUNNING:
            return None
        return last_failure(self._tools.archive, record, lapse)

    def _release(self, lapse: Lapse) -> None:
        """Return the job: to the queue, to its pause, or to its end where it was lost too often or cancelled."""
        over = self._tools.stop.over
        released: list[bool] = []
        try:
            while not released:
                self._patience(
                    lambda: self._try_release(lapse, released),
                    () if over else ("deadline",),
                    seconds=LAST_WORDS_SECONDS if over else None,
                )
        except Interrupted:
            self._release(lapse)
        except TooSlow:
            self._tenure.log.warning("not_handed_back")  # the sweeper does it, once the lease has run out
        except Fenced:
            if not released:
                raise

    def _try_release(self, lapse: Lapse, released: list[bool]) -> None:
        tools = self._tools
        record = tools.ledger.get(self._job_id)
        if record is None:
            raise Unavailable("Valkey", "it has lost the record")
        if record.epoch != self._epoch or record.status not in HELD:
            raise Fenced(f"epoch {self._epoch} of {self._job_id} is over")
        if hand_back(tools.ledger, tools.archive, tools.outbox, record, lapse, by=tools.worker):
            released.append(True)

    def _cancel(self) -> None:
        """End the job within seconds: artifacts first if that is quick, the record in any case."""
        until = time.monotonic() + CANCEL_SHIP_SECONDS
        late = False
        try:
            self._patience(self._tenure.relay.send_all, (), seconds=CANCEL_SHIP_SECONDS)
            manifest = self._ship_all("cancelled", None, (), until=until)
        except (TooSlow, OSError) as error:
            self._tenure.log.warning("cancelled_before_shipped", error=repr(error))
            manifest, late = layout.manifest(self._job_id, self._epoch), True
        outcome = self._outcome("cancelled", None, manifest)
        try:
            standing = self._patience(
                lambda: self._tools.archive.put_outcome(outcome), (), seconds=CANCEL_WRITE_SECONDS
            )
        except TooSlow:
            standing, late = outcome, True  # the order stands in the bucket: it outranks the record
        self._tenure.lease.stop()
        self._settle(standing)
        if late:
            self._ship_late(outcome)

    def _ship_late(self, outcome: Outcome) -> None:
        """What a cancel did not wait for. The job has ended, so nobody else writes; a worker asked to stop gives up."""
        try:
            self._patience(lambda: self._tools.archive.put_outcome(outcome), ("stop",), seconds=LATE_SECONDS)
            self._ship_all("cancelled", None, ("stop",), until=time.monotonic() + LATE_SECONDS)
        except Interrupted:
            self._tenure.log.warning("artifacts_lost", reason="the worker was asked to stop")
        except (TooSlow, OSError):
            self._tenure.log.exception("artifacts_lost")

    def _settle(self, standing: Outcome) -> None:
        """Bring the record to its end. A worker that has no more time leaves it to the sweeper: the outcome stands."""

        def write() -> None:
            settle(self._tools.ledger, self._job_id, standing, tell_error=True)

        with contextlib.suppress(Interrupted):
            return self._patience(write, ("deadline",))
        try:
            self._patience(write, (), seconds=LAST_WORDS_SECONDS)
        except TooSlow:
            self._tenure.log.warning("not_settled")

    def _outcome(self, status: Ending, error: FailureReport | None, manifest: str) -> Outcome:
        return Outcome(
            job=self._job_id,
            status=status,
            epoch=self._epoch,
            time=journal.now_iso(),
            by=self._tools.worker,
            error=error.as_dict() if error else None,
            manifest=manifest,
        )

    def _set_phase(self, phase: Phase) -> None:
        """For displays only: it is not waited for."""
        with contextlib.suppress(Unavailable):
            self._tools.ledger.change(self._job_id, epoch=self._epoch, fields={"phase": phase})
