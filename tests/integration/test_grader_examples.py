"""Jobs with rewards of their own train through the real engine: what they reward rises, and is recorded by its name."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_core.rewards.graders.confined import why_not_confined
from grpo_core.run_dir.records import read_rollouts
from tests.integration.children import Run

pytestmark = [pytest.mark.timeout(900), pytest.mark.skipif(bool(why_not_confined()), reason=why_not_confined())]

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "graders"
STEPS = 16


Train = Callable[..., Run]


@pytest.fixture
def train(finish: Callable[..., Run], tmp_path: Path) -> Train:
    """Runs a spec on the tiny model and its data, on this machine."""

    def train(spec: dict[str, Any], *, steps: int = STEPS) -> Run:
        data = {**spec["data"], "source": "file", "dataset": str(ROOT / "examples" / "tiny" / "train.jsonl")}
        training = {"steps": steps, "save_steps": steps, "checkpoint_every": steps}
        return finish(tmp_path, {**spec, "data": data, "training": training})

    return train


def example(name: str) -> dict[str, Any]:
    return json.loads((EXAMPLES / f"{name}.json").read_text("utf-8"))


def course(run: Run, name: str) -> tuple[float, float]:
    """The mean of a reward in the first three steps and in the last three."""
    values = [line["rewards"][name] for line in run.metrics]
    return statistics.fmean(values[:3]), statistics.fmean(values[-3:])


@pytest.mark.parametrize(
    ("name", "reward", "rise"),
    [
        pytest.param("label", "exact", 0.05, marks=pytest.mark.long),
        pytest.param("format", "layout", 0.2, marks=pytest.mark.long),
        pytest.param("length", "long_enough", 0.2, marks=pytest.mark.long),
        ("python", "shown_work", 0.2),
    ],
)
def test_what_an_example_rewards_rises(train: Train, tmp_path: Path, name: str, reward: str, rise: float) -> None:
    run = train(example(name))
    assert run.exit_code == 0, (tmp_path / "stderr.log").read_text("utf-8")
    before, after = course(run, reward)
    assert after >= before + rise
    rows = read_rollouts(run.folder.rollouts)
    assert {f"reward_{grader}" for grader in example(name)["rewards"]["graders"]} <= set(rows[0])
    assert all(line["unscored_share"] == 0 for line in run.metrics)


def test_a_completion_that_is_no_json_is_worth_nothing_and_says_why(train: Train, tmp_path: Path) -> None:
    run = train(example("json"), steps=2)
    assert run.exit_code == 0, (tmp_path / "stderr.log").read_text("utf-8")
    rows = read_rollouts(run.folder.rollouts)
    assert {row["reward_right"] for row in rows} == {0.0}
    assert all(json.loads(row["grader_errors"])["right"]["kind"] == "sample_parse_error" for row in rows)
    assert not any(row["skipped"] for row in rows)
    assert run.metrics[0]["unscored_share"] == 0


MIXED = {
    "graders": {
        "exact": {
            "type": "string_check",
            "input": "{{sample.output_text}}",
            "reference": "<answer>\n{{item.answer}}\n</answer>",
            "operation": "like",
        },
        "layout": example("format")["rewards"]["graders"]["layout"],
        "shown_work": example("python")["rewards"]["graders"]["shown_work"],
    },
    "weights": {"exact": 2.0, "layout": 0.5, "shown_work": 1.0},
}


@pytest.mark.long
def test_three_kinds_of_graders_train_together_and_are_evaluated(train: Train, tmp_path: Path) -> None:
    evaluation = {"questions": 32, "max_completion_tokens": 48, "metric": "exact"}
    run = train({**example("python"), "rewards": MIXED, "evaluation": evaluation})
    assert run.exit_code == 0, (tmp_path / "stderr.log").read_text("utf-8")
    for name in MIXED["graders"]:
        before, after = course(run, name)
        assert after > before
    report = json.loads(run.folder.report.read_text("utf-8"))
    assert report["graders"]["shown_work"]["process"]["isolation"] == "landlock+seccomp"
    assert report["evaluation"]["metric"] == "exact"
    assert set(report["evaluation"]["after"]["rewards"]) >= set(MIXED["graders"])
    metric = report["evaluation"]["paired"]["metric"]
    assert metric["after"] > metric["before"]
    assert "exact" in metric["verdict"]
    for row in read_rollouts(run.folder.rollouts):
        weights = MIXED["weights"]
        assert row["reward_total"] == pytest.approx(sum(weights[name] * row[f"reward_{name}"] for name in weights))


FAILS_SOMETIMES = """
def grade(sample, item):
    if int(item["answer"]) % 2:
        raise ValueError("odd")
    return len(sample["output_text"]) / 100
"""


def test_a_group_that_a_grader_fails_on_teaches_nothing(train: Train, tmp_path: Path) -> None:
    rewards = {
        "graders": {"odd": {"type": "python", "source": FAILS_SOMETIMES}},
        "on_error": {"max_share": 1.0},
    }
    run = train({**example("python"), "rewards": rewards}, steps=2)
    assert run.exit_code == 0, (tmp_path / "stderr.log").read_text("utf-8")
    rows = read_rollouts(run.folder.rollouts)
    odd = [row for row in rows if int(row["answer"]) % 2]
    assert odd
    assert len(odd) < len(rows)
    for row in rows:
        failed = int(row["answer"]) % 2 == 1
        assert row["skipped"] == failed
        assert (row["reward_odd"] is None) == failed
        if failed:
            assert row["advantage"] == 0
            assert "ValueError: odd (line 4 in grade)" in json.loads(row["grader_errors"])["odd"]["message"]
    assert 0 < run.metrics[0]["skipped_share"] < 1


def test_a_grader_that_fails_too_often_ends_the_job(train: Train, tmp_path: Path) -> None:
    rewards = {"graders": {"odd": {"type": "python", "source": FAILS_SOMETIMES}}, "on_error": {"window_steps": 2}}
    run = train({**example("python"), "rewards": rewards})
    assert run.exit_code == 12
    assert (run.error["code"], run.error["class"]) == ("graders_failed", "reward")
    assert "ValueError: odd" in run.error["message"]


def test_a_grader_that_cannot_be_loaded_ends_the_job_before_the_model_is_read(train: Train, tmp_path: Path) -> None:
    source = "import torch\ndef grade(sample, item):\n    return 1.0"
    run = train({**example("python"), "rewards": {"graders": {"g": {"type": "python", "source": source}}}})
    assert run.exit_code == 12
    assert run.error["code"] == "grader_not_loaded"
    assert "no module named 'torch'" in run.error["message"]
    assert [event["data"]["phase"] for event in run.of_type("status")] == ["preparing"]
