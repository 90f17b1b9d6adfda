"""OpenAI's routes of files, jobs and graders, on a service in memory: shapes, pages, warnings, and hostile input."""

from __future__ import annotations

import json
from typing import Any

import pytest
from litestar import Litestar
from litestar.testing import TestClient

from api.openai import requests
from grpo_core.spec import Problem
from jobs.errors import Rejected
from jobs.store.job import JobStatus
from tests.unit.fakes import BOB, READER, FakeJobService, bearer
from tests.unit.test_openai_jobs import EXACT, FULL, HYPERPARAMETERS, JOB, MULTI, changed, hostile

Client = TestClient[Litestar]
JOBS = "/v1/fine_tuning/jobs"


def rows(count: int = 200) -> bytes:
    each = ({"messages": [{"role": "user", "content": f"{n}+1"}], "answer": str(n + 1)} for n in range(count))
    return b"\n".join(json.dumps(one).encode() for one in each)


def upload(client: Client, body: bytes = b"", name: str = "train.jsonl", purpose: str = "fine-tune", **how: Any) -> Any:
    files = {"file": (name, body or rows())}
    return client.post("/v1/files", files=files, data={"purpose": purpose}, **how)


def job(client: Client, **changes: Any) -> dict[str, Any]:
    """The body of a create request with a file that is there."""
    body: dict[str, Any] = {
        "model": "tiny-arithmetic",
        "training_file": upload(client).json()["id"],
        "method": {"type": "reinforcement", "reinforcement": {"grader": EXACT}},
    }
    return {**body, **changes}


def error(answer: Any, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def test_a_file_is_stored_read_listed_and_deleted(client: Client, service: FakeJobService) -> None:
    made = upload(client, purpose="evals").json()
    assert (made["object"], made["purpose"], made["status"]) == ("file", "evals", "processed")
    assert (made["filename"], made["bytes"]) == ("train.jsonl", len(rows()))
    assert client.get(f"/v1/files/{made['id']}").json() == made
    content = client.get(f"/v1/files/{made['id']}/content")
    assert content.content == rows()
    assert content.headers["content-length"] == str(len(rows()))
    assert client.get("/datasets").json()["data"][0]["id"] == made["id"]
    assert client.delete(f"/v1/files/{made['id']}").json() == {"id": made["id"], "object": "file", "deleted": True}
    found = error(client.get(f"/v1/files/{made['id']}"), 404)
    assert (found["param"], found["code"]) == ("id", "not_found")


def test_files_are_listed_in_pages_of_both_orders(client: Client, service: FakeJobService) -> None:
    ids = [upload(client, purpose="evals" if n == 2 else "fine-tune").json()["id"] for n in range(5)]
    for order, expected in (("asc", sorted(ids)), ("desc", sorted(ids, reverse=True))):
        found: list[str] = []
        while True:
            after = {"after": found[-1]} if found else {}
            page = client.get("/v1/files", params={"order": order, "limit": 2, **after}).json()
            assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
            found += [one["id"] for one in page["data"]]
            if not page["has_more"]:
                break
        assert found == expected
    only = client.get("/v1/files", params={"purpose": "evals"}).json()
    assert [one["id"] for one in only["data"]] == [ids[2]]
    none = client.get("/v1/files", params={"purpose": "vision"}).json()
    assert none == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}


def test_a_repeated_upload_is_the_same_file(client: Client, service: FakeJobService) -> None:
    first = upload(client, headers={"x-stainless-retry-count": "0"}).json()["id"]
    assert upload(client, headers={"x-stainless-retry-count": "1"}).json()["id"] == first
    assert upload(client, headers={"x-stainless-retry-count": "0"}).json()["id"] != first
    for strange in ("-1", "x", "9" * 400):
        assert upload(client, headers={"x-stainless-retry-count": strange}).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"not json", "file"),
        (b"", "file"),
        (b"[1]", "file"),
        (b'{"a": NaN}', "file"),
        (b'{"a": [1]}', "file"),
        (b"\xff\xfe", "file"),
        (b"%PDF-1.7\n" + b"\0" * 500, "file"),
    ],
)
def test_a_wrong_file_is_refused(client: Client, service: FakeJobService, body: bytes, param: str) -> None:
    answer = client.post("/v1/files", files={"file": ("x.jsonl", body)}, data={"purpose": "fine-tune"})
    assert error(answer)["param"] == param
    assert not service.uploads


