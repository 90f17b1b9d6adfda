"""Two owners, every endpoint, every id of the other: an id that is not yours is an id that does not exist.

Which requests are sent is read from the OpenAPI document and from the routes that are not in it, so a new route is
tried without a change here. Compared are status, headers, body, and what was asked of Valkey and storage on the way:
a request that asks more for an id that exists takes longer, and tells.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import botocore.client
import httpx
import pytest
import redis
from litestar.testing import TestClient

from api import openapi
from api.app import create_app
from api.auth import COOKIE
from api.parameters import declared
from grpo_core.spec import JOB_ID, parse_spec
from jobs.auth.api_keys import OPERATOR, SCOPES
from jobs.lifecycle.outcomes import apply_outcome
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store import event_log, object_keys
from jobs.store.commits import ResumeBase, put_base
from jobs.store.job import JobStatus
from jobs.store.job_store import JobEvent
from jobs.store.write_once import Manifest, ManifestEntry, Outcome
from tests.integration.rollout_objects import RunOfRollouts, completions
from tests.integration.test_service import upload
from tests.unit.fakes import FakeJobService

SECRET = "annes-secret"
"""In everything of the one owner's that is text: it must never come back to the other."""
CPU = {"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}}
SPEC = parse_spec({**CPU, "name": SECRET, "metadata": {SECRET: SECRET}})
ABSENT = {
    "job_id": "job-01ARZ3NDEKTSV4RRFFQ69G5FAV",
    "dataset_id": "ds-01ARZ3NDEKTSV4RRFFQ69G5FAV",
    "file_id": "ds-01ARZ3NDEKTSV4RRFFQ69G5FAV",
    "group": "group-01ARZ3NDEKTSV4RRFFQ69G5FAV",
    "webhook_id": "webhook-01ARZ3NDEKTSV4RRFFQ69G5FAV",
    "key": "key-01ARZ3NDEKTSV4RRFFQ69G5FAV",
}
BODIES = {"PATCH": {"priority": "low"}}
"""What requests need in their bodies to get as far as the id in their path."""
OWN = {"x-request-id", "ratelimit"}
"""Headers that differ from one request of the same owner to the next."""
NO_IDS = {"name", "model"}
"""Names in paths that are no ids: of a worker, which belongs to no owner, and of a model, which has a separate test."""
CHECKPOINT_STEP = 5


@dataclass(frozen=True)
class Ask:
    """A request, as far as the id in it is concerned."""

    method: str
    path: str
    query: tuple[tuple[str, str], ...] = ()
    headers: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.method} {self.path}", *(f"{k}={v}" for k, v in (*self.query, *self.headers))]
        return " ".join(parts)


