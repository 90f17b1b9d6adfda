"""Event streams on a real server, Valkey and bucket: nothing missed, nothing twice, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

import api.streams
from api.streams import EventStreams
from grpo_client import GrpoClient
from grpo_core import strict_json
from grpo_core.spec import parse_spec
from jobs.errors import Unavailable
from jobs.lifecycle.outcomes import apply_outcome
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store import object_keys
from jobs.store.event_log import events_name, now_iso
from jobs.store.job import JobRecord, JobStatus
from jobs.store.job_store import JobEvent
from jobs.store.write_once import Manifest, ManifestEntry, Outcome
from tests.clock import patience
from tests.integration.running import RunningApi, wait_until

SPEC = parse_spec({"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}})
STREAM = {"Accept": "text/event-stream"}


class Api(RunningApi):
    """What tests do with it, as ann and as a worker."""

    key: str

    def client(self, **headers: str) -> httpx.Client:
        return httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {self.key}", **STREAM, **headers}, timeout=20
        )

    def submit(self) -> JobRecord:
        record = self.service.submit(SPEC, "ann")
        assert self.service.job_store.claim(record.id, epoch=1, worker="w", lease_seconds=60)
        return record

    def emit(self, job: JobRecord, *steps: int, text: str = "") -> None:
        events = [JobEvent(type="metric", step=step, data={"reward": step, "text": text}) for step in steps]
        assert self.service.job_store.change(job.id, epoch=1, events=events).done

    def end(self, job: JobRecord, **outcome: Any) -> None:
        apply_outcome(
            self.service.job_store,
            job.id,
            Outcome(job=job.id, status="succeeded", epoch=1, time=now_iso(), by="w", **outcome),
        )


@pytest.fixture
def server(
    storage_settings: StorageSettings, queue_settings: QueueSettings, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Api]:
    monkeypatch.setattr(api.streams, "TICK_SECONDS", 0.05)
    server = Api(JobService(storage_settings, queue_settings))
    server.key, _ = server.service.keys.create("ann")
    with server.run():
        yield server


@contextmanager
def followers(server: Api, count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for readers, which are let go if the test fails: it would wait for them."""
    with ThreadPoolExecutor(count) as pool:
        try:
            yield pool
        except BaseException:
            server.server.should_exit = True
            raise


