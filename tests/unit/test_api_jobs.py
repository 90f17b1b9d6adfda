from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime

import pytest
from litestar import Litestar
from litestar.testing import TestClient

from api.app import create_app
from grpo_core.estimates import estimate
from grpo_core.spec import SPEC_FORMAT, JobSpec, json_schema, parse_spec
from jobs.auth.rate_limit import RateLimited
from jobs.errors import Unavailable
from jobs.lifecycle.admission import InProgress, KeyReused, TooManyJobs
from jobs.store.job import JobStatus
from tests.unit.fakes import BOB, READER, FakeJobService, bearer, make_record

Client = TestClient[Litestar]
JSON = {"Content-Type": "application/json"}
FOREIGN = "job-01ARZ3NDEKTSV4RRFFQ69G5FAV"

LAST_PAGE = {"has_more": False, "next_cursor": None}


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
    assert [warning["code"] for warning in job["warnings"]] == ["no_worker"]
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
        "checkpoint_step": 0,
        "reward": None,
        "best_step": None,
        "stopped": None,
        "started_at": None,
        "finished_at": None,
        "group": None,
        "priority": "normal",
        "error": None,
    }
    assert expected.items() <= job.items()
    assert set(job) == set(expected) | {"id", "spec", "spec_sha256", "created_at", "updated_at", "links", "warnings"}
    assert job["created_at"].endswith("Z")
    assert datetime.fromisoformat(job["created_at"]).tzinfo is not None


def test_an_empty_spec_is_the_recipe(client: Client) -> None:
    assert client.post("/jobs", json={}).json()["spec"] == JobSpec().as_dict()


def test_a_queued_job_says_what_it_waits_for(client: Client, service: FakeJobService) -> None:
    service.workers = 2
    first, second = (service.put(make_record(owner="alice")) for _ in range(2))
    assert client.get(f"/jobs/{second.id}").json()["waiting"] == {
        "queue": second.queue,
        "ahead": 1,
        "workers": 2,
        "reason": "turn",
        "spec_format": 1,
        "workers_spec_format": SPEC_FORMAT,
        "hosts": 1,
        "gpus": 1,
        "hosts_found": None,
    }
    service.put(first, status=JobStatus.RUNNING)
    assert client.get(f"/jobs/{first.id}").json()["waiting"] is None
    assert client.get(f"/jobs/{second.id}").json()["waiting"]["ahead"] == 0


def test_a_dry_run_stores_nothing(client: Client, service: FakeJobService) -> None:
    answer = client.post("/jobs?dry_run=true", json={"training": {"steps": 3}})
    assert answer.status_code == 200
    assert answer.json()["object"] == "dry_run"
    assert answer.json()["spec"]["training"]["steps"] == 3
    assert answer.json()["estimate"] == asdict(estimate(parse_spec({"training": {"steps": 3}})))
    assert answer.json()["warnings"] == [
        {"pointer": "/resources", "code": "no_worker", "message": "No worker is connected."}
    ]
    assert service.jobs == {}


KEYED = {"Idempotency-Key": "3f0c9d0e"}


def test_a_repeated_submission_gets_the_first_answer(client: Client, service: FakeJobService) -> None:
    first = client.post("/jobs", content='{"name": "a", "metadata": {}}', headers={**KEYED, **JSON})
    again = client.post("/jobs", content='{ "metadata":{},"name":"a"}', headers={**KEYED, **JSON})
    assert (first.status_code, again.status_code) == (201, 201)
    assert (first.json(), first.headers["location"]) == (again.json(), again.headers["location"])
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    other = client.post("/jobs", json={"name": "b"}, headers=KEYED)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    theirs = client.post("/jobs", json={"name": "b"}, headers={**KEYED, **bearer(BOB)})
    assert "idempotent-replayed" not in theirs.headers
    assert len(service.jobs) == 2


def test_a_repeated_upload_gets_the_first_answer(client: Client, service: FakeJobService) -> None:
    lines, headers = '{"question": "1", "answer": "1"}\n', {**KEYED, "Content-Type": "application/x-ndjson"}
    first = client.post("/datasets?name=a", content=lines, headers=headers)
    again = client.post("/datasets?name=a", content=lines, headers=headers)
    assert first.json() == again.json()
    assert again.headers["idempotent-replayed"] == "true"
    for url, content in (("/datasets?name=b", lines), ("/datasets?name=a", lines * 2)):
        assert client.post(url, content=content, headers=headers).json()["code"] == "idempotency_key_reused"
    job = client.post("/jobs", json={}, headers=KEYED)
    assert job.status_code == 201, "a key of another route is another key"
    assert len(service.uploads) == 1


@pytest.mark.parametrize("key", ["", " ", "a b", "x" * 256, "ä", "a\tb"])
def test_a_key_that_cannot_be_one_is_refused(client: Client, service: FakeJobService, key: str) -> None:
    answer = client.post("/jobs", json={}, headers={"Idempotency-Key": key.encode()})
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")
    assert "Idempotency-Key" in answer.json()["detail"]
    assert service.jobs == {}


def test_a_key_given_twice_is_refused(client: Client, service: FakeJobService) -> None:
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b"), ("Authorization", bearer()["Authorization"])]
    assert client.post("/jobs", json={}, headers=headers).status_code == 400  # type: ignore[arg-type]
    assert service.jobs == {}


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (InProgress(9.7), 409, "idempotency_in_progress", "1"),
        (KeyReused(), 422, "idempotency_key_reused", None),
        (TooManyJobs("5 jobs are queued."), 429, "too_many_jobs", "30"),
        (RateLimited("This key may send 2.5.", 0.3), 429, "rate_limited", "1"),
        (RateLimited("This key may send 0.1.", 9.2), 429, "rate_limited", "10"),
    ],
)
def test_a_refusal_for_now_says_when_to_come_back(
    client: Client, service: FakeJobService, error: Exception, status: int, code: str, retry_after: str | None
) -> None:
    service.fail = error
    answer = client.post("/jobs", json={}, headers=KEYED)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers.get("retry-after") == retry_after


