"""Reading rollouts on a real bucket: exact against a plain search, complete page by page, also while a job runs."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_client import GrpoClient, ProblemError
from grpo_core.run_dir.records import Completion, RolloutColumns
from grpo_core.shown import shown_fields
from grpo_core.spec import parse_spec
from grpo_core.spec.rules import MAX_COMPLETIONS_PER_STEP
from jobs.errors import BadCursor, NotFound, Unavailable, Unreadable
from jobs.lifecycle.outcomes import apply_outcome
from jobs.read.rollout_query import COLUMNS, RolloutQuery
from jobs.read.rollouts import RolloutStore
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store.commits import CommitRef, ResumeBase, live_rollouts, put_base
from jobs.store.job import JobStatus
from jobs.store.write_once import Manifest, Outcome
from tests.clock import patience
from tests.conftest import SeaweedFSServer, ValkeyServer
from tests.integration.rollout_objects import RunOfRollouts, broken, completions
from tests.integration.running import RunningApi

Row = dict[str, Any]
SPEC = parse_spec({"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}})
ORDERS = [sign + name for name in COLUMNS for sign in ("", "-")]


@pytest.fixture(scope="module")
def servers(valkey: ValkeyServer, seaweedfs: SeaweedFSServer) -> tuple[StorageSettings, QueueSettings]:
    queue = QueueSettings.model_validate({"redis_url": valkey.url, "prefix": "t-rollouts"})
    names = ("endpoint", "bucket", "region", "access_key", "secret_key")
    storage = StorageSettings.model_validate({name: getattr(seaweedfs, name) for name in names})
    return storage, queue


@pytest.fixture(scope="module")
def service(servers: tuple[StorageSettings, QueueSettings]) -> Iterator[JobService]:
    service = JobService(*servers)
    service.start()
    service.check_storage()
    yield service
    service.close()


class Job:
    """A job with rollouts made by hand, and every row that a reader must find, in the order they were drawn."""

    def __init__(self, service: JobService, folder: Path) -> None:
        self.service, self._folder = service, folder
        self.id = service.submit(SPEC, "ann").id
        self.rows: list[Row] = []
        self.run: RunOfRollouts | None = None
        self._runs: list[RunOfRollouts] = []

    def begin(self, epoch: int, resumed: CommitRef | None = None) -> None:
        """A worker claims the job, and goes on after a step of an earlier run."""
        assert self.service.job_store.claim(self.id, epoch=epoch, worker="w", lease_seconds=600)
        kept = [entry for run in self._runs for entry in run.sent.values()]
        base = ResumeBase(job=self.id, epoch=epoch, resumed=resumed, objects=kept if resumed else [])
        put_base(self.service.store, base)
        self.run = RunOfRollouts(self.service.store, self.id, epoch, self._folder / str(epoch))
        self._runs.append(self.run)
        self.epoch = epoch
        if resumed:
            self.rows = [row for row in self.rows if row["step"] <= resumed.step]

    def step(self, step: int, drawn: list[Completion]) -> None:
        assert self.run is not None
        self.run.step(step, drawn)
        self.rows += [_row(completion, step, self.epoch) for completion in drawn]

    def lose(self) -> None:
        """The worker falls silent; its files stay where they are."""
        assert self.service.job_store.change(self.id, epoch=self.epoch, to=JobStatus.QUEUED).done

    def end(self) -> None:
        """The job succeeds, and its manifest lists what is valid."""
        last = max((row["step"] for row in self.rows), default=0)
        objects = [
            entry
            for run in self._runs
            for entry in run.sent.values()
            if run is self.run or int(entry.path[-14:-8]) <= last
        ]
        key = self.service.write_once.put_manifest(Manifest(job=self.id, epoch=self.epoch, objects=objects))
        outcome = Outcome(job=self.id, status="succeeded", epoch=self.epoch, time="", by="w", manifest=key)
        apply_outcome(self.service.job_store, self.id, self.service.write_once.put_outcome(outcome))

    def find(self, limit: int = 50, **filters: Any) -> list[Row]:
        """Every page of a query, one after the other."""
        query, cursor, found = RolloutQuery(**filters), None, []
        while True:
            page = self.service.rollouts(self.id, "ann", query, limit=limit, cursor=cursor)
            found += [asdict(rollout) for rollout in page.items]
            assert len(page.items) <= limit
            cursor = page.next_cursor
            if cursor is None:
                return found
            assert len(page.items) == limit, "only the last page may be short"

    def steps(self) -> list[int]:
        return [found.step for found in self.service.rollout_steps(self.id, "ann")]


def oracle(rows: list[Row], query: RolloutQuery) -> list[Row]:
    """The same in plain Python; `rows` are in order of steps."""
    keep = [
        row
        for row in rows
        if (query.step is None or row["step"] == query.step)
        and (query.step_from is None or row["step"] >= query.step_from)
        and (query.step_to is None or row["step"] <= query.step_to)
        and (query.prompt is None or row["prompt_id"] == query.prompt)
        and (query.reward_lt is None or (row["reward_total"] is not None and row["reward_total"] < query.reward_lt))
        and (query.reward_gt is None or (row["reward_total"] is not None and row["reward_total"] > query.reward_gt))
        and (query.finish is None or row["finish_reason"] == query.finish)
    ]
    sign = -1 if query.descending else 1

    def key(row: Row) -> tuple[bool, float]:
        value = row[query.column]
        return (value is None, 0 if value is None else sign * value)

    return sorted(keep, key=key)  # stable: what is equal stays in order of steps


def _row(completion: Completion, step: int, epoch: int) -> Row:
    row = {name: getattr(completion, name) for name in shown_fields(RolloutColumns)} | {"step": step, "epoch": epoch}
    row["rewards"] = {name: _finite(value) for name, value in completion.rewards.items()}
    return row | {name: _finite(row[name]) for name in ("reward_total", "advantage")}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


NewJob = Callable[[], Job]


@pytest.fixture(scope="module")
def new_job(service: JobService, tmp_path_factory: pytest.TempPathFactory) -> NewJob:
    return lambda: Job(service, tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def job(new_job: NewJob) -> Job:
    """A running job: two merged parts, then steps of their own; some rewards are no numbers; a prompt comes twice."""
    job = new_job()
    job.begin(1)
    for step in range(1, 24):
        drawn = completions(step, prompts=3, group=4, words=20, of=12)
        if step % 5 == 0:
            drawn[2], drawn[7] = broken(drawn[2]), broken(drawn[7], math.inf)
        if step == 9:
            drawn += drawn[:4]  # the same prompt again: rows that only their place tells apart
        job.step(step, drawn)
        if step in (8, 16):
            job.run.merge()  # type: ignore[union-attr]
    return job


FILTERS = st.fixed_dictionaries(
    {"order": st.sampled_from(ORDERS)},
    optional={
        "step": st.integers(1, 25),
        "step_from": st.integers(1, 25),
        "step_to": st.integers(1, 25),
        "prompt": st.sampled_from([f"{row:08x}" for row in range(13)]),
        "reward_lt": st.sampled_from([-1.0, 0.0, 0.5, 2.0, 3.0, 4.5]),
        "reward_gt": st.sampled_from([-1.0, 0.0, 0.5, 2.0, 3.0]),
        "finish": st.sampled_from(["stop", "length"]),
    },
)


@pytest.mark.parametrize("examples", [25, pytest.param(100, marks=pytest.mark.long)])
def test_every_query_finds_what_a_plain_search_finds_page_by_page(job: Job, examples: int) -> None:
    @settings(max_examples=examples, deadline=None)
    @given(filters=FILTERS, limit=st.sampled_from([1, 7, 50, 500]))
    def compare(filters: dict[str, Any], limit: int) -> None:
        wanted = oracle(job.rows, RolloutQuery(**filters))
        limit = max(limit, len(wanted) // 20)  # at most some twenty pages
        assert job.find(limit, **filters) == wanted

    compare()


def test_a_cache_too_small_for_anything_changes_no_answer(job: Job, storage_settings: StorageSettings) -> None:
    store = RolloutStore(storage_settings, cache_bytes=1)
    files = live_rollouts(job.service.store, job.id, 1)
    found, end = store.page(lambda: files, RolloutQuery(order="-length"), limit=500, after=None)
    assert [asdict(rollout) for rollout in found] == oracle(job.rows, RolloutQuery(order="-length"))
    assert end is None


def test_a_group_side_by_side_and_a_prompt_across_steps(job: Job) -> None:
    prompt = job.rows[0]["prompt_id"]
    group = job.find(step=1, prompt=prompt)
    assert [row["sample"] for row in group] == [0, 1, 2, 3]
    across = [row["step"] for row in job.find(prompt=prompt)]
    assert across == sorted(across)
    assert len(set(across)) > 1


def test_the_steps_there_are(job: Job) -> None:
    found = job.service.rollout_steps(job.id, "ann")
    assert [step.step for step in found] == list(range(1, 24))
    rows = [row for row in job.rows if row["step"] == 5]
    rewards = [row["reward_total"] for row in rows if row["reward_total"] is not None]
    fifth = found[4]
    assert (fifth.completions, fifth.reward_min, fifth.reward_max) == (12, min(rewards), max(rewards))
    assert fifth.reward_mean == pytest.approx(sum(rewards) / len(rewards))
    assert fifth.prompts == list(dict.fromkeys(row["prompt_id"] for row in rows))


def test_nothing_yet_is_an_empty_list_and_a_foreign_job_is_none(new_job: NewJob, service: JobService) -> None:
    job = new_job()
    assert job.find() == []
    assert job.steps() == []
    job.begin(1)
    assert job.find(order="reward") == []
    for look in (service.rollout_steps, lambda *who: service.rollouts(*who, RolloutQuery(), limit=1)):
        with pytest.raises(NotFound):
            look(job.id, "bob")
    job.end()
    assert job.find() == []


@pytest.mark.parametrize("order", ["step", "-step", "reward", "-reward", "length"])
def test_a_walk_while_the_job_runs_misses_and_repeats_nothing(new_job: NewJob, service: JobService, order: str) -> None:
    job = new_job()
    job.begin(1)
    draw = random.Random(order)
    job.step(1, completions(1, prompts=2, group=4, words=5))
    seen: list[Row] = []
    before: list[Row] = []
    query, cursor = RolloutQuery(order=order), None  # type: ignore[arg-type]
    for step in range(2, 40):
        if step <= 24:  # the job goes on between any two pages, and merges what is being read
            job.step(step, completions(step, prompts=2, group=4, words=5))
            if draw.random() < 0.3:
                job.run.merge()  # type: ignore[union-attr]
        before = before or list(job.rows)
        page = service.rollouts(job.id, "ann", query, limit=9, cursor=cursor)
        seen += [asdict(rollout) for rollout in page.items]
        cursor = page.next_cursor
        if cursor is None:
            break
    keys = [(row["step"], row["prompt_id"], row["sample"]) for row in seen]
    assert len(keys) == len(set(keys)), "a row came twice"
    missed = [row for row in before if row not in seen]
    assert not missed, "a row that was there from the beginning never came"
    values = [row[query.column] for row in seen]
    assert values == sorted(values, reverse=query.descending)


def test_a_file_that_is_merged_between_the_listing_and_the_reading(new_job: NewJob, service: JobService) -> None:
    job = new_job()
    job.begin(1)
    for step in (1, 2, 3):
        job.step(step, completions(step, prompts=1, group=4, words=5))
    stale = live_rollouts(service.store, job.id, 1)
    job.run.merge()  # type: ignore[union-attr]
    listings = [stale, live_rollouts(service.store, job.id, 1)]
    found, _ = service._rollouts.page(lambda: listings.pop(0), RolloutQuery(), limit=50, after=None)
    assert [asdict(rollout) for rollout in found] == job.rows
    with pytest.raises(Unavailable):
        service._rollouts.page(lambda: stale, RolloutQuery(order="reward"), limit=5, after=None)


def test_a_resumed_job_shows_each_step_once_also_after_the_end(new_job: NewJob) -> None:
    job = new_job()
    job.begin(1)
    for step in range(1, 15):
        job.step(step, completions(step, prompts=2, group=4, words=5))
        if step == 10:
            job.run.merge()  # type: ignore[union-attr]
    # Steps 11 to 14 were drawn and lost: the run went on from the checkpoint of step 10.
    first = job.run
    assert first is not None
    for name in [name for name in first.sent if "/step-" in name]:
        del first.sent[name]  # no commit names them; the objects stay in the bucket
    job.lose()
    job.begin(2, CommitRef(epoch=1, step=10))
    assert job.steps() == list(range(1, 11))
    for step in range(11, 19):
        job.step(step, completions(100 + step, prompts=2, group=4, words=5))
    assert job.find(7) == job.rows
    assert {row["epoch"] for row in job.find(step_from=11)} == {2}
    wanted = oracle(job.rows, RolloutQuery(order="-reward"))
    assert job.find(11, order="-reward") == wanted
    job.run.merge()  # type: ignore[union-attr]
    job.end()
    assert job.find(11, order="-reward") == wanted
    assert job.find(13) == job.rows
    assert job.steps() == list(range(1, 19))


def test_a_small_file_of_very_many_rows_is_not_decoded(service: JobService, tmp_path: Path) -> None:
    """Training writes these files: some kilobytes of one stand for any number of rows."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    job = Job(service, tmp_path)
    job.begin(1)
    job.step(1, completions(1, prompts=1, group=2))
    table = pq.read_table(tmp_path / "1/rollouts/step-000001.parquet")
    path = tmp_path / "bomb.parquet"
    pq.write_table(table.take(pa.array([0] * (MAX_COMPLETIONS_PER_STEP + 1))), path, compression="zstd")
    assert path.stat().st_size < 200_000
    service.store.upload(path, job.run.sent["rollouts/step-000001.parquet"].key)  # type: ignore[union-attr]
    with pytest.raises(Unreadable, match="more than 8192 rows"):
        job.find()
    with pytest.raises(Unreadable, match="more than 8192 rows"):
        job.steps()


