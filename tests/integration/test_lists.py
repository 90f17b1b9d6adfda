"""Lists of the real service: pages by `Link` and by cursor, chosen fields, and jobs in any order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from grpo_client import GrpoClient
from grpo_core.reasons import EventType
from grpo_core.rewards import describe
from grpo_core.spec import parse_spec
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store.job import Priority
from jobs.store.job_store import JobEvent
from tests.integration.running import RunningApi

BASE = {"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}}
NAMES = ["beta", "Alpha", None, "gamma", "alpha", None, "Delta"]
ORDERS = ["created", "updated", "name", "status", "priority", "owner", "reward"]


class Running:
    """A service with jobs of several names, priorities, statuses and rewards."""

    def __init__(self, api: RunningApi) -> None:
        self.api = api
        self.key, _ = api.service.keys.create("ann")
        self.jobs = [self.submit(place, name) for place, name in enumerate(NAMES)]
        self.held = self.jobs[0]
        # Otherwise the sweeper compares this Valkey with the bucket in its first round, which shortens the lease.
        api.service.job_store.note_compared(api.service.job_store.look().here)
        api.service.job_store.claim(self.held, epoch=1, worker="w", lease_seconds=600)
        metrics = [JobEvent(type=EventType.METRIC, step=step, data={"reward": step / 10}) for step in range(1, 8)]
        api.service.job_store.change(self.held, epoch=1, events=metrics, fields={"step": 7, "reward": 0.7})
        api.service.cancel(self.jobs[1], "ann")

    def submit(self, place: int, name: str | None) -> str:
        kind = {"kind": "try"} if place == 3 else {}
        spec = parse_spec({**BASE, **kind, **({"name": name} if name else {}), "metadata": {"place": str(place)}})
        priority = list(Priority)[place % 3]
        return self.api.service.submit(spec, "ann", priority=priority).id


@pytest.fixture(scope="module")
def running(valkey: Any, seaweedfs: Any) -> Iterator[Running]:
    queue = QueueSettings.model_validate({"redis_url": valkey.url, "prefix": "t-lists"})
    storage = StorageSettings.model_validate(
        {
            "endpoint": seaweedfs.endpoint,
            "bucket": seaweedfs.bucket,
            "region": seaweedfs.region,
            "access_key": seaweedfs.access_key,
            "secret_key": seaweedfs.secret_key,
        }
    )
    api = RunningApi(JobService(storage, queue))
    with api.run():
        yield Running(api)


@pytest.fixture
def client(running: Running) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {running.key}"}
    with httpx.Client(base_url=running.api.url, headers=headers, timeout=30) as client:
        yield client


def pages(client: httpx.Client, path: str) -> Iterator[dict[str, Any]]:
    """Every page of a list, by the header alone; the body says the same."""
    following: str | None = path
    while following:
        answer = client.get(following)
        assert answer.status_code == 200, answer.text
        page = answer.json()
        yield page
        following = answer.links.get("next", {}).get("url")
        assert page["has_more"] is bool(following)
        cursor = parse_qs(urlsplit(following).query)["cursor"][0] if following else None
        assert page["next_cursor"] == cursor


@pytest.mark.parametrize(
    "path",
    ["/jobs", "/v1/jobs", "/rewards", "/jobs/HELD/events", "/jobs/HELD/metrics", *(f"/jobs?sort={o}" for o in ORDERS)],
)
def test_pages_have_every_entry_once_and_in_order(client: httpx.Client, running: Running, path: str) -> None:
    path = path.replace("HELD", running.held)
    sign = "&" if "?" in path else "?"
    for _ in range(3):
        (whole,) = list(pages(client, f"{path}{sign}limit=100"))
        parts = list(pages(client, f"{path}{sign}limit=2"))
        if whole == next(pages(client, f"{path}{sign}limit=100")):
            break  # no job was updated between two pages
    assert len(whole["data"]) > 3
    assert all(len(part["data"]) <= 2 for part in parts)
    assert [one for part in parts for one in part["data"]] == whole["data"]


@pytest.mark.parametrize(
    "path", ["/workers", "/webhooks", "/datasets", "/jobs/HELD/checkpoints", "/jobs/HELD/artifacts"]
)
def test_every_list_has_the_same_form(client: httpx.Client, running: Running, path: str) -> None:
    answer = client.get(f"{path.replace('HELD', running.held)}?limit=100")
    assert answer.status_code == 200, answer.text
    page = answer.json()
    assert (page["object"], page["has_more"], page["next_cursor"]) == ("list", False, None)


def test_a_new_webhook_does_not_move_the_pages(client: httpx.Client, running: Running) -> None:
    key, _ = running.api.service.keys.create("has-no-other-webhook")
    client.headers["Authorization"] = f"Bearer {key}"
    made = [client.post("/webhooks", json={"url": f"https://example.com/{n}"}).json()["id"] for n in range(3)]
    first = client.get("/webhooks?limit=2").json()
    client.delete(f"/webhooks/{made[1]}")
    rest = client.get(f"/webhooks?limit=2&cursor={first['next_cursor']}").json()
    assert [hook["id"] for hook in first["data"] + rest["data"]] == made


@pytest.mark.parametrize("path", ["/jobs?sort=name", "/jobs", "/rewards", "/jobs/HELD/events", "/jobs/HELD/metrics"])
@pytest.mark.parametrize("cursor", ["x", "bnVsbA", "WzEsMl0", "e30", "%00"])
def test_a_made_up_cursor_is_refused(client: httpx.Client, running: Running, path: str, cursor: str) -> None:
    path = path.replace("HELD", running.held)
    answer = client.get(f"{path}{'&' if '?' in path else '?'}cursor={cursor}")
    assert (answer.status_code, answer.json()["errors"][0]["parameter"]) == (400, "cursor"), answer.text


def test_the_cursor_of_another_order_is_refused(client: httpx.Client) -> None:
    cursor = client.get("/jobs?sort=name&limit=2").json()["next_cursor"]
    answer = client.get(f"/jobs?sort=-name&limit=2&cursor={cursor}")
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_query")


def listed(client: httpx.Client, query: str) -> list[Any]:
    return client.get(f"/jobs?{query}").json()["data"]


def test_jobs_are_sorted_by_each_field(client: httpx.Client, running: Running) -> None:
    names = [job["name"] for job in listed(client, "sort=name&fields=name&limit=100")]
    assert names == ["alpha", "Alpha", "beta", "Delta", "gamma", None, None]
    assert [job["name"] for job in listed(client, "sort=-name&fields=name&limit=100")] == [
        *("gamma", "Delta", "beta", "alpha", "Alpha", None, None)
    ]
    urgent = [job["priority"] for job in listed(client, "sort=-priority&fields=priority&limit=100")]
    assert urgent == sorted(urgent, key=["high", "normal", "low"].index)
    assert [job["id"] for job in listed(client, "sort=created&fields=id&limit=100")] == running.jobs
    assert [job["id"] for job in listed(client, "fields=id&limit=100")] == running.jobs[::-1]
    assert listed(client, "sort=-reward&fields=id,reward&limit=1") == [{"id": running.held, "reward": 0.7}]
    statuses = [job["status"] for job in listed(client, "sort=status&fields=status&limit=100")]
    assert statuses == ["queued"] * 5 + ["running", "cancelled"]
    moments = [job["updated_at"] for job in listed(client, "sort=-updated&fields=updated_at&limit=100")]
    assert moments == sorted(moments, reverse=True)


def test_filters_hold_in_any_order(client: httpx.Client, running: Running) -> None:
    assert listed(client, "sort=name&kind=try&fields=id") == [{"id": running.jobs[3]}]
    assert [job["id"] for job in listed(client, "sort=name&search=ALPHA&fields=id")] == [
        running.jobs[4],
        running.jobs[1],
    ]
    assert listed(client, "sort=name&metadata[place]=2&fields=id") == [{"id": running.jobs[2]}]
    assert listed(client, "sort=-created&status=cancelled&fields=id") == [{"id": running.jobs[1]}]


def test_a_job_that_is_added_between_pages_moves_no_other(client: httpx.Client, running: Running) -> None:
    first = client.get("/jobs?sort=name&limit=3&fields=id").json()
    before = running.submit(9, "aaaa")
    try:
        rest = client.get(f"/jobs?sort=name&limit=100&fields=id&cursor={first['next_cursor']}").json()
        seen = [job["id"] for job in first["data"] + rest["data"]]
        assert sorted(seen) == sorted(running.jobs)
    finally:
        running.api.service.cancel(before, "ann")
        running.api.service.delete(before, "ann")


def test_fields_narrow_an_answer(client: httpx.Client, running: Running) -> None:
    spec = client.get(f"/jobs/{running.held}").json()["spec"]
    asked = "id,spec.model.name,spec.rewards.weights,metadata.place,metadata.none,links.self,error.class"
    assert client.get(f"/jobs/{running.held}", params={"fields": asked}).json() == {
        "id": running.held,
        "spec": {
            "model": {"name": spec["model"]["name"]},
            "rewards": {"weights": spec["rewards"]["weights"]},
        },
        "metadata": {"place": "0"},
        "links": {"self": f"/jobs/{running.held}"},
        "error": None,
    }
    page = client.get("/jobs?fields=id,status")
    assert all(job.keys() == {"id", "status"} for job in page.json()["data"])
    assert len(page.content) < len(client.get("/jobs").content) / 20
    assert (
        client.get(f"/jobs/{running.jobs[2]}?fields=waiting.reason,spec").json()["spec"]
        == client.get(f"/jobs/{running.jobs[2]}").json()["spec"]
    )


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/jobs/HELD/events", "seq,type"),
        ("/jobs/HELD/metrics", "step,reward"),
        ("/rewards", "name,columns"),
        ("/workers", "name,job.id"),
        ("/webhooks", "id,events"),
        ("/datasets", "id,columns"),
        ("/jobs/HELD/checkpoints", "step,files.path"),
        ("/jobs/HELD/artifacts", "path,url"),
        ("/jobs/HELD/rollouts", "step,completion"),
        ("/jobs/HELD/rollouts/steps", "step,prompts"),
    ],
)
def test_every_list_takes_fields(client: httpx.Client, running: Running, path: str, fields: str) -> None:
    answer = client.get(f"{path.replace('HELD', running.held)}?fields={fields}")
    assert answer.status_code == 200, answer.text
    names = {name.partition(".")[0] for name in fields.split(",")}
    assert all(one.keys() == names for one in answer.json()["data"])


@pytest.mark.parametrize("path", ["/jobs", "/jobs/HELD"])
def test_an_unknown_field_is_refused_with_what_there_is(client: httpx.Client, running: Running, path: str) -> None:
    answer = client.get(path.replace("HELD", running.held), params={"fields": "id,status_,spec.model.namee,name.x,"})
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (422, "unknown_field")
    details = [error["detail"].partition(":")[0] for error in problem["errors"]]
    assert details == ["status_", "spec.model.namee", "name.x", ""]
    status, model, name, _ = (error["remedy"] for error in problem["errors"])
    assert status.startswith("Did you mean status? The fields here are id, object, owner, status,")
    assert model.startswith("Did you mean spec.model.name? The fields of spec.model are name, revision,")
    assert name == "name has no fields."
    assert {error["parameter"] for error in problem["errors"]} == {"fields"}


class Counted(httpx.HTTPTransport):
    """Counts what it receives, and plays a service that is older than `fields`."""

    def __init__(self, *, is_old: bool = False) -> None:
        super().__init__()
        self.is_old, self.statuses, self.sizes = is_old, list[int](), list[int]()
        self.asked: list[httpx.URL] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request.url)
        if self.is_old and "fields" in request.url.params:
            error = {"pointer": "", "parameter": "fields", "code": "unknown_parameter", "detail": "", "remedy": ""}
            return httpx.Response(400, json={"code": "bad_query", "detail": "Wrong.", "errors": [error]})
        answer = super().handle_request(request)
        answer.read()
        self.statuses.append(answer.status_code)
        self.sizes.append(answer.num_bytes_downloaded)
        return answer


def test_the_client_reads_only_what_it_needs_and_what_has_changed(running: Running) -> None:
    transport = Counted()
    with GrpoClient(running.api.url, running.key, transport=transport) as client:
        first = client.list(sort="name", fields=["id", "name"])
        assert [job.raw.keys() for job in first.data] == [{"id", "name"}] * len(NAMES)
        assert client.list(sort="name", fields=["id", "name"]) == first
        assert client.get(running.held) == client.get(running.held)
        client.list()
    assert transport.statuses == [200, 304, 200, 304, 200]
    assert transport.sizes[4] < len(json.dumps(first.raw)) * 20, "it is compressed"


def test_the_client_works_with_a_service_that_knows_no_fields(running: Running) -> None:
    transport = Counted(is_old=True)
    with GrpoClient(running.api.url, running.key, transport=transport) as client:
        assert client.list(fields=["id"]).data[0].spec["model"]["name"]
        assert client.list(fields=["id"]).data[0].name == NAMES[-1]
    assert ["fields" in url.params for url in transport.asked] == [True, False, False]


def test_yesterdays_readers_find_what_they_read(client: httpx.Client, running: Running) -> None:
    """Without the new parameters, answers have all that they had, and lists are as long as they were."""
    job = client.get("/jobs").json()["data"][0]
    assert job["spec"]["model"]["name"]
    assert len(client.get(f"/jobs/{running.held}/metrics").json()["data"]) == 7
    events = client.get(f"/jobs/{running.held}/events?after=2&limit=3").json()
    assert events["next_after"] == events["data"][-1]["seq"]
    assert len(client.get("/rewards").json()["data"]) == len([*describe("fixed"), *describe("published")])
    cursor = running.jobs[3]  # a job's id, as earlier releases sent it
    assert [job["id"] for job in client.get(f"/jobs?cursor={cursor}").json()["data"]] == running.jobs[2::-1]
