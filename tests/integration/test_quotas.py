"""GPU-hours and bytes of each owner: measured from runs and objects, kept through a loss of Valkey, and refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from grpo_client import GrpoClient, ProblemError
from grpo_client.cli import main
from grpo_core.datasets import JsonlChecker
from grpo_core.spec import parse_spec
from jobs.errors import Unavailable
from jobs.lifecycle.admission import RequestKey
from jobs.lifecycle.rebuild import Rebuild
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store import object_keys
from jobs.store.job import JobRecord, JobStatus
from jobs.usage.gpu_time import KEEP_DAYS, GpuTime
from jobs.usage.quotas import GpuQuotaUsedUp, QuotaSettings, StorageQuotaUsedUp
from jobs.usage.stored_bytes import Census
from tests.integration.running import RunningApi, in_environment, wait_until
from tests.integration.test_service import end, submit, upload

GPU = parse_spec({})
Make = Callable[..., JobService]


@pytest.fixture
def storage(own_bucket: StorageSettings) -> StorageSettings:
    """All of a bucket is counted."""
    return own_bucket


@pytest.fixture
def make(storage: StorageSettings, queue_settings: QueueSettings) -> Make:
    def make(**quotas: Any) -> JobService:
        service = JobService(storage, queue_settings, quotas=QuotaSettings.model_validate(quotas))
        service.check_storage()
        return service

    return make


def hold(service: JobService, owner: str, hours: float, *, began: datetime | None = None) -> JobRecord:
    """A job on one GPU that a worker has had for so long, or since then."""
    job = service.submit(GPU, owner)
    assert service.write_once.allocate_epoch(job.id, "w", datetime.now(UTC).isoformat()) == 1
    assert service.job_store.claim(job.id, epoch=1, worker="w", lease_seconds=60)
    began = began or datetime.now(UTC) - timedelta(hours=hours)
    service.job_store.change(job.id, fields={"run_at": int(began.timestamp() * 1000)})
    return job


def days_of_runs(service: JobService) -> int:
    """The days on which saved runs of ann began; other days have parts of them."""
    saved = (service.store.get_json(item.key) for item in service.store.list(object_keys.usages("ann")))
    return sum(1 for body in saved if body and body["runs"])


def away(*_: object) -> None:
    raise Unavailable("Object storage", "a test")


def lose_valkey(service: JobService) -> None:
    client = service.job_store.client
    client.delete(*client.keys(f"{service.job_store.prefix}:*"))


def test_every_run_counts_once_with_its_gpus_and_no_other(make: Make) -> None:
    service = make()
    first, second = hold(service, "ann", 2), hold(service, "ann", 1.5)
    hold(service, "bob", 7)
    cpu = submit(service)
    service.job_store.claim(cpu.id, epoch=1, worker="w", lease_seconds=60)
    service.job_store.change(cpu.id, fields={"run_at": 1})
    assert service.usage("ann")[0].gpu_hours == pytest.approx(3.5, abs=0.02), "what goes on counts as it goes"
    for _ in range(2):
        service.job_store.change(first.id, epoch=1, to=JobStatus.QUEUED)
    service.job_store.change(cpu.id, epoch=1, to=JobStatus.FAILED)
    assert service.job_store.claim(first.id, epoch=2, worker="w", lease_seconds=60)
    service.job_store.change(
        first.id, fields={"run_at": int((datetime.now(UTC) - timedelta(hours=1)).timestamp() * 1000)}
    )
    service.job_store.change(second.id, epoch=1, to=JobStatus.SUCCEEDED)
    assert service.usage("ann")[0].gpu_hours == pytest.approx(4.5, abs=0.02)
    assert service.get(first.id, "ann").run_ms == pytest.approx(7_200_000, abs=60_000)
    assert [round(each.gpu_hours) for each in service.quotas.all() if each.owner == "bob"] == [7]


def test_a_lost_valkey_resets_nothing(make: Make, storage: StorageSettings, queue_settings: QueueSettings) -> None:
    service = make()
    gpu_time = GpuTime(service.job_store, service.store)
    jobs = [hold(service, "ann lee".replace(" ", "@"), 2) for _ in range(3)]
    owner = jobs[0].owner
    for job in jobs[:2]:
        service.job_store.change(job.id, epoch=1, to=JobStatus.QUEUED)
    gpu_time.save()
    gpu_time.save()
    lose_valkey(service)
    assert service.usage(owner)[0].gpu_hours == pytest.approx(4, abs=0.02)
    assert service.usage(owner)[0].gpu_hours == pytest.approx(4, abs=0.02), "read once"
    Rebuild.of(storage, queue_settings).run()
    # Their runs come back as held: ended again, they are the same runs.
    for job in jobs[:2]:
        assert service.job_store.change(job.id, epoch=1, to=JobStatus.QUEUED).done
    assert service.get(jobs[2].id, owner).run_at is not None, "and one that was not over goes on counting"
    assert service.usage(owner)[0].gpu_hours == pytest.approx(4, abs=0.02)
    gpu_time.save()
    lose_valkey(service)
    assert service.usage(owner)[0].gpu_hours == pytest.approx(4, abs=0.02)


def test_a_save_that_was_cut_off_is_done_by_the_next(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    service = make()
    gpu_time = GpuTime(service.job_store, service.store)
    job = hold(service, "ann", 1)
    service.job_store.change(job.id, epoch=1, to=JobStatus.FAILED)
    with monkeypatch.context() as broken:
        broken.setattr(service.store, "put_json", away)
        with pytest.raises(Unavailable):
            gpu_time.save()
    gpu_time.save()
    lose_valkey(service)
    assert service.usage("ann")[0].gpu_hours == pytest.approx(1, abs=0.02)


def test_days_that_no_window_reaches_go(make: Make) -> None:
    service = make(days=30)
    gpu_time = GpuTime(service.job_store, service.store)
    for days in (2, 35, KEEP_DAYS + 2):
        began = datetime.now(UTC) - timedelta(days=days)
        job = hold(service, "ann", 1, began=began)
        service.job_store.change(job.id, epoch=1, to=JobStatus.FAILED)
    assert service.usage("ann")[0].gpu_hours == pytest.approx(48, abs=0.1), "those within the window"
    while service.job_store.client.scard(f"{service.job_store.prefix}:usage-unsaved"):
        gpu_time.save()
    assert days_of_runs(service) == 3
    gpu_time.forget_old()
    assert days_of_runs(service) == 2
    assert len(gpu_time.by_day("ann")) == 2


def test_who_used_their_gpu_hours_submits_again_when_enough_is_too_old(make: Make) -> None:
    service = make(gpu_hours=10, days=7)
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    old = hold(service, "ann", 0, began=datetime.now(UTC) - timedelta(days=5))
    service.job_store.change(old.id, fields={"run_ms": 0})
    day = today - timedelta(days=5)
    service.job_store.run_script("tally", "ann", str(day.toordinal() - 719163), json.dumps({"a:1": 6 * 3600_000}))
    service.job_store.change(old.id, epoch=1, fields={"run_at": ""}, to=JobStatus.FAILED)
    service.submit(GPU, "ann")
    running = hold(service, "ann", 4.5)
    with pytest.raises(GpuQuotaUsedUp, match=r"used 10\.5\d GPU-hours of the 10 that you may use") as refused:
        service.submit(GPU, "ann")
    usage, unfinished, _ = service.usage("ann")
    assert usage.frees_at == day + timedelta(days=7)
    assert refused.value.seconds == pytest.approx((usage.frees_at - datetime.now(UTC)).total_seconds(), abs=5)
    assert unfinished == 2
    service.submit(GPU, "bob")
    assert service.get(running.id, "ann").status is JobStatus.RUNNING, "what was accepted runs on"
    request = RequestKey.of("submitJob", "k", "{}")
    with pytest.raises(GpuQuotaUsedUp):
        service.submit_once(GPU, "ann", request)
    assert make().submit_once(GPU, "ann", request)[1] is False, "a refused request leaves its key unused"


def test_bytes_are_counted_by_owner_and_deleting_makes_room(make: Make, tmp_path: Path) -> None:
    service = make()
    census = Census(service.job_store, service.write_once)
    mine, other = upload(service, tmp_path), upload(service, tmp_path, "bob")
    jobs = [submit(service) for _ in range(3)]
    end(service, jobs[0].id)
    service.store.put(f"{object_keys.run(jobs[0].id, 1)}adapter/weights", b"x" * 50_000)
    assert census.of("ann").bytes == mine.bytes
    assert census.of("ann").measured_at is None
    wait_until(lambda: census.step() or census.of("ann").measured_at)
    sizes = {job.id: sum(item.size for item in service.store.list(object_keys.folder(job.id))) for job in jobs}
    rows = service.store.list(f"{object_keys.DATASETS}{mine.id}/")
    assert census.of("ann").bytes == sum(sizes.values()) + sum(item.size for item in rows)
    assert mine.bytes < census.of("bob").bytes < other.bytes + 1000
    assert census.owners() == {"ann", "bob"}
    before = census.of("ann").bytes
    service.delete(jobs[0].id, "ann")
    service.delete_dataset(mine.id, "ann")
    assert census.of("ann").bytes == before - sizes[jobs[0].id] - mine.bytes
    census.step()
    assert census.of("ann").bytes == before - sizes[jobs[0].id] - mine.bytes, "not counted again yet"


def test_a_walk_that_is_cut_off_goes_on_and_counts_nothing_twice(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import jobs.usage.stored_bytes

    service = make()
    for _ in range(4):
        submit(service)
    monkeypatch.setattr(jobs.usage.stored_bytes, "STEP_SECONDS", 0)
    census, steps = Census(service.job_store, service.write_once), 0
    while census.of("ann").measured_at is None:
        census.step()
        steps += 1
        assert steps < 20
    assert steps > 3
    assert census.of("ann").bytes == sum(item.size for item in service.store.list(object_keys.JOBS))


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_what_comes_and_goes_during_a_walk_counts_once(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Wherever the walk is, and also where it is just passing."""
    import jobs.usage.stored_bytes

    service = make()
    jobs_of_ann = [submit(service) for _ in range(3)]
    gone = upload(service, tmp_path)
    for job in jobs_of_ann[1:]:
        end(service, job.id)
    monkeypatch.setattr(jobs.usage.stored_bytes, "STEP_SECONDS", 0)
    census = Census(service.job_store, service.write_once)
    for _ in range(steps):
        census.step()
    assert census.of("ann").measured_at is None
    with monkeypatch.context() as passing:
        # The walk has listed what goes and notes it after that is gone.
        run = service.job_store.run_script

        def run_script(name: str, subject: str, *arguments: str) -> Any:
            if (name, subject) == ("census", "note"):
                passing.setattr(service.job_store, "run_script", run)
                service.delete(jobs_of_ann[2].id, "ann")
                service.delete_dataset(gone.id, "ann")
                upload(service, tmp_path)
            return run(name, subject, *arguments)

        passing.setattr(service.job_store, "run_script", run_script)
        census.step()
    wait_until(lambda: census.step() or census.of("ann").measured_at)
    prefixes = (object_keys.JOBS, object_keys.DATASETS)
    there = sum(item.size for prefix in prefixes for item in service.store.list(prefix))
    assert census.of("ann").bytes == pytest.approx(there, abs=400), "but for the description of a data set"
    assert there > 400


