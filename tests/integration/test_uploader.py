"""What a run's uploader puts into a real bucket, and in which order it takes things away."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.errors import Unavailable
from jobs.lifecycle.outcomes import write_outcome
from jobs.settings import QueueSettings, StorageSettings
from jobs.store import commits, object_keys
from jobs.store.bucket import ObjectStore
from jobs.store.commits import ResumeBase
from jobs.store.discards import Discards
from jobs.store.job_store import JobStore
from jobs.store.write_once import WriteOnceStore
from jobs.worker import run_dirs
from jobs.worker.lease import Lease
from jobs.worker.uploader import Uploader


class Run:
    """A run folder with steps and checkpoints, and its uploader, a round at a time."""

    def __init__(self, store: ObjectStore, job_store: JobStore, job_id: str, folder: Path) -> None:
        self.id, self.folder, self.store = job_id, folder, store
        (folder / "rollouts").mkdir(parents=True)
        lease = Lease(job_store, job_id, 1, 60.0)
        base = ResumeBase(job=job_id, epoch=1, resumed=None)
        self.uploader = Uploader(store, job_store, lease, job_id, 1, folder, base)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            pq.write_table(pa.table({"step": [step]}), self.folder / "rollouts" / f"step-{step:06d}.parquet")

    def checkpoint(self, step: int) -> Path:
        folder = self.folder / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        body = f"weights of {step}".encode()
        (folder / "weights").write_bytes(body)
        files = [{"path": "weights", "sha256": hashlib.sha256(body).hexdigest(), "size": len(body)}]
        (folder / "manifest.json").write_text(json.dumps({"v": 1, "step": step, "files": files}))
        return folder

    def keys(self, below: str = "") -> list[str]:
        """What the bucket has once replaced objects are deleted."""
        self.uploader._discards.step()
        prefix = object_keys.run(self.id, 1)
        return [item.key.removeprefix(prefix) for item in self.store.list(prefix + below)]


@pytest.fixture
def run(
    storage_settings: StorageSettings,
    queue_settings: QueueSettings,
    prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    monkeypatch.setattr("jobs.store.discards.KEPT_SECONDS", 0.0)
    store = ObjectStore(storage_settings)
    store.ensure_ready()
    return Run(store, JobStore(queue_settings), f"job-{prefix}", tmp_path / "run")


def test_a_commit_names_what_is_valid_as_of_its_step(run: Run) -> None:
    run.train(1, 6)
    run.checkpoint(4)
    run.uploader._round(None)
    commit = commits.newest_commit(run.store, run.id, 1)
    assert commit is not None
    assert [entry.path for entry in commit.objects] == [
        "checkpoints/step-000004/manifest.json",
        "checkpoints/step-000004/weights",
        "rollouts/part-000001-000004.parquet",
    ]
    names = ["part-000001-000004.parquet", "part-000005-000006.parquet"]
    assert run.keys("rollouts/") == [f"rollouts/{name}" for name in names]


def test_rollouts_of_several_steps_are_one_object_in_a_run_that_is_not_young(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit in the middle of such an object keeps the later steps for readers."""
    run.train(1, 2)
    run.uploader._round(None)
    assert run.keys("rollouts/") == ["rollouts/part-000001-000002.parquet"]
    run.train(3, 6)
    run.uploader._rollouts_due = time.monotonic() + 3600
    run.uploader._round(None)
    assert run.keys("rollouts/") == ["rollouts/part-000001-000002.parquet"], "it is not due"
    run.uploader._rollouts_due = 0
    run.uploader._began -= 3600
    run.uploader._round(None)
    assert run.uploader._rollouts_due > time.monotonic() + 25
    names = ["rollouts/part-000001-000002.parquet", "rollouts/part-000003-000006.parquet"]
    assert run.keys("rollouts/") == names
    run.train(7, 7)
    run.checkpoint(5)
    real, seen = run.store.upload, list[list[int]]()

    def watched(path: Path, key: str) -> tuple[str, int]:
        done = real(path, key)
        files = commits.live_rollouts(run.store, run.id, 1)
        seen.append([step for file in files for step in range(max(file.first, file.after + 1), file.last + 1)])
        return done

    commits.put_base(run.store, ResumeBase(job=run.id, epoch=1, resumed=None))
    monkeypatch.setattr(run.store, "upload", watched)
    run.uploader._round(None)
    assert len(seen) == 4
    assert all(steps == [1, 2, 3, 4, 5, 6] for steps in seen), seen
    assert run.keys("rollouts/") == ["rollouts/part-000001-000005.parquet", "rollouts/part-000006-000006.parquet"]
    commit = commits.newest_commit(run.store, run.id, 1)
    assert commit is not None
    assert "rollouts/part-000001-000005.parquet" in [entry.path for entry in commit.objects]
    run.uploader._round("whole")
    rollouts = [entry.path for entry in run.uploader.objects if entry.path.startswith("rollouts/")]
    assert rollouts == ["rollouts/part-000001-000005.parquet", "rollouts/part-000006-000007.parquet"]
    assert run.keys("rollouts/") == rollouts


