"""One owner, or a stranger, asks for as much as they can: everyone else is served, and the probes answer at once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest

from grpo_core.spec import parse_spec
from jobs.errors import Conflict
from jobs.service import JobService, ServiceSettings
from jobs.settings import QueueSettings, StorageSettings
from jobs.store.bucket import StoredObject
from jobs.store.job import JobRecord, JobStatus
from jobs.store.job_store import JobEvent
from tests.clock import patience
from tests.conftest import SeaweedFSServer, ValkeyServer
from tests.integration.running import RunningApi, wait_until
from tests.unit.fakes import FakeJobService, bearer, make_record

SPEC = parse_spec({"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}})
LONGEST = 0.05
"""Seconds that the event loop may be held."""


class Api(RunningApi):
    key: str

    def client(self, timeout: float = 30) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=timeout)


@contextmanager
def running(service: JobService, **settings: Any) -> Generator[Api]:
    server = Api(service, **settings)
    server.key, _ = service.keys.create("ann")
    with server.run():
        yield server


@pytest.fixture
def server(storage_settings: StorageSettings, queue_settings: QueueSettings) -> Iterator[Api]:
    with running(JobService(storage_settings, queue_settings)) as found:
        yield found


@contextmanager
def held_for(server: RunningApi) -> Generator[Callable[[], float]]:
    """The longest that the loop was held in this block, in processor time of its thread: others' load is not in it."""
    longest, ended = 0.0, False

    async def watch() -> None:
        nonlocal longest
        before = time.thread_time()
        while not ended:
            await asyncio.sleep(0.001)
            now = time.thread_time()
            longest, before = max(longest, now - before), now

    watching = asyncio.run_coroutine_threadsafe(watch(), server.server.servers[0].get_loop())
    try:
        yield lambda: longest
    finally:
        ended = True
        watching.result(timeout=10)


def many_unknown(count: int) -> dict[str, Any]:
    return {f"training_stepz_{number}": number for number in range(count)}


BODIES = {
    "unknown fields": json.dumps(many_unknown(8000)),
    "almost too many": json.dumps(many_unknown(4900)),
    "wrong rows": json.dumps({"data": {"examples": [{"question": 1, "answerr": [], "x": "a" * 45}] * 1200}}),
    "lists": "[" * 30 + "[]," * 60_000 + "[]" + "]" * 30,
    "keys": "{" + ",".join(f'"training":{{"stepz":{number}}}' for number in range(7000)) + "}",
    "numbers": "[" + "9" * 230_000 + "]",
    "text": json.dumps({"name": "x" * 240_000}),
}


@pytest.mark.parametrize("body", [*BODIES])
def test_a_bad_spec_of_any_kind_does_not_hold_the_loop(body: str) -> None:
    service: Any = FakeJobService()
    server = RunningApi(service)
    assert len(BODIES[body]) > 90_000
    with server.run(), httpx.Client(base_url=server.url, headers=bearer(), timeout=30) as client:
        headers = {"Content-Type": "application/json", "Idempotency-Key": "a-key"}
        client.post("/jobs", content="{}", headers=headers)
        with held_for(server) as longest:
            for _ in range(3):
                answer = client.post("/jobs", content=BODIES[body], headers=headers)
                assert answer.status_code in (400, 422)
        assert longest() < LONGEST


@pytest.mark.parametrize("path", ["/jobs?", "/rewards?", "/page/curves?"])
def test_thousands_of_parameters_are_refused_before_they_are_read(path: str) -> None:
    service: Any = FakeJobService()
    server = RunningApi(service)
    query = "&".join(f"limitt{number:x}=1" for number in range(2500))
    with server.run(), httpx.Client(base_url=server.url, headers=bearer(), timeout=30) as client:
        with held_for(server) as longest:
            answer = client.get(path + query)
        assert (answer.status_code, answer.json()["code"]) == (400, "bad_query")
        assert longest() < LONGEST


def test_pages_of_many_large_events_are_made_in_threads(server: Api) -> None:
    job = server.service.submit(SPEC, "ann")
    assert server.service.job_store.claim(job.id, epoch=1, worker="w", lease_seconds=60)
    for _ in range(10):
        events = [JobEvent(type="sample", data={"completion": "é" * 10_000}) for _ in range(100)]
        assert server.service.job_store.change(job.id, epoch=1, events=events).done
    server.service.job_store.change(job.id, epoch=1, to=JobStatus.SUCCEEDED, settles=True)
    with server.client() as client, held_for(server) as longest:
        assert len(client.get(f"/jobs/{job.id}/events?limit=1000").json()["data"]) == 1000
        stream = client.get(f"/jobs/{job.id}/events", headers={"Accept": "text/event-stream"})
        assert stream.text.count("\nid: ") == 1003
        assert longest() < LONGEST


