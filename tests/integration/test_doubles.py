"""One contract for the doubles and what they stand for: every test here runs against both.

Owns what other tests may rely on in `FakeJobService` and `MemoryStore`. What only the real ones do is tested with them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo_core.datasets import JsonlChecker
from grpo_core.spec import JobSpec, parse_spec
from jobs.errors import Conflict, NotFound, Rejected
from jobs.lifecycle.admission import KeyReused, RequestKey
from jobs.service import JobService
from jobs.settings import StorageSettings
from jobs.store.bucket import ObjectStore
from jobs.store.datasets import DatasetRecord
from jobs.store.job import JobStatus
from jobs.store.job_store import JobEvent
from tests.integration.memory_store import MemoryStore
from tests.unit.fakes import ALICE, FakeJobService

OWNER = "alice"
BOTH = ("double", "real")


def spec(**fields: object) -> JobSpec:
    return parse_spec({"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}, **fields})


@pytest.fixture(params=BOTH)
def jobs(request: pytest.FixtureRequest) -> JobService:
    """A job service that nobody has used."""
    if request.param == "double":
        return FakeJobService()  # type: ignore[return-value]
    return request.getfixturevalue("service")


@pytest.fixture
def key(jobs: JobService) -> str:
    """An API key of the owner."""
    return ALICE if isinstance(jobs, FakeJobService) else jobs.keys.create(OWNER)[0]


@pytest.fixture
def uploader(prefix: str) -> str:
    """An owner with no data set yet: other tests keep theirs in the same bucket."""
    return f"{OWNER}-{prefix}"


@pytest.fixture
def upload(jobs: JobService, uploader: str, tmp_path: Path) -> Callable[..., tuple[DatasetRecord, bool]]:
    def upload(name: str | None = None, request: RequestKey | None = None) -> tuple[DatasetRecord, bool]:
        text = b'{"question": "1+1", "answer": "2"}\n' * 8
        checker = JsonlChecker()
        checker.feed(text)
        (tmp_path / "rows.jsonl").write_bytes(text)
        return jobs.store_dataset(tmp_path / "rows.jsonl", checker.finish(), uploader, name, request)

    return upload


@pytest.fixture(params=BOTH)
def store(request: pytest.FixtureRequest) -> ObjectStore:
    """A bucket; tests keep below a prefix of their own."""
    if request.param == "double":
        return MemoryStore()
    settings: StorageSettings = request.getfixturevalue("storage_settings")
    return ObjectStore(settings)


def public_methods(kind: type) -> dict[str, inspect.Signature]:
    found = inspect.getmembers(kind, inspect.isfunction)
    return {name: inspect.signature(method) for name, method in found if not name.startswith("_")}


ARRANGES = {"reset", "put", "add_event", "add_artifact"}
"""What tests do with the fake service and nobody does with the real one."""


def test_the_fake_service_has_the_methods_of_the_real_one() -> None:
    fake, real = public_methods(FakeJobService), public_methods(JobService)
    assert fake.keys() - ARRANGES <= real.keys()
    assert real.keys() - fake.keys() <= {"check_storage"}, "what no route calls"


@pytest.mark.parametrize("name", sorted(public_methods(FakeJobService).keys() - ARRANGES))
def test_a_method_of_the_fake_service_takes_what_the_real_one_takes(name: str) -> None:
    fake, real = public_methods(FakeJobService)[name], public_methods(JobService)[name]

    def shape(signature: inspect.Signature) -> list[tuple[str, object]]:
        return [(parameter.name.lstrip("_"), parameter.kind) for parameter in signature.parameters.values()]

    assert shape(fake) == shape(real)


def test_a_job_is_read_back_as_it_was_submitted(jobs: JobService) -> None:
    job = jobs.submit(spec(name="first", metadata={"team": "a"}), OWNER)
    read = jobs.get(job.id, OWNER)
    assert (read.status, read.name, read.metadata) == (JobStatus.QUEUED, "first", {"team": "a"})
    assert (read.owner, read.spec, read.total_steps) == (OWNER, job.spec, job.spec["training"]["steps"])


def test_another_owners_job_is_one_that_does_not_exist(jobs: JobService) -> None:
    job = jobs.submit(spec(), OWNER)
    asks: list[Callable[[str, str], object]] = [
        jobs.get,
        jobs.cancel,
        jobs.pause,
        jobs.resume,
        jobs.delete,
        jobs.metrics,
        jobs.artifacts,
        jobs.checkpoints,
        jobs.rollout_steps,
        lambda job_id, owner: jobs.events(job_id, owner, after=0, limit=10),
    ]
    for ask in asks:
        for job_id, owner in ((job.id, "bob"), ("job-" + "0" * 26, OWNER)):
            with pytest.raises(NotFound):
                ask(job_id, owner)
    assert jobs.get(job.id, OWNER).status is JobStatus.QUEUED


def listed(jobs: JobService, **asked: object) -> tuple[list[str], str | None]:
    default = {"limit": 10, "cursor": None, "status": None, "metadata": {}}
    page = jobs.list_jobs(OWNER, **{**default, **asked})  # type: ignore[arg-type]
    return [job.id for job in page.items], page.next_cursor


def test_jobs_are_listed_newest_first_in_pages_and_by_state_and_metadata(jobs: JobService) -> None:
    made = [jobs.submit(spec(metadata={"team": team}), OWNER).id for team in "aba"]
    jobs.submit(spec(), "bob")
    jobs.cancel(made[0], OWNER)
    newest = made[::-1]
    assert listed(jobs) == (newest, None)
    assert listed(jobs, limit=2) == (newest[:2], newest[1])
    assert listed(jobs, limit=2, cursor=newest[1]) == (newest[2:], None)
    assert listed(jobs, status=JobStatus.CANCELLED) == ([made[0]], None)
    assert listed(jobs, metadata={"team": "a"})[0] == [made[2], made[0]]


def test_a_request_sent_again_is_the_same_job(jobs: JobService) -> None:
    key = RequestKey.of("submit", "key", "body")
    first, was_known = jobs.submit_once(spec(name="once"), OWNER, key)
    again, is_known = jobs.submit_once(spec(name="once"), OWNER, key)
    assert (was_known, is_known, again.id) == (False, True, first.id)
    with pytest.raises(KeyReused):
        jobs.submit_once(spec(name="other"), OWNER, RequestKey.of("submit", "key", "another body"))
    other, is_known = jobs.submit_once(spec(), "bob", key)
    assert (is_known, other.id != first.id) == (False, True), "keys of two owners are two keys"


def test_a_queued_job_takes_each_command_at_once(jobs: JobService) -> None:
    job = jobs.submit(spec(), OWNER).id
    with pytest.raises(Conflict):
        jobs.delete(job, OWNER)
    assert jobs.pause(job, OWNER).status is JobStatus.PAUSED
    assert jobs.resume(job, OWNER).status is JobStatus.QUEUED
    assert jobs.cancel(job, OWNER).status is JobStatus.CANCELLED
    for command in (jobs.pause, jobs.resume, jobs.cancel):
        with pytest.raises(Conflict):
            command(job, OWNER)
    jobs.delete(job, OWNER)
    with pytest.raises(NotFound):
        jobs.get(job, OWNER)


def test_a_queued_job_knows_what_it_waits_for(jobs: JobService) -> None:
    made = [jobs.submit(spec(), OWNER) for _ in range(2)]
    positions = [jobs.waiting(job) for job in made]
    assert [position and position.ahead for position in positions] == [0, 1]
    assert jobs.waiting(jobs.cancel(made[0].id, OWNER)) is None


def test_a_job_that_did_not_run_has_left_nothing(jobs: JobService) -> None:
    job = jobs.submit(spec(), OWNER).id
    assert jobs.metrics(job, OWNER) == []
    assert jobs.artifacts(job, OWNER) == []
    assert jobs.checkpoints(job, OWNER) == []
    assert jobs.rollout_steps(job, OWNER) == []


def test_a_spec_that_no_worker_could_run_is_accepted_with_a_warning(jobs: JobService) -> None:
    if isinstance(jobs, FakeJobService):
        jobs.workers = 0
    preview = jobs.preview(spec(), OWNER)
    assert preview.estimate.completions > 0
    assert "no_worker" in [warning.code for warning in preview.warnings]


def test_a_spec_of_a_data_set_that_is_not_there_is_refused(jobs: JobService) -> None:
    asked = spec(data={"source": "upload", "dataset": "ds-" + "0" * 26})
    for ask in (jobs.preview, jobs.submit):
        with pytest.raises(Rejected) as refusal:
            ask(asked, OWNER)
        assert refusal.value.problems[0].pointer == "/data/dataset"


def test_data_sets_are_kept_listed_and_deleted(
    jobs: JobService, uploader: str, upload: Callable[..., tuple[DatasetRecord, bool]]
) -> None:
    made = [upload(name)[0] for name in ("one", "two", "three")]
    assert jobs.get_dataset(made[0].id, uploader) == made[0]
    assert (made[0].rows, made[0].columns, made[0].owner) == (8, ["question", "answer"], uploader)
    page = jobs.list_datasets(uploader, limit=2)
    assert ([item.name for item in page.items], page.next_cursor) == (["three", "two"], made[1].id)
    assert [item.name for item in jobs.list_datasets(uploader, limit=2, cursor=page.next_cursor).items] == ["one"]
    for job_id, owner in ((made[0].id, "bob"), ("ds-" + "0" * 26, uploader)):
        for ask in (jobs.get_dataset, jobs.delete_dataset):
            with pytest.raises(NotFound):
                ask(job_id, owner)
    jobs.delete_dataset(made[0].id, uploader)
    with pytest.raises(NotFound):
        jobs.get_dataset(made[0].id, uploader)


def test_an_upload_sent_again_is_the_same_data_set(upload: Callable[..., tuple[DatasetRecord, bool]]) -> None:
    key = RequestKey.of("upload", "key", "body")
    first, again = upload("a", key), upload("a", key)
    assert (first[1], again[1], again[0].id) == (False, True, first[0].id)
    with pytest.raises(KeyReused):
        upload("a", RequestKey.of("upload", "key", "another body"))


def test_a_session_stands_for_its_key_until_it_ends(jobs: JobService, key: str) -> None:
    record = jobs.authenticate(key)
    assert record is not None
    assert record.owner == OWNER
    assert jobs.authenticate("grpo_nobody") is None
    assert jobs.log_in("grpo_nobody", "192.0.2.1") is None
    session = jobs.log_in(key, "192.0.2.1")
    assert session is not None
    found = jobs.authenticate_session(session.token)
    assert found is not None
    assert found.owner == OWNER
    ended = jobs.log_out(session.token)
    assert ended is not None
    assert ended.owner == OWNER
    assert jobs.authenticate_session(session.token) is None
    assert jobs.log_out(session.token) is None


def test_events_are_read_from_a_number_on_and_by_type(jobs: JobService) -> None:
    job = jobs.submit(spec(), OWNER).id
    arrange_events(jobs, job)
    events = jobs.events(job, OWNER, after=0, limit=100)
    numbers = [event["seq"] for event in events]
    assert numbers == sorted(set(numbers))
    after = jobs.events(job, OWNER, after=numbers[0], limit=1)
    assert [event["seq"] for event in after] == numbers[1:2]
    logs = jobs.events(job, OWNER, after=0, limit=100, types={"log"})
    assert [event["data"]["code"] for event in logs] == ["one", "two"]
    page = jobs.read_on(job, after=0, types={"log"})
    assert ([event["seq"] for event in page.events], page.after) == ([event["seq"] for event in logs], numbers[-1])
    assert not page.ended
    assert jobs.newest_events([job]) == {job: numbers[-1]}


def arrange_events(jobs: JobService, job: str) -> None:
    """Two log events of a job."""
    for code in ("one", "two"):
        if isinstance(jobs, FakeJobService):
            jobs.add_event(job, "log", code=code)
        else:
            jobs.job_store.change(job, events=[JobEvent(type="log", data={"code": code})])


def test_what_an_owner_has_used_counts_jobs_that_are_not_over(jobs: JobService) -> None:
    jobs.submit(spec(), "carol")
    usage, unfinished, _ = jobs.usage(OWNER)
    assert (usage.owner, usage.gpu_hours, unfinished) == (OWNER, 0.0, 0)


def test_the_service_says_how_it_is(jobs: JobService) -> None:
    jobs.submit(spec(), OWNER)
    assert jobs.telemetry().jobs[JobStatus.QUEUED] == 1
    assert jobs.health() == {"valkey": "ok", "storage": "ok"}
    assert jobs.storage_is_up()


def test_an_object_is_read_back_replaced_and_removed(store: ObjectStore, prefix: str) -> None:
    key = f"{prefix}/a"
    assert (store.get(key), store.digest(key)) == (None, None)
    store.put(key, b"one")
    store.put(key, b"two")
    assert store.get(key) == b"two"
    assert store.digest(key) == ("3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3", 3)
    store.delete(key)
    store.delete(key)
    assert store.get(key) is None


def test_an_object_put_once_stays(store: ObjectStore, prefix: str) -> None:
    key = f"{prefix}/once"
    assert store.put_once(key, b"one")
    assert not store.put_once(key, b"two")
    assert store.put_once(key, b"one"), "who finds their own bytes has won: it is a retried request"
    assert store.get(key) == b"one"
    assert not store.put_json_once(key, {"a": 1})
    store.put_json(key, {"a": 1})
    assert store.get_json(key) == {"a": 1}


def test_a_list_is_in_the_order_of_keys_and_begins_after_one(store: ObjectStore, prefix: str) -> None:
    for name in ("b/2", "a", "b/1", "c/x/y"):
        store.put(f"{prefix}/{name}", name.encode())

    def names(below: str, after: str = "") -> list[tuple[str, int]]:
        found = store.list(f"{prefix}/{below}", after=f"{prefix}/{after}" if after else "")
        return [(item.key.removeprefix(f"{prefix}/"), item.size) for item in found]

    assert names("") == [("a", 1), ("b/1", 3), ("b/2", 3), ("c/x/y", 5)]
    assert names("b/") == [("b/1", 3), ("b/2", 3)]
    assert names("", after="b/1") == [("b/2", 3), ("c/x/y", 5)]
    assert names("nothing") == []


def test_folders_are_named_in_order_and_begin_after_one(store: ObjectStore, prefix: str) -> None:
    for name in ("b/2", "b/1", "a/1", "c/x/y", "file"):
        store.put(f"{prefix}/{name}", b"x")
    assert list(store.folders(f"{prefix}/")) == ["a", "b", "c"]
    assert list(store.folders(f"{prefix}/", after="a")) == ["b", "c"]
