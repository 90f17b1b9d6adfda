"""Any row of the data set as a prompt: found, asked, scored with all its columns as in training, and in the link."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import pytest

from grpo_core.datasets import JsonlChecker
from grpo_core.spec import parse_spec
from jobs.store.job import JobStatus
from tests.browser.conftest import OWNER, ROOT, Stack, Visitor
from tests.browser.test_playground import START_MS, answered, end_sessions
from tests.clock import patience

if TYPE_CHECKING:
    from playwright.sync_api import Request

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

ROWS, HELD_OUT = 300, 8
NEAR = """
def grade(sample, item):
    numbers = [int(word) for word in sample["output_text"].split() if word.isdecimal()]
    print(item["target"]["value"])
    return float(item["target"]["value"] in numbers) + 0.25
"""
GRADERS = {
    "near": {"type": "python", "source": NEAR},
    "unit": {
        "type": "string_check",
        "input": "{{sample.output_text}}",
        "reference": "{{item.unit}}",
        "operation": "ne",
    },
}


def made_rows() -> list[dict[str, Any]]:
    lines = (ROOT / "examples/tiny/train.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]
    rows = [json.loads(line) for line in lines]
    return [
        {**row, "target": {"value": int(row["answer"])}, "unit": f"u{number}", "note": "línea 1\r\nlínea 2"}
        for number, row in enumerate(rows)
    ]


def store(stack: Stack, folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    checker = JsonlChecker()
    checker.feed(path.read_bytes())
    return stack.service.store_dataset(path, checker.finish(), OWNER, "graded")[0].id


def train(stack: Stack, dataset: str, **data: Any) -> str:
    spec = json.loads((ROOT / "examples/tiny/job.json").read_text())
    spec["name"], spec["metadata"] = "graded", {"example": "rows"}
    spec["data"] |= {"dataset": dataset, **data}
    spec["training"] |= {"steps": 2, "checkpoint_every": 2, "save_steps": 2}
    spec["evaluation"] = {"questions": HELD_OUT, "max_completion_tokens": 48}
    spec["rewards"] = {"graders": GRADERS, "weights": {"correctness": 2.0, "near": 1.0, "unit": 0.5}}
    job_id = stack.service.submit(parse_spec(spec), OWNER).id
    stack.wait(job_id, seconds=240)
    assert stack.service.get(job_id, OWNER).status is JobStatus.SUCCEEDED
    return job_id


@pytest.fixture(scope="module")
def graded(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A job whose graders read other columns than the answer."""
    job_id = train(stack, store(stack, tmp_path_factory.mktemp("graded"), made_rows()), max_rows=ROWS)
    yield job_id
    end_sessions(stack, job_id)


def serve(visitor: Visitor) -> None:
    page = visitor.page
    page.locator("#serving .ready, #serve").first.wait_for()
    if page.locator("#serve").count():
        page.locator("#serve").click()
    page.get_by_text("The model is ready").wait_for(timeout=START_MS)


def scores_of(visitor: Visitor, place: int) -> dict[str, str]:
    """The scores beneath an answer, and their total."""
    card = visitor.page.locator(".talk-answer").nth(place)
    lines = [line.split("\n") for line in card.locator(".rewards li").all_inner_texts()]
    named = {
        name.strip(): value.strip() for name, value in (re.split(r"\s+(?=\S+$)", " ".join(line)) for line in lines)
    }
    return {**named, "total": card.locator(".score .reward").inner_text()}


