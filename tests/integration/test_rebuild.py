"""Valkey is lost whole: what `grpo admin rebuild` puts back from storage, and what workers make of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from grpo_client.cli import main
from grpo_core import strict_json
from grpo_core.spec import parse_spec
from jobs.lifecycle.celery_app import WakeupSender
from jobs.lifecycle.outcomes import apply_outcome
from jobs.lifecycle.rebuild import Rebuild, RebuildReport
from jobs.lifecycle.sweeper import Sweeper
from jobs.lifecycle.wakeups import WakeupPublisher
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store import event_log, object_keys
from jobs.store.commits import ResumeBase, put_base
from jobs.store.job import JobRecord, JobStatus
from jobs.store.job_store import JobEvent
from jobs.store.write_once import Manifest, ManifestEntry, Outcome
from jobs.worker.lease import Lease
from tests.integration.running import wait_until

SPEC = parse_spec(
    {"name": "算术", "metadata": {"team": "a"}, "resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}}
)
LONG_AGO = "2026-01-02T03:04:05.678+00:00"
Lose = Callable[[], None]
Run = Callable[..., RebuildReport]


@pytest.fixture
def storage(own_bucket: StorageSettings) -> StorageSettings:
    """A rebuild looks at every job there is."""
    return own_bucket


@pytest.fixture
def queue(queue_settings: QueueSettings) -> QueueSettings:
    return queue_settings.model_copy(update={"lease_seconds": 1.5})


@pytest.fixture
def service(storage: StorageSettings, queue: QueueSettings) -> JobService:
    service = JobService(storage, queue)
    service.check_storage()
    return service


@pytest.fixture
def lose(service: JobService) -> Lose:
    """Valkey comes back with nothing in it."""

    def lose() -> None:
        client = service.job_store.client
        keys = client.keys(f"{service.job_store.prefix}:*")
        assert keys
        client.delete(*keys)

    return lose


@pytest.fixture
def rebuild(storage: StorageSettings, queue: QueueSettings) -> Run:
    return lambda **options: Rebuild.of(storage, queue, **options).run()


@pytest.fixture
def sweeper(service: JobService, queue: QueueSettings) -> Sweeper:
    return Sweeper(
        service.job_store, service.write_once, WakeupPublisher(WakeupSender(queue), service.job_store), queue
    )


def claim(service: JobService, job: JobRecord, attempts: int = 0, lease_seconds: float = 1.5) -> int:
    epoch = service.write_once.allocate_epoch(job.id, "w", event_log.now_iso(), attempts=attempts)
    assert epoch is not None
    assert service.job_store.claim(job.id, epoch=epoch, worker="w", lease_seconds=lease_seconds)
    return epoch


def train(service: JobService, job: JobRecord, epoch: int, steps: int) -> None:
    """Tell of some steps, as a worker does."""
    events = [JobEvent(type="metric", step=n, data={"reward": n / 4}) for n in range(1, steps + 1)]
    fields = {"step": steps, "reward": steps / 4}
    assert service.job_store.change(job.id, epoch=epoch, events=events, first_ordinal=1, fields=fields).done


def ship(service: JobService, job: JobRecord, epoch: int, *, up_to: int | None = None) -> list[ManifestEntry]:
    """Store the events there are, as a worker does."""
    events = [event for event in service.events(job.id, "ann") if up_to is None or event["seq"] <= up_to]
    name = event_log.events_name(events[0]["seq"], events[-1]["seq"])
    key = object_keys.run(job.id, epoch) + name
    body = "".join(f"{strict_json.dumps(event)}\n" for event in events).encode()
    service.store.put(key, body)
    return [ManifestEntry(path=name, key=key, sha256="0" * 64, size=len(body))]


def finish(service: JobService, job: JobRecord, epoch: int, **outcome: Any) -> None:
    manifest = Manifest(job=job.id, epoch=epoch, objects=ship(service, job, epoch))
    ended = Outcome(job=job.id, epoch=epoch, time=LONG_AGO, by="w", **outcome)
    ended = replace(ended, manifest=service.write_once.put_manifest(manifest))
    apply_outcome(service.job_store, job.id, service.write_once.put_outcome(ended), add_error=True)


def comparable(record: JobRecord) -> dict[str, Any]:
    """What must survive to the letter; times of runs are the workers' and need not be exact."""
    loose = ("updated_at", "started_at", "finished_at", "run_at", "run_ms", "restored", "phase", "worker")
    return {name: value for name, value in record.__dict__.items() if name not in loose}


