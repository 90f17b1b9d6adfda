from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from grpo_core.errors import JobFailure
from grpo_core.monitoring import trackers
from grpo_core.run_dir.records import EventWriter, read_jsonl
from grpo_core.spec import parse_spec
from grpo_core.spec.sections import TRACKERS
from jobs.worker.trainer_process import clean_environment


class Tracker:
    """What transformers' callbacks look like from outside."""

    def __init__(self, fail_at: str = "") -> None:
        self.calls: list[tuple[str, Any]] = []
        self._fail_at = fail_at

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("on_"):
            raise AttributeError(name)

        def call(*_: Any, logs: Any = None, **__: Any) -> str:
            self.calls.append((name, logs))
            if name == self._fail_at:
                raise RuntimeError("no route to host\nand more")
            return "control that must not be changed"

        return call


class Metrics:
    def as_dict(self) -> dict[str, Any]:
        return {"step": 3, "reward": 1.5, "rewards": {"correctness": 2.0}, "kl": None}


@contextmanager
def shielded(tmp_path: Path, tracker: Tracker) -> Iterator[trackers.ShieldedTracker]:
    events = EventWriter(tmp_path / "events.jsonl", epoch=1)
    with closing(events):
        yield trackers.ShieldedTracker("wandb", tracker, events, Metrics)  # type: ignore[arg-type]


def test_everything_known_of_a_tracker_is_known_of_all() -> None:
    assert set(trackers.PACKAGES) == set(trackers.ENVIRONMENT) == set(TRACKERS)


def test_a_tracker_is_told_what_trl_logs_and_what_we_record(tmp_path: Path) -> None:
    tracker = Tracker()
    with shielded(tmp_path, tracker) as shield:
        assert shield.on_train_begin("args", "state", "control") is None
        shield.on_log("args", "state", "control", logs={"loss": 0.5, "grad_norm": 1.0})
        shield.on_log("args", "state", "control", logs={"train_runtime": 9.0})
    ours = {"grpo_jobs/reward": 1.5, "grpo_jobs/rewards/correctness": 2.0}
    as_trl = {"reward": 1.5, "rewards/correctness/mean": 2.0}
    assert tracker.calls == [
        ("on_train_begin", None),
        ("on_log", {"loss": 0.5, "grad_norm": 1.0, **as_trl, **ours}),
        ("on_log", {"train_runtime": 9.0}),
    ]


@pytest.mark.parametrize("moment", ["on_train_begin", "on_log", "on_train_end"])
def test_a_tracker_that_fails_is_one_warning_and_hears_no_more(tmp_path: Path, moment: str) -> None:
    tracker = Tracker(fail_at=moment)
    with shielded(tmp_path, tracker) as shield:
        for _ in range(3):
            getattr(shield, moment)("args", "state", "control", logs={"grad_norm": 1.0})
    assert len(tracker.calls) == 1
    [event] = read_jsonl(tmp_path / "events.jsonl")
    assert (event["type"], event["data"]["code"]) == ("warning", "tracker_failed")
    assert "wandb failed (RuntimeError: no route to host) and" in event["data"]["message"]


def test_a_package_that_is_missing_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = parse_spec({"training": {"report_to": ["tensorboard", "mlflow"]}})
    here = {"tensorboardX"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in here else None)
    with pytest.raises(JobFailure, match="mlflow") as failed:
        trackers.require_packages(spec)
    assert (failed.value.report.failure_class, failed.value.report.code) == ("user_config", "tracker_not_installed")
    assert "pip install mlflow" in failed.value.report.hint
    here.add("mlflow")
    trackers.require_packages(spec)


def test_only_the_trackers_a_job_names_get_their_keys() -> None:
    parent = {"WANDB_API_KEY": "w", "MLFLOW_TRACKING_URI": "m", "TRACKIO_DIR": "t", "AWS_SECRET_ACCESS_KEY": "s"}

    def given(*names: str) -> set[str]:
        spec = parse_spec({"training": {"report_to": names}})
        return set(clean_environment(parent, spec, "ann")) & set(parent)

    assert given() == set()
    assert given("wandb") == {"WANDB_API_KEY"}
    assert given("mlflow", "trackio") == {"MLFLOW_TRACKING_URI", "TRACKIO_DIR"}


def test_a_run_is_called_by_its_name_or_its_digest() -> None:
    assert trackers.run_name(parse_spec({"name": "mine"})) == "mine"
    assert trackers.run_name(parse_spec({})).startswith("grpo-")
