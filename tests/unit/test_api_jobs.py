from __future__ import annotations

from datetime import UTC, datetime

import pytest
from litestar import Litestar
from litestar.testing import TestClient

from api.app import create_app
from grpo_core.spec import JobSpec, json_schema
from jobs.errors import Unavailable
from jobs.record import JobStatus
from tests.unit.fakes import BOB, FakeJobService, bearer, make_record

Client = TestClient[Litestar]
FOREIGN = "job-01ARZ3NDEKTSV4RRFFQ69G5FAV"


def test_the_lifespan_starts_and_closes_the_service() -> None:
    service = FakeJobService()
    with TestClient(create_app(service)):
        assert service.running
    assert not service.running


def test_submit_stores_the_resolved_job_and_says_where_it_is(client: Client, service: FakeJobService) -> None:
    answer = client.post("/jobs", json={"name": "first", "metadata": {"team": "a"}, "training": {"steps": 20}})
    job = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/jobs/{job['id']}" == job["links"]["self"]
    assert job["spec"] == service.jobs[job["id"]].spec
    assert job["spec_sha256"] == JobSpec.model_validate(job["spec"] | {"name": "first"}).digest()
    expected = {
        "object": "job",
        "owner": "alice",
        "status": "queued",
        "phase": None,
        "name": "first",
        "metadata": {"team": "a"},
        "epoch": 0,
        "attempts": 0,
        "step": 0,
        "total_steps": 20,
        "progress": 0.0,
        "reward": None,
        "started_at": None,
        "finished_at": None,
        "error": None,
    }
    assert expected.items() <= job.items()
    assert set(job) == set(expected) | {"id", "spec", "spec_sha256", "created_at", "updated_at", "links"}
    assert job["created_at"].endswith("Z")
    assert datetime.fromisoformat(job["created_at"]).tzinfo is not None


def test_an_empty_spec_is_the_recipe(client: Client) -> None:
    assert client.post("/jobs", json={}).json()["spec"] == JobSpec().as_dict()


def test_a_dry_run_stores_nothing(client: Client, service: FakeJobService) -> None:
    answer = client.post("/jobs?dry_run=true", json={"training": {"steps": 3}})
    assert answer.status_code == 200
    assert answer.json()["object"] == "dry_run"
    assert answer.json()["spec"]["training"]["steps"] == 3
    assert answer.json()["warnings"] == [
        {"pointer": "/resources", "code": "no_worker", "message": "No worker is connected."}
    ]
    assert service.jobs == {}


def test_a_mistyped_dry_run_is_not_a_submission(client: Client, service: FakeJobService) -> None:
    answer = client.post("/jobs?dryrun=true", json={})
    assert answer.status_code == 400
    assert answer.json()["errors"][0]["remedy"] == "Did you mean dry_run?"
    assert service.jobs == {}


@pytest.mark.parametrize("dry_run", ["false", "true"])
def test_what_only_the_service_can_refuse_names_its_field(client: Client, dry_run: str) -> None:
    spec = {"data": {"source": "upload", "dataset": "ds-01ARZ3NDEKTSV4RRFFQ69G5FAV"}}
    answer = client.post(f"/jobs?dry_run={dry_run}", json=spec)
    assert answer.status_code == 422
    assert answer.json()["code"] == "rejected"
    assert answer.json()["errors"][0]["pointer"] == "/data/dataset"


def test_many_wrong_fields_are_one_answer(client: Client, service: FakeJobService) -> None:
    spec = {
        "training": {"steps": 0},
        "lora": {"rnk": 7},
        "sampling": {"generations": 1, "temperature": "hot"},
        "optimizer": {"learning_rate": -1},
        "data": {"question_column": "x", "answer_column": "x"},
        "surprise": True,
    }
    answer = client.post("/jobs", json=spec)
    document = answer.json()
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert document["code"] == "invalid_spec"
    assert {error["pointer"] for error in document["errors"]} >= {
        "/training/steps",
        "/lora/rnk",
        "/sampling/generations",
        "/sampling/temperature",
        "/optimizer/learning_rate",
        "/data/answer_column",
        "/surprise",
    }
    assert all(error["remedy"] and error["detail"] and error["code"] for error in document["errors"])
    assert service.jobs == {}


def test_get_shows_progress_and_failure(client: Client, service: FakeJobService) -> None:
    error = {"code": "cuda_oom", "class": "oom", "message": "out of memory", "hint": "Lower it.", "retryable": False}
    record = service.put(make_record(), status=JobStatus.RUNNING, phase="training", step=100, reward=1.25)
    job = client.get(f"/jobs/{record.id}").json()
    assert (job["progress"], job["phase"], job["reward"]) == (0.4, "training", 1.25)
    service.put(record, status=JobStatus.FAILED, error=error, finished_at=datetime.now(UTC))
    assert client.get(f"/jobs/{record.id}").json()["error"] == error