def without_time(events: list[dict[str, Any]]) -> list[Any]:
    return [(event["seq"], event["epoch"], event["type"], event["data"]) for event in events]


def test_everything_comes_back_as_it_was(service: JobService, lose: Lose, rebuild: Run) -> None:
    key, _ = service.keys.create("ann")
    jobs = {name: service.submit(SPEC, "ann") for name in ("queued", "paused", "running", "succeeded", "failed")}
    other = service.submit(SPEC, "bob")
    service.pause(jobs["paused"].id, "ann")
    for name in ("running", "succeeded", "failed"):
        epoch = claim(service, jobs[name], attempts=1)
        service.job_store.change(jobs[name].id, fields={"attempts": 1})
        train(service, jobs[name], epoch, 3)
        if name == "running":
            ship(service, jobs[name], epoch)
    error = {"code": "nan", "class": "diverged", "message": "The loss is NaN.", "hint": "Lower it.", "retryable": False}
    finish(service, jobs["succeeded"], 1, status="succeeded")
    finish(service, jobs["failed"], 1, status="failed", error=error)
    before = {name: service.get(job.id, "ann") for name, job in jobs.items()}
    events = {name: service.events(job.id, "ann") for name, job in jobs.items()}
    artifacts = [artifact.key for artifact in service.artifacts(jobs["succeeded"].id, "ann")]

    lose()
    assert service.list_jobs("ann", limit=9).items == []
    planned = rebuild(dry_run=True)
    assert service.list_jobs("ann", limit=9).items == [], "a dry run changes nothing"
    report = rebuild()
    assert replace(planned, dry_run=False) == report
    assert (report.jobs, report.present, report.keys, report.unreadable) == (6, 0, 1, {})
    assert report.restored == {"queued": 2, "running": 1, "paused": 1, "succeeded": 1, "failed": 1}

    assert service.authenticate(key) is not None
    assert [job.id for job in service.list_jobs("ann", limit=9).items] == sorted([j.id for j in jobs.values()])[::-1]
    assert [job.id for job in service.list_jobs("bob", limit=9).items] == [other.id]
    for name, job in jobs.items():
        after = service.get(job.id, "ann")
        assert comparable(after) == comparable(before[name]), name
        was, now = before[name].started_at, after.started_at
        assert (was is None) == (now is None)
        assert was is None or now is None or abs(was - now) < timedelta(seconds=2)
        ended_at = datetime.fromisoformat(LONG_AGO) if name in ("succeeded", "failed") else None
        assert after.finished_at == ended_at
        only = service.list_jobs("ann", limit=9, status=JobStatus(name))
        assert [job.id for job in only.items] == [job.id]
        if name in ("succeeded", "failed"):
            # The end is made from the outcome, whose time is the worker's.
            assert without_time(service.events(job.id, "ann")) == without_time(events[name])
            assert service.read_on(job.id, after=0).ended
    assert [artifact.key for artifact in service.artifacts(jobs["succeeded"].id, "ann")] == artifacts
    assert set(service.job_store.unclaimed(0)) == {jobs["queued"].id, other.id}

    again = rebuild()
    assert (again.present, again.restored, again.corrected, again.keys) == (6, {}, 0, 0)


