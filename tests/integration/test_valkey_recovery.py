"""Valkey comes back as it was a moment ago: nothing that was promised is lost, and nobody has to do anything.

Real servers; the power cut leaves the append-only file without its last bytes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse, HeadersDict

from grpo_core.spec import parse_spec
from jobs.errors import Conflict, Unavailable
from jobs.lifecycle.admission import KeyReused, RequestKey
from jobs.lifecycle.celery_app import WakeupSender
from jobs.lifecycle.outcomes import apply_outcome
from jobs.lifecycle.sweeper import Sweeper
from jobs.lifecycle.time_limit import Overdue, TimeLimitSettings
from jobs.lifecycle.valkey_recovery import ValkeyRecovery
from jobs.lifecycle.wakeups import WakeupPublisher
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store import event_log, object_keys
from jobs.store.commits import ResumeBase, put_base
from jobs.store.event_log import now_iso
from jobs.store.job import HELD, TERMINAL, JobRecord, JobStatus, record_of
from jobs.store.job_store import EVENT_ROOM, JobEvent, JobStore
from jobs.store.write_once import Manifest, ManifestEntry, Outcome
from jobs.worker.event_forwarder import EventForwarder
from jobs.worker.lease import Lease
from jobs.worker.worker import Worker, WorkerSettings
from tests import power
from tests.conftest import ValkeyServer
from tests.integration.running import wait_until

SPEC = parse_spec({"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}})
LEASE_SECONDS = 60.0


class Place:
    """A service on a Valkey of its own that can lose power."""

    def __init__(self, folder: Path, storage: StorageSettings) -> None:
        self.folder = folder
        self.valkey: ValkeyServer = power.make_valkey(folder)
        self.valkey.start()
        self.storage = storage
        self.connect(self.valkey.url)
        self.service.check_storage()
        self.recover()
        self.mark()

    def connect(self, url: str) -> None:
        """A fresh process: it knows of nothing that was before."""
        self.queue = QueueSettings.model_validate({"redis_url": url, "prefix": "p", "lease_seconds": LEASE_SECONDS})
        self.service = JobService(self.storage, self.queue)
        self.job_store, self.write_once = self.service.job_store, self.service.write_once
        self.wakeups = WakeupPublisher(WakeupSender(self.queue), self.job_store)

    def recover(self) -> bool:
        """What each sweep does first."""
        return ValkeyRecovery(self.service.store, self.job_store, self.wakeups, self.queue).ensure()

    def is_recovered(self) -> bool:
        """As sweeps try again: a cut can leave the lock of a process that is gone, until it expires."""
        with suppress(Unavailable):
            self.recover()
            return True
        return False

    def mark(self) -> None:
        """What is written up to here is on the disk."""
        self.durable = power.written(self.folder / "data")

    def lose_power(self, size: int | None = None) -> None:
        """All since the mark is lost, or all above a size."""
        self.valkey.kill()
        power.cut(self.folder / "data", self.durable if size is None else size)
        self.valkey.start()
        self.connect(self.valkey.url)

    def submit(self, key: str | None = None) -> JobRecord:
        if key is None:
            return self.service.submit(SPEC, "ann")
        return self.service.submit_once(SPEC, "ann", request(key))[0]

    def claim(self, job: JobRecord) -> int:
        epoch = self.write_once.allocate_epoch(job.id, "w", now_iso(), orders=self.record(job).orders)
        assert epoch is not None
        assert self.job_store.claim(job.id, epoch=epoch, worker="w", lease_seconds=LEASE_SECONDS)
        put_base(self.service.store, ResumeBase(job=job.id, epoch=epoch, resumed=None))
        return epoch

    def record(self, job: JobRecord) -> JobRecord:
        return self.service.get(job.id, "ann")

    def status(self, job: JobRecord) -> JobStatus:
        return self.record(job).status

    def finish(self, job: JobRecord, epoch: int) -> Outcome:
        """As a worker does: events, manifest, outcome; the record is settled by whoever calls."""
        store, prefix = self.service.store, object_keys.run(job.id, epoch)
        objects: list[ManifestEntry] = list(event_log.store_events(store, self.job_store, job.id, prefix, after=0))
        manifest = self.write_once.put_manifest(Manifest(job=job.id, epoch=epoch, objects=objects))
        outcome = Outcome(job=job.id, status="succeeded", epoch=epoch, time=now_iso(), by="w", manifest=manifest)
        return self.write_once.put_outcome(outcome)

    def events(self, job: JobRecord, after: int = 0) -> list[dict[str, Any]]:
        return self.service.events(job.id, "ann", after=after)


def request(key: str, body: str = "{}") -> RequestKey:
    return RequestKey.of("submitJob", key, body)


@pytest.fixture
def place(tmp_path: Path, own_bucket: StorageSettings) -> Iterator[Place]:
    place = Place(tmp_path / "valkey", own_bucket)
    yield place
    place.valkey.kill()


def test_an_answered_job_is_found_again_and_its_key_with_it(place: Place) -> None:
    jobs = [place.submit("key-1"), place.submit("key-2"), place.submit()]
    place.lose_power()
    assert place.job_store.get(jobs[0].id) is None
    # The first to ask is whoever: with the key, for the job itself, or the sweeper.
    again, replayed = place.service.submit_once(SPEC, "ann", request("key-1"))
    assert (again.id, replayed) == (jobs[0].id, True)
    with pytest.raises(KeyReused):
        place.service.submit_once(SPEC, "ann", request("key-2", "another"))
    assert [place.status(job) for job in jobs] == [JobStatus.QUEUED] * 3
    assert [found.id for found in place.service.list_jobs("ann", limit=9).items] == [job.id for job in jobs[::-1]]
    assert not place.recover()


def test_a_reader_of_a_job_that_was_forgotten_finds_it(place: Place) -> None:
    job = place.submit()
    place.lose_power()
    assert place.status(job) is JobStatus.QUEUED


def test_answered_orders_are_obeyed(place: Place) -> None:
    running, pausing, queued, paused, twice, ended = (place.submit() for _ in range(6))
    for job in (running, pausing, twice):
        place.claim(job)
    place.service.pause(paused.id, "ann")
    place.mark()
    place.service.cancel(running.id, "ann")
    place.service.pause(pausing.id, "ann")
    place.service.pause(queued.id, "ann")
    place.service.resume(paused.id, "ann")
    place.service.pause(twice.id, "ann")
    place.job_store.change(twice.id, epoch=1, to=JobStatus.PAUSED)
    place.service.resume(twice.id, "ann")
    place.service.cancel(ended.id, "ann")
    place.lose_power()
    place.recover()
    wanted = [(running, "cancelling"), (pausing, "pausing"), (queued, "paused"), (paused, "queued")]
    wanted += [(ended, "cancelled")]
    assert [place.status(job).value for job, _ in wanted] == [status for _, status in wanted]
    assert place.status(twice) is JobStatus.RUNNING, "its run may be there still, and where it is not its lease ends"
    place.job_store.client.zadd("p:leases", {twice.id: 0})
    Sweeper(place.job_store, place.write_once, place.wakeups, place.queue).take_over_expired()
    assert (place.status(twice), place.record(twice).attempts) == (JobStatus.QUEUED, 0)


def test_a_run_whose_claim_was_forgotten_has_its_job_again_and_nobody_else_gets_it(place: Place) -> None:
    job = place.submit()
    place.mark()
    epoch = place.claim(job)
    place.lose_power()
    assert place.status(job) is JobStatus.QUEUED
    assert not place.job_store.claim(job.id, epoch=2, worker="other", lease_seconds=9), "not before it was compared"
    lease = Lease(place.job_store, job.id, epoch, 6.0, worker="w")
    lease.start()
    try:
        wait_until(lambda: place.record(job).epoch == epoch, 10)
        assert place.recover()
        assert not place.job_store.claim(job.id, epoch=2, worker="other", lease_seconds=9)
        record = place.record(job)
        assert (record.status, record.epoch, record.worker) == (JobStatus.RUNNING, 1, "w")
        wait_until(lambda: not place.record(job).restored, 10)
        assert not lease.lost
    finally:
        lease.stop()


def test_a_run_that_was_forgotten_and_is_gone_is_no_lost_attempt(place: Place) -> None:
    job = place.submit()
    place.mark()
    place.claim(job)
    place.lose_power()
    place.recover()
    assert (place.status(job), place.record(job).epoch) == (JobStatus.RUNNING, 1)
    place.job_store.client.zadd("p:leases", {job.id: 0})
    Sweeper(place.job_store, place.write_once, place.wakeups, place.queue).take_over_expired()
    assert (place.status(job), place.record(job).attempts) == (JobStatus.QUEUED, 0)


def test_a_pause_of_after_the_claim_stands_when_the_claim_is_put_back(place: Place) -> None:
    job = place.submit()
    place.mark()
    epoch = place.claim(job)
    place.service.pause(job.id, "ann")
    place.lose_power()
    # Its worker commits before it beats, and reads the order.
    place.service._commands.apply_pending(job.id)
    assert place.job_store.reclaim(job.id, epoch=epoch, worker="w", lease_seconds=9, orders=0)
    assert place.status(job) is JobStatus.PAUSING


def test_no_event_is_missed_and_no_number_used_twice(place: Place, tmp_path: Path) -> None:
    job = place.submit()
    epoch = place.claim(job)
    lease = Lease(place.job_store, job.id, epoch, LEASE_SECONDS)
    seen: dict[int, Any] = {}

    def train(steps: range) -> None:
        with (tmp_path / "events.jsonl").open("a") as lines:
            for step in steps:
                body = {"type": "metric", "time": now_iso(), "step": step, "data": {"reward": step}}
                lines.write(json.dumps(body) + "\n")

    def read() -> None:
        for event in place.events(job, after=max(seen, default=0)):
            assert event["seq"] not in seen
            seen[event["seq"]] = (event["type"], event["data"])

    relay = EventForwarder(place.job_store, lease, job.id, epoch, tmp_path)
    for round_ in range(3):
        first = round_ * 20
        train(range(first, first + 10))
        relay.send_all()
        place.mark()
        train(range(first + 10, first + 20))
        relay.send_all()
        read()
        place.lose_power()
        # The run goes on where it was: its job store is the same server's.
        relay._job_store = lease._job_store = place.job_store
        if round_ == 1:
            place.recover()
        if round_:  # once before anything else is told, and once after
            relay.send_all()
        read()
    train(range(60, 61))
    relay.send_all()
    read()
    told = [data["reward"] for kind, data in seen.values() if kind == "metric"]
    assert set(told) == set(range(61)), "a step that no event tells of"
    late = [event for event in place.events(job) if event["seq"] in seen]
    assert all(seen[event["seq"]] == (event["type"], event["data"]) for event in late), "a number stands for two events"


def test_a_job_that_ended_in_the_lost_moment_has_ended(place: Place, tmp_path: Path) -> None:
    job = place.submit()
    epoch = place.claim(job)
    place.mark()
    events = [JobEvent(type="metric", step=n, data={"reward": n}) for n in range(1, 31)]
    assert place.job_store.change(job.id, epoch=epoch, events=events, first_ordinal=1).done
    outcome = place.finish(job, epoch)
    assert apply_outcome(place.job_store, job.id, outcome, first_ordinal=31).done
    before = place.events(job)
    place.lose_power()
    assert place.status(job) is JobStatus.RUNNING
    place.recover()
    assert place.status(job) is JobStatus.SUCCEEDED
    after = place.events(job)
    told = [(event["seq"], event["data"]) for event in before[:-1]]
    assert [(event["seq"], event["data"]) for event in after[: len(told)]] == told
    assert [event["data"] for event in after if event["data"].get("status") in TERMINAL] == [{"status": "succeeded"}]
    assert after[-1]["seq"] >= before[-1]["seq"]
    assert place.service.read_on(job.id, after=after[-1]["seq"]).ended


def test_a_worker_that_ends_its_job_tells_again_what_was_lost(place: Place, tmp_path: Path) -> None:
    job = place.submit()
    epoch = place.claim(job)
    place.mark()
    lines = [{"type": "metric", "time": now_iso(), "step": n, "data": {"reward": n}} for n in range(1, 6)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lease = Lease(place.job_store, job.id, epoch, LEASE_SECONDS)
    relay = EventForwarder(place.job_store, lease, job.id, epoch, tmp_path)
    relay.send_all()
    seen = place.events(job)[-1]["seq"]
    place.lose_power()
    relay._job_store = place.job_store
    relay.settle(place.finish(job, epoch))
    told = place.events(job, after=seen)
    assert [event["data"] for event in told] == [{"reward": n} for n in range(1, 6)] + [{"status": "succeeded"}]


def test_a_worker_that_ends_a_job_whose_claim_was_forgotten_tells_all_of_it(place: Place, tmp_path: Path) -> None:
    job = place.submit()
    place.mark()
    epoch = place.claim(job)
    lines = [{"type": "metric", "time": now_iso(), "step": n, "data": {"reward": n}} for n in range(1, 6)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lease = Lease(place.job_store, job.id, epoch, LEASE_SECONDS, worker="w")
    relay = EventForwarder(place.job_store, lease, job.id, epoch, tmp_path)
    relay.send_all()
    place.lose_power()
    assert place.record(job).epoch == 0
    relay._job_store = lease._job_store = place.job_store
    relay.settle(place.finish(job, epoch))
    record = place.record(job)
    assert (record.status, record.epoch, record.step) == (JobStatus.SUCCEEDED, epoch, 5)
    told = [event["data"]["reward"] for event in place.events(job) if event["type"] == "metric"]
    assert told == [1, 2, 3, 4, 5]


def test_a_revoked_key_and_a_deleted_job_stay_so(place: Place) -> None:
    text, key = place.service.keys.create("ann")
    job = place.submit()
    place.service.cancel(job.id, "ann")
    place.mark()
    place.service.keys.revoke(key.id)
    place.service.delete(job.id, "ann")
    place.lose_power()
    place.recover()
    assert place.service.authenticate(text) is None
    assert place.job_store.get(job.id) is None


def test_a_valkey_that_lost_everything_is_filled_again(place: Place, storage_settings: StorageSettings) -> None:
    job, other = place.submit("key"), place.submit()
    theirs = JobService(place.storage, place.queue.model_copy(update={"prefix": "q"})).submit(SPEC, "ann")
    place.claim(other)
    place.job_store.client.flushall()
    assert place.submit("key").id == job.id
    assert (place.status(job), place.status(other)) == (JobStatus.QUEUED, JobStatus.RUNNING)
    assert place.job_store.get(theirs.id) is None, "of another service in the same bucket"


def test_each_server_numbers_events_above_the_one_before(place: Place) -> None:
    job = place.submit()
    for _ in range(3):
        last = place.events(job)[-1]["seq"]
        place.mark()
        place.lose_power()
        place.recover()
        place.service.pause(job.id, "ann")
        place.service.resume(job.id, "ann")
        after = [event["seq"] for event in place.events(job, after=last)]
        assert after[0] > max(last, EVENT_ROOM)
        assert after == list(range(after[0], after[0] + len(after)))


def test_a_submission_that_is_finished_later_uses_no_number_of_a_forgotten_record(place: Place) -> None:
    job = place.submit()
    seen = place.events(job)[-1]["seq"]
    place.job_store.client.delete(f"{place.job_store.prefix}:job:{job.id}", f"{place.job_store.prefix}:events:{job.id}")
    asked = place.write_once.job(job.id)
    assert asked is not None
    place.job_store.create(record_of(asked), may_be_known=True)
    assert place.events(job)[0]["seq"] >= EVENT_ROOM > seen


def test_a_replica_that_lags_behind_is_promoted(place: Place, tmp_path: Path) -> None:
    """And the fresh processes that are pointed at it find out by themselves."""
    job = place.submit()
    replica = power.make_valkey(tmp_path / "replica")
    replica.start()
    try:
        stale = JobStore(QueueSettings.model_validate({"redis_url": replica.url, "prefix": "p"})).client
        stale.config_set("masterauth", place.valkey.password)
        stale.execute_command("REPLICAOF", "127.0.0.1", place.valkey.port)
        wait_until(lambda: stale.exists(f"p:job:{job.id}") == 1, 20)
        wait_until(lambda: stale.info("replication")["master_link_status"] == "up", 20)
        stale.execute_command("REPLICAOF", "NO", "ONE")
        late = place.submit("key")
        place.service.cancel(job.id, "ann")
        seen = place.events(job)[-1]["seq"]
        place.valkey.kill()
        place.connect(replica.url)
        assert place.submit("key").id == late.id
        assert place.status(job) is JobStatus.CANCELLED
        assert place.events(job)[-1]["seq"] > seen
    finally:
        replica.kill()


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 40))])
def test_power_cuts_at_random_bytes(place: Place, seed: int) -> None:
    """Whatever was answered before each cut holds after it, and at the end every job can be ended."""
    world = Promises(place, random.Random(seed))
    for _ in range(3):
        place.mark()
        for _ in range(world.random.randint(5, 25)):
            world.do_something()
        world.read_events()
        size = world.random.randint(place.durable, power.written(place.folder / "data"))
        place.lose_power(size)
        if world.random.random() < 0.5:
            world.beat_all()
        wait_until(place.is_recovered, 30)
        world.check()
    world.end_all()


class Promises:
    """What clients were answered, and the workers that outlive every cut."""

    def __init__(self, place: Place, random_: random.Random) -> None:
        self.place = place
        self.random = random_
        self.keys: dict[str, str] = {}
        self.jobs: dict[str, JobRecord] = {}
        self.runs: dict[str, int] = {}
        self.told: dict[str, int] = {}
        self.cancelled: set[str] = set()
        self.ended: dict[str, str] = {}
        self.seen: dict[tuple[str, int], Any] = {}

    def do_something(self) -> None:
        acts: list[Callable[[], None]] = [self.submit, self.claim, self.tell, self.tell, self.order, self.finish]
        self.random.choice(acts)()

    def submit(self) -> None:
        key = f"key-{len(self.keys)}"
        job = self.place.submit(key)
        self.keys[key], self.jobs[job.id] = job.id, job

    def some(self, *statuses: JobStatus) -> JobRecord | None:
        found = [job for job in self.jobs.values() if self.place.status(job) in statuses]
        return self.random.choice(found) if found else None

    def claim(self) -> None:
        if job := self.some(JobStatus.QUEUED):
            self.runs[job.id], self.told[job.id] = self.place.claim(job), 0

    def tell(self) -> None:
        if job := self.some(*HELD):
            self.tell_of(job.id, self.told[job.id] + self.random.randint(1, 5))

    def tell_of(self, job_id: str, up_to: int) -> None:
        """As the relay does: what the job store has not, from the file."""
        sent = self.told[job_id]
        while True:
            events = [JobEvent(type="metric", step=n, data={"n": n}) for n in range(sent + 1, up_to + 1)]
            change = self.place.job_store.change(job_id, epoch=self.runs[job_id], events=events, first_ordinal=sent + 1)
            if change.refusal != "events":
                break
            sent = change.shipped
        self.told[job_id] = up_to

    def order(self) -> None:
        job = self.some(*(set(JobStatus) - TERMINAL))
        order = self.random.choice(["cancel", "pause", "resume"])
        if job is not None:
            try:
                getattr(self.place.service, order)(job.id, "ann")
            except Conflict:
                return
            if order == "cancel":
                self.cancelled.add(job.id)

    def finish(self) -> None:
        if job := self.some(JobStatus.RUNNING):
            self.settle(job)

    def settle(self, job: JobRecord) -> None:
        outcome = self.place.finish(job, self.runs[job.id])
        apply_outcome(self.place.job_store, job.id, outcome)
        self.ended[job.id] = outcome.status

    def beat_all(self) -> None:
        """The workers are heard before anything was compared, and take back what they have."""
        for job_id, epoch in self.runs.items():
            change = self.place.job_store.beat(job_id, epoch=epoch, lease_seconds=LEASE_SECONDS)
            if change.refusal == "epoch" and change.epoch < epoch:
                self.place.job_store.reclaim(job_id, epoch=epoch, worker="w", lease_seconds=LEASE_SECONDS, orders=0)

    def read_events(self) -> None:
        for job in self.jobs.values():
            for event in self.place.events(job):
                body = (event["type"], event["data"])
                assert self.seen.setdefault((job.id, event["seq"]), body) == body, "a number was used twice"

    def check(self) -> None:
        for key, job_id in self.keys.items():
            assert self.place.submit(key).id == job_id, "a second job under one key"
        listed = self.place.service.list_jobs("ann", limit=200).items
        assert {job.id for job in listed} == set(self.jobs)
        for job_id, job in self.jobs.items():
            status, outcome = self.place.status(job), self.place.write_once.outcome(job_id)
            assert (status.value in TERMINAL) == (outcome is not None)
            assert outcome is None or outcome.status == status.value
            assert self.ended.get(job_id, status.value) == status.value, "an end was taken back"
            if job_id in self.cancelled:
                assert status in (JobStatus.CANCELLING, *TERMINAL), "an order that was answered was forgotten"
            if job_id in self.runs and status in HELD:
                assert self.place.record(job).epoch == self.runs[job_id], "a run lost its job"
                self.tell_of(job_id, self.told[job_id] + 1)
        self.read_events()
        for job_id, told in self.told.items():
            numbers = {data["n"] for (job, _), (kind, data) in self.seen.items() if job == job_id and kind == "metric"}
            assert set(range(1, told + 1)) <= numbers, "an event was missed"

    def end_all(self) -> None:
        sweeper = Sweeper(self.place.job_store, self.place.write_once, self.place.wakeups, self.place.queue)
        for job in self.jobs.values():
            if self.place.status(job) in HELD:
                self.place.job_store.client.zadd("p:leases", {job.id: 0})
                sweeper.take_over_expired()
            if self.place.status(job) is JobStatus.PAUSED:
                self.place.service.resume(job.id, "ann")
            if self.place.status(job) is JobStatus.QUEUED:
                self.runs[job.id] = self.place.claim(job)
                self.settle(job)
            assert self.place.status(job) in TERMINAL


def test_nothing_is_claimed_or_admitted_while_storage_is_away_after_a_restart(place: Place) -> None:
    job = place.submit("key")
    place.lose_power()
    away = place.storage.model_copy(update={"endpoint": "http://127.0.0.1:9"})
    service = JobService(away, place.queue)
    with pytest.raises(Unavailable, match="Object storage"):
        service.submit_once(SPEC, "ann", request("key"))
    with pytest.raises(Unavailable, match="Object storage"):
        service.get(job.id, "ann")
    assert place.submit("key").id == job.id


def sweeper_of(place: Place, lease_seconds: float = 1.0) -> Sweeper:
    settings = place.queue.model_copy(update={"lease_seconds": lease_seconds})
    return Sweeper(place.job_store, place.write_once, place.wakeups, settings)


def test_the_time_before_a_job_was_put_back_counts_for_nothing(place: Place) -> None:
    job = place.submit()
    assert place.write_once.allocate_epoch(job.id, "w", "2026-01-02T03:04:05Z") == 1
    put_base(place.service.store, ResumeBase(job=job.id, epoch=1, resumed=None))
    place.job_store.client.flushall()
    place.recover()
    assert place.record(job).restored
    run_at, _ = place.job_store.times([job.id])[job.id]
    assert place.job_store.now_ms() - run_at < 60_000
    Overdue(place.job_store, place.write_once, TimeLimitSettings.model_validate({"hours": 1})).end()
    place.job_store.client.hset(f"p:job:{job.id}", "run_at", 1)
    Overdue(place.job_store, place.write_once, TimeLimitSettings.model_validate({"hours": 1})).end()
    assert place.status(job) is JobStatus.RUNNING
    place.job_store.client.zadd("p:leases", {job.id: 0})
    sweeper_of(place).take_over_expired()
    assert (place.status(job), place.record(job).run_ms) == (JobStatus.QUEUED, 0)
    assert not place.job_store.client.keys("p:usage:*"), "nobody pays for a run that was not there"


def test_without_info_nothing_is_compared_and_dead_workers_are_taken_over(place: Place) -> None:
    place.job_store.client.execute_command("ACL", "SETUSER", "default", "-info")
    job = place.submit()
    epoch = place.write_once.allocate_epoch(job.id, "w", now_iso())
    assert epoch is not None
    assert place.job_store.claim(job.id, epoch=epoch, worker="w", lease_seconds=1)
    sweeper = sweeper_of(place)
    sweeper.start()
    try:
        wait_until(lambda: place.status(job) is JobStatus.QUEUED, 20)
    finally:
        sweeper.close()


def test_a_process_that_cannot_work_gives_its_turn_to_another(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> bool:
        raise Unavailable("Object storage", "it is away for this process")

    away, other = sweeper_of(place), sweeper_of(place)
    monkeypatch.setattr(away._valkey_recovery, "ensure", fail)
    away.start()
    try:
        wait_until(lambda: away._turns._sits_out, 10)
        other.start()
        wait_until(lambda: place.job_store.client.get(other._turns._lock) == other._turns._name, 10)
    finally:
        away.close()
        other.close()


def test_a_sweeper_of_an_earlier_release_keeps_nobody_from_comparing(place: Place) -> None:
    place.lose_power()
    place.job_store.client.set("p:lock:sweeper", "of an earlier release")
    assert place.job_store.look().may_have_forgotten
    sweeper = sweeper_of(place)
    sweeper.start()
    try:
        wait_until(lambda: not place.job_store.look().may_have_forgotten, 20)
    finally:
        sweeper.close()


def test_another_server_than_the_one_that_was_compared_is_not_noted(place: Place) -> None:
    before = place.job_store.look()
    place.lose_power()
    assert not place.job_store.note_compared(before.here)
    assert place.job_store.look().may_have_forgotten


def test_a_worker_that_is_woken_first_compares_and_takes_no_number_in_vain(place: Place, tmp_path: Path) -> None:
    job = place.submit()
    place.lose_power()
    worker = Worker(WorkerSettings.model_validate({"work_dir": tmp_path / "work"}), place.storage, place.queue)
    claimed = worker._claim(job.id)
    assert claimed is not None
    assert claimed.epoch == 1


def test_a_number_that_nobody_runs_under_is_no_run(place: Place) -> None:
    waiting, held = place.submit(), place.submit()
    assert place.write_once.allocate_epoch(waiting.id, "gone", now_iso()) == 1
    assert place.write_once.allocate_epoch(held.id, "w", now_iso()) == 1
    assert place.write_once.allocate_epoch(held.id, "too late", now_iso()) == 2
    assert place.job_store.claim(held.id, epoch=1, worker="w", lease_seconds=LEASE_SECONDS)
    place.mark()
    place.lose_power()
    place.recover()
    assert (place.status(waiting), place.record(waiting).epoch) == (JobStatus.QUEUED, 0)
    assert (place.status(held), place.record(held).epoch) == (JobStatus.RUNNING, 1)
    assert place.job_store.beat(held.id, epoch=1, lease_seconds=9).done


def deny(place: Place, key: str) -> Callable[[], None]:
    """The store answers 403 for one object; returns how to end that."""
    events = place.service.store._client.meta.events

    def answer(request: Any, **_: Any) -> AWSResponse | None:
        if not request.url.split("?")[0].endswith(key):
            return None
        response = AWSResponse(request.url, 403, HeadersDict(), None)
        response._content = b"<Error><Code>AccessDenied</Code></Error>"
        return response

    events.register("before-send.s3.GetObject", answer)
    return lambda: events.unregister("before-send.s3.GetObject", answer)


def test_one_object_that_cannot_be_read_stops_nobody_and_is_read_later(place: Place) -> None:
    place.service.keys.create("ann")
    lost, unread, denied_key = place.submit("key"), place.submit("other"), place.service.keys.create("bob")[1]
    place.lose_power()
    allow = deny(place, object_keys.job(unread.id))
    allow_key = deny(place, object_keys.api_key(denied_key.id))
    assert place.submit("key").id == lost.id
    assert place.job_store.get(unread.id) is None
    allow()
    allow_key()
    place.job_store.client.zadd("p:unread", {unread.id: 0})
    place.service._valkey_recovery.look_again()
    assert place.status(unread) is JobStatus.QUEUED
    assert place.job_store.begun("unread", 0) == []


def test_one_object_that_cannot_be_read_keeps_no_sweep_from_the_jobs_after_it(place: Place) -> None:
    jobs = [place.submit(), place.submit()]
    for job in jobs:
        place.claim(job)
    place.job_store.client.zadd("p:leases", {job.id: 0 for job in jobs})
    deny(place, object_keys.outcome(jobs[0].id))
    deny(place, object_keys.epoch(jobs[0].id, 1))
    place.service._sweeper.take_over_expired()
    assert place.status(jobs[1]) is JobStatus.QUEUED


def test_an_upgrade_that_meets_an_emptied_valkey_restores_the_jobs(place: Place) -> None:
    job = place.submit()
    for item in [*place.service.store.list("service/")]:
        place.service.store.delete(item.key)  # as a release leaves it that put no such object
    place.job_store.client.flushall()
    place.recover()
    assert place.status(job) is JobStatus.QUEUED


def test_a_request_waits_some_seconds_while_another_process_compares(place: Place) -> None:
    job = place.submit("key")
    place.lose_power()
    place.job_store.client.set("p:lock:comparison", "of another process")
    with pytest.raises(Unavailable, match="are being compared"):
        place.submit("key")
    place.job_store.client.delete("p:lock:comparison")
    assert place.submit("key").id == job.id
    assert not place.job_store.client.exists("p:lock:comparison"), "it is given up at once"
