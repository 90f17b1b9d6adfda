"""What a team shares, on the page: the fleet and its drains."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from jobs.auth.api_keys import OWNER_SCOPES
from jobs.store.job import JobStatus
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