def test_a_paused_job_that_had_begun_is_paused_and_a_cancelled_one_ends(
    service: JobService, lose: Lose, rebuild: Run
) -> None:
    pausing, cancelling, resumed = (service.submit(SPEC, "ann") for _ in range(3))
    for job in (pausing, cancelling, resumed):
        claim(service, job)
    service.pause(pausing.id, "ann")
    service.cancel(cancelling.id, "ann")
    service.pause(resumed.id, "ann")
    service.job_store.change(resumed.id, to=JobStatus.PAUSED)
    service.resume(resumed.id, "ann")
    lose()
    assert rebuild(dry_run=True).restored == {"running": 1, "paused": 1, "cancelled": 1}
    assert service.write_once.outcome(cancelling.id) is None
    assert rebuild().restored == {"running": 1, "paused": 1, "cancelled": 1}
    outcome = service.write_once.outcome(cancelling.id)
    assert outcome is not None
    assert outcome.status == service.get(cancelling.id, "ann").status.value == "cancelled"
    assert service.events(cancelling.id, "ann")[-1]["data"] == {"status": "cancelled"}
    assert service.resume(pausing.id, "ann").status is JobStatus.QUEUED
    assert service.job_store.beat(pausing.id, epoch=1, lease_seconds=9).refusal == "status", "its run is over"
    assert claim(service, pausing) == 2


def test_a_worker_that_still_trains_goes_on_as_if_nothing_had_happened(
    service: JobService, lose: Lose, rebuild: Run, sweeper: Sweeper
) -> None:
    job = service.submit(SPEC, "ann")
    lease = Lease(service.job_store, job.id, claim(service, job), 1.5)
    lease.start()
    try:
        lose()
        time.sleep(0.6)
        assert not lease.lost, "a record that is gone is no reason to give up"
        assert rebuild().restored == {"running": 1}
        for _ in range(15):
            time.sleep(0.2)
            sweeper.take_over_expired()
        record = service.get(job.id, "ann")
        assert (record.status, record.epoch, record.restored) == (JobStatus.RUNNING, 1, False)
        assert not lease.lost
    finally:
        lease.stop()
    # What it had told was lost, and it is asked for that again.
    told = [JobEvent(type="metric", step=9, data={"reward": 1.0})]
    change = service.job_store.change(job.id, epoch=1, events=told, first_ordinal=41)
    assert (change.refusal, change.shipped) == ("events", 0)
    assert service.job_store.change(job.id, epoch=1, events=told * 41, first_ordinal=1).shipped == 41
    service.write_once.put_outcome(Outcome(job=job.id, status="succeeded", epoch=1, time=event_log.now_iso(), by="w"))
    apply_outcome(service.job_store, job.id, service.write_once.outcome(job.id) or pytest.fail("it was put"))
    assert service.get(job.id, "ann").status is JobStatus.SUCCEEDED


def test_where_no_worker_is_left_the_job_is_queued_again_and_no_attempt_is_counted(
    service: JobService, lose: Lose, rebuild: Run, sweeper: Sweeper
) -> None:
    job = service.submit(SPEC, "ann")
    claim(service, job, attempts=2)
    lose()
    rebuild()
    sweeper.take_over_expired()
    assert service.get(job.id, "ann").status is JobStatus.RUNNING, "it may still beat"

    def queued() -> bool:
        sweeper.take_over_expired()
        return service.get(job.id, "ann").status is JobStatus.QUEUED

    wait_until(queued, 5)
    assert service.get(job.id, "ann").attempts == 2, "and this one, at its third, would have failed"
    claim(service, job, lease_seconds=0)
    sweeper.take_over_expired()
    assert service.get(job.id, "ann").status is JobStatus.FAILED, "a run that is lost later counts"


def test_an_outcome_written_while_the_record_was_gone_is_the_truth(
    service: JobService, lose: Lose, rebuild: Run
) -> None:
    job = service.submit(SPEC, "ann")
    epoch = claim(service, job)
    lose()
    outcome = Outcome(job=job.id, status="succeeded", epoch=epoch, time=event_log.now_iso(), by="w")
    apply_outcome(service.job_store, job.id, service.write_once.put_outcome(outcome))
    assert rebuild().restored == {"succeeded": 1}
    assert service.get(job.id, "ann").status is JobStatus.SUCCEEDED