@pytest.mark.parametrize("rest", ["", "/events", "/metrics", "/artifacts"])
def test_jobs_of_others_are_not_there(client: Client, service: FakeJobService, rest: str) -> None:
    theirs = service.put(make_record(owner="bob"))
    foreign = client.get(f"/jobs/{theirs.id}{rest}")
    missing = client.get(f"/jobs/{FOREIGN}{rest}")
    assert foreign.status_code == missing.status_code == 404
    assert foreign.json()["code"] == missing.json()["code"] == "not_found"
    assert foreign.json()["detail"].replace(theirs.id, "") == missing.json()["detail"].replace(FOREIGN, "")


def test_jobs_of_others_cannot_be_cancelled(client: Client, service: FakeJobService) -> None:
    theirs = service.put(make_record(owner="bob"))
    assert client.post(f"/jobs/{theirs.id}/cancel").status_code == 404
    assert service.jobs[theirs.id].status is JobStatus.QUEUED


@pytest.mark.parametrize(
    "job_id", ["x", "job-1", FOREIGN.lower(), "%2e%2e", "job-%00", "ds-01ARZ3NDEKTSV4RRFFQ69G5FAV"]
)
def test_what_cannot_be_an_id_never_reaches_the_service(client: Client, service: FakeJobService, job_id: str) -> None:
    service.fail = AssertionError("the service was asked")
    assert client.get(f"/jobs/{job_id}").status_code == 404


def test_cancel_is_done_for_a_queued_job_and_under_way_for_a_running_one(
    client: Client, service: FakeJobService
) -> None:
    queued, running = service.put(make_record()), service.put(make_record(), status=JobStatus.RUNNING)
    done = client.post(f"/jobs/{queued.id}/cancel")
    assert (done.status_code, done.json()["status"]) == (200, "cancelled")
    told = client.post(f"/jobs/{running.id}/cancel")
    assert (told.status_code, told.json()["status"]) == (202, "cancelling")
    again = client.post(f"/jobs/{queued.id}/cancel")
    assert (again.status_code, again.json()["code"]) == (409, "conflict")


def test_list_pages_through_everything_once(client: Client, service: FakeJobService) -> None:
    mine = [service.put(make_record()).id for _ in range(7)]
    service.put(make_record(owner="bob"))
    seen: list[str] = []
    query = "limit=3"
    while True:
        page = client.get(f"/jobs?{query}").json()
        seen += [job["id"] for job in page["data"]]
        assert page["has_more"] is (page["next_cursor"] is not None)
        if not page["has_more"]:
            break
        query = f"limit=3&cursor={page['next_cursor']}"
    assert seen == sorted(mine, reverse=True)


def test_list_filters_by_status_and_metadata(client: Client, service: FakeJobService) -> None:
    wanted = service.put(make_record(metadata={"team": "a b", "run": "1"}), status=JobStatus.FAILED)
    service.put(make_record(metadata={"team": "a b"}))
    service.put(make_record(), status=JobStatus.FAILED)
    page = client.get("/jobs?status=failed&metadata[team]=a%20b&metadata[run]=1").json()
    assert [job["id"] for job in page["data"]] == [wanted.id]


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=ten", "limit"),
        ("limit=", "limit"),
        ("limit=5&limit=6", "limit"),
        ("limit=null", "limit"),
        ("limit=" + "9" * 5000, "limit"),
        ("status=done", "status"),
        ("status=null", "status"),
        ("status=", "status"),
        ("cursor=../x", "cursor"),
        ("cursor=", "cursor"),
        ("offset=3", "offset"),
        ("metadata[]=x", "metadata[]"),
        ("metadata=x", "metadata"),
        ("metadata[a]=1&metadata[a]=2", "metadata[a]"),
        ("%FF=1", "\ufffd"),
    ],
)
def test_a_bad_query_is_named_with_its_remedy(client: Client, query: str, name: str) -> None:
    answer = client.get(f"/jobs?{query}")
    assert answer.status_code == 400
    document = answer.json()
    assert document["code"] == "bad_query"
    assert [error["parameter"] for error in document["errors"]] == [name]
    assert document["errors"][0]["remedy"].endswith((".", "?"))


