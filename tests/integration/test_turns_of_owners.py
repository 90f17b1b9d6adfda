"""Whose job is next: fair shares between owners, priorities of each owner's jobs, and no job that waits forever."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from grpo_core.spec import JobSpec, parse_spec
from jobs.errors import Conflict
from jobs.lifecycle.rebuild import Rebuild
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store.job import JobRecord, JobStatus, Priority
from jobs.store.job_store import JobStore
from tests.unit.fakes import make_record

HOUR = 3_600_000
SPEC = parse_spec({"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}})


class Clock:
    """A queue whose time is simulated: jobs are queued and claimed at hours of our own."""

    def __init__(self, job_store: JobStore) -> None:
        self.store = job_store
        self.start = job_store.now_ms()
        self.hour = 0.0
        self.names: dict[str, str] = {}
        self.epoch = 0

    @property
    def now(self) -> int:
        return self.start + int(self.hour * HOUR)

    def submit(
        self, name: str, owner: str = "ann", priority: Priority = Priority.NORMAL, spec: JobSpec = SPEC
    ) -> JobRecord:
        record = replace(make_record(owner=owner, spec=spec), priority=priority, queue="grpo.cpu")
        self.store.create(record)
        head_start = {Priority.HIGH: 6, Priority.LOW: -6}.get(priority, 0) * HOUR
        lane = f"{self.store.prefix}:lane:grpo.cpu:{owner}"
        rank = float(self.store.client.zscore(lane, record.id) or 0)
        assert abs(rank - (self.store.now_ms() - head_start)) < 60_000
        self.store.client.zadd(lane, {record.id: self.now - head_start})
        self.names[record.id] = name
        return record

    def claim(self, worker: str = "w") -> str | None:
        """The next job, taken by a worker."""
        bell = next(iter(self.store.queued()), None)
        picked = bell and self.store.pick(bell, worker, now_ms=self.now)
        if not picked:
            return None
        self.epoch += 1
        assert self.store.claim(picked, epoch=self.epoch, worker=worker, lease_seconds=600)
        return self.names[picked]

    def end(self, name: str) -> None:
        (job_id,) = [job_id for job_id, each in self.names.items() if each == name]
        assert self.store.change(job_id, to=JobStatus.SUCCEEDED).done
        del self.names[job_id]

    def hold(self, owner: str, gpus: int, hosts: int = 1) -> str:
        """A job in another queue that a worker holds."""
        spec = parse_spec({"resources": {"gpus": gpus, "hosts": hosts}, "sampling": {"generations": 24}})
        record = replace(make_record(owner=owner, spec=spec), queue="grpo.gpu")
        self.store.create(record)
        assert self.store.claim(record.id, epoch=1, worker=f"holds {record.id}", lease_seconds=600)
        return record.id


@pytest.fixture
def clock(queue_settings: QueueSettings) -> Clock:
    return Clock(JobStore(queue_settings))


def test_an_owners_jobs_go_by_priority_and_then_by_age(clock: Clock) -> None:
    for name, priority in (("a", "normal"), ("b", "low"), ("c", "high"), ("d", "normal"), ("e", "high")):
        clock.submit(name, priority=Priority(priority))
        clock.hour += 0.1
    assert [clock.claim() for _ in range(6)] == ["c", "e", "a", "d", "b", None]


def test_a_low_job_is_passed_for_some_hours_and_not_forever(clock: Clock) -> None:
    clock.submit("low", priority=Priority.LOW)
    passed = 0
    while True:
        clock.submit(f"high {passed}", priority=Priority.HIGH)
        clock.hour += 1
        claimed = clock.claim()
        assert claimed is not None
        if claimed == "low":
            break
        clock.end(claimed)
        passed += 1
    assert 11 <= passed <= 13, "twelve hours are between low and high"


def test_owners_share_the_workers_whatever_priorities_they_give(clock: Clock) -> None:
    for number in range(40):
        clock.submit(f"greedy {number}", "greedy", Priority.HIGH)
    for owner in ("ann", "bob"):
        for number in range(10):
            clock.submit(f"{owner} {number}", owner, Priority.LOW)
    claimed = [clock.claim() for _ in range(9)]
    assert Counter(str(name).split()[0] for name in claimed) == {"greedy": 3, "ann": 3, "bob": 3}
    clock.end("ann 0")
    assert str(clock.claim()).startswith("ann"), "the one with the fewest"


def test_shares_are_of_gpus_and_not_of_jobs(clock: Clock) -> None:
    eight = clock.hold("large", 4, hosts=2)
    for _ in range(3):
        clock.hold("small", 1)
    for number in range(6):
        clock.submit(f"large {number}", "large", Priority.HIGH)
        clock.submit(f"small {number}", "small", Priority.LOW)
    claimed = [str(clock.claim()).split()[0] for _ in range(5)]
    assert claimed == ["small"] * 5, "one job with eight GPUs is more than three with one each"
    assert str(clock.claim()).split()[0] == "large", "eight each, and its job is more urgent"
    assert clock.store.change(eight, to=JobStatus.SUCCEEDED).done
    assert str(clock.claim()).split()[0] == "large"


def test_a_run_on_fewer_hosts_than_asked_for_weighs_what_it_has(clock: Clock) -> None:
    spec = parse_spec({"resources": {"gpus": 2, "hosts": 4, "min_hosts": 1}, "sampling": {"generations": 24}})
    record = replace(make_record(owner="large", spec=spec), queue="grpo.gpu")
    clock.store.create(record)
    assert clock.store.claim(record.id, epoch=1, worker="w", lease_seconds=600, hosts=1)
    for _ in range(3):
        clock.hold("small", 1)
    clock.submit("small 0", "small", Priority.HIGH)
    clock.submit("large 0", "large")
    assert clock.claim() == "large 0", "two GPUs, and the other owner has three"


@pytest.mark.parametrize("seed", range(6))
def test_the_jobs_ahead_are_those_that_workers_take_before(clock: Clock, seed: int) -> None:
    chance = random.Random(seed)
    owners = ["ann", "bob", "eve", "dan"]
    for owner in owners[:3]:
        for _ in range(chance.randrange(3)):
            clock.hold(owner, chance.choice([1, 2, 4]))
    ids: dict[str, str] = {}
    for number in range(25):
        priority = chance.choice([Priority.LOW, Priority.NORMAL, Priority.NORMAL, Priority.HIGH])
        record = clock.submit(str(number), chance.choice(owners), priority)
        ids[str(number)] = record.id
        clock.hour += chance.choice([0, 0.5, 3])
    ahead = {name: clock.store.jobs_ahead(job_id, now_ms=clock.now) for name, job_id in ids.items()}
    taken = [clock.claim(f"w{number}") for number in range(25)]
    assert ahead == {name: place for place, name in enumerate(taken)}
    assert {clock.store.jobs_ahead(job_id) for job_id in ids.values()} == {None}


def test_no_job_waits_forever_while_others_with_fewer_jobs_keep_coming(clock: Clock) -> None:
    clock.submit("long", "ann")
    assert clock.claim() == "long"
    clock.submit("second", "ann")
    newcomers = 0
    while clock.hour < 200:
        for each in range(3):
            clock.submit(f"new {newcomers}", f"owner-{newcomers}", Priority.HIGH)
            newcomers += each >= 0
        claimed = clock.claim()
        assert claimed is not None
        if claimed == "second":
            break
        clock.end(claimed)
        clock.hour += 0.5
    assert 24 <= clock.hour <= 36, "a day, and what was overdue before"


def test_two_workers_pick_two_jobs_and_one_that_cannot_run_a_job_leaves_it(clock: Clock) -> None:
    first, second = clock.submit("a"), clock.submit("b")
    assert clock.store.pick(first.id, "w1", now_ms=clock.now) == first.id
    assert clock.store.pick(first.id, "w2", now_ms=clock.now) == second.id
    assert clock.store.pick(first.id, "w3", now_ms=clock.now) is None
    assert clock.store.pick(first.id, "w1", now_ms=clock.now) == first.id, "its own"
    clock.store.release_pick(second.id)
    assert clock.store.pick(first.id, "w1", [first.id], now_ms=clock.now) == second.id


def test_jobs_that_an_earlier_release_queued_or_took_are_in_their_turn(clock: Clock) -> None:
    old, new = clock.submit("old"), clock.submit("new")
    prefix = clock.store.prefix
    clock.store.client.zrem(f"{prefix}:lane:grpo.cpu:ann", old.id)
    assert clock.store.pick(new.id, "w1", now_ms=clock.now) == new.id
    clock.store.release_pick(new.id)
    assert clock.store.pick(old.id, "w1", now_ms=clock.now + 1000) in (old.id, new.id)
    clock.store.client.hset(f"{prefix}:job:{new.id}", "status", "running")
    clock.store.release_pick(old.id)
    assert clock.store.pick(old.id, "w2", now_ms=clock.now + 1000) == old.id
    assert clock.store.client.zscore(f"{prefix}:lane:grpo.cpu:ann", new.id) is None


def test_a_priority_is_changed_while_it_matters_and_is_kept_in_storage(
    service: JobService, own_bucket: StorageSettings, queue_settings: QueueSettings
) -> None:
    service = JobService(own_bucket, queue_settings)
    service.check_storage()
    first = service.submit(SPEC, "ann")
    second = service.submit(SPEC, "ann", priority=Priority.LOW)
    assert (service.get(second.id, "ann").priority, first.priority) == (Priority.LOW, Priority.NORMAL)
    assert service.prioritise(second.id, "ann", Priority.HIGH).priority is Priority.HIGH
    assert service.job_store.pick(first.id, "w") == second.id
    service.job_store.release_pick(second.id)
    for job_id in (first.id, second.id):
        service.job_store.forget(job_id)
    assert Rebuild.of(own_bucket, queue_settings).run().restored["queued"] == 2
    assert service.get(second.id, "ann").priority is Priority.HIGH
    assert service.job_store.pick(first.id, "w") == second.id
    service.job_store.note_compared(service.job_store.look().here)
    assert service.job_store.claim(second.id, epoch=1, worker="w", lease_seconds=60)
    with pytest.raises(Conflict):
        service.prioritise(second.id, "ann", Priority.LOW)
