"""The guide to a new job: a person with a CSV file trains on it, and the guide and its JSON never disagree."""

from __future__ import annotations

import csv
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

Visit = Callable[..., Visitor]
REVIEWS = [("A lovely film", "good"), ("Dull and far too long", "bad")] * 20


def written(path: Path, header: list[str], rows: list[tuple[str, ...]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def upload(visitor: Visitor, path: Path, question: str) -> None:
    """Choose a file, and wait until its first row is shown as a prompt with this question."""
    visitor.step("data")
    visitor.page.locator("#upload").set_input_files(path)
    visitor.page.locator(".prompts .turn.user", has_text=question).first.wait_for()
    visitor.page.locator("#field-data-question_column").wait_for()


def spec_of(visitor: Visitor) -> dict[str, Any]:
    """The JSON of the draft."""
    visitor.page.get_by_role("button", name="JSON", exact=True).first.click()
    spec: dict[str, Any] = json.loads(visitor.page.locator("#json").input_value())
    visitor.page.get_by_role("button", name="Guide").click()
    return spec


def test_a_person_with_a_csv_trains_on_it(visit: Visit, stack: Stack, tmp_path: Path) -> None:
    lines = (ROOT / "examples/tiny/train.jsonl").read_text().splitlines()[:400]
    sums = [(row["question"], row["answer"], "made up") for row in map(json.loads, lines)]
    visitor = visit()
    page = visitor.page
    visitor.log_in("/new")

    # Model: the one that a worker here can run says so.
    tiny = page.locator("label.preset", has_text="tiny-arithmetic")
    assert "A worker that can run it is connected" in tiny.inner_text()
    tiny.click()

    # Data: the columns have names that nobody could guess, and are mapped by hand.
    upload(
        visitor,
        written(tmp_path / "sums.csv", ["note", "sum", "total"], [(one[2], *one[:2]) for one in sums]),
        "made up",
    )
    page.get_by_label("Column with the question").select_option("sum")
    page.get_by_label("Column with the right answer").select_option("total")
    page.get_by_role("button", name="No instructions").click()
    first = page.locator(".prompts .card").first
    visitor.wait(lambda: sums[0][0] in first.inner_text() and "Instructions" not in first.inner_text())
    assert first.locator(".gold").inner_text() == sums[0][1]
    assert "400 rows" in page.locator(".upload-status").inner_text()

    # Reward: a right answer is paid more than a wrong one, on these very rows.
    visitor.step("reward")
    page.get_by_role("button", name="Score both").click()
    page.get_by_text("The wanted answer scores higher").wait_for()
    page.get_by_role("button", name="Number or formula").click()
    page.get_by_label("Right answer between tags").check()
    page.get_by_role("button", name="Score the right answers").click()
    page.get_by_text("right answers score 5").wait_for()

    visitor.step("size")
    page.locator("#field-training-steps").fill("8")
    page.get_by_text("times through the data", exact=False).first.wait_for()
    page.locator("#field-evaluation-questions").fill("20")
    page.get_by_text("With 20 held-out questions").wait_for()
    page.get_by_role("button", name="Next").click()

    # A trial first: it trains nothing and says that the rewards differ.
    page.get_by_role("button", name="Try first").click()
    visitor.arrived(r"#/jobs/job-")
    page.get_by_text("Questions with different rewards").wait_for(timeout=1000 * patience(240))
    page.get_by_role("link", name="Train with these settings").click()
    visitor.arrived(r"#/new\?from=job-")
    assert "kind" not in spec_of(visitor)
    visitor.step("review")
    page.locator("#field-name").fill("from a CSV")
    page.get_by_role("button", name="Submit", exact=True).click()
    visitor.arrived(r"#/jobs/job-")

    # The job trains, and its curve shows the reward that was added.
    job_id = page.url.rsplit("/", 1)[1]
    page.locator(".badge.succeeded").wait_for(timeout=1000 * patience(240))
    stack.wait(job_id, JobStatus.SUCCEEDED)
    metrics = stack.service.metrics(job_id, OWNER)
    assert [metric["step"] for metric in metrics] == list(range(1, 9))
    assert "number" in metrics[-1]["rewards"]
    page.locator(".legend", has_text="number").first.wait_for()


def test_labels_suggest_an_exact_answer(visit: Visit, stack: Stack, tmp_path: Path) -> None:
    visitor = visit()
    page = visitor.page
    visitor.log_in("/new")
    upload(visitor, written(tmp_path / "reviews.csv", ["review", "sentiment"], REVIEWS), "A lovely film")
    spec = spec_of(visitor)
    assert spec["data"] | {"dataset": ""} == {
        "source": "upload",
        "dataset": "",
        "question_column": "review",
        "answer_column": "sentiment",
        "system_prompt": "Answer with exactly one of these and nothing else: bad, good",
    }
    assert spec["rewards"]["graders"]["exact"]["reference"] == "{{item.sentiment}}"
    visitor.step("reward")
    page.get_by_label("How much it counts").fill("3")
    page.get_by_role("button", name="Score both").click()
    page.get_by_text("The wanted answer scores higher: 3 against 0.").wait_for()
    page.locator("#try-unwanted").fill("good")
    page.get_by_role("button", name="Score both").click()
    page.get_by_text("Both score 3").wait_for()


def test_rows_suggest_where_the_answer_is_and_what_fits_it(visit: Visit, stack: Stack, tmp_path: Path) -> None:
    visitor = visit()
    page = visitor.page
    visitor.log_in("/new")
    solved = [(f"What is {n} + 1?", f"One more than {n} is {n + 1}.\n#### {n + 1}") for n in range(12)]
    upload(visitor, written(tmp_path / "solved.csv", ["question", "answer"], solved), "What is 0")
    visitor.wait(lambda: page.locator(".prompts .gold").first.inner_text() == "1")
    spec = spec_of(visitor)
    assert spec["data"]["answer_pattern"] == "#### *(.+)"
    assert "Answer in this format" in spec["data"]["system_prompt"], "the rows are English"
    assert "rewards" not in spec, "the recipe's rewards fit numbers"
    texts = [(f"Describe day {n}", f"Day {n} was long and full of rain, and nobody went out.") for n in range(12)]
    upload(visitor, written(tmp_path / "texts.csv", ["prompt", "response"], texts), "Describe day 0")
    assert spec_of(visitor)["rewards"]["graders"]["similar"]["reference"] == "{{item.response}}"
    visitor.step("reward")
    page.get_by_text("Suggested by the answers in your rows").wait_for()
    upload(visitor, written(tmp_path / "reviews.csv", ["review", "sentiment"], REVIEWS), "A lovely film")
    assert list(spec_of(visitor)["rewards"]["graders"]) == ["exact"]
    visitor.step("reward")
    page.get_by_label("How much it counts").fill("2")
    visitor.expect_refusals(422, "/jobs")  # the reward reads a column that this file lacks
    upload(visitor, written(tmp_path / "more.csv", ["prompt", "response"], texts), "Describe day 0")
    assert list(spec_of(visitor)["rewards"]["graders"]) == ["exact"], "what a person changed stays"


def test_a_file_is_dropped_and_its_chats_are_continued(visit: Visit, stack: Stack) -> None:
    visitor = visit()
    page = visitor.page
    visitor.log_in("/new")
    visitor.step("data")
    chat = [{"role": "system", "content": "One word."}, {"role": "user", "content": "Is it <b>good</b>?"}]
    rows = [{"talk": chat, "label": label, "note": None} for label in ("yes", "no") * 4]
    page.locator(".drop").evaluate(
        """(zone, text) => {
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File([text], "chats.jsonl"));
          zone.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
        }""",
        "".join(json.dumps(row) + "\n" for row in rows),
    )
    page.locator(".prompts .card").first.wait_for()
    visitor.wait(lambda: "One word." in page.locator(".prompts .card").first.inner_text())
    assert "Is it <b>good</b>?" in page.locator(".turn.user").first.inner_text()
    data = spec_of(visitor)["data"]
    assert (data["format"], data["question_column"], data["answer_column"]) == ("messages", "talk", "label")
    assert "system_prompt" not in data, "the chat has its own"
    visitor.step("data")
    page.locator("#field-data-question_column").wait_for()
    options = page.get_by_label("Column with the question").locator("option").all_inner_texts()
    assert options == ["label", "talk (chat)"], "a column with gaps cannot be asked"


def test_a_file_that_cannot_be_read_says_why(visit: Visit, stack: Stack, tmp_path: Path) -> None:
    visitor = visit()
    visitor.expect_refusals(422, "/datasets")
    page = visitor.page
    visitor.log_in("/new")
    visitor.step("data")
    path = tmp_path / "broken.jsonl"
    path.write_text('{"question": "1+1?", "answer": 2}\n{"question": ')
    page.locator("#upload").set_input_files(path)
    alert = page.locator(".upload-status [role=alert]")
    alert.wait_for()
    assert "/lines/2" in alert.inner_text()
    assert "data" not in spec_of(visitor), "nothing was chosen"


def test_a_function_of_ones_own_says_what_is_wrong_with_it(visit: Visit, stack: Stack, tmp_path: Path) -> None:
    visitor = visit()
    visitor.expect_refusals(422, "")
    page = visitor.page
    visitor.log_in("/new")
    upload(visitor, written(tmp_path / "reviews.csv", ["review", "sentiment"], REVIEWS), "A lovely film")
    visitor.step("reward")
    page.get_by_role("button", name="Remove exact").click()
    page.get_by_role("button", name="Your own Python").click()
    source = page.get_by_label("Your function")
    assert page.evaluate("document.activeElement.id") == "grader-name-code"
    source.fill("def grade(sample, item)\n    return 1")
    page.get_by_role("button", name="Score both").click()
    page.locator("[id='field-rewards-graders-code-source'][aria-invalid=true]").wait_for()
    assert page.evaluate("document.activeElement.id") == "field-rewards-graders-code-source"
    source.fill("def grade(sample, item):\n    return float(sample['output_text'] == item['nothing'])")
    page.get_by_role("button", name="Score both").click()
    page.get_by_text("Some of it could not be scored").wait_for()
    assert "KeyError" in page.locator(".scores").inner_text()


def test_what_is_wrong_stands_at_its_field(visit: Visit, stack: Stack) -> None:
    visitor = visit()
    visitor.expect_refusals(422, "/jobs")
    page = visitor.page
    visitor.log_in("/new")
    visitor.step("size")
    page.locator("#field-sampling-generations").fill("1")
    visitor.step("model")
    page.get_by_role("button", name="Check only").click()
    field = page.locator("#field-sampling-generations[aria-invalid=true]")
    field.wait_for()
    assert "2" in page.locator("#field-sampling-generations-error").inner_text()
    assert page.evaluate("document.activeElement.id") == "field-sampling-generations", "its step is open"
    assert page.locator(".steps [data-step=size] .count").inner_text().startswith("1")
    page.locator("#field-sampling-generations").fill("8")
    assert page.locator("[aria-invalid=true]").count() == 0
    page.locator("#step-size .tile .note").first.wait_for()
    page.locator("#field-sampling-max_completion_tokens").fill("8")
    assert page.locator(".steps [data-step=size] .count").inner_text() == "", "an estimate is no warning"
    page.get_by_role("button", name="Check only").click()
    page.get_by_text("This job would be accepted").wait_for()
    note = page.locator(".field", has=page.locator("#field-sampling-max_completion_tokens")).locator(".note")
    assert "cut off" in note.inner_text()
    visitor.step("review")
    resolved = json.loads(page.locator("#step-review pre").text_content() or "")
    assert resolved["sampling"]["generations"] == 8
    assert spec_of(visitor) == {"sampling": {"generations": 8, "max_completion_tokens": 8}}


def test_the_guide_and_the_json_are_one_draft(visit: Visit, stack: Stack) -> None:
    visitor = visit()
    visitor.expect_refusals(422, "/jobs")
    page = visitor.page
    visitor.log_in("/new")
    given = {"sampling": {"hotness": 0.2, "generations": 8}, "metadata": {"k8s.io/team": "x"}, "later": [1]}
    page.get_by_role("button", name="JSON", exact=True).click()
    page.locator("#json").fill(json.dumps(given))
    page.get_by_role("button", name="Guide").click()
    visitor.step("size")
    assert page.locator("#field-sampling-generations").input_value() == "8"
    page.locator("#field-training-steps").fill("12")
    assert spec_of(visitor) == {**given, "training": {"steps": 12}}, "what the guide cannot show is left alone"
    page.get_by_role("button", name="Check only").click()
    page.get_by_text("to correct").first.wait_for()
    assert "/sampling/hotness" in page.locator("#step-size .step-troubles").inner_text()
    assert "/later" in page.locator("#step-review .step-troubles").inner_text()
    page.get_by_role("button", name="JSON", exact=True).first.click()
    for text, said in (("null", "A spec is a JSON object"), ('{"sampling": ', "not JSON")):
        page.locator("#json").fill(text)
        page.get_by_role("button", name="Guide").click()
        assert said in page.locator(".outcome").inner_text()
        assert page.locator("#json").is_visible(), "nothing is thrown away"


def test_a_draft_survives_a_change_of_language(visit: Visit, stack: Stack) -> None:
    visitor = visit()
    visitor.expect_refusals(422, "/jobs", sure=False)  # a learning rate of 5, on the way
    page = visitor.page
    visitor.log_in("/new")
    visitor.step("size")
    page.locator("#field-sampling-generations").fill("8")
    page.get_by_label("Language").select_option("zh")
    page.get_by_label("语言").select_option("en")
    page.get_by_label("Language").wait_for()  # until then the fields are those of the Chinese page
    page.locator("#field-sampling-generations").wait_for()
    assert page.locator("#field-sampling-generations").input_value() == "8"
    rate = page.locator("#field-optimizer-learning_rate")
    rate.evaluate("(one) => (one.closest('details').open = true)")
    rate.fill("")
    rate.press_sequentially("5-e6")
    visitor.page.locator(".steps button[data-step=model]").click()
    page.locator("#field-optimizer-learning_rate[aria-invalid=true]").wait_for()
    assert page.get_by_text("This is not a number.").is_visible()
    rate.fill("5e-6")
    page.get_by_role("button", name="Check only").click()
    page.get_by_text("This job would be accepted").wait_for()


def test_an_english_page_shows_no_key_no_null_and_no_chinese(visit: Visit, stack: Stack) -> None:
    visitor = visit()
    page = visitor.page
    visitor.log_in("/new")
    for step in ("model", "data", "reward", "size", "review"):
        visitor.step(step)
        text = page.locator("main").inner_text()
        assert not re.search(r"\bnull\b|[\u4e00-\u9fff]|[a-z]_[a-z]", text.replace("gsm8k_chinese", "")), step


@pytest.mark.parametrize(("locale", "label"), [("en-US", "“Number of GPUs”"), ("zh-CN", "“GPU 数量”")])
def test_hints_name_fields_as_the_form_does(visit: Visit, locale: str, label: str) -> None:
    visitor = visit(locale=locale)
    page = visitor.page
    visitor.log_in("/new")
    named = set(page.evaluate("fetch('/page/locale/en.json').then((found) => found.json()).then(Object.keys)"))
    hints = ""
    for step in ("model", "data", "reward", "size", "review"):
        visitor.step(step)
        quoted = page.evaluate("[...document.querySelectorAll('.field .hint code')].map((one) => one.textContent)")
        assert not [word for word in quoted if f"field.{word}" in named], step
        hints += page.evaluate("[...document.querySelectorAll('.field .hint')].map((one) => one.textContent).join(' ')")
    assert label in hints
