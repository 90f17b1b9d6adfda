"""A canary in everything a client can send and be sent: none of it is ever logged, whatever goes wrong."""

from __future__ import annotations

import io
import logging
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import structlog

from jobs import logs
from jobs.errors import Unavailable
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store.job_store import JobEvent
from tests.integration.running import RunningApi, wait_until

CANARY = "CANARY-5f1c"
SPEC: dict[str, Any] = {
    "name": f"name {CANARY}",
    "metadata": {f"key {CANARY}": f"value {CANARY}"},
    "resources": {"gpus": 0},
    "optimizer": {"name": "adamw_torch"},
    "data": {"system_prompt": f"prompt {CANARY}", "examples": [{"question": CANARY, "answer": CANARY}]},
}


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What the API process would write, at its most talkative."""
    stream, root, before = io.StringIO(), logging.getLogger(), structlog.get_config()
    level = root.level
    asked: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        # Beside pytest's own handlers, not in their place.
        patch.setattr(logging, "basicConfig", lambda **given: asked.update(given))
        logs.configure(logging.DEBUG)
    # Not cached: that would outlast this test.
    structlog.configure(cache_logger_on_first_use=False)
    (handler,) = asked["handlers"]
    root.addHandler(handler)
    root.setLevel(asked["level"])
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)
    structlog.configure(**before)


@pytest.fixture
def server(storage_settings: StorageSettings, queue_settings: QueueSettings) -> Iterator[RunningApi]:
    server = RunningApi(JobService(storage_settings, queue_settings), max_body_bytes=20_000)
    with server.run():
        yield server


def test_no_log_line_holds_what_clients_send_or_get(
    logged: io.StringIO, server: RunningApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = server.service
    key, _ = service.keys.create("ann", name=CANARY)
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {key}"}, timeout=20) as client:
        links = good_requests(client, service)
        bad_requests(client)
        failures(client, service, monkeypatch)
    text = logged.getvalue()
    assert len(re.findall(r'"event": "request"', text)) > 25, "it does log"
    assert '"event": "request.failed"' in text
    secrets = [
        CANARY,
        key.removeprefix("grpo_"),
        "X-Amz-Signature",
        service.store._settings.secret_key.get_secret_value(),
        service.job_store._url.split("@")[0].split(":")[-1],
        *(re.findall("Signature=([0-9a-f]+)", link)[0] for link in links),
    ]
    assert all(len(secret) > 10 for secret in secrets)
    assert [line[:300] for line in text.splitlines() if any(secret in line for secret in secrets)] == []


def good_requests(client: httpx.Client, service: JobService) -> list[str]:
    """What succeeds; returns the links that were handed out."""
    lines = f'{{"question": "{CANARY}", "answer": "{CANARY}"}}\n'
    jsonl = {"Content-Type": "application/x-ndjson"}
    once = {"Idempotency-Key": CANARY}
    for _ in range(2):
        uploaded = client.post(f"/datasets?name={CANARY}", content=lines, headers={**jsonl, **once})
        submitted = client.post("/jobs", json=SPEC, headers=once)
        assert (uploaded.status_code, submitted.status_code) == (201, 201), submitted.text
    assert client.post("/jobs?dry_run=true", json=SPEC).status_code == 200
    job = submitted.json()["id"]
    assert client.get("/jobs", params={f"metadata[key {CANARY}]": f"value {CANARY}"}).json()["data"][0]["id"] == job
    service.job_store.claim(job, epoch=1, worker="w", lease_seconds=60)
    service.job_store.change(job, epoch=1, events=[JobEvent(type="sample", step=1, data={"completion": CANARY})])
    service.write_once.allocate_epoch(job, "w", "now")
    folder = f"jobs/{job}/e1/checkpoints/step-000001/"
    service.store.put_json(
        folder + "manifest.json", {"files": [{"path": "a.json", "size": 2, "sha256": "0" * 64}], "step": 1}
    )
    (checkpoint,) = client.get(f"/jobs/{job}/checkpoints").json()["data"]
    reader = threading.Thread(target=lambda: follow(client, job))
    reader.start()
    client.post(f"/jobs/{job}/cancel")
    service.job_store.change(job, epoch=1, to=service.get(job, "ann").status.CANCELLED)
    reader.join(timeout=20)
    return [file["url"] for file in checkpoint["files"]]


def follow(client: httpx.Client, job: str) -> None:
    with client.stream("GET", f"/jobs/{job}/events", headers={"Accept": "text/event-stream"}) as answer:
        assert CANARY in answer.read().decode()


def bad_requests(client: httpx.Client) -> None:
    """What is refused, each for another reason, with the canary where the fault is."""
    jsonl = {"Content-Type": "application/x-ndjson"}
    assert client.get("/jobs", headers={"Authorization": f"Bearer grpo_{CANARY}"}).status_code == 401
    assert client.get("/jobs", headers={"Authorization": f"Basic {CANARY}"}).status_code == 401
    for spec in ({"lora": {CANARY: 1}}, {**SPEC, "engine": CANARY}, {"data": {"dataset": f"{CANARY} {CANARY}"}}):
        assert client.post("/jobs", json=spec).status_code == 422
    assert client.post("/jobs", json={"data": {"source": "file", "dataset": CANARY}}).status_code == 422
    assert client.post("/jobs", json={**SPEC, "name": "x"}, headers={"Idempotency-Key": CANARY}).status_code == 422
    assert client.post("/jobs", json={}, headers={"Idempotency-Key": f"{CANARY} x"}).status_code == 400
    assert client.post("/jobs", content=f'{{"{CANARY}": ').status_code == 415
    for body in (f'{{"{CANARY}": ', f'{{"a": "{CANARY}", "a": 1}}', f'["{CANARY}", NaN]'):
        sent = client.post("/jobs", content=body, headers={"Content-Type": "application/json"})
        assert sent.status_code == 400
    assert client.post("/jobs", json={"name": CANARY * 5000}).status_code == 413
    assert client.post("/datasets", content=f"{CANARY}\n", headers=jsonl).status_code == 422
    assert client.post("/datasets", content=CANARY, headers={"Content-Type": f"text/{CANARY}"}).status_code == 415
    for query in (f"status={CANARY}", f"{CANARY}=1", f"cursor={CANARY}", f"limit={CANARY}"):
        assert client.get(f"/jobs?{query}").status_code == 400


def failures(client: httpx.Client, service: JobService, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults of ours and of servers, whose messages hold the canary."""
    with monkeypatch.context() as patch:
        for error, status in (
            (RuntimeError(f"cannot use {CANARY}"), 500),
            (KeyError(CANARY), 500),
            (Unavailable("Valkey", CANARY), 503),
        ):

            def fail(*_: Any, error: Exception = error, **__: Any) -> Any:
                raise error from ValueError(CANARY)

            patch.setattr(service.job_store, "get", fail)
            patch.setattr(service.job_store, "list_ids", fail)
            patch.setattr(service.write_once, "put_job", fail)
            assert client.get("/jobs").status_code == status
            assert client.get("/jobs/job-01ARZ3NDEKTSV4RRFFQ69G5FAV").status_code == status
            assert client.post("/jobs", json=SPEC).status_code == status
            assert client.post("/jobs", json=SPEC, headers={"Idempotency-Key": f"{CANARY}{status}"}).status_code in (
                status,
                409,
            )


def test_a_stream_that_breaks_tells_no_more(
    logged: io.StringIO, server: RunningApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not an answer any more, so it is the server that logs it: the frames, and not what was in them."""
    service = server.service
    key, _ = service.keys.create("ann")
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {key}"}, timeout=20) as client:
        job = client.post("/jobs", json=SPEC).json()["id"]
        read_on = service.read_on

        def break_off(job_id: str, *, after: int, types: Any = ()) -> Any:
            if after:
                raise RuntimeError(f"cannot use {CANARY}")
            return read_on(job_id, after=after, types=types)

        monkeypatch.setattr(service, "read_on", break_off)
        stream = client.stream("GET", f"/jobs/{job}/events", headers={"Accept": "text/event-stream"})
        with pytest.raises(httpx.RemoteProtocolError), stream as answer:
            answer.read()
        wait_until(lambda: server.streams.readers == 0)
    text = logged.getvalue()
    assert job in text
    assert "request.broken_off" in text
    assert [line[:300] for line in text.splitlines() if CANARY in line] == []