def test_a_wrong_form_is_refused(client: Client, service: FakeJobService) -> None:
    for purpose in ("batch", "assistants", "", "x" * 900):
        assert error(upload(client, purpose=purpose))["param"] == "purpose"
    assert error(upload(client, purpose="x" * 5000))["code"] == "string_above_max_length"
    files = {"file": ("x.jsonl", rows())}
    assert error(client.post("/v1/files", files=files))["param"] == "purpose"
    assert error(client.post("/v1/files", files={"other": ("x", b"y")}, data={"purpose": "evals"}))["param"] == "file"
    expiry = {"purpose": "fine-tune", "expires_after[anchor]": "created_at"}
    assert error(client.post("/v1/files", files=files, data=expiry))["param"] == "expires_after"
    twice = [("file", ("a", rows())), ("file", ("b", rows()))]
    assert error(client.post("/v1/files", files=twice, data={"purpose": "fine-tune"}))["param"] == "file"
    error(client.post("/v1/files", json={"purpose": "fine-tune"}), 415)
    form = {"content-type": "multipart/form-data; boundary=x"}
    for body in (b"", b"--x", b"--y\r\n", b"--x\r\nno header\r\n\r\nz\r\n--x--", b"x" * 5000):
        assert error(client.post("/v1/files", content=body, headers=form))["code"] == "bad_request"
    many = b"".join(b'--x\r\ncontent-disposition: form-data; name="a%d"\r\n\r\nz\r\n' % n for n in range(99))
    error(client.post("/v1/files", content=many + b"--x--", headers=form))
    error(client.post("/v1/files", content=b"", headers={"content-type": "multipart/form-data"}), 415)
    error(client.post("/v1/files", content=b"z", headers={**form, "content-encoding": "gzip"}), 415)
    assert not service.uploads


def test_names_of_files_become_labels(client: Client, service: FakeJobService) -> None:
    for name, label in (("../../etc/passwd", "passwd"), ("C:\\a\\b.jsonl", "b.jsonl"), ("x" * 300, "x" * 100)):
        assert upload(client, name=name).json()["filename"] == label


def test_another_owners_file_is_not_there(client: Client, service: FakeJobService) -> None:
    mine = upload(client).json()["id"]
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        error(client.request(method, f"/v1/files/{mine}{path}", headers=bearer(BOB)), 404)
    assert client.get("/v1/files", headers=bearer(BOB)).json()["data"] == []
    assert error(client.post(JOBS, json=job(client), headers=bearer(BOB)))["param"] == "training_file"
    for strange in ("x", "ds-1", "file-1", f"file-{JOB[4:]}", "..%2f..%2fetc", "%00", "ds-" + "A" * 500):
        error(client.get(f"/v1/files/{strange}"), 404)


def test_keys_and_scopes_count_here_too(client: Client, service: FakeJobService) -> None:
    found = error(client.get(JOBS, headers={"Authorization": "Bearer wrong"}), 401)
    assert found["code"] == "invalid_api_key"
    assert client.get(JOBS, headers=bearer(READER)).status_code == 200
    error(client.post(JOBS, json=job(client), headers=bearer(READER)), 403)
    error(upload(client, headers=bearer(READER)), 403)


def test_a_job_is_what_was_asked_for(client: Client, service: FakeJobService) -> None:
    files = [upload(client).json()["id"], upload(client, rows(40)).json()["id"]]
    asked = {**FULL, "training_file": files[0], "validation_file": files[1], "grpo": {"lora": {"rank": 16}}}
    made = client.post(JOBS, json=asked).json()
    assert made["object"] == "fine_tuning.job"
    assert (made["status"], made["hyperparameters"], made["result_files"]) == ("queued", {}, [])
    for name in ("model", "training_file", "validation_file", "seed", "metadata", "grpo", "method"):
        assert made[name] == asked[name], name
    assert made["user_provided_suffix"] == "math"
    assert {one["code"] for one in made.pop("warnings")} == {"interpreted", "no_worker"}
    assert client.get(f"{JOBS}/{made['id']}").json() == made
    assert client.get(f"/jobs/{made['id']}").json()["spec"]["lora"]["rank"] == 16
    assert client.get(JOBS).json()["data"] == [made]


