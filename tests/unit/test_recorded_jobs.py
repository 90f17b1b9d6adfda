"""What earlier releases wrote down of a job is read by this one, and means the same.

`recorded_jobs.json` holds, for each release, jobs as it stored them: `job.json`, the record's fields in Valkey and a
worker's entry. With a release, add its own: `python -m tests.unit.test_recorded_jobs NAME`. Never change an older one.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_core.spec import SPEC_FORMAT, parse_spec
from jobs.store.job import JobStatus, record_of
from jobs.store.job_store import _from_fields, _to_fields
from jobs.store.queues import queue_for
from jobs.store.workers import WorkerInfo

FIXTURE = Path(__file__).with_name("recorded_jobs.json")
RELEASES: dict[str, Any] = json.loads(FIXTURE.read_text()) if FIXTURE.exists() else {}
JOBS = [(release, name) for release, found in RELEASES.items() for name in found["jobs"]]

ID = "job-01ARZ3NDEKTSV4RRFFQ69G5FAV"
UPLOAD = {"source": "upload", "dataset": "ds-01ARZ3NDEKTSV4RRFFQ69G5FAV"}
REQUESTS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "cpu": {"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}, "metadata": {"team": "数学"}},
    "upload": {"name": "an upload", "data": UPLOAD, "evaluation": {"questions": 20}},
    "from": {"from_checkpoint": {"job": ID, "step": 3}},
    "native": {"engine": "native"},
    "graders": {
        "rewards": {
            "graders": {"short": {"type": "length", "maximum": 400}},
            "weights": {"correctness": 2.0},
            "limits": {"short": {"row_seconds": 1.0}},
        }
    },
}


@pytest.mark.parametrize(("release", "name"), JOBS)
def test_a_job_of_another_release_is_read_as_it_was_meant(release: str, name: str) -> None:
    stored = RELEASES[release]["jobs"][name]
    of_bucket, of_valkey = record_of(stored["job.json"]), _from_fields(stored["record"])
    kept = {"updated_at": of_valkey.updated_at, "attempts": 1, "epoch": 2, "status": JobStatus.RUNNING}
    assert replace(of_bucket, **kept) == of_valkey
    spec = parse_spec(of_valkey.spec)
    assert spec.as_dict() == of_valkey.spec, "a field that is added has a format: grpo_core/section.py"
    assert spec.digest() == of_valkey.spec_sha256
    assert (spec.needed_format(), queue_for(spec)) == (of_valkey.spec_format, of_valkey.queue)
    assert of_valkey.requested_spec in (None, REQUESTS[name])


@pytest.mark.parametrize("release", RELEASES)
def test_a_worker_of_another_release_is_known(release: str) -> None:
    entry = RELEASES[release]["worker"]
    assert WorkerInfo.read(json.dumps(entry["worker"]), json.dumps(entry["release"])).name == "w"


def test_the_format_of_this_release_is_recorded() -> None:
    formats = {stored["job.json"].get("spec_format", 1) for of in RELEASES.values() for stored in of["jobs"].values()}
    assert formats == set(range(1, SPEC_FORMAT + 1))


def recorded(request: dict[str, Any]) -> dict[str, Any]:
    """A job as this release stores it, in the middle of its second run."""
    spec = parse_spec(request)
    asked: dict[str, Any] = {
        "id": ID,
        "owner": "ann",
        "created_at": "2026-01-02T03:04:05.678000+00:00",
        "queue": queue_for(spec),
        "spec": spec.as_dict(),
        "spec_sha256": spec.digest(),
    }
    asked |= {"spec_format": spec.needed_format(), "requested_spec": spec.requested}
    record = replace(record_of(asked), attempts=1, epoch=2, status=JobStatus.RUNNING)
    return {"job.json": {"v": 1, **asked}, "record": {**_to_fields(record), "updated_at": "1767323045999"}}


def main() -> None:
    """Record this release."""
    body, later = WorkerInfo(name="w", queues=["grpo.cpu"], device="cpu").written()
    jobs = {name: recorded(request) for name, request in REQUESTS.items()}
    found = {"jobs": jobs, "worker": {"worker": body, "release": later}}
    FIXTURE.write_text(
        json.dumps({**RELEASES, sys.argv[1]: found}, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    )


if __name__ == "__main__":
    main()
