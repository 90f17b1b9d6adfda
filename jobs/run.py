"""One run of one job, from claim to outcome: prepare the folder, watch the child, ship, write how it ended.

Owns the order of those steps, and what is written when a run ends, is handed back or is cancelled. Invariant: nothing
is written once the lease is lost, and `outcome.json` is written before the record says that the job has ended; only a
cancel, which was ordered in the bucket, does not wait for storage that has gone away since.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from grpo_core import report_page
from grpo_core.datasets import DatasetError
from grpo_core.errors import FailureReport
from grpo_core.spec import JobSpec, parse_spec
from jobs import journal, layout, lineage
from jobs.archive import Archive, Ending, Manifest, Outcome
from jobs.child import Child, clean_environment
from jobs.datasets import DatasetStore
from jobs.ending import STOPPED, Lapse, hand_back, settle
from jobs.errors import Damaged, Fenced, NotFound, Unavailable
from jobs.lease import Lease
from jobs.ledger import JobEvent, Ledger
from jobs.lineage import Base
from jobs.outbox import Outbox
from jobs.patience import Interrupted, Order, Patience, TooSlow
from jobs.preparation import Preparation
from jobs.record import HELD, JobRecord, Phase
from jobs.shipper import Shipper
from jobs.stall import StallLimits
from jobs.stopping import StopOrder
from jobs.storage import ObjectStore
from jobs.watch import Ended, Relay, Watch, disk_full

log = structlog.get_logger()

KEEP_EVENTS_SECONDS = 7 * 24 * 3600.0
"""How long a finished job's events stay in Valkey; the bucket keeps them for good."""
CANCEL_SHIP_SECONDS = 2.0
CANCEL_WRITE_SECONDS = 1.0
"""What a cancel may spend on the artifacts, and then on its outcome, before the record says that it is done."""
LATE_SECONDS = 300.0
"""How long a cancelled job's artifacts are tried for after that."""
LAST_WORDS_SECONDS = 5.0
"""For telling the record how a run ended, once the grace time is over."""


@dataclass(frozen=True, kw_only=True)
class Toolbox:
    """What every run of a worker shares."""

    worker: str
    ledger: Ledger
    archive: Archive
    store: ObjectStore
    datasets: DatasetStore
    outbox: Outbox
    lease_seconds: float
    launcher: tuple[str, ...]
    """The training command, to which the spec and the folder are added."""
    stop: StopOrder
    stall_limits: StallLimits = field(default_factory=StallLimits)


