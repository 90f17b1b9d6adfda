"""The routes of the fleet: who sees what of a worker, and who may drain it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from litestar.testing import TestClient

from api.app import create_app
from jobs.read.fleet import FleetWorker, WorkerState
from jobs.store.job_store import HeldJob
from jobs.store.workers import WorkerInfo
from tests.unit.fakes import ALICE, BOB, CHIEF, FakeJobService, bearer

JOB = HeldJob(
    id="job-01ARZ3NDEKTSV4RRFFQ69G5FAV",
    worker="w1",
    owner="alice",
    status="running",
    phase="training",
    step=3,
    total_steps=9,
    name="secret",
)


def worker(name: str, job: HeldJob | None = None) -> FleetWorker:
    info = WorkerInfo(name=name, queues=["grpo.gpu1"], device="1 × H200", gpus=["H200"], host="box", drain="")
    state = WorkerState.BUSY if job else WorkerState.IDLE
    return FleetWorker(name=name, state=state, info=info, seen_at=datetime.now(UTC), drain=None, job=job)


@pytest.fixture
def service() -> FakeJobService:
    fake = FakeJobService()
    fake.fleet = {each.name: each for each in (worker("w1", JOB), worker("w2"), worker("w3"))}
    return fake


@pytest.fixture
def client(service: Any) -> Iterator[TestClient[Any]]:
    with TestClient(create_app(service)) as client:
        yield client


def test_whose_job_a_worker_has_is_shown_to_that_owner_and_to_operators(client: TestClient[Any]) -> None:
    def job(key: str) -> dict[str, Any]:
        return client.get("/workers/w1", headers=bearer(key)).json()["job"]

    assert job(ALICE) == job(CHIEF)
    assert job(ALICE)["id"] == JOB.id
    hidden = job(BOB)
    assert (hidden["id"], hidden["owner"], hidden["name"]) == (None, None, None)
    assert (hidden["phase"], hidden["step"], hidden["total_steps"]) == ("training", 3, 9)
    assert "secret" not in client.get("/workers", headers=bearer(BOB)).text


def test_the_list_has_pages(client: TestClient[Any]) -> None:
    first = client.get("/v1/workers", params={"limit": 2}, headers=bearer()).json()
    assert [each["name"] for each in first["data"]] == ["w1", "w2"]
    assert first["has_more"]
    rest = client.get("/workers", params={"limit": 2, "cursor": first["next_cursor"]}, headers=bearer()).json()
    assert [each["name"] for each in rest["data"]] == ["w3"]
    assert (rest["has_more"], rest["next_cursor"]) == (False, None)


def test_only_an_operator_drains(client: TestClient[Any], service: FakeJobService) -> None:
    for send in (client.post, client.delete):
        answer = send("/workers/w1/drain", headers=bearer(ALICE))
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
        assert "operator" in answer.json()["detail"]
    assert service.fleet["w1"].drain is None
    drained = client.post("/workers/w1/drain", json={"mode": "checkpoint"}, headers=bearer(CHIEF)).json()
    assert (drained["drain"]["mode"], drained["drain"]["by"], drained["drain"]["empty"]) == (
        "checkpoint",
        "chief",
        False,
    )
    assert client.post("/workers/w1/drain", headers=bearer(CHIEF)).json()["drain"]["mode"] == "finish"
    assert client.delete("/workers/w1/drain", headers=bearer(CHIEF)).json()["drain"] is None
    assert client.post("/workers/w9/drain", headers=bearer(CHIEF)).status_code == 404


@pytest.mark.parametrize(
    ("body", "pointer"), [({"mode": "now"}, "/mode"), ({"mode": ["finish"]}, "/mode"), ({"mod": 1}, "/mod"), ([], "")]
)
def test_a_wrong_order_names_its_field(client: TestClient[Any], body: Any, pointer: str) -> None:
    answer = client.post("/workers/w1/drain", json=body, headers=bearer(CHIEF))
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_body")
    assert answer.json()["errors"][0]["pointer"] == pointer
    assert answer.json()["errors"][0]["remedy"]
