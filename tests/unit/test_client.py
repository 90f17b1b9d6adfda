from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import grpo_client.client
import grpo_client.events
from grpo_client import DownloadError, GrpoClient, NotConfiguredError, ProblemError, UnreachableError
from grpo_client.download import safe_path

JOB = "job-01ARZ3NDEKTSV4RRFFQ69G5FAV"
KEY = "grpo_secret"
Handler = Callable[[httpx.Request], httpx.Response]


class Service:
    """Answers for the API and for storage, and remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.answers: dict[tuple[str, str], list[httpx.Response | Exception]] = {}
        self.files: dict[str, bytes] = {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        if request.url.host == "storage.test":
            content = self.files.get(request.url.path)
            return httpx.Response(403) if content is None else httpx.Response(200, content=content)
        answers = self.answers[request.method, request.url.path]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer.status_code, content=answer.content, headers=answer.headers)

    def on(self, method: str, path: str, *answers: Any, status: int = 200) -> None:
        """What to answer, in turn; the last answer stays."""
        self.answers[method, path] = [
            answer if isinstance(answer, Exception | httpx.Response) else httpx.Response(status, json=answer)
            for answer in answers
        ]

    def artifact(self, path: str, content: bytes, **changes: Any) -> dict[str, Any]:
        """An artifact whose link works."""
        self.files[f"/{len(self.files)}"] = content
        return {
            "path": path,
            "key": f"jobs/{JOB}/{path}",
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "url": f"http://storage.test/{len(self.files) - 1}?X-Amz-Signature=s",
            **changes,
        }

    def artifacts(self, *files: dict[str, Any], complete: bool = True) -> None:
        self.on("GET", f"/jobs/{JOB}/artifacts", {"object": "list", "data": list(files), "complete": complete})


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def client(service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[GrpoClient]:
    monkeypatch.setattr(grpo_client.client, "RETRY_DELAYS", [0] * len(grpo_client.client.RETRY_DELAYS))
    with GrpoClient("http://api.test/", KEY, transport=httpx.MockTransport(service)) as client:
        yield client


def problem(status: int, code: str, *errors: dict[str, str]) -> httpx.Response:
    document = {"status": status, "code": code, "detail": "No.", "errors": list(errors), "request_id": "req-1"}
    return httpx.Response(status, json=document, headers={"Content-Type": "application/problem+json"})


@pytest.mark.parametrize(("url", "key"), [("", KEY), ("127.0.0.1:8080", KEY), ("http://api.test", "")])
def test_it_says_which_setting_is_missing(monkeypatch: pytest.MonkeyPatch, url: str, key: str) -> None:
    monkeypatch.delenv("GRPO_URL", raising=False)
    monkeypatch.delenv("GRPO_API_KEY", raising=False)
    with pytest.raises(NotConfiguredError, match="GRPO_API_KEY" if url.startswith("http:") else "GRPO_URL"):
        GrpoClient(url, key)


def test_the_environment_is_the_default(monkeypatch: pytest.MonkeyPatch, service: Service) -> None:
    monkeypatch.setenv("GRPO_URL", "http://from-env.test")
    monkeypatch.setenv("GRPO_API_KEY", "grpo_env")
    service.on("GET", "/rewards", {"data": []})
    with GrpoClient(transport=httpx.MockTransport(service)) as client:
        client.rewards()
    assert service.requests[0].url.host == "from-env.test"
    assert service.requests[0].headers["authorization"] == "Bearer grpo_env"


def test_a_submission_is_the_spec_as_json(client: GrpoClient, service: Service) -> None:
    service.on("POST", "/jobs", {"id": JOB})
    assert client.submit({"name": "中文"}).id == JOB
    assert client.dry_run({})["id"] == JOB
    first, second = service.requests
    assert json.loads(first.content) == {"name": "中文"}
    assert first.headers["content-type"] == "application/json"
    assert (first.url.query, second.url.query) == (b"", b"dry_run=true")


def test_list_takes_filters(client: GrpoClient, service: Service) -> None:
    service.on("GET", "/jobs", {"data": []})
    client.list(limit=5, status="failed", metadata={"team": "a b"})
    assert dict(service.requests[0].url.params) == {"limit": "5", "status": "failed", "metadata[team]": "a b"}


def test_an_id_cannot_lead_to_another_route(client: GrpoClient, service: Service) -> None:
    service.on("GET", "/jobs/../datasets", {})
    client.get("../datasets")
    assert service.requests[0].url.raw_path == b"/jobs/..%2Fdatasets"


def test_a_refusal_carries_every_field(client: GrpoClient, service: Service) -> None:
    error = {"pointer": "/training/steps", "code": "bad_value", "detail": "too small", "remedy": "Give 1."}
    service.on("POST", "/jobs", problem(422, "invalid_spec", error))
    with pytest.raises(ProblemError) as caught:
        client.submit({})
    assert (caught.value.status, caught.value.code, caught.value.request_id) == (422, "invalid_spec", "req-1")
    assert [each.raw for each in caught.value.errors] == [error]
    assert "/training/steps: too small. Give 1." in str(caught.value)
    assert len(service.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        httpx.ConnectError("refused"),
        httpx.ReadTimeout(""),
        httpx.RemoteProtocolError("cut"),
        httpx.Response(200, content=b"<html>"),
        httpx.Response(502, content=b"Bad Gateway"),
        httpx.Response(302, headers={"Location": "http://elsewhere.test"}),
        httpx.Response(200, json=["not", "an", "object"]),
    ],
)
def test_whatever_is_not_the_service_is_one_sentence(client: GrpoClient, service: Service, answer: Any) -> None:
    service.on("POST", f"/jobs/{JOB}/cancel", answer)
    with pytest.raises(UnreachableError) as caught:
        client.cancel(JOB)
    assert "api.test" in str(caught.value)
    assert len(service.requests) == 1, "what has no key is never sent twice"


def test_a_submission_that_was_cut_off_is_sent_again_under_its_key(client: GrpoClient, service: Service) -> None:
    service.on(
        "POST",
        "/jobs",
        httpx.ReadTimeout(""),
        problem(409, "idempotency_in_progress"),
        problem(503, "unavailable"),
        httpx.Response(502, content=b"Bad Gateway"),
        httpx.ConnectError("refused"),
        {"id": JOB},
    )
    assert client.submit({"name": "x"}).id == JOB
    assert len({request.headers["idempotency-key"] for request in service.requests}) == 1
    assert {request.content for request in service.requests} == {b'{"name":"x"}'}
    client.submit({"name": "x"})
    assert len({request.headers["idempotency-key"] for request in service.requests}) == 2, "the next one is another"
    client.submit({}, idempotency_key="mine")
    assert service.requests[-1].headers["idempotency-key"] == "mine"


@pytest.mark.parametrize(
    ("answer", "times"),
    [
        (httpx.ConnectError("refused"), 6),
        (problem(503, "unavailable"), 6),
        (problem(500, "internal"), 1),
        (problem(429, "too_many_jobs"), 1),
        (problem(422, "idempotency_key_reused"), 1),
        (httpx.Response(200, content=b"<html>"), 1),
    ],
)
def test_only_what_may_pass_is_tried_again_and_not_for_ever(
    client: GrpoClient, service: Service, answer: Any, times: int
) -> None:
    service.on("POST", "/jobs", answer)
    with pytest.raises((ProblemError, UnreachableError)):
        client.submit({})
    assert len(service.requests) == times


def test_nobody_waits_for_what_is_not_this_api(client: GrpoClient, service: Service) -> None:
    service.on("GET", "/jobs/job-1/events", httpx.Response(200, content=b"<html>"))
    with pytest.raises(UnreachableError, match="not this API"):
        client.wait("job-1", patience=900)
    assert len(service.requests) == 1


def test_an_upload_is_streamed_with_its_length(client: GrpoClient, service: Service, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"question": "1", "answer": "1"}\n' * 100_000)
    service.on("POST", "/datasets", {"id": "ds-1"}, status=201)
    assert client.upload_dataset(file, name="sums").id == "ds-1"
    request = service.requests[0]
    assert request.content == file.read_bytes()
    assert request.headers["content-length"] == str(file.stat().st_size)
    assert request.headers["content-type"] == "application/x-ndjson"
    assert request.url.query == b"name=sums"


def sse(*events: dict[str, Any], rest: bytes = b"") -> httpx.Response:
    """A stream that is closed after these events and some bytes of the next."""
    frames = [f"id: {event['seq']}\nevent: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events]
    return httpx.Response(
        200,
        content=b"retry: 2000\n\n: hello\n\n" + "".join(frames).encode() + rest,
        headers={"Content-Type": "text/event-stream; charset=utf-8"},
    )


def event(seq: int, kind: str = "metric", **data: Any) -> dict[str, Any]:
    return {"seq": seq, "type": kind, "data": data}


LAST = event(4, "status", status="succeeded")
EVENTS = f"/jobs/{JOB}/events"


def asked_after(service: Service) -> list[str]:
    return [request.headers["last-event-id"] for request in service.requests if request.url.path == EVENTS]


def test_wait_tells_of_each_event_once_and_ends_with_the_job(client: GrpoClient, service: Service) -> None:
    service.on("GET", EVENTS, sse(event(1), event(2), rest=b"id: 3\nda"), sse(event(3), LAST))
    service.on("GET", f"/jobs/{JOB}", {"status": "succeeded"})
    seen: list[int] = []
    assert client.wait(JOB, lambda event: seen.append(event["seq"]), poll=0)["status"] == "succeeded"
    assert seen == [1, 2, 3, 4]
    assert asked_after(service) == ["0", "2"]
    assert service.requests[0].headers["accept"] == "text/event-stream"


def test_a_stream_begins_where_it_is_told_and_ends_where_there_is_no_more(client: GrpoClient, service: Service) -> None:
    service.on("GET", EVENTS, sse(LAST))
    assert [each["seq"] for each in client.stream(JOB, after=3)] == [4]
    assert asked_after(service) == ["3"]
    service.on("GET", EVENTS, httpx.Response(204))
    assert list(client.stream(JOB, after=4)) == []


def test_an_event_may_hold_any_character(client: GrpoClient, service: Service) -> None:
    text = "a\u2028b\u0085c\x0bd\x1ce\r\nf 一"
    frame = b"id: 1\nevent: log\ndata: " + json.dumps(event(1, "log", message=text), ensure_ascii=False).encode()
    service.on("GET", EVENTS, sse(rest=frame + b"\n\n"), sse(LAST))
    assert next(client.stream(JOB, poll=0))["data"]["message"] == text


class Cut(httpx.SyncByteStream):
    """A body that arrives in pieces."""

    def __init__(self, content: bytes, size: int) -> None:
        self._pieces = [content[start : start + size] for start in range(0, len(content), size)]

    def __iter__(self) -> Iterator[bytes]:
        yield from self._pieces


def streaming(body: httpx.SyncByteStream) -> GrpoClient:
    """A client of a service that answers every request with this stream."""
    answer = httpx.Response(200, stream=body, headers={"Content-Type": "text/event-stream"})
    return GrpoClient("http://api.test", KEY, transport=httpx.MockTransport(lambda _: answer))


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_are_read_however_they_are_cut(size: int) -> None:
    content = sse(event(1, "log", message="一\u2028"), LAST, rest=b"data: {}").content
    with streaming(Cut(content, size)) as client:
        assert [each.raw for each in client.stream(JOB)] == [event(1, "log", message="一\u2028"), LAST]


def test_an_event_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo_client.events, "MAX_FRAME_BYTES", 1000)
    with streaming(Cut(b"data: " + b"x" * 5000, 100)) as client, pytest.raises(UnreachableError, match="not this API"):
        list(client.stream(JOB))


def test_wait_outlasts_a_restart_of_the_service(client: GrpoClient, service: Service) -> None:
    service.on(
        "GET",
        EVENTS,
        httpx.ConnectError("refused"),
        problem(503, "unavailable"),
        problem(429, "too_many_streams"),
        httpx.Response(502, content=b"Bad Gateway"),
        sse(event(1)),
        httpx.ReadTimeout(""),
        sse(LAST),
    )
    service.on("GET", f"/jobs/{JOB}", httpx.ReadTimeout(""), {"status": "cancelled"})
    assert client.wait(JOB, poll=0)["status"] == "cancelled"
    assert asked_after(service)[-2:] == ["1", "1"]


def test_wait_gives_up_in_the_end_and_at_once_when_refused(client: GrpoClient, service: Service) -> None:
    service.on("GET", EVENTS, httpx.ConnectError("refused"))
    with pytest.raises(UnreachableError):
        client.wait(JOB, poll=0, patience=0.01)
    service.on("GET", EVENTS, httpx.Response(200, json={"data": []}))
    with pytest.raises(UnreachableError, match="not this API"):
        client.wait(JOB, poll=0, patience=0.01)
    service.on("GET", EVENTS, problem(404, "not_found"))
    with pytest.raises(ProblemError):
        client.wait(JOB, poll=0)


def test_download_writes_what_was_announced(client: GrpoClient, service: Service, tmp_path: Path) -> None:
    adapter, report = b"\x00" * 700_000, b"{}"
    service.artifacts(service.artifact("adapter/model.safetensors", adapter), service.artifact("report.json", report))
    told: list[tuple[str, int, int]] = []
    files = client.download(JOB, tmp_path / "out", lambda *progress: told.append(progress))
    assert [file["path"] for file in files] == ["adapter/model.safetensors", "report.json"]
    assert (tmp_path / "out/adapter/model.safetensors").read_bytes() == adapter
    assert (tmp_path / "out/report.json").read_bytes() == report
    assert told[-1] == ("report.json", 2, 2)
    assert ("adapter/model.safetensors", 700_000, 700_000) in told


def test_the_key_never_goes_to_storage(client: GrpoClient, service: Service, tmp_path: Path) -> None:
    service.artifacts(service.artifact("report.json", b"{}"))
    client.download(JOB, tmp_path)
    asked = [request for request in service.requests if request.url.host == "storage.test"]
    assert len(asked) == 1
    assert "authorization" not in asked[0].headers
    assert KEY not in str(asked[0].headers)


def test_what_is_there_already_is_not_fetched_again(client: GrpoClient, service: Service, tmp_path: Path) -> None:
    service.artifacts(service.artifact("a.json", b"{}"), service.artifact("b.json", b"[]"))
    (tmp_path / "a.json").write_bytes(b"{}")
    (tmp_path / "b.json").write_bytes(b"xx")
    client.download(JOB, tmp_path)
    assert [r.url.path for r in service.requests if r.url.host == "storage.test"] == ["/1"]
    assert (tmp_path / "b.json").read_bytes() == b"[]"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sha256": "0" * 64}, "not what the service announced"),
        ({"size": 3}, "more than the 3 bytes"),
        ({"size": 400}, "4 of 400 bytes"),
    ],
)
def test_tampered_content_is_refused_and_leaves_nothing(
    client: GrpoClient, service: Service, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    service.artifacts(service.artifact("adapter/x.bin", b"real", **changes))
    with pytest.raises(DownloadError, match=says):
        client.download(JOB, tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_refused_file_leaves_the_earlier_one(client: GrpoClient, service: Service, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"older")
    service.artifacts(service.artifact("x.bin", b"real", sha256="0" * 64))
    with pytest.raises(DownloadError):
        client.download(JOB, tmp_path)
    assert (tmp_path / "x.bin").read_bytes() == b"older"


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "/etc/x", "", ".", "..", "a\\..\\x", "C:x", "a//b", "./a", "a/", "a\x00b", "a\nb", "\u202ex"],
)
def test_unsafe_names_are_refused(client: GrpoClient, service: Service, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    service.artifacts(service.artifact(name, b"evil"))
    with pytest.raises(DownloadError):
        client.download(JOB, folder)
    assert list(tmp_path.rglob("*")) == [folder]
    assert all(request.url.host != "storage.test" for request in service.requests)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    folder, outside = tmp_path / "out", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / "adapter").symlink_to(outside)
    with pytest.raises(DownloadError, match="leads out"):
        safe_path(folder, "adapter/x")


def test_an_expired_link_is_asked_for_again(client: GrpoClient, service: Service, tmp_path: Path) -> None:
    fresh = service.artifact("report.json", b"{}")
    stale = {**fresh, "url": "http://storage.test/expired"}
    listing = {"object": "list", "complete": True}
    service.on("GET", f"/jobs/{JOB}/artifacts", {**listing, "data": [stale]}, {**listing, "data": [fresh]})
    client.download(JOB, tmp_path)
    assert (tmp_path / "report.json").read_bytes() == b"{}"


def test_links_that_never_work_are_an_error(client: GrpoClient, service: Service, tmp_path: Path) -> None:
    service.artifacts({**service.artifact("report.json", b"{}"), "url": "http://storage.test/gone"})
    with pytest.raises(DownloadError, match="403"):
        client.download(JOB, tmp_path)


@pytest.mark.parametrize(("complete", "says"), [(False, "has not ended"), (True, "left no files")])
def test_nothing_to_download(client: GrpoClient, service: Service, tmp_path: Path, complete: bool, says: str) -> None:
    service.artifacts(complete=complete)
    with pytest.raises(DownloadError, match=says):
        client.download(JOB, tmp_path)


def test_only_some_files_are_fetched(client: GrpoClient, service: Service, tmp_path: Path) -> None:
    names = ["adapter/a.safetensors", "adapter/config.json", "adapterless", "rollouts/part-1.parquet", "report.json"]
    listing = {"data": [service.artifact(name, name.encode()) for name in names], "complete": True}
    service.on("GET", f"/jobs/{JOB}/artifacts", listing, listing, listing)
    client.download(JOB, tmp_path, only=["adapter", "rollouts/*"])
    saved = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert saved == {*names[:2], names[3]}
    with pytest.raises(DownloadError, match=r"has no adaptor; it left adapter/, adapterless, rollouts/, report\.json"):
        client.download(JOB, tmp_path, only=["adaptor"])


def test_deleting_tells_of_refusals(client: GrpoClient, service: Service) -> None:
    service.on("DELETE", f"/jobs/{JOB}", httpx.Response(204))
    client.delete(JOB)
    service.on("DELETE", "/datasets/ds-1", {"code": "conflict", "detail": "In use."}, status=409)
    with pytest.raises(ProblemError, match="In use"):
        client.delete_dataset("ds-1")
    service.on("DELETE", f"/jobs/{JOB}", httpx.Response(200, text="<html>"))
    with pytest.raises(UnreachableError, match="not this API"):
        client.delete(JOB)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (httpx.ConnectError("[SSL: WRONG_VERSION_NUMBER] wrong version number"), "set GRPO_URL to http://"),
        (httpx.ConnectError("[Errno 111] Connection refused"), "Check that it is running"),
    ],
)
def test_nobody_there_says_what_to_look_at(client: GrpoClient, service: Service, error: Exception, says: str) -> None:
    service.on("GET", f"/jobs/{JOB}", error)
    with pytest.raises(UnreachableError, match=says):
        client.get(JOB)


def test_an_address_without_a_scheme_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotConfiguredError, match=r"'127\.0\.0\.1:8080' lacks http://"):
        GrpoClient("127.0.0.1:8080", KEY)
