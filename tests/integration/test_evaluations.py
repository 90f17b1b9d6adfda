"""Evaluations while a run trains: training is the same with them, a resumed run has each once, and one may end it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_core.checkpoints.manifest import write_manifest
from grpo_core.run_dir.records import read_jsonl, read_rollouts
from grpo_core.spec import parse_spec
from tests.integration.children import WEIGHTS as REWARD_WEIGHTS
from tests.integration.children import Run, assert_whole, spec_with

pytestmark = [pytest.mark.timeout(300)]

STEPS = 6
WEIGHTS = "adapter_model.safetensors"
ENGINES = ["auto", pytest.param("trl", marks=pytest.mark.long)]
Finish = Callable[..., Run]


def spec_of(engine: str, **evaluation: Any) -> dict[str, Any]:
    """With dropout and two passes over each batch, where the engine has them, the state of torch's generator counts."""
    return spec_with(
        data={"max_rows": 16},
        evaluation={"questions": 4, "max_completion_tokens": 24, **evaluation},
        lora={"dropout": 0.1 if engine == "trl" else 0.0},
        loss={"iterations": 2},
        optimizer={"warmup_ratio": 0.0},
        sampling={"max_completion_tokens": 24},
        training={"steps": STEPS, "checkpoint_every": 1, "save_steps": 100},
    ) | {"engine": engine}


def rollouts_of(run: Run, *, after: int = 0) -> list[dict[str, Any]]:
    rows = read_rollouts(run.folder.rollouts)
    return [{name: value for name, value in row.items() if name != "epoch"} for row in rows if row["step"] > after]


def curve_of(run: Run) -> list[dict[str, Any]]:
    """The file's, without how long each took."""
    lines = [{**line, "seconds": None} for line in read_jsonl(run.folder.evaluations)]
    report = evaluation_of(run)["curve"]
    assert [{"v": 1, **point, "seconds": None} for point in report] == lines
    return lines


def evaluation_of(run: Run) -> dict[str, Any]:
    return json.loads(run.folder.report.read_text("utf-8"))["evaluation"]


def kept(run: Run) -> list[int]:
    return [assert_whole(path)["step"] for path in sorted(run.folder.checkpoints.glob("step-*"))]


