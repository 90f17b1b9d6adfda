"""The state machine under every order of events that hypothesis can think of, on a real Valkey.

Workers claim, beat, fall silent, wake up as zombies and finish; owners order; processes die half-way; Valkey is lost
and rebuilt. Storage is a put-once store in memory. After every step the records, the lists they stand in, the outcomes
and the numbers of events must agree, and at the end every job must be brought to an end.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

import jobs.lifecycle.recovery
from grpo_core import strict_json
from grpo_core.spec import parse_spec
from jobs.errors import Conflict
from jobs.lifecycle.commands import Commands
from jobs.lifecycle.outcomes import LOST, MAX_ATTEMPTS, STOPPED, apply_outcome, hand_back
from jobs.lifecycle.rebuild import Rebuild
from jobs.lifecycle.sweeper import Sweeper
from jobs.settings import QueueSettings
from jobs.store import commits, event_log, object_keys
from jobs.store.event_log import now_iso
from jobs.store.job import HELD, TERMINAL, TRANSITIONS, JobRecord, JobStatus, new_job_id, record_of
from jobs.store.job_store import JobEvent, JobStore
from jobs.store.write_once import Command, FinalStatus, Manifest, Outcome, WriteOnceStore
from tests.conftest import ValkeyServer
from tests.integration.memory_store import MemoryStore

SPEC = parse_spec({"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}})
LEASE_SECONDS = 3600.0
"""No lease runs out by itself: the rule that lets one run out says when."""
WORKERS = ("w1", "w2", "w3")
OWNERS = ("ann", "bob")


class NoWakeups:
    """Wake-ups are the machine's to give: a worker may claim whenever it likes."""

    def start(self) -> None: ...
    def close(self) -> None: ...
    def add(self, job_id: str, queue_name: str) -> None: ...


@dataclass
class Run:
    """A run as its worker sees it: the worker may be wrong about still having the job."""

    job: str
    epoch: int
    worker: str
    events: int = 0
    step: int = 0


