"""Who did what is written down, once and apart from other logs, without a secret; a log that fails stops nobody."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.audit import ADDRESS_LINES
from api.page.session import COOKIE
from grpo_client.cli import main
from jobs.auth.api_keys import SCOPES
from jobs.errors import Misconfigured
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store.audit_log import AuditLog, AuditSettings
from tests.integration.running import RunningApi, in_environment, wait_until
from tests.integration.test_service import CPU

CANARY = "CANARY-77aa"
PAGE = {"X-GRPO-Page": "1"}


def log_to(path: Path, **settings: Any) -> AuditLog:
    return AuditLog.of(AuditSettings.model_validate({"sink": str(path), **settings}))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def api(storage_settings: StorageSettings, queue_settings: QueueSettings, path: Path) -> Iterator[RunningApi]:
    api = RunningApi(JobService(storage_settings, queue_settings), audit=log_to(path), trusted_proxies="127.0.0.1")
    with api.run():
        yield api


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_change_is_told_with_who_and_whence_and_no_secret(api: RunningApi, path: Path) -> None:
    key, record = api.service.keys.create("ann", SCOPES)
    headers = {"Authorization": f"Bearer {key}", "X-Forwarded-For": "203.0.113.7"}
    with httpx.Client(base_url=api.url, headers=headers, timeout=20) as client:
        job = client.post("/jobs", json={**CPU, "name": CANARY, "metadata": {"a": CANARY}}).json()["id"]
        client.post(f"/jobs/{job}/pause")
        client.post(f"/jobs/{job}/resume")
        client.post(f"/jobs/{job}/cancel")
        client.post(f"/jobs/{job}/cancel")
        client.get(f"/jobs/{job}")
        client.get("/jobs", params={"metadata[a]": CANARY})
        client.get(f"/jobs/{job}/artifacts")
        client.get(f"/jobs/{job}/checkpoints")
        rows = b'{"question": "1", "answer": "2"}\n'
        jsonl = {"Content-Type": "application/x-ndjson"}
        dataset = client.post(f"/datasets?name={CANARY}", content=rows, headers=jsonl).json()["id"]
        client.delete(f"/datasets/{dataset}")
        client.delete(f"/jobs/{job}")
        client.delete(f"/jobs/{CANARY}")
        client.post("/jobs", json={"name": 7, CANARY: 1})
    told = lines(path)
    assert [(line["action"], line["result"], line["status"], line["object"]) for line in told] == [
        ("submitJob", "done", 201, job),
        ("pauseJob", "done", 200, job),
        ("resumeJob", "done", 200, job),
        ("cancelJob", "done", 200, job),
        ("cancelJob", "refused", 409, job),
        ("linkArtifacts", "done", 200, job),
        ("linkCheckpoints", "done", 200, job),
        ("uploadDataset", "done", 201, dataset),
        ("deleteDataset", "done", 204, dataset),
        ("deleteJob", "done", 204, job),
        ("deleteJob", "refused", 404, None),
        ("submitJob", "refused", 422, None),
    ]
    for line in told:
        assert (line["v"], line["log"], line["owner"], line["key"]) == (1, "audit", "ann", record.id)
        assert (line["client"], line["request_id"][:4]) == ("203.0.113.7", "req-")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text()
    assert [word for word in (CANARY, key.removeprefix("grpo_"), "Signature") if word in text] == []


def test_wrong_keys_and_log_ins_are_told(api: RunningApi, path: Path) -> None:
    key, record = api.service.keys.create("ann")
    wrong = f"grpo_{CANARY}"
    with httpx.Client(base_url=api.url, timeout=20) as client:
        client.get("/jobs", headers={"Authorization": f"Bearer {wrong}"})
        client.get(f"/{CANARY}", headers={"Authorization": f"Bearer {wrong}"})
        client.post("/session", json={"key": wrong}, headers=PAGE)
        token = client.post("/session", json={"key": key}, headers=PAGE).cookies[COOKIE]
        client.post("/jobs", json=CPU, headers=PAGE)
        client.get("/session")
        client.delete("/session", headers=PAGE)
        client.delete("/session", headers=PAGE)
        client.get("/healthz")
    mine = {"owner": "ann", "key": record.id}
    nobody = {"owner": None, "key": None}
    told = [(line["action"], line["result"], {name: line[name] for name in mine}) for line in lines(path)]
    assert told == [
        ("listJobs", "refused", nobody),
        ("logIn", "refused", nobody),
        ("logIn", "done", mine),
        ("submitJob", "done", mine),
        ("logOut", "done", mine),
        ("logOut", "done", nobody),
    ]
    assert {line["client"] for line in lines(path)} == {"127.0.0.1"}
    assert [word for word in (CANARY, token, key.removeprefix("grpo_")) if word in path.read_text()] == []


def test_strangers_cannot_fill_the_log(api: RunningApi, path: Path) -> None:
    """A file is set aside when it is large, and the oldest removed: lines of strangers would erase those of owners."""
    key, _ = api.service.keys.create("ann")
    with httpx.Client(base_url=api.url, timeout=20) as client:
        for number in range(60):
            wrong = {"Authorization": f"Bearer grpo_{number}", "X-Forwarded-For": f"203.0.113.{number % 2}"}
            assert client.get("/jobs", headers=wrong).status_code == 401
            assert client.post("/session", json=7, headers=wrong | PAGE).status_code == 400
            client.delete("/session", headers=wrong | PAGE)
        client.post("/jobs", json=CPU, headers={"Authorization": f"Bearer {key}", "X-Forwarded-For": "203.0.113.1"})
    told = lines(path)
    assert [line["action"] for line in told].count("submitJob") == 1
    assert len(told) == 2 * ADDRESS_LINES + 1
    api.app.state.request_audit.close()
    assert lines(path)[-1] | {"time": ""} == {
        "v": 1,
        "log": "audit",
        "time": "",
        "action": "leftOut",
        "result": "refused",
        "count": 180 - 2 * ADDRESS_LINES,
    }


def test_requests_are_logged_with_key_and_client(api: RunningApi, capsys: pytest.CaptureFixture[str]) -> None:
    key, record = api.service.keys.create("ann")
    httpx.get(f"{api.url}/jobs", headers={"Authorization": f"Bearer {key}", "X-Forwarded-For": "203.0.113.9"})
    logged: list[str] = []

    def is_logged() -> bool:  # a moment after the answer
        logged.append(capsys.readouterr().out)
        return record.id in "".join(logged)

    wait_until(is_logged)
    assert "203.0.113.9" in "".join(logged)


def test_a_log_that_cannot_be_written_stops_no_request_and_is_counted(
    storage_settings: StorageSettings, queue_settings: QueueSettings
) -> None:
    audit = log_to(Path("/dev/full"), megabytes=0)
    api = RunningApi(JobService(storage_settings, queue_settings), audit=audit)
    with api.run():
        key, _ = api.service.keys.create("ann", SCOPES)
        with httpx.Client(base_url=api.url, headers={"Authorization": f"Bearer {key}"}, timeout=20) as client:
            assert client.get("/metrics").text.count("grpo_audit_failures_total 0.0") == 1
            assert [client.post("/jobs", json=CPU).status_code for _ in range(2)] == [201, 201]
            assert client.get("/metrics").text.count("grpo_audit_failures_total 2.0") == 1
    assert audit.failures == 2


def test_a_file_is_set_aside_when_it_is_large_and_found_again_when_moved(tmp_path: Path) -> None:
    rotating = log_to(tmp_path / "a.jsonl", megabytes=1, files=2)
    for number in range(12_000):
        rotating.write("deleteJob", "done", owner="o" * 90, object="x" * 90, number=number)
    rotating.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.1", "a.jsonl.2"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 3_000_000
    assert lines(tmp_path / "a.jsonl")[-1]["number"] == 11_999
    watched = log_to(tmp_path / "b.jsonl", megabytes=0)
    watched.write("deleteJob", "done")
    (tmp_path / "b.jsonl").rename(tmp_path / "b.old")
    watched.write("deleteJob", "refused")
    watched.close()
    assert [line["result"] for line in lines(tmp_path / "b.jsonl")] == ["refused"]


def test_a_log_that_cannot_be_opened_stops_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Misconfigured, match=r"GRPO_AUDIT_LOG is .*no.such.* Name a file"):
        log_to(tmp_path / "no" / "such" / "folder.jsonl")
    AuditLog.of(AuditSettings.model_validate({"sink": "off"})).write("deleteJob", "done")
    AuditLog.of(AuditSettings.model_validate({})).write("deleteJob", "done")
    assert json.loads(capsys.readouterr().out)["action"] == "deleteJob"


def test_keys_that_are_made_and_revoked_are_told(
    storage_settings: StorageSettings,
    queue_settings: QueueSettings,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in in_environment(storage_settings, queue_settings).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GRPO_AUDIT_LOG", str(path))
    JobService(storage_settings, queue_settings).check_storage()

    def run(*words: str) -> tuple[str, str]:
        with pytest.raises(SystemExit):
            main(["keys", *words])
        captured = capsys.readouterr()
        return captured.out, captured.err

    # A container's user may have no name.
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    made = json.loads(run("create", "--owner", "ann", "--json")[0])
    run("revoke", made["id"])
    assert [(line["action"], line["owner"], line["object"], line["client"]) for line in lines(path)] == [
        ("createKey", "ann", made["id"], "local"),
        ("revokeKey", "ann", made["id"], "local"),
    ]
    assert {line["user"] for line in lines(path)} == {"54321"}
    assert made["key"].removeprefix("grpo_") not in path.read_text()
    monkeypatch.setenv("GRPO_AUDIT_LOG", "stdout")
    out, err = run("create", "--owner", "ann", "--json")
    assert json.loads(out)["owner"] == "ann", "nothing but the answer"
    assert json.loads(err)["action"] == "createKey"
