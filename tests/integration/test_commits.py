"""Commits and bases in a real bucket: what a run hands on, and what readers of a job that runs may read."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_core.run_dir.layout import sha256_of
from jobs.settings import StorageSettings
from jobs.store import commits, object_keys
from jobs.store.bucket import ObjectStore
from jobs.store.commits import Commit, CommitRef, ResumeBase
from jobs.store.write_once import ManifestEntry
from jobs.worker.prepare import find_start


@pytest.fixture
def store(storage_settings: StorageSettings) -> ObjectStore:
    store = ObjectStore(storage_settings)
    store.ensure_ready()
    return store


class Job:
    """Puts what runs leave."""

    def __init__(self, store: ObjectStore, job_id: str, folder: Path) -> None:
        self.store, self.id, self.folder = store, job_id, folder

    def put(self, epoch: int, path: str, body: bytes = b"x") -> ManifestEntry:
        file = self.folder / "file"
        file.write_bytes(body)
        key = object_keys.run(self.id, epoch) + path
        sha256, size = self.store.upload(file, key)
        return ManifestEntry(path=path, key=key, sha256=sha256, size=size)

    def commit(self, epoch: int, step: int, *rollouts: str) -> Commit:
        prefix = f"{object_keys.run(self.id, epoch)}checkpoints/step-{step:06d}/"
        names = [f"checkpoints/step-{step:06d}/{name}" for name in ("weights", "manifest.json")]
        objects = [self.put(epoch, name, f"{name} of {epoch}".encode()) for name in (*names, *rollouts)]
        commit = Commit(job=self.id, epoch=epoch, step=step, checkpoint=prefix, objects=objects)
        commits.put_commit(self.store, commit)
        return commit


@pytest.fixture
def job(store: ObjectStore, prefix: str, tmp_path: Path) -> Job:
    return Job(store, f"job-{prefix}", tmp_path)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    (tmp_path / "inputs").mkdir()
    return tmp_path / "inputs"


def test_a_commit_is_read_as_it_was_written(store: ObjectStore, job: Job) -> None:
    commit = job.commit(1, 4, "rollouts/part-000001-000004.parquet")
    assert commits.read_commit(store, job.id, commit.ref) == commit
    assert commits.newest_commit(store, job.id, 1) == commit
    commits.delete_commit(store, job.id, commit.ref)
    assert commits.read_commit(store, job.id, commit.ref) is None
    assert commits.newest_commit(store, job.id, 1) is None


def test_the_highest_step_is_first_and_of_equal_ones_the_newest_run(store: ObjectStore, job: Job) -> None:
    for epoch, step in ((1, 10), (1, 20), (2, 20), (3, 5)):
        job.commit(epoch, step)
    points = [(ref.step, ref.epoch) for ref in commits.commits_up_to(store, job.id, 3)]
    assert points == [(20, 2), (20, 1), (10, 1), (5, 3)]
    progress = {epoch: commits.made_progress(store, job.id, epoch) for epoch in (1, 2, 3, 4)}
    assert progress == {1: True, 2: False, 3: False, 4: False}


def test_a_run_starts_at_the_best_whole_checkpoint(store: ObjectStore, job: Job, inputs: Path) -> None:
    job.commit(1, 5)
    good = job.commit(1, 10, "rollouts/part-000001-000010.parquet")
    gone, bad = job.commit(1, 20), job.commit(2, 15)
    store.delete(f"{gone.checkpoint}weights")
    store.put(f"{bad.checkpoint}weights", b"half")
    start = find_start(store, job.id, 3, inputs, accumulation=2)
    assert start.base.resumed == CommitRef(step=10, epoch=1)
    assert {entry.path for entry in start.base.objects} == {entry.path for entry in good.objects}
    assert [event.data["step"] for event in start.warnings] == [20, 15]
    assert commits.read_base(store, job.id, 3) == start.base
    fetched = {path.name: sha256_of(path) for path in (inputs / "resume").iterdir()}
    assert fetched == {entry.path.rsplit("/", 1)[1]: entry.sha256 for entry in good.objects if "step-" in entry.path}


def test_a_download_that_ends_in_the_middle_leaves_nothing_under_its_name(
    store: ObjectStore, job: Job, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of that run may send the metrics of a checkpoint that it finds there."""
    job.commit(1, 5)

    def breaks_off(*_: object) -> Iterator[bytes]:
        yield b"half"
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("botocore.response.StreamingBody.iter_chunks", breaks_off)
    with pytest.raises(OSError, match="Input/output"):
        find_start(store, job.id, 2, inputs, accumulation=None)
    assert all(path.name.startswith(".") for path in (inputs / "resume").iterdir())


def test_a_rejected_commit_is_passed_over_by_all_later_runs(store: ObjectStore, job: Job, inputs: Path) -> None:
    job.commit(1, 5)
    rejected = job.commit(1, 10)
    commits.put_rejected(store, job.id, 2, rejected.ref)
    assert find_start(store, job.id, 3, inputs, accumulation=None).base.resumed == CommitRef(step=5, epoch=1)
    assert find_start(store, job.id, 4, inputs, accumulation=None).base.resumed == CommitRef(step=5, epoch=1)


def test_without_a_whole_checkpoint_a_run_starts_at_the_beginning(store: ObjectStore, job: Job, inputs: Path) -> None:
    bad = job.commit(1, 5)
    store.delete(f"{bad.checkpoint}manifest.json")
    job.put(1, "stderr.log", b"why it died")
    base = find_start(store, job.id, 2, inputs, accumulation=None).base
    assert base.resumed is None
    assert [entry.path for entry in base.objects] == ["stderr-e1.log"]
    assert not (inputs / "resume").exists()


def test_a_live_job_shows_each_step_once(store: ObjectStore, job: Job) -> None:
    commit = job.commit(1, 4, "rollouts/part-000001-000004.parquet")
    job.put(1, "rollouts/step-000005.parquet")
    job.put(1, "rollouts/step-000004.parquet")
    shown = [(file.first, file.last, file.epoch) for file in commits.live_rollouts(store, job.id, 1)]
    assert shown == [(1, 4, 1)], "the first run has no base yet, so what is committed stands"
    commits.put_base(store, ResumeBase(job=job.id, epoch=1, resumed=None))
    shown = [(file.first, file.last, file.epoch) for file in commits.live_rollouts(store, job.id, 1)]
    assert shown == [(1, 4, 1), (5, 5, 1)]
    base = ResumeBase(job=job.id, epoch=2, resumed=commit.ref, objects=commit.objects)
    commits.put_base(store, base)
    job.put(2, "rollouts/step-000005.parquet")
    job.put(2, "rollouts/step-000006.parquet")
    shown = [(file.first, file.last, file.epoch) for file in commits.live_rollouts(store, job.id, 2)]
    assert shown == [(1, 4, 1), (5, 5, 2), (6, 6, 2)]