class Owners:
    """The service with one owner's things in it, and a client of each owner."""

    def __init__(self, service: JobService, client: TestClient[Any], folder: Path) -> None:
        self.service = service
        self._client = client
        service._valkey_recovery.ensure()  # as its sweeper would: else the first request of an unknown id does more
        scopes = [scope for scope in SCOPES if scope != OPERATOR]
        self.keys = {name: service.keys.create(name, scopes)[0] for name in (SECRET, "bob")}
        self.jobs = {name: service.submit(SPEC, SECRET).id for name in ("queued", "running", "ended", "cancelled")}
        for name in ("running", "ended"):
            self._train(self.jobs[name], folder / name)
        self._end(self.jobs["ended"])
        service.cancel(self.jobs["cancelled"], SECRET)
        self.dataset = upload(service, folder, SECRET).id
        self.group, members, _ = service.submit_group([SPEC, SPEC], SECRET)
        webhook = service.webhooks.create(SECRET, f"https://example.com/{SECRET}", ["job.requeued"])
        self.ids = {"job_id": list(self.jobs.values()), "dataset_id": [self.dataset], "group": [self.group]}
        self.ids["webhook_id"] = [webhook.id]
        self.ids["file_id"] = [self.dataset]
        self.ids["key"] = [record.id for record in service.keys.list(SECRET)]
        self.jobs |= {f"member {place}": record.id for place, record in enumerate(members)}
        self.calls: list[str] = []

    def _train(self, job_id: str, folder: Path) -> None:
        epoch = self.service.write_once.allocate_epoch(job_id, SECRET, event_log.now_iso())
        assert epoch is not None
        assert self.service.job_store.claim(job_id, epoch=epoch, worker=SECRET, lease_seconds=600)
        put_base(self.service.store, ResumeBase(job=job_id, epoch=epoch, resumed=None))
        self.rollouts = RunOfRollouts(self.service.store, job_id, epoch, folder)
        events: list[JobEvent] = []
        for step in range(1, CHECKPOINT_STEP + 1):
            self.rollouts.step(step, completions(step, prompts=1, group=2, words=3))
            events.append(JobEvent(type="metric", step=step, data={"reward": 1.5, SECRET: 1.5}))
            events.append(JobEvent(type="sample", step=step, data={"completion": SECRET}))
        self.service.job_store.change(job_id, epoch=epoch, events=events, first_ordinal=1, fields={"step": step})
        prefix = f"{object_keys.run(job_id, epoch)}checkpoints/step-{CHECKPOINT_STEP:06d}/"
        file = {"path": "adapter_model.safetensors", "sha256": "0" * 64, "size": 3}
        self.service.store.put(f"{prefix}adapter_model.safetensors", b"abc")
        self.service.store.put_json(f"{prefix}manifest.json", {"v": 1, "step": CHECKPOINT_STEP, "files": [file]})

    def _end(self, job_id: str) -> None:
        key = f"{object_keys.run(job_id, 1)}report.json"
        self.service.store.put_json(key, {"text": SECRET})
        report = ManifestEntry(path="report.json", key=key, sha256="0" * 64, size=1)
        weights = f"{object_keys.run(job_id, 1)}adapter/adapter_model.safetensors"
        self.service.store.put(weights, b"abc")
        sha256 = hashlib.sha256(b"abc").hexdigest()
        adapter = ManifestEntry(path="adapter/adapter_model.safetensors", key=weights, sha256=sha256, size=3)
        manifest = Manifest(job=job_id, epoch=1, objects=[report, adapter, *self.rollouts.sent.values()])
        key = self.service.write_once.put_manifest(manifest)
        time = event_log.now_iso()
        outcome = Outcome(job=job_id, status="succeeded", epoch=1, time=time, by="w", manifest=key)
        apply_outcome(self.service.job_store, job_id, self.service.write_once.put_outcome(outcome))

    def send(self, owner: str, ask: Ask, named: str = "", body: Any = None, **headers: str) -> httpx.Response:
        """Send a request, with `named` wherever it has an id; without an owner it bears no key."""

        def put_in(text: str) -> str:
            return text.replace("{id}", named)

        self.calls.clear()
        return self._client.request(
            ask.method,
            put_in(ask.path),
            params=[(name, put_in(value)) for name, value in ask.query],
            headers={**self._authorization(owner), **dict(ask.headers), **headers},
            json=BODIES.get(ask.method) if body is None else body,
        )

    def _authorization(self, owner: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[owner]}"} if owner else {}

    def trace(self, owner: str, ask: Ask, named: str = "", body: Any = None, **headers: str) -> dict[str, Any]:
        """All that an answer tells, the id itself left out."""
        answer = self.send(owner, ask, named, body, **headers)
        return {
            "status": answer.status_code,
            "headers": {k: v.replace(named, "ID") for k, v in answer.headers.items() if k not in OWN},
            "body": _without(answer.text, named, answer.headers.get("x-request-id", "")),
            "calls": list(self.calls),
        }

    def state(self) -> list[Any]:
        """All that nobody but their owner may change."""
        records = [self.service.get(job_id, SECRET) for job_id in self.jobs.values()]
        objects = [
            item for job_id in self.jobs.values() for item in self.service.store.list(object_keys.folder(job_id))
        ]
        return [records, objects, self.service.newest_events(list(self.jobs.values()))]


def _without(text: str, named: str, request_id: str) -> str:
    return text.replace(named or "\0", "ID").replace(request_id or "\0", "REQUEST")


@pytest.fixture(scope="module")
def owners(valkey: Any, seaweedfs: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owners]:
    queue = QueueSettings.model_validate({"redis_url": valkey.url, "prefix": "t-two-owners"})
    names = ("endpoint", "bucket", "region", "access_key", "secret_key")
    storage = StorageSettings.model_validate({name: getattr(seaweedfs, name) for name in names})
    service = JobService(storage, queue)
    patch = pytest.MonkeyPatch()
    with TestClient(create_app(service)) as client:
        owners = Owners(service, client, tmp_path_factory.mktemp("owners"))
        _note_calls(patch, owners.calls)
        yield owners
    patch.undo()


