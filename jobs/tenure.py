"""What a worker has in hand while it holds a job: the record, its epoch, folder and lease, and the copy in the bucket.

Owns none of the decisions: `run` trains with it and `conclusion` ends it. Invariant: at most one shipper at a time
writes below the epoch's prefix, and it stops when the tenure does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import structlog

from jobs.archive import Archive
from jobs.datasets import DatasetStore
from jobs.lease import Lease
from jobs.ledger import Ledger
from jobs.lineage import Base
from jobs.outbox import Outbox
from jobs.patience import Patience
from jobs.record import JobRecord
from jobs.relay import Relay
from jobs.shipper import Shipper
from jobs.stall import StallLimits
from jobs.stopping import StopOrder
from jobs.storage import ObjectStore


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


class Tenure:
    """One epoch of one job, from claim to release."""

    def __init__(self, tools: Toolbox, record: JobRecord, epoch: int, folder: Path) -> None:
        self.tools = tools
        self.record = record
        self.epoch = epoch
        self.folder = folder
        self.lease = Lease(tools.ledger, record.id, epoch, tools.lease_seconds)
        self.patience = Patience(self.lease, tools.stop)
        self.relay = Relay(tools.ledger, self.lease, record.id, epoch, folder)
        self.base: Base | None = None
        """What the run was resumed from; None until that is known."""
        self.shipper: Shipper | None = None
        """None until there is a base to ship from."""
        self.log = structlog.get_logger().bind(job_id=record.id, epoch=epoch)

    @property
    def job_id(self) -> str:
        return self.record.id

    def begin(self) -> None:
        """Keep the lease from now on."""
        self.lease.start()

    def end(self) -> None:
        """Let go of everything; safe to repeat."""
        if self.shipper is not None:
            self.shipper.abandon()
        self.lease.stop()

    def ship_from(self, base: Base) -> Shipper:
        """Begin to copy the folder into the bucket, on top of what the base lists."""
        tools = self.tools
        self.shipper = Shipper(tools.store, tools.ledger, self.lease, self.job_id, self.epoch, self.folder, base)
        self.shipper.start()
        return self.shipper
