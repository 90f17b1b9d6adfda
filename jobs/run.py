"""One run of one job, from claim to outcome: prepare the folder, watch the child, ship, write how it ended.

Owns the order of those steps and what each way of ending means. Invariant: nothing is written once the lease is
lost, and `outcome.json` is written before the record says that the job has ended.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import structlog

from grpo_core import strict_json
from grpo_core.datasets import UPLOAD_NAME, DatasetError
from grpo_core.errors import EXIT_CHECKPOINTED, EXIT_DONE, RETRYABLE, FailureReport, failure_class_of_exit
from grpo_core.spec import parse_spec
from jobs import journal
from jobs.archive import Archive, Ending, Manifest, Outcome
from jobs.child import Child, clean_environment
from jobs.datasets import DatasetStore
from jobs.ending import hand_back, settle
from jobs.errors import Fenced, NotFound, Unavailable
from jobs.lease import Lease
from jobs.ledger import JobEvent, Ledger
from jobs.outbox import Outbox
from jobs.record import HELD, JobRecord
from jobs.shipper import Shipper
from jobs.storage import ObjectStore
from jobs.tail import EventTail

log = structlog.get_logger()

T = TypeVar("T")

WATCH_SECONDS = 0.2
DRAIN_SECONDS = 120.0
"""How long a child that was asked to checkpoint may take before it is killed."""
KEEP_EVENTS_SECONDS = 7 * 24 * 3600.0
"""How long a finished job's events stay in Valkey; the bucket keeps them for good."""


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
    drain: threading.Event = field(default_factory=threading.Event)
    """Set when this worker was asked to stop."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How the child's life ended, before anything is written of it."""

    status: Ending | None
    """None: the job goes back to the queue."""
    error: FailureReport | None = None
    counts: bool = True
    """Whether a run that goes back counts as lost."""
    reason: str = ""