def test_two_walkers_and_answers_that_are_lost_count_nothing_twice(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import jobs.usage.stored_bytes

    service = make()
    for _ in range(4):
        submit(service)
    monkeypatch.setattr(jobs.usage.stored_bytes, "STEP_SECONDS", 0)
    census, other, run = (
        *(Census(service.job_store, service.write_once) for _ in range(2)),
        service.job_store.run_script,
    )

    def run_script(name: str, subject: str, *arguments: str) -> Any:
        if (name, subject) == ("census", "note"):
            monkeypatch.setattr(service.job_store, "run_script", run)
            other.step()  # as this one stood still, its turn went to another
            monkeypatch.setattr(service.job_store, "run_script", run_script)
        answer = run(name, subject, *arguments)
        return run(name, subject, *arguments) if subject in ("add", "publish") else answer

    monkeypatch.setattr(service.job_store, "run_script", run_script)
    wait_until(lambda: census.step() or census.of("ann").measured_at)
    assert census.of("ann").bytes == sum(item.size for item in service.store.list(object_keys.JOBS))


def test_broken_objects_keep_no_other_owner_from_being_counted_and_saved(make: Make) -> None:
    service = make()
    gpu_time, census = GpuTime(service.job_store, service.store), Census(service.job_store, service.write_once)
    days = {}
    for owner in ("ann", "bob"):
        job = hold(service, owner, 1)
        days[owner] = service.get(job.id, owner).run_at
        service.job_store.change(job.id, epoch=1, to=JobStatus.FAILED)
    torn = object_keys.usage("ann", days["ann"].date().isoformat())
    service.store.put(torn, b"{")
    service.store.put(object_keys.dataset("ds-broken"), b"{")
    for _ in range(3):
        gpu_time.save()
    assert service.store.get_json(object_keys.usage("bob", days["bob"].date().isoformat())) is not None
    wait_until(lambda: census.step() or census.of("bob").measured_at)
    assert census.of("bob").bytes > 0
    service.submit(GPU, "ann")
    assert service.usage("ann")[0].gpu_hours == pytest.approx(1, abs=0.02)
    service.store.delete(torn)  # as its operator repairs it
    gpu_time.forget_old()
    gpu_time.save()
    assert service.store.get_json(torn) is not None


def test_runs_that_valkey_let_go_of_count_once(make: Make) -> None:
    service = make()
    gpu_time = GpuTime(service.job_store, service.store)
    job = hold(service, "ann", 1)
    service.job_store.change(job.id, epoch=1, to=JobStatus.FAILED)
    gpu_time.save()
    client = service.job_store.client
    (runs,) = client.keys(f"{service.job_store.prefix}:usage:ann:*")
    assert client.pttl(runs) > KEEP_DAYS * 86_400_000
    client.delete(runs)  # as a release before this one did after 40 days
    assert service.usage("ann")[0].gpu_hours == pytest.approx(1, abs=0.02)


def test_who_stores_too_much_is_refused_until_they_delete(make: Make, tmp_path: Path) -> None:
    service = make(storage_gb=250e-9)
    mine = upload(service, tmp_path)
    upload(service, tmp_path)
    with pytest.raises(StorageQuotaUsedUp, match="Delete ended jobs"):
        upload(service, tmp_path)
    text = b'{"question": "1+1", "answer": "2"}\n' * 9
    checker = JsonlChecker()
    checker.feed(text)
    (tmp_path / "more.jsonl").write_bytes(text)
    request, summary = RequestKey.of("uploadDataset", "k", "x"), checker.finish()
    with pytest.raises(StorageQuotaUsedUp):
        service.store_dataset(tmp_path / "more.jsonl", summary, "ann", None, request)
    upload(service, tmp_path, "bob")
    service.quotas.check_job("ann")
    with pytest.raises(StorageQuotaUsedUp), service._census.change("ann", "jobs/x/", before=0, after=1000):
        submit(service)
    service.delete_dataset(mine.id, "ann")
    upload(service, tmp_path)


@pytest.fixture
def api(make: Make) -> Iterator[RunningApi]:
    api = RunningApi(make(gpu_hours=2, storage_gb=1))
    with api.run():
        yield api


def test_an_owner_sees_what_is_theirs_and_a_refusal_says_when(
    api: RunningApi,
    storage: StorageSettings,
    queue_settings: QueueSettings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    key, _ = api.service.keys.create("ann")
    hold(api.service, "ann", 3)
    hold(api.service, "bob", 1)
    with GrpoClient(api.url, key) as client:
        usage = client.usage()
        assert usage["owner"] == "ann"
        assert usage["gpu_hours"]["used"] == pytest.approx(3, abs=0.02)
        assert (usage["gpu_hours"]["limit"], usage["stored_bytes"]["limit"]) == (2, 1_000_000_000)
        assert usage["unfinished_jobs"] == {"used": 1, "limit": 10_000, "left": 9999}
        with pytest.raises(ProblemError) as refused:
            client.submit({})
    assert (refused.value.status, refused.value.code) == (429, "gpu_quota")
    answer = httpx.post(f"{api.url}/jobs", json={}, headers={"Authorization": f"Bearer {key}"})
    frees_at = datetime.fromisoformat(usage["gpu_hours"]["frees_at"])
    wait = math.ceil((frees_at - datetime.now(UTC)).total_seconds())
    assert int(answer.headers["retry-after"]) == pytest.approx(wait, abs=5)

    def run(*words: str) -> Any:
        with pytest.raises(SystemExit) as raised:
            main(list(words))
        assert raised.value.code == 0
        return "\n".join(line for line in capsys.readouterr().out.splitlines() if "[info" not in line)

    for name, value in {**in_environment(storage, queue_settings), "GRPO_URL": api.url, "GRPO_API_KEY": key}.items():
        monkeypatch.setenv(name, value)
    assert "3.00" in run("usage") or "3 of 2" in run("usage")
    assert json.loads(run("usage", "--json"))["object"] == "usage"
    everyone = json.loads(run("admin", "usage", "--json"))["data"]
    assert [(each["owner"], round(each["gpu_hours"])) for each in everyone] == [("ann", 3), ("bob", 1)]
    assert "bob" in run("admin", "usage")
