"""What a run's end does where somebody else has a say in it: Valkey is away, or its owner cancelled meanwhile."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal, cast

import pytest

from grpo_core.spec import parse_spec
from jobs import conclusion
from jobs.archive import Archive, Outcome
from jobs.conclusion import Conclusion
from jobs.ending import LOST, MAX_ATTEMPTS
from jobs.journal import now_iso
from jobs.ledger import Ledger
from jobs.record import record_of
from jobs.service import JobService
from jobs.settings import QueueSettings
from jobs.stopping import StopOrder
from jobs.tenure import Tenure, Toolbox


def test_a_worker_that_is_to_stop_leaves_the_record_to_the_sweeper(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(conclusion, "LAST_WORDS_SECONDS", 0.5)
    nobody = Ledger(QueueSettings.model_validate({"redis_url": "redis://127.0.0.1:9/0", "prefix": "none"}))
    asked = {"id": "job-1", "owner": "ann", "created_at": "2026-01-01T00:00:00+00:00", "queue": "grpo.cpu"}
    record = record_of({**asked, "spec": parse_spec({}).as_dict(), "spec_sha256": "0"})
    stop = StopOrder(1.0)
    tools = toolbox(nobody, stop=stop)
    stop.give()
    began = time.monotonic()
    Conclusion(Tenure(tools, record, 1, tmp_path))._settle(
        Outcome(job="job-1", status="succeeded", epoch=1, time="2026-01-01T00:00:00Z", by="w")
    )
    assert 1.0 < time.monotonic() - began < 8


@pytest.mark.parametrize("order", [None, "cancel", "pause"])
def test_a_job_that_was_ordered_something_does_not_fail_of_its_last_lost_run(
    service: JobService, tmp_path: Path, order: Literal["cancel", "pause"] | None
) -> None:
    """The order is in the record before the worker's next beat tells it."""
    job = service.submit(parse_spec({"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}}), "ann")
    assert service.archive.allocate_epoch(job.id, "w", now_iso()) == 1
    assert service.ledger.claim(job.id, epoch=1, worker="w", lease_seconds=60)
    service.ledger.change(job.id, fields={"attempts": MAX_ATTEMPTS - 1})
    if order is not None:
        {"cancel": service.cancel, "pause": service.pause}[order](job.id, "ann")
    tools = toolbox(service.ledger, archive=service.archive)
    failure = Conclusion(Tenure(tools, service.get(job.id, "ann"), 1, tmp_path))._last_failure(LOST)
    assert (failure and failure.code) == (None if order else "attempts_used_up")


def toolbox(ledger: Ledger, *, archive: Archive | None = None, stop: StopOrder | None = None) -> Toolbox:
    none = cast("Any", None)
    return Toolbox(
        worker="w",
        ledger=ledger,
        archive=archive or none,
        store=none,
        datasets=none,
        outbox=none,
        lease_seconds=60,
        launcher=(),
        stop=stop or StopOrder(1.0),
    )