def test_warnings_are_events_too(client: Client, service: FakeJobService) -> None:
    body = changed(f"{HYPERPARAMETERS}.reasoning_effort", "high", job(client))
    made = client.post(JOBS, json=body).json()
    (event,) = client.get(f"{JOBS}/{made['id']}/events").json()["data"]
    assert (event["level"], event["type"]) == ("warn", "message")
    assert "reasoning_effort" in event["message"]
    assert "reasoning_effort" in made["warnings"][0]["param"]


@pytest.mark.parametrize(("path", "value", "param"), list(hostile()))
def test_a_wrong_field_is_the_param(client: Client, service: FakeJobService, path: str, value: Any, param: str) -> None:
    found = error(client.post(JOBS, json=changed(path, value, job(client))))
    assert found["param"] is None or found["param"].startswith(param.partition("[")[0]), found
    assert found["param"] is not None or value == 10**400
    assert not service.jobs


@pytest.mark.parametrize(
    ("path", "value", "param"),
    [
        ("seed", -1, "seed"),
        ("seed", "x", "seed"),
        ("seed", 2**31, "seed"),
        ("suffix", 5, "suffix"),
        ("suffix", "a\nb", "suffix"),
        ("metadata", {"a": 1}, "metadata.a"),
        ("metadata", "x", "metadata"),
        ("metadata", {str(n): "x" for n in range(17)}, "metadata"),
        ("metadata", {"a": "x" * 600}, "metadata.a"),
        ("model", "../../etc", "model"),
        ("model", "x" * 500, "model"),
        ("model", "gpt-4o-mini", "model"),
        ("model", f"{JOB}:step-5", "model"),
        ("training_file", "file-abc", "training_file"),
        ("validation_file", "file-abc", "validation_file"),
        (f"{HYPERPARAMETERS}.batch_size", 5000, f"{HYPERPARAMETERS}.batch_size"),
        (f"{HYPERPARAMETERS}.n_epochs", 10**9, f"{HYPERPARAMETERS}.n_epochs"),
        (f"{HYPERPARAMETERS}.learning_rate_multiplier", 900_000, f"{HYPERPARAMETERS}.learning_rate_multiplier"),
        ("method.reinforcement.grader.operation", "neq", "method.reinforcement.grader.operation"),
        ("method.reinforcement.grader.type", "other", "method.reinforcement.grader"),
        ("method.reinforcement.grader.surplus", 1, "method.reinforcement.grader.surplus"),
        ("method.reinforcement.grader", {**MULTI, "calculate_output": "a +"}, "method.reinforcement.grader"),
        ("method.reinforcement.grader", {**MULTI, "graders": [5]}, "method.reinforcement.grader"),
        ("method.reinforcement.response_format", {"type": "x"}, "method.reinforcement.response_format.type"),
        ("grpo", {"lora": {"rank": 0}}, "grpo.lora.rank"),
        ("grpo", {"surplus": 1}, "grpo.surplus"),
        ("grpo", {"sampling": {"gradient_accumulation": 5}}, "grpo.sampling.gradient_accumulation"),
        ("grpo", {"data": {"dataset": "other"}}, "grpo.data.dataset"),
    ],
)
def test_a_value_that_the_spec_refuses_is_the_param(
    client: Client, service: FakeJobService, path: str, value: Any, param: str
) -> None:
    found = error(client.post(JOBS, json=changed(path, value, job(client))))
    assert (found["param"] or "").startswith(param), found
    assert not service.jobs


