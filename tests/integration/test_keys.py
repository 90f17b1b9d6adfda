"""API keys over HTTP: who may see, create and revoke which, what a key can grant, and how fast a revocation acts."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from api import streams
from grpo_client import GrpoClient, ProblemError
from grpo_client.cli import main
from grpo_core.spec import parse_spec
from jobs.auth.api_keys import KEYS_WRITE, OPERATOR, OWNER_SCOPES, SCOPES, KeyStore
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store import object_keys
from tests.clock import patience
from tests.integration.running import RunningApi, in_environment

HOLDER = [*OWNER_SCOPES, KEYS_WRITE]


@pytest.fixture
def storage(own_bucket: StorageSettings) -> StorageSettings:
    return own_bucket


def client_of(api: RunningApi, owner: str, scopes: list[str] = HOLDER, **more: Any) -> GrpoClient:
    return GrpoClient(api.url, api.service.keys.create(owner, scopes, **more)[0])


def refused(call: Any, *arguments: Any, **named: Any) -> ProblemError:
    with pytest.raises(ProblemError) as raised:
        call(*arguments, **named)
    return raised.value


def test_a_key_is_made_used_seen_and_revoked(api: RunningApi, storage: StorageSettings) -> None:
    until = datetime.now(UTC) + timedelta(days=2)
    with client_of(api, "ann") as ann:
        made = ann.create_key(name="laptop", scopes=["jobs:read"], expires_at=until)
        secret = str(made.key)
        with GrpoClient(api.url, secret) as other:
            assert other.usage().owner == "ann"
        newest = ann.keys(limit=1).data[0]
        assert (newest.id, newest.name, newest.scopes, newest.status) == (made.id, "laptop", ["jobs:read"], "valid")
        assert newest.hint == secret[:9]
        assert newest.created_by == ann.keys().data[1].id
        assert newest.last_used_at is not None
        assert abs((newest.expires_at or until) - until) < timedelta(seconds=1)
        assert secret not in str(ann.keys())
        gone = ann.revoke_key(made.id)
        assert gone.status == "revoked"
        with GrpoClient(api.url, secret) as other:
            assert refused(other.usage).status == 401
        assert ann.keys(limit=1).data[0].status == "revoked", "it stays in the list"
    bodies = [api.service.store.get(item.key) or b"" for item in api.service.store.list("")]
    assert not any(secret.encode() in body for body in bodies), "only its hash is stored"


def test_owners_see_their_own_keys_and_operators_all(api: RunningApi) -> None:
    with client_of(api, "ann") as ann, client_of(api, "bob") as bob, client_of(api, "chief", list(SCOPES)) as chief:
        theirs = ann.create_key()
        assert theirs.id not in [key.id for key in bob.keys().data]
        assert refused(bob.revoke_key, theirs.id).status == 404
        assert refused(bob.revoke_key, "key-01JDZ5T1E4Q8Y7M2N3P4R5S6T7").status == 404
        assert refused(bob.keys, owner="ann").status == refused(bob.keys, owner="*").status == 403
        assert {key.owner for key in chief.keys(owner="*").data} == {"ann", "bob", "chief"}
        assert {key.owner for key in chief.keys(owner="ann").data} == {"ann"}
        first = chief.keys(owner="*", limit=2)
        rest = chief.keys(owner="*", limit=100, cursor=first.next_cursor)
        assert [key.id for key in (*first.data, *rest.data)] == [key.id for key in chief.keys(owner="*").data]
        assert chief.create_key(owner="dan").owner == "dan"
        assert chief.revoke_key(theirs.id).status == "revoked"


def test_a_key_grants_nothing_that_it_does_not_have(api: RunningApi) -> None:
    soon = datetime.now(UTC) + timedelta(hours=1)
    with client_of(api, "ann", ["jobs:read", KEYS_WRITE], expires_at=soon) as ann:
        for named, pointer in (
            ({"scopes": ["jobs:write"], "expires_at": soon}, "/scopes"),
            ({"scopes": [OPERATOR], "expires_at": soon}, "/scopes"),
            ({"scopes": ["jobs:read"], "expires_at": soon, "owner": "bob"}, "/owner"),
            ({"scopes": ["jobs:read"]}, "/expires_at"),
            ({"scopes": ["jobs:read"], "expires_at": soon + timedelta(hours=1)}, "/expires_at"),
        ):
            problem = refused(ann.create_key, **named)
            assert (problem.status, [one["pointer"] for one in problem.errors]) == (422, [pointer])
        assert ann.create_key(scopes=["jobs:read", KEYS_WRITE], expires_at=soon - timedelta(minutes=1)).key
    with client_of(api, "ann", list(OWNER_SCOPES)) as plain:
        assert (
            refused(plain.create_key).status
            == refused(plain.revoke_key, "key-01JDZ5T1E4Q8Y7M2N3P4R5S6T7").status
            == 403
        )
        assert plain.keys().data


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"scope": []}, "/scope"),
        ({"scopes": []}, "/scopes"),
        ({"scopes": "jobs:read"}, "/scopes"),
        ({"scopes": ["jobs:read", "root"]}, "/scopes/1"),
        ({"name": "a\nb"}, "/name"),
        ({"owner": "a b"}, "/owner"),
        ({"expires_at": "tomorrow"}, "/expires_at"),
        ({"expires_at": "2999-01-01T00:00:00"}, "/expires_at"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "/expires_at"),
        ({"expires_at": 7}, "/expires_at"),
    ],
)
def test_a_wrong_field_is_named(api: RunningApi, body: Any, pointer: str) -> None:
    headers = {"Authorization": f"Bearer {api.service.keys.create('ann', HOLDER)[0]}"}
    answer = httpx.post(f"{api.url}/keys", json=body, headers=headers)
    assert answer.status_code == 422
    assert [error["pointer"] for error in answer.json()["errors"]] == [pointer]
    assert answer.json()["errors"][0]["remedy"]


def test_an_owner_has_a_limited_number_of_valid_keys(api: RunningApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.service.MAX_KEYS", 3)
    with client_of(api, "ann") as ann:
        made = [ann.create_key() for _ in range(2)]
        assert refused(ann.create_key).status == 409
        ann.revoke_key(made[0].id)
        ann.create_key()


def test_a_revocation_acts_in_every_process_and_ends_open_streams(
    api: RunningApi, storage: StorageSettings, queue_settings: QueueSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "CHECK_SECONDS", 0.2)
    job = api.service.submit(parse_spec({}), "ann")
    key, record = api.service.keys.create("ann", HOLDER)
    headers = {"Authorization": f"Bearer {key}", "Accept": "text/event-stream"}
    ended = threading.Event()

    def follow(opened: threading.Event) -> None:
        with httpx.stream("GET", f"{api.url}/jobs/{job.id}/events", headers=headers, timeout=patience(30)) as answer:
            assert answer.status_code == 200
            for _ in answer.iter_bytes():
                opened.set()
        ended.set()

    opened = threading.Event()
    reader = threading.Thread(target=follow, args=(opened,))
    reader.start()
    assert opened.wait(patience(10))
    assert not ended.is_set()
    second = JobService(storage, queue_settings)
    assert second.authenticate(key) is not None
    with client_of(api, "ann") as ann:
        ann.revoke_key(record.id)
    assert second.authenticate(key) is None
    assert ended.wait(patience(10)), "the stream ends within seconds"
    reader.join()


def test_keys_of_an_earlier_release_are_listed_without_what_it_did_not_store(api: RunningApi) -> None:
    keys: KeyStore = api.service.keys
    _, record = keys.create("ann", HOLDER)
    client, prefix = api.service.job_store.client, api.service.job_store.prefix
    api.service.store.delete(object_keys.key_facts(record.id))
    client.delete(f"{prefix}:key-facts")
    (listed,) = keys.listed("ann")
    assert (listed.record, listed.hint, listed.created_by) == (record, None, None)
    assert set(json.loads(client.hvals(f"{prefix}:keys")[0])) == {
        *("v", "sha256", "id", "owner", "scopes", "created_at", "expires_at", "revoked_at", "name")
    }, "earlier releases refuse a record with other fields"


def test_a_lost_valkey_loses_no_key_and_revives_none(api: RunningApi) -> None:
    keys: KeyStore = api.service.keys
    good, kept = keys.create("ann", HOLDER)
    bad, gone = keys.create("ann", HOLDER)
    keys.revoke(gone.id)
    client = api.service.job_store.client
    client.delete(*client.keys(f"{api.service.job_store.prefix}:key*"))
    assert [(one.record.id, one.hint) for one in keys.listed("ann")] == [(gone.id, bad[:9]), (kept.id, good[:9])]
    assert (keys.authenticate(good) is not None, keys.authenticate(bad)) == (True, None)


def test_the_command_asks_the_service_without_the_credentials_of_storage(
    api: RunningApi,
    storage: StorageSettings,
    queue_settings: QueueSettings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    key, _ = api.service.keys.create("ann", HOLDER)

    def run(*words: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as raised:
            main(["keys", *words])
        assert raised.value.code == code
        return "\n".join(line for line in capsys.readouterr().out.splitlines() if "[info" not in line)

    for name in in_environment(storage, queue_settings):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GRPO_URL", api.url)
    monkeypatch.setenv("GRPO_API_KEY", key)
    made = json.loads(run("create", "--scope", "jobs:read", "--expires-in-days", "1", "--json"))
    assert (made["owner"], made["scopes"]) == ("ann", ["jobs:read"])
    assert made["id"] in run("list")
    assert "revoked" in run("revoke", made["id"])
    assert "revoked" in run("list")
    run("create", "--owner", "bob", code=2)
    for name, value in in_environment(storage, queue_settings).items():
        monkeypatch.setenv(name, value)
    assert "bob" in run("create", "--owner", "bob"), "who has the service's environment needs no scope"
    run("create", code=2)
