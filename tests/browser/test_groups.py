"""A sweep in a browser: its table, its way there from the list, and the end of all its jobs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from grpo_core.spec.sweep import parse_sweep
from jobs.store.job import JobStatus
from tests.browser.conftest import OWNER, Stack, Visitor

pytestmark = [pytest.mark.browser]
Visit = Callable[..., Visitor]


def sweep(stack: Stack, name: str, **more: Any) -> str:
    spec = {
        "name": name,
        "metadata": {"made_up": "good", "step_seconds": "0.005"},
        "resources": {"gpus": 0},
        "optimizer": {"name": "adamw_torch"},
        "training": {"steps": 12},
        **more,
    }
    specs = parse_sweep({"spec": spec, "grid": {"lr": [1e-5, 3e-5]}, "repeat": 2})
    return stack.service.submit_group(specs, OWNER)[0]


def test_a_group_is_one_table(visit: Visit, stack: Stack) -> None:
    group = sweep(stack, "swept")
    jobs = stack.service.group(group, OWNER)
    for job in jobs:
        stack.wait(job.id, JobStatus.SUCCEEDED)
    visitor = visit()
    page = visitor.page
    visitor.log_in()
    page.locator(f"tr[data-job={jobs[0].id}]").get_by_role("link", name="Group of jobs").click()
    visitor.arrived(f"/groups/{group}$")
    table = page.locator("section", has=page.get_by_role("heading", name="Settings")).locator("tbody tr")
    assert table.count() == 2
    assert re.search(r"0\.00001\s+2\s+\d+\.\d\d ± \d+\.\d\d", table.first.inner_text())
    assert page.locator("section", has=page.get_by_role("heading", name="Jobs")).locator("tbody tr").count() == 4
    assert page.get_by_role("button", name="Cancel all").count() == 0
    page.get_by_role("heading", name="Curves").wait_for()
    assert page.locator(".charts figure").first.locator(".legend li:not(.at)").count() == 4
    phone = visit(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    phone.log_in(f"/groups/{group}")
    assert phone.too_wide() == []

    visitor.go("/")
    for job in jobs[:3]:
        page.locator(f"tr[data-job={job.id}] input[type=checkbox]").check()
    page.locator(".compare-bar").get_by_role("link", name="Compare").click()
    visitor.arrived("/comparison")
    assert page.locator("section").first.locator("tbody tr").count() == 2


def test_a_group_is_cancelled_as_one(visit: Visit, stack: Stack) -> None:
    group = sweep(stack, "waits", resources={"gpus": 1}, optimizer={"name": "adamw_torch"})
    visitor = visit(locale="zh-CN")
    page = visitor.page
    visitor.log_in(f"/groups/{group}")
    page.get_by_text("尚有任务未结束。").wait_for()
    page.get_by_role("button", name="全部取消").click()
    page.get_by_role("dialog").get_by_role("button", name="全部取消").click()
    page.locator(".badge.cancelled").first.wait_for()
    assert {job.status for job in stack.service.group(group, OWNER)} == {JobStatus.CANCELLED}