def frames(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The events of a stream; every frame must be as the standard has it."""
    frame: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(": ")
            frame[name] = value
        else:
            if "data" in frame:
                event = json.loads(frame["data"])
                assert (frame["id"], frame["event"]) == (str(event["seq"]), event["type"])
                yield event
            frame = {}


def read(
    server: Api,
    job: JobRecord,
    count: int | None = None,
    *,
    query: str = "",
    into: list[int] | None = None,
    **headers: str,
) -> list[int]:
    """Follow a job to its end, or leave after so many events; returns their numbers, also while they come."""
    seen = [] if into is None else into
    with (
        server.client(**headers) as client,
        client.stream("GET", f"/jobs/{job.id}/events{query}") as answer,
    ):
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        for event in frames(answer.iter_lines()):
            seen.append(event["seq"])
            if len(seen) == count:
                break
    return seen


def test_what_was_and_what_comes_in_one_stream_that_ends_with_the_job(server: Api) -> None:
    job = server.submit()
    server.emit(job, 1, 2, 3)
    with followers(server, 1) as pool:
        reader = pool.submit(read, server, job)
        wait_until(lambda: server.streams.readers == 1)
        for step in range(4, 140):
            server.emit(job, step)
        server.end(job)
        assert reader.result(timeout=20) == list(range(1, 2 + 139 + 1 + 1))
    assert read(server, job, query="?after=140") == [141, 142], "and it can be read again afterwards"
    assert read(server, job, query="?after=5", **{"Last-Event-ID": "141"}) == [142], "the header wins"
    assert read(server, job, query="?type=status") == [1, 2, 142]


def test_a_reader_that_comes_back_misses_and_repeats_nothing(server: Api) -> None:
    job = server.submit()
    stop = threading.Event()

    def train() -> None:
        step = 0
        while not stop.is_set():
            server.emit(job, step := step + 1)
            time.sleep(0.002)
        server.end(job)

    trainer = threading.Thread(target=train)
    trainer.start()
    seen = read(server, job, 3)
    for cut in (1, 7, 2, 60, 51, 1, 30):
        seen += read(server, job, cut, **{"Last-Event-ID": str(seen[-1])})
    stop.set()
    trainer.join()
    rest = seen + read(server, job, **{"Last-Event-ID": str(seen[-1])})
    assert rest == list(range(1, len(rest) + 1))
    assert len(rest) == len(server.service.job_store.events(job.id, after=0, limit=100_000))


def test_the_python_client_comes_back_by_itself(server: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    job = server.submit()
    with followers(server, 1) as pool, GrpoClient(server.url, server.key) as client:
        seen: list[int] = []
        waiting = pool.submit(client.wait, job.id, lambda event: seen.append(event["seq"]), poll=0.05)
        for step in range(1, 31):
            server.emit(job, step)
            if step % 10 == 0:
                wait_until(lambda: server.streams.readers == 1)
                server.streams.close()  # as a shutdown does
                wait_until(lambda: server.streams.readers == 0)
                server.streams._closing = False
        server.end(job)
        assert waiting.result(timeout=20)["status"] == "succeeded"
    assert seen == list(range(1, 34))


def test_an_ended_job_that_was_read_is_204(server: Api) -> None:
    job = server.submit()
    server.end(job)
    with server.client() as client:
        assert client.get(f"/jobs/{job.id}/events?after=3").status_code == 204
        assert client.get(f"/jobs/{job.id}/events", headers={"Last-Event-ID": "999"}).status_code == 204


def test_events_that_left_valkey_are_streamed_from_the_bucket(server: Api) -> None:
    job = server.submit()
    server.emit(job, *range(1, 121))
    service = server.service
    events = service.job_store.events(job.id, after=0, limit=1000)
    key = object_keys.run(job.id, 1) + events_name(1, len(events))
    service.store.put(key, "".join(f"{strict_json.dumps(event)}\n" for event in events).encode())
    entry = ManifestEntry(path=events_name(1, len(events)), key=key, sha256="0" * 64, size=1)
    manifest = service.write_once.put_manifest(Manifest(job=job.id, epoch=1, objects=[entry]))
    service.write_once.put_outcome(
        Outcome(job=job.id, status="succeeded", epoch=1, time=now_iso(), by="w", manifest=manifest)
    )
    server.end(job, manifest=manifest)
    whole = read(server, job)
    service.job_store.client.delete(f"{service.job_store.prefix}:events:{job.id}")
    assert read(server, job) == whole == list(range(1, 124))
    assert read(server, job, query="?after=100") == whole[100:]


def test_fifty_readers_cost_no_threads_and_leave_nothing(server: Api) -> None:
    jobs = [server.submit() for _ in range(5)]
    others = set(threading.enumerate())  # an API of another test may be up
    with followers(server, 50) as pool:
        readers = [pool.submit(read, server, jobs[number % 5]) for number in range(50)]
        wait_until(lambda: server.streams.readers == 50)
        names = [thread.name for thread in set(threading.enumerate()) - others]
        assert 1 <= sum(name.startswith("events") for name in names) <= api.streams.THREADS
        for step in range(1, 61):
            for job in jobs:
                server.emit(job, step)
        for job in jobs:
            server.end(job)
        assert {tuple(reader.result(timeout=30)) for reader in readers} == {tuple(range(1, 64))}
    wait_until(lambda: server.streams.readers == 0)
    wait_until(lambda: server.streams._pulse is not None and server.streams._pulse.done())
    assert server.streams._watched == {}


def test_a_reader_that_leaves_frees_everything_at_once(server: Api) -> None:
    job = server.submit()
    connections = [open_socket(server, job) for _ in range(10)]
    wait_until(lambda: server.streams.readers == 10)
    for connection in connections:
        connection.close()
    wait_until(lambda: server.streams.readers == 0, seconds=2)
    wait_until(lambda: not server.server.server_state.tasks, seconds=2)


def test_a_reader_that_does_not_read_holds_up_nobody_and_little_memory(
    server: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = server.submit()
    handed: dict[int, int] = {}
    read_on = server.service.read_on

    def counted(job_id: str, *, after: int, types: Any = ()) -> Any:
        page = read_on(job_id, after=after, types=types)
        task = id(page)
        handed[task] = after
        return page

    monkeypatch.setattr(server.service, "read_on", counted)
    slow = open_socket(server, job)
    wait_until(lambda: server.streams.readers == 1)
    text = "x" * 16_000
    for start in range(1, 3001, 50):
        server.emit(job, *range(start, start + 50), text=text)
    time.sleep(1)
    furthest = max(handed.values())
    assert furthest < 1500, "of 48 MB no more was taken than what the sockets hold"
    server.end(job)
    assert read(server, job) == list(range(1, 3004)), "another reader is not held up"
    slow.settimeout(20)
    received = b""
    while chunk := slow.recv(1 << 20):
        received = (received + chunk)[-4000:]
    slow.close()
    assert b"succeeded" in received, "and it gets the rest when it reads on"


def test_a_quiet_stream_says_that_it_is_there(server: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.streams, "HEARTBEAT_SECONDS", 0.2)
    job = server.submit()
    with server.client() as client, client.stream("GET", f"/jobs/{job.id}/events?type=error") as answer:
        lines = answer.iter_lines()
        assert next(lines) == "retry: 2000"
        for step in range(3):  # what is left out must not keep it silent
            server.emit(job, step)
            assert next(line for line in lines if line).startswith(":")


def test_a_stream_outlasts_servers_that_are_away(server: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.streams, "RETRY_MS", 100)
    job = server.submit()
    with followers(server, 1) as pool:
        reader = pool.submit(read, server, job)
        wait_until(lambda: server.streams.readers == 1)

        def away(*_: Any, **__: Any) -> Any:
            raise Unavailable("Valkey", "away")

        with monkeypatch.context() as patch:
            patch.setattr(server.service, "read_on", away)
            patch.setattr(server.service, "newest_events", away)
            server.emit(job, 1)
            time.sleep(0.5)
        server.end(job)
        assert reader.result(timeout=20) == [1, 2, 3, 4]


def test_a_shutdown_ends_streams_at_once_and_in_order(server: Api) -> None:
    job = server.submit()
    with followers(server, 5) as pool:
        seen: list[list[int]] = [[] for _ in range(5)]
        readers = [pool.submit(read, server, job, into=found) for found in seen]
        stuck = open_socket(server, job)
        server.emit(job, *range(1, 300), text="x" * 100_000)  # it does not read, so it cannot be ended in order
        wait_until(lambda: server.streams.readers == 6)
        wait_until(lambda: all(len(found) == 301 for found in seen), seconds=30)
        began = time.monotonic()
        server.server.should_exit = True
        assert [reader.result(timeout=20) for reader in readers] == [list(range(1, 302))] * 5, "closed, not cut off"
        assert time.monotonic() - began < patience(3)
        server.thread.join(timeout=15)
        assert not server.thread.is_alive()
        assert time.monotonic() - began < patience(5 + 3)
        stuck.close()


def test_what_is_refused(server: Api) -> None:
    job = server.submit()
    with server.client() as client:
        events = f"/jobs/{job.id}/events"
        assert client.get(events, headers={"Authorization": ""}).status_code == 401
        assert client.get("/jobs/job-01ARZ3NDEKTSV4RRFFQ69G5FAV/events").json()["code"] == "not_found"
        for bad in ("x", "-1", "1.5", "9" * 16, "٣"):
            answer = client.get(events, headers={"Last-Event-ID": bad.encode()})
            assert (answer.status_code, answer.json()["code"]) == (400, "bad_request"), bad
        assert client.get(f"{events}?limit=5").json()["errors"][0]["parameter"] == "limit"
        server.streams.places._in_all = 0
        full = client.get(events)
        assert (full.status_code, full.json()["code"], full.headers["retry-after"]) == (429, "too_many_streams", "5")
        for accept in ("application/json", "*/*", "", "text/html", "application/json, text/event-stream;q=0.5"):
            listed = client.get(events, headers={"Accept": accept})
            assert listed.headers["content-type"].startswith("application/json"), accept
    theirs = server.service.submit(SPEC, "bob")
    with server.client() as client:
        assert client.get(f"/jobs/{theirs.id}/events").status_code == 404
    assert server.service.get(job.id, "ann").status is JobStatus.RUNNING


def open_socket(server: Api, job: JobRecord) -> socket.socket:
    """A reader that has asked and does not read."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(
        f"GET /jobs/{job.id}/events HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n"
        f"Authorization: Bearer {server.key}\r\n\r\n".encode()
    )
    return connection


def test_nothing_is_left_of_the_loop() -> None:
    """The hub is made in a loop and freed in it: no task or thread outlives it."""

    async def live() -> int:
        streams = EventStreams(object(), limit=1, per_owner=1)  # type: ignore[arg-type]
        await streams.aclose()
        return len(asyncio.all_tasks())

    assert asyncio.run(live()) == 1
