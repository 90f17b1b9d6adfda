"""What an operator and a team's members look up and do on the page without a terminal: usage and keys."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable

import pytest

from grpo_client import GrpoClient, ProblemError
from grpo_core.spec import parse_spec
from jobs.auth.api_keys import KEYS_WRITE, OWNER_SCOPES
from jobs.store.job import JobStatus
from jobs.usage.prices import Prices, PriceSettings
from tests.browser.conftest import Stack, Visitor

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

Visit = Callable[..., Visitor]
HOUR = 3_600_000


@pytest.fixture
def used(stack: Stack) -> None:
    """Two owners' runs on GPUs that no worker of this stack has."""
    store = stack.service.job_store
    for owner, gpu, hours in (("uma", "H200", 2.0), ("uma", "A100", 1.0), ("vic", "H200", 4.0)):
        job = stack.service.submit(parse_spec({"name": f"{owner} on {gpu}"}), owner).id
        assert store.claim(job, epoch=1, worker="elsewhere", lease_seconds=60, gpu=gpu)
        store.change(job, fields={"run_at": store.now_ms() - int(hours * HOUR)})
        assert store.change(job, epoch=1, to=JobStatus.FAILED).done


def rows(visitor: Visitor) -> list[list[str]]:
    lines = visitor.page.locator("#usage tbody tr").all()
    return [[cell.inner_text() for cell in line.locator("td").all()] for line in lines]


@pytest.mark.usefixtures("used")
def test_an_operator_finds_who_used_what_and_a_member_what_is_theirs(visit: Visit, stack: Stack) -> None:
    visitor = visit()
    page = visitor.page
    visitor.log_in("/workers")
    page.get_by_role("link", name="Usage").click()
    visitor.arrived("usage")
    page.locator("#everyone").check()
    visitor.arrived("owner=")
    page.locator("tr[data-owner=vic][data-gpu=H200]").wait_for()
    found = [row for row in rows(visitor) if row[0] in ("uma", "vic")]
    assert found == [["uma", "A100", "1.00", "1"], ["uma", "H200", "2.00", "1"], ["vic", "H200", "4.00", "1"]]
    page.locator("#by").select_option("week")
    visitor.arrived("by=week")
    page.get_by_role("columnheader", name="Week from").wait_for()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download CSV").click()
    table = list(csv.DictReader(io.StringIO(download.value.path().read_text())))
    assert {line["owner"] for line in table} >= {"uma", "vic"}
    key, _ = stack.service.keys.create("vic", OWNER_SCOPES)
    member = visit()
    member.log_in("/usage", key=key)
    member.page.locator("tr[data-owner=vic]").wait_for()
    assert [row[0] for row in rows(member)] == ["vic"]
    assert member.page.locator("#everyone").count() == 0
    assert "no limit" in member.page.locator("dl.tiles").inner_text()


def test_a_member_makes_a_key_uses_it_and_revokes_it(visit: Visit, stack: Stack) -> None:
    own, _ = stack.service.keys.create("kim", [*OWNER_SCOPES, KEYS_WRITE], name="of kim")
    stack.service.keys.create("lee", OWNER_SCOPES, name="of lee")
    visitor = visit()
    page = visitor.page
    visitor.log_in("/keys", key=own)
    page.get_by_text("of kim").wait_for()
    assert page.get_by_text("of lee").count() == 0
    page.get_by_text("New key").click()
    offered = page.evaluate("[...document.querySelectorAll('[data-scope]')].map((one) => one.value)")
    assert offered == ["jobs:read", "jobs:write", "datasets:write", "keys:write"], "what it has itself"
    page.locator("#key-name").fill("laptop")
    page.locator("[data-scope='jobs:write']").uncheck()
    page.locator("#key-days").select_option("30")
    page.get_by_role("button", name="Create key").click()
    page.get_by_text("Copy the key now").wait_for()
    secret = page.locator("input.secret").input_value()
    with GrpoClient(stack.url, secret) as client:
        assert client.usage().owner == "kim"
        made = client.keys(limit=1).data[0]
    assert (made.name, made.scopes) == ("laptop", ["jobs:read", "datasets:write"])
    assert made.expires_at is not None
    page.get_by_role("button", name="I have copied it").click()
    assert secret not in page.content()
    row = page.locator(f"tr[data-key={made.id}]")
    assert secret[:9] in row.inner_text()
    row.locator("button[data-action=revoke]").click()
    page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
    row.get_by_text("Revoked").wait_for()
    with GrpoClient(stack.url, secret) as client, pytest.raises(ProblemError) as refused:
        client.usage()
    assert refused.value.status == 401


def test_who_revokes_the_key_of_this_session_is_logged_out(visit: Visit, stack: Stack) -> None:
    own, record = stack.service.keys.create("moe", [*OWNER_SCOPES, KEYS_WRITE], name="of moe")
    visitor = visit()
    page = visitor.page
    visitor.log_in("/keys", key=own)
    visitor.expect_refusals(401, "/keys")
    page.locator(f"tr[data-key={record.id}] button[data-action=revoke]").click()
    page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
    page.get_by_role("button", name="Log in").wait_for()


def test_an_operator_sees_all_keys_and_revokes_one(visit: Visit, stack: Stack) -> None:
    key, record = stack.service.keys.create("nora", OWNER_SCOPES, name="of nora")
    visitor = visit()
    page = visitor.page
    visitor.log_in("/keys")
    page.locator("#everyone").check()
    visitor.arrived("owner=")
    row = page.locator(f"tr[data-key={record.id}]")
    row.wait_for()
    assert "nora" in row.inner_text()
    row.locator("button[data-action=revoke]").click()
    page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
    row.get_by_text("Revoked").wait_for()
    assert stack.service.authenticate(key) is None


def test_a_price_gives_jobs_and_usage_a_cost(visit: Visit, stack: Stack) -> None:
    store = stack.service.job_store
    job = stack.service.submit(parse_spec({"name": "has a price"}), "pia").id
    assert store.claim(job, epoch=1, worker="elsewhere", lease_seconds=60, gpu="NVIDIA H200")
    store.change(job, fields={"run_at": store.now_ms() - 2 * HOUR})
    assert store.change(job, epoch=1, to=JobStatus.FAILED).done
    key, _ = stack.service.keys.create("pia", OWNER_SCOPES)
    free, visitor = stack.service.prices, visit()
    page = visitor.page
    visitor.log_in(f"/jobs/{job}", key=key)
    page.locator("#spent").get_by_text("2 GPU-hours").wait_for()
    assert "EUR" not in page.locator("#spent").inner_text()
    stack.service.prices = Prices(PriceSettings.model_validate({"by_gpu": "NVIDIA H200=3", "currency": "EUR"}))
    try:
        page.reload()
        page.locator("#spent").get_by_text("6.00 EUR").wait_for()
        page.goto(f"{stack.url}/#/usage")
        page.get_by_role("columnheader", name="Cost (EUR)").wait_for()
        assert [row[-1] for row in rows(visitor)] == ["6.00"]
    finally:
        stack.service.prices = free