@pytest.fixture(scope="module")
def evaluated(finish: Finish, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """A run of an engine with an evaluation of two of the four questions after every second step."""
    runs: dict[str, Run] = {}

    def evaluated(engine: str) -> Run:
        if engine not in runs:
            root = tmp_path_factory.mktemp("evaluated") / "run"
            runs[engine] = finish(root, spec_of(engine, every=2, sample=2), epoch=1)
            assert runs[engine].exit_code == 0, (root / "stderr.log").read_text("utf-8")
        return runs[engine]

    return evaluated


@pytest.mark.parametrize("engine", ENGINES)
def test_training_is_the_same_with_and_without(
    evaluated: Callable[[str], Run], finish: Finish, tmp_path: Path, engine: str
) -> None:
    run, without = evaluated(engine), finish(tmp_path / "run", spec_of(engine, every=0), epoch=1)
    assert rollouts_of(run) == rollouts_of(without)
    assert (run.folder.adapter / WEIGHTS).read_bytes() == (without.folder.adapter / WEIGHTS).read_bytes()
    last = f"step-{STEPS:06d}/state.safetensors"
    assert (run.folder.checkpoints / last).read_bytes() == (without.folder.checkpoints / last).read_bytes()
    assert [point["step"] for point in curve_of(without)] == [0, STEPS]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_evaluation_is_a_point_of_the_same_questions(evaluated: Callable[[str], Run], engine: str) -> None:
    run = evaluated(engine)
    points = curve_of(run)
    assert [(point["step"], point["questions"]) for point in points] == [(0, 2), (2, 2), (4, 2), (6, 2)]
    told = [event for event in run.of_type("evaluation") if event["data"]["stage"] != "selftest"]
    assert [(event["data"]["stage"], event["data"]["questions"]) for event in told] == [
        ("before", 4),
        ("during", 2),
        ("during", 2),
        ("after", 4),
    ]
    for event, point in zip(told, points, strict=True):
        assert event["data"]["curve"].items() <= point.items()
    assert [event["step"] for event in told[1:3]] == [2, 4]
    answers = read_rollouts(run.folder.root / "evaluation.parquet")[::2]
    assert points[0]["lenient_accuracy"] == sum(row["lenient_before"] for row in answers) / 2
    assert points[-1]["lenient_accuracy"] == sum(row["lenient_after"] for row in answers) / 2
    values = [point["value"] for point in points[1:]]
    assert evaluation_of(run)["best_step"] == points[1 + values.index(max(values))]["step"]
    assert evaluation_of(run)["stopped"] is None


@pytest.mark.parametrize("engine", ENGINES)
def test_the_best_checkpoint_is_kept(finish: Finish, tmp_path: Path, engine: str) -> None:
    """Of a metric that is always 1, the first step is the best, which pruning would remove."""
    short = {"graders": {"short": {"type": "length", "maximum": 1000}}, "weights": {"short": 0.0, **REWARD_WEIGHTS}}
    run = finish(tmp_path / "run", spec_of(engine, every=1, metric="short") | {"rewards": short}, epoch=1)
    assert run.exit_code == 0, (run.folder.root / "stderr.log").read_text("utf-8")
    assert {(point["metric"], point["value"]) for point in curve_of(run)} == {("short", 1.0)}
    assert evaluation_of(run)["best_step"] == 1
    assert kept(run) == [1, STEPS - 1, STEPS]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("step", [2, 3])
def test_a_resumed_run_has_every_evaluation_once(
    evaluated: Callable[[str], Run], finish: Finish, tmp_path: Path, engine: str, step: int
) -> None:
    spec = spec_of(engine, every=2, sample=2)
    spec = spec | {"training": spec["training"] | {"save_steps": 1}}
    whole = finish(tmp_path / "whole", spec, epoch=1)
    root = tmp_path / "run"
    shutil.copytree(whole.folder.checkpoint(step), root / "inputs" / "resume")
    again = finish(root, spec, epoch=2)
    assert again.exit_code == 0, (root / "stderr.log").read_text("utf-8")
    assert rollouts_of(again, after=step) == rollouts_of(whole, after=step)
    assert curve_of(again) == curve_of(whole) == curve_of(evaluated(engine))
    assert evaluation_of(again)["best_step"] == evaluation_of(whole)["best_step"]
    stages = [event["data"]["stage"] for event in again.of_type("evaluation")]
    assert stages == ["during", "after", "selftest"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_that_is_stopped_before_an_evaluation_makes_it_when_it_resumes(
    evaluated: Callable[[str], Run], finish: Finish, tmp_path: Path, engine: str
) -> None:
    """As the checkpoint of a run says that was asked to stop: the step is done, and its evaluation is not."""
    checkpoint = tmp_path / "run" / "inputs" / "resume"
    spec = spec_of(engine, every=2, sample=2)
    spec = spec | {"training": spec["training"] | {"save_steps": 1}}
    whole = finish(tmp_path / "whole", spec, epoch=1)
    shutil.copytree(whole.folder.checkpoint(4), checkpoint)
    progress = json.loads((checkpoint / "progress.json").read_text("utf-8"))
    del progress["held_out"]["curve"]["points"][2:]
    (checkpoint / "progress.json").write_text(json.dumps(progress), encoding="utf-8")
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, step=4, epoch=1, spec_digest=parse_spec(spec).digest())
    run = finish(tmp_path / "run", spec, epoch=2)
    assert run.exit_code == 0, (run.folder.root / "stderr.log").read_text("utf-8")
    assert curve_of(run) == curve_of(evaluated(engine))
    assert rollouts_of(run, after=4) == rollouts_of(whole, after=4)
    assert (run.folder.adapter / WEIGHTS).read_bytes() == (whole.folder.adapter / WEIGHTS).read_bytes()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_target_that_is_reached_ends_the_job_as_succeeded(finish: Finish, tmp_path: Path, engine: str) -> None:
    spec = spec_of(engine, every=2, stop_when={"target": 0.0})
    run = finish(tmp_path / "run", spec, epoch=1)
    assert run.exit_code == 0, (run.folder.root / "stderr.log").read_text("utf-8")
    assert [line["step"] for line in run.metrics] == [1, 2]
    found = evaluation_of(run)
    assert found["stopped"]["reason"] == "target_reached"
    assert "evaluation.stop_when.target" in found["stopped"]["message"]
    assert [point["step"] for point in curve_of(run)] == [0, 2]
    logs = [event["data"] for event in run.of_type("log")]
    assert [log["step"] for log in logs if log.get("code") == "stopped_early"] == [2]
    assert (run.folder.adapter / WEIGHTS).read_bytes() == (run.folder.checkpoint(2) / WEIGHTS).read_bytes()

    # Lost while it answered the last questions: the run that resumes does no further step.
    root = tmp_path / "again"
    shutil.copytree(run.folder.checkpoint(2), root / "inputs" / "resume")
    again = finish(root, spec, epoch=2)
    assert again.exit_code == 0, (root / "stderr.log").read_text("utf-8")
    assert [line["step"] for line in again.metrics] == [1, 2]
    assert evaluation_of(again)["stopped"] == found["stopped"]
    assert (again.folder.adapter / WEIGHTS).read_bytes() == (run.folder.adapter / WEIGHTS).read_bytes()
