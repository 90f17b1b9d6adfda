"""What happens around the page: connections that break, windows that are hidden, others who act meanwhile."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from jobs.store.job import JobStatus
from tests.browser.conftest import OWNER, Stack, Visitor

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

Visit = Callable[..., Visitor]

WINDOW = """{
  window.sources = [];
  const Original = window.EventSource;
  window.EventSource = class extends Original {
    constructor(...all) {
      super(...all);
      window.sources.push(this);
    }
  };
  let isHidden = %s;
  Object.defineProperty(document, "hidden", { get: () => isHidden, configurable: true });
  window.hide = (value) => {
    isHidden = value;
    document.dispatchEvent(new Event("visibilitychange"));
  };
}"""
OPEN = "window.sources.filter((one) => one.readyState !== EventSource.CLOSED).length"


def watched(visit: Visit, *, hidden: bool = False, **options: Any) -> Visitor:
    """A visitor whose window can be hidden, and tells its streams."""
    visitor = visit(**options)
    visitor.page.add_init_script(WINDOW % json.dumps(hidden))
    return visitor


def running(stack: Stack, name: str, seconds: float = 0.05, steps: int = 4000) -> str:
    job_id = stack.made_up("good", name, steps, seconds)
    stack.wait(job_id, JobStatus.RUNNING, step=3)
    return job_id


def end(stack: Stack, job_id: str) -> None:
    stack.service.cancel(job_id, OWNER)
    stack.wait(job_id)


def refuse(route: Any) -> None:
    problem = {"code": "unavailable", "detail": "Storage did not answer.", "errors": [], "request_id": "r"}
    route.fulfill(status=503, json=problem)


def steps_of(page: Any) -> list[int]:
    """The steps in the table below the first chart."""
    table = page.locator(".chart.big details").first
    if table.get_attribute("open") is None:
        table.locator("summary").click()
    return [int(text) for text in table.locator("tbody th").all_inner_texts()]


def is_whole(steps: list[int]) -> bool:
    """Whether no step is missing: every nth is in the table, which has 200 rows at most, and the last."""
    gaps = {later - earlier for earlier, later in pairwise(steps[:-1])}
    return len(gaps) == 1 and steps[-1] - steps[-2] <= max(gaps)


def test_a_window_has_one_stream_however_often_it_was_hidden(visit: Visit, stack: Stack) -> None:
    job_id = running(stack, "hidden and shown")
    visitor = watched(visit)
    visitor.expect_refusals(503, "/jobs/")
    page = visitor.page
    visitor.log_in(f"/jobs/{job_id}")
    visitor.wait(lambda: page.evaluate(OPEN) == 1)
    page.route(re.compile(rf"/jobs/{job_id}$"), refuse)
    for _ in range(4):
        page.evaluate("hide(true)")
        assert page.evaluate(OPEN) == 0, "a hidden window takes no connection"
        page.evaluate("hide(false)")
        page.wait_for_timeout(100)
    page.unroute_all()
    visitor.wait(lambda: page.evaluate(OPEN) == 1)
    page.wait_for_timeout(3500)  # another round of attempts, were there any left
    assert page.evaluate(OPEN) == 1
    held: list[Any] = []
    page.route(re.compile(rf"/jobs/{job_id}$"), lambda route: held.append(route))
    page.evaluate("hide(true)")
    page.evaluate("hide(false)")
    visitor.wait(lambda: held)
    visitor.go("/")
    held[0].continue_()
    page.wait_for_timeout(300)
    assert page.evaluate(OPEN) == 0, "it was left before it came back"
    end(stack, job_id)


def test_a_window_that_nobody_has_seen_takes_no_connection(visit: Visit, stack: Stack) -> None:
    job_id = running(stack, "opened behind others")
    visitor = watched(visit, hidden=True)
    page = visitor.page
    page.goto(f"{stack.url}/#/jobs/{job_id}")
    page.locator("#key").fill(stack.key)
    page.locator("#key").press("Enter")
    page.locator(".charts canvas").first.wait_for()
    assert page.evaluate(OPEN) == 0
    page.evaluate("hide(false)")
    visitor.wait(lambda: page.evaluate(OPEN) == 1)
    page.locator(".live .live").wait_for()
    end(stack, job_id)


def test_no_step_is_lost_where_answers_come_late(visit: Visit, stack: Stack) -> None:
    job_id = running(stack, "late answers", 0.03)
    visitor = watched(visit)
    page = visitor.page
    visitor.log_in()
    page.route(re.compile(r"/events\?.*limit="), lambda route: (page.wait_for_timeout(3000), route.continue_()))
    visitor.go(f"/jobs/{job_id}")
    visitor.wait(lambda: len(steps_of(page)) > 60, seconds=60)
    assert is_whole(steps_of(page))
    page.route(re.compile("/metrics$"), lambda route: (page.wait_for_timeout(1500), route.continue_()))
    stack.service.pause(job_id, OWNER)
    stack.wait(job_id, JobStatus.PAUSED)
    paused = stack.service.resume(job_id, OWNER).step
    visitor.wait(lambda: max(steps_of(page), default=0) > paused + 60, seconds=60)
    page.wait_for_timeout(2000)  # the answer that was asked for at the resume
    assert is_whole(steps_of(page))
    end(stack, job_id)


def test_a_job_that_was_deleted_elsewhere_is_shown_as_gone(visit: Visit, stack: Stack) -> None:
    job_id = running(stack, "deleted elsewhere")
    visitor = watched(visit)
    page = visitor.page
    visitor.log_in(f"/jobs/{job_id}")
    page.evaluate("hide(true)")
    end(stack, job_id)
    visitor.expect_refusals(404, f"/jobs/{job_id}")
    stack.service.delete(job_id, OWNER)
    page.evaluate("hide(false)")
    page.get_by_role("heading", name="Not found").wait_for()
    assert page.get_by_role("button", name="Cancel").count() == 0
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(4000)
    assert [url for url in asked if job_id in url] == []


def test_a_job_has_ended_also_where_its_record_cannot_be_read_then(visit: Visit, stack: Stack) -> None:
    job_id = running(stack, "ends unseen")
    visitor = watched(visit)
    visitor.expect_refusals(503, "/jobs/")
    page = visitor.page
    visitor.log_in(f"/jobs/{job_id}")
    page.locator(".live .live").wait_for()
    page.route(re.compile(rf"/jobs/{job_id}$"), refuse)
    end(stack, job_id)
    page.locator(".badge.cancelled").wait_for()
    page.wait_for_timeout(1500)
    with page.expect_response(lambda answer: answer.url.endswith(job_id) and answer.ok):
        page.unroute_all()


def test_an_empty_tab_of_rollouts_fills_itself(visit: Visit, stack: Stack) -> None:
    job_id = stack.made_up("good", "has none yet", 4000, 0.2)
    visitor = visit()
    page = visitor.page
    visitor.log_in()
    page.route(re.compile("/rollouts"), lambda route: route.fulfill(json={"data": [], "has_more": False}))
    visitor.go(f"/jobs/{job_id}/rollouts")
    page.get_by_text("No rollouts here").wait_for()
    stack.wait(job_id, JobStatus.RUNNING, step=3)
    page.unroute_all()
    page.locator(".rollout").first.wait_for()
    step = stack.service.get(job_id, OWNER).step
    visitor.go(f"/jobs/{job_id}/rollouts?step={step}")
    page.get_by_role("button", name="Next step").click()
    visitor.arrived(rf"step={step + 1}$")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") in ("Next step", None)
    end(stack, job_id)


def test_what_was_refused_can_be_tried_again(visit: Visit, stack: Stack) -> None:
    job_id = stack.ended("good", "recipe", 60)
    visitor = visit()
    visitor.expect_refusals(503, "")
    visitor.expect_trouble("net::ERR_FAILED", "/session$")
    page = visitor.page
    visitor.log_in()
    for tab, part in (("files", "artifacts"), ("report", "reports"), ("rollouts", "rollouts"), ("spec", "/schema/job")):
        page.route(re.compile(part), refuse)
        visitor.go(f"/jobs/{job_id}/{tab}")
        page.locator(".panel [role=alert]").wait_for()
        page.unroute_all()
        page.get_by_role("button", name="Try again").click()
        page.locator(".panel [role=alert]").wait_for(state="detached")
        visitor.settled()
        assert page.locator(".panel .card").count() > 0, tab
    page.route(re.compile("/session$"), refuse)
    page.reload()
    page.get_by_role("button", name="Try again").wait_for()
    assert page.locator("#key").count() == 0, "nobody was logged out"
    page.unroute_all()
    page.get_by_role("button", name="Try again").click()
    page.locator(".panel .card").first.wait_for()
    page.route(re.compile("/session$"), lambda route: route.abort())
    page.get_by_role("button", name="Log out").click()
    page.get_by_text("you are still logged in").wait_for()
    assert page.locator("#key").count() == 0
    page.unroute_all()
    page.get_by_role("button", name="Log out").click()
    page.locator("#key").wait_for()


def test_what_one_is_at_stays_while_a_job_goes_on(visit: Visit, stack: Stack) -> None:
    job_id = running(stack, "goes on", 0.1)
    stack.wait(job_id, JobStatus.RUNNING, step=20)
    visitor = visit()
    page = visitor.page
    visitor.log_in(f"/jobs/{job_id}")
    button = page.locator(".chart.big").nth(1).locator(".legend button").first
    button.focus()
    box = page.locator(".chart.big .u-over").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 50, steps=5)
    page.mouse.up()
    ticks = "[...document.querySelectorAll('.chart.big')][0].querySelector('.legend .at').textContent"
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 50)
    before = int(page.evaluate(ticks).removeprefix("step "))
    count = stack.service.get(job_id, OWNER).step
    stack.wait(job_id, JobStatus.RUNNING, step=count + 20)
    page.wait_for_timeout(1500)
    page.mouse.move(box["x"] + box["width"] - 3, box["y"] + 50)
    assert int(page.evaluate(ticks).removeprefix("step ")) == before < count, "the chosen part stays"
    button.focus()
    page.wait_for_timeout(1500)
    assert page.evaluate("document.activeElement.tagName") == "BUTTON"
    page.get_by_role("link", name="Events").focus()
    page.keyboard.press("Enter")
    visitor.arrived("/events$")
    assert page.evaluate("document.activeElement.textContent").startswith("Events")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("dialog").wait_for()
    page.go_back()
    page.get_by_role("dialog").wait_for(state="detached")
    assert stack.service.get(job_id, OWNER).status is JobStatus.RUNNING
    end(stack, job_id)


def test_a_key_with_a_slash_stays_one(visit: Visit, stack: Stack) -> None:
    metadata = {"made_up": "good", "k8s.io/team": "x", "a~b": "y"}
    job_id = stack.ended("good", "with a slash", 3, metadata=metadata)
    visitor = visit()
    page = visitor.page
    visitor.log_in(f"/jobs/{job_id}/spec")
    keys = page.locator(".spec dt").all_inner_texts()
    assert {"k8s.io/team", "a~b"} <= set(keys)
    visitor.go(f"/new?from={job_id}")
    page.get_by_role("button", name="Check only").click()
    page.get_by_text("This job would be accepted").wait_for()
    visitor.step("review")
    assert json.loads(page.locator("#step-review pre").text_content() or "")["metadata"] == metadata
    visitor.go("/?metadata=team%3D")
    page.get_by_text("Write the filter as key=value").wait_for()


def test_long_names_fit_a_phone(visit: Visit, stack: Stack) -> None:
    name = "n" * 95
    jobs = [stack.ended("good", name + part, 3, metadata={"made_up": "good", "k" * 60: "v" * 120}) for part in "ab"]
    visitor = visit(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    visitor.log_in()
    for path in ("/", f"/jobs/{jobs[0]}", f"/jobs/{jobs[0]}/spec", f"/compare?a={jobs[0]}&b={jobs[1]}"):
        visitor.go(path)
        assert visitor.too_wide() == [], path
