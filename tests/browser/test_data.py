"""A team member manages data on the page: uploads a file and sees how far it is, reads rows, deletes a data set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo_core.spec import parse_spec
from jobs.auth.api_keys import OWNER_SCOPES
from tests.browser.conftest import Stack, Visitor

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

Visit = Callable[..., Visitor]


def file_of(folder: Path, name: str, rows: int) -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps({"question": f"{row}+1=?", "answer": row + 1}) for row in range(rows)))
    return path


def test_a_file_is_uploaded_read_and_kept_while_a_job_needs_it(visit: Visit, stack: Stack, tmp_path: Path) -> None:
    key, _ = stack.service.keys.create("dana", OWNER_SCOPES)
    visitor = visit()
    page = visitor.page
    visitor.log_in("/", key=key)
    page.get_by_role("navigation").get_by_role("link", name="Data").click()
    page.get_by_text("No data sets yet").wait_for()
    page.locator("#upload").set_input_files(file_of(tmp_path, "sums.jsonl", 50))
    page.get_by_role("link", name="sums.jsonl").click()
    (made,) = stack.service.list_datasets("dana", limit=5).items
    visitor.arrived(made.id)
    page.get_by_text("No job uses it").wait_for()
    assert made.sha256 in page.locator("main").inner_text()
    page.locator("tr[data-row='19']").wait_for()
    assert "0+1=?" in page.locator("tr[data-row='0']").inner_text()
    assert page.locator("tr[data-row='20']").count() == 0
    page.get_by_role("button", name="Show more").click()
    page.locator("tr[data-row='39']").wait_for()
    spec = parse_spec({"name": "needs sums", "data": {"source": "upload", "dataset": made.id}})
    job = stack.service.submit(spec, "dana")
    page.reload()
    page.locator(f"li[data-job={job.id}]").wait_for()
    assert "needs sums" in page.locator(f"li[data-job={job.id}]").inner_text()
    visitor.expect_refusals(409, f"/datasets/{made.id}")
    page.locator("button[data-action=delete]").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    page.locator(".notes .card.danger").wait_for()
    assert job.id in page.locator(".notes .card.danger").inner_text()
    stack.service.cancel(job.id, "dana")
    page.locator("button[data-action=delete]").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    visitor.arrived("/datasets$")
    page.get_by_text("No data sets yet").wait_for()
    assert stack.service.list_datasets("dana", limit=5).items == []


def test_a_file_with_a_fault_says_where(visit: Visit, stack: Stack, tmp_path: Path) -> None:
    key, _ = stack.service.keys.create("emil", OWNER_SCOPES)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "1+1=?", "answer": 2}\nnot json\n')
    visitor = visit()
    page = visitor.page
    visitor.log_in("/datasets", key=key)
    visitor.expect_refusals(422, "/datasets")
    page.locator("#upload").set_input_files(bad)
    page.locator(".upload-status .card.danger").wait_for()
    assert "/lines/2" in page.locator(".upload-status").inner_text()
    page.locator("#upload").set_input_files(file_of(tmp_path, "good.jsonl", 3))
    page.get_by_role("link", name="good.jsonl").wait_for()


def test_a_slow_upload_says_how_much_was_sent_and_can_be_stopped(visit: Visit, stack: Stack, tmp_path: Path) -> None:
    key, _ = stack.service.keys.create("finn", OWNER_SCOPES)
    large = file_of(tmp_path, "large.jsonl", 200_000)
    visitor = visit()
    page = visitor.page
    visitor.log_in("/datasets", key=key)
    page.get_by_text("No data sets yet").wait_for()
    slow = page.context.new_cdp_session(page)
    network = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 200_000}
    slow.send("Network.emulateNetworkConditions", network)
    page.locator("#upload").set_input_files(large)
    visitor.wait(lambda: page.locator("progress").evaluate("(one) => one.value") > 0)
    assert "/" in page.locator(".uploading .sub").inner_text()
    page.get_by_role("button", name="Stop").click()
    page.locator(".uploading").wait_for(state="detached")
    slow.send("Network.emulateNetworkConditions", {**network, "uploadThroughput": -1})
    page.locator("#upload").set_input_files(file_of(tmp_path, "small.jsonl", 3))
    page.get_by_role("link", name="small.jsonl").wait_for()
    assert [one.name for one in stack.service.list_datasets("finn", limit=5).items] == ["small.jsonl"]


def test_an_operator_sees_the_data_of_all_owners(visit: Visit, stack: Stack, tmp_path: Path) -> None:
    from grpo_client import GrpoClient

    key, _ = stack.service.keys.create("gina", OWNER_SCOPES)
    with GrpoClient(stack.url, key) as gina:
        made = gina.upload_dataset(file_of(tmp_path, "hers.jsonl", 3), name="hers")
    visitor = visit()
    page = visitor.page
    visitor.log_in("/datasets")
    page.locator("#everyone").check()
    visitor.arrived("owner=")
    row = page.locator(f"tr[data-dataset={made.id}]")
    row.wait_for()
    assert "gina" in row.inner_text()
    row.get_by_role("link").click()
    page.locator("tr[data-row='2']").wait_for()
