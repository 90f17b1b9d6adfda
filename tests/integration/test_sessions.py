"""Sessions on a real Valkey: they end with their key, with their time, and when they are told to."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest

from jobs.auth.sessions import FAILURES, SessionStore, TooManyAttempts
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings


@pytest.fixture
def service(storage_settings: StorageSettings, queue_settings: QueueSettings) -> JobService:
    return JobService(storage_settings, queue_settings)


def test_a_session_opens_what_its_key_does_until_it_is_closed(service: JobService) -> None:
    key, record = service.keys.create("ann", ["jobs:read"])
    session = service.log_in(key, "10.0.0.1")
    assert session is not None
    assert service.authenticate_session(session.token) == record
    service.log_out(session.token)
    assert service.authenticate_session(session.token) is None
    assert service.authenticate(key) == record, "the key itself goes on"


def test_neither_key_nor_token_is_stored(service: JobService) -> None:
    key, _ = service.keys.create("ann")
    session = service.log_in(key, "10.0.0.1")
    assert session is not None
    client = service.job_store.client
    stored = [*client.scan_iter(f"{service.job_store.prefix}:*")]
    values = [client.get(name) for name in stored if client.type(name) == "string"]
    assert any(":session:" in name for name in stored)
    assert not [text for text in (*stored, *values) if text and (session.token in text or key in text)]


def test_a_revoked_key_ends_its_sessions_at_once(service: JobService) -> None:
    key, record = service.keys.create("ann")
    session = service.log_in(key, "10.0.0.1")
    assert session is not None
    service.keys.revoke(record.id)
    assert service.authenticate_session(session.token) is None
    assert service.log_in(key, "10.0.0.1") is None


def test_a_session_lasts_no_longer_than_it_may_or_its_key_does(service: JobService) -> None:
    key, _ = service.keys.create("ann")
    brief = SessionStore(service.job_store, service.keys, hours=1 / 3600).open(key, "10.0.0.1")
    assert brief is not None
    assert service.authenticate_session(brief.token) is not None
    expiring, _ = service.keys.create("ann", expires_at=datetime.now(UTC) + timedelta(seconds=1))
    last = service.log_in(expiring, "10.0.0.1")
    assert last is not None
    assert last.expires_at < datetime.now(UTC) + timedelta(seconds=2)
    time.sleep(1.2)
    assert service.authenticate_session(brief.token) is None
    assert service.authenticate_session(last.token) is None


def test_wrong_keys_are_counted_by_address_and_right_ones_are_not(service: JobService) -> None:
    key, _ = service.keys.create("ann")
    for _ in range(FAILURES):
        assert service.log_in("grpo_wrong", "10.0.0.2") is None
    with pytest.raises(TooManyAttempts) as refused:
        service.log_in("grpo_wrong", "10.0.0.2")
    assert 0 < refused.value.seconds <= 5
    assert service.log_in("grpo_wrong", "10.0.0.3") is None
    for _ in range(2 * FAILURES):
        assert service.log_in(key, "10.0.0.2") is not None
