"""What a team shares, on the page: the fleet and its drains."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from grpo_core.spec import parse_spec
from jobs.auth.api_keys import OWNER_SCOPES
from jobs.store.job import JobStatus, Priority
from tests.browser.conftest import OWNER, Stack, Visitor

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

Visit = Callable[..., Visitor]


def row(visitor: Visitor, worker: str) -> str:
    return visitor.page.locator(f"tr[data-worker={worker}]").inner_text()


def test_an_operator_drains_a_worker_and_lets_it_in_again(visit: Visit, stack: Stack) -> None:
    job_id = stack.made_up("good", "long enough to drain", 5000, 0.05)
    stack.wait(job_id, JobStatus.RUNNING, step=3)
    name = stack.service.get(job_id, OWNER).worker
    assert name is not None
    visitor = visit()
    page = visitor.page
    visitor.log_in("/workers")
    visitor.wait(lambda: "long enough to drain" in row(visitor, name))
    assert "Busy" in row(visitor, name)
    assert page.locator(f"tr[data-worker={name}] a[href='#/jobs/{job_id}']").count() == 1
    page.locator(f"tr[data-worker={name}] button[data-action=drain]").click()
    page.get_by_role("button", name="Keep it").click()
    assert stack.service.get_worker(name).drain is None
    page.locator(f"tr[data-worker={name}] button[data-action=drain]").click()
    page.get_by_role("dialog").get_by_role("button", name="Drain").click()
    visitor.wait(lambda: "Draining" in row(visitor, name))
    assert f"ordered by {OWNER}" in row(visitor, name)
    page.locator(f"tr[data-worker={name}] button[data-action=checkpoint]").click()
    page.get_by_role("dialog").get_by_role("button", name="Give up its job").click()
    visitor.wait(lambda: "Drained" in row(visitor, name), 60)
    stack.wait(job_id, JobStatus.RUNNING)
    assert stack.service.get(job_id, OWNER).worker != name, "another worker goes on with it"
    page.locator(f"tr[data-worker={name}] button[data-action=undrain]").click()
    visitor.wait(lambda: "Idle" in row(visitor, name) or "Busy" in row(visitor, name))
    stack.service.cancel(job_id, OWNER)
    stack.wait(job_id)


def test_others_see_the_fleet_without_whose_job_it_has(visit: Visit, stack: Stack) -> None:
    job_id = stack.made_up("good", "nobody else's", 5000, 0.05)
    stack.wait(job_id, JobStatus.RUNNING, step=3)
    name = stack.service.get(job_id, OWNER).worker
    assert name is not None
    key, _ = stack.service.keys.create("noah", OWNER_SCOPES)
    visitor = visit()
    visitor.log_in("/workers", key=key)
    visitor.wait(lambda: "another owner's" in row(visitor, name))
    assert "nobody else's" not in visitor.page.locator("main").inner_text()
    assert visitor.page.locator("main button[data-action]").count() == 0
    stack.service.cancel(job_id, OWNER)
    stack.wait(job_id)


def test_jobs_are_searched_and_cancelled_together(visit: Visit, stack: Stack) -> None:
    names = ("bulk one", "bulk two", "bulk three")
    ids = [stack.service.submit(parse_spec({"name": name}), OWNER).id for name in names]
    ended = stack.ended("good", "bulk ended", 6)
    stack.service.prioritise(ids[1], OWNER, Priority.HIGH)
    visitor = visit()
    page = visitor.page
    visitor.log_in()
    page.locator("#search").fill("BULK")
    page.locator("#search").press("Enter")
    visitor.arrived("search=BULK")
    shown = "[...document.querySelectorAll('tr[data-job]')].map((one) => one.dataset.job)"
    assert page.evaluate(shown) == [ended, *reversed(ids)]
    page.locator("#priority").select_option("high")
    visitor.arrived("priority=high")
    assert page.evaluate(shown) == [ids[1]]
    assert "High" in page.locator(f"tr[data-job={ids[1]}]").inner_text()
    page.locator("#priority").select_option("")
    visitor.arrived("search=BULK$")
    for job_id in (*ids, ended):
        page.locator(f"tr[data-job={job_id}] input[type=checkbox]").check()
    page.locator(".compare-bar button[data-action=cancel]").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    page.get_by_text("1 job was refused").wait_for()
    assert f"Job {ended} is succeeded" in page.locator(".notes .card.danger").inner_text()
    visitor.wait(lambda: page.locator(".badge.cancelled").count() == 3)
    assert {stack.service.get(job_id, OWNER).status for job_id in ids} == {JobStatus.CANCELLED}
    page.get_by_text("1 job chosen").wait_for()


def test_jobs_are_sorted_and_listed_by_kind(visit: Visit, stack: Stack) -> None:
    last, first = (stack.service.submit(parse_spec({"name": name}), OWNER).id for name in ("zz sorted", "aa sorted"))
    trial = stack.service.submit(parse_spec({"name": "mm sorted", "kind": "try"}), OWNER).id
    visitor = visit()
    page = visitor.page
    visitor.log_in()
    page.locator("#search").fill("sorted")
    page.locator("#search").press("Enter")
    visitor.arrived("search=sorted")
    shown = "[...document.querySelectorAll('tr[data-job]')].map((one) => one.dataset.job)"
    assert page.evaluate(shown) == [trial, first, last]
    sent: list[str] = []
    page.on("response", lambda answer: sent.append(answer.url) if "/jobs?" in answer.url else None)
    page.locator("#sort").select_option("name")
    visitor.arrived("sort=name")
    assert page.evaluate(shown) == [first, trial, last]
    assert all("fields=id" in url for url in sent)
    page.locator("#kind").select_option("try")
    visitor.arrived("kind=try")
    assert page.evaluate(shown) == [trial]
    assert "Trial" in page.locator(f"tr[data-job={trial}]").inner_text()
    for job_id in (first, last, trial):
        stack.service.cancel(job_id, OWNER)


def test_an_operator_lists_the_jobs_of_all_owners(visit: Visit, stack: Stack) -> None:
    job_id = stack.service.submit(parse_spec({"name": "of noah"}), "noah").id
    visitor = visit()
    page = visitor.page
    visitor.log_in("/?search=of+noah")
    page.get_by_text("No job matches").wait_for()
    page.locator("#everyone").check()
    visitor.arrived("owner=")
    assert "noah" in page.locator(f"tr[data-job={job_id}] .tag").first.inner_text()
    stack.service.cancel(job_id, "noah")
