"""What a run fetches before it trains depends on where it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from grpo_core.spec import parse_spec
from jobs.errors import NotFound
from jobs.store.commits import CommitRef, ResumeBase
from jobs.store.job import JobRecord, record_of
from jobs.worker import prepare as preparation
from jobs.worker.prepare import Preparation, Start

SPEC = parse_spec({"from_checkpoint": {"job": "job-01ARZ3NDEKTSV4RRFFQ69G5FAV", "step": 5}})


def record() -> JobRecord:
    asked = {"id": "job-1", "owner": "ann", "created_at": "2026-01-01T00:00:00+00:00", "queue": "grpo.cpu"}
    return record_of({**asked, "spec": SPEC.as_dict(), "spec_sha256": "0"})


def prepare(folder: Path, resumed: CommitRef | None, monkeypatch: pytest.MonkeyPatch) -> Start:
    """In a service from which the job that this one was to start from has been deleted."""
    start = Start(base=ResumeBase(job="job-1", epoch=2, resumed=resumed))
    monkeypatch.setattr(preparation, "find_start", lambda *_: start)
    monkeypatch.setattr(preparation.event_log, "find_checkpoint", lambda *_: None)
    nothing = cast("Any", None)
    at_once = cast("Any", lambda action, interrupts: action())
    return Preparation(nothing, nothing, at_once, folder).prepare(record(), SPEC, 2)


def test_a_resumed_run_needs_no_checkpoint_of_another_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepare(tmp_path, CommitRef(step=900, epoch=1), monkeypatch).base.resumed == CommitRef(step=900, epoch=1)


def test_a_run_that_begins_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFound):
        prepare(tmp_path, None, monkeypatch)