class Jobs(RuleBasedStateMachine):
    """One service, its workers, and what can happen to them."""

    valkey: ClassVar[ValkeyServer]
    examples: ClassVar[int] = 0

    jobs = Bundle("jobs")
    runs = Bundle("runs")
    tickets = Bundle("tickets")
    endings = Bundle("endings")

    def __init__(self) -> None:
        super().__init__()
        type(self).examples += 1
        prefix = f"t-machine-{type(self).examples}"
        self.queue = QueueSettings.model_validate(
            {"redis_url": self.valkey.url, "prefix": prefix, "lease_seconds": LEASE_SECONDS}
        )
        self.job_store = JobStore(self.queue)
        self.store = MemoryStore()
        self.write_once = WriteOnceStore(self.store)
        wakeups: Any = NoWakeups()
        self.wakeups = wakeups
        self.orders = Commands(self.job_store, self.write_once, wakeups, by="api")
        self.sweeper = Sweeper(self.job_store, self.write_once, wakeups, self.queue)
        self.known: dict[str, str] = {}
        """Every job that was written down, with its owner."""
        self.lost = False
        self.winners: dict[str, set[int]] = {}
        self.ended: dict[str, JobRecord] = {}
        self.told: dict[tuple[str, int], Any] = {}
        self.newest: dict[str, int] = {}
        self.status: dict[str, JobStatus] = {}
        """What events told of last, since Valkey was lost."""

    def record(self, job: str) -> JobRecord | None:
        return self.job_store.get(job)

    # Owners

    @precondition(lambda self: len(self.known) < 3)
    @rule(target=jobs, owner=st.sampled_from(OWNERS), crash=st.sampled_from([None, None, "before the record"]))
    def submit(self, owner: str, crash: str | None) -> str:
        job, queue = new_job_id(), f"{self.queue.prefix}.cpu"
        asked = {"id": job, "owner": owner, "created_at": "2026-01-02T03:04:05.678+00:00", "queue": queue}
        asked |= {"spec": SPEC.as_dict(), "spec_sha256": SPEC.digest()}
        self.job_store.begin("submitting", job)
        assert self.write_once.put_job(job, asked)
        self.known[job] = owner
        if crash is None:
            assert self.job_store.create(record_of(asked))
        return job

    @rule(job=jobs, order=st.sampled_from(["pause", "resume", "cancel"]))
    def order(self, job: str, order: Command) -> None:
        with suppress(Conflict):
            record = self.orders.give(job, order)
            if record is not None:
                wanted = {"pause": ("paused", "pausing"), "resume": ("queued", "running")}
                assert record.status.value in wanted.get(order, ("cancelled", "cancelling"))

    @rule(job=jobs, order=st.sampled_from(["pause", "resume", "cancel"]), noted=st.booleans())
    def order_and_die(self, job: str, order: Command, noted: bool) -> None:
        """The process dies once the order is in storage."""
        if noted:
            self.job_store.begin("ordering", f"{job} x")
        self.write_once.put_command(job, order, "api", now_iso())

    # Workers

    @rule(target=tickets, job=jobs, worker=st.sampled_from(WORKERS))
    def take_ticket(self, job: str, worker: str) -> Any:
        """A worker is woken, looks, and takes a number. What it does next may come late, or never."""
        record = self.record(job)
        if record is None or record.status is not JobStatus.QUEUED:
            return multiple()
        outcome = self.write_once.outcome(job)
        if outcome is not None:
            apply_outcome(self.job_store, job, outcome)
            return multiple()
        epoch = self.write_once.allocate_epoch(job, worker, now_iso(), attempts=record.attempts)
        return Run(job, epoch, worker) if epoch is not None else multiple()

    @rule(target=runs, ticket=consumes(tickets))
    def claim(self, ticket: Run) -> Any:
        before = self.record(ticket.job)
        got = self.job_store.claim(ticket.job, epoch=ticket.epoch, worker=ticket.worker, lease_seconds=LEASE_SECONDS)
        assert got == (before is not None and before.status is JobStatus.QUEUED and before.epoch < ticket.epoch), (
            "queued, and a number that was never used"
        )
        if got:
            commits.put_base(self.store, commits.ResumeBase(job=ticket.job, epoch=ticket.epoch, resumed=None))
        return ticket if got else multiple()

    @rule(target=runs, job=jobs, worker=st.sampled_from(WORKERS))
    def claim_at_once(self, job: str, worker: str) -> Any:
        ticket = self.take_ticket(job, worker)
        return self.claim(ticket) if isinstance(ticket, Run) else multiple()

    @rule(run=runs)
    def beat(self, run: Run) -> None:
        record = self.record(run.job)
        change = self.job_store.beat(run.job, epoch=run.epoch, lease_seconds=LEASE_SECONDS)
        assert change.done == self.has(run, record)

    def has(self, run: Run, record: JobRecord | None) -> bool:
        return record is not None and record.epoch == run.epoch and record.status in HELD

    @rule(run=runs, count=st.integers(1, 3), again=st.booleans())
    def tell(self, run: Run, count: int, again: bool) -> None:
        """A worker, or a zombie, sends events, or sends them again."""
        before = self.record(run.job)
        first = 1 if again else run.events + 1
        events = [JobEvent(type="metric", step=n, data={"reward": n}) for n in range(first, run.events + count + 1)]
        change = self.job_store.change(
            run.job, from_statuses=HELD, epoch=run.epoch, events=events, first_ordinal=first, fields={"step": count}
        )
        assert change.done == self.has(run, before)
        if change.done:
            run.events += count
        else:
            assert self.record(run.job) == before, "a zombie changes nothing"

    @rule(run=runs)
    def commit(self, run: Run) -> None:
        """A checkpoint is stored; a zombie's may be too, below its own prefix."""
        run.step += 1
        commit = commits.Commit(job=run.job, epoch=run.epoch, step=run.step, checkpoint="c/")
        commits.put_commit(self.store, commit)

    @rule(job=jobs)
    def let_lease_run_out(self, job: str) -> None:
        self.job_store.client.zadd(f"{self.queue.prefix}:leases", {job: 0}, xx=True)

    @rule(run=runs, stopped=st.booleans())
    def give_back(self, run: Run, stopped: bool) -> None:
        record = self.record(run.job)
        if record is not None and self.has(run, record):
            hand_back(
                self.job_store, self.write_once, self.wakeups, record, STOPPED if stopped else LOST, by=run.worker
            )

    @rule(job=jobs, order=st.sampled_from(["pause", "cancel"]))
    def give_back_what_changed_meanwhile(self, job: str, order: Command) -> None:
        """A worker or a sweeper acts on what it read a while ago."""
        record = self.record(job)
        if record is not None and record.status in HELD:
            with suppress(Conflict):
                self.orders.give(job, order)
            hand_back(self.job_store, self.write_once, self.wakeups, record, LOST, by="late")

    @rule(target=endings, run=runs, status=st.sampled_from(["succeeded", "failed", "cancelled"]))
    def write_outcome(self, run: Run, status: FinalStatus) -> Any:
        """A run that believes it has the job writes how it ended; it may die before the record, or be a zombie."""
        prefix = object_keys.run(run.job, run.epoch)
        objects = list(event_log.store_events(self.store, self.job_store, run.job, prefix, after=0))
        manifest = self.write_once.put_manifest(Manifest(job=run.job, epoch=run.epoch, objects=objects))
        error = {"code": "x", "class": "infra", "message": "", "hint": "", "retryable": False}
        outcome = Outcome(
            job=run.job,
            status=status,
            epoch=run.epoch,
            time=now_iso(),
            by=run.worker,
            error=error if status == "failed" else None,
            manifest=manifest,
        )
        standing = self.write_once.put_outcome(outcome)
        if standing == outcome:
            self.winners.setdefault(run.job, set()).add(run.epoch)
        return standing

    @rule(ending=endings)
    def settle(self, ending: Outcome) -> None:
        apply_outcome(self.job_store, ending.job, ending, add_error=True)

    # Everyone else

    @rule()
    def sweep(self) -> None:
        self.sweeper.take_over_expired()

    @rule()
    def finish_what_others_began(self) -> None:
        self.sweeper._recovery.finish()

    @precondition(lambda self: not self.lost)
    @rule()
    def lose_valkey(self) -> None:
        keys = self.job_store.client.keys(f"{self.queue.prefix}:*")
        if keys:
            self.job_store.client.delete(*keys)
        self.lost = True
        self.newest.clear()
        self.status.clear()

    @rule()
    def rebuild(self) -> None:
        self.rebuild_now()

    def rebuild_now(self) -> None:
        rebuild = Rebuild(self.store, self.job_store, self.wakeups, lease_seconds=LEASE_SECONDS)
        report = rebuild.run()
        assert report.unreadable == {}
        self.lost = False
        assert {job for job in self.known if self.record(job)} == set(self.known), "no accepted job is lost"

    # What must always hold

    @invariant()
    def everything_agrees(self) -> None:
        records = self.job_store.get_many(list(self.known))
        for record in records:
            self.agrees_with_its_outcome(record)
        self.lists_agree(records)
        self.events_agree({record.id: record for record in records})

    def agrees_with_its_outcome(self, record: JobRecord) -> None:
        outcome = self.write_once.outcome(record.id)
        assert len(self.winners.get(record.id, ())) <= 1, "at most one epoch finishes"
        assert 0 <= record.attempts <= MAX_ATTEMPTS
        assert record.epoch <= self.write_once.latest_epoch(record.id)
        if record.status not in TERMINAL:
            assert record.id not in self.ended, "what ended has begun again"
            return
        assert outcome is not None
        told = (record.status.value, record.manifest, record.error)
        assert told == (outcome.status, outcome.manifest, outcome.error)
        before = self.ended.setdefault(record.id, record)
        assert (before.status, before.manifest) == (record.status, record.manifest), "an end is for good"

    def lists_agree(self, records: list[JobRecord]) -> None:
        by_status = {status: {r.id for r in records if r.status is status} for status in JobStatus}
        wanted = {"queued": by_status[JobStatus.QUEUED], "leases": set[str]().union(*(by_status[s] for s in HELD))}
        for owner in OWNERS:
            mine = {record.id for record in records if record.owner == owner}
            wanted[f"owner:{owner}"] = mine
            wanted |= {f"owner:{owner}:{status.value}": mine & by_status[status] for status in JobStatus}
        pipeline = self.job_store.client.pipeline(transaction=False)
        for index in wanted:
            pipeline.zrange(f"{self.queue.prefix}:{index}", 0, -1)
        *found, counts = pipeline.hgetall(f"{self.queue.prefix}:statuses").execute()
        assert {index: set(ids) for index, ids in zip(wanted, found, strict=True)} == wanted
        counted = {status: int(n) for status, n in counts.items() if int(n)}
        assert counted == {status.value: len(ids) for status, ids in by_status.items() if ids}

    def events_agree(self, records: dict[str, JobRecord]) -> None:
        """Numbers rise and are never used again; statuses change as they may, to the record's."""
        for job in self.known:
            events = self.job_store.events(job, after=self.newest.get(job, 0), limit=10_000)
            outcome = self.write_once.outcome(job)
            for event in events:
                seen = self.told.setdefault((job, event["seq"]), event)
                # A job that the rebuild itself ended has its end after what was stored.
                if not (outcome and outcome.by.startswith("rebuild")):
                    assert seen == event, "a number was used twice"
                self.newest[job] = event["seq"]
                if event["type"] == "status" and "status" in event["data"]:
                    self.changes_as_it_may(job, JobStatus(event["data"]["status"]), outcome)
            if job in records and job in self.status:
                assert self.status[job] is records[job].status

    def changes_as_it_may(self, job: str, new: JobStatus, outcome: Outcome | None) -> None:
        old = self.status.get(job, new)
        settled = old not in TERMINAL and outcome is not None and new.value == outcome.status
        assert new is old or new in TRANSITIONS[old] or settled, f"{old} -> {new}"
        self.status[job] = new

    def teardown(self) -> None:
        """Whatever has happened: every job can be brought to an end."""
        try:
            self.rebuild_now()
            self.sweeper._recovery.finish()
            for job in self.known:
                self.bring_to_an_end(job)
            self.everything_agrees()
        finally:
            keys = self.job_store.client.keys(f"{self.queue.prefix}:*")
            if keys:
                self.job_store.client.delete(*keys)
            self.job_store.client.connection_pool.disconnect()

    def bring_to_an_end(self, job: str) -> None:
        for _ in range(20):
            record = self.record(job)
            assert record is not None
            if record.status in TERMINAL:
                return
            if record.status is JobStatus.PAUSED:
                self.order(job, "resume")
            if record.status in HELD:
                self.let_lease_run_out(job)
                self.sweep()
            run = self.claim_at_once(job, "w1")
            if isinstance(run, Run):
                self.settle(self.write_outcome(run, "succeeded"))
        pytest.fail(f"{job} stays {record.status}")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("examples", [25, pytest.param(150, marks=pytest.mark.long)])
