"""Lists and actions over many jobs: search, filters, priorities, one request for several jobs, and operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from litestar.testing import TestClient

from api.app import create_app
from jobs.store.job import JobStatus
from tests.unit.fakes import ALICE, BOB, CHIEF, READER, FakeJobService, bearer

ABSENT = "job-01ARZ3NDEKTSV4RRFFQ69G5FAV"


@pytest.fixture
def service() -> FakeJobService:
    return FakeJobService()


@pytest.fixture
def client(service: Any) -> Iterator[TestClient[Any]]:
    with TestClient(create_app(service)) as client:
        yield client


def submit(client: TestClient[Any], key: str = ALICE, *, priority: str = "", **spec: Any) -> str:
    params = {"priority": priority} if priority else {}
    answer = client.post("/jobs", json=spec, params=params, headers=bearer(key))
    assert answer.status_code == 201, answer.text
    assert answer.json()["priority"] == (priority or "normal")
    return answer.json()["id"]


def listed(client: TestClient[Any], key: str = ALICE, **params: str) -> list[str]:
    answer = client.get("/jobs", params=params, headers=bearer(key))
    assert answer.status_code == 200, answer.text
    return [job["id"] for job in answer.json()["data"]]


def test_jobs_are_found_by_what_is_known_of_them(client: TestClient[Any]) -> None:
    first = submit(client, name="Warm up", metadata={"team": "Reasoning"})
    second = submit(client, name="night", priority="high", model={"name": "org/Other-Model"})
    trial = submit(client, kind="try")
    assert listed(client, search="warm") == listed(client, search="reasoning") == [first]
    assert listed(client, search="other-model") == listed(client, priority="high") == [second]
    assert listed(client, search=second.lower()) == [second]
    assert listed(client, kind="try") == [trial]
    assert listed(client, kind="training") == [second, first]
    assert listed(client, search="warm", priority="high") == []
    refused = client.get("/jobs", params={"priority": "urgent"}, headers=bearer()).json()
    assert (refused["code"], refused["errors"][0]["parameter"]) == ("bad_query", "priority")


def test_an_operator_lists_and_controls_jobs_of_all_owners(client: TestClient[Any]) -> None:
    mine, theirs = submit(client), submit(client, BOB)
    assert listed(client, CHIEF) == []
    assert listed(client, CHIEF, owner="*") == [theirs, mine]
    assert listed(client, CHIEF, owner="bob") == [theirs]
    assert listed(client, owner="alice") == [mine]
    for whose in ("bob", "*"):
        assert client.get("/jobs", params={"owner": whose}, headers=bearer()).json()["code"] == "forbidden"
    assert client.get(f"/jobs/{theirs}", headers=bearer(CHIEF)).json()["owner"] == "bob"
    assert client.get(f"/jobs/{theirs}", headers=bearer(ALICE)).status_code == 404
    assert client.post(f"/jobs/{theirs}/cancel", headers=bearer(CHIEF)).json()["status"] == "cancelled"
    assert client.get(f"/jobs/{ABSENT}", headers=bearer(CHIEF)).status_code == 404


def test_a_priority_is_changed_until_a_worker_has_the_job(client: TestClient[Any], service: FakeJobService) -> None:
    job = submit(client)
    changed = client.patch(f"/jobs/{job}", json={"priority": "high"}, headers=bearer())
    assert (changed.status_code, changed.json()["priority"]) == (200, "high")
    wrong = client.patch(f"/jobs/{job}", json={"priority": "urgent"}, headers=bearer())
    assert (wrong.status_code, wrong.json()["errors"][0]["pointer"]) == (422, "/priority")
    assert client.patch(f"/jobs/{job}", json={"priority": "low"}, headers=bearer(BOB)).status_code == 404
    assert client.patch(f"/jobs/{job}", json={"priority": "low"}, headers=bearer(READER)).status_code == 403
    service.put(service.jobs[job], status=JobStatus.RUNNING)
    assert client.patch(f"/jobs/{job}", json={"priority": "low"}, headers=bearer()).status_code == 409


def test_each_job_of_an_action_has_a_result_of_its_own(client: TestClient[Any], service: FakeJobService) -> None:
    queued, ended, foreign = submit(client), submit(client), submit(client, BOB)
    service.put(service.jobs[ended], status=JobStatus.SUCCEEDED)
    body = {"action": "cancel", "jobs": [queued, ended, foreign, ABSENT, queued]}
    found = client.post("/jobs/actions", json=body, headers=bearer()).json()["data"]
    assert [(each["id"], each["done"], each["code"]) for each in found] == [
        (queued, True, None),
        (ended, False, "conflict"),
        (foreign, False, "not_found"),
        (ABSENT, False, "not_found"),
    ]
    assert found[0]["status"] == "cancelled"
    assert found[2]["detail"].replace(foreign, ABSENT) == found[3]["detail"]
    assert service.jobs[foreign].status is JobStatus.QUEUED
    gone = client.post("/jobs/actions", json={"action": "delete", "jobs": [ended]}, headers=bearer()).json()["data"]
    assert (gone[0]["done"], gone[0]["status"]) == (True, None)
    assert ended not in service.jobs
    body = {"action": "pause", "jobs": [foreign]}
    assert client.post("/jobs/actions", json=body, headers=bearer(CHIEF)).json()["data"][0]["status"] == "paused"


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"action": "stop", "jobs": [ABSENT]}, "/action"),
        ({"action": "cancel", "jobs": []}, "/jobs"),
        ({"action": "cancel", "jobs": [ABSENT] * 101}, "/jobs"),
        ({"action": "cancel", "jobs": [ABSENT, "x"]}, "/jobs/1"),
        ({"action": "cancel", "ids": [ABSENT]}, "/ids"),
    ],
)
def test_a_wrong_action_names_its_field(client: TestClient[Any], body: Any, pointer: str) -> None:
    answer = client.post("/jobs/actions", json=body, headers=bearer())
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, pointer)
