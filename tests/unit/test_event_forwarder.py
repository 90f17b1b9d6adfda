"""What a training process may write among its events, and how much of it is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.store.job_store import JobEvent
from jobs.worker import event_forwarder
from jobs.worker.event_forwarder import BATCH_BYTES, LINE_BYTES, EventTail

TIME = "2026-01-01T00:00:00+00:00"


def line(kind: str, data: Any, step: Any = 1, time: Any = TIME) -> str:
    return json.dumps({"type": kind, "data": data, "step": step, "time": time})


def tail_of(folder: Path, *lines: str) -> EventTail:
    (folder / "events.jsonl").write_text("".join(f"{text}\n" for text in lines))
    tail = EventTail(folder / "events.jsonl")
    tail.read()
    return tail


def all_of(tail: EventTail) -> list[JobEvent]:
    found: list[JobEvent] = []
    while batch := tail.batch()[1]:
        found += batch
        tail.taken(len(found))
        tail.read()
    return found


@pytest.mark.parametrize(
    "bad",
    [
        line("metric", {"reward": "abc"}),
        line("metric", {"reward": True}),
        line("metric", {"reward": 10**400}),
        line("metric", {"reward": float("nan")}),
        line("metric", {"seconds": {"total": "long"}}),
        line("metric", {"reward": 1}, step="x"),
        line("metric", {"reward": 1}, step=-1),
        line("metric", {"reward": 1}, step=True),
        line("metric", [1]),
        line("evaluation", {"best_step": "last"}),
        line("evaluation", {"best_step": 0}),
        line("log", {"code": "stopped_early", "message": "x" * 501}),
        line("log", {"code": "stopped_early"}),
        line("log", {"message": "\ud800"}),
        line("log", {"message": float("inf")}),
        line("log", {"deep": json.loads("[" * 60 + "]" * 60)}),
        line("log", {}, time="9" * 400),
        line("log", {}, time="2026-13-41T00:00:00Z"),
        line("log", {}, time=5),
        line("status", {"phase": ["training"]}),
        line("status", {"phase": "x" * 100}),
        line("status", {"status": "succeeded"}),
        line("status", {"phase": "training", "status": "succeeded"}),
        line("x" * 1000, {}),
        line("error", {"class": "mine", "code": "c", "message": "m"}),
        line("error", {"class": "internal", "code": "c", "message": "\ud800"}),
        line("error", {"class": "internal", "code": "c"}),
    ],
)
def test_a_line_that_is_no_event_is_left_out_and_told_of_once(tmp_path: Path, bad: str) -> None:
    good = line("metric", {"reward": 1.5, "kl": None, "rewards": {"own": 1}, "of_a_later_release": "x"})
    tail = tail_of(tmp_path, bad, good, bad)
    warning, metric = all_of(tail)
    assert (warning.type, warning.data["code"], metric.step) == ("warning", "event_invalid", 1)
    assert tail.last_error is None
    assert tail.phase is None


def test_what_a_run_writes_is_taken(tmp_path: Path) -> None:
    error = {"class": "reward", "code": "c", "message": "m", "hint": "", "retryable": False}
    completion = line("sample", {"completion": "算\x00"}, step=3)
    tail = tail_of(tmp_path, line("status", {"phase": "training"}, step=None), completion, line("error", error))
    assert [(event.type, event.step) for event in all_of(tail)] == [("status", 0), ("sample", 3)]
    assert (tail.phase, tail.last_error) == ("training", error)


def test_an_event_too_long_is_replaced_by_one_that_says_so(tmp_path: Path) -> None:
    for length in (LINE_BYTES + 1, 5 * 1024**2):
        long = line("log", {"message": "x" * length})
        first, warning, last = all_of(tail_of(tmp_path, line("log", {}, 1), long, line("log", {}, 2)))
        assert (first.step, warning.data["code"], last.step) == (1, "event_too_long", 2)
        assert str(len(long)) in warning.data["message"]


def test_batches_and_what_waits_have_a_bound_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_forwarder, "WAITING_BYTES", 2 * 1024**2)
    lines = [line("log", {"message": "x" * 200_000}, step) for step in range(40)]
    tail = tail_of(tmp_path, *lines)
    assert len(tail.batch()[1]) == BATCH_BYTES // len(lines[-1])
    assert sum(size for size, _ in tail._waiting) < 4 * 1024**2
    assert [event.step for event in all_of(tail)] == list(range(40))


def test_beyond_its_budget_a_run_sends_no_samples_and_then_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, metric = line("sample", {"completion": "x" * 900}), line("metric", {"reward": 1.0, "note": "x" * 900})
    monkeypatch.setattr(event_forwarder, "TEXTS_BYTES", 5000)
    monkeypatch.setattr(event_forwarder, "EVENTS_BYTES", 10_000)
    monkeypatch.setattr(event_forwarder, "_MOST_BYTES", {"sample": 5000})
    told = [e.data.get("code", e.type) for e in all_of(tail_of(tmp_path, *[texts] * 20, *[metric] * 20))]
    samples, metrics = told.count("sample"), told.count("metric")
    assert (4 <= samples <= 5, 3 <= metrics <= 5) == (True, True)
    assert told == ["sample"] * samples + ["samples_left_out"] + ["metric"] * metrics + ["events_left_out"]


def test_a_rewind_skips_all_that_was_shipped_however_much_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_forwarder, "WAITING_MOST", 10)
    monkeypatch.setattr(event_forwarder, "CHUNK_BYTES", 500)
    lines = [line("log", {}, step) for step in range(100)]
    lines.insert(50, "no event")
    tail = tail_of(tmp_path, *lines)
    before = all_of(tail)
    tail.rewind(70)
    tail.read()
    first, batch = tail.batch()
    assert (first, batch) == (71, before[70 : 70 + len(batch)])
    assert batch


def test_the_best_step_and_an_early_end_become_part_of_the_job(tmp_path: Path) -> None:
    why = "Training ended after step 40."
    tail = tail_of(
        tmp_path,
        line("evaluation", {"stage": "before"}),
        line("evaluation", {"stage": "during", "best_step": 20}, step=20),
        line("evaluation", {"stage": "during", "best_step": 40}, step=40),
        line("log", {"code": "stopped_early", "message": why}),
        line("evaluation", {"stage": "selftest"}),
    )
    assert event_forwarder._progress(all_of(tail)) == {"best_step": 40, "stopped": why}
    assert tail.best_step == 40
