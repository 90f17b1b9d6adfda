from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.client import DownloadError, GrpoClient, NotConfiguredError, ProblemError, UnreachableError
from api.download import safe_path

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
def client(service: Service) -> Iterator[GrpoClient]:
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
    assert client.submit({"name": "中文"}) == {"id": JOB}
    assert client.dry_run({}) == {"id": JOB}
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
    assert caught.value.errors == [error]
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
    service.on("POST", "/jobs", answer)
    with pytest.raises(UnreachableError) as caught:
        client.submit({})
    assert "api.test" in str(caught.value)
    assert len(service.requests) == 1, "a submission is never sent twice"


def test_an_upload_is_streamed_with_its_length(client: GrpoClient, service: Service, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"question": "1", "answer": "1"}\n' * 100_000)
    service.on("POST", "/datasets", {"id": "ds-1"}, status=201)
    assert client.upload_dataset(file, name="sums") == {"id": "ds-1"}
    request = service.requests[0]
    assert request.content == file.read_bytes()
    assert request.headers["content-length"] == str(file.stat().st_size)
    assert request.headers["content-type"] == "application/x-ndjson"
    assert request.url.query == b"name=sums"


def test_wait_tells_of_each_event_once_and_ends_with_the_job(client: GrpoClient, service: Service) -> None:
    service.on("GET", f"/jobs/{JOB}", {"status": "running"}, {"status": "running"}, {"status": "succeeded"})
    service.on(
        "GET",
        f"/jobs/{JOB}/events",
        {"data": [{"seq": 1}, {"seq": 2}]},
        {"data": []},
        {"data": [{"seq": 3}]},
    )
    seen: list[int] = []
    assert client.wait(JOB, lambda event: seen.append(event["seq"]), poll=0)["status"] == "succeeded"
    assert seen == [1, 2, 3]
    asked = [request.url.params["after"] for request in service.requests if request.url.path.endswith("/events")]
    assert asked == ["0", "2", "2"]


def test_wait_outlasts_a_restart_of_the_service(client: GrpoClient, service: Service) -> None:
    service.on(
        "GET", f"/jobs/{JOB}", httpx.ConnectError("refused"), problem(503, "unavailable"), {"status": "cancelled"}
    )
    service.on("GET", f"/jobs/{JOB}/events", httpx.ReadTimeout(""), {"data": []})
    assert client.wait(JOB, poll=0)["status"] == "cancelled"


def test_wait_gives_up_in_the_end_and_at_once_when_refused(client: GrpoClient, service: Service) -> None:
    service.on("GET", f"/jobs/{JOB}", httpx.ConnectError("refused"))
    with pytest.raises(UnreachableError):
        client.wait(JOB, poll=0, patience=0.01)
    service.on("GET", f"/jobs/{JOB}", problem(404, "not_found"))
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
