"""The routes below /groups, and the comparison of any number of jobs."""

from __future__ import annotations

from typing import Any

from litestar import Litestar
from litestar.testing import TestClient

from tests.unit.fakes import ALICE, BOB, READER, FakeJobService, bearer

Client = TestClient[Litestar]
SWEEP = {"spec": {"training": {"steps": 20}}, "grid": {"lr": [1e-5, 3e-5]}, "repeat": 2}


def submit(client: Client, body: Any = SWEEP, key: str = ALICE, **headers: str) -> Any:
    return client.post("/groups", json=body, headers={**bearer(key), **headers})


def test_a_group_is_submitted_read_and_cancelled(client: Client, service: FakeJobService) -> None:
    answer = submit(client)
    made = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (201, f"/groups/{made['id']}")
    assert [job["group"] for job in made["data"]] == [made["id"]] * 4
    assert made["warnings"][0]["code"] == "no_worker"
    table = client.get(f"/groups/{made['id']}", headers=bearer(READER)).json()
    assert table["fields"] == ["optimizer.learning_rate"]
    assert [[job["id"] for job in row["jobs"]] for row in table["rows"]] == [
        [job["id"] for job in made["data"][:2]],
        [job["id"] for job in made["data"][2:]],
    ]
    assert table["cautions"] == ["4 of 4 have not ended."]
    listed = client.get("/jobs", params={"group": made["id"], "limit": 3}, headers=bearer(ALICE)).json()
    assert [job["id"] for job in listed["data"]] == [job["id"] for job in made["data"][:0:-1]]
    assert listed["has_more"]
    cancelled = client.post(f"/groups/{made['id']}/cancel", headers=bearer(ALICE)).json()
    assert [job["status"] for job in cancelled["data"]] == ["cancelled"] * 4


def test_a_key_makes_it_one_group(client: Client, service: FakeJobService) -> None:
    first = submit(client, **{"Idempotency-Key": "k"})
    again = submit(client, **{"Idempotency-Key": "k"})
    assert again.json() == first.json()
    assert again.headers["idempotent-replayed"] == "true"
    assert len(service.jobs) == 4
    other = submit(client, {**SWEEP, "repeat": 3}, **{"Idempotency-Key": "k"})
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


def test_what_is_refused(client: Client, service: FakeJobService) -> None:
    bad = submit(client, {"spec": {"lora": {"rnak": 1}}, "grid": {"lr": [1e-5]}})
    assert (bad.status_code, bad.json()["errors"][0]["pointer"]) == (422, "/spec/lora/rnak")
    assert submit(client, key=READER).status_code == 403
    made = submit(client).json()
    for path in (f"/groups/{made['id']}", "/groups/group-1", "/groups/job-01ARZ3NDEKTSV4RRFFQ69G5FAV"):
        assert client.get(path, headers=bearer(BOB)).status_code == 404
        assert client.post(f"{path}/cancel", headers=bearer(BOB)).status_code == 404
    assert client.get("/jobs", params={"group": "x"}, headers=bearer(ALICE)).json()["code"] == "bad_query"
    job = made["data"][0]["id"]
    assert client.get("/comparison", params={"job": [job]}, headers=bearer(BOB)).status_code == 404
    assert client.get("/comparison", params={"job": ["x"]}, headers=bearer(ALICE)).status_code == 400
    assert client.get("/comparison", headers=bearer(ALICE)).status_code == 400


def test_any_jobs_are_compared(client: Client, service: FakeJobService) -> None:
    made = submit(client).json()["data"]
    ids = [made[0]["id"], made[3]["id"], made[1]["id"]]
    table = client.get("/comparison", params={"job": ids}, headers=bearer(ALICE)).json()
    assert table["object"] == "comparison"
    assert [[job["id"] for job in row["jobs"]] for row in table["rows"]] == [[ids[0], ids[2]], [ids[1]]]
