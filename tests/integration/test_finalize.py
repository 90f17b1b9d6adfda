"""What a run's end does where somebody else has a say in it: Valkey is away, or its owner cancelled meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import pytest

from grpo_core.errors import FailureReport
from grpo_core.spec import parse_spec
from jobs.errors import Conflict
from jobs.lifecycle.celery_app import WakeupSender
from jobs.lifecycle.commands import Commands
from jobs.lifecycle.outcomes import LOST, MAX_ATTEMPTS, HandBack
from jobs.lifecycle.rebuild import Rebuild
from jobs.lifecycle.sweeper import Sweeper
from jobs.lifecycle.wakeups import WakeupPublisher
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store.bucket import ObjectStore
from jobs.store.event_log import now_iso
from jobs.store.job import TERMINAL, JobStatus, record_of
from jobs.store.job_store import JobStore
from jobs.store.write_once import Outcome, WriteOnceStore
from jobs.worker import finalize
from jobs.worker.exit_status import RunResult
from jobs.worker.finalize import Finalizer
from jobs.worker.run_context import RunContext, WorkerDeps
from jobs.worker.shutdown import GracefulShutdown
from tests.clock import patience

SPEC = parse_spec({"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}})


def test_a_worker_that_is_to_stop_leaves_the_record_to_the_sweeper(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(finalize, "LAST_WORDS_SECONDS", 0.5)
    nobody = JobStore(QueueSettings.model_validate({"redis_url": "redis://127.0.0.1:9/0", "prefix": "none"}))
    asked = {"id": "job-1", "owner": "ann", "created_at": "2026-01-01T00:00:00+00:00", "queue": "grpo.cpu"}
    record = record_of({**asked, "spec": parse_spec({}).as_dict(), "spec_sha256": "0"})
    stop = GracefulShutdown(1.0)
    deps = worker_deps(nobody, stop=stop)
    stop.give()
    began = time.monotonic()
    Finalizer(RunContext(deps, record, 1, tmp_path))._settle(
        Outcome(job="job-1", status="succeeded", epoch=1, time="2026-01-01T00:00:00Z", by="w")
    )
    assert 1.0 < time.monotonic() - began < patience(8)


@pytest.mark.parametrize("interrupt", [None, "cancel", "pause"])
def test_a_job_that_was_ordered_something_does_not_fail_of_its_last_lost_run(
    service: JobService, tmp_path: Path, interrupt: Literal["cancel", "pause"] | None
) -> None:
    """The order is in the record before the worker's next beat tells it."""
    job = service.submit(SPEC, "ann")
    assert service.write_once.allocate_epoch(job.id, "w", now_iso()) == 1
    assert service.job_store.claim(job.id, epoch=1, worker="w", lease_seconds=60)
    service.job_store.change(job.id, fields={"attempts": MAX_ATTEMPTS - 1})
    if interrupt is not None:
        {"cancel": service.cancel, "pause": service.pause}[interrupt](job.id, "ann")
    deps = worker_deps(service.job_store, write_once=service.write_once)
    failure = Finalizer(RunContext(deps, service.get(job.id, "ann"), 1, tmp_path))._last_failure(LOST)
    assert (failure and failure.code) == (None if interrupt else "attempts_used_up")