class JobRun:
    """The run of a job this worker has claimed. `execute` returns when the job has ended or was handed back."""

    def __init__(self, tools: Toolbox, record: JobRecord, epoch: int, folder: Path) -> None:
        self._tools = tools
        self._record = record
        self._epoch = epoch
        self._folder = folder
        self._lease = Lease(tools.ledger, record.id, epoch, tools.lease_seconds)
        self._shipper = Shipper(tools.store, tools.ledger, record.id, epoch, folder)
        self._tail = EventTail(folder / "events.jsonl")
        self._log = log.bind(job_id=record.id, epoch=epoch)

    def execute(self) -> None:
        """Train, ship and write the outcome; raises `Fenced` when the job is no longer ours."""
        self._lease.start()
        try:
            ended = self._train()
            self._log.info("run_ended", status=ended.status, reason=ended.reason)
            self._conclude(ended)
        finally:
            self._shipper.stop()
            self._lease.stop()

    def _train(self) -> Ended:
        try:
            self._prepare()
        except NotFound as error:
            report = FailureReport(failure_class="dataset", code="input_gone", message=str(error))
            return Ended(status="failed", error=report)
        except DatasetError as error:
            report = FailureReport(failure_class="dataset", code=error.code, message=str(error))
            return Ended(status="failed", error=report)
        if self._lease.cancelled:
            return Ended(status="cancelled")
        argv = (*self._tools.launcher, "spec.json", "--out", ".", "--epoch", str(self._epoch))
        child = Child(argv, self._folder, clean_environment(os.environ))
        self._log.info("child_started")
        self._shipper.start()
        try:
            return self._watch(child)
        finally:
            child.kill()

    def _prepare(self) -> None:
        """Write the spec and fetch what it names."""
        spec = parse_spec(self._record.spec)
        (self._folder / "spec.json").write_text(strict_json.dumps(spec.as_dict()), encoding="utf-8")
        inputs = self._folder / "inputs"
        if spec.data.source in ("upload", "s3"):
            fetch = self._tools.datasets.fetch
            self._patiently(lambda: fetch(spec.data, self._record.owner, inputs / UPLOAD_NAME))
        if spec.from_checkpoint is not None:
            self._fetch_checkpoint(spec.from_checkpoint.job, spec.from_checkpoint.step, inputs / "checkpoint")

    def _fetch_checkpoint(self, job_id: str, step: int, target: Path) -> None:
        store = self._tools.store
        prefix = self._patiently(lambda: journal.find_checkpoint(store, job_id, step))
        if prefix is None:
            raise NotFound("checkpoint", f"{step} of {job_id}")
        manifest = self._patiently(lambda: store.get_json(f"{prefix}manifest.json")) or {}
        for entry in manifest["files"]:
            name = Path(entry["path"]).name
            self._patiently(lambda n=name, e=entry: store.download(prefix + n, target / n, e["sha256"]))

    def _watch(self, child: Child) -> Ended:
        """Relay the child's events and obey its owner until it ends."""
        drained_at: float | None = None
        while True:
            exit_code = child.exit_code
            self._relay()
            if self._lease.lost:
                raise Fenced(f"epoch {self._epoch} of {self._record.id} is over")
            if self._lease.cancelled:
                return Ended(status="cancelled")
            if exit_code is not None:
                return self._read_exit(exit_code, drained=drained_at is not None)
            if drained_at is not None and time.monotonic() - drained_at > DRAIN_SECONDS:
                return Ended(status=None, counts=False, reason="The worker was stopped; the run took too long to save.")
            if self._tools.drain.is_set() and drained_at is None:
                drained_at = time.monotonic()
                child.terminate()
            time.sleep(WATCH_SECONDS)

    def _relay(self) -> None:
        """Send new events to the ledger; what an outage holds up is sent later."""
        self._tail.read()
        while True:
            first, batch = self._tail.batch()
            if not batch:
                return
            try:
                change = self._tools.ledger.change(
                    self._record.id,
                    from_statuses=HELD,
                    epoch=self._epoch,
                    fields=_progress(batch),
                    events=batch,
                    first_ordinal=first,
                )
            except Unavailable:
                return
            if not change.done:
                if change.refusal != "missing":
                    self._lease.lose()
                return
            self._tail.taken(change.shipped)

    def _read_exit(self, code: int, *, drained: bool) -> Ended:
        if code == EXIT_DONE:
            return Ended(status="succeeded")
        if code == EXIT_CHECKPOINTED or (drained and code < 0):
            return Ended(status=None, counts=False, reason="The worker was stopped.")
        error = self._failure(code)
        if error.failure_class in RETRYABLE:
            return Ended(status=None, error=error, reason=error.message)
        return Ended(status="failed", error=error)

    def _failure(self, code: int) -> FailureReport:
        """What the child said of its failure, or what its exit status tells."""
        said = self._tail.last_error
        if said is not None and code > 0:
            return FailureReport(
                failure_class=said["class"],
                code=said["code"],
                message=said["message"],
                hint=said.get("hint", ""),
                retryable=said.get("retryable", False),
            )
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        return FailureReport(
            failure_class=failure_class_of_exit(code),
            code="child_died",
            message=f"The training process ended by {how} and gave no reason.",
            hint="Its output is the artifact stderr.log.",
            retryable=code < 0,
        )

    def _conclude(self, ended: Ended) -> None:
        """Ship the rest, write manifest and outcome, then the record; or hand the job back."""
        self._patiently(self._relay_all)
        self._shipper.stop()
        if ended.status is None:
            self._hand_back(ended)
            return
        objects = self._patiently(self._shipper.finish)
        manifest = Manifest(job=self._record.id, epoch=self._epoch, objects=objects)
        key = self._patiently(lambda: self._tools.archive.put_manifest(manifest))
        self._still_mine()
        if self._lease.cancelled and ended.status != "cancelled":
            ended = Ended(status="cancelled")
        outcome = Outcome(
            job=self._record.id,
            status=ended.status or "failed",
            epoch=self._epoch,
            time=journal.now_iso(),
            by=self._tools.worker,
            error=ended.error.as_dict() if ended.error else None,
            manifest=key,
        )
        standing = self._patiently(lambda: self._tools.archive.put_outcome(outcome))
        self._patiently(
            lambda: settle(
                self._tools.ledger,
                self._record.id,
                standing,
                tell_error=self._tail.last_error is None,
                expire_events_seconds=KEEP_EVENTS_SECONDS,
            )
        )

    def _hand_back(self, ended: Ended) -> None:
        """Return the job to the queue; after too many lost runs this ends it."""
        tools = self._tools
        record = self._patiently(lambda: tools.ledger.get(self._record.id))
        if record is None or record.epoch != self._epoch:
            raise Fenced(f"epoch {self._epoch} of {self._record.id} is over")
        self._patiently(
            lambda: hand_back(
                tools.ledger, tools.archive, tools.outbox, record, reason=ended.reason, counts=ended.counts
            )
        )

    def _relay_all(self) -> None:
        """Send every event the child wrote; raises `Unavailable` while the ledger does not take them."""
        self._relay()
        if self._tail.batch()[1] and not self._lease.lost:
            raise Unavailable("Valkey", "events are waiting")

    def _still_mine(self) -> None:
        """Before the outcome: nobody has begun a later epoch."""
        latest = self._patiently(lambda: self._tools.archive.latest_epoch(self._record.id))
        if self._lease.lost or latest != self._epoch:
            raise Fenced(f"epoch {self._epoch} of {self._record.id} is over")

    def _patiently(self, action: Callable[[], T]) -> T:
        """Try until it works, as long as the job is ours: what was trained must outlive an outage."""
        delay = 0.5
        while True:
            try:
                return action()
            except Unavailable as error:
                self._log.warning("waiting", reason=str(error))
            if self._lease.lost:
                raise Fenced(f"epoch {self._epoch} of {self._record.id} is over")
            time.sleep(delay)
            delay = min(delay * 2, 15.0)


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
