"""A job's metrics, joined from its events: order, runs and times."""

from __future__ import annotations

from typing import Any

from jobs.read import metrics
from jobs.store.job import JobStatus
from tests.unit.fakes import make_record


def event(step: int, epoch: int = 1) -> dict[str, Any]:
    time = f"2026-11-30T10:{epoch:02}:{step:02}+00:00"
    return {"step": step, "epoch": epoch, "time": time, "type": "metric", "data": {"reward": step / 10}}


def test_a_step_has_the_time_of_its_last_event() -> None:
    record = make_record(status=JobStatus.RUNNING)
    events = [event(1), event(2), event(3), event(2, epoch=2), event(3, epoch=2)]
    rows = metrics.join(None, None, record, events)  # type: ignore[arg-type]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["epoch"] for row in rows] == [1, 2, 2]
    assert rows[2] == {"reward": 0.3, "step": 3, "epoch": 2, "time": "2026-11-30T10:02:03+00:00"}


def evaluated(step: int, strict: float, **more: Any) -> dict[str, Any]:
    curve = {"step": step, "metric": "strict_accuracy", "value": strict, "strict_accuracy": strict}
    curve |= {"strict_interval": [0.1, 0.9], "lenient_accuracy": 0.5, **more}
    return {**event(step), "type": "evaluation", "data": {"stage": "during", "curve": curve}}


def test_an_evaluation_is_added_to_its_step_once() -> None:
    record = make_record(status=JobStatus.RUNNING)
    selftest = {**event(2), "type": "evaluation", "data": {"stage": "selftest"}}
    broken = {**event(1), "type": "evaluation", "data": {"curve": {"step": 1}}}
    events = [evaluated(0, 0.1), event(1), event(2), evaluated(2, 0.4), evaluated(2, 0.6, metric="own", value=1.5)]
    rows = metrics.join(None, None, record, [*events, selftest, broken])  # type: ignore[arg-type]
    assert [row["step"] for row in rows] == [1, 2]
    assert "eval_strict" not in rows[0]
    added = {name: value for name, value in rows[1].items() if name.startswith("eval_")}
    assert added == {
        "eval_strict": 0.6,
        "eval_strict_low": 0.1,
        "eval_strict_high": 0.9,
        "eval_lenient": 0.5,
        "eval_metric": 1.5,
    }
