"""HEAD, ETags, gzip and limits, as real clients of a running service meet them."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from api.representations import LEAST_BYTES, is_known, takes_gzip
from grpo_core.spec import parse_spec
from jobs.service import JobService, ServiceSettings
from jobs.settings import QueueSettings, StorageSettings
from tests.integration.running import RunningApi

SPEC = parse_spec({"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}})
GETS = [
    "/jobs",
    "/jobs?limit=2",
    "/jobs/JOB",
    "/jobs/JOB/events",
    "/jobs/JOB/metrics",
    "/jobs/JOB/metrics?format=csv",
    "/jobs/JOB/checkpoints",
    "/jobs/JOB/artifacts",
    "/jobs/JOB/rollouts",
    "/jobs/JOB/rollouts/steps",
    "/datasets",
    "/rewards",
    "/usage",
    "/webhooks",
    "/workers",
    "/schema",
    "/schema/openapi.json",
    "/schema/job",
    "/schema/redoc.js",
    "/healthz",
    "/readyz",
    "/",
    "/page/page.css",
    "/v1/jobs",
    "/v1/models",
    "/v1/files",
    "/v1/fine_tuning/jobs",
    "/jobs/job-01ARZ3NDEKTSV4RRFFQ69G5FAV",
    "/nowhere",
]


@pytest.fixture(scope="module")
def running(valkey: Any, seaweedfs: Any) -> Iterator[tuple[RunningApi, str, str]]:
    """A service with three jobs, a key, and the id of a job."""
    queue = QueueSettings.model_validate({"redis_url": valkey.url, "prefix": "t-representations"})
    storage = StorageSettings.model_validate(
        {
            "endpoint": seaweedfs.endpoint,
            "bucket": seaweedfs.bucket,
            "region": seaweedfs.region,
            "access_key": seaweedfs.access_key,
            "secret_key": seaweedfs.secret_key,
        }
    )
    settings = ServiceSettings.model_validate({"requests_per_second": 50, "requests_burst": 5000})
    api = RunningApi(JobService(storage, queue, settings))
    with api.run():
        key, _ = api.service.keys.create("ann")
        jobs = [api.service.submit(SPEC, "ann").id for _ in range(3)]
        yield api, key, jobs[0]


@pytest.fixture
def client(running: tuple[RunningApi, str, str]) -> Iterator[httpx.Client]:
    api, key, _ = running
    headers = {"Authorization": f"Bearer {key}", "Accept-Encoding": "identity"}
    with httpx.Client(base_url=api.url, headers=headers, timeout=30) as client:
        yield client


def raw(client: httpx.Client, path: str, **headers: str) -> tuple[httpx.Response, bytes]:
    """An answer with its body as it was sent."""
    with client.stream("GET", path, headers=headers) as answer:
        return answer, b"".join(answer.iter_raw())


@pytest.mark.parametrize("path", GETS)
@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_head_has_the_headers_of_get_and_no_body(
    client: httpx.Client, running: tuple[RunningApi, str, str], path: str, encoding: str
) -> None:
    path = path.replace("JOB", running[2])
    got, _ = raw(client, path, **{"Accept-Encoding": encoding})
    head = client.head(path, headers={"Accept-Encoding": encoding})
    assert (head.status_code, head.content) == (got.status_code, b"")
    # The length of a stream is not known; the server says so only where there is one.
    each_time = {"date", "x-request-id", "ratelimit", "transfer-encoding"}
    if got.is_error:
        each_time.add("content-length")  # the request's id is in the body
    assert {k: v for k, v in head.headers.items() if k not in each_time} == {
        k: v for k, v in got.headers.items() if k not in each_time
    }


def test_head_of_an_event_stream_ends_at_once(client: httpx.Client, running: tuple[RunningApi, str, str]) -> None:
    api, _, job = running
    head = client.head(f"/jobs/{job}/events", headers={"Accept": "text/event-stream"})
    assert (head.status_code, head.headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
    assert client.get("/jobs").status_code == 200  # on the same connection
    assert api.streams.readers == 0


@pytest.mark.parametrize("path", ["/jobs", "/jobs/JOB", "/schema/openapi.json", "/schema/job", "/page/page.css", "/"])
@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_what_has_not_changed_is_304(
    client: httpx.Client, running: tuple[RunningApi, str, str], path: str, encoding: str
) -> None:
    path = path.replace("JOB", running[2])
    given = {"Accept-Encoding": encoding}
    first = client.get(path, headers=given)
    tag = first.headers["etag"]
    assert tag.startswith('"')
    again, body = raw(client, path, **given, **{"If-None-Match": f'"other", {tag}'})
    assert (again.status_code, body, again.headers["etag"]) == (304, b"", tag)
    assert again.headers.get("vary") == first.headers.get("vary")
    assert again.headers["cache-control"] == first.headers["cache-control"]
    assert client.get(path, headers={**given, "If-None-Match": '"other"'}).content == first.content


def test_a_job_that_changes_gets_another_tag(client: httpx.Client, running: tuple[RunningApi, str, str]) -> None:
    job = running[0].service.submit(SPEC, "ann").id
    tag = client.get(f"/jobs/{job}").headers["etag"]
    running[0].service.cancel(job, "ann")
    after = client.get(f"/jobs/{job}", headers={"If-None-Match": tag})
    assert (after.status_code, after.json()["status"]) == (200, "cancelled")
    assert after.headers["etag"] != tag


def test_large_answers_are_compressed_for_those_who_take_it(client: httpx.Client) -> None:
    plain = client.get("/jobs")
    packed, body = raw(client, "/jobs", **{"Accept-Encoding": "br, gzip;q=0.5"})
    assert (packed.headers["content-encoding"], packed.headers["vary"]) == ("gzip", "Accept-Encoding")
    assert gzip.decompress(body) == plain.content
    assert len(body) < len(plain.content) / 4
    assert packed.headers["etag"] == f'{plain.headers["etag"][:-1]}-gzip"'
    assert int(packed.headers["content-length"]) == len(body)


def test_a_large_table_is_compressed_as_it_is_sent(client: httpx.Client, running: tuple[RunningApi, str, str]) -> None:
    packed, body = raw(client, f"/jobs/{running[2]}/metrics?format=csv", **{"Accept-Encoding": "gzip"})
    assert packed.headers["content-encoding"] == "gzip"
    assert set(packed.headers["vary"].split(", ")) == {"Accept", "Accept-Encoding"}
    assert gzip.decompress(body).startswith(b"step,")


@pytest.mark.parametrize("path", ["/healthz", "/jobs/JOB/artifacts", "/jobs/JOB/checkpoints", "/workers"])
def test_secrets_and_small_answers_are_sent_as_they_are(
    client: httpx.Client, running: tuple[RunningApi, str, str], path: str
) -> None:
    answer, body = raw(client, path.replace("JOB", running[2]), **{"Accept-Encoding": "gzip"})
    assert "content-encoding" not in answer.headers
    json.loads(body)


def test_the_answer_with_a_new_secret_is_neither_compressed_nor_kept(client: httpx.Client) -> None:
    body = {"url": f"https://example.com/{'x' * LEAST_BYTES}"}
    answer = client.post("/webhooks", json=body, headers={"Accept-Encoding": "gzip"})
    assert answer.status_code == 201, answer.text
    assert answer.json()["secret"] in answer.text
    assert len(answer.content) > LEAST_BYTES
    assert not {"content-encoding", "etag"} & answer.headers.keys()
    assert answer.headers["cache-control"] == "no-store"


def test_links_without_a_key_get_no_tag(client: httpx.Client, running: tuple[RunningApi, str, str]) -> None:
    for part in ("artifacts", "checkpoints"):
        answer = client.get(f"/jobs/{running[2]}/{part}")
        assert "etag" not in answer.headers
        assert answer.headers["cache-control"] == "no-store"


def test_an_event_stream_is_never_compressed(running: tuple[RunningApi, str, str]) -> None:
    api, key, job = running
    with socket.create_connection(("127.0.0.1", api.port), timeout=30) as connection:
        connection.sendall(
            f"GET /jobs/{job}/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
            "Accept: text/event-stream\r\nAccept-Encoding: gzip\r\n\r\n".encode()
        )
        received = b""
        while b"\ndata: " not in received:
            piece = connection.recv(65536)
            assert piece
            received += piece
    head = received.partition(b"\r\n\r\n")[0].lower()
    assert b"content-encoding" not in head
    assert b"etag" not in head


def test_the_limits_are_told_with_every_answer(client: httpx.Client, running: tuple[RunningApi, str, str]) -> None:
    answer = client.get("/jobs")
    assert answer.headers["ratelimit-policy"] == '"requests";q=5000;w=100'
    name, left, full = answer.headers["ratelimit"].split(";")
    assert name == '"requests"'
    assert 0 < int(left.removeprefix("r=")) < 5000
    assert 1 <= int(full.removeprefix("t=")) <= 100
    job = running[0].service.submit(SPEC, "ann").id
    policies = client.post(f"/jobs/{job}/cancel").headers["ratelimit-policy"]
    assert '"requests";q=5000;w=100' in policies
    assert '"commands";q=' in policies
    searched = client.get("/jobs?search=nothing").headers
    assert '"searches";q=' in searched["ratelimit-policy"]
    assert 'qu="concurrent-requests"' in searched["ratelimit-policy"]


def test_what_needs_no_key_has_no_limit_to_tell(client: httpx.Client) -> None:
    assert "ratelimit" not in client.get("/healthz").headers


def test_a_refused_request_says_that_nothing_is_left(valkey: Any, seaweedfs: Any) -> None:
    queue = QueueSettings.model_validate({"redis_url": valkey.url, "prefix": "t-representations-refused"})
    storage = StorageSettings.model_validate(
        {
            "endpoint": seaweedfs.endpoint,
            "bucket": seaweedfs.bucket,
            "region": seaweedfs.region,
            "access_key": seaweedfs.access_key,
            "secret_key": seaweedfs.secret_key,
        }
    )
    settings = ServiceSettings.model_validate({"requests_per_second": 0.01, "requests_burst": 2})
    api = RunningApi(JobService(storage, queue, settings))
    with api.run():
        key, _ = api.service.keys.create("ann")
        headers = {"Authorization": f"Bearer {key}"}
        answers = [httpx.get(f"{api.url}/jobs", headers=headers) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["ratelimit"].split(";")[1] for answer in answers] == ["r=1", "r=0", "r=0"]
    assert int(answers[2].headers["retry-after"]) > 0
    assert answers[2].headers["ratelimit-policy"] == '"requests";q=2;w=200'


@pytest.mark.parametrize(
    ("accepted", "takes"),
    [
        ("gzip", True),
        ("br, gzip;q=0.1", True),
        ("*", True),
        ("", False),
        ("identity", False),
        ("gzip;q=0", False),
        ("gzip;q=x", False),
        ("*;q=0", False),
        ("gzip;q=0, *", False),
    ],
)
def test_gzip_is_sent_only_where_it_is_taken(accepted: str, takes: bool) -> None:
    assert takes_gzip(accepted) is takes


@pytest.mark.parametrize(
    ("asked", "known"),
    [('"a"', True), ('W/"a"', True), ('"b", "a"', True), ("*", True), ("", False), ('"b"', False), ("a", False)],
)
def test_tags_are_compared_weakly(asked: str, known: bool) -> None:
    assert is_known('"a"', asked) is known