@pytest.fixture
def crowd(service: JobService) -> list[JobRecord]:
    """Thousands of unfinished jobs of one owner."""
    records = [make_record(owner="ann", spec=SPEC, metadata={"team": f"t{number % 7}"}) for number in range(4000)]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(service.job_store.create, records))
    return sorted(records, key=lambda record: record.id, reverse=True)


def cost(call: Callable[[], object]) -> float:
    """Processor time of this thread."""
    begun = time.thread_time()
    call()
    return time.thread_time() - begun


def test_a_filter_that_matches_nothing_and_a_deletion_cost_the_same_among_thousands(
    service: JobService, crowd: list[JobRecord]
) -> None:
    assert cost(lambda: service.list_jobs("ann", limit=20, metadata={"team": "nobody"})) < patience(0.1)
    wanted = [record.id for record in crowd if record.metadata == {"team": "t3"}]
    found: list[str] = []
    cursor = None
    while True:
        page = service.list_jobs("ann", limit=100, metadata={"team": "t3"}, cursor=cursor)
        found += [record.id for record in page.items]
        if (cursor := page.next_cursor) is None:
            break
    assert found == wanted
    ended = service.submit(SPEC, "ann")
    service.cancel(ended.id, "ann")
    assert cost(lambda: service.delete(ended.id, "ann")) < patience(0.1)


def test_an_order_looks_at_no_earlier_one(service: JobService, monkeypatch: pytest.MonkeyPatch) -> None:
    job = service.submit(SPEC, "ann")
    for _ in range(10):
        service.pause(job.id, "ann")
        service.resume(job.id, "ann")
    listed: list[str] = []
    list_objects = service.store.list

    def list_and_count(prefix: str, **more: str) -> Iterator[StoredObject]:
        for item in list_objects(prefix, **more):
            listed.append(item.key)
            yield item

    monkeypatch.setattr(service.store, "list", list_and_count)
    assert service.pause(job.id, "ann").orders == 21
    assert len(listed) <= 1, "its own"


