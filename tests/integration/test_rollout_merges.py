"""Readers of a running job's rollouts beside a worker that merges them, with every write at every moment of a look.

What a real uploader writes is recorded and then replayed in the middle of a look: between the pages of a listing,
between listing and reading, and between the requests of a reading.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import polars as pl
import pytest

from grpo_core.run_dir.records import write_rollouts
from jobs.errors import Denied, Unavailable
from jobs.read.rollout_query import RolloutQuery
from jobs.read.rollouts import RolloutStore
from jobs.settings import QueueSettings, StorageSettings
from jobs.store import commits, object_keys
from jobs.store.bucket import ObjectStore, StoredObject
from jobs.store.commits import ResumeBase, RolloutFile, listed_rollouts, live_rollouts
from jobs.store.job_store import JobStore
from jobs.worker.lease import Lease
from jobs.worker.uploader import Uploader
from tests.conftest import ValkeyServer
from tests.integration.memory_store import MemoryStore
from tests.integration.rollout_objects import completions

JOB = "job-merged"

Write = tuple[str, dict[str, bytes]]
"""`put`, `delete` or `replaced` (to be deleted later), and the objects."""


class Recorder(MemoryStore):
    """A bucket that records what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[Write] = []

    def put(self, key: str, body: bytes, *, content_type: str = "") -> None:
        super().put(key, body)
        self.writes.append(("put", {key: body}))

    def upload(self, path: Path, key: str) -> tuple[str, int]:
        body = path.read_bytes()
        self.put(key, body)
        return hashlib.sha256(body).hexdigest(), len(body)

    def delete(self, key: str) -> None:
        super().delete(key)
        self.writes.append(("delete", {key: b""}))


SCRIPTS = {
    "ends of batches are checkpoints": "t2 u t4 u c4 r t6 u t8 u c8 r t9 u t11 u w",
    "checkpoints inside of a batch": "t2 u t7 u t8 c5 r t9 u t10 u c10 r t13 u w",
    "one batch and many checkpoints": "t9 u c2 c4 r c6 r t12 u t13 u c12 r c13 r t15 u w",
    "a checkpoint in the first batch": "t6 u c5 r t8 u t10 u c8 r t12 u c12 r w",
    "a pause": "t3 u t5 u c4 r t6 u p",
}
"""t: train up to a step; u: rollouts are due; c: a checkpoint is there; r: a round; w, p: the run ends or is paused."""


def record(script: str, job_store: JobStore, folder: Path) -> list[Write]:
    (folder / "rollouts").mkdir(parents=True)
    store = Recorder()
    base = ResumeBase(job=JOB, epoch=1, resumed=None)
    commits.put_base(store, base)
    uploader = Uploader(store, job_store, Lease(job_store, JOB, 1, 60.0), JOB, 1, folder, base)
    uploader._discards.add = lambda keys: store.writes.append(("replaced", dict.fromkeys(keys, b"")))  # type: ignore[method-assign]
    done = 0
    for word in script.split():
        order, number = word[0], int(word[1:] or 0)
        uploader._rollouts_due = 0 if order == "u" else 1e12
        if order == "t":
            for step in range(done + 1, number + 1):
                drawn = completions(step, prompts=1, group=2, words=2, of=9)
                write_rollouts(folder / "rollouts" / f"step-{step:06d}.parquet", drawn, step=step, epoch=1)
            done = number
        elif order == "c":
            checkpoint = folder / "checkpoints" / f"step-{number:06d}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "manifest.json").write_text(json.dumps({"files": []}))
        else:
            uploader._round({"w": "whole", "p": "resumable"}.get(order))  # type: ignore[arg-type]
    if script.endswith("w"):
        store.put("valid", json.dumps([entry.key for entry in uploader.objects]).encode())
    return [write for write in store.writes if any("checkpoints/" not in key for key in write[1])]


class Bucket(MemoryStore):
    """A bucket into which the writes of a worker arrive whenever a reader sends a request."""

    def __init__(self, writes: Sequence[Write], at: int) -> None:
        super().__init__()
        self._writes, self._at = writes, 0
        self.replaced: list[str] = []
        self.arrive: Callable[[], None] = lambda: None
        self.go(at)

    def go(self, to: int) -> None:
        """The worker writes on, up to a number of writes."""
        for kind, objects in self._writes[self._at : to]:
            for key, body in objects.items():
                if kind == "put":
                    self.put(key, body)
                elif kind == "replaced":
                    self.replaced.append(key)
                else:
                    self.delete(key)
        self._at = max(to, self._at)

    def tidy(self, count: int | None = None) -> None:
        """Minutes pass: what was replaced is deleted, the first first."""
        for key in self.replaced[:count]:
            self.delete(key)

    def list(self, prefix: str, *, after: str = "") -> Iterator[StoredObject]:
        """A page has one key."""
        while True:
            self.arrive()
            item = next(super().list(prefix, after=after), None)
            if item is None:
                return
            yield item
            after = item.key