def test_the_state_machine(valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch, examples: int) -> None:
    monkeypatch.setattr(jobs.lifecycle.recovery, "SUBMITTING_SECONDS", 0)
    monkeypatch.setattr(jobs.lifecycle.recovery, "ORDERING_SECONDS", 0)
    Jobs.valkey = valkey
    run_state_machine_as_test(
        Jobs,
        settings=settings(
            max_examples=int(os.environ.get("GRPO_TEST_EXAMPLES", examples)),
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )


def test_no_change_leads_where_the_table_does_not(valkey: ValkeyServer, prefix: str) -> None:
    """Every pair of states, asked of the scripts themselves."""
    job_store = JobStore(QueueSettings.model_validate({"redis_url": valkey.url, "prefix": prefix}))
    asked = {"id": "", "owner": "ann", "created_at": now_iso(), "queue": "q", "spec": SPEC.as_dict()}
    for old in JobStatus:
        for new in set(JobStatus) - {old}:
            for settles in (False, True):
                job = new_job_id()
                record = record_of({**asked, "id": job, "spec_sha256": ""})
                job_store.create(JobRecord(**{**record.__dict__, "status": old}))
                allowed = new in TRANSITIONS[old] or (settles and new in TERMINAL)
                change = job_store.change(job, to=new, settles=settles)
                assert change.done is allowed, (old, new, settles)
                assert change.status is (new if allowed else old)
                if not settles:
                    other = new_job_id()
                    job_store.create(JobRecord(**{**record.__dict__, "id": other, "status": old}))
                    assert job_store.apply_command(other, 1, {old: new}).done is (new in TRANSITIONS[old])
    assert strict_json.dumps(sorted(TERMINAL)) == '["cancelled","failed","succeeded"]'