def test_a_job_takes_so_many_orders_and_then_only_its_end(service: JobService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.lifecycle.commands.MAX_ORDERS", 4)
    job = service.submit(SPEC, "ann")
    for order in (service.pause, service.resume) * 2:
        order(job.id, "ann")
    with pytest.raises(Conflict, match="4 commands"):
        service.pause(job.id, "ann")
    assert service.cancel(job.id, "ann").status is JobStatus.CANCELLED


def test_orders_are_limited_by_owner(storage_settings: StorageSettings, queue_settings: QueueSettings) -> None:
    settings = ServiceSettings.model_validate({"orders_per_minute": 3})
    with running(JobService(storage_settings, queue_settings, settings)) as server, server.client() as client:
        jobs = [server.service.submit(SPEC, owner).id for owner in ("ann", "ann", "ann", "ann", "bob")]
        answers = [client.post(f"/jobs/{job}/cancel") for job in jobs[:4]]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        refusal = answers[3].json()
        assert (refusal["code"], "GRPO_ORDERS_PER_MINUTE" in refusal["detail"]) == ("rate_limited", True)
        assert 0 < int(answers[3].headers["retry-after"]) <= 21
        assert server.service.cancel(jobs[4], "bob").status is JobStatus.CANCELLED


@contextmanager
def frozen(*pids: int) -> Generator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.alone
@pytest.mark.parametrize("which", ["valkey", "seaweedfs"])
def test_the_probes_answer_at_once_while_a_server_hangs(
    server: Api, valkey: ValkeyServer, seaweedfs: SeaweedFSServer, which: str
) -> None:
    job = server.service.submit(SPEC, "ann")
    pid = {"valkey": valkey, "seaweedfs": seaweedfs}[which].pid

    def ask() -> None:
        with suppress(httpx.TransportError), server.client(timeout=3) as client:
            client.post(f"/jobs/{job.id}/pause")

    with ThreadPoolExecutor(24) as pool, httpx.Client(base_url=server.url, timeout=5) as probe:
        assert probe.get("/readyz").status_code == 200
        with frozen(pid):
            asked = [pool.submit(ask) for _ in range(48)]
            times: list[float] = []

            def answers(path: str) -> int:
                begun = time.perf_counter()
                status = probe.get(path).status_code
                times.append(time.perf_counter() - begun)
                return status

            wait_until(lambda: (answers("/healthz"), answers("/readyz")) == (200, 503))
            for call in asked:
                call.result(timeout=30)
            # Within 100 ms on most machines. It was a second, or twenty.
            assert sorted(times)[len(times) // 2] < 0.25
            assert max(times) < patience(3)
        wait_until(lambda: probe.get("/readyz").status_code == 200, seconds=30)


def test_streams_of_one_owner_are_limited(storage_settings: StorageSettings, queue_settings: QueueSettings) -> None:
    with running(JobService(storage_settings, queue_settings), max_owner_streams=3) as server:
        job, theirs = server.service.submit(SPEC, "ann"), server.service.submit(SPEC, "bob")
        key, _ = server.service.keys.create("bob")
        accept = {"Accept": "text/event-stream"}
        with server.client() as client:
            path = f"/jobs/{job.id}/events"
            open_ones = [client.send(client.build_request("GET", path, headers=accept), stream=True) for _ in range(3)]
            refusal = client.get(path, headers=accept)
            assert (refusal.status_code, refusal.json()["code"]) == (429, "too_many_streams")
            assert "GRPO_MAX_OWNER_STREAMS" in refusal.json()["detail"]
            bearer_of_bob = {**accept, "Authorization": f"Bearer {key}"}
            with client.stream("GET", f"/jobs/{theirs.id}/events", headers=bearer_of_bob) as other:
                assert other.status_code == 200
            for one in open_ones:
                one.close()
            wait_until(lambda: client.build_request and server.streams.readers == 0)
            with client.stream("GET", path, headers=accept) as again:
                assert again.status_code == 200


def begin_upload(server: RunningApi, size: int = 1000) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    head = f"POST /datasets HTTP/1.1\r\nHost: a\r\nAuthorization: {bearer()['Authorization']}\r\n"
    sock.sendall(f"{head}Content-Type: application/x-ndjson\r\nContent-Length: {size}\r\n\r\n{{".encode())
    return sock


def test_unfinished_uploads_are_limited_by_owner_and_by_the_disk() -> None:
    service: Any = FakeJobService()
    server = RunningApi(service, max_owner_uploads=3)
    line = b'{"question": "1+1", "answer": "2"}\n'
    headers = {**bearer(), "Content-Type": "application/x-ndjson"}
    with server.run():
        held = [begin_upload(server) for _ in range(3)]
        places = server.app.state.uploads._places
        wait_until(lambda: places._taken["alice"] == 3)
        refused = httpx.post(f"{server.url}/datasets", content=line, headers=headers)
        assert (refused.status_code, refused.json()["code"]) == (429, "too_many_uploads")
        other = httpx.post(f"{server.url}/datasets", content=line, headers={**headers, **bearer("grpo_bob-key")})
        assert other.status_code == 201
        for sock in held:
            sock.close()
        wait_until(lambda: not places._taken)
        assert httpx.post(f"{server.url}/datasets", content=line, headers=headers).status_code == 201
        assert server.app.state.uploads._to_come == 0
    server = RunningApi(FakeJobService(), min_free_bytes=2**50)  # type: ignore[arg-type]
    with server.run():
        refused = httpx.post(f"{server.url}/datasets", content=line, headers=headers)
        assert (refused.status_code, refused.json()["code"], refused.headers["retry-after"]) == (503, "no_room", "30")


def test_a_client_that_goes_away_is_no_fault_of_the_service() -> None:
    service: Any = FakeJobService()
    server = RunningApi(service)
    with server.run():
        begin_upload(server).close()
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            head = f"POST /jobs HTTP/1.1\r\nHost: a\r\nAuthorization: {bearer()['Authorization']}\r\n"
            sock.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{".encode())
        seen = lambda: httpx.get(f"{server.url}/metrics", headers=bearer()).text  # noqa: E731
        wait_until(lambda: seen().count('status="499"') >= 2)
        assert 'status="500"' not in seen()


def test_the_api_starts_while_storage_is_away(
    storage_settings: StorageSettings,
    queue_settings: QueueSettings,
    seaweedfs: SeaweedFSServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jobs.service.FIRST_ANSWER_SECONDS", 1.0)
    service = JobService(storage_settings, queue_settings)
    key, _ = service.keys.create("ann")
    seaweedfs.stop()
    server = Api(service)
    server.key = key
    try:
        with server.run(), server.client() as client:
            assert client.get("/healthz").status_code == 200
            ready = client.get("/readyz")
            assert (ready.status_code, ready.json()["checks"]["storage"]) == (503, "no answer")
            refused = client.post("/jobs", json=SPEC.as_dict())
            assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
            seaweedfs.start()
            wait_until(lambda: client.get("/readyz").status_code == 200, seconds=60)
            assert client.post("/jobs", json=SPEC.as_dict()).status_code == 201
    finally:
        seaweedfs.start()
