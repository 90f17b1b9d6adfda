"""Whole runs of the tiny model with a judge that fails at times, on chats, with an evaluation data set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_core.rewards.graders import calls
from grpo_core.run_dir.records import read_rollouts
from tests.integration.children import GENERATIONS, PROMPTS, ROWS, SPEC, Run
from tests.integration.test_judges import environment, judge, serving
from tests.integration.test_resume import give

Finish = Callable[..., Run]
TOKENS = 100
"""What the test's server says that a judgement took."""


def retry_at_once() -> None:
    calls._FIRST_WAIT = 0.01


def chats(path: Path, *, first: int, count: int) -> str:
    """Rows of the demo as chats."""
    rows = [json.loads(line) for line in ROWS.read_text("utf-8").splitlines()[first : first + count]]
    lines = [
        {"messages": [{"role": "user", "content": row["question"]}], "answer": row["answer"], "note": "a column"}
        for row in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def judged(folder: Path, **sections: Any) -> dict[str, Any]:
    """A job that is paid by a judge and for right answers."""
    data = {
        "source": "file",
        "dataset": chats(folder / "train.jsonl", first=0, count=64),
        "format": "messages",
        "system_prompt": "",
    }
    rewards = {
        "graders": {"judge": judge("{{item.note}} {{item.answer}}: {{sample.output_text}}")},
        "weights": {"judge": 0.1, "correctness": 1.0},
    }
    return SPEC | {"data": data, "rewards": rewards} | sections


def details_of(rollout: dict[str, Any]) -> dict[str, Any]:
    """What is recorded of a judge's call."""
    return json.loads(rollout["grader_details"])["judge"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("judged")


def test_a_run_with_a_judge_that_fails_at_times_loses_no_score(finish: Finish, folder: Path) -> None:
    spec = judged(
        folder,
        evaluation={
            "questions": 6,
            "dataset": chats(folder / "test.jsonl", first=64, count=6),
            "max_completion_tokens": 40,
        },
    )
    spec["rewards"]["tags"] = {"reasoning": None, "answer": "answer"}
    with serving("429", "500", "reset", "words", "outside", share=0.2) as server:
        variables = environment(server, attempts=10)
        run = finish(folder / "whole", spec, variables=variables, fault=retry_at_once)
    assert run.exit_code == 0, (run.folder.root / "stderr.log").read_text("utf-8")
    assert {line["unscored_share"] for line in run.metrics} == {0.0}
    assert {line["rewards"]["judge"] for line in run.metrics} == {3.0}
    assert max(line["rewards"]["correctness"] for line in run.metrics) > 0
    details = details_of(read_rollouts(run.folder.rollout(1))[0])
    assert (details["reason"], details["model"]) == ("because", "m-1")
    assert details.get("cached") or details["tokens"] >= TOKENS
    asked = server.seen[0][1]["messages"][-1]["content"]
    assert asked.startswith("Rate it: a column ")
    report = json.loads(run.folder.report.read_text("utf-8"))
    assert report["evaluation"]["questions"] == 6
    assert report["graders"] == {"judge": {"type": "score_model"}}


def test_judgements_and_spent_tokens_survive_a_resume(finish: Finish, folder: Path) -> None:
    spec = judged(folder)
    spec["data"] = spec["data"] | {"max_rows": PROMPTS}  # the same questions in each step
    with serving() as server:
        straight = finish(folder / "straight", spec, variables=environment(server), epoch=1)
        asked_in_all = len(server.seen)
    saved = straight.folder.checkpoint(2)
    known = json.loads((saved / "progress.json").read_text("utf-8"))["grading"]["graders"]["judge"]
    assert known["spent_tokens"] == TOKENS * len(known["judgements"])
    with serving() as server:
        run = finish(give(saved, folder / "resumed"), spec, variables=environment(server))
        asked = len(server.seen)
    assert run.exit_code == 0, (run.folder.root / "stderr.log").read_text("utf-8")
    assert len(known["judgements"]) + asked == asked_in_all
    before = {one["completion"] for step in (1, 2) for one in read_rollouts(straight.folder.rollout(step))}
    later = [one for step in (3, 4) for one in read_rollouts(run.folder.rollout(step))]
    assert len(later) == 2 * PROMPTS * GENERATIONS
    repeated = [one for one in later if one["completion"] in before]
    assert repeated, "short completions of the same questions are drawn again"
    assert all(details_of(one)["cached"] for one in repeated)
    end = json.loads((run.folder.checkpoint(4) / "progress.json").read_text("utf-8"))["grading"]["graders"]["judge"]
    assert end["spent_tokens"] == TOKENS * asked_in_all


@pytest.mark.long
def test_too_many_failures_of_a_judge_fail_the_job(finish: Finish, folder: Path) -> None:
    spec = judged(folder)
    spec["rewards"]["on_error"] = {"max_share": 0.2, "window_steps": 2}
    with serving("500") as server:
        run = finish(folder / "failed", spec, variables=environment(server, attempts=1))
    assert (run.exit_code, run.error["class"], run.error["code"]) == (12, "reward", "graders_failed")
    assert "HTTP 500" in run.error["message"]
    assert run.error["hint"]
