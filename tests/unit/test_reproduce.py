"""The figures `make reproduce` writes, from the files of a run that is made up here."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from grpo_core.evaluation.paired_stats import compare
from grpo_core.rewards import REWARD_NAMES
from grpo_core.run_dir.layout import RunFolder
from grpo_core.spec import parse_spec

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "reproduce.py"


@pytest.fixture(scope="module")
def reproduce() -> ModuleType:
    found = importlib.util.spec_from_file_location("reproduce", SCRIPT)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    spec = parse_spec({"name": "a trial"})
    steps: list[dict[str, Any]] = [
        {
            "step": step,
            "reward": step / 2,
            "reward_std": 0.5,
            "rewards": dict.fromkeys(REWARD_NAMES, 0.1),
            "seconds": {"total": 2.0 + step},
        }
        for step in (1, 2, 3)
    ]
    report = {
        "engine": "trl",
        "steps": 3,
        "device": "cpu",
        "precision": {"weights": "fp32"},
        "reward": {"start": 0.5, "end": 1.5, "steps_averaged": 1},
        "seconds": 12.0,
        "spec_digest": spec.digest(),
        "versions": {"torch": "2"},
        "evaluation": {
            "paired": {"strict": compare("strict accuracy", [False] * 20, [True] * 15 + [False] * 5).as_dict()}
        },
    }
    (tmp_path / "spec.json").write_text(json.dumps(spec.as_dict()))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (tmp_path / "report.json").write_text(json.dumps(report))
    return RunFolder(tmp_path)


def test_figures_tell_what_ran_and_what_changed(reproduce: ModuleType, run: RunFolder) -> None:
    reproduce.write_figures(run)
    page = (run.root / "report.md").read_text()
    assert "# a trial" in page
    assert "0.500 at the start, 1.500 at the end" in page
    assert "4.00 s (median)" in page
    assert "| strict | 0.0% | 75.0% | +75.0 |" in page
    assert (run.root / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_evaluation_says_so(reproduce: ModuleType) -> None:
    assert "No evaluation was asked for" in reproduce.evaluation_lines(None)[0]
