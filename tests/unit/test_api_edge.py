from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from litestar import Litestar
from litestar.testing import TestClient

import api
from api.edge import PREVIEW, VERSIONED
from api.openapi import PAGE_POLICY
from api.problems import PROBLEMS, type_uri
from jobs.errors import Unavailable
from tests.unit.fakes import ALICE, FakeJobService, make_record

Client = TestClient[Litestar]
STATIC = Path(api.__file__).parent / "static"


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    """What is logged, as dictionaries."""
    with structlog.testing.capture_logs() as captured:
        yield captured


def test_a_problem_has_the_fields_of_rfc_9457(client: Client) -> None:
    answer = client.get("/jobs/nonsense")
    document = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert document == {
        "type": type_uri("not_found"),
        "title": PROBLEMS["not_found"].title,
        "status": 404,
        "detail": "There is no job nonsense; list yours to see their ids.",
        "code": "not_found",
        "instance": "/jobs/nonsense",
        "request_id": answer.headers["x-request-id"],
        "errors": [],
    }


@pytest.mark.parametrize(
    "path",
    [
        "/nope",
        "/page/nope",
        "/page/../app.py",
        "/v2/jobs",
        "/jobs/x/y/z",
        "/schema/x",
        "/schema/x.json",
        "/api/static/x",
    ],
)
def test_an_unknown_address_is_a_problem(client: Client, path: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.json()["code"]) == (404, "no_such_route")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/jobs", {"GET", "HEAD", "POST", "OPTIONS"}),
        ("PUT", "/jobs/job-01ARZ3NDEKTSV4RRFFQ69G5FAV", {"GET", "HEAD", "PATCH", "DELETE", "OPTIONS"}),
        ("GET", "/jobs/x/cancel", {"POST", "OPTIONS"}),
        ("PATCH", "/healthz", {"GET", "HEAD", "OPTIONS"}),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(client: Client, method: str, path: str, allowed: set[str]) -> None:
    answer = client.request(method, path)
    assert (answer.status_code, answer.json()["code"]) == (405, "method_not_allowed")
    assert set(answer.headers["allow"].split(", ")) == allowed


@pytest.mark.parametrize("path", ["/jobs", "/healthz", "/schema"])
def test_options_needs_no_key(client: Client, path: str) -> None:
    answer = client.options(path, headers={"Authorization": ""})
    assert answer.status_code == 204
    assert {"GET", "OPTIONS"} <= set(answer.headers["allow"].split(", "))


@pytest.mark.parametrize("path", ["/healthz", "/nope", "/jobs", "/schema/job", "/schema"])
def test_every_answer_has_an_id_and_security_headers(client: Client, path: str) -> None:
    headers = client.get(path).headers
    assert headers["x-request-id"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    kept = {"/jobs": "private, no-cache", "/schema/job": "no-cache", "/schema": "no-cache"}
    assert headers["cache-control"] == kept.get(path, "no-store")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "access-control-allow-origin" not in client.get(path, headers={"Origin": "https://evil.test"}).headers


@pytest.mark.parametrize(
    ("given", "kept"),
    [("my-request.0001", True), ("short", False), ("a" * 65, False), ('x"},{"y-z', False), ("a b" * 5, False)],
)
def test_a_harmless_request_id_is_kept(client: Client, given: str, kept: bool) -> None:
    assert (client.get("/healthz", headers={"X-Request-Id": given}).headers["x-request-id"] == given) is kept


def test_an_unforeseen_error_tells_the_client_nothing(
    client: Client, service: FakeJobService, lines: list[Any]
) -> None:
    service.fail = RuntimeError("the password is hunter2")
    answer = client.get("/jobs")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert "hunter2" not in answer.text
    assert "RuntimeError" not in answer.text
    logged = [line for line in lines if line["event"] == "request.failed"]
    assert logged[0]["error"] == "RuntimeError"
    assert any("list_jobs" in frame for frame in logged[0]["stack"])
    assert "hunter2" not in str(lines)


def test_a_request_is_one_line_without_secrets(client: Client, service: FakeJobService, lines: list[Any]) -> None:
    record = service.put(make_record())
    body = {"name": "canary-name", "lora": {"canary-field": 1}, "data": {"system_prompt": "canary-prompt"}}
    client.post("/jobs", json=body)
    client.get("/jobs?metadata[canary-key]=canary-value")
    client.get(f"/jobs/{record.id}")
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("POST", "/jobs", 422),
        ("GET", "/jobs", 200),
        ("GET", f"/jobs/{record.id}", 200),
    ]
    assert all(line["owner"] == "alice" and line["ms"] >= 0 and line["request_id"] for line in lines)
    assert "canary" not in str(lines)
    assert ALICE not in str(lines)


def test_a_lost_server_is_logged_by_name(client: Client, service: FakeJobService, lines: list[Any]) -> None:
    service.fail = Unavailable("Valkey", "timed out")
    client.get("/jobs")
    assert {"event": "dependency.unavailable", "server": "Valkey", "log_level": "warning"} in lines


