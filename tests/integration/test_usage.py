"""Who used what: GPU-hours of every run by day, owner and kind of GPU, through kills and a loss of Valkey, and cost."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import httpx
import pytest

from grpo_client import GrpoClient, ProblemError
from grpo_client.cli import main
from grpo_core.spec import parse_spec
from jobs.auth.api_keys import OPERATOR, OWNER_SCOPES
from jobs.lifecycle.rebuild import Rebuild
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store.job import JobStatus
from jobs.usage.gpu_time import GpuTime
from jobs.usage.prices import Prices, PriceSettings
from jobs.usage.report import UsageRow
from tests.integration.running import RunningApi, in_environment

HOUR = 3_600_000
TODAY = datetime.now(UTC).date()
EVERY = (TODAY - timedelta(days=40), TODAY)


@pytest.fixture
def storage(own_bucket: StorageSettings) -> StorageSettings:
    return own_bucket


@pytest.fixture
def service(storage: StorageSettings, queue_settings: QueueSettings) -> JobService:
    prices = PriceSettings.model_validate({"by_gpu": "H200=3, A100=1.5", "currency": "EUR"})
    service = JobService(storage, queue_settings, prices=prices)
    service.check_storage()
    return service


@dataclass
class Fleet:
    """Runs of made-up lengths, as workers claim and end them."""

    service: JobService

    def submit(self, owner: str = "ann", **resources: int) -> str:
        return self.service.submit(parse_spec({"resources": resources} if resources else {}), owner).id

    def claim(self, job_id: str, gpu: str = "H200", *, hosts: int = 0) -> int:
        epoch = self.service.write_once.allocate_epoch(job_id, "w", datetime.now(UTC).isoformat(), gpu=gpu, hosts=hosts)
        assert epoch is not None
        store = self.service.job_store
        assert store.claim(job_id, epoch=epoch, worker="w", lease_seconds=60, gpu=gpu, hosts=hosts)
        return epoch

    def end(self, job_id: str, epoch: int, hours: float, to: JobStatus = JobStatus.SUCCEEDED) -> None:
        """End a run that took so long."""
        store = self.service.job_store
        store.change(job_id, fields={"run_at": store.now_ms() - int(hours * HOUR)})
        assert store.change(job_id, epoch=epoch, to=to).done


@pytest.fixture
def fleet(service: JobService) -> Fleet:
    return Fleet(service)


def shown(rows: list[UsageRow]) -> list[tuple[str, str, float, int]]:
    return [(row.owner, row.gpu, round(row.gpu_hours, 1), row.jobs) for row in rows]


def test_every_attempt_counts_by_owner_and_gpu_whatever_its_end(service: JobService, fleet: Fleet) -> None:
    job, other = fleet.submit(), fleet.submit("bob", gpus=2)
    fleet.end(job, fleet.claim(job), 1, JobStatus.QUEUED)
    fleet.end(job, fleet.claim(job, "A100"), 2, JobStatus.QUEUED)
    fleet.end(job, fleet.claim(job), 0.5, JobStatus.FAILED)
    fleet.end(other, fleet.claim(other), 1, JobStatus.SUCCEEDED)
    cpu = service.submit(parse_spec({"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}}), "ann")
    service.job_store.claim(cpu.id, epoch=1, worker="w", lease_seconds=60)
    service.job_store.change(cpu.id, epoch=1, to=JobStatus.FAILED)
    expected = [("ann", "A100", 2.0, 1), ("ann", "H200", 1.5, 1), ("bob", "H200", 2.0, 1)]
    assert shown(service.usage_rows(None, *EVERY, "total")) == expected
    assert shown(service.usage_rows("bob", *EVERY, "total")) == expected[2:]
    record = service.get(job, "ann")
    assert {gpu: round(ms / HOUR, 1) for gpu, ms in record.gpu_ms.items()} == {"H200": 1.5, "A100": 2.0}
    costs = [row.cost for row in service.usage_rows(None, *EVERY, "total")]
    assert costs == [pytest.approx(3, abs=0.01), pytest.approx(4.5, abs=0.01), pytest.approx(6, abs=0.01)]


def test_a_run_of_fewer_hosts_than_asked_for_counts_those_it_had(service: JobService, fleet: Fleet) -> None:
    job = fleet.submit(gpus=2, hosts=3, min_hosts=1)
    fleet.end(job, fleet.claim(job, hosts=2), 1)
    assert shown(service.usage_rows("ann", *EVERY, "total")) == [("ann", "H200", 4.0, 1)]


def test_a_run_over_midnight_counts_in_each_day_and_a_job_once_in_each_period(
    service: JobService, fleet: Fleet
) -> None:
    job = fleet.submit()
    day = timedelta(days=1)
    service.job_store.claim(job, epoch=1, worker="w", lease_seconds=60, gpu="H200")
    began = datetime.combine(TODAY - 2 * day, datetime.min.time(), UTC) + timedelta(hours=18)
    service.job_store.change(job, fields={"run_at": int(began.timestamp() * 1000)})
    going = service.usage_rows("ann", *EVERY, "day")
    assert [(row.start, round(row.gpu_hours)) for row in going[:2]] == [(TODAY - 2 * day, 6), (TODAY - day, 24)]
    service.job_store.change(job, epoch=1, to=JobStatus.QUEUED)
    over = service.usage_rows("ann", *EVERY, "day")
    assert [row.start for row in over] == [TODAY - 2 * day, TODAY - day, TODAY]
    assert [(row.gpu_hours, row.jobs) for row in over] == [(pytest.approx(row.gpu_hours, abs=0.01), 1) for row in going]
    (total,) = service.usage_rows("ann", *EVERY, "total")
    assert (total.gpu_hours, total.jobs) == (pytest.approx(sum(row.gpu_hours for row in over)), 1)
    weeks = service.usage_rows("ann", *EVERY, "week")
    assert all(row.start.weekday() == 0 for row in weeks)
    assert sum(row.gpu_hours for row in weeks) == pytest.approx(total.gpu_hours)
    assert service.usage_rows("ann", TODAY - day, TODAY - day, "day") == over[1:2]


def test_a_lost_valkey_loses_no_hour_and_counts_none_twice(
    service: JobService, fleet: Fleet, storage: StorageSettings, queue_settings: QueueSettings
) -> None:
    ended, going = fleet.submit(), fleet.submit()
    fleet.end(ended, fleet.claim(ended, "A100"), 2, JobStatus.QUEUED)
    epoch = fleet.claim(going)
    GpuTime(service.job_store, service.store).save()
    client = service.job_store.client
    client.delete(*client.keys(f"{service.job_store.prefix}:*"))
    Rebuild.of(storage, queue_settings).run()
    assert shown(service.usage_rows("ann", *EVERY, "total")) == [("ann", "A100", 2.0, 1), ("ann", "H200", 0.0, 1)]
    # The worker still has it: its next heartbeat says since when.
    service.job_store.beat(going, epoch=epoch, lease_seconds=60, held_seconds=3 * 3600)
    for _ in range(2):
        rows = shown(service.usage_rows("ann", *EVERY, "total"))
        assert rows == [("ann", "A100", 2.0, 1), ("ann", "H200", 3.0, 1)]
        GpuTime(service.job_store, service.store).save()
    service.job_store.beat(going, epoch=epoch, lease_seconds=60, held_seconds=9 * 3600)
    assert service.job_store.change(going, epoch=epoch, to=JobStatus.FAILED).done
    rows = shown(service.usage_rows("ann", *EVERY, "total"))
    assert rows == [("ann", "A100", 2.0, 1), ("ann", "H200", 3.0, 1)], "only a record that was put back asks"


def test_runs_of_an_earlier_release_count_without_the_name_of_their_gpus(service: JobService) -> None:
    day = (TODAY - date(1970, 1, 1)).days
    service.job_store.run_script("tally", "ann", str(day), json.dumps({"job-1:1": 2 * HOUR, "job-2:1": HOUR}))
    service.job_store.client.hset(f"{service.job_store.prefix}:usage:ann", str(day - 20), str(5 * HOUR))
    service.job_store.client.sadd(f"{service.job_store.prefix}:users", "ann")
    rows = service.usage_rows(None, *EVERY, "day")
    assert shown(rows) == [("ann", "", 5.0, 0), ("ann", "", 3.0, 2)]
    assert [row.cost for row in rows] == [None, None], "whose price is not known costs nothing known"


@pytest.fixture
def api(service: JobService) -> Iterator[RunningApi]:
    api = RunningApi(service)
    with api.run():
        yield api


@pytest.fixture
def client(api: RunningApi) -> Callable[..., GrpoClient]:
    def client(owner: str, *scopes: str) -> GrpoClient:
        key, _ = api.service.keys.create(owner, [*OWNER_SCOPES, *scopes])
        return GrpoClient(api.url, key)

    return client


def test_owners_see_their_own_and_operators_everyone(fleet: Fleet, client: Callable[..., GrpoClient]) -> None:
    for owner in ("ann", "bob", "=cmd"):
        owner = owner.replace("=", "@")
        job = fleet.submit(owner)
        fleet.end(job, fleet.claim(job), 1)
    with client("bob") as bob, client("chief", OPERATOR) as chief:
        assert {row.owner for row in bob.gpu_hours(since=EVERY[0]).data} == {"bob"}
        assert bob.gpu_hours(since=EVERY[0]).currency == "EUR"
        for whose in ("ann", "*"):
            with pytest.raises(ProblemError) as refused:
                bob.gpu_hours(owner=whose)
            assert refused.value.status == 403
        with pytest.raises(ProblemError) as refused:
            bob.owners_usage()
        assert refused.value.status == 403
        assert [each.owner for each in chief.owners_usage(limit=100).data] == ["@cmd", "ann", "bob"]
        first = chief.gpu_hours(since=EVERY[0], owner="*", by="total", limit=2)
        assert [row.owner for row in first.data] == ["@cmd", "ann"]
        rest = chief.gpu_hours(since=EVERY[0], owner="*", by="total", limit=2, cursor=first.next_cursor)
        assert ([row.owner for row in rest.data], rest.next_cursor) == (["bob"], None)
        table = list(csv.DictReader(io.StringIO(chief.gpu_hours_csv(since=EVERY[0], owner="*", by="total"))))
        assert [(line["owner"], line["gpu"], float(line["gpu_hours"]), line["currency"]) for line in table] == [
            ("'@cmd", "H200", pytest.approx(1, abs=0.01), "EUR"),
            ("ann", "H200", pytest.approx(1, abs=0.01), "EUR"),
            ("bob", "H200", pytest.approx(1, abs=0.01), "EUR"),
        ]


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ({"since": "yesterday"}, "since"),
        ({"since": "2026-03-01", "until": "2026-02-01"}, "since"),
        ({"since": "2024-01-01", "until": "2026-02-01"}, "since"),
        ({"by": "hour"}, "by"),
        ({"cursor": "x"}, "cursor"),
    ],
)
def test_a_wrong_question_names_its_parameter(api: RunningApi, query: dict[str, str], name: str) -> None:
    key, _ = api.service.keys.create("ann")
    headers = {"Authorization": f"Bearer {key}"}
    answer = httpx.get(f"{api.url}/usage/gpu-hours", params=query, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_query")
    assert [error["parameter"] for error in answer.json()["errors"]] == [name]
    assert answer.json()["errors"][0]["remedy"]


def test_the_command_prints_lines_json_and_csv(
    api: RunningApi,
    fleet: Fleet,
    storage: StorageSettings,
    queue_settings: QueueSettings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = fleet.submit()
    fleet.end(job, fleet.claim(job), 2)
    key, _ = api.service.keys.create("chief", [*OWNER_SCOPES, OPERATOR])
    for name, value in {**in_environment(storage, queue_settings), "GRPO_URL": api.url, "GRPO_API_KEY": key}.items():
        monkeypatch.setenv(name, value)

    def run(*words: str, code: int = 0) -> Any:
        with pytest.raises(SystemExit) as raised:
            main(["usage", *words])
        assert raised.value.code == code
        return "\n".join(line for line in capsys.readouterr().out.splitlines() if "[info" not in line)

    lines = run("--owner", "*").splitlines()
    assert lines[0].split() == ["from", "owner", "GPU", "GPU-hours", "jobs", "cost", "(EUR)"]
    assert lines[1].split()[1:] == ["ann", "H200", "2.00", "1", "6.00"]
    assert json.loads(run("--owner", "ann", "--by", "week", "--json"))["data"][0]["gpu"] == "H200"
    assert run("--owner", "*", "--csv").splitlines()[0] == "start,owner,gpu,gpu_hours,jobs,cost,currency"
    assert run("--everyone").splitlines()[1].split()[:2] == ["ann", "2"]
    run("--everyone", "--by", "day", code=2)
    run("--since", "2026-13-01", code=2)


def test_a_price_is_found_by_the_words_of_the_name() -> None:
    prices = Prices(PriceSettings.model_validate({"by_gpu": "NVIDIA H200=3, A100=1, NVIDIA A100 PCIe=0.5, *=9"}))
    names = ("NVIDIA H200", "H200 141 GB", "h200", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB", "NVIDIA H2000", "")
    assert [prices.per_hour(name) for name in names] == [3, 3, 3, 1, 0.5, 9, 9]
    assert Prices(PriceSettings.model_validate({"by_gpu": "H200=0"})).cost({"H200": 5.0}) == 0
    assert Prices(PriceSettings.model_validate({"by_gpu": "H200=1"})).cost({"H200": 1.0, "L4": 1.0}) is None
    assert Prices(PriceSettings.model_validate({"by_gpu": ""})).currency is None


@pytest.mark.parametrize("text", ["H200", "H200=x", "=3", "H200=-1", "H200=nan", "H200=inf"])
def test_a_wrong_price_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"H200|=3"):
        PriceSettings.model_validate({"by_gpu": text})


def test_a_job_and_a_dry_run_say_what_it_costs(fleet: Fleet, client: Callable[..., GrpoClient]) -> None:
    job = fleet.submit()
    fleet.end(job, fleet.claim(job), 2, JobStatus.QUEUED)
    fleet.end(job, fleet.claim(job, "A100"), 1, JobStatus.QUEUED)
    cpu = fleet.service.submit(parse_spec({"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}}), "ann").id
    with client("ann") as ann:
        use = ann.get(job).use
        assert use is not None
        assert (use.gpu_hours, use.cost, use.currency) == (
            pytest.approx(3, abs=0.01),
            pytest.approx(7.5, abs=0.01),
            "EUR",
        )
        assert {one.gpu for one in use.by_gpu} == {"H200", "A100"}
        fleet.service.job_store.claim(job, epoch=9, worker="w", lease_seconds=60, gpu="no price")
        fleet.service.job_store.change(job, fields={"run_at": fleet.service.job_store.now_ms() - HOUR})
        use = ann.get(job).use
        assert use is not None
        assert (use.gpu_hours, use.cost) == (pytest.approx(4, abs=0.01), None), "up to now, and one has no price"
        assert ann.get(cpu).use is None
        found = ann.dry_run({"resources": {"gpus": 1}})
        (one,) = [one for one in found.costs if str(one.gpu).startswith("H200")]
        assert one.cost == pytest.approx(3 * one.gpu_hours, abs=0.001)
        assert one.gpu_hours > 0
        assert found.currency == "EUR"


def test_without_a_price_nothing_has_a_cost(
    storage: StorageSettings, queue_settings: QueueSettings, client: Callable[..., GrpoClient], fleet: Fleet
) -> None:
    fleet.service.prices = Prices(PriceSettings.model_validate({"by_gpu": ""}))
    job = fleet.submit()
    fleet.end(job, fleet.claim(job), 2)
    with client("ann") as ann:
        found, use, rows = ann.dry_run({}), ann.get(job).use, ann.gpu_hours()
        assert use is not None
        assert (found.costs, found.currency, use.cost, use.currency, rows.currency) == ([], None, None, None, None)
        assert {row.cost for row in rows.data} == {None}
        assert ann.gpu_hours_csv().splitlines()[1].endswith(",,")