def test_all_bad_parameters_are_named_at_once(client: Client) -> None:
    errors = client.get("/jobs?limit=0&status=x").json()["errors"]
    assert [error["parameter"] for error in errors] == ["limit", "status"]
    assert errors[0]["remedy"] == "Give a whole number from 1 to 100."
    assert "cancelling" in errors[1]["remedy"]


def test_events_are_read_from_where_one_was(client: Client, service: FakeJobService) -> None:
    record = service.put(make_record())
    service.add_event(record.id, "status", phase="training")
    for step in range(1, 4):
        service.add_event(record.id, "metric", step=step, reward=step / 2)
    first = client.get(f"/jobs/{record.id}/events?limit=2").json()
    assert [event["seq"] for event in first["data"]] == [1, 2]
    assert set(first["data"][0]) == {"v", "seq", "epoch", "type", "time", "step", "data"}
    rest = client.get(f"/jobs/{record.id}/events?after={first['next_after']}").json()
    assert [event["seq"] for event in rest["data"]] == [3, 4]
    nothing = client.get(f"/jobs/{record.id}/events?after={rest['next_after']}").json()
    assert (nothing["data"], nothing["next_after"]) == ([], 4)


def test_events_are_filtered_by_type(client: Client, service: FakeJobService) -> None:
    record = service.put(make_record())
    for kind in ("status", "metric", "error"):
        service.add_event(record.id, kind)
    url = f"/jobs/{record.id}/events"
    assert [e["type"] for e in client.get(f"{url}?type=metric").json()["data"]] == ["metric"]
    assert [e["type"] for e in client.get(f"{url}?type=metric&type=error").json()["data"]] == ["metric", "error"]
    assert client.get(f"{url}?type=metrics").json()["errors"][0]["parameter"] == "type"


def test_metrics_are_a_list(client: Client, service: FakeJobService) -> None:
    record = service.put(make_record())
    for step in (1, 2, 3):
        service.add_event(record.id, "metric", step=step, reward=step / 2)
    answer = client.get(f"/jobs/{record.id}/metrics?after_step=1").json()
    assert answer == {"object": "list", "data": [{"reward": 1.0, "step": 2}, {"reward": 1.5, "step": 3}]}


def test_artifacts_are_complete_when_the_job_has_ended(client: Client, service: FakeJobService) -> None:
    record = service.put(make_record(), status=JobStatus.RUNNING)
    assert client.get(f"/jobs/{record.id}/artifacts").json() == {"object": "list", "data": [], "complete": False}
    artifact = service.add_artifact(record.id, "adapter/adapter_config.json", b"{}")
    service.put(record, status=JobStatus.SUCCEEDED)
    answer = client.get(f"/jobs/{record.id}/artifacts").json()
    assert answer["complete"]
    assert answer["data"][0] | {"expires_at": None} == {
        "path": artifact.path,
        "key": artifact.key,
        "size": 2,
        "sha256": artifact.sha256,
        "url": artifact.url,
        "expires_at": None,
    }


def test_a_lost_server_is_a_503_that_says_to_come_back(client: Client, service: FakeJobService) -> None:
    service.fail = Unavailable("Valkey", "connection refused at 10.0.0.7")
    answer = client.post("/jobs", json={})
    assert answer.status_code == 503
    assert answer.json()["code"] == "unavailable"
    assert int(answer.headers["retry-after"]) > 0
    assert "10.0.0.7" not in answer.text


def test_the_schema_of_a_spec_is_served_to_anyone(client: Client) -> None:
    answer = client.get("/schema/job", headers={"Authorization": ""})
    assert answer.json() == json_schema()


def test_rewards_are_listed_in_both_modes(client: Client) -> None:
    rewards = client.get("/rewards").json()["data"]
    assert {reward["mode"] for reward in rewards} == {"fixed", "published"}
    only = client.get("/rewards?mode=published", headers=bearer(BOB)).json()["data"]
    assert [reward["name"] for reward in only] == [
        "correctness",
        "integer",
        "strict_format",
        "soft_format",
        "xml_count",
    ]


def test_probes_need_no_key(client: Client, service: FakeJobService) -> None:
    anonymous = {"Authorization": ""}
    assert client.get("/healthz?probe=1", headers=anonymous).json() == {"status": "ok"}
    assert client.get("/readyz", headers=anonymous).json()["status"] == "ready"
    service.verdicts["storage"] = "connection refused at 10.0.0.7"
    answer = client.get("/readyz", headers=anonymous)
    assert answer.status_code == 503
    assert answer.json() == {"status": "not_ready", "checks": {"valkey": "ok", "storage": "no answer"}}
    assert client.get("/healthz", headers=anonymous).status_code == 200
