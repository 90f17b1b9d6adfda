"""What has ended goes after its time and not before, stays readable where it should, and does not come back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from ulid import ULID

from grpo_client.cli import main
from jobs.errors import Conflict, InUse, NotFound, Unavailable
from jobs.lifecycle.outcomes import apply_outcome
from jobs.lifecycle.rebuild import Rebuild
from jobs.lifecycle.retention import Retention, RetentionSettings
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store import object_keys
from jobs.store.job import JobRecord, JobStatus
from jobs.store.job_store import JobEvent
from jobs.store.write_once import Manifest, ManifestEntry, Outcome
from tests.integration.running import in_environment, wait_until
from tests.integration.test_service import end, submit

Keep = Callable[..., Retention]
OLD = datetime.now(UTC) - timedelta(days=90)


@pytest.fixture
def storage(own_bucket: StorageSettings) -> StorageSettings:
    """All of a bucket is looked through."""
    return own_bucket


@pytest.fixture
def service(storage: StorageSettings, queue_settings: QueueSettings) -> JobService:
    service = JobService(storage, queue_settings)
    service.check_storage()
    return service


@pytest.fixture
def keep(service: JobService, monkeypatch: pytest.MonkeyPatch) -> Keep:
    """Retention that keeps everything but what is said, and takes its time on a busy machine."""
    monkeypatch.setattr("jobs.lifecycle.retention.STEP_SECONDS", 60.0)

    def keep(**settings: float) -> Retention:
        nothing = {"record_days": 0, "records": 0, "job_days": 0, "checkpoint_days": 0, "erased_days": 0}
        values = RetentionSettings.model_validate({**nothing, **settings})
        return Retention(service.job_store, service.write_once, values)

    return keep


def train(service: JobService, **fields: Any) -> JobRecord:
    """A job that has succeeded, with an adapter and a checkpoint."""
    job = submit(service, **fields)
    assert service.write_once.allocate_epoch(job.id, "w", "2026-01-02T03:04:05Z") == 1
    assert service.job_store.claim(job.id, epoch=1, worker="w", lease_seconds=60)
    events = [JobEvent(type="metric", step=n, data={"reward": n / 4}) for n in (1, 2)]
    service.job_store.change(job.id, epoch=1, events=events, first_ordinal=1, fields={"step": 2, "reward": 0.5})
    finish(service, job.id)
    return service.get(job.id, "ann")


def finish(service: JobService, job_id: str, *, ended: datetime | None = None, best_step: int | None = None) -> None:
    from jobs.store.event_log import store_events

    prefix = object_keys.run(job_id, 1)
    objects = list(store_events(service.store, service.job_store, job_id, prefix, after=0))
    best = [] if best_step is None else [f"checkpoints/step-{best_step:06d}/manifest.json"]
    for path in ("adapter/adapter_model.safetensors", "checkpoints/step-000002/manifest.json", *best):
        service.store.put(prefix + path, b'{"step": 2, "files": []}')
        objects.append(ManifestEntry(path=path, key=prefix + path, sha256="0" * 64, size=24))
    manifest = service.write_once.put_manifest(Manifest(job=job_id, epoch=1, objects=objects, best_step=best_step))
    when = (ended or datetime.now(UTC)).isoformat()
    outcome = Outcome(job=job_id, status="succeeded", epoch=1, time=when, by="w", manifest=manifest)
    apply_outcome(service.job_store, job_id, service.write_once.put_outcome(outcome))


def age(service: JobService, *job_ids: str) -> None:
    """As if these had ended long ago."""
    key = f"{service.job_store.prefix}:ended:ann"
    for job_id in job_ids:
        assert service.job_store.client.zadd(key, {job_id: OLD.timestamp() * 1000}, xx=True, ch=True)


def keys_of(service: JobService, job_id: str) -> list[str]:
    """Every key of Valkey that names the job, or has it for a member."""
    client, found = service.job_store.client, []
    for key in client.keys(f"{service.job_store.prefix}:*"):
        is_set = client.type(key) == "zset" and client.zscore(key, job_id) is not None
        if job_id in key or is_set:
            found.append(key)
    return found


def test_old_records_leave_valkey_and_the_job_is_read_as_before(service: JobService, keep: Keep) -> None:
    trained, cancelled, young, waiting = train(service), submit(service), train(service), submit(service)
    service.pause(cancelled.id, "ann")
    end(service, cancelled.id)
    ended = (trained.id, cancelled.id)

    def look(job_id: str) -> tuple[Any, ...]:
        return (
            service.get(job_id, "ann"),
            [(e["seq"], e["type"], e["data"]) for e in service.events(job_id, "ann")],
            [e["seq"] for e in service.read_on(job_id, after=1).events],
            service.read_on(job_id, after=99).ended,
            service.metrics(job_id, "ann"),
            [(a.path, a.sha256) for a in service.artifacts(job_id, "ann")],
            [c.step for c in service.checkpoints(job_id, "ann")],
        )

    before = {job_id: look(job_id) for job_id in ended}
    assert [data for _, _, data in before[cancelled.id][1]] == [
        {"status": s} for s in ("queued", "paused", "cancelled")
    ]
    age(service, *ended)
    retention = keep(record_days=30)
    assert retention.backlog() == retention.surplus().records == 2
    retention.step()
    assert retention.backlog() == 0
    retention.step()
    for job_id in ended:
        assert keys_of(service, job_id) == []
        assert list(service.store.list(object_keys.controls(job_id))) == []
        assert look(job_id) == before[job_id]
        with pytest.raises(NotFound):
            service.get(job_id, "bob")
        for order in (service.cancel, service.pause, service.resume):
            with pytest.raises(Conflict, match="has ended"):
                order(job_id, "ann")
    assert [job.id for job in service.list_jobs("ann", limit=9).items] == [waiting.id, young.id]
    counts = service.telemetry().jobs
    assert (counts[JobStatus.SUCCEEDED], counts[JobStatus.CANCELLED]) == (1, 0)


def test_an_owner_has_so_many_records_and_the_oldest_go(service: JobService, keep: Keep) -> None:
    jobs = [submit(service) for _ in range(5)]
    for job in jobs[::-1]:
        end(service, job.id)
        time.sleep(0.002)  # ended in another millisecond
    other = submit(service, "bob")
    end(service, other.id, "bob")
    keep(records=2).step()
    assert {job.id for job in service.list_jobs("ann", limit=9).items} == {jobs[0].id, jobs[1].id}
    assert [job.id for job in service.list_jobs("bob", limit=9).items] == [other.id]
    assert [service.get(job.id, "ann").status for job in jobs] == [JobStatus.CANCELLED] * 5


def test_a_rebuild_brings_back_neither_what_retired_nor_what_was_deleted(
    service: JobService, keep: Keep, storage: StorageSettings, queue_settings: QueueSettings
) -> None:
    retired, deleted, kept = train(service), train(service), train(service)
    age(service, retired.id)
    keep(record_days=30).step()
    before = service.get(retired.id, "ann")
    service.delete(deleted.id, "ann")
    client = service.job_store.client
    client.delete(*client.keys(f"{service.job_store.prefix}:*"))
    report = Rebuild.of(storage, queue_settings).run()
    assert (report.restored, report.unreadable) == ({"succeeded": 1}, {})
    assert [job.id for job in service.list_jobs("ann", limit=9).items] == [kept.id]
    assert service.get(retired.id, "ann") == before
    with pytest.raises(NotFound):
        service.get(deleted.id, "ann")
    age(service, kept.id)  # a rebuild notes when a job ended
    service.delete(retired.id, "ann")
    with pytest.raises(NotFound):
        service.get(retired.id, "ann")
    assert list(service.store.list(object_keys.folder(retired.id))) == []


def test_jobs_that_ended_before_this_release_are_found(service: JobService, keep: Keep) -> None:
    jobs = [train(service) for _ in range(3)]
    waiting = submit(service)
    client, prefix = service.job_store.client, service.job_store.prefix
    client.delete(f"{prefix}:ended:ann", f"{prefix}:enders")
    for job in jobs:
        client.hset(f"{prefix}:job:{job.id}", "finished_at", int(OLD.timestamp() * 1000))
    retention = keep(record_days=30)
    wait_until(lambda: retention.step() or client.hget(f"{prefix}:retention", "indexed") == "all")
    retention.step()
    assert [job.id for job in service.list_jobs("ann", limit=9).items] == [waiting.id]


def test_a_job_of_which_storage_has_no_end_keeps_its_record(service: JobService, keep: Keep) -> None:
    """As a cancel leaves it that could not reach storage; it keeps no other from leaving."""
    torn, whole = train(service), train(service)
    service.store.delete(object_keys.outcome(torn.id))
    age(service, torn.id, whole.id)
    keep(record_days=30).step()
    assert [job.id for job in service.list_jobs("ann", limit=9).items] == [torn.id]
    assert keep(record_days=30).backlog() == 0, "it is looked at again later"


def test_jobs_that_end_under_the_release_before_leave_too(service: JobService, keep: Keep) -> None:
    """As in a rolling upgrade: the keys were looked through before, and the script that ended them noted nothing."""
    first, later, waiting = train(service), train(service), submit(service)
    client, prefix = service.job_store.client, service.job_store.prefix
    retention = keep(record_days=30)
    wait_until(lambda: retention.step() or client.hget(f"{prefix}:retention", "walk_from"))
    client.zrem(f"{prefix}:ended:ann", first.id, later.id)
    for job in (first, later):
        client.hset(f"{prefix}:job:{job.id}", "finished_at", int(OLD.timestamp() * 1000))

    def listed() -> list[str]:
        client.hset(f"{prefix}:retention", "walk_from", 0)  # an hour later
        retention.step()
        return [job.id for job in service.list_jobs("ann", limit=9).items]

    wait_until(lambda: listed() == [waiting.id])


def test_an_unreadable_job_stops_neither_another_nor_the_walk(
    service: JobService, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, whole = old_job(service, monkeypatch), old_job(service, monkeypatch)
    for job in (broken, whole):
        finish(service, job.id, ended=OLD)
    service.store.put(object_keys.outcome(broken.id), b"{")
    age(service, broken.id, whole.id)
    keep(record_days=30).step()
    assert [job.id for job in service.list_jobs("ann", limit=9).items] == [broken.id]
    service.store.put("jobs/a-folder-of-others/x", b"x")
    service.store.put(f"jobs/job-{'0' * 26}x/x", b"x")
    service.job_store.client.hdel(f"{service.job_store.prefix}:retention", "walk_from")
    keep(job_days=60).step()
    assert list(service.store.list(object_keys.folder(whole.id))) == []


def test_an_object_that_storage_cannot_read_is_passed(
    service: JobService, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, whole = old_job(service, monkeypatch), old_job(service, monkeypatch)
    for job in (lost, whole):
        finish(service, job.id, ended=OLD)
    read = service.store.get

    def get(key: str) -> bytes | None:
        if key == object_keys.outcome(min(lost.id, whole.id)):
            raise Unavailable("Object storage", "a test")
        return read(key)

    monkeypatch.setattr(service.store, "get", get)
    retention = keep(job_days=60)
    with suppress(Unavailable):
        retention.step()
    retention.step()
    assert list(service.store.list(object_keys.folder(max(lost.id, whole.id)))) == []


def test_a_backlog_of_one_owner_keeps_neither_another_nor_the_walk(
    service: JobService, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jobs.lifecycle.retention

    for owner in ("ann", "bob"):
        for _ in range(3):
            end(service, submit(service, owner).id, owner)
    expired = old_job(service, monkeypatch)
    finish(service, expired.id, ended=OLD)
    monkeypatch.setattr(jobs.lifecycle.retention, "STEP_SECONDS", 0)
    retention = keep(records=1, job_days=60)
    retention.step()
    assert list(service.store.list(object_keys.folder(expired.id))) == []
    retention.step()
    assert len(service.list_jobs("bob", limit=9).items) == 2


def test_one_step_that_fails_keeps_no_other_from_being_taken(
    service: JobService, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.lifecycle.housekeeping import Housekeeper

    taken: list[str] = []
    housekeeper = Housekeeper(service.job_store, service.write_once)
    monkeypatch.setattr(
        housekeeper, "_work", (lambda: 1 / 0, lambda: taken.append("census"), lambda: taken.append("r"))
    )
    housekeeper.round()
    assert taken == ["census", "r"]


def test_a_job_stays_for_as_long_as_its_key(service: JobService, keep: Keep) -> None:
    from grpo_core.spec import parse_spec
    from jobs.lifecycle.admission import RequestKey
    from tests.integration.test_service import CPU

    keyed, _ = service.submit_once(parse_spec(CPU), "ann", RequestKey.of("submitJob", "k", "{}"))
    plain, last = submit(service), submit(service)
    for job in (keyed, plain, last):
        end(service, job.id)
        time.sleep(0.002)  # ended in another millisecond
    retention = keep(records=1)
    retention.step()
    retention.step()
    assert [job.id for job in service.list_jobs("ann", limit=9).items] == [last.id, keyed.id]
    assert retention.backlog() == 0
    client, key = service.job_store.client, f"{service.job_store.prefix}:ended:ann"
    assert client.zscore(key, keyed.id) == pytest.approx((keyed.created_at + timedelta(hours=48)).timestamp() * 1000)


def test_owners_without_ended_jobs_are_asked_about_no_more(service: JobService, keep: Keep) -> None:
    job = train(service)
    age(service, job.id)
    retention, enders = keep(record_days=30), f"{service.job_store.prefix}:enders"
    assert service.job_store.client.smembers(enders) == {"ann"}
    retention.step()
    retention.step()
    assert service.job_store.client.smembers(enders) == set()


def old_job(service: JobService, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> JobRecord:
    """A job that was submitted, and has ended, long ago."""
    import jobs.lifecycle.submit

    with monkeypatch.context() as past:
        past.setattr(jobs.lifecycle.submit, "new_job_id", lambda: f"job-{ULID.from_datetime(OLD)}")
        job = submit(service, **fields)
    assert service.write_once.allocate_epoch(job.id, "w", "2026-01-02T03:04:05Z") == 1
    assert service.job_store.claim(job.id, epoch=1, worker="w", lease_seconds=60)
    return job


def test_by_default_no_object_of_a_job_is_deleted(service: JobService, monkeypatch: pytest.MonkeyPatch) -> None:
    job = old_job(service, monkeypatch)
    finish(service, job.id, ended=OLD)
    before = [item.key for item in service.store.list(object_keys.JOBS)]
    retention = Retention(service.job_store, service.write_once, RetentionSettings.model_validate({}))
    retention.step()
    assert [item.key for item in service.store.list(object_keys.JOBS)] == before
    assert (retention.surplus().jobs, retention.surplus().checkpoints) == (0, 0)


def test_old_jobs_are_deleted_where_the_operator_wants_it(
    service: JobService, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, retired, needed, running, young = *(old_job(service, monkeypatch) for _ in range(4)), train(service)
    for job in (gone, retired, needed):
        finish(service, job.id, ended=OLD)
    age(service, retired.id)
    keep(record_days=30).step()
    with monkeypatch.context() as any_checkpoint:
        any_checkpoint.setattr(service._reference_checks, "check", lambda *_: None)
        submit(service, from_checkpoint={"job": needed.id, "step": 2})
    retention = keep(job_days=60)
    assert retention.surplus().jobs == 3
    service.job_store.client.hdel(f"{service.job_store.prefix}:retention", "walk_from")
    retention.step()
    for job in (gone, retired):
        with pytest.raises(NotFound):
            service.get(job.id, "ann")
        assert list(service.store.list(object_keys.folder(job.id))) == []
    assert [service.get(job.id, "ann").status.value for job in (needed, running, young)] == [
        *("succeeded", "running", "succeeded")
    ]
    with pytest.raises(InUse):
        service.delete(needed.id, "ann")


def test_old_checkpoints_go_and_the_adapter_stays(
    service: JobService, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, young = old_job(service, monkeypatch), train(service)
    finish(service, old.id, ended=OLD)
    retention = keep(checkpoint_days=60)
    assert retention.surplus().checkpoints == 1
    retention.step()
    assert service.checkpoints(old.id, "ann") == []
    paths = [artifact.path for artifact in service.artifacts(old.id, "ann")]
    assert "adapter/adapter_model.safetensors" in paths
    assert not [path for path in paths if path.startswith("checkpoints/")]
    assert [found.step for found in service.checkpoints(young.id, "ann")] == [2]
    assert retention.surplus().checkpoints == 0


def test_the_checkpoint_of_the_best_step_stays(
    service: JobService, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = old_job(service, monkeypatch)
    finish(service, old.id, ended=OLD, best_step=1)
    retention = keep(checkpoint_days=60)
    assert retention.surplus().checkpoints == 1
    retention.step()
    paths = [artifact.path for artifact in service.artifacts(old.id, "ann")]
    assert [path for path in paths if path.startswith("checkpoints/")] == ["checkpoints/step-000001/manifest.json"]
    assert retention.surplus().checkpoints == 0


def test_marks_of_deletions_go_once_nothing_can_be_brought_back(service: JobService, keep: Keep) -> None:
    job = train(service)
    service.delete(job.id, "ann")
    retention = keep(erased_days=400)
    assert retention.surplus().erased == 0
    retention.step()
    assert service.store.get(object_keys.erased(job.id)) is not None
    hurried = keep(erased_days=1e-9)
    assert hurried.surplus().erased == 1
    service.job_store.client.hdel(f"{service.job_store.prefix}:retention", "walk_from")
    hurried.step()
    assert service.store.get(object_keys.erased(job.id)) is None


def test_one_step_is_short_and_the_next_goes_on(
    service: JobService, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jobs.lifecycle.retention

    olds = [old_job(service, monkeypatch) for _ in range(3)]
    for job in olds:
        finish(service, job.id, ended=OLD)
    monkeypatch.setattr(jobs.lifecycle.retention, "STEP_SECONDS", 0)
    retention, left = keep(job_days=60), []
    for _ in range(4):
        retention.step()
        left.append(len({item.key.split("/")[1] for item in service.store.list(object_keys.JOBS)}))
    assert left == [2, 1, 0, 0]


def test_what_submissions_leave_in_valkey_runs_out(service: JobService) -> None:
    from grpo_core.spec import parse_spec
    from jobs.lifecycle.admission import RequestKey
    from tests.integration.test_service import CPU

    job, _ = service.submit_once(parse_spec(CPU), "ann", RequestKey.of("submitJob", "k", "{}"))
    end(service, job.id)
    client, prefix = service.job_store.client, service.job_store.prefix
    for pattern in ("idempotency", "admitted"):
        assert all(client.pttl(key) > 0 for key in client.keys(f"{prefix}:{pattern}:*"))
    assert client.keys(f"{prefix}:idempotency:*")
    assert client.zcard(f"{prefix}:submitting") == client.zcard(f"{prefix}:ordering") == 0


def test_the_command_shows_what_would_go_and_deletes_nothing(
    service: JobService,
    storage: StorageSettings,
    queue_settings: QueueSettings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gone, record = old_job(service, monkeypatch), train(service)
    finish(service, gone.id, ended=OLD)
    age(service, record.id)
    for name, value in {
        **in_environment(storage, queue_settings),
        "GRPO_KEEP_JOBS_DAYS": "60",
        "GRPO_KEEP_RECORDS_DAYS": "30",
    }.items():
        monkeypatch.setenv(name, value)
    before = [item.key for item in service.store.list("")]
    with pytest.raises(SystemExit) as raised:
        main(["admin", "retention", "--json"])
    assert raised.value.code == 0
    assert json.loads(capsys.readouterr().out) == {"records": 1, "jobs": 1, "checkpoints": 0, "erased": 0}
    assert [item.key for item in service.store.list("")] == before
    assert len(service.list_jobs("ann", limit=9).items) == 2
