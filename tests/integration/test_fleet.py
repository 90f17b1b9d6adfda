"""The fleet in Valkey: what is known of live, silent and stopped workers, and what is left of a drain."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest

from grpo_core.spec import parse_spec
from jobs.errors import NotFound
from jobs.read.fleet import CannotDrain, Fleet, WorkerState
from jobs.service import JobService
from jobs.settings import QueueSettings
from jobs.store.drains import Drain, DrainStore
from jobs.store.job_store import JobStore
from jobs.store.workers import NAMED_SECONDS, WorkerInfo, WorkerRegistry
from jobs.worker.draining import Draining
from jobs.worker.shutdown import GracefulShutdown

SPEC = parse_spec({"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}})


def info(name: str = "w", *, drain: str | None = "", busy: bool = False) -> WorkerInfo:
    return WorkerInfo(name=name, queues=["grpo.cpu"], device="cpu", drain=drain, busy=busy)


def state(service: JobService, name: str = "w") -> tuple[WorkerState, bool]:
    worker = service.get_worker(name)
    return worker.state, worker.empty


def fall_silent(service: JobService, name: str = "w", *, seconds: float = 120) -> None:
    prefix = service.job_store.prefix
    service.job_store.client.delete(f"{prefix}:worker:{name}", f"{prefix}:worker-release:{name}")
    service.job_store.client.zadd(f"{prefix}:workers", {name: time.time() - seconds})


def test_a_drain_is_done_when_the_worker_says_so_and_never_before(service: JobService) -> None:
    service.workers.announce(info())
    assert state(service) == (WorkerState.IDLE, False)
    assert service.drain_worker("w", "finish", by="chief").state is WorkerState.DRAINING, "it may be claiming a job"
    service.workers.announce(info(drain="finish", busy=True))
    assert state(service) == (WorkerState.DRAINING, False)
    service.workers.announce(info(drain="finish"))
    assert state(service) == (WorkerState.DRAINED, True)
    assert service.drain_worker("w", None, by="chief").drain is None
    service.workers.announce(info())
    assert state(service) == (WorkerState.IDLE, False)


def test_the_job_at_hand_is_that_of_the_lease(service: JobService) -> None:
    service.workers.announce(info())
    job = service.submit(SPEC, "ann")
    service.job_store.note_compared(service.job_store.look().here)
    assert service.job_store.claim(job.id, epoch=1, worker="w", lease_seconds=60)
    worker = service.get_worker("w")
    assert worker.state is WorkerState.BUSY
    assert worker.job is not None
    assert (worker.job.id, worker.job.owner, worker.job.phase) == (job.id, "ann", "preparing")
    service.drain_worker("w", "finish", by="chief")
    fall_silent(service)
    assert state(service) == (WorkerState.LOST, False), "its lease has not expired"
    service.cancel(job.id, "ann")
    service.job_store.change(job.id, to=None, fields={"worker": None})
    assert state(service) == (WorkerState.LOST, True)


def test_a_silent_worker_goes_after_an_hour_and_its_drain_after_a_day(service: JobService) -> None:
    service.workers.announce(info())
    fall_silent(service)
    assert state(service) == (WorkerState.LOST, False)
    fall_silent(service, seconds=3700)
    with pytest.raises(NotFound):
        service.get_worker("w")
    fall_silent(service)
    service.drain_worker("w", "checkpoint", by="chief")
    fall_silent(service, seconds=3700)
    assert state(service) == (WorkerState.LOST, True), "a drained one is listed as long as it is drained"
    marks = DrainStore(service.job_store)
    old = datetime.now(UTC) - timedelta(seconds=NAMED_SECONDS + 60)
    marks.put("w", Drain(mode="checkpoint", by="chief", at=old))
    service.workers.announce(info("other"))
    service.drain_worker("other", "finish", by="chief")
    assert marks.of("w") is not None, "it was seen today"
    service.job_store.client.zrem(f"{service.job_store.prefix}:workers", "w")
    service.drain_worker("other", "finish", by="chief")
    assert marks.of("w") is None
    assert marks.of("other") is not None


def test_a_stopped_worker_stays_drained_and_can_be_let_in_again(service: JobService) -> None:
    service.workers.announce(info())
    service.drain_worker("w", "finish", by="chief")
    service.workers.withdraw("w")
    assert state(service) == (WorkerState.STOPPED, True)
    assert service.drain_worker("w", None, by="chief").drain is None
    with pytest.raises(NotFound):
        service.get_worker("w")


def test_another_api_process_knows_the_drain(service: JobService, queue_settings: QueueSettings) -> None:
    service.workers.announce(info())
    service.drain_worker("w", "finish", by="chief")
    job_store = JobStore(queue_settings)
    found = Fleet(job_store, WorkerRegistry(job_store)).get("w").drain
    assert found is not None
    assert (found.mode, found.by) == ("finish", "chief")


def test_a_worker_of_an_earlier_release_is_not_said_to_drain(service: JobService) -> None:
    service.workers.announce(info(drain=None))
    with pytest.raises(CannotDrain, match="TERM"):
        service.drain_worker("w", "finish", by="chief")
    assert service.get_worker("w").drain is None


def test_a_worker_takes_no_job_after_the_order_and_keeps_it_when_valkey_forgets(service: JobService) -> None:
    stop = GracefulShutdown(60)
    marks = DrainStore(service.job_store)
    draining = Draining(marks, "w", stop)
    service.workers.announce(info())
    assert draining.begin()
    service.drain_worker("w", "finish", by="chief")
    assert draining.look()
    assert not stop.leaves, "its job is finished"
    service.drain_worker("w", "checkpoint", by="chief")
    draining.look()
    assert stop.leaves
    assert not stop.asked, "the worker itself stays"
    draining.end()
    assert not stop.leaves
    assert not draining.begin()
    draining.end()
    service.job_store.client.delete(f"{service.job_store.prefix}:drains")
    draining.look()
    assert draining.mode == "checkpoint"
    assert marks.of("w") is not None
    service.drain_worker("w", None, by="chief")
    assert draining.begin()
