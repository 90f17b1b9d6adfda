"""Webhooks on real servers: what a receiver gets, and that it gets it whatever dies in between."""

from __future__ import annotations

import http.server
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from openai import OpenAI
from openai.types.webhooks import FineTuningJobSucceededWebhookEvent
from standardwebhooks import Webhook as Verifier
from standardwebhooks import WebhookVerificationError

from api.cli import ALL
from deploy.local.ports import pick_port
from grpo_client.cli import main
from grpo_core.spec import parse_spec
from jobs.errors import NotFound, Rejected
from jobs.lifecycle.outcomes import apply_outcome, write_outcome
from jobs.lifecycle.rebuild import Rebuild
from jobs.sealing import SealingKeys, SealingSettings
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store import event_log, object_keys
from jobs.store.job import JobStatus
from jobs.store.job_store import JobEvent
from jobs.webhooks import signature
from jobs.webhooks.courier import RECOVERED, UNREADABLE
from jobs.webhooks.deliveries import Delivery
from jobs.webhooks.events import WebhookEvent
from jobs.webhooks.settings import WebhookSettings
from tests.integration.running import RunningApi, wait_until

CPU = {"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}}
SPEC = parse_spec({**CPU, "name": "sums", "metadata": {"team": "a"}})
ENDS = ["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[(debug|info|warning|error) *\] ")
KEY, NEWER = "k" * 32, "n" * 40
NAME, NEWER_NAME = (SealingKeys(SealingSettings.model_validate({"keys": key})).names[0] for key in (KEY, NEWER))
WAITS = [0.05, 0.05, 0.05, 0.05]


class Receiver:
    """A receiver on loopback that answers with the statuses it is told, then with 204."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.statuses: list[int] = []
        self.location = ""
        self.hang = threading.Event()
        self.hang.set()
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
                receiver.hang.wait()
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 204)
                if receiver.location:
                    self.send_header("Location", receiver.location)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}/hooks?team=a"

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.got]

    def types(self) -> list[str]:
        return [event["type"] for event in self.events]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with running_receiver() as found:
        yield found


@contextmanager
def running_receiver() -> Iterator[Receiver]:
    found = Receiver()
    thread = threading.Thread(target=found.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield found
    found.hang.set()
    found.server.shutdown()
    thread.join()
    found.server.server_close()


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.webhooks.courier.INTERVAL_SECONDS", 0.05)


@pytest.fixture
def owner() -> str:
    return f"ann-{uuid.uuid4().hex[:12]}"


Serve = Callable[..., JobService]


@pytest.fixture
def serve(storage_settings: StorageSettings, queue_settings: QueueSettings, owner: str) -> Iterator[Serve]:
    """Makes services on the same servers, started unless asked not to be."""
    made: list[JobService] = []

    def make(
        *, start: bool = True, sealing: str = "", storage: StorageSettings = storage_settings, **settings: Any
    ) -> JobService:
        hooks = WebhookSettings.model_validate({"hosts": ["127.0.0.1"], "waits": WAITS, **settings})
        keys = SealingSettings.model_validate({"keys": sealing})
        service = JobService(storage, queue_settings, webhooks=hooks, sealing=keys)
        service.check_storage()
        made.append(service)
        if start:
            service.start()
        return service

    yield make
    for webhook in made[0].webhooks.all(owner):
        made[0].webhooks.delete(owner, webhook.id)
    for service in made:
        service.close()


def finish(service: JobService, job_id: str) -> None:
    """End a job as a worker does: outcome first, then the record."""
    epoch = service.write_once.allocate_epoch(job_id, "w", event_log.now_iso())
    assert epoch
    assert service.job_store.claim(job_id, epoch=epoch, worker="w", lease_seconds=600)
    outcome = write_outcome(service.write_once, job_id, "succeeded", by="w")
    apply_outcome(service.job_store, job_id, outcome)


def only(service: JobService, owner: str, webhook_id: str) -> Delivery:
    """The one delivery, once it was attempted."""
    wait_until(lambda: any(one.attempts for one in service.webhooks.deliveries(owner, webhook_id, 10)))
    (delivery,) = service.webhooks.deliveries(owner, webhook_id, 10)
    return delivery


def test_a_receiver_checks_the_end_of_a_job_with_both_libraries(serve: Serve, receiver: Receiver, owner: str) -> None:
    service = serve()
    webhook = service.webhooks.create(owner, receiver.url, ENDS)
    job = service.submit(SPEC, owner)
    finish(service, job.id)
    wait_until(lambda: receiver.got)
    headers, body = receiver.got[0]
    event = Verifier(webhook.secret).verify(body, headers)
    assert event == json.loads(body)
    assert (event["object"], event["type"]) == ("event", "fine_tuning.job.succeeded")
    assert headers["webhook-id"] == event["id"]
    data = event["data"]
    assert (data["id"], data["status"], data["name"]) == (job.id, "succeeded", "sums")
    assert data["metadata"] == {"team": "a"}
    assert data["kind"] == "training"
    client = OpenAI(api_key="none", webhook_secret=webhook.secret)
    unwrapped = client.webhooks.unwrap(body.decode(), headers)
    assert isinstance(unwrapped, FineTuningJobSucceededWebhookEvent)
    assert unwrapped.data.id == job.id
    for wrong_body, wrong_headers in (
        (body.replace(b"succeeded", b"cancelled"), headers),
        (body, {**headers, "webhook-id": "evt_other"}),
        (body, {**headers, "webhook-timestamp": str(int(headers["webhook-timestamp"]) - 3600)}),
    ):
        with pytest.raises(WebhookVerificationError):
            Verifier(webhook.secret).verify(wrong_body, wrong_headers)
    wait_until(lambda: only(service, owner, webhook.id).state == "delivered")
    delivery = only(service, owner, webhook.id)
    assert (delivery.attempts, delivery.last_status, delivery.job, delivery.body) == (1, 204, job.id, "")
    assert receiver.types() == ["fine_tuning.job.succeeded"]


def test_every_change_of_a_job_is_an_event(serve: Serve, receiver: Receiver, owner: str) -> None:
    service = serve()
    service.webhooks.create(owner, receiver.url)
    job = service.submit(SPEC, owner)
    wait_until(lambda: len(receiver.got) == 1)
    service.pause(job.id, owner)
    wait_until(lambda: len(receiver.got) == 2)
    service.resume(job.id, owner)
    wait_until(lambda: len(receiver.got) == 3)
    assert service.job_store.claim(job.id, epoch=1, worker="w", lease_seconds=600)
    data = {"stage": "during", "fixed": 0.5}
    service.job_store.change(job.id, epoch=1, events=[JobEvent(type="evaluation", data=data, step=5)], first_ordinal=1)
    wait_until(lambda: len(receiver.got) == 5)
    service.job_store.change(job.id, to=JobStatus.QUEUED, epoch=1)
    wait_until(lambda: len(receiver.got) == 6)
    service.cancel(job.id, owner)
    wait_until(lambda: len(receiver.got) == 7)
    first = ["job.queued", "job.paused", "job.queued"]
    assert receiver.types()[:3] == first
    assert sorted(receiver.types()[3:5]) == ["job.evaluated", "job.running"]
    assert receiver.types()[5:] == ["job.requeued", "fine_tuning.job.cancelled"]
    evaluated = next(event for event in receiver.events if event["type"] == "job.evaluated")
    assert evaluated["data"]["evaluation"] == data
    assert len({event["id"] for event in receiver.events}) == 7
    assert set(receiver.types()) <= {event.value for event in WebhookEvent}


def test_a_trial_ends_under_its_own_name(serve: Serve, receiver: Receiver, owner: str) -> None:
    service = serve()
    service.webhooks.create(owner, receiver.url, [*ENDS, "job.cancelled"])
    job = service.submit(parse_spec({**CPU, "kind": "try"}), owner)
    service.cancel(job.id, owner)
    wait_until(lambda: receiver.got)
    assert receiver.types() == ["job.cancelled"]
    assert receiver.events[0]["data"]["kind"] == "try"


def test_a_receiver_that_fails_three_times_gets_the_same_event_again(
    serve: Serve, receiver: Receiver, owner: str
) -> None:
    receiver.statuses = [500, 404, 503]
    service = serve()
    webhook = service.webhooks.create(owner, receiver.url, ENDS)
    service.cancel(service.submit(SPEC, owner).id, owner)
    wait_until(lambda: only(service, owner, webhook.id).state == "delivered")
    assert only(service, owner, webhook.id).attempts == 4
    assert len({(headers["webhook-id"], body) for headers, body in receiver.got}) == 1
    assert len(receiver.got) == 4
    for headers, body in receiver.got:
        Verifier(webhook.secret).verify(body, headers)


def test_a_webhook_that_never_accepts_is_disabled_until_a_test_succeeds(
    serve: Serve, receiver: Receiver, owner: str
) -> None:
    receiver.statuses = [500] * (len(WAITS) + 1)
    service = serve()
    webhook = service.webhooks.create(owner, receiver.url, ENDS)
    service.cancel(service.submit(SPEC, owner).id, owner)
    wait_until(lambda: service.webhooks.get(owner, webhook.id).disabled_at)
    reason = service.webhooks.get(owner, webhook.id).disabled_reason
    assert reason
    assert reason.endswith("at the last attempt: it answered 500.")
    wait_until(lambda: only(service, owner, webhook.id).state == "failed")
    missed = service.submit(SPEC, owner)
    service.cancel(missed.id, owner)
    wait_until(lambda: service.job_store.client.zcard(f"{service.job_store.prefix}:changes") == 0)
    sent = len(receiver.got)
    assert service.webhooks.test(owner, webhook.id)
    wait_until(lambda: receiver.types()[sent:] == ["webhook.test", "fine_tuning.job.cancelled"])
    assert receiver.events[-1]["data"]["id"] == missed.id
    assert service.webhooks.get(owner, webhook.id).disabled_at is None


def test_gone_disables_at_once(serve: Serve, receiver: Receiver, owner: str) -> None:
    receiver.statuses = [410]
    service = serve()
    webhook = service.webhooks.create(owner, receiver.url, ENDS)
    service.cancel(service.submit(SPEC, owner).id, owner)
    wait_until(lambda: service.webhooks.get(owner, webhook.id).disabled_reason == "It answered 410 Gone.")
    assert len(receiver.got) == 1


def _serve_alone(storage: dict[str, Any], queue: dict[str, Any], hooks: dict[str, Any]) -> None:
    service = JobService(
        StorageSettings.model_validate(storage),
        QueueSettings.model_validate(queue),
        webhooks=WebhookSettings.model_validate(hooks),
    )
    service.start()
    threading.Event().wait()


@pytest.mark.long
def test_a_process_killed_during_an_attempt_loses_nothing(
    serve: Serve, receiver: Receiver, owner: str, storage_settings: StorageSettings, queue_settings: QueueSettings
) -> None:
    hooks = {"hosts": ["127.0.0.1"], "waits": WAITS, "timeout_seconds": 0.5}
    asker = serve(start=False)
    webhook = asker.webhooks.create(owner, receiver.url, ENDS)
    receiver.hang.clear()
    context = multiprocessing.get_context("spawn")
    plain = [
        {name: getattr(value, "get_secret_value", lambda value=value: value)() for name, value in settings}
        for settings in (storage_settings, queue_settings)
    ]
    process = context.Process(target=_serve_alone, args=(*plain, hooks))
    process.start()
    try:
        job = asker.submit(SPEC, owner)
        asker.cancel(job.id, owner)
        wait_until(lambda: receiver.got)
    finally:
        assert process.pid
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    receiver.hang.set()
    service = serve(**hooks)
    wait_until(lambda: only(service, owner, webhook.id).state == "delivered")
    assert len(receiver.got) >= 2
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    assert receiver.events[-1]["data"]["id"] == job.id


def test_an_end_whose_record_no_process_had_time_to_report_is_reported_by_the_next(
    serve: Serve, receiver: Receiver, owner: str
) -> None:
    dead = serve(start=False)
    dead.webhooks.create(owner, receiver.url, ENDS)
    job = dead.submit(SPEC, owner)
    finish(dead, job.id)
    assert not receiver.got
    serve()
    wait_until(lambda: receiver.got)
    assert receiver.events[0]["data"]["id"] == job.id


def test_a_valkey_that_lost_everything_repeats_nothing_and_loses_no_end(
    serve: Serve, receiver: Receiver, owner: str, storage_settings: StorageSettings, queue_settings: QueueSettings
) -> None:
    service = serve()
    webhook = service.webhooks.create(owner, receiver.url, ENDS)
    reported = service.submit(SPEC, owner)
    finish(service, reported.id)
    wait_until(lambda: only(service, owner, webhook.id).state == "delivered")
    service.close()
    silent = serve(start=False)
    unreported = silent.submit(SPEC, owner)
    finish(silent, unreported.id)
    client = silent.job_store.client
    client.delete(*client.scan_iter(f"{queue_settings.prefix}:*", count=1000))
    Rebuild.of(storage_settings, queue_settings).run()
    after = serve()
    wait_until(lambda: len(receiver.got) == 2)
    assert [event["data"]["id"] for event in receiver.events] == [reported.id, unreported.id]
    after.webhooks.courier.reconcile(RECOVERED)
    assert len(after.webhooks.deliveries(owner, webhook.id, 10)) == 1


def test_the_same_end_is_reported_once_even_if_it_is_recorded_twice(
    serve: Serve, receiver: Receiver, owner: str
) -> None:
    service = serve()
    webhook = service.webhooks.create(owner, receiver.url, ENDS)
    job = service.submit(SPEC, owner)
    finish(service, job.id)
    wait_until(lambda: only(service, owner, webhook.id).state == "delivered")
    changes = f"{service.job_store.prefix}:changes"
    service.job_store.client.delete(
        f"{service.job_store.prefix}:delivery:{webhook.id}:{only(service, owner, webhook.id).event_id}"
    )
    service.job_store.client.zadd(changes, {f"{job.id} {owner} running succeeded 1 0": service.job_store.now_ms()})
    wait_until(lambda: service.job_store.client.zcard(changes) == 0)
    assert service.webhooks.deliveries(owner, webhook.id, 10) == []
    assert len(receiver.got) == 1


def test_a_redirect_is_not_followed(serve: Serve, receiver: Receiver, owner: str) -> None:
    with running_receiver() as inner:
        receiver.statuses, receiver.location = [307], inner.url
        service = serve(waits=[60])
        webhook = service.webhooks.create(owner, receiver.url, ENDS)
        service.cancel(service.submit(SPEC, owner).id, owner)
        wait_until(lambda: only(service, owner, webhook.id).attempts == 1)
        delivery = only(service, owner, webhook.id)
        assert (delivery.state, delivery.last_status) == ("pending", 307)
        assert delivery.last_error == "redirects are not followed"
        assert not inner.got


def test_a_name_that_changes_its_address_leads_nowhere_else(
    serve: Serve, receiver: Receiver, owner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checked address is the one that is connected to, and a public name may not lead to a private address."""
    real, asked = socket.getaddrinfo, []

    def look_up(host: Any, port: Any, *more: Any, **options: Any) -> Any:
        if str(host).endswith((".test", ".example")):
            asked.append(host)
            host = "127.0.0.1" if asked.count(host) == 1 else "127.0.0.9"
        return real(host, port, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    service = serve(waits=[60], hosts=["public", "pinned.test"])
    pinned = service.webhooks.create(owner, f"http://pinned.test:{receiver.port}/hooks", ENDS)
    rebound = service.webhooks.create(owner, f"https://rebound.example:{receiver.port}/", ENDS)
    service.cancel(service.submit(SPEC, owner).id, owner)
    wait_until(lambda: only(service, owner, pinned.id).state == "delivered")
    assert asked.count("pinned.test") == 1
    assert receiver.got[0][0]["host"] == f"pinned.test:{receiver.port}"
    wait_until(lambda: only(service, owner, rebound.id).attempts == 1)
    assert only(service, owner, rebound.id).last_error == "the host has no address that webhooks may be sent to"
    assert len(receiver.got) == 1


def test_a_silent_receiver_holds_up_no_other(serve: Serve, receiver: Receiver, owner: str) -> None:
    with running_receiver() as quick:
        receiver.hang.clear()
        service = serve(timeout_seconds=30)
        service.webhooks.create(owner, receiver.url, ENDS)
        service.webhooks.create(owner, quick.url, ENDS)
        for _ in range(3):
            service.cancel(service.submit(SPEC, owner).id, owner)
        wait_until(lambda: len(quick.got) == 3)
        assert len(receiver.got) == 1
        receiver.hang.set()


def test_no_secret_is_in_the_bucket_or_in_valkey(
    serve: Serve, receiver: Receiver, owner: str, queue_settings: QueueSettings, capfd: Any
) -> None:
    """Everything that a reader of both gets, searched for everything that would give them a right."""
    service = serve(sealing=KEY)
    webhook = service.webhooks.create(owner, receiver.url)
    key, _ = service.keys.create(owner)
    session = service.log_in(key, "127.0.0.1")
    assert webhook.secret.startswith("whsec_")
    assert webhook.secret not in repr(webhook)
    assert session
    receiver.statuses = [500]
    service.cancel(service.submit(SPEC, owner).id, owner)
    wait_until(lambda: len(receiver.got) == 3)
    secrets = [webhook.secret.encode(), b"team=a", key.encode(), session.token.encode(), KEY.encode()]
    assert all(secret.decode() not in capfd.readouterr().out for secret in secrets)
    objects = [service.store.get(item.key) or b"" for item in service.store.list("")]
    with redis.Redis.from_url(queue_settings.redis_url.get_secret_value()) as plain:
        copies = [plain.dump(one) or b"" for one in plain.scan_iter(f"{queue_settings.prefix}:*")]
        names = list(plain.scan_iter(f"{queue_settings.prefix}:*"))
    assert any(owner.encode() in body for body in objects)
    assert any(owner.encode() in body for body in copies)
    assert [secret for secret in secrets if any(secret in body for body in (*objects, *copies, *names))] == []


def stored(service: JobService, owner: str, webhook: str) -> dict[str, Any]:
    found = service.store.get_json(object_keys.webhook(owner, webhook))
    assert found is not None
    return found


def test_a_sealed_webhook_shows_neither_its_secret_nor_its_path_in_the_bucket(
    serve: Serve, receiver: Receiver, owner: str
) -> None:
    service = serve(sealing=KEY)
    webhook = service.webhooks.create(owner, receiver.url, ENDS)
    text = json.dumps(stored(service, owner, webhook.id))
    assert webhook.secret not in text
    assert "team=a" not in text
    job = service.submit(SPEC, owner)
    service.cancel(job.id, owner)
    wait_until(lambda: only(service, owner, webhook.id).state == "delivered")
    headers, body = receiver.got[0]
    assert Verifier(webhook.secret).verify(body, headers)["data"]["id"] == job.id
    assert service.webhooks.get(owner, webhook.id).url == receiver.url


def test_an_earlier_release_signs_nothing_with_what_is_sealed(serve: Serve, receiver: Receiver, owner: str) -> None:
    """It needs these fields, and its attempt ends as an error that is not counted: it is repeated."""
    service = serve(start=False, sealing=KEY)
    found = stored(service, owner, service.webhooks.create(owner, receiver.url, ENDS).id)
    assert found.keys() >= {"id", "owner", "url", "events", "created_at", "secret", "disabled_at", "disabled_reason"}
    assert found["url"] == f"http://127.0.0.1:{receiver.port}/"
    with pytest.raises(ValueError, match="padding"):
        signature.headers(found["secret"], "evt_1", 0, b"{}")


def test_yesterdays_webhook_is_sealed_at_the_start_and_again_with_a_new_key(
    serve: Serve, receiver: Receiver, owner: str
) -> None:
    plain = serve()
    webhook = plain.webhooks.create(owner, receiver.url, ENDS)
    body = stored(plain, owner, webhook.id)
    assert body.pop("sealed") is None  # earlier releases wrote no such field
    plain.store.put_json(object_keys.webhook(owner, webhook.id), body)
    assert (body["url"], body["secret"]) == (receiver.url, webhook.secret)
    plain.cancel(plain.submit(SPEC, owner).id, owner)
    wait_until(lambda: len(receiver.got) == 1)
    plain.close()
    for keys, name in ((KEY, NAME), (f"{NEWER},{KEY}", NEWER_NAME)):
        service = serve(sealing=keys)
        wait_until(
            lambda service=service, name=name: str(stored(service, owner, webhook.id).get("sealed"))[3:11] == name
        )
        service.cancel(service.submit(SPEC, owner).id, owner)
        sent = len(receiver.got)
        wait_until(lambda sent=sent: len(receiver.got) > sent)
        assert Verifier(webhook.secret).verify(receiver.got[-1][1], receiver.got[-1][0])
        service.close()
    assert serve(start=False, sealing=NEWER).webhooks.get(owner, webhook.id).secret == webhook.secret


@pytest.mark.parametrize(("keys", "has"), [("", "is not set"), ("w" * 32, "has only")])
def test_without_the_key_deliveries_wait_and_go_to_who_has_it(
    serve: Serve,
    receiver: Receiver,
    owner: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    keys: str,
    has: str,
) -> None:
    monkeypatch.setattr("jobs.webhooks.courier.UNREADABLE_SECONDS", 0.2)
    made = serve(start=False, sealing=KEY).webhooks.create(owner, receiver.url, ENDS)
    blind = serve(sealing=keys)
    job = blind.submit(SPEC, owner)
    blind.cancel(job.id, owner)
    wait_until(lambda: any(one.last_error for one in blind.webhooks.deliveries(owner, made.id, 10)))
    (delivery,) = blind.webhooks.deliveries(owner, made.id, 10)
    assert (delivery.state, delivery.attempts, delivery.last_error) == ("pending", 0, UNREADABLE)
    assert re.search(rf"webhook_unreadable.*{NAME}.*GRPO_SEALING_KEYS {has}.*Add that key", capfd.readouterr().out)
    seeing = serve(sealing=KEY)  # both run: the one without the key gives its turn away
    wait_until(lambda: only(seeing, owner, made.id).state == "delivered")
    assert Verifier(made.secret).verify(receiver.got[0][1], receiver.got[0][0])["data"]["id"] == job.id
    assert len(receiver.got) == 1


def test_without_the_key_a_webhook_is_shown_and_changed_as_far_as_it_can_be(
    serve: Serve, receiver: Receiver, owner: str
) -> None:
    seeing, blind = serve(start=False, sealing=KEY), serve(start=False)
    made = seeing.webhooks.create(owner, receiver.url, ENDS)
    shown = blind.webhooks.get(owner, made.id)
    assert (shown.url, shown.events) == (f"http://127.0.0.1:{receiver.port}/", ENDS)
    registry = blind.webhooks._webhooks
    registry.disable(shown, "a test")
    assert seeing.webhooks.get(owner, made.id).disabled_reason == "a test"
    registry.enable(blind.webhooks.get(owner, made.id))
    registry.seal()
    again = seeing.webhooks.get(owner, made.id)
    assert (again.url, again.secret, again.disabled_at) == (made.url, made.secret, None)
    blind.webhooks.delete(owner, made.id)
    assert seeing.webhooks.all(owner) == []


def test_a_sealed_webhook_of_another_owner_does_not_open(serve: Serve, receiver: Receiver, owner: str) -> None:
    service = serve(start=False, sealing=KEY)
    webhook = service.webhooks.create("bob", receiver.url)
    service.store.put_json(
        object_keys.webhook(owner, webhook.id), {**stored(service, "bob", webhook.id), "owner": owner}
    )
    copied = service.webhooks.get(owner, webhook.id)
    assert copied.secret != webhook.secret
    assert copied.fault
    assert "another place" in copied.fault
    service.webhooks.delete("bob", webhook.id)


def test_what_an_operator_is_shown(
    own_bucket: StorageSettings,
    serve: Serve,
    receiver: Receiver,
    owner: str,
    queue_settings: QueueSettings,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    service = serve(storage=own_bucket)
    shown: list[str] = []

    def is_warned() -> bool:
        shown.append(capfd.readouterr().out)
        return "webhook_secrets_plain" in "".join(shown) and "GRPO_SEALING_KEYS" in "".join(shown)

    wait_until(is_warned)
    service.close()
    service.webhooks.create(owner, receiver.url)
    for settings in (own_bucket, queue_settings):
        for name, field in type(settings).model_fields.items():
            alias = field.validation_alias
            variable = alias if isinstance(alias, str) else alias.choices[0]  # type: ignore[union-attr]
            value = getattr(settings, name)
            monkeypatch.setenv(str(variable), str(getattr(value, "get_secret_value", lambda value=value: value)()))

    def seal(*words: str) -> tuple[int, dict[str, Any]]:
        with pytest.raises(SystemExit) as ended:
            main(["admin", "seal", "--json", *words], sets=ALL)
        return int(str(ended.value.code or 0)), json.loads(capfd.readouterr().out)

    code, found = seal()
    assert (code, found["keys"], found["plain"] > 0) == (1, [], True)
    monkeypatch.setenv("GRPO_SEALING_KEYS", KEY)
    code, before = seal("--dry-run")
    assert (code, before["keys"], before["sealed"] > 0) == (0, [NAME], True)
    assert stored(service, owner, service.webhooks.all(owner)[0].id)["sealed"] is None
    assert seal() == (0, before)
    assert seal() == (0, {**before, "current": before["sealed"] + before["current"], "sealed": 0})
    monkeypatch.setenv("GRPO_SEALING_KEYS", NEWER)
    code, found = seal()
    assert code == 1
    assert all("GRPO_SEALING_KEYS has only" in why for why in found["unreadable"].values())
    monkeypatch.setenv("GRPO_SEALING_KEYS", "short")
    with pytest.raises(SystemExit) as ended:
        main(["admin", "seal"], sets=ALL)
    assert ended.value.code == 2
    assert "GRPO_SEALING_KEYS is a text with a key of 5 characters" in capfd.readouterr().err


def test_a_deleted_webhook_leaves_nothing(serve: Serve, receiver: Receiver, owner: str) -> None:
    receiver.statuses = [500] * 9
    service = serve(waits=[60])
    webhook = service.webhooks.create(owner, receiver.url, ENDS)
    with pytest.raises(NotFound):
        service.webhooks.delete("bob", webhook.id)
    service.cancel(service.submit(SPEC, owner).id, owner)
    wait_until(lambda: only(service, owner, webhook.id).attempts == 1)
    service.webhooks.delete(owner, webhook.id)
    keys = list(service.job_store.client.scan_iter(f"{service.job_store.prefix}:*{webhook.id}*"))
    assert keys == []
    assert list(service.store.list(object_keys.webhook_folder(owner, webhook.id))) == []
    with pytest.raises(NotFound):
        service.webhooks.get(owner, webhook.id)


def test_an_owner_has_a_limited_number(serve: Serve, receiver: Receiver, owner: str) -> None:
    service = serve(start=False, most=1)
    service.webhooks.create(owner, receiver.url)
    with pytest.raises(Rejected, match="GRPO_MAX_OWNER_WEBHOOKS"):
        service.webhooks.create(owner, receiver.url)


@pytest.fixture
def api(serve: Serve) -> Iterator[RunningApi]:
    running = RunningApi(serve(start=False, most=3))
    with running.run():
        yield running


@pytest.fixture
def http_client(api: RunningApi, owner: str) -> Iterator[httpx.Client]:
    key = api.service.keys.create(owner)[0]
    with httpx.Client(base_url=api.url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
        yield client


def test_over_http(http_client: httpx.Client, receiver: Receiver) -> None:
    made = http_client.post("/webhooks", json={"url": receiver.url, "events": [ENDS[1], ENDS[0]]})
    assert made.status_code == 201
    webhook = made.json()
    assert made.headers["location"] == f"/webhooks/{webhook['id']}"
    assert (webhook["url"], webhook["events"], webhook["status"]) == (receiver.url, ENDS[:2], "enabled")
    shown = http_client.get(made.headers["location"]).json()
    assert shown == {name: value for name, value in webhook.items() if name != "secret"}
    assert http_client.get("/webhooks").json()["data"] == [shown]
    sent = http_client.post(f"/webhooks/{webhook['id']}/test")
    assert (sent.status_code, sent.json()["type"]) == (202, "webhook.test")
    deliveries = f"/webhooks/{webhook['id']}/deliveries"
    wait_until(lambda: http_client.get(deliveries).json()["data"][0]["state"] == "delivered")
    (delivery,) = http_client.get(deliveries).json()["data"]
    assert (delivery["event_id"], delivery["last_status"]) == (sent.json()["event_id"], 204)
    Verifier(webhook["secret"]).verify(receiver.got[0][1], receiver.got[0][0])
    assert http_client.delete(made.headers["location"]).status_code == 204
    assert http_client.get(made.headers["location"]).json()["code"] == "not_found"


WRONG: list[tuple[Any, list[str]]] = [
    ([], [""]),
    ({}, ["/url"]),
    ({"url": 1, "events": "all", "more": 1}, ["/more", "/url", "/events"]),
    ({"url": "http://127.0.0.2:1/", "events": ["a"]}, ["/url"]),
    ({"url": "http://10.0.0.1/"}, ["/url"]),
    ({"url": "http://127.0.0.1/", "events": []}, ["/events"]),
    ({"url": "http://127.0.0.1/", "events": ["job.queued", "job.queue"]}, ["/events/1"]),
]


def test_a_wrong_registration_is_refused_by_field(http_client: httpx.Client) -> None:
    for body, pointers in WRONG:
        answer = http_client.post("/webhooks", json=body)
        assert (answer.status_code, answer.json()["code"]) == (422, "rejected"), body
        assert [error["pointer"] for error in answer.json()["errors"]] == pointers
        assert all(error["remedy"] for error in answer.json()["errors"])
    assert http_client.get("/webhooks").json()["data"] == []


def test_the_commands(
    api: RunningApi, owner: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRPO_URL", api.url)
    monkeypatch.setenv("GRPO_API_KEY", api.service.keys.create(owner)[0])

    def grpo(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(["webhooks", *words])
        # The API, which runs in this process, logs to standard output.
        lines = [line for line in capsys.readouterr().out.splitlines(keepends=True) if not LOG_LINE.match(line)]
        return int(str(ended.value.code or 0)), "".join(lines)

    code, text = grpo("add", receiver.url, "--event", ENDS[0])
    secret, described = text.splitlines()[:2]
    assert code == 0
    assert secret.startswith("whsec_")
    webhook = described.split()[0]
    assert grpo("test", webhook) == (0, f"{webhook}: delivered, HTTP 204\n")
    receiver.statuses = [500]
    assert grpo("test", webhook) == (1, f"{webhook}: failed, HTTP 500\n")
    _, listed = grpo("list")
    assert listed == f"{webhook}  enabled   {receiver.url}  {ENDS[0]}\n"
    _, shown = grpo("deliveries", webhook)
    assert [line.split("  ")[-1] for line in shown.splitlines()] == ["failed, HTTP 500", "delivered, HTTP 204"]
    assert grpo("remove", webhook, "--yes") == (0, f"{webhook}: deleted\n")
    assert json.loads(grpo("list", "--json")[1]) == {"object": "list", "data": []}


def test_the_receiver_of_the_documentation(serve: Serve, owner: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "webhooks.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    port = pick_port()
    service = serve()
    webhook = service.webhooks.create(owner, f"http://127.0.0.1:{port}/", ENDS)
    environment = {"PATH": os.defpath, "WEBHOOK_SECRET": webhook.secret, "PORT": str(port)}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            wait_until(lambda: is_open(port))
            forged = httpx.post(webhook.url, content=b"{}", headers={"webhook-id": "a", "webhook-signature": "v1,a"})
            assert forged.status_code == 401
            job = service.submit(SPEC, owner)
            service.cancel(job.id, owner)
            assert process.stdout
            assert process.stdout.readline() == f"fine_tuning.job.cancelled {job.id}\n"
            wait_until(lambda: only(service, owner, webhook.id).state == "delivered")
        finally:
            process.kill()


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