def test_probes_are_quiet(client: Client, lines: list[Any]) -> None:
    client.get("/healthz")
    assert [line["log_level"] for line in lines] == ["debug"]


def test_the_openapi_document_lists_every_route(client: Client) -> None:
    document = client.get("/schema/openapi.json").json()
    listed = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    served = {
        (method, re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path))
        for route in client.app.routes
        for handler in route.route_handlers
        for method in handler.http_methods
        if method != "OPTIONS" and handler.resolve_include_in_schema()
    }
    assert listed == served
    assert {path for _, path in served} >= {"/jobs", "/jobs/{job_id}/artifacts", "/datasets", "/rewards", "/readyz"}


def test_the_openapi_document_holds_together(client: Client) -> None:
    text = client.get("/schema/openapi.json").text
    document = json.loads(text)
    assert document["openapi"].startswith("3.1")
    assert document["components"]["securitySchemes"]["key"] == {
        "type": "http",
        "scheme": "bearer",
        "description": "A key from `grpo keys create`",
    }
    for reference in set(re.findall(r'"\$ref": "([^"]+)"', text)):
        node = document
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    ids = [operation["operationId"] for operation in operations]
    assert len(set(ids)) == len(ids)
    for path, methods in document["paths"].items():
        for operation in methods.values():
            names = {p["name"] for p in operation["parameters"] if p["in"] == "path"}
            assert names == set(re.findall(r"\{(\w+)\}", path))
            assert '"null"' not in json.dumps(operation["parameters"])


def test_the_openapi_document_documents_errors_as_problems(client: Client) -> None:
    document = client.get("/schema/openapi.json").json()
    for path, methods in document["paths"].items():
        for operation in methods.values():
            public = operation.get("security") == [{}]
            errors = {status: a for status, a in operation["responses"].items() if int(status) >= 400}
            if public:
                assert set(errors) <= {"503"}, path
                continue
            assert {"401", "403", "500", "503"} <= set(errors), path
            for answer in errors.values():
                form = "application/json" if path.startswith("/v1/") else "application/problem+json"
                assert list(answer["content"]) == [form], path


def test_the_body_of_a_submission_is_the_spec_itself(client: Client) -> None:
    document = client.get("/schema/openapi.json").json()
    body = document["paths"]["/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/JobSpec"}
    components = document["components"]["schemas"]
    schema = client.get("/schema/job").json()
    assert components["JobSpec"]["properties"].keys() == schema["properties"].keys()
    assert components["JobSpec"]["additionalProperties"] is False
    for name, section in schema["$defs"].items():
        assert components[name].get("properties", {}).keys() == section.get("properties", {}).keys()


def test_the_page_loads_nothing_from_elsewhere(client: Client) -> None:
    page = client.get("/schema")
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"] == PAGE_POLICY
    assert "http" not in page.text
    sources = re.findall(r'(?:src|spec-url)="([^"]+)"', page.text)
    assert len(sources) == 2
    for source in sources:
        assert client.get(source).status_code == 200
    assert client.get("/schema/redoc.js").headers["content-type"] == "text/javascript; charset=utf-8"


def test_vendored_files_are_those_that_are_listed() -> None:
    listed = dict(re.findall(r"\| `([\w.]+)` \|.*`([0-9a-f]{64})` \|", (STATIC / "VENDORED.md").read_text()))
    assert set(listed) == {path.name for path in STATIC.glob("*.js")}
    for name, digest in listed.items():
        assert hashlib.sha256((STATIC / name).read_bytes()).hexdigest() == digest


def test_importing_the_application_loads_no_torch() -> None:
    heavy = ("torch", "transformers", "trl", "datasets", "pyarrow")
    code = f"import sys, api.app; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_v1_answers_as_the_paths_without_it(client: Client, service: FakeJobService) -> None:
    job = client.post("/v1/jobs", json={}).json()
    assert client.get(f"/v1/jobs/{job['id']}").json() == client.get(f"/jobs/{job['id']}").json()
    assert client.get("/v1/jobs", params={"limit": 1}).json()["data"][0]["id"] == job["id"]
    assert client.options("/v1/jobs").headers["allow"] == client.options("/jobs").headers["allow"]
    for unknown in ("/v1", "/v1/", "/v1/nothing", "/v1/v1/jobs", "/v1jobs"):
        assert client.get(unknown).status_code == 404
    assert client.get("/v1/jobs", headers={"Authorization": "Bearer wrong"}).status_code == 401


def test_v1_has_every_documented_route_and_is_marked_as_a_preview(client: Client) -> None:
    document = client.get("/v1/schema/openapi.json").json()
    first_parts = {path.split("/")[1] for path in document["paths"]} | {"schema"}
    assert first_parts == VERSIONED | {"v1"}, "OpenAI's routes are below /v1 alone"
    assert [server["url"] for server in document["servers"]] == ["/", PREVIEW]
    assert "Preview" in document["servers"][1]["description"]