def test_no_event_number_comes_twice_and_stored_events_are_read_again(
    service: JobService, lose: Lose, rebuild: Run
) -> None:
    job = service.submit(SPEC, "ann")
    epoch = claim(service, job)
    train(service, job, epoch, 40)
    seen = service.events(job.id, "ann")
    stored = seen[:30]
    ship(service, job, epoch, up_to=stored[-1]["seq"])
    for round_ in (1, 2):
        lose()
        time.sleep(0.01)
        rebuild()
        read = service.events(job.id, "ann")
        assert read[:30] == stored
        fresh = read[30:]
        assert [event["type"] for event in fresh] == ["log", "status"]
        assert fresh[0]["seq"] > max(event["seq"] for event in seen), round_
        assert service.read_on(job.id, after=seen[-1]["seq"]).events == fresh, "a reader that was ahead misses nothing"
        seen += fresh
    assert service.get(job.id, "ann").step == stored[-1]["step"]


def test_a_record_that_lags_behind_is_corrected_and_no_other_is_touched(service: JobService, rebuild: Run) -> None:
    ended, ordered, running, fine = (service.submit(SPEC, "ann") for _ in range(4))
    for job in (ended, running):
        claim(service, job)
    service.write_once.put_outcome(Outcome(job=ended.id, status="failed", epoch=1, time=event_log.now_iso(), by="w"))
    service.write_once.put_command(ordered.id, "pause", "api", event_log.now_iso())
    before = [service.get(job.id, "ann") for job in (running, fine)]
    assert rebuild(dry_run=True).corrected == 2
    report = rebuild()
    assert (report.present, report.corrected, report.restored) == (4, 2, {})
    assert service.get(ended.id, "ann").status is JobStatus.FAILED
    assert service.get(ordered.id, "ann").status is JobStatus.PAUSED
    assert [service.get(job.id, "ann") for job in (running, fine)] == before
    assert rebuild().corrected == 0


def test_what_cannot_be_read_is_named_and_stops_nothing(service: JobService, lose: Lose, rebuild: Run) -> None:
    good, newer, broken, torn = (service.submit(SPEC, "ann") for _ in range(4))
    asked = service.store.get_json(object_keys.job(newer.id)) or {}
    service.store.put_json(object_keys.job(newer.id), {**asked, "v": 99})
    service.store.put(object_keys.job(broken.id), b"{")
    service.store.delete(object_keys.job(torn.id))
    service.write_once.put_command(torn.id, "cancel", "api", event_log.now_iso())
    lose()
    report = rebuild()
    assert report.restored == {"queued": 1}
    assert service.get(good.id, "ann").status is JobStatus.QUEUED
    assert set(report.unreadable) == {newer.id, broken.id, torn.id}
    assert "version 99" in report.unreadable[newer.id]
    assert "job.json is missing" in report.unreadable[torn.id]