def _note_calls(patch: pytest.MonkeyPatch, calls: list[str]) -> None:
    """Note what requests ask of the two servers; threads of the service's own do not count."""
    make_api_call, execute_command = botocore.client.BaseClient._make_api_call, redis.Redis.execute_command

    def is_ours() -> bool:
        return threading.current_thread().name.startswith(("request", "events"))

    def call_storage(client: Any, name: str, parameters: Any) -> Any:
        if is_ours():
            calls.append(name)
        return make_api_call(client, name, parameters)

    def call_valkey(client: Any, *arguments: Any, **options: Any) -> Any:
        # A stream asks for news as time goes by.
        if is_ours() and arguments[0] != "HGET":
            calls.append(str(arguments[0]))
        return execute_command(client, *arguments, **options)

    patch.setattr(botocore.client.BaseClient, "_make_api_call", call_storage)
    patch.setattr(redis.Redis, "execute_command", call_valkey)


def example(schema: dict[str, Any]) -> str:
    """A value that a parameter takes."""
    if schema.get("pattern") == JOB_ID:
        return "{id}"
    if schema.get("type") == "array":
        return example(schema["items"])
    if "enum" in schema or "const" in schema:
        return str(schema.get("enum", [schema.get("const")])[-1])
    plain = {"boolean": "true", "integer": str(schema.get("minimum", 1)), "number": "0.5", "object": "{}"}
    return plain.get(schema.get("type", "string"), "a")


def value_of(parameter: dict[str, Any], kind: str) -> str:
    """What is sent as a parameter beside an id of this kind, so that the request is refused for its id alone."""
    if parameter["name"] == "fields" or (parameter["name"] == "cursor" and "pattern" not in parameter["schema"]):
        return parameter["example"]
    value = example(parameter["schema"])
    return value if kind == "job_id" else value.replace("{id}", ABSENT["job_id"])


def described() -> dict[str, list[Ask]]:
    """For each kind of id, every request of the OpenAPI document that has one in its path, in every form it takes."""
    app = create_app(FakeJobService())  # type: ignore[arg-type]
    document = openapi.complete(app.openapi_schema.to_schema())
    asks: dict[str, list[Ask]] = {name: [] for name in ABSENT}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parameters: list[dict[str, Any]] = [_resolved(document, p) for p in operation["parameters"]]
            kinds = [parameter["name"] for parameter in parameters if parameter["in"] == "path"]
            kinds = [kind for kind in kinds if kind not in NO_IDS]
            assert set(kinds) <= set(ABSENT), f"{path}: which ids are {kinds}? Teach them to this test."
            for kind in kinds:
                url = path.replace(f"{{{kind}}}", "{id}")
                plain = Ask(method.upper(), url)
                types = {t for code, a in operation["responses"].items() if code < "300" for t in a.get("content", {})}
                asks[kind] += [plain, *(Ask(plain.method, url, headers=(("Accept", t),)) for t in sorted(types))]
                for parameter in (p for p in parameters if p["in"] in ("query", "header")):
                    given = ((parameter["name"], value_of(parameter, kind)),)
                    asks[kind].append(
                        Ask(plain.method, url, query=given)
                        if parameter["in"] == "query"
                        else Ask(plain.method, url, headers=given)
                    )
    return asks


def _resolved(document: dict[str, Any], parameter: dict[str, Any]) -> dict[str, Any]:
    reference = parameter["schema"].get("$ref", "").removeprefix(openapi.REF)
    return {**parameter, "schema": document["components"]["schemas"][reference]} if reference else parameter


