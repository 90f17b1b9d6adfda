"""What must be true of a job after it has ended, whatever happened to it: the same questions after every fault.

Looks at the bucket and at the answers of the API, not at what the service thinks of itself. Invariant: each question
can be answered with no; `tests/acceptance/faults/test_oracle.py` shows it.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from jobs.store import object_keys
from jobs.store.job import TERMINAL, JobRecord, JobStatus
from jobs.store.job_store import EVENT_ROOM
from jobs.store.write_once import Manifest, Outcome
from tests.acceptance.faults.stage import FAKE_TRAINER, Follower, Stage, processes_below

Row = dict[str, Any]

RESTART_MICROSECONDS = 1000
"""No server restarts in less."""


@dataclass(frozen=True)
class Straight:
    """What a run leaves that nothing disturbs."""

    adapter: bytes
    metrics: list[Row]
    rollouts: list[Row]
    same: tuple[str, ...] = ()
    """What metrics must have in common; nothing named is everything. A real run's have times."""


class Oracle:
    """Asks everything of a job. Keeps undisturbed runs to compare with."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._straight: dict[str, Straight] = {}
        self._known: dict[str, Straight] = {}

    def check(
        self,
        job_id: str,
        status: str = "succeeded",
        *,
        epochs: int | range | None = None,
        attempts: int | None = None,
        follower: Follower | None = None,
        gaps: bool = False,
        untold: bool = False,
        manifest: bool = True,
    ) -> JobRecord:
        """Raise `AssertionError` for the first thing that is wrong; returns the job's record.

        `gaps`: Valkey was lost, so numbers of events may be left out. `untold`: a run was cut off from Valkey, so no
        event may tell of some steps. `manifest`: whether there must be one.
        """
        record = self.stage.until_ended(job_id)
        assert record.status.value == status, (record.status, record.error)
        if status == "cancelled" and record.manifest is not None:
            key = record.manifest  # what a cancel does not wait for
            self.stage.until(lambda: self.stage.write_once.manifest(key), 30, "the manifest never came")
        outcome = self.check_end(record)
        if epochs is not None:
            allowed = epochs if isinstance(epochs, range) else range(epochs, epochs + 1)
            assert record.epoch in allowed, f"{record.epoch} runs"
        if attempts is not None:
            assert record.attempts == attempts, f"{record.attempts} attempts"
        self.check_events(record, follower, gaps=gaps, untold=untold or gaps)
        assert (outcome.manifest is not None) >= manifest, "there is no manifest"
        if outcome.manifest is not None:
            files = self.check_manifest(outcome)
            self.check_training(record, files)
        self.check_nothing_left(job_id)
        return record

    def check_end(self, record: JobRecord) -> Outcome:
        """It ended once, and record, outcome and API say the same."""
        stage = self.stage
        outcome = stage.write_once.outcome(record.id)
        assert outcome is not None, "there is no outcome"
        assert outcome.status == record.status.value, f"the outcome says {outcome.status}"
        assert outcome.manifest == record.manifest, "record and outcome name different manifests"
        assert outcome.error == record.error, "record and outcome name different errors"
        assert (outcome.error is not None) == (outcome.status == "failed"), outcome.error
        stored = [item.key for item in stage.store.list(object_keys.folder(record.id))]
        assert sum(key.endswith("outcome.json") for key in stored) == 1
        assert stage.write_once.latest_epoch(record.id) >= record.epoch, "a run without a ticket"
        told = stage.client.get(record.id)
        assert told["status"] == outcome.status, told
        return outcome

    def check_manifest(self, outcome: Outcome) -> dict[str, bytes]:
        """Every object is there with the bytes that were recorded; returns them by path."""
        stage = self.stage
        manifest = stage.write_once.manifest(outcome.manifest or "")
        assert isinstance(manifest, Manifest), "the manifest is not there"
        assert (manifest.job, manifest.epoch) == (outcome.job, outcome.epoch)
        paths = [entry.path for entry in manifest.objects]
        assert len(set(paths)) == len(paths), "a path is listed twice"
        files: dict[str, bytes] = {}
        for entry in manifest.objects:
            body = stage.store.get(entry.key)
            assert body is not None, f"{entry.path} is listed and not there"
            found = (len(body), hashlib.sha256(body).hexdigest())
            assert found == (entry.size, entry.sha256), f"{entry.path} is not what was recorded"
            files[entry.path] = body
        told = {artifact["path"] for artifact in stage.client.artifacts(outcome.job)["data"]}
        assert told == set(paths), "the API lists something else"
        return files

    def check_training(self, record: JobRecord, files: dict[str, bytes]) -> None:
        """Each step once, and the same as in a run that nothing disturbed; all of them where the job succeeded."""
        straight = self.straight(record)
        rollouts = _rows(files)
        expected = straight.rollouts[: len(rollouts)]
        assert rollouts == expected, _difference(rollouts, expected)
        metrics = [json.loads(line) for line in files.get("metrics.jsonl", b"").splitlines()]
        pairs = zip(_only(metrics, straight.same), _only(straight.metrics, straight.same), strict=False)
        assert len(metrics) <= len(straight.metrics), "more metrics than steps"
        assert all(one == other for one, other in pairs), "metrics are not those of each step, once"
        if record.status is not JobStatus.SUCCEEDED:
            return
        assert len(rollouts) == len(straight.rollouts), f"{len(rollouts)} rollouts of {len(straight.rollouts)}"
        assert len(metrics) == record.total_steps, f"{len(metrics)} steps of metrics"
        assert [row["step"] for row in self.stage.client.metrics(record.id)] == list(range(1, record.total_steps + 1))
        assert files["adapter/adapter_model.safetensors"] == straight.adapter, "another adapter"

    def check_events(self, record: JobRecord, follower: Follower | None, *, gaps: bool, untold: bool) -> None:
        """Numbered 1, 2, 3 … by each server; the last is the end, and the only one. A follower read just these."""
        events = self._all_events(record.id)
        numbers = [event["seq"] for event in events]
        assert numbers == sorted(set(numbers)), "a number is not above the one before it"
        if not gaps:
            pairs = list(pairwise([0, *numbers]))
            gaps_found = [pair for pair in pairs if pair[1] - pair[0] != 1 and not _by_another_server(*pair)]
            assert not gaps_found, f"a number is missing: {gaps_found}"
        statuses = [event["data"]["status"] for event in events if "status" in event["data"]]
        ends = [status for status in statuses if JobStatus(status) in TERMINAL]
        assert ends == [record.status.value], f"it ended {len(ends)} times: {ends}"
        assert events[-1]["data"].get("status") == record.status.value, "something came after the end"
        if record.status is JobStatus.SUCCEEDED and not untold:
            told = {event["step"] for event in events if event["type"] == "metric"}
            assert told == set(range(1, record.total_steps + 1)), "a step that no event tells of"
        if follower is not None:
            seen = [event["seq"] for event in follower.finish()]
            assert seen == sorted(set(seen)), "the stream repeated an event or went back"
            assert gaps or seen == numbers, "the stream left an event out"

    def check_nothing_left(self, job_id: str) -> None:
        """No process, no scratch, and no place in any list of Valkey's that a job passes through.

        A dead worker's scratch goes when it is started again, as its supervisor does.
        """
        stage = self.stage
        for worker in stage.workers:
            worker.start()
        stage.until(lambda: not processes_below(stage.folder, job_id), 5, "a process of it is alive")
        stage.until(
            lambda: not [path for worker in stage.workers for path in worker.scratch() if job_id in path.name],
            5,
            "its scratch folder is there",
        )
        client, prefix = stage.job_store.client, stage.job_store.prefix
        for index in ("leases", "queued", "submitting"):
            assert client.zscore(f"{prefix}:{index}", job_id) is None, f"it is still in {index}"
        record = stage.record(job_id)
        for status in JobStatus:
            listed = client.zscore(f"{prefix}:owner:{record.owner}:{status.value}", job_id) is not None
            assert listed == (status is record.status), f"the list of {status.value} jobs is wrong"
        waiting = client.zscore(f"{prefix}:waiting:{record.queue}", job_id)
        assert waiting is None, "it counts as waiting"

    def know(self, record: JobRecord) -> None:
        """Take a job that was not disturbed as the measure for all that are asked the same."""
        files = self.check_manifest(self.check_end(record))
        metrics = [json.loads(line) for line in files["metrics.jsonl"].splitlines()]
        adapter = files["adapter/adapter_model.safetensors"]
        self._known[record.spec_sha256] = Straight(adapter, metrics, _rows(files), ("step", "reward"))

    def straight(self, record: JobRecord) -> Straight:
        """What an undisturbed run of the same spec leaves."""
        if record.spec_sha256 in self._known:
            return self._known[record.spec_sha256]
        training = {**record.spec["training"], "checkpoint_every": 1000}
        spec = {**record.spec, "training": training, "metadata": {"step_seconds": "0"}}
        text = json.dumps(spec, sort_keys=True)
        if text not in self._straight:
            name = hashlib.sha256(text.encode()).hexdigest()[:16]
            self._straight[text] = run_straight(self.stage.folder / f"straight-{name}", spec)
        return self._straight[text]

    def _all_events(self, job_id: str) -> list[Row]:
        events: list[Row] = []
        while page := self.stage.client.events(job_id, after=events[-1]["seq"] if events else 0, limit=1000):
            events += page
        return events


def run_straight(folder: Path, spec: dict[str, Any]) -> Straight:
    """Run the fake trainer by itself, with no service around it."""
    folder.mkdir(exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, str(FAKE_TRAINER), "spec.json", "--out", "."]
    subprocess.run(command, cwd=folder, check=True, timeout=60, capture_output=True)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return Straight(
        adapter=files["adapter/adapter_model.safetensors"],
        metrics=[json.loads(line) for line in files["metrics.jsonl"].splitlines()],
        rollouts=_rows(files),
    )


def _by_another_server(before: int, number: int) -> bool:
    """Whether a server that started after `before` may give this as its first number: the job's age in µs."""
    return number >= EVENT_ROOM and number - before >= RESTART_MICROSECONDS


def _rows(files: dict[str, bytes]) -> list[Row]:
    """All rollouts by step and sample; which run made one is left out."""
    rows: list[Row] = []
    for path, body in files.items():
        if path.startswith("rollouts/"):
            rows += pq.read_table(io.BytesIO(body)).to_pylist()
    for row in rows:
        del row["epoch"]
    return sorted(rows, key=lambda row: (row["step"], row["sample"]))


def _only(rows: list[Row], names: tuple[str, ...]) -> list[Row]:
    return [{name: row[name] for name in names} for row in rows] if names else rows


def _difference(found: list[Row], expected: list[Row]) -> str:
    for one, other in zip(found, expected, strict=False):
        if one != other:
            return f"rollout {one['step']}/{one['sample']} where {other['step']}/{other['sample']} was due"
    return f"{len(found)} rollouts, more than the {len(expected)} of a straight run"