def test_too_many_requests_are_refused_before_anything_is_read(client: Client, service: FakeJobService) -> None:
    service.limited = RateLimited("This key may send 5.", 0.2)
    for method, path in (("GET", "/jobs"), ("POST", "/jobs"), ("GET", "/rewards"), ("POST", "/datasets")):
        answer = client.request(method, path, content=b"{")
        assert (answer.status_code, answer.json()["code"]) == (429, "rate_limited"), path
    for path in ("/healthz", "/readyz", "/schema/openapi.json"):
        assert client.get(path).status_code == 200, "what needs no key is not counted"


def test_checkpoints_have_links(client: Client, service: FakeJobService) -> None:
    record = service.put(make_record(), status=JobStatus.RUNNING)
    assert client.get(f"/jobs/{record.id}/checkpoints").json() == {"object": "list", "data": [], **LAST_PAGE}
    service.add_artifact(record.id, "adapter_config.json", b"{}")
    (found,) = client.get(f"/jobs/{record.id}/checkpoints").json()["data"]
    assert (found["step"], found["epoch"], found["files"][0]["size"]) == (5, 1, 2)
    assert set(found["files"][0]) == {"path", "key", "size", "sha256", "url", "expires_at"}


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


@pytest.mark.parametrize("rest", ["", "/events", "/metrics", "/checkpoints", "/artifacts"])
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


def test_pause_and_resume_answer_as_documented(client: Client, service: FakeJobService) -> None:
    queued, running = service.put(make_record()), service.put(make_record(), status=JobStatus.RUNNING)
    for record, statuses in ((queued, (200, "paused")), (running, (202, "pausing"))):
        for _ in range(2):
            answer = client.post(f"/jobs/{record.id}/pause")
            assert (answer.status_code, answer.json()["status"]) == statuses
    answer = client.post(f"/jobs/{queued.id}/resume")
    assert (answer.status_code, answer.json()["status"]) == (200, "queued")
    too_early = client.post(f"/jobs/{running.id}/resume")
    assert (too_early.status_code, too_early.json()["code"]) == (409, "conflict")
    assert "Wait until it is paused" in too_early.json()["detail"]
    ended = service.put(make_record(), status=JobStatus.SUCCEEDED)
    assert client.post(f"/jobs/{ended.id}/pause").status_code == 409
    only_reads = client.post(f"/jobs/{queued.id}/pause", headers=bearer(READER))
    assert (only_reads.status_code, only_reads.json()["code"]) == (403, "forbidden")


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
    data = [{"reward": 1.0, "step": 2}, {"reward": 1.5, "step": 3}]
    assert answer == {"object": "list", "data": data, **LAST_PAGE}


def test_artifacts_are_complete_when_the_job_has_ended(client: Client, service: FakeJobService) -> None:
    record = service.put(make_record(), status=JobStatus.RUNNING)
    none = {"object": "list", "data": [], "complete": False, **LAST_PAGE}
    assert client.get(f"/jobs/{record.id}/artifacts").json() == none
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
    checks = {"valkey": "ok", "storage": "no answer"}
    assert answer.json() == {"status": "not_ready", "checks": checks, "warnings": []}
    assert client.get("/healthz", headers=anonymous).status_code == 200


def test_only_a_job_that_has_ended_is_deleted(client: Client) -> None:
    job = client.post("/jobs", json={}, headers=bearer()).json()
    refused = client.delete(f"/jobs/{job['id']}", headers=bearer())
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    assert client.delete(f"/jobs/{job['id']}", headers=bearer(READER)).status_code == 403
    client.post(f"/jobs/{job['id']}/cancel", headers=bearer())
    assert client.delete(f"/jobs/{job['id']}", headers=bearer(BOB)).status_code == 404
    done = client.delete(f"/jobs/{job['id']}", headers=bearer())
    assert (done.status_code, done.content) == (204, b"")
    assert client.get(f"/jobs/{job['id']}", headers=bearer()).status_code == 404


def test_data_sets_are_listed_and_deleted(client: Client) -> None:
    rows = b'{"question": "1+1", "answer": 2}\n'
    headers = {**bearer(), "Content-Type": "application/x-ndjson"}
    ids = [client.post("/datasets", content=rows, headers=headers).json()["id"] for _ in range(3)]
    page = client.get("/datasets?limit=2", headers=bearer()).json()
    assert ([found["id"] for found in page["data"]], page["has_more"]) == ([ids[2], ids[1]], True)
    rest = client.get(f"/datasets?cursor={page['next_cursor']}", headers=bearer()).json()
    assert ([found["id"] for found in rest["data"]], rest["next_cursor"]) == ([ids[0]], None)
    assert client.get("/datasets?cursor=x", headers=bearer()).json()["errors"][0]["parameter"] == "cursor"
    assert client.get("/datasets", headers=bearer(BOB)).json()["data"] == []
    assert client.delete(f"/datasets/{ids[0]}", headers=bearer(BOB)).status_code == 404
    assert client.delete(f"/datasets/{ids[0]}", headers=bearer()).status_code == 204
    assert client.get(f"/datasets/{ids[0]}", headers=bearer()).status_code == 404