def test_a_pruned_checkpoint_goes_once_two_later_ones_are_committed(run: Run) -> None:
    folders = [run.checkpoint(step) for step in (2, 4)]
    run.uploader._round(None)
    shutil.rmtree(folders[0])
    run.uploader._round(None)
    assert len(commits.list_commits(run.store, run.id, 1)) == 2, "only one is later"
    run.checkpoint(6)
    run.uploader._round(None)
    assert [ref.step for ref in commits.list_commits(run.store, run.id, 1)] == [4, 6]
    assert not run.keys("checkpoints/step-000002/")


def test_without_a_fresh_lease_nothing_is_deleted(run: Run) -> None:
    folders = [run.checkpoint(step) for step in (2, 4, 6)]
    run.uploader._round(None)
    shutil.rmtree(folders[0])
    run.uploader._lease._beaten -= 61
    run.uploader._round(None)
    assert len(run.keys("checkpoints/step-000002/")) == 2


def test_a_checkpoint_that_is_pruned_while_storage_is_away_is_committed_all_the_same(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.train(1, 2)
    folder = run.checkpoint(2)

    def away(*_: object) -> None:
        raise Unavailable("Object storage", "away")

    with monkeypatch.context() as patch:
        patch.setattr(run.store, "upload", away)
        with pytest.raises(Unavailable):
            run.uploader._round(None)
    shutil.rmtree(folder)
    run.uploader._round(None)
    assert [ref.step for ref in commits.list_commits(run.store, run.id, 1)] == [2]
    assert not list((run_dirs.private(run.folder) / "checkpoints").iterdir())


def test_a_round_that_broke_off_anywhere_is_taken_up_where_it_was(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every exchange with storage fails once, one after the other."""
    run.train(1, 5)
    run.checkpoint(2)
    run.checkpoint(4)
    real = {name: getattr(run.store, name) for name in ("upload", "put", "delete")}
    calls = iter(range(10_000))

    def flaky(name: str) -> object:
        def call(*arguments: object, **options: object) -> object:
            if next(calls) % 2:
                raise Unavailable("Object storage", "once")
            return real[name](*arguments, **options)

        return call

    for name in real:
        monkeypatch.setattr(run.store, name, flaky(name))
    for _ in range(40):
        try:
            run.uploader._round("whole")
        except Unavailable:
            continue
        break
    paths = [entry.path for entry in run.uploader.objects]
    rollouts = [path for path in paths if path.startswith("rollouts/")]
    parts = ["part-000001-000002", "part-000003-000004", "part-000005-000005"]
    assert rollouts == [f"rollouts/{part}.parquet" for part in parts]
    assert run.keys("rollouts/") == rollouts
    for entry in run.uploader.objects:
        assert hashlib.sha256(run.store.get(entry.key) or b"").hexdigest() == entry.sha256, entry.path


def test_after_an_outage_only_what_changed_is_sent_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (run.folder / "adapter").mkdir()
    (run.folder / "adapter" / "adapter_model.safetensors").write_bytes(b"a large file")
    (run.folder / "stderr.log").write_text("so far\n")
    real, sent = run.store.upload, list[str]()

    def counted(path: Path, key: str) -> tuple[str, int]:
        sent.append(key.rpartition("/")[2])
        return real(path, key)

    def away(*_: object, **__: object) -> list[object]:
        raise Unavailable("Valkey", "away")

    monkeypatch.setattr(run.store, "upload", counted)
    with monkeypatch.context() as patch:
        patch.setattr("jobs.store.event_log.store_events", away)
        for _ in range(3):
            with pytest.raises(Unavailable):
                run.uploader._round("whole")
    (run.folder / "stderr.log").write_text("so far\nand on\n")
    run.uploader._round("whole")
    assert sorted(sent) == ["adapter_model.safetensors", "stderr.log", "stderr.log"]
    log = next(entry for entry in run.uploader.objects if entry.path == "stderr.log")
    assert run.store.get(log.key) == b"so far\nand on\n"
    assert log.sha256 == hashlib.sha256(b"so far\nand on\n").hexdigest()


def test_a_checkpoint_whose_bytes_changed_on_the_disk_is_not_committed(run: Run) -> None:
    (run.checkpoint(2) / "weights").write_bytes(b"flipped")
    run.uploader._round(None)
    assert commits.list_commits(run.store, run.id, 1) == []


def test_a_deletion_that_fails_leaves_no_step_in_two_parts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 6):
        run.train(step, step)
        run.uploader._rollouts_due = 0
        run.uploader._round(None)
    assert len(run.keys("rollouts/")) == 5
    run.checkpoint(5)
    real, calls = run.store.delete, iter(range(100))

    def flaky(key: str) -> None:
        if next(calls) == 2:
            raise Unavailable("Object storage", "once")
        real(key)

    monkeypatch.setattr(run.store, "delete", flaky)
    run.uploader._round(None)
    with pytest.raises(Unavailable):
        run.uploader._discards.step()
    commit = commits.newest_commit(run.store, run.id, 1)
    assert commit is not None
    rollouts = [entry.path for entry in commit.objects if entry.path.startswith("rollouts/")]
    assert rollouts == ["rollouts/part-000001-000005.parquet"] == run.keys("rollouts/")


def test_what_a_merge_replaced_is_deleted_minutes_later_by_any_process(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Valkey is away at the commit, and the worker dies after the next round."""
    for step in (1, 2, 3):
        run.train(step, step)
        run.uploader._rollouts_due = 0
        run.uploader._round(None)
    run.checkpoint(3)

    def away(*_: object, **__: object) -> list[object]:
        raise Unavailable("Valkey", "away")

    with monkeypatch.context() as patch:
        patch.setattr("jobs.store.event_log.store_events", away)
        with pytest.raises(Unavailable):
            run.uploader._round(None)
    assert [ref.step for ref in commits.list_commits(run.store, run.id, 1)] == [3]
    monkeypatch.setattr("jobs.store.discards.KEPT_SECONDS", 2.0)
    run.uploader._round(None)
    housekeeper = Discards(run.uploader._job_store, run.store)
    prefix = f"{object_keys.run(run.id, 1)}rollouts/"
    replaced = [f"{prefix}part-{step:06d}-{step:06d}.parquet" for step in (1, 2, 3)]
    part = f"{prefix}part-000001-000003.parquet"
    housekeeper.step()
    assert [item.key for item in run.store.list(prefix)] == [replaced[0], part, *replaced[1:]]
    time.sleep(2.1)
    housekeeper.step()
    assert [item.key for item in run.store.list(prefix)] == [part]


def test_a_merge_counts_no_rollout_twice_against_the_limit_of_a_run(run: Run) -> None:
    run.train(1, 3)
    run.uploader._round(None)
    run.train(4, 4)
    (batch,) = run.uploader._sent.values()
    run.uploader._max_bytes = batch.size * 3 // 2
    run.uploader._round("whole")
    assert run.uploader.not_sent == ""
    assert run.keys("rollouts/") == ["rollouts/part-000001-000004.parquet"]


def test_rollouts_that_are_too_large_to_merge_stay_as_they_are(run: Run) -> None:
    run.train(1, 3)
    run.uploader._round(None)
    run.train(4, 4)
    (batch,) = run.uploader._sent.values()
    run.uploader._max_bytes = batch.size
    run.uploader._round("whole")
    assert "GRPO_MAX_RUN_MB" in run.uploader.not_sent
    assert run.uploader.objects == [batch]
    assert run.keys("rollouts/") == ["rollouts/part-000001-000003.parquet"]


def test_what_is_being_deleted_is_listed_no_more(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage deletes a checkpoint's manifest, its answer is lost, and then the run ends."""
    folders = [run.checkpoint(step) for step in (2, 4, 6)]
    run.uploader._round(None)
    shutil.rmtree(folders[0])
    real = run.store.delete

    def lost(key: str) -> None:
        real(key)
        if "/checkpoints/" in key:
            raise Unavailable("Object storage", "the answer was lost")

    with monkeypatch.context() as patch:
        patch.setattr(run.store, "delete", lost)
        with pytest.raises(Unavailable):
            run.uploader._round(None)
    run.uploader._round("whole")
    assert [entry.path for entry in run.uploader.objects if run.store.get(entry.key) is None] == []
    assert not run.keys("checkpoints/step-000002/")


def test_a_job_that_no_worker_ends_lists_no_pruned_checkpoint(run: Run) -> None:
    """The newest commit still names the checkpoint that its being there allowed the run to delete."""
    write_once = WriteOnceStore(run.store)
    write_once.allocate_epoch(run.id, "w", "2026-01-02T03:04:05Z")
    folder = run.checkpoint(2)
    run.checkpoint(4)
    run.uploader._round(None)
    shutil.rmtree(folder)
    run.checkpoint(6)
    run.uploader._round(None)
    outcome = write_outcome(write_once, run.id, "cancelled", by="test")
    manifest = write_once.manifest(outcome.manifest or "")
    assert manifest is not None
    assert {entry.path.split("/")[1] for entry in manifest.objects} == {"step-000004", "step-000006"}
    assert all(run.store.get(entry.key) is not None for entry in manifest.objects)


def test_a_job_is_closed_above_a_worker_that_took_the_number_first(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write_once = WriteOnceStore(run.store)
    write_once.allocate_epoch(run.id, "w", "2026-01-02T03:04:05Z")
    run.checkpoint(2)
    run.uploader._round(None)
    real, tries = write_once.allocate_epoch, iter(range(100))

    def beaten(job_id: str, worker: str, time: str, *, attempts: int = 0) -> int | None:
        if next(tries) == 0:
            real(job_id, "faster", time)
            return None
        return real(job_id, worker, time, attempts=attempts)

    monkeypatch.setattr(write_once, "allocate_epoch", beaten)
    outcome = write_outcome(write_once, run.id, "cancelled", by="test")
    assert outcome.epoch == 3
    assert outcome.manifest is not None, "what was committed stays to be read"


def test_files_of_holes_and_more_than_a_run_may_have_are_not_sent(run: Run) -> None:
    adapter = run.folder / "adapter"
    adapter.mkdir()
    with (adapter / "holes").open("wb") as file:
        file.truncate(10**9)
    (adapter / "large").write_bytes(b"x" * 3000)
    (adapter / "small").write_bytes(b"x" * 500)
    run.uploader._max_bytes = 2000
    run.uploader._send_rest()
    assert run.keys("adapter/") == ["adapter/small"]
    assert "adapter/holes has 1000000000 bytes" in run.uploader.not_sent


def test_a_checkpoint_that_is_too_large_is_not_committed_and_not_tried_again(run: Run) -> None:
    run.uploader._max_bytes = 10
    run.checkpoint(1)
    run.uploader._round(None)
    assert (run.uploader._damaged, run.uploader._commits) == ({1}, [])
    assert "GRPO_MAX_RUN_MB" in run.uploader.not_sent