def hidden() -> dict[str, list[Ask]]:
    """The same of routes that need a key and are in no document, such as the page's."""
    asks: dict[str, list[Ask]] = {name: [] for name in ABSENT}
    app = create_app(FakeJobService())  # type: ignore[arg-type]
    for route in app.routes:
        for handler in getattr(route, "route_handlers", []):
            if handler.opt.get("exclude_from_auth") or handler.resolve_include_in_schema():
                continue
            for method in sorted(handler.http_methods - {"OPTIONS"}):
                for kind in route.path_parameters:
                    assert kind in ABSENT, f"{route.path}: which ids are {kind}? Teach them to this test."
                    asks[kind].append(Ask(method, route.path.replace(f"{{{kind}:str}}", "{id}")))
                asks["job_id"] += [Ask(method, route.path, query=((name, "{id}"),)) for name in declared(handler)]
    return asks


EVERY = [(kind, ask) for found in (described(), hidden()) for kind, asks in found.items() for ask in asks]


def test_there_is_something_to_try() -> None:
    tried = {(ask.method, ask.path) for _, ask in EVERY}
    assert {("POST", "/jobs/{id}/pause"), ("GET", "/jobs/{id}/rollouts"), ("GET", "/datasets/{id}")} <= tried
    assert ("GET", "/page/reports/{id}") in tried
    assert len(tried) >= 13


@pytest.mark.parametrize(("kind", "ask"), EVERY, ids=str)
def test_an_id_of_another_owner_is_an_id_that_does_not_exist(owners: Owners, kind: str, ask: Ask) -> None:
    before = owners.state()
    absent = owners.trace("bob", ask, ABSENT[kind])
    for named in owners.ids[kind]:
        foreign = owners.trace("bob", ask, named)
        assert foreign == absent, f"{ask}: {named}"
        assert SECRET not in str(foreign)
    if ask.path.count("{id}"):
        assert absent["status"] == 404
    assert owners.state() == before, "and nothing has changed"


@pytest.mark.parametrize("path", ["/v1/files/{id}", "/v1/files/{id}/content"])
def test_a_file_of_results_is_its_jobs_owners(owners: Owners, path: str) -> None:
    ask, named = Ask("GET", path), owners.jobs["ended"].replace("job-", "file-")
    absent = owners.trace("bob", ask, ABSENT["job_id"].replace("job-", "file-"))
    assert owners.trace("bob", ask, named) == absent
    assert absent["status"] == 404
    assert owners.send(SECRET, ask, named).status_code == 200


@pytest.mark.parametrize("suffix", ["", ":base", ":step-5"])
def test_a_model_is_its_jobs_owners(owners: Owners, suffix: str) -> None:
    ask, named = Ask("GET", f"/v1/models/{{id}}{suffix}"), owners.jobs["ended"]
    absent = owners.trace("bob", ask, ABSENT["job_id"])
    assert owners.trace("bob", ask, named) == absent
    assert absent["status"] == 404
    assert owners.send(SECRET, ask, named).status_code == 409, "nothing serves it, which its owner is told"


@pytest.mark.parametrize("kind", ABSENT)
def test_their_owner_does_see_them(owners: Owners, kind: str) -> None:
    """Else the test above would prove nothing: for each address there is an id that it knows."""
    for ask in {Ask(ask.method, ask.path): None for known, ask in EVERY if known == kind and "{id}" in ask.path}:
        if ask.method == "GET":
            answers = [owners.send(SECRET, ask, named) for named in owners.ids[kind]]
            assert all(answer.status_code in (200, 204) for answer in answers), ask
            assert any(answer.text for answer in answers), ask


def test_lists_and_what_has_no_id_show_nothing_of_another(owners: Owners) -> None:
    document = openapi.complete(create_app(FakeJobService()).openapi_schema.to_schema())  # type: ignore[arg-type]
    tried = 0
    for path, methods in document["paths"].items():
        if "get" not in methods or "{" in path:
            continue
        given = [(), *(((p["name"], example(_resolved(document, p)["schema"])),) for p in methods["get"]["parameters"])]
        given += [((f"metadata[{SECRET}]", SECRET),)]
        for query in given:
            for named in (owners.jobs["queued"], owners.dataset):
                answer = owners.send("bob", Ask("GET", path, query=query), named)
                told = answer.text.replace(f"metadata[{SECRET}]", "")
                # Of what was asked itself, an answer may speak.
                assert SECRET not in told, f"{path} {query}"
                assert not any(job_id in told for job_id in owners.jobs.values() if job_id != named)
                tried += 1
    assert tried > 10


