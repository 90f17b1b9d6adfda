"""`grpo import-openai` and `grpo export-openai`: a job becomes a spec and back, and every other field is named."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo_client.cli import main
from grpo_client.cli.commands import CLIENT
from grpo_core.spec import parse_spec
from tests.unit.test_openai_jobs import FILE, FULL, HYPERPARAMETERS, OTHER, changed

AZURE: dict[str, Any] = {
    "model": "o4-mini-2025-04-16",
    "training_file": "file-abc123",
    "validation_file": "file-def456",
    "suffix": "rft",
    "seed": 5,
    "trainingType": "GlobalStandard",
    "method": {
        "type": "reinforcement",
        "reinforcement": {
            "grader": {
                "type": "endpoint",
                "name": "remote",
                "url": "https://grader.example/score",
                "headers": {"Authorization": "secret://remote"},
                "rate_limit": 50,
            },
            "hyperparameters": {
                "eval_interval": 10,
                "eval_samples": 3,
                "compute_multiplier": 1.1,
                "reasoning_effort": "medium",
                "n_epochs": 2,
                "batch_size": "auto",
            },
        },
    },
}


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any, list[str]]:
    """Exit code, what was printed as JSON, and the lines on standard error."""
    with pytest.raises(SystemExit) as ended:
        main(words, (CLIENT,))
    out, err = capsys.readouterr()
    return int(str(ended.value.code)), json.loads(out) if out else None, err.splitlines()


def written(folder: Path, document: Any) -> str:
    path = folder / "document.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return str(path)


def test_a_job_is_the_same_json_after_the_round_trip(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    known = ("--rows", "100", "--validation-rows", "40")
    code, spec, noted = run(capsys, "import-openai", written(tmp_path, FULL), *known)
    assert code == 0
    assert [line.partition(":")[0] for line in noted] == [f"{HYPERPARAMETERS}.compute_multiplier"]
    parse_spec(spec)
    code, job, noted = run(capsys, "export-openai", written(tmp_path, spec), *known)
    assert (code, job, noted) == (0, FULL, [])


def test_everything_that_is_not_carried_over_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, spec, noted = run(capsys, "import-openai", written(tmp_path, AZURE))
    assert code == 0
    assert {line.partition(": ")[0] for line in noted} == {
        "trainingType",
        "model",
        "training_file",
        "validation_file",
        f"{HYPERPARAMETERS}.compute_multiplier",
        f"{HYPERPARAMETERS}.reasoning_effort",
        f"{HYPERPARAMETERS}.eval_samples",
        f"{HYPERPARAMETERS}.n_epochs",
    }
    assert len(noted) == 8
    assert spec["rewards"]["graders"]["remote"] == AZURE["method"]["reinforcement"]["grader"]


def test_files_and_model_can_be_replaced(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    instead = ("--model", "tiny-english", "--training-file", FILE, "--validation-file", OTHER, "--rows", "400")
    code, spec, noted = run(capsys, "import-openai", written(tmp_path, AZURE), *instead)
    assert code == 0
    assert not any(line.startswith(("model", "training_file", "validation_file")) for line in noted)
    resolved = parse_spec(spec)
    assert (resolved.model.name, resolved.data.dataset, resolved.evaluation.dataset) == ("tiny-english", FILE, OTHER)
    assert resolved.training.steps == 800


def test_what_openai_has_no_field_for_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    spec = {"model": {"name": "tiny", "max_sequence": 256}, "loss": {"beta": 0.0}, "sampling": {"generations": 12}}
    code, job, noted = run(capsys, "export-openai", written(tmp_path, spec))
    assert code == 0
    assert job["grpo"] == {"model": {"max_sequence": 256}, "loss": {"beta": 0.0}}
    assert noted == ["model.max_sequence: OpenAI has no field for it.", "loss.beta: OpenAI has no field for it."]
    code, job, _ = run(capsys, "export-openai", written(tmp_path, spec), "--plain")
    assert "grpo" not in job


@pytest.mark.parametrize(
    ("document", "named"),
    [
        (changed("method.type", "supervised"), "method.type"),
        (changed("method", ...), "method"),
        (changed("surplus", 1), "surplus"),
        ({}, "training_file"),
        ([], "not a JSON object"),
    ],
)
def test_a_job_that_cannot_be_a_spec_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, document: Any, named: str
) -> None:
    code, spec, noted = run(capsys, "import-openai", written(tmp_path, document))
    assert (code, spec) == (2, None)
    assert named in "\n".join(noted)


def test_a_job_may_come_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(FULL).encode())))
    assert run(capsys, "import-openai", "-")[0] == 0
    assert run(capsys, "import-openai", "/nowhere.json")[0] == 2