def test_an_object_is_read_whole_up_to_a_limit_and_in_places_beyond_it(service: JobService) -> None:
    body = bytes(range(256)) * 5 * 4096
    service.store.put("t/large", body)
    assert service.store.get("t/large", most=len(body)) == body
    with pytest.raises(Unreadable, match="t/large is not read: it has more than"):
        service.store.get("t/large", most=len(body) - 1)
    file = service.store.open("t/large")
    assert file.seek(-8, 2) == len(body) - 8
    assert file.read() == body[-8:]
    assert file.seek(1_000_001) == 1_000_001
    assert file.read(3_000_000) == body[1_000_001:4_000_001]
    service.store.put("t/small", b"abc")
    assert service.store.open("t/small").read() == b"abc"


def test_a_store_that_is_away_is_told_in_seconds(
    job: Job, servers: tuple[StorageSettings, QueueSettings], seaweedfs: SeaweedFSServer
) -> None:
    files = live_rollouts(job.service.store, job.id, 1)
    store = RolloutStore(servers[0])
    seaweedfs.kill()
    try:
        began = time.monotonic()
        with pytest.raises(Unavailable, match="Object storage"):
            store.page(lambda: files, RolloutQuery(order="reward"), limit=5, after=None)
        assert time.monotonic() - began < patience(15)
    finally:
        seaweedfs.start()
    found, _ = store.page(lambda: files, RolloutQuery(order="reward"), limit=500, after=None)
    assert [asdict(rollout) for rollout in found] == oracle(job.rows, RolloutQuery(order="reward"))


