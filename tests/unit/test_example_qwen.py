"""examples/qwen: its problems are apart, and its figures are those of the answers."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from grpo_core.run_dir.layout import RunFolder
from grpo_core.run_dir.records import write_evaluation
from grpo_core.spec import parse_spec

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "qwen"


@pytest.fixture(scope="module")
def learn() -> ModuleType:
    found = importlib.util.spec_from_file_location("learn", FOLDER / "learn.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["learn"] = module
    found.loader.exec_module(module)
    return module


def rows(name: str) -> list[dict[str, str]]:
    with (FOLDER / name).open(encoding="utf-8") as lines:  # `splitlines` would split within a question
        return [json.loads(line) for line in lines]


def folded(question: str) -> str:
    """A question without what a copy may change: case, spaces and punctuation."""
    return re.sub(r"\W+", "", question).lower()


def test_no_held_out_problem_is_trained_on_in_either_language() -> None:
    train, held_out = rows("train.jsonl"), rows("heldout.jsonl")
    assert {row["set"] for row in train} == {"gsm8k-train", "msvamp-zh"}
    assert {folded(row["question"]) for row in train} & {folded(row["question"]) for row in held_out} == set()
    numbers = {"gsm8k-test": set[int](), "mgsm-zh": set[int]()}
    for row in held_out[:-1]:
        numbers[row["set"]].add(int(row["problem"].rpartition("-")[2]))
    # A row of MGSM is the same problem as that row of GSM8K's test set.
    assert numbers["mgsm-zh"] == set(range(1, 251))
    assert numbers["gsm8k-test"] == set(range(251, 1320))


def test_no_problem_is_there_twice_and_every_answer_is_a_number() -> None:
    for name in ("train.jsonl", "heldout.jsonl"):
        questions = [folded(row["question"]) for row in rows(name)]
        assert len(set(questions)) == len(questions)
        assert all(re.fullmatch(r"-?\d+(\.\d+)?", row["answer"]) for row in rows(name))


def test_the_job_asks_every_held_out_problem() -> None:
    spec = parse_spec(json.loads((FOLDER / "job.json").read_bytes()))
    assert spec.evaluation.questions == len(rows("heldout.jsonl"))


def answer(row: int, right: bool) -> dict[str, Any]:
    return {
        "row": row,
        "question": f"question {row}",
        "answer": "1",
        "completion": "text",
        "completion_tokens": 3,
        "finish_reason": "stop",
        "reward": 0.0,
        "strict_format": right,
        "strict": right,
        "lenient": right,
    }


def test_figures_are_those_of_each_set(learn: ModuleType, tmp_path: Path) -> None:
    held_out = tmp_path / "heldout.jsonl"
    sets = ["mgsm-zh"] * 4 + ["gsm8k-test"] * 4
    held_out.write_text("".join(json.dumps({"set": name}) + "\n" for name in sets))
    folder = RunFolder(tmp_path / "seed-1")
    folder.root.mkdir()
    before = [answer(row, right=False) for row in range(8)]
    after = [answer(row, right=row in (0, 1, 5)) for row in range(8)]
    write_evaluation(folder.root, {"before": before, "after": after})
    step = {"reward": 0.5, "completion_tokens_mean": 100.0, "seconds": {"total": 2.0}}
    folder.metrics.write_text("".join(json.dumps({"step": at, **step}) + "\n" for at in (1, 2)))
    folder.report.write_text(json.dumps({"device": "a card", "engine": "native", "versions": {}}))
    folder.spec.write_text(json.dumps({"model": {"name": "a model"}}))
    run = learn.read(1, "job-1", folder.root, held_out)
    learn.write([run], tmp_path)
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert result["sets"]["mgsm-zh"]["lenient"]["after"] == 0.5
    assert result["sets"]["gsm8k-test"]["strict"]["after"] == 0.25
    assert result["training_s"] == 4.0
    page = (tmp_path / "results.md").read_text()
    assert "| right by the last number | 1 | 0.0% | 50.0% | +50.0 |" in page
    assert "### gsm8k-test, row 6: question 5" in page
    assert (tmp_path / "curve.svg").stat().st_size > 1000


def test_the_published_tables_are_those_of_the_results(learn: ModuleType) -> None:
    results = json.loads((FOLDER / "results" / "results.json").read_text())
    tables = "\n".join(learn.tables(results))
    assert tables in (FOLDER / "results" / "results.md").read_text(encoding="utf-8")
    root = FOLDER.parents[1]
    assert tables.replace("\n## ", "\n### ") in (root / "docs/start/qwen-learns.md").read_text(encoding="utf-8")
    readme = (root / "README.md").read_text(encoding="utf-8")
    for name in ("mgsm-zh", "gsm8k-test"):
        pairs = [one["sets"][name]["lenient"] for one in results]
        low, high = (f"{100 * end(pair['after'] for pair in pairs):.1f}" for end in (min, max))
        assert f"| {100 * pairs[0]['before']:.1f} % | {low} to {high} % |" in readme
