"""The time limit of a job over all its runs: `GRPO_MAX_JOB_HOURS`.

The worker that holds the job ends it: it sends TERM, so that the run saves a checkpoint, uploads everything, and sets
`failed`. If a worker does not, such as one of an older release, the sweeper ends the job some minutes later, with the
objects of the last commit. Invariant: only time during which a worker holds the job counts, not waiting or pauses.
"""

from __future__ import annotations

from datetime import UTC, datetime

import structlog
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from grpo_core.errors import FailureReport
from grpo_core.reasons import FailureCode
from jobs.lifecycle.outcomes import apply_outcome, write_outcome
from jobs.lifecycle.recovery import apart
from jobs.store.job import HELD
from jobs.store.job_store import JobStore, guarded
from jobs.store.write_once import WriteOnceStore

log = structlog.get_logger()

GRACE_SECONDS = 900.0
"""Time that the sweeper gives a worker to end the job itself; the worker gives its run ten minutes to save."""


class TimeLimitSettings(BaseSettings):
    """The time limit; equal in all processes."""

    model_config = SettingsConfigDict(frozen=True, populate_by_name=True, extra="ignore")

    hours: float = Field(default=720, ge=0, le=1_000_000, validation_alias="GRPO_MAX_JOB_HOURS")
    """Hours that the runs of a job may take together; 0 means no limit."""

    @property
    def seconds(self) -> float | None:
        """The limit, or None."""
        return self.hours * 3600 or None


def over_time(seconds: float) -> FailureReport:
    """Return the failure of a job whose runs took `seconds`."""
    return FailureReport.of(
        FailureCode.TIME_LIMIT,
        f"The job's runs took {seconds / 3600:.4g} hours together, which is the limit of this service.",
        hint="Start another job from its last checkpoint (from_checkpoint) for the remaining steps, or ask the "
        "service's operator for a higher GRPO_MAX_JOB_HOURS.",
    )


class Overdue:
    """Ends overdue jobs whose workers have not ended them."""

    def __init__(
        self, job_store: JobStore, write_once: WriteOnceStore, settings: TimeLimitSettings | None = None
    ) -> None:
        self._job_store = job_store
        self._write_once = write_once
        self._seconds = (settings or TimeLimitSettings()).seconds

    def jobs(self, *, grace_seconds: float = 0.0) -> list[str]:
        """Return the jobs whose runs exceed the limit by more than `grace_seconds`."""
        if self._seconds is None:
            return []
        held: list[str] = guarded(lambda: self._job_store.client.zrange(f"{self._job_store.prefix}:leases", 0, -1))
        now = datetime.fromtimestamp(self._job_store.now_ms() / 1000, UTC)
        times = self._job_store.times(held)
        return [
            job for job, (run_at, run_ms) in times.items() if _ran(run_at, run_ms, now) > self._seconds + grace_seconds
        ]

    def end(self) -> None:
        """End jobs that are overdue by more than the grace time. Raises `Unavailable`."""
        if self._seconds is None:
            return
        error = over_time(self._seconds).as_dict()
        for job_id in self.jobs(grace_seconds=GRACE_SECONDS):
            with apart(job_id, self._write_once.store):
                self._end(job_id, error)

    def _end(self, job_id: str, error: dict[str, object]) -> None:
        record = self._job_store.get(job_id)
        if record is None or record.status not in HELD or record.restored:
            return  # the run of a restored job may have ended before Valkey was lost; its lease decides
        outcome = write_outcome(
            self._write_once, job_id, "failed", by="sweeper", error=error, job_store=self._job_store
        )
        apply_outcome(self._job_store, job_id, outcome, add_error=True)
        log.warning("job_overdue", job_id=job_id, epoch=record.epoch, worker=record.worker)


def _ran(run_at: int, run_ms: int, now: datetime) -> float:
    return run_ms / 1000 + (max(0.0, now.timestamp() - run_at / 1000) if run_at else 0.0)