def test_bodies_that_are_no_jobs_are_refused(client: Client, service: FakeJobService) -> None:
    headers = {"content-type": "application/json"}
    for body in (b"", b"{", b"[]", b"null", b"5", b'{"a": NaN}', b'{"a":1,"a":2}', b"[" * 9999):
        error(client.post(JOBS, content=body, headers=headers))
    error(client.post(JOBS, content=b"{}", headers={"content-type": "text/plain"}), 415)
    large = error(client.post(JOBS, json={"model": "x" * 3 * 1024**2}), 413)
    assert large["code"] == "body_too_large"


def test_a_refusal_of_the_service_names_the_field_of_the_request(
    client: Client, service: FakeJobService, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(pointer="/rewards/graders/exact/reference", code="no_such_column", detail="no", remedy="Use one.")

    def refuse(*_: Any) -> Any:
        raise Rejected(problem)

    monkeypatch.setattr(service, "submit_once", refuse)
    found = error(client.post(JOBS, json=job(client)))
    assert (found["param"], found["code"]) == ("method.reinforcement.grader.reference", "no_such_column")
    problem = Problem(pointer="/data/question_column", code="no_such_column", detail="no", remedy="Use one.")
    assert error(client.post(JOBS, json=job(client)))["param"] == "training_file"
    problem = Problem(pointer="/resources/gpus", code="x", detail="no", remedy="Use one.")
    assert error(client.post(JOBS, json=job(client)))["param"] == "grpo.resources.gpus"


def test_a_repeated_create_is_the_same_job(client: Client, service: FakeJobService) -> None:
    body = job(client)
    first = client.post(JOBS, json=body, headers={"x-stainless-retry-count": "0"})
    again = client.post(JOBS, json=body, headers={"x-stainless-retry-count": "1"})
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["idempotent-replayed"] == "true"
    assert client.post(JOBS, json=body, headers={"x-stainless-retry-count": "0"}).json()["id"] != first.json()["id"]
    other = client.post(JOBS, json={**body, "seed": 5}, headers={"x-stainless-retry-count": "1"})
    assert other.json()["id"] != first.json()["id"]
    key = {"Idempotency-Key": "one"}
    ids = {client.post(JOBS, json=body, headers=key).json()["id"] for _ in range(2)}
    assert len(ids) == 1
    error(client.post(JOBS, json={**body, "seed": 6}, headers=key))


def test_a_cpu_is_used_where_there_is_nothing_else(client: Client, service: FakeJobService) -> None:
    service.only_cpu_workers = True
    made = client.post(JOBS, json=job(client)).json()
    assert service.jobs[made["id"]].spec["resources"]["gpus"] == 0
    assert "runs_on_cpu" in {one["code"] for one in made["warnings"]}
    asked = client.post(JOBS, json=job(client, grpo={"resources": {"gpus": 1}})).json()
    assert service.jobs[asked["id"]].spec["resources"]["gpus"] == 1
    service.only_cpu_workers = False
    made = client.post(JOBS, json=job(client)).json()
    assert service.jobs[made["id"]].spec["resources"]["gpus"] == 1


def test_a_job_starts_from_another_ones_model(client: Client, service: FakeJobService) -> None:
    first = client.post(JOBS, json=job(client, grpo={"lora": {"rank": 8}})).json()["id"]
    assert error(client.post(JOBS, json=job(client, model=first)))["code"] == "model_not_found"
    service.add_artifact(first, "adapter_model.safetensors", b"x")
    for model in (first, f"ft:{first}", f"{first}:step-5"):
        made = client.post(JOBS, json=job(client, model=model)).json()
        spec = service.jobs[made["id"]].spec
        assert spec["from_checkpoint"] == {"job": first, "step": 5}
        assert (spec["model"]["name"], spec["lora"]["rank"]) == ("tiny-arithmetic", 8)
        assert made["model"] == f"{first}:step-5"


@pytest.mark.parametrize(
    ("status", "phase", "expected"),
    [
        ("queued", None, "queued"),
        ("running", "preparing", "validating_files"),
        ("running", "training", "running"),
        ("pausing", "training", "pausing"),
        ("paused", None, "paused"),
        ("cancelling", "training", "cancelling"),
        ("cancelled", None, "cancelled"),
        ("failed", None, "failed"),
        ("succeeded", None, "succeeded"),
    ],
)
def test_statuses(client: Client, service: FakeJobService, status: str, phase: str | None, expected: str) -> None:
    made = client.post(JOBS, json=job(client)).json()["id"]
    failure = {"code": "no_signal", "class": "dataset", "message": "No.", "hint": "Do.", "retryable": False}
    changes = {"status": JobStatus(status), "phase": phase, "error": failure if status == "failed" else None}
    service.put(service.jobs[made], step=3, **changes)
    found = client.get(f"{JOBS}/{made}").json()
    assert found["status"] == expected
    assert found["fine_tuned_model"] == (made if status == "succeeded" else None)
    is_over = status in ("cancelled", "failed", "succeeded")
    assert found["result_files"] == ([f"file-{made[4:]}"] if is_over else [])
    if status == "failed":
        assert found["error"] == {"code": "no_signal", "message": "No. Do.", "param": "training_file"}


def test_jobs_are_listed_in_pages_and_by_metadata(client: Client, service: FakeJobService) -> None:
    ids = [client.post(JOBS, json=job(client, metadata={"n": str(n % 2)})).json()["id"] for n in range(5)]
    service.jobs[ids[1]].spec["kind"] = "try"
    expected = sorted((one for one in ids if one != ids[1]), reverse=True)
    found: list[str] = []
    while True:
        after = {"after": found[-1]} if found else {}
        page = client.get(JOBS, params={"limit": 1, **after}).json()
        found += [one["id"] for one in page["data"]]
        if not page["has_more"]:
            break
    assert found == expected
    odd = client.get(JOBS, params={"metadata[n]": "1"}).json()
    assert [one["id"] for one in odd["data"]] == [ids[3]]
    error(client.get(f"{JOBS}/{ids[1]}"), 404)
    assert client.get(JOBS, headers=bearer(BOB)).json()["data"] == []


def test_orders_are_obeyed_or_refused(client: Client, service: FakeJobService) -> None:
    made = client.post(JOBS, json=job(client)).json()["id"]
    assert [client.post(f"{JOBS}/{made}/{order}").json()["status"] for order in ("pause", "resume", "cancel")] == [
        "paused",
        "queued",
        "cancelled",
    ]
    assert error(client.post(f"{JOBS}/{made}/cancel"))["code"] == "conflict"
    for order in ("", "/events", "/checkpoints"):
        assert error(client.get(f"{JOBS}/ftjob-x{order}"), 404)["param"] == "fine_tuning_job_id"
        error(client.get(f"{JOBS}/{made}{order}", headers=bearer(BOB)), 404)
    for order in ("pause", "resume", "cancel"):
        error(client.post(f"{JOBS}/{made}/{order}", headers=bearer(BOB)), 404)


def test_events_are_openais_newest_first(client: Client, service: FakeJobService) -> None:
    made = client.post(JOBS, json=job(client)).json()["id"]
    service.add_event(made, "status", status="running")
    service.add_event(made, "status", phase="training")
    for step in range(1, 46):
        service.add_event(made, "metric", step=step, reward=step / 45, loss=0.1)
        service.add_event(made, "sample", step=step, prompt="secret")
    point = {"step": 45, "questions": 9, "metric": "reward", "value": 0.5}
    service.add_event(made, "evaluation", step=45, stage="during", curve=point)
    service.add_event(made, "checkpoint", step=45, path="x")
    service.add_event(made, "log", message="hello")
    service.add_event(made, "error", message="It failed.", hint="Do this.", code="x")
    found: list[dict[str, Any]] = []
    while True:
        after = {"after": found[-1]["id"]} if found else {}
        page = client.get(f"{JOBS}/{made}/events", params={"limit": 20, **after}).json()
        found += page["data"]
        if not page["has_more"]:
            break
    assert len(found) == len({one["id"] for one in found}) == 51
    assert [one["message"] for one in found[:5]] == [
        "It failed. Do this.",
        "hello",
        f"Checkpoint at step 45: {made}:step-45",
        "Step 45/250: valid_reward_mean=0.5",
        "Step 45/250: train_reward_mean=1",
    ]
    assert [one["level"] for one in found[:2]] == ["error", "info"]
    assert found[3]["data"] == {"step": 45, "valid_reward_mean": 0.5, "questions": 9}
    assert found[4]["data"] == {"step": 45, "train_reward_mean": 1.0, "train_loss": 0.1}
    assert [one["type"] for one in found[2:5]] == ["message", "metrics", "metrics"]
    assert [one["message"] for one in found[-2:]] == ["Phase: training", "The job is running"]
    assert "secret" not in json.dumps(found)


def test_checkpoints_have_names_of_models_and_metrics(client: Client, service: FakeJobService) -> None:
    made = client.post(JOBS, json=job(client)).json()["id"]
    assert client.get(f"{JOBS}/{made}/checkpoints").json()["data"] == []
    service.add_artifact(made, "adapter_model.safetensors", b"x")
    service.add_event(made, "metric", step=5, reward=0.5, eval_metric=0.25)
    (found,) = client.get(f"{JOBS}/{made}/checkpoints").json()["data"]
    assert found["fine_tuned_model_checkpoint"] == found["id"] == f"{made}:step-5"
    assert (found["step_number"], found["fine_tuning_job_id"]) == (5, made)
    assert found["metrics"] == {"step": 5, "train_reward_mean": 0.5, "valid_reward_mean": 0.25}
    assert client.get(f"{JOBS}/{made}/checkpoints", params={"after": found["id"]}).json()["data"] == []


def test_results_are_a_file_of_metrics(client: Client, service: FakeJobService) -> None:
    made = client.post(JOBS, json=job(client)).json()["id"]
    service.add_event(made, "metric", step=1, reward=0.5, loss=0.1)
    error(client.get(f"/v1/files/file-{made[4:]}/content"), 404)
    service.put(service.jobs[made], status=JobStatus.SUCCEEDED, step=1)
    (name,) = client.get(f"{JOBS}/{made}").json()["result_files"]
    content = client.get(f"/v1/files/{name}/content").content.decode()
    header, line = (one.split(",") for one in content.splitlines())
    found = dict(zip(header, line, strict=True))
    assert (found["step"], found["train_reward_mean"], found["train_loss"]) == ("1", "0.5", "0.1")
    described = client.get(f"/v1/files/{name}").json()
    assert (described["purpose"], described["bytes"]) == ("fine-tune-results", len(content.encode()))
    assert error(client.delete(f"/v1/files/{name}"))["param"] == "file_id"
    error(client.get(f"/v1/files/{name}", headers=bearer(BOB)), 404)


@pytest.mark.parametrize(
    ("path", "query", "param"),
    [
        ("/v1/files", {"limit": 0}, "limit"),
        ("/v1/files", {"after": "x"}, "after"),
        ("/v1/files", {"order": "up"}, "order"),
        (JOBS, {"limit": 101}, "limit"),
        (JOBS, {"limit": "x"}, "limit"),
        (JOBS, {"after": "ftjob-1"}, "after"),
        (JOBS, {"surplus": 1}, "surplus"),
        ("events", {"after": "ftevent-0"}, "after"),
        ("events", {"after": f"ftevent-{'9' * 40}"}, "after"),
        ("checkpoints", {"after": "x"}, "after"),
    ],
)
def test_a_wrong_parameter_is_the_param(
    client: Client, service: FakeJobService, path: str, query: dict[str, Any], param: str
) -> None:
    if not path.startswith("/"):
        path = f"{JOBS}/{client.post(JOBS, json=job(client)).json()['id']}/{path}"
    assert error(client.get(path, params=query))["param"] == param


def test_a_model_alone_is_no_pointer() -> None:
    mapped = requests.openai_jobs.to_spec(FULL)
    assert requests._param("", mapped, {}) == "grpo"
    assert requests._param("/evaluation/questions", mapped, {}) == "grpo.evaluation.questions"
    assert requests._param("/sampling/prompts_per_step", mapped, {}) == f"{HYPERPARAMETERS}.batch_size"
