"""A person talks to the model that a job trained: base and steps side by side, from a real serving job."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from grpo_core.datasets import JsonlChecker
from grpo_core.spec import parse_spec
from jobs.store.job import TERMINAL, JobStatus
from tests.browser.conftest import OWNER, ROOT, Stack, Visitor

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

START_MS = 120_000


@pytest.fixture(scope="module")
def trained(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A job that has trained the tiny model for a few steps; what serves it is ended with the tests."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_bytes(b"".join((ROOT / "examples/tiny/train.jsonl").read_bytes().splitlines(keepends=True)[:300]))
    checker = JsonlChecker()
    checker.feed(rows.read_bytes())
    dataset = stack.service.store_dataset(rows, checker.finish(), OWNER, "sums")[0]
    spec = json.loads((ROOT / "examples/tiny/job.json").read_text())
    spec["name"], spec["metadata"] = "a few steps", {"example": "playground"}
    spec["data"]["dataset"] = dataset.id
    spec["training"] |= {"steps": 4, "checkpoint_every": 2, "save_steps": 2}
    spec["evaluation"] = {"questions": 8, "max_completion_tokens": 48}
    job_id = stack.service.submit(parse_spec(spec), OWNER).id
    stack.wait(job_id, seconds=240)
    assert stack.service.get(job_id, OWNER).status is JobStatus.SUCCEEDED
    yield job_id
    end_sessions(stack, job_id)


def end_sessions(stack: Stack, job_id: str) -> None:
    for record in sessions(stack, job_id):
        stack.service.cancel(record, OWNER)
        stack.wait(record)


def sessions(stack: Stack, job_id: str) -> list[str]:
    """The unfinished jobs that serve it."""
    found = stack.service.list_jobs(OWNER, limit=100).items
    serving = [record for record in found if record.spec.get("kind") == "serving"]
    return [one.id for one in serving if one.spec["serving"]["job"] == job_id and one.status not in TERMINAL]


def answered(visitor: Visitor, count: int) -> list[str]:
    """The whole answers, once every column has its own with a score."""
    visitor.until(
        f"document.querySelectorAll('.talk-answer:not([aria-busy]) .talk-scores .reward').length === {count}", 90
    )
    return visitor.page.locator(".talk-answer > .completion").all_inner_texts()


def test_a_person_talks_to_base_and_steps_side_by_side(
    visit: Callable[..., Visitor], stack: Stack, trained: str
) -> None:
    end_sessions(stack, trained)
    visitor = visit()
    page = visitor.page
    visitor.log_in(f"/jobs/{trained}")
    page.get_by_role("link", name="Talk to it").click()
    visitor.arrived(rf"#/talk/{trained}$")

    # It is not served: a button starts it, and says what it waits for until it answers.
    page.get_by_text("The model is not being served").wait_for()
    assert page.get_by_role("button", name="Ask").is_disabled()
    page.get_by_label("Prompt from").select_option("held_out")
    page.locator(".rows-found button").first.click()
    question, answer = page.locator("#prompt").input_value(), page.locator("#answer").input_value()
    with stack.http() as http:
        samples = http.get(f"/page/reports/{trained}").json()["evaluation"]["samples"]
    assert (question, answer) == (samples[0]["question"], samples[0]["answer"])
    page.get_by_label("Step 2").check()
    page.get_by_role("button", name="Start the model").click()
    page.get_by_text("Starting the model").wait_for()
    page.get_by_text("The model is ready").wait_for(timeout=START_MS)

    # Three models answer, each with the time to its first words and the scores of the job's rewards.
    page.get_by_role("button", name="Ask").click()
    texts = answered(visitor, 3)
    assert page.locator(".talk-answer h2").all_inner_texts() == ["Base model", "Trained model", "Step 2"]
    assert all(texts)
    for facts in page.locator(".talk-answer > .hint").all_inner_texts():
        assert facts.startswith("First words after ")
    names = page.locator(".talk-answer").first.locator(".rewards li").all_inner_texts()
    assert any("correctness" in name for name in names)
    visitor.photograph("page-playground")

    # The address repeats it, in another window.
    other = visit(viewport={"width": 360, "height": 740})
    other.log_in(page.url.split("#")[1])
    assert answered(other, 3) == texts
    assert other.page.locator("#prompt").input_value() == question
    assert other.too_wide() == []

    # Another system prompt is part of the address too.
    page.get_by_text("System prompt and sampling").click()
    page.locator("#system").fill("Answer in one word.")
    page.locator("#tokens").fill("12")
    page.get_by_role("button", name="Ask").click()
    answered(visitor, 3)
    assert "system=Answer+in+one+word." in page.url


def test_it_says_that_nothing_answers_any_more_and_starts_again(
    visit: Callable[..., Visitor], stack: Stack, trained: str
) -> None:
    visitor = visit()
    page = visitor.page
    visitor.log_in(f"/talk/{trained}")
    page.locator("#serving .ready, #serve").first.wait_for()
    if page.locator("#serve").count():
        page.locator("#serve").click()
    page.get_by_text("The model is ready").wait_for(timeout=START_MS)
    (session,) = sessions(stack, trained)
    stack.service.cancel(session, OWNER)
    stack.wait(session)
    # Whether the page has noticed by itself or not: a question gets no answer, and a word about why.
    visitor.expect_refusals(409, "/v1/chat/completions", sure=False)
    page.locator("#prompt").fill("1+1")
    if page.get_by_role("button", name="Ask").is_enabled():
        page.get_by_role("button", name="Ask").click(force=True)
    page.get_by_text("The model is no longer served").wait_for(timeout=60_000)
    page.get_by_role("button", name="Start again").click()
    page.get_by_text("The model is ready").wait_for(timeout=START_MS)
    assert len(sessions(stack, trained)) == 1


def test_a_key_that_may_only_read_starts_nothing(visit: Callable[..., Visitor], stack: Stack, trained: str) -> None:
    key, _ = stack.service.keys.create(OWNER, ["jobs:read"])
    visitor = visit()
    visitor.stack = Stack(stack.api, key)
    end_sessions(stack, trained)
    visitor.log_in(f"/talk/{trained}")
    visitor.page.get_by_text("Your key may only read").wait_for()
    assert visitor.page.locator("#serve").count() == 0
