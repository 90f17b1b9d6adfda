"""The rule of attempts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jobs.lifecycle.outcomes import LOST, STOPPED, HandBack, attempts_after
from jobs.store.job import JobRecord, JobStatus, record_of

RECORD = replace(
    record_of(
        {
            "id": "job-1",
            "owner": "ann",
            "created_at": "2026-01-01T00:00:00+00:00",
            "queue": "grpo.cpu",
            "spec": {"name": None, "metadata": {}, "training": {"steps": 5}},
            "spec_sha256": "0",
        }
    ),
    status=JobStatus.RUNNING,
    epoch=4,
    attempts=1,
)


@pytest.mark.parametrize(
    ("record", "handback", "progressed", "after"),
    [
        (RECORD, LOST, False, 2),
        (RECORD, LOST, True, 0),
        (RECORD, STOPPED, False, 1),
        (RECORD, STOPPED, True, 0),
        (replace(RECORD, status=JobStatus.PAUSING), LOST, False, 1),
        (replace(RECORD, stopped_epoch=4), LOST, False, 1),
        (replace(RECORD, stopped_epoch=3), LOST, False, 2),
        (RECORD, HandBack(counts=False, fields={"accumulation": 2}), False, 1),
    ],
)
def test_what_counts(record: JobRecord, handback: HandBack, *, progressed: bool, after: int) -> None:
    assert attempts_after(record, handback, progressed=progressed) == after