def test_a_cursor_or_a_status_of_another_owners_job_leads_to_no_other_list(owners: Owners) -> None:
    for _ in range(3):
        owners.service.submit(parse_spec(CPU), "bob")
    # Other tests of this file may have made jobs of his too.
    mine = {job.id for job in owners.service.list_jobs("bob", limit=100).items}
    for status in (None, *JobStatus):
        for cursor in (*owners.jobs.values(), "job-7ZZZZZZZZZZZZZZZZZZZZZZZZZ"):
            query = (("cursor", cursor), *((("status", status.value),) if status else ()))
            found = owners.send("bob", Ask("GET", "/jobs", query=query)).json()["data"]
            assert {job["id"] for job in found} <= mine
            assert all(job["id"] < cursor for job in found), "a place in the order, and nothing else"


def test_an_idempotency_key_is_its_owners(owners: Owners) -> None:
    ask, header = Ask("POST", "/jobs"), {"Idempotency-Key": "shared"}
    first = owners.send(SECRET, ask, body={**CPU, "name": SECRET}, **header)
    theirs = owners.send("bob", ask, body={**CPU, "name": "bob's"}, **header)
    assert (first.status_code, theirs.status_code) == (201, 201), "and not 422, which another's body would be"
    assert "idempotent-replayed" not in theirs.headers
    assert SECRET not in theirs.text
    again = owners.send(SECRET, ask, body={**CPU, "name": SECRET}, **header)
    assert again.json()["id"] == first.json()["id"] != theirs.json()["id"]


@pytest.mark.parametrize("dry_run", ["true", "false"])
@pytest.mark.parametrize("what", ["data set", "checkpoint", "stored rows", "stored checkpoint"])
def test_a_spec_cannot_name_what_is_another_owners(owners: Owners, what: str, dry_run: str) -> None:
    bucket = owners.service.store.bucket
    checkpoint = f"e1/checkpoints/step-{CHECKPOINT_STEP:06d}/adapter_model.safetensors"
    named, absent = {
        "data set": (owners.dataset, ABSENT["dataset_id"]),
        "checkpoint": (owners.jobs["ended"], ABSENT["job_id"]),
        "stored rows": (owners.dataset, ABSENT["dataset_id"]),
        "stored checkpoint": (owners.jobs["ended"], ABSENT["job_id"]),
    }[what]

    def body(name: str) -> dict[str, Any]:
        sections = {
            "data set": {"data": {"source": "upload", "dataset": name}},
            "checkpoint": {"from_checkpoint": {"job": name, "step": CHECKPOINT_STEP}},
            "stored rows": {"data": {"source": "s3", "dataset": f"s3://{bucket}/{object_keys.dataset_rows(name)}"}},
            "stored checkpoint": {
                "data": {"source": "s3", "dataset": f"s3://{bucket}/{object_keys.folder(name)}{checkpoint}"}
            },
        }
        return {**CPU, **sections[what]}

    ask = Ask("POST", "/jobs", query=(("dry_run", dry_run),))
    if what in ("data set", "checkpoint"):
        assert owners.send(SECRET, ask, body=body(named)).is_success, "its owner may"
    owners.send("bob", ask, body=body(absent))  # the first of its kind also loads a script
    foreign, unknown = owners.trace("bob", ask, named, body(named)), owners.trace("bob", ask, absent, body(absent))
    assert foreign == unknown
    assert foreign["status"] == 422
    assert json.loads(foreign["body"])["code"] == "rejected"


def test_a_session_of_the_page_shows_its_own_owners_jobs_and_no_other(owners: Owners) -> None:
    session = owners.service.log_in(owners.keys["bob"], "127.0.0.1")
    assert session is not None
    cookie = {"Cookie": f"{COOKIE}={session.token}"}
    for kind, named in (("job_id", owners.jobs["ended"]), ("dataset_id", owners.dataset)):
        for ask in {Ask(ask.method, ask.path) for known, ask in EVERY if known == kind and "{id}" in ask.path}:
            if ask.method == "GET":
                answer = owners.send("", ask, named, **cookie)
                told = answer.json()
                assert (answer.status_code, told.get("error", told)["code"]) == (404, "not_found"), ask
    listed = owners.send("", Ask("GET", "/jobs"), **cookie)
    assert listed.status_code == 200
    assert SECRET not in listed.text