def asked_of(visitor: Visitor, count: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Ask, and return the requests to the models and the answers."""
    bodies: list[dict[str, Any]] = []

    def take(request: Request) -> None:
        if "chat/completions" in request.url:
            bodies.append(request.post_data_json or {})

    visitor.page.on("request", take)
    visitor.page.get_by_role("button", name="Ask").click()
    texts = answered(visitor, count)
    visitor.page.remove_listener("request", take)
    return bodies, texts


def test_a_row_is_found_asked_and_scored_as_in_training(
    visit: Callable[..., Visitor], stack: Stack, graded: str
) -> None:
    visitor = visit()
    page = visitor.page
    visitor.log_in(f"/talk/{graded}")
    serve(visitor)
    rows = made_rows()

    # Pages of rows to train on, by number, and by a text in them; the last ones are held out.
    page.get_by_label("Prompt from").select_option("train")
    page.get_by_text("Rows 1 to 292").wait_for()
    assert page.locator(".rows-found button").count() == 6
    page.get_by_role("button", name="More rows").click()
    page.locator(".rows-found [data-row='6']").wait_for()
    page.get_by_role("button", name="Earlier rows").click()
    page.locator(".rows-found [data-row='0']").wait_for()
    page.get_by_label("Text in it").fill(rows[200]["question"])
    page.get_by_label("Text in it").press("Enter")
    page.locator(".rows-found [data-row='200']").wait_for()
    page.get_by_label("Row number").fill("293")
    page.get_by_label("Row number").press("Enter")
    page.get_by_text("There is no row with this number here").wait_for()
    page.get_by_label("Row number").fill("43")
    page.get_by_label("Row number").press("Enter")
    page.get_by_text("Row 43 of the training data").wait_for()
    assert page.locator("#prompt").input_value() == rows[42]["question"]
    page.get_by_text("3 other columns").click()
    assert page.locator(".row-columns dd").all_inner_texts()[:2] == [f'{{"value":{rows[42]["answer"]}}}', "u42"]

    # The prompt is the one of training, and each score what training would pay.
    bodies, texts = asked_of(visitor, 2)
    with stack.http() as http:
        (row,) = http.get(f"/jobs/{graded}/rows", params={"first": 42, "limit": 1}).json()["data"]
        spec = http.get(f"/jobs/{graded}").json()["spec"]
        assert {json.dumps(body["messages"]) for body in bodies} == {json.dumps(row["messages"])}
        body = {"spec": spec, "rows": [{"item": rows[42], "model_sample": text} for text in texts]}
        found = http.post("/graders/score", json=body).json()
    assert set(found["printed"]["near"].split()) == {rows[42]["answer"]}
    for place, one in enumerate(found["data"]):
        shown = scores_of(visitor, place)
        assert {name: float(shown[name]) for name in GRADERS} == {
            name: pytest.approx(one["rewards"][name], abs=0.005) for name in GRADERS
        }
        assert float(shown["total"]) == pytest.approx(one["reward_total"], abs=0.005)
    assert page.locator("#unscored").count() == 0

    # The link names the row, and neither its question nor its answer.
    address = page.url.split("#")[1]
    assert f"part=train&row=42&hash={row['sha256'][:12]}" in address
    assert "prompt=" not in address
    assert "answer=" not in address
    other = visit(viewport={"width": 360, "height": 740})
    other.log_in(address)
    assert answered(other, 2) == texts
    assert other.page.locator("#prompt").input_value() == rows[42]["question"]
    assert scores_of(other, 0) == scores_of(visitor, 0)
    other.page.get_by_label("Prompt from").select_option("held_out")
    other.page.locator(".rows-found [data-row='292']").wait_for()
    assert other.too_wide() == []

    # What is changed of it stands in the link, and the other columns are still the row's.
    page.locator("#prompt").fill("1+1=?")
    page.get_by_text("(changed; the scores use its other columns)").wait_for()
    bodies, texts = asked_of(visitor, 2)
    assert bodies[0]["messages"][-1] == {"role": "user", "content": "1+1=?"}
    assert "row=42" in page.url
    assert "prompt=1%2B1" in page.url
    assert scores_of(visitor, 0)["near"] != "–"


def test_a_completion_of_training_can_be_asked_again(visit: Callable[..., Visitor], graded: str) -> None:
    visitor = visit()
    visitor.log_in(f"/jobs/{graded}/rollouts")
    link = visitor.page.locator("[data-ask]").first
    row = int(link.get_attribute("data-ask") or "")
    link.click()
    visitor.page.get_by_text(f"Row {row + 1} of the training data").wait_for()
    assert visitor.page.locator("#prompt").input_value() == made_rows()[row]["question"]


def test_a_prompt_of_ones_own_says_which_columns_graders_miss(
    visit: Callable[..., Visitor], stack: Stack, graded: str
) -> None:
    visitor = visit()
    page = visitor.page
    visitor.log_in(f"/talk/{graded}")
    serve(visitor)
    page.locator("#prompt").fill("3+4=?")
    visitor.expect_refusals(422, "/graders/score")
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("Give the right answer: the job's rewards compare with it.").wait_for()
    page.locator("#answer").fill("7")
    asked_of(visitor, 2)
    shown = scores_of(visitor, 0)
    assert (shown["near"], shown["unit"], shown["total"]) == ("–", "–", "–")
    assert shown["correctness"] != "–"
    said = page.locator("#unscored").inner_text()
    assert "near: target" in said
    assert "unit: unit" in said
    assert "Choose a row of the data set" in said

    # An address of an earlier release has the question and the answer, and repeats it.
    old = {"prompt": "3+4=?", "answer": "7", "models": "base", "seed": "1", "temperature": "0", "tokens": "48"}
    before = visit()
    before.log_in(f"/talk/{graded}?{urlencode(old)}")
    answered(before, 1)
    assert (before.page.locator("#prompt").input_value(), before.page.locator("#answer").input_value()) == (
        "3+4=?",
        "7",
    )
    assert before.page.get_by_label("Prompt from").input_value() == "own"
    # So has one that names a held-out question of the report: it is that row now.
    before.go(f"/talk/{graded}?question=0")
    before.page.get_by_text("Row 293, held out").wait_for()
    assert before.page.locator("#prompt").input_value() == made_rows()[292]["question"]


def test_the_terminal_asks_a_row_and_shows_its_scores(stack: Stack, graded: str) -> None:
    def grpo(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "GRPO_URL": stack.url, "GRPO_API_KEY": stack.key, "PYTHONUTF8": "1"}
        command = [sys.executable, "-m", "grpo_client", "chat", graded, *words]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=patience(120), check=False
        )

    done = grpo("--row", "42", "--base")
    assert done.returncode == 0, done.stderr
    row = made_rows()[42]
    assert done.stdout.startswith(row["question"])
    assert f"row 42, answer {row['answer']}" in done.stderr
    found = json.loads(grpo("--row", "42", "--base", "--json").stdout)
    text = found["completion"]["choices"][0]["message"]["content"]
    with stack.http() as http:
        body = {"spec": http.get(f"/jobs/{graded}").json()["spec"], "rows": [{"item": row, "model_sample": text}]}
        (score,) = http.post("/graders/score", json=body).json()["data"]
    assert found["scores"]["data"][0]["rewards"] == score["rewards"]
    assert f"{text}\nreward {score['reward_total']:g}  (" in done.stdout
    assert f"near {score['rewards']['near']:g}" in done.stdout

    held_out = grpo("--row", "292")
    assert (held_out.returncode, "add --held-out" in held_out.stderr) == (2, True)
    assert json.loads(grpo("--row", "292", "--held-out", "--json").stdout)["row"]["values"] == made_rows()[292]
    beyond = grpo("--row", "300", "--held-out")
    assert (beyond.returncode, "they are 292 to 299" in beyond.stderr) == (2, True)
    assert grpo("--row", "1", "--prompt", "x").returncode == grpo("--held-out").returncode == 2


def test_rows_that_are_gone_or_changed_are_said_to_be(
    visit: Callable[..., Visitor], stack: Stack, tmp_path: Path
) -> None:
    dataset = store(stack, tmp_path, made_rows())
    job_id = train(stack, dataset)
    visitor = visit()
    page = visitor.page
    visitor.log_in(f"/talk/{job_id}?row=5&part=train&hash=000000000000")
    page.get_by_text("Row 6 has changed since this link was made").wait_for()
    visitor.go(f"/talk/{job_id}?row=5000&part=train&hash=000000000000")
    page.get_by_text("Row 5,001 cannot be shown").wait_for()
    stack.service.delete_dataset(dataset, OWNER)
    visitor.go(f"/talk/{job_id}?row=6&part=train&hash=000000000000")
    page.get_by_text("Row 7 cannot be shown").wait_for()
    assert "was deleted" in page.locator("#row-trouble").inner_text()
    # The questions in its records can be asked still.
    page.get_by_label("Prompt from").select_option("held_out")
    page.locator("#rows-unavailable").wait_for()
    page.locator(".rows-found button").first.click()
    assert page.locator("#prompt").input_value() == made_rows()[ROWS - HELD_OUT]["question"]
    page.get_by_label("Prompt from").select_option("train")
    page.locator(".rows-found button").first.click()
    assert page.locator("#prompt").input_value() in {row["question"] for row in made_rows()}
