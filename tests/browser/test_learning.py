"""The page while a real job trains: from the log-in to the verdict, as one person would go through it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.store.job import JobStatus
from tests.browser.conftest import OWNER, ROOT, Stack, Visitor
from tests.clock import patience

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1200)]

STEPS = 40


def test_a_person_sees_a_model_learn(visit: Callable[..., Visitor], stack: Stack, tmp_path: Path) -> None:
    visitor = visit(locale="en-US")
    page = visitor.page
    visitor.log_in("/new")

    # Submit: a real file to train on, the example's values pasted as JSON, one value changed in the guide.
    lines = (ROOT / "examples/tiny/train.jsonl").read_text().splitlines()
    questions = tmp_path / "arithmetic.jsonl"
    questions.write_text("\n".join(lines) + "\n")
    visitor.step("data")
    page.locator("#upload").set_input_files(questions)
    page.locator(".prompts .card").first.wait_for()
    page.get_by_role("button", name="JSON", exact=True).click()
    dataset = json.loads(page.locator("#json").input_value())["data"]["dataset"]
    spec = json.loads((ROOT / "examples/tiny/job.json").read_text())
    spec["data"]["dataset"] = dataset
    spec["training"] |= {"steps": STEPS, "checkpoint_every": 10}
    spec["evaluation"] = {"questions": 60, "max_completion_tokens": 48}
    page.locator("#json").fill(json.dumps(spec))
    page.get_by_role("button", name="Guide").click()
    visitor.step("review")
    page.locator("#field-name").fill("tiny arithmetic")
    page.get_by_role("button", name="Check only").click()
    page.get_by_text("This job would be accepted").wait_for()
    page.get_by_role("button", name="Submit", exact=True).click()
    visitor.arrived(r"#/jobs/job-")
    job_id = re.search(r"job-\w{26}", page.url)[0]  # type: ignore[index]
    assert stack.service.get(job_id, OWNER).spec["name"] == "tiny arithmetic"

    # The reward arrives by itself, without a reload.
    page.evaluate("window.stayed = true")
    page.locator(".chart.big canvas").first.wait_for(timeout=1000 * patience(120))
    count = page.locator(".progress-tile .count")
    visitor.until("parseInt(document.querySelector('.progress-tile .count').textContent) >= 12", seconds=120)
    assert page.locator(".live .live").inner_text() == "Live"

    # Pause, as a person does it; what was trained stays, and goes on.
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("dialog").get_by_role("button", name="Pause").click()
    page.locator(".badge.paused").wait_for(timeout=1000 * patience(60))
    paused_at = stack.service.get(job_id, OWNER).step
    assert 0 < paused_at < STEPS
    page.get_by_role("button", name="Resume").click()
    page.get_by_role("dialog").get_by_role("button", name="Resume").click()

    # While it loads again: the completions of the step whose point is clicked.
    box = page.locator(".chart.big .u-over").first.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
    visitor.arrived(r"/rollouts\?step=\d+$")
    step = int(page.url.rsplit("=", 1)[1])
    with stack.http() as http:
        stored = http.get(f"/jobs/{job_id}/rollouts?step={step}&limit=48").json()["data"]
    assert page.locator(".rollout").count() == len(stored) == 48
    shown = page.locator(".rollout .completion").first.inner_text()
    assert shown.split() == stored[0]["completion"].split()

    # One prompt's worst and best, then two of them word by word.
    visitor.photograph("page-rollouts")
    picks = page.locator(".group").first.get_by_role("button", name="Compare")
    picks.nth(0).click()
    picks.nth(1).click()
    page.locator("dialog.diff-dialog .completion").first.wait_for()
    visitor.photograph("page-diff")
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="detached")

    page.get_by_role("link", name="Curves").click()
    page.locator(".badge.succeeded").wait_for(timeout=1000 * patience(180))
    assert page.evaluate("window.stayed"), "the page was never loaded again"
    assert count.inner_text() == f"{STEPS} / {STEPS}"
    stack.wait(job_id, JobStatus.SUCCEEDED)
    metrics = stack.service.metrics(job_id, OWNER)
    assert [metric["step"] for metric in metrics] == list(range(1, STEPS + 1))
    rewards = [metric["reward"] for metric in metrics]
    assert sum(rewards[-5:]) > sum(rewards[:5]), "it learnt something"
    page.locator(".chart.big details summary").first.click()
    cells = page.locator(".chart.big").first.locator("tbody tr")
    cells.first.wait_for()
    assert cells.count() == STEPS
    assert cells.last.locator("td").inner_text() == f"{rewards[-1]:.2f}"
    page.locator(".chart.big details summary").first.click()
    page.evaluate("scrollTo(0, document.querySelector('.tabs').offsetTop - 60)")
    visitor.photograph("page-curves")
    page.evaluate("scrollTo(0, 0)")

    # The verdict is the report's.
    page.get_by_role("link", name="Report", exact=True).click()
    page.locator(".verdict").first.wait_for()
    with stack.http() as http:
        report = http.get(f"/page/reports/{job_id}").json()["evaluation"]
    assert report["paired"]["strict"]["verdict"] in page.locator(".verdict").first.inner_text()
    form = report["paired"]["format"]["counts"]
    row = page.get_by_role("region", name="Question by question").locator("tr", has_text="In the required format")
    assert row.locator("td").all_inner_texts()[:2] == [str(form["both"]), str(form["gained"])]
    assert page.locator(".samples .group").count() == 10
    assert page.locator(".samples .completion").nth(1).inner_text().split() == report["samples"][0]["after"].split()
    visitor.photograph("page-report")

    # What is left: each file with the hash that the service names.
    page.get_by_role("link", name="Files").click()
    row = page.locator("tr", has_text="adapter/adapter_model.safetensors")
    with stack.http() as http:
        files = {file["path"]: file for file in http.get(f"/jobs/{job_id}/artifacts").json()["data"]}
    assert row.locator("[title]").first.get_attribute("title") == files["adapter/adapter_model.safetensors"]["sha256"]
    with page.expect_download() as download:
        page.locator("tr", has_text="adapter/adapter_config.json").get_by_role("link").click()
    assert Path(download.value.path()).stat().st_size == files["adapter/adapter_config.json"]["size"]

    visitor.go("/?metadata=example%3Dtiny")
    page.locator(f"tr[data-job={job_id}] svg.spark").wait_for()
    assert page.locator("tr[data-job]").count() == 1

    # The pictures of the documents are of this run: made-up ones would show figures that nobody measured.
    phone = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}
    looks: dict[str, dict[str, Any]] = {
        "dark": {"color_scheme": "dark"},
        "chinese": {"locale": "zh-CN"},
        "phone": phone,
    }
    for name, look in looks.items():
        other = visit(**look)
        other.log_in(f"/jobs/{job_id}")
        other.page.locator(".charts canvas").first.wait_for()
        if name == "chinese":
            told = other.page.locator(".card.warning", has_text="format_not_asked").inner_text()
            assert "几乎不会有回答得到奖励" in told
            assert "hardly any completion" not in told
        other.photograph(f"page-{name}")