class Folder(Bucket):
    """The same as files, which polars reads."""

    def __init__(self, root: Path, writes: Sequence[Write], at: int) -> None:
        self._root = root
        super().__init__(writes, at)

    def path(self, key: str) -> Path:
        return self._root / key

    def put(self, key: str, body: bytes, *, content_type: str = "") -> None:
        super().put(key, body)
        self.path(key).parent.mkdir(parents=True, exist_ok=True)
        self.path(key).write_bytes(body)

    def delete(self, key: str) -> None:
        super().delete(key)
        self.path(key).unlink(missing_ok=True)

    def open(self, key: str) -> BinaryIO:
        self.arrive()
        if key not in self.objects:
            raise Denied(404)
        return io.BytesIO(self.objects[key])

    def list(self, prefix: str, *, after: str = "") -> Iterator[StoredObject]:
        """All at once; the listing has tests of its own."""
        return MemoryStore.list(self, prefix, after=after)


class Reader(RolloutStore):
    """Reads the objects in the folder."""

    def __init__(self, folder: Folder) -> None:
        super().__init__(StorageSettings.model_validate({"bucket": "folder"}))
        self._store, self._access = folder, {}
        self._folder = folder

    def _url(self, key: str) -> str:
        return str(self._folder.path(key))

    def _scan(self, keys: Sequence[str], *, file: str | None = None, line: str | None = None) -> pl.LazyFrame:
        self._folder.arrive()
        return super()._scan(keys, file=file, line=line)

    def look(self) -> tuple[list[tuple[int, int]], list[int]]:
        """Step and sample of every rollout, and the steps there are."""
        rollouts, more = self.page(lambda: today(self._folder), RolloutQuery(), limit=500, after=None)
        assert more is None
        steps = self.steps(lambda: today(self._folder))
        assert all(step.completions == 2 for step in steps)
        return [(rollout.step, rollout.sample) for rollout in rollouts], [step.step for step in steps]


def today(store: ObjectStore) -> list[RolloutFile]:
    return live_rollouts(store, JOB, 1)


def yesterday(store: ObjectStore) -> list[RolloutFile]:
    """The files that a reader of the last release chooses."""
    keys = [item.key for item in store.list(f"{object_keys.run(JOB, 1)}rollouts/")]
    found = [file for key in keys if (file := commits._rollout_file(key)) is not None]
    chosen: list[RolloutFile] = []
    for file in sorted(found, key=lambda file: (file.first, -file.last)):
        if not chosen or file.first > chosen[-1].last:
            chosen.append(file)
    return chosen


def steps_of(files: Iterable[RolloutFile]) -> list[int]:
    return [step for file in files for step in range(max(file.first, file.after + 1), file.last + 1)]


def at_request(bucket: Bucket, number: int, act: Callable[[], None]) -> list[int]:
    """Act before one request of a reader. Returns the requests so far."""
    seen: list[int] = []

    def arrive() -> None:
        seen.append(len(seen))
        if seen[-1] == number:
            act()

    bucket.arrive = arrive
    return seen


@pytest.fixture(scope="module", params=SCRIPTS.values(), ids=SCRIPTS)
def writes(
    request: pytest.FixtureRequest, valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory
) -> list[Write]:
    settings = QueueSettings.model_validate({"redis_url": valkey.url, "prefix": "t-rollout-merges"})
    return record(request.param, JobStore(settings), tmp_path_factory.mktemp("merged") / "run")