@pytest.mark.parametrize(
    "cursor", ["x", "", "[]", "eyJ4IjoxfQ", "bnVsbA", "é", "WyJhIiwxLDEsMV0", "WyJhIix0cnVlLDEsMV0"]
)
def test_what_is_no_cursor_is_refused(job: Job, cursor: str) -> None:
    with pytest.raises(BadCursor, match="next_cursor"):
        job.service.rollouts(job.id, "ann", RolloutQuery(), limit=5, cursor=cursor)


def test_a_cursor_of_another_list_is_refused(job: Job, new_job: NewJob, service: JobService) -> None:
    page = service.rollouts(job.id, "ann", RolloutQuery(finish="stop"), limit=5)
    assert page.next_cursor is not None
    for other in (RolloutQuery(), RolloutQuery(finish="length"), RolloutQuery(finish="stop", order="-step")):
        with pytest.raises(BadCursor, match="other filters"):
            service.rollouts(job.id, "ann", other, limit=5, cursor=page.next_cursor)
    twin = new_job()
    with pytest.raises(BadCursor, match="another job"):
        service.rollouts(twin.id, "ann", RolloutQuery(finish="stop"), limit=5, cursor=page.next_cursor)


def test_over_http_as_the_client_asks(job: Job, servers: tuple[StorageSettings, QueueSettings]) -> None:
    api = RunningApi(JobService(*servers))
    key, _ = job.service.keys.create("ann")
    other, _ = job.service.keys.create("bob")
    with api.run(), GrpoClient(api.url, key) as client, GrpoClient(api.url, other) as stranger:
        page = client.rollouts(job.id, order="reward", limit=3, finish="length", step_to=20)
        wanted = oracle(job.rows, RolloutQuery(order="reward", finish="length", step_to=20))
        assert page["data"] == wanted[:3]
        assert page["has_more"]
        every = client.all_rollouts(job.id, order="reward", limit=40, finish="length", step_to=20)
        assert [dict(rollout) for rollout in every] == wanted
        assert [step["step"] for step in client.rollout_steps(job.id)] == list(range(1, 24))
        refused = {
            "limit": {"limit": 501},
            "order": {"order": "random"},
            "finish": {"finish": "done"},
            "step": {"step": 0},
            "reward_lt": {"reward_lt": math.nan},
            "reward_gt": {"reward_gt": math.inf},
            "cursor": {"cursor": "nonsense"},
        }
        for name, parameters in refused.items():
            with pytest.raises(ProblemError) as raised:
                client.rollouts(job.id, **parameters)  # type: ignore[arg-type]
            assert (raised.value.status, raised.value.code) == (400, "bad_query"), name
            assert [error["parameter"] for error in raised.value.document["errors"]] == [name]
        for look in (stranger.rollouts, stranger.rollout_steps):
            with pytest.raises(ProblemError) as raised:
                look(job.id)
            assert raised.value.status == 404
