"""Runs of the native engine on a CPU: what it records, how it splits a step, and what it refuses.

What it has in common with `trl`, a resumed run among it, is tested with both in `test_training` and `test_resume`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_core.run_dir.records import read_rollouts
from tests.integration.children import Run, spec_with

STEPS = 4
SPEC = spec_with(
    data={"max_rows": 16},
    evaluation={"questions": 4, "max_completion_tokens": 20},
    optimizer={"warmup_ratio": 0.0},
    sampling={"gradient_accumulation": 1, "max_completion_tokens": 24},
    training={"steps": STEPS, "checkpoint_every": 1, "save_steps": 1},
) | {"engine": "native"}
NOT_REPEATED = {"epoch", "seconds", "completions_per_s"}


Finish = Callable[..., Run]


def steps_of(run: Run) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in NOT_REPEATED} for line in run.metrics]


def rollouts_of(run: Run, *, after: int = 0) -> list[dict[str, Any]]:
    rows = read_rollouts(run.folder.rollouts)
    return [{name: value for name, value in row.items() if name != "epoch"} for row in rows if row["step"] > after]


@pytest.fixture(scope="module")
def straight(finish: Finish, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = finish(tmp_path_factory.mktemp("straight") / "run", SPEC, epoch=1)
    assert run.exit_code == 0, (run.folder.root / "stderr.log").read_text("utf-8")
    return run


def test_every_completion_has_a_seed_of_its_own_and_the_report_tells_the_engine(straight: Run) -> None:
    rows = rollouts_of(straight)
    assert len({row["seed"] for row in rows}) == len(rows) == STEPS * 12
    report = json.loads(straight.folder.report.read_text("utf-8"))
    assert report["engine"] == "native"
    assert report["selftest"]["peft"]["mean"] < 1e-5  # stock PEFT computes the same with the saved adapter
    assert report["selftest"]["adapter_effect"]["max"] > 1e-3
    compared = [line for line in straight.metrics if line["logprob_diff_mean"] is not None]
    assert compared
    assert all(line["logprob_diff_max"] < 1e-4 for line in compared)


@pytest.mark.parametrize("way", ["off", "standard"])
def test_a_step_in_parts_learns_the_same(straight: Run, finish: Finish, tmp_path: Path, way: str) -> None:
    """Of the same completions: those of the first step, which both draw before they have learnt anything."""
    parts = {
        "sampling": SPEC["sampling"] | {"gradient_accumulation": 4},
        "lora": SPEC["lora"] | {"gradient_checkpointing": way},
        "training": SPEC["training"] | {"steps": 2},
    }
    run = finish(tmp_path / "parts", SPEC | parts)
    first = [row for row in rollouts_of(run) if row["step"] == 1]
    assert first == [row for row in rollouts_of(straight) if row["step"] == 1]
    one, other = run.metrics[0], straight.metrics[0]
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)


def test_what_it_does_not_do_is_refused_with_the_reason(finish: Finish, tmp_path: Path) -> None:
    run = finish(tmp_path / "run", SPEC | {"lora": SPEC["lora"] | {"dropout": 0.1}})
    assert run.exit_code == 10
    assert run.error["code"] == "engine_not_available"
    assert "lora.dropout" in run.error["hint"]