@pytest.mark.parametrize("choose", [today, yesterday])
def test_no_listing_misses_or_repeats_a_step(
    writes: list[Write], choose: Callable[[ObjectStore], list[RolloutFile]]
) -> None:
    """The worker writes any number of objects between any two pages, after any number of deletions."""
    visible = 0
    for start in range(1, len(writes) + 1):
        for gone in range(len(Bucket(writes, start).replaced) + 1):
            bucket = Bucket(writes, start)
            bucket.tidy(gone)
            quiet = steps_of(choose(bucket))
            assert quiet == list(range(1, len(quiet) + 1)), f"after write {start} and {gone} deletions"
            assert len(quiet) >= visible, f"after write {start} and {gone} deletions"
            visible = len(quiet)
        for page in range(len(Bucket(writes, start).objects)):
            for until in range(start + 1, len(writes) + 1):
                bucket = Bucket(writes, start)
                at_request(bucket, page, lambda bucket=bucket, until=until: bucket.go(until))
                steps = steps_of(choose(bucket))
                assert steps == list(range(1, len(steps) + 1)), f"writes {start} to {until} before page {page}"
                assert len(steps) >= visible, f"writes {start} to {until} before page {page}"


def test_deletions_in_the_middle_of_a_listing_hide_no_step(writes: list[Write]) -> None:
    for start in range(1, len(writes) + 1):
        quiet = steps_of(today(Bucket(writes, start)))
        for page in range(len(Bucket(writes, start).objects)):
            bucket = Bucket(writes, start)
            at_request(bucket, page, lambda bucket=bucket: (bucket.tidy(), bucket.go(len(writes))))
            steps = steps_of(today(bucket))
            assert steps == list(range(1, len(steps) + 1)), f"from write {start}, page {page}"
            assert len(steps) >= len(quiet)


def test_what_is_merged_and_deleted_in_the_middle_of_a_reading_is_listed_again(
    writes: list[Write], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before one request, the worker merges to the end and minutes pass."""
    monkeypatch.setattr("jobs.read.rollouts._JUDGES", 1)
    for start in range(1, len(writes) + 1):
        number, requests = 0, 1
        while number < requests:
            folder = Folder(tmp_path / f"{start}-{number}", writes, start)
            quiet = steps_of(today(folder))
            seen = at_request(folder, number, lambda folder=folder: (folder.go(len(writes)), folder.tidy()))
            check(Reader(folder), at_least=len(quiet))
            number, requests = number + 1, len(seen)


def test_a_reader_slower_than_every_merge_reads_in_the_end(writes: list[Write], tmp_path: Path) -> None:
    """After each listing, what it found is merged and deleted, and new batches come."""
    stops = [
        1 + max(at for at in range(end) if not writes[at][1].keys().isdisjoint(replaced))
        for end, (kind, replaced) in enumerate(writes)
        if kind == "replaced"
    ]
    folder = Folder(tmp_path / "bucket", writes, stops[0])
    ahead = iter([*stops[1:], len(writes)])

    def files() -> list[RolloutFile]:
        found = today(folder)
        folder.go(next(ahead, 0))
        folder.tidy()
        return found

    steps = Reader(folder).steps(files)
    assert [step.step for step in steps] == steps_of(today(folder))


def check(reader: Reader, *, at_least: int) -> None:
    rollouts, steps = reader.look()
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= at_least
    seen = [step for step, sample in rollouts if sample == 0]
    assert seen == list(range(1, len(seen) + 1))
    assert len(seen) >= at_least
    assert rollouts == [(step, sample) for step in seen for sample in (0, 1)]


def test_what_commits_and_the_manifest_name_is_never_deleted(writes: list[Write]) -> None:
    """A worker may die after any write; the next run takes over what the newest commit names."""
    for at in range(1, len(writes) + 1):
        bucket = Bucket(writes, at)
        bucket.tidy()
        for ref in commits.list_commits(bucket, JOB, 1):
            commit = commits.read_commit(bucket, JOB, ref)
            assert commit is not None
            assert all(file.key in bucket.objects for file in listed_rollouts(commit.objects))
            assert steps_of(listed_rollouts(commit.objects)) == list(range(1, ref.step + 1))
    valid = json.loads(bucket.objects.get("valid", b"null"))
    stored = {item.key for item in bucket.list(f"{object_keys.run(JOB, 1)}rollouts/")}
    assert valid is None or stored == {key for key in valid if "/rollouts/" in key}, "nothing is there twice"


def test_a_file_that_stays_and_cannot_be_read_ends_the_look(writes: list[Write], tmp_path: Path) -> None:
    folder = Folder(tmp_path / "bucket", writes, len(writes))
    listed = today(folder)
    folder.delete(listed[0].key)
    with pytest.raises(Unavailable):
        Reader(folder).steps(lambda: listed)
