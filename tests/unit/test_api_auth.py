from __future__ import annotations

import pytest
from litestar import Litestar
from litestar.handlers import HTTPRouteHandler
from litestar.testing import TestClient

from api.app import create_app
from jobs.auth.api_keys import SCOPES
from tests.unit.fakes import ALICE, READER, FakeJobService, bearer

Client = TestClient[Litestar]
JOB = "/jobs/job-01ARZ3NDEKTSV4RRFFQ69G5FAV"
ROUTES = [
    ("GET", "/jobs"),
    ("POST", "/jobs"),
    ("GET", JOB),
    ("POST", f"{JOB}/cancel"),
    ("GET", f"{JOB}/events"),
    ("GET", f"{JOB}/metrics"),
    ("GET", f"{JOB}/artifacts"),
    ("GET", "/rewards"),
    ("POST", "/datasets"),
    ("GET", "/datasets/ds-01ARZ3NDEKTSV4RRFFQ69G5FAV"),
]
BAD_CREDENTIALS = [
    "",
    "Bearer",
    "Bearer ",
    "Bearer wrong",
    f"Basic {ALICE}",
    ALICE,
    f"Bearer {ALICE} {ALICE}",
    f"Bearer {ALICE}x",
    f"Bearer {ALICE[:-1]}",
    "Bearer " + "a" * 10_000,
    "Bearer \xff\xfe",
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_needs_a_key(client: Client, service: FakeJobService, method: str, path: str) -> None:
    service.fail = AssertionError("the service was asked")
    answer = client.request(method, path, headers={"Authorization": ""})
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert "grpo keys create" in answer.json()["detail"]


@pytest.mark.parametrize("credentials", BAD_CREDENTIALS)
def test_every_bad_key_gets_the_same_answer(client: Client, credentials: str) -> None:
    answer = client.get("/jobs", headers={"Authorization": credentials.encode("latin-1")})  # type: ignore[dict-item]
    reference = client.get("/jobs", headers={"Authorization": "Bearer wrong"})
    assert answer.status_code == 401
    ids = {"request_id": None}
    assert answer.json() | ids == reference.json() | ids


def test_the_scheme_is_read_in_either_case(client: Client) -> None:
    assert client.get("/jobs", headers={"Authorization": f"bearer {ALICE}"}).status_code == 200


@pytest.mark.parametrize(("method", "path"), [("POST", "/jobs"), ("POST", f"{JOB}/cancel"), ("POST", "/datasets")])
def test_a_key_that_may_only_read_changes_nothing(
    client: Client, service: FakeJobService, method: str, path: str
) -> None:
    service.fail = AssertionError("the service was asked")
    # The scope is looked at before the body: this one would be a 413.
    answer = client.request(method, path, content=b"x" * 300_000, headers=bearer(READER))
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert "jobs:read" in answer.json()["detail"]


@pytest.mark.parametrize("path", ["/jobs", "/rewards"])
def test_a_key_that_may_only_read_reads(client: Client, path: str) -> None:
    assert client.get(path, headers=bearer(READER)).status_code == 200


def test_every_route_says_who_may_use_it() -> None:
    app = create_app(FakeJobService())  # type: ignore[arg-type]
    for route in app.routes:
        for handler in getattr(route, "route_handlers", []):
            assert isinstance(handler, HTTPRouteHandler)
            if handler.http_methods == {"OPTIONS"}:
                continue
            public = handler.opt.get("exclude_from_auth", False)
            assert public != ("scope" in handler.opt), f"{route.path}: public, or a scope"
            assert public or handler.opt["scope"] in (None, *SCOPES)


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/schema", "/schema/openapi.json", "/schema/job"])
def test_these_need_no_key(client: Client, path: str) -> None:
    assert client.get(path, headers={"Authorization": ""}).status_code == 200
