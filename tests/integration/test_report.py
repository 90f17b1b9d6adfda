"""What a resumed job's page is given of the runs before: from a real bucket and job store, within limits, or
nothing."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from grpo_core import report_page
from grpo_core.run_dir.records import write_rollouts
from grpo_core.spec import parse_spec
from jobs.settings import QueueSettings, StorageSettings
from jobs.store import event_log, object_keys
from jobs.store.bucket import ObjectStore
from jobs.store.commits import CommitRef, ResumeBase
from jobs.store.job import JobStatus, record_of
from jobs.store.job_store import JobEvent, JobStore
from jobs.store.write_once import ManifestEntry
from jobs.worker import report
from jobs.worker.report import EarlierRuns, newest, write_report
from jobs.worker.run_context import RunContext, WorkerDeps
from jobs.worker.shutdown import GracefulShutdown
from tests.clock import patience
from tests.conftest import SeaweedFSServer
from tests.unit.test_audits import completion

STEPS = 20
RESUMED = 18


@pytest.fixture
def store(storage_settings: StorageSettings) -> ObjectStore:
    store = ObjectStore(storage_settings)
    store.ensure_ready()
    return store


@pytest.fixture
def context(store: ObjectStore, queue_settings: QueueSettings, prefix: str, tmp_path: Path) -> Iterator[RunContext]:
    """The second run of a job, which has done its last two steps; the first left a part for every six."""
    job_id, folder = f"job-{prefix}", tmp_path / "run"
    spec = parse_spec({"training": {"steps": STEPS}})
    (folder / "inputs").mkdir(parents=True)
    (folder / "rollouts").mkdir()
    (folder / "spec.json").write_text(json.dumps(spec.as_dict()))
    metrics = [{"step": step, "epoch": 1 + (step > RESUMED), "reward": step / STEPS} for step in range(1, STEPS + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    resumed = {"type": "log", "epoch": 2, "time": event_log.now_iso(), "data": {"code": "resumed", "step": RESUMED}}
    (folder / "events.jsonl").write_text(json.dumps(resumed) + "\n")
    for step in (19, 20):
        write_rollouts(folder / "rollouts" / f"step-{step:06d}.parquet", [row(step)], step=step, epoch=2)
    objects = [put_part(store, tmp_path, job_id, first) for first in (1, 7, 13)]
    asked = {"id": job_id, "owner": "ann", "created_at": "2026-01-01T00:00:00+00:00", "queue": "grpo.cpu"}
    record = record_of({**asked, "spec": spec.as_dict(), "spec_sha256": "0"})
    job_store, none = JobStore(queue_settings), cast("Any", None)
    deps = WorkerDeps(
        worker="w",
        job_store=job_store,
        write_once=none,
        store=store,
        datasets=none,
        wakeups=none,
        commands=none,
        lease_seconds=60,
        launcher=(),
        stop=GracefulShutdown(60.0),
    )
    job_store.create(record)
    assert job_store.claim(job_id, epoch=1, worker="w", lease_seconds=60)
    lost = JobEvent(type="warning", data={"code": "run_lost", "message": "It was killed, by an event."})
    assert job_store.change(job_id, epoch=1, to=JobStatus.QUEUED, events=[lost]).done
    assert job_store.claim(job_id, epoch=2, worker="w", lease_seconds=60)
    context = RunContext(deps, record, 2, folder)
    context.base = ResumeBase(job=job_id, epoch=2, resumed=CommitRef(step=RESUMED, epoch=1), objects=objects)
    context.begin()
    yield context
    context.end()


def row(step: int) -> Any:
    return completion(prompt_id=f"p{step}", completion=f"drawn at {step}.", reward_total=float(step))


def put_part(store: ObjectStore, folder: Path, job_id: str, first: int) -> ManifestEntry:
    """The rollouts of six steps as one object, in truth only those of the last: the others are not looked at."""
    name = f"part-{first:06d}-{first + 5:06d}.parquet"
    write_rollouts(folder / name, [row(first + 5)], step=first + 5, epoch=1)
    body = (folder / name).read_bytes()
    key = f"{object_keys.run(job_id, 1)}rollouts/{name}"
    store.put(key, body)
    return ManifestEntry(path=f"rollouts/{name}", key=key, sha256=hashlib.sha256(body).hexdigest(), size=len(body))


def written(context: RunContext, **limits: Any) -> str:
    write_report(context, "succeeded", None, (), **limits)
    return (context.folder / "report.html").read_text("utf-8")


def fetched(context: RunContext) -> list[str]:
    folder = context.folder / report_page.EARLIER
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_only_what_the_page_shows_is_fetched(context: RunContext) -> None:
    page = written(context)
    assert fetched(context) == ["events.jsonl", "rollouts/part-000013-000018.parquet"]
    assert "drawn at 18." in page, "steps 17 to 20 are the last fifth"
    assert "drawn at 20." in page
    assert "drawn at 12." not in page
    assert "It was killed, by an event." in page
    assert "Only steps that count are listed" in page


def test_no_more_than_the_limit_is_fetched_and_the_newest_first(
    context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert context.base is not None
    sizes = [entry.size for entry in context.base.objects]
    assert newest(context.base.objects, sum(sizes)) == context.base.objects
    assert newest(context.base.objects, sum(sizes) - 1) == context.base.objects[1:]
    monkeypatch.setattr(report, "ROLLOUT_BYTES", sizes[-1] - 1)
    page = written(context)
    assert fetched(context) == ["events.jsonl"]
    assert "drawn at 20." in page


def test_an_object_that_is_not_what_was_recorded_is_left_out(context: RunContext, store: ObjectStore) -> None:
    assert context.base is not None
    store.put(context.base.objects[-1].key, b"PAR1 but no more")
    page = written(context)
    assert fetched(context) == ["events.jsonl"]
    assert "drawn at 20." in page


def test_storage_that_hangs_costs_its_time_and_no_page(
    context: RunContext, seaweedfs: SeaweedFSServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Little time to fetch, and plenty to write the page in, however slow the machine is."""
    monkeypatch.setattr(report, "FETCH_SECONDS", 1.5)
    os.kill(seaweedfs.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        page = written(context, until=began + 60)
        assert time.monotonic() - began < patience(30)
    finally:
        os.kill(seaweedfs.pid, signal.SIGCONT)
    assert "drawn at 20." in page
    assert "It was killed, by an event." in page, "the job store still answers"


def test_where_it_has_to_be_quick_half_of_the_time_is_for_writing(
    context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float | None] = []
    retry = context.retry

    def noted(action: Any, interrupts: Any, *, seconds: float | None = None, until: float | None = None) -> Any:
        given.append(seconds if until is None else until - time.monotonic())
        return retry(action, interrupts, seconds=seconds, until=until)

    monkeypatch.setattr(context, "retry", noted)
    monkeypatch.setattr(report, "FETCH_SECONDS", 50.0)
    written(context, until=time.monotonic() + 60)
    written(context, until=time.monotonic() + 600)
    halved, writing, capped, _ = given
    assert halved == pytest.approx(30, abs=1)
    assert writing is not None
    assert 30 <= writing <= 60, "what fetching did not take"
    assert capped == pytest.approx(50)


def test_a_fetch_that_was_given_up_ends_and_leaves_nothing_half(
    context: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = context.deps.store.stream

    def slowly(key: str, path: Path, feed: Any, **_: Any) -> None:
        def late(chunk: bytes) -> None:
            time.sleep(0.5)
            feed(chunk)

        stream(key, path, late)

    monkeypatch.setattr(context.deps.store, "stream", slowly)
    with capture_logs() as lines:
        EarlierRuns(context, until=time.monotonic() + 0.3).fetch()
    assert fetched(context) == ["events.jsonl"]
    assert "TimeoutError" in next(line["error"] for line in lines if line["event"] == "report_without")


def test_a_folder_that_is_gone_is_not_made_again(context: RunContext, tmp_path: Path) -> None:
    (context.folder / "inputs").rename(tmp_path / "away")
    EarlierRuns(context, until=time.monotonic() + 5).fetch()
    assert not (context.folder / "inputs").exists()


def test_a_first_run_asks_nobody(context: RunContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EarlierRuns, "fetch", lambda _: pytest.fail("it has no earlier run"))
    context.epoch = 1
    assert "drawn at 20." in written(context)