def test_a_submission_its_client_heard_nothing_of_becomes_a_job(
    service: JobService, lose: Lose, rebuild: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.job_store, "create", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        service.submit(SPEC, "ann")
    lose()
    assert rebuild().restored == {"queued": 1}


def test_two_rebuilds_at_once_make_one_record_of_each(service: JobService, lose: Lose, rebuild: Run) -> None:
    from concurrent.futures import ThreadPoolExecutor

    jobs = [service.submit(SPEC, "ann") for _ in range(12)]
    for job in jobs:
        train(service, job, claim(service, job), 20)
        ship(service, job, 1)
    stored = {job.id: service.events(job.id, "ann") for job in jobs}
    lose()
    with ThreadPoolExecutor(3) as pool:
        reports = [future.result() for future in [pool.submit(rebuild) for _ in range(3)]]
    assert sum(report.restored.get("running", 0) for report in reports) == 12
    for job in jobs:
        events = service.events(job.id, "ann")
        assert events[:-2] == stored[job.id]
        assert [event["type"] for event in events[-2:]] == ["log", "status"]


def test_the_command(
    service: JobService,
    lose: Lose,
    storage: StorageSettings,
    queue: QueueSettings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    environment = {
        "S3_ENDPOINT": storage.endpoint,
        "S3_BUCKET": storage.bucket,
        "S3_REGION": storage.region,
        "AWS_ACCESS_KEY_ID": storage.access_key.get_secret_value(),
        "AWS_SECRET_ACCESS_KEY": storage.secret_key.get_secret_value(),
        "REDIS_URL": queue.redis_url.get_secret_value(),
        "GRPO_PREFIX": queue.prefix,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as raised:
            main(["admin", "rebuild", *words])
        captured = capsys.readouterr()
        return int(raised.value.code or 0), captured.out, captured.err

    service.keys.create("ann")
    service.submit(SPEC, "ann")
    lose()
    code, out, _ = run("--dry-run", "--json")
    planned = json.loads(out)
    assert (code, planned["dry_run"], planned["restored"], planned["keys"]) == (0, True, {"queued": 1}, 1)
    code, out, _ = run()
    assert code == 0
    assert "queued jobs" in out
    assert service.list_jobs("ann", limit=9).items[0].created_at <= datetime.now(UTC)
    service.store.put(object_keys.job("job-broken"), b"")
    code, out, _ = run()
    assert code == 1
    assert "job-broken" in out
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    code, _, err = run()
    assert (code, "Valkey did not answer" in err, "Traceback" in err) == (1, True, False)


def test_a_number_that_was_taken_and_not_used_fences_nobody(service: JobService, lose: Lose, rebuild: Run) -> None:
    """Two workers were woken for one job: both took a number, and the first one has it."""
    job = service.submit(SPEC, "ann")
    epoch = claim(service, job)
    put_base(service.store, ResumeBase(job=job.id, epoch=epoch, resumed=None))
    assert service.write_once.allocate_epoch(job.id, "too late", event_log.now_iso()) == epoch + 1
    lose()
    rebuild()
    record = service.get(job.id, "ann")
    assert (record.status, record.epoch, record.worker) == (JobStatus.RUNNING, epoch, "w")
    assert service.job_store.beat(job.id, epoch=epoch, lease_seconds=9).done


def test_a_deleted_job_does_not_come_back(service: JobService, lose: Lose, rebuild: Run) -> None:
    job, kept = service.submit(SPEC, "ann"), service.submit(SPEC, "ann")
    service.cancel(job.id, "ann")
    before = service.job_store.get(job.id)
    assert before is not None
    service.delete(job.id, "ann")
    # A worker that was fenced, and a backup of Valkey from before the deletion, bring some of it back.
    service.store.put(f"{object_keys.run(job.id, 1)}metrics.jsonl", b"{}")
    lose()
    service.job_store.restore(before, event_seq=9, lease_seconds=None)
    assert rebuild(dry_run=True).restored == {"queued": 1}
    assert service.job_store.get(job.id) is not None
    report = rebuild()
    assert (report.restored, report.unreadable) == ({"queued": 1}, {})
    assert service.job_store.get(job.id) is None
    assert [found.id for found in service.list_jobs("ann", limit=10).items] == [kept.id]
    assert list(service.store.list(object_keys.folder(job.id))) == []


def test_another_service_in_the_same_bucket_keeps_its_jobs(
    service: JobService, storage: StorageSettings, queue: QueueSettings, lose: Lose, rebuild: Run
) -> None:
    ours = service.submit(SPEC, "ann")
    theirs = JobService(storage, queue.model_copy(update={"prefix": f"{queue.prefix}-theirs"})).submit(SPEC, "ann")
    lose()
    assert rebuild().restored == {"queued": 1}
    assert (service.job_store.get(theirs.id), service.get(ours.id, "ann").status) == (None, JobStatus.QUEUED)