class JobRun:
    """The run of a job this worker has claimed. `execute` returns when the job has ended or was handed back."""

    def __init__(self, tools: Toolbox, record: JobRecord, epoch: int, folder: Path) -> None:
        self._tools = tools
        self._record = record
        self._spec: JobSpec = parse_spec(record.spec)
        self._epoch = epoch
        self._folder = folder
        self._lease = Lease(tools.ledger, record.id, epoch, tools.lease_seconds)
        self._patience = Patience(self._lease, tools.stop)
        self._relay = Relay(tools.ledger, self._lease, record.id, epoch, folder)
        self._shipper: Shipper | None = None
        self._base: Base | None = None
        self._log = log.bind(job_id=record.id, epoch=epoch)

    def execute(self) -> None:
        """Train, ship and write the outcome; raises `Fenced` when the job is no longer ours."""
        self._lease.start()
        try:
            ended = self._train()
            self._log.info("run_ended", status=ended.status, lapse=ended.lapse.report and ended.lapse.report.code)
            self._conclude(ended)
        finally:
            if self._shipper is not None:
                self._shipper.abandon()
            self._lease.stop()

    def _train(self) -> Ended:
        try:
            base = self._prepare()
        except Interrupted as order:
            return Ended(status="cancelled") if order.order == "cancel" else Ended(status=None, lapse=self._asked())
        except NotFound as error:
            return _failed(FailureReport(failure_class="dataset", code="input_gone", message=str(error)))
        except Damaged as error:
            message = f"An object that the job needs is not what it was: {error}."
            return _failed(FailureReport(failure_class="dataset", code="input_damaged", message=message))
        except DatasetError as error:
            return _failed(FailureReport(failure_class="dataset", code=error.code, message=str(error)))
        except OSError as error:
            return self._broken(error)
        environment = clean_environment(os.environ, trackers=self._spec.training.report_to)
        try:
            child = Child(self._argv(base), self._folder, environment)
            self._log.info("child_started", resumed=base.resumed and base.resumed.step)
            return self._watch(child, base)
        except OSError as error:
            return self._broken(error)

    def _prepare(self) -> Base:
        tools = self._tools
        start = Preparation(tools.store, tools.datasets, self._patience, self._folder).prepare(
            self._record, self._spec, self._epoch
        )
        self._base = start.base
        if start.warnings:
            self._tell(*start.warnings)
        self._ship_from(start.base)
        return start.base

    def _argv(self, base: Base) -> tuple[str, ...]:
        parts = base.gradient_accumulation
        split = ("--gradient-accumulation", str(parts)) if parts else ()
        return (*self._tools.launcher, "spec.json", "--out", ".", "--epoch", str(self._epoch), *split)

    def _watch(self, child: Child, base: Base) -> Ended:
        tools = self._tools
        return Watch(
            child,
            self._relay,
            self._lease,
            tools.stop,
            folder=self._folder,
            spec=self._spec,
            base=base,
            limits=tools.stall_limits,
        ).run()

    def _conclude(self, ended: Ended) -> None:
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

    def _finish(self, status: Ending, error: FailureReport | None) -> None:
        """Ship the rest, write manifest and outcome, then the record."""
        heed: Collection[Order] = ("cancel", "deadline")
        self._patience(self._relay.send_all, heed)
        self._set_phase("uploading")
        try:
            manifest = self._ship_all(status, error, heed)
        except OSError as broken:
            self._release(self._broken(broken).lapse)
            return
        if not self._patience(self._is_mine, heed):
            raise Fenced(f"epoch {self._epoch} of {self._record.id} is over")
        outcome = self._outcome(status, error, manifest)
        standing = self._patience(lambda: self._tools.archive.put_outcome(outcome), heed)
        self._lease.stop()
        self._settle(standing)

    def _is_mine(self) -> bool:
        """Whether no later run has the job. A later ticket alone is none: its worker may have failed to claim."""
        change = self._tools.ledger.beat(self._record.id, epoch=self._epoch, lease_seconds=None)
        if change.refusal == "missing":
            return self._tools.archive.latest_epoch(self._record.id) == self._epoch
        return change.done

    def _ship_all(
        self, status: Ending, error: FailureReport | None, heed: Collection[Order], *, until: float | None = None
    ) -> str:
        """Send everything and write the manifest; returns its key."""
        shipper = self._shipper or self._patience(self._start_shipper, heed, seconds=_left(until))
        self._patience(lambda: write_report_page(self._folder, status, error), heed, seconds=_left(until))
        shipper.finish(whole=True)
        self._patience.wait(shipper.wait, heed, until=until)
        if shipper.error is not None:
            raise shipper.error
        manifest = Manifest(job=self._record.id, epoch=self._epoch, objects=shipper.objects)
        return self._patience(lambda: self._tools.archive.put_manifest(manifest), heed, seconds=_left(until))

    def _start_shipper(self) -> Shipper:
        """For a run that ended before it knew its base: what earlier runs committed stays valid all the same."""
        commit = lineage.newest_commit(self._tools.store, self._record.id, self._epoch - 1)
        base = Base(job=self._record.id, epoch=self._epoch, resumed=None, objects=commit.objects if commit else [])
        return self._ship_from(base)

    def _ship_from(self, base: Base) -> Shipper:
        tools = self._tools
        self._shipper = Shipper(
            tools.store, tools.ledger, self._lease, self._record.id, self._epoch, self._folder, base
        )
        self._shipper.start()
        return self._shipper

    def _give_back(self, ended: Ended) -> None:
        """Send what a later run needs, then return the job."""
        heed: Collection[Order] = ("cancel", "deadline")
        if self._shipper is not None:
            self._shipper.finish(whole=False)
        self._patience(self._relay.send_all, heed)
        if self._shipper is not None:
            self._patience.wait(self._shipper.wait, heed)
        base = self._base
        if ended.unreadable and base is not None and base.resumed is not None:
            store, resumed = self._tools.store, base.resumed
            self._patience(lambda: lineage.put_rejected(store, self._record.id, self._epoch, resumed), heed)
        self._release(ended.lapse)

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
            self._log.warning("not_handed_back")  # the sweeper does it, once the lease has run out
        except Fenced:
            if not released:
                raise

    def _try_release(self, lapse: Lapse, released: list[bool]) -> None:
        tools = self._tools
        record = tools.ledger.get(self._record.id)
        if record is None:
            raise Unavailable("Valkey", "it has lost the record")
        if record.epoch != self._epoch or record.status not in HELD:
            raise Fenced(f"epoch {self._epoch} of {self._record.id} is over")
        if hand_back(tools.ledger, tools.archive, tools.outbox, record, lapse, by=tools.worker):
            released.append(True)

    def _cancel(self) -> None:
        """End the job within seconds: artifacts first if that is quick, the record in any case."""
        until = time.monotonic() + CANCEL_SHIP_SECONDS
        late = False
        try:
            self._patience(self._relay.send_all, (), seconds=CANCEL_SHIP_SECONDS)
            manifest = self._ship_all("cancelled", None, (), until=until)
        except (TooSlow, OSError) as error:
            self._log.warning("cancelled_before_shipped", error=repr(error))
            manifest, late = layout.manifest(self._record.id, self._epoch), True
        outcome = self._outcome("cancelled", None, manifest)
        try:
            standing = self._patience(
                lambda: self._tools.archive.put_outcome(outcome), (), seconds=CANCEL_WRITE_SECONDS
            )
        except TooSlow:
            standing, late = outcome, True  # the order stands in the bucket: it outranks the record
        self._lease.stop()
        self._settle(standing)
        if late:
            self._ship_late(outcome)

    def _ship_late(self, outcome: Outcome) -> None:
        """What a cancel did not wait for. The job has ended, so nobody else writes; a worker asked to stop gives up."""
        try:
            self._patience(lambda: self._tools.archive.put_outcome(outcome), ("stop",), seconds=LATE_SECONDS)
            self._ship_all("cancelled", None, ("stop",), until=time.monotonic() + LATE_SECONDS)
        except (Interrupted, TooSlow, OSError) as error:
            self._log.error("artifacts_lost", error=repr(error))

    def _settle(self, standing: Outcome) -> None:
        """Bring the record to its end. A worker that has no more time leaves it to the sweeper: the outcome stands."""

        def write() -> None:
            keep = KEEP_EVENTS_SECONDS
            settle(self._tools.ledger, self._record.id, standing, tell_error=True, expire_events_seconds=keep)

        with contextlib.suppress(Interrupted):
            return self._patience(write, ("deadline",))
        try:
            self._patience(write, (), seconds=LAST_WORDS_SECONDS)
        except TooSlow:
            self._log.warning("not_settled")

    def _outcome(self, status: Ending, error: FailureReport | None, manifest: str) -> Outcome:
        return Outcome(
            job=self._record.id,
            status=status,
            epoch=self._epoch,
            time=journal.now_iso(),
            by=self._tools.worker,
            error=error.as_dict() if error else None,
            manifest=manifest,
        )

    def _asked(self) -> Lapse:
        """Of a run that was asked to end before its child began."""
        return STOPPED if self._tools.stop.asked else Lapse(counts=False)

    def _broken(self, error: OSError) -> Ended:
        """The machine failed the run, which another may cure."""
        self._log.error("machine_failed", error=repr(error))
        return Ended(status=None, lapse=Lapse(report=machine_failure(error, self._folder.parent)))

    def _tell(self, *events: JobEvent) -> None:
        """Tell the owner something that the child did not."""
        ledger = self._tools.ledger
        self._patience(
            lambda: ledger.change(self._record.id, epoch=self._epoch, events=events), ("cancel", "pause", "stop")
        )

    def _set_phase(self, phase: Phase) -> None:
        """For displays only: it is not waited for."""
        with contextlib.suppress(Unavailable):
            self._tools.ledger.change(self._record.id, epoch=self._epoch, fields={"phase": phase})


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


def write_report_page(folder: Path, status: Ending, error: FailureReport | None) -> None:
    """Leave `report.html` for people, of a run that has begun. It is never worth a job."""
    if not (folder / "events.jsonl").exists():
        return
    try:
        report_page.write(folder, status=status, error=error.as_dict() if error else None)
    except Exception:  # whatever a page may trip over, the numbers are all in other files
        log.exception("report_page_failed", folder=folder.name)


def _failed(report: FailureReport) -> Ended:
    return Ended(status="failed", error=report)


def _left(until: float | None) -> float | None:
    return None if until is None else max(0.1, until - time.monotonic())
