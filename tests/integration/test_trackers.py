"""A tracker for real: TensorBoard on a real run of the tiny model, and what becomes of a run whose tracker fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.children import Run, spec_with

pytestmark = [pytest.mark.timeout(600)]

REPORTING = {"training": {"report_to": ["tensorboard"]}}


def break_tensorboard() -> None:
    from torch.utils import tensorboard

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("the disk of the tracker is full")

    tensorboard.SummaryWriter.add_scalar = fail


def hide_tensorboard() -> None:
    import importlib.util

    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name.startswith("tensorboard") else find(name, *rest)


def test_the_event_file_holds_the_reward_curve(finish: Callable[..., Run], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = finish(tmp_path / "run", spec_with(**REPORTING))
    assert run.exit_code == 0
    found = EventAccumulator(str(run.folder.root / "tensorboard"))
    found.Reload()
    for tag, field in (("train/grpo_jobs/reward", "reward"), ("train/grpo_jobs/duplicate_share", "duplicate_share")):
        curve = [(point.step, pytest.approx(point.value, abs=1e-6)) for point in found.Scalars(tag)]
        assert curve == [(line["step"], line[field]) for line in run.metrics]
    assert {"train/reward", "train/grpo_jobs/rewards/correctness"} <= set(found.Tags()["scalars"]), (
        "TRL's own names too"
    )


def test_a_tracker_that_fails_is_a_warning_and_the_job_succeeds(finish: Callable[..., Run], tmp_path: Path) -> None:
    run = finish(tmp_path / "run", spec_with(**REPORTING), fault=break_tensorboard)
    assert run.exit_code == 0
    [warning] = [e["data"] for e in run.of_type("warning") if e["data"]["code"] == "tracker_failed"]
    assert "the disk of the tracker is full" in warning["message"]
    assert len(run.metrics) == 4


def test_a_tracker_that_is_not_installed_fails_before_training(finish: Callable[..., Run], tmp_path: Path) -> None:
    run = finish(tmp_path / "run", spec_with(**REPORTING), fault=hide_tensorboard)
    assert run.exit_code == 10
    assert (run.error["code"], run.error["class"]) == ("tracker_not_installed", "user_config")
    assert "pip install tensorboard" in run.error["hint"]
    assert run.of_type("metric") == []