def test_a_job_that_could_not_fetch_its_model_says_so_and_not_that_runs_were_lost(
    service: JobService, tmp_path: Path
) -> None:
    job = service.submit(SPEC, "ann")
    away = FailureReport.of("hub_unreachable", "The model 'x' is not here.", hint="Put it here.")
    deps = worker_deps(service.job_store, write_once=service.write_once, store=service.store, wakeups=service._wakeups)
    for epoch in range(1, MAX_ATTEMPTS + 1):
        assert service.write_once.allocate_epoch(job.id, "w", now_iso()) == epoch
        assert service.job_store.claim(job.id, epoch=epoch, worker="w", lease_seconds=60)
        context = RunContext(deps, service.get(job.id, "ann"), epoch, tmp_path)
        Finalizer(context).write(RunResult(status=None, handback=HandBack(report=away)))
        context.end()
    ended = service.get(job.id, "ann")
    assert ended.error is not None
    assert (ended.status, ended.error["class"], ended.error["code"]) == ("failed", "infra", "hub_unreachable")
    assert ended.error["message"] == "The model 'x' is not here. 3 runs waited for it in vain."
    told = [event for event in service.job_store.events(job.id, after=0, limit=100) if event["type"] == "warning"]
    assert [event["data"]["message"] for event in told] == [
        f"The model 'x' is not here. The job tries again; this was attempt {n} of 3." for n in (1, 2)
    ]


def test_a_cancel_is_obeyed_though_valkey_has_lost_the_record(service: JobService, tmp_path: Path) -> None:
    job = service.submit(SPEC, "ann")
    assert service.write_once.allocate_epoch(job.id, "w", now_iso()) == 1
    assert service.job_store.claim(job.id, epoch=1, worker="w", lease_seconds=60)
    record = service.get(job.id, "ann")
    assert service.cancel(job.id, "ann").status is JobStatus.CANCELLING
    service.job_store.forget(job.id)
    context = RunContext(
        worker_deps(service.job_store, write_once=service.write_once, store=service.store), record, 1, tmp_path
    )
    Finalizer(context).write(RunResult(status="succeeded"))
    context.end()
    outcome = service.write_once.outcome(job.id)
    assert outcome is not None
    assert outcome.status == "cancelled"


class LateStore(ObjectStore):
    """Storage whose answers about an outcome do not come while it is silent, whatever it has taken."""

    def __init__(self, settings: StorageSettings, *, takes_first: bool) -> None:
        super().__init__(settings)
        self.takes_first = takes_first
        """Whether the first outcome reaches the bucket before the silence; else it arrives with the answers."""
        self.asked = threading.Event()
        self.speaks = threading.Event()

    def put_once(self, key: str, body: bytes) -> bool:
        if not key.endswith("/outcome.json"):
            return super().put_once(key, body)
        is_first, taken = not self.asked.is_set(), False
        if is_first and self.takes_first:
            taken = super().put_once(key, body)
        self.asked.set()
        self.speaks.wait()
        return taken or super().put_once(key, body)


@pytest.mark.parametrize("when", ["cancel before", "cancel after"])
def test_a_success_whose_answer_is_lost_is_never_shown_as_cancelled(
    service: JobService, storage_settings: StorageSettings, tmp_path: Path, when: str
) -> None:
    """The counterexample of the protocol's model: PUT succeeded is not answered, the owner cancels, PUT cancelled is
    not answered either."""
    job = service.submit(SPEC, "ann")
    assert service.write_once.allocate_epoch(job.id, "w", now_iso()) == 1
    assert service.job_store.claim(job.id, epoch=1, worker="w", lease_seconds=60)
    store = LateStore(storage_settings, takes_first=when == "cancel after")
    context = RunContext(
        worker_deps(service.job_store, write_once=WriteOnceStore(store), store=store),
        service.get(job.id, "ann"),
        1,
        tmp_path,
    )
    context.begin()
    ends = threading.Thread(target=lambda: Finalizer(context).write(RunResult(status="succeeded")))
    ends.start()
    assert store.asked.wait(patience(20))
    if when == "cancel after":
        with pytest.raises(Conflict, match="succeeded"):
            service.cancel(job.id, "ann")
    else:
        assert service.cancel(job.id, "ann").status is JobStatus.CANCELLING
        until(lambda: service.job_store.expired_leases() == [job.id], "the sweeper may have it too")
        assert service.get(job.id, "ann").status is JobStatus.CANCELLING, "no end is shown that nobody knows"
        # What was on its way all the time arrives first.
        outcome = Outcome(job=job.id, status="succeeded", epoch=1, time=now_iso(), by="w")
        assert service.write_once.put_outcome(outcome) == outcome
    store.speaks.set()
    ends.join(patience(30))
    context.end()
    assert not ends.is_alive()
    standing = service.write_once.outcome(job.id)
    assert standing is not None
    assert service.get(job.id, "ann").status.value == standing.status == "succeeded"
    told = [event["data"]["status"] for event in service.events(job.id, "ann", types={"status"})]
    assert [status for status in told if status in TERMINAL] == ["succeeded"]


