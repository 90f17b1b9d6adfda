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