def test_a_sweeper_ends_a_cancelled_job_whose_worker_does_not_reach_storage(
    service: JobService, storage_settings: StorageSettings, queue_settings: QueueSettings, tmp_path: Path
) -> None:
    job = service.submit(SPEC, "ann")
    assert service.write_once.allocate_epoch(job.id, "w", now_iso()) == 1
    assert service.job_store.claim(job.id, epoch=1, worker="w", lease_seconds=600)
    store = LateStore(storage_settings, takes_first=False)
    deps = worker_deps(service.job_store, write_once=WriteOnceStore(store), store=store)
    context = RunContext(deps, service.get(job.id, "ann"), 1, tmp_path)
    service.cancel(job.id, "ann")
    context.begin()
    ends = threading.Thread(target=lambda: Finalizer(context).write(RunResult(status="cancelled")))
    ends.start()
    wakeups = WakeupPublisher(WakeupSender(queue_settings), service.job_store)
    sweeper = Sweeper(service.job_store, service.write_once, wakeups, queue_settings)
    until(lambda: sweeper.take_over_expired() or service.get(job.id, "ann").status in TERMINAL, "nobody ended it")
    ended = service.get(job.id, "ann")
    store.speaks.set()
    ends.join(patience(30))
    context.end()
    outcome = service.write_once.outcome(job.id)
    assert outcome is not None
    assert (ended.status.value, outcome.status, outcome.by) == ("cancelled", "cancelled", "sweeper")
    assert service.get(job.id, "ann") == ended, "the worker's own outcome came second"


def test_a_record_that_says_otherwise_than_its_outcome_is_corrected(
    own_bucket: StorageSettings, queue_settings: QueueSettings
) -> None:
    """As an earlier release could leave it."""
    service = JobService(own_bucket, queue_settings)
    service.check_storage()
    job = service.submit(SPEC, "ann")
    service.job_store.change(job.id, to=JobStatus.CANCELLED)
    service.write_once.put_outcome(Outcome(job=job.id, status="succeeded", epoch=1, time=now_iso(), by="w"))
    assert Rebuild.of(own_bucket, queue_settings).run().corrected == 1
    assert service.get(job.id, "ann").status is JobStatus.SUCCEEDED
    assert service.events(job.id, "ann")[-1]["data"] == {"status": "succeeded"}, "the last that is told is the truth"
    assert [found.id for found in service.list_jobs("ann", limit=9, status=JobStatus.SUCCEEDED).items] == [job.id]
    assert service.list_jobs("ann", limit=9, status=JobStatus.CANCELLED).items == []
    assert Rebuild.of(own_bucket, queue_settings).run().corrected == 0


def until(true: Callable[[], Any], what: str) -> None:
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < patience(30), what
        time.sleep(0.05)


def worker_deps(
    job_store: JobStore,
    *,
    write_once: WriteOnceStore | None = None,
    store: ObjectStore | None = None,
    stop: GracefulShutdown | None = None,
    wakeups: WakeupPublisher | None = None,
) -> WorkerDeps:
    none = cast("Any", None)
    return WorkerDeps(
        worker="w",
        job_store=job_store,
        write_once=write_once or none,
        store=store or none,
        datasets=none,
        wakeups=wakeups or none,
        commands=Commands(job_store, write_once or none, none, by="w"),
        lease_seconds=60,
        launcher=(),
        stop=stop or GracefulShutdown(1.0),
    )
