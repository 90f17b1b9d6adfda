"""What others rely on stays: the HTTP API, spec digests, keys and bodies of objects, records, events, queues, settings.

`contract.json` holds it as it was recorded; whatever is in there must still be so, and what is new may stand beside it.
A change that is meant is recorded with `python -m tests.unit.test_contract_fixtures`, and read by yesterday's readers.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import AliasChoices
from pydantic_settings import BaseSettings

from api.app import create_app
from api.cli import ALL
from api.problems import PROBLEMS
from api.settings import ApiSettings
from grpo_core.checkpoints.manifest import FILE_NAMES
from grpo_core.errors import EXIT_CODES, FailureReport
from grpo_core.reasons import EventType, FailureClass, Phase
from grpo_core.run_dir.layout import RunFolder
from grpo_core.run_dir.records import Completion, EventWriter, StepMetrics
from grpo_core.spec import parse_spec
from jobs.lifecycle.celery_app import TASK
from jobs.service import ServiceSettings
from jobs.settings import QueueSettings, StorageSettings
from jobs.store import commits, object_keys
from jobs.store.bucket import ObjectStore
from jobs.store.commits import Commit, CommitRef, ResumeBase
from jobs.store.job import TRANSITIONS, JobRecord, record_of
from jobs.store.job_store import _from_fields, _to_fields
from jobs.store.queues import queue_for, queues_served
from jobs.store.s3_datasets import SourceSettings
from jobs.store.write_once import Manifest, ManifestEntry, Outcome, WriteOnceStore
from jobs.worker.worker import WorkerSettings
from tests.unit.fakes import FakeJobService

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = Path(__file__).with_name("contract.json")
SPECS = sorted([*(ROOT / "examples" / "specs").rglob("*.json"), *(ROOT / "examples").glob("*/*job.json")])
SETTINGS = (StorageSettings, QueueSettings, ServiceSettings, SourceSettings, ApiSettings, WorkerSettings)
JOB = "job-01ARZ3NDEKTSV4RRFFQ69G5FAV"
TIME = "2026-01-02T03:04:05.678Z"
PROSE = {"description", "summary", "title", "example", "examples"}


class Bucket:
    """Takes what is put, as JSON text."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}

    def put_json(self, key: str, body: dict[str, Any]) -> None:
        self.objects[key] = json.loads(json.dumps(body))

    def put_json_once(self, key: str, body: dict[str, Any]) -> bool:
        self.put_json(key, body)
        return True

    def list(self, *_place: Any, **_options: Any) -> list[Any]:
        return []


def contract(tmp_path: Path) -> dict[str, Any]:
    """All of it, as JSON."""
    found = {
        "http": without_prose(create_app(cast("Any", FakeJobService())).openapi_schema.to_schema()),
        "problems": sorted(PROBLEMS),
        "commands": sorted(command.words for each in ALL for command in each.commands),
        "spec_digests": {path.relative_to(ROOT).as_posix(): parse_spec(read(path)).digest() for path in SPECS},
        "default_spec": parse_spec({}).as_dict(),
        "queue": {"task": TASK, "cpu": queues_served(None), "gpu_80": queues_served(80.0), "specs": queues()},
        "keys": keys(),
        "objects": objects(),
        "record": _to_fields(record()),
        "transitions": {old.value: sorted(new) for old, new in TRANSITIONS.items()},
        "events": events(tmp_path),
        "run_files": run_files(tmp_path),
        "exit_codes": EXIT_CODES,
        "failure_classes": sorted(FailureClass),
        "settings": {settings.__name__: variables(settings) for settings in SETTINGS},
        "log_events": log_events(),
    }
    return cast("dict[str, Any]", json.loads(json.dumps(found)))


def read(path: Path) -> Any:
    return json.loads(path.read_bytes())


def without_prose(node: Any, inside: str = "") -> Any:
    """A schema without its wording: names of fields are kept, also where one is called `title`."""
    if isinstance(node, dict):
        named = inside in {"properties", "schemas"}
        return {key: without_prose(value, key) for key, value in node.items() if named or key not in PROSE}
    return [without_prose(item) for item in node] if isinstance(node, list) else node


def queues() -> dict[str, str]:
    return {path.relative_to(ROOT).as_posix(): queue_for(parse_spec(read(path))) for path in SPECS}


def keys() -> dict[str, str]:
    return {
        "job": object_keys.job(JOB),
        "epoch": object_keys.epoch(JOB, 3),
        "control": object_keys.control(JOB, 2),
        "outcome": object_keys.outcome(JOB),
        "run": object_keys.run(JOB, 3),
        "base": object_keys.base(JOB, 3),
        "commit": object_keys.commit(JOB, 3, 40),
        "rejected": object_keys.rejected(JOB, 3),
        "manifest": object_keys.manifest(JOB, 3),
        "api_key": object_keys.api_key("key"),
        "dataset": object_keys.dataset("ds"),
        "dataset_rows": object_keys.dataset_rows("ds"),
        "dataset_of": object_keys.dataset_of("an owner", "ds"),
        "erased": object_keys.erased(JOB),
    }


def objects() -> dict[str, Any]:
    bucket = Bucket()
    store = cast("ObjectStore", bucket)
    entry = ManifestEntry(path="report.json", key=f"{object_keys.run(JOB, 3)}report.json", sha256="0" * 64, size=7)
    error = FailureReport(failure_class="oom", code="out_of_memory", message="No room.", hint="Less.").as_dict()
    write_once = WriteOnceStore(store)
    write_once.put_job(JOB, asked())
    write_once.allocate_epoch(JOB, "worker-1", TIME, attempts=1)
    write_once.put_command(JOB, "pause", "api-1", TIME)
    write_once.put_manifest(Manifest(job=JOB, epoch=3, objects=[entry]))
    write_once.put_outcome(
        Outcome(job=JOB, status="failed", epoch=3, time=TIME, by="worker-1", error=error, manifest="m")
    )
    ref = CommitRef(step=40, epoch=2)
    commits.put_commit(store, Commit(job=JOB, epoch=3, step=50, checkpoint="prefix/", objects=[entry]))
    commits.put_base(store, ResumeBase(job=JOB, epoch=3, resumed=ref, objects=[entry], gradient_accumulation=4))
    commits.put_rejected(store, JOB, 3, ref)
    return bucket.objects


def asked() -> dict[str, Any]:
    spec = parse_spec({"name": "n", "metadata": {"a": "b"}})
    return {
        "id": JOB,
        "owner": "owner",
        "created_at": "2026-01-02T03:04:05.678000+00:00",
        "queue": queue_for(spec),
        "spec": spec.as_dict(),
        "spec_sha256": spec.digest(),
    }


def record() -> JobRecord:
    return record_of(asked())


def events(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "events.jsonl"
    writer = EventWriter(path, epoch=3)
    writer.phase("training")
    writer.emit("metric", {"reward": 1.5}, step=4)
    writer.log("Said.")
    writer.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    shown = [{**line, "time": re.sub(r"\d", "0", line["time"])} for line in lines]
    return {
        "types": sorted(EventType),
        "phases": sorted(Phase),
        "lines": shown,
        "metric": sorted(field.name for field in fields(StepMetrics)),
        "completion": sorted(field.name for field in fields(Completion)),
    }


def run_files(tmp_path: Path) -> dict[str, Any]:
    folder = RunFolder(tmp_path)
    places = {name: getattr(folder, name) for name in dir(folder) if not name.startswith("_")}
    found = {name: path.relative_to(tmp_path).as_posix() for name, path in places.items() if isinstance(path, Path)}
    return {"folder": found, "checkpoint": sorted(FILE_NAMES)}


def variables(settings: type[BaseSettings]) -> list[str]:
    prefix = settings.model_config.get("env_prefix", "")
    found: list[str] = []
    for name, field in settings.model_fields.items():
        alias = field.validation_alias
        choices = alias.choices if isinstance(alias, AliasChoices) else [alias or f"{prefix}{name}".upper()]
        found += [str(choice) for choice in choices]
    return sorted(found)


def log_events() -> list[str]:
    """The names that log lines of the service can have: operators search and alarm by them."""
    sources = [path.read_text() for package in ("api", "jobs") for path in (ROOT / package).rglob("*.py")]
    calls = r"\b_?log\.(?:debug|info|warning|error|critical|exception)\(\s*\"([a-z0-9_]+)\""
    return sorted({name for source in sources for name in re.findall(calls, source)})


def missing(recorded: Any, now: Any, place: str = "") -> list[str]:
    """What was recorded and is no longer so."""
    if isinstance(recorded, dict) and isinstance(now, dict):
        gone = [f"{place}/{key}: gone" for key in recorded if key not in now]
        kept = [key for key in recorded if key in now]
        return gone + [line for key in kept for line in missing(recorded[key], now[key], f"{place}/{key}")]
    if isinstance(recorded, list) and isinstance(now, list):
        return [f"{place}: {item!r} gone" for item in recorded if not any(missing(item, one) == [] for one in now)]
    return [] if recorded == now and type(recorded) is type(now) else [f"{place}: was {recorded!r}, is {now!r}"]


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return contract(tmp_path_factory.mktemp("contract"))


@pytest.mark.parametrize("part", sorted(read(FIXTURE)) if FIXTURE.exists() else [])
def test_what_was_recorded_still_holds(part: str, now: dict[str, Any]) -> None:
    assert missing(read(FIXTURE)[part], now[part], part) == []


@pytest.mark.parametrize("part", ["spec_digests", "objects", "keys", "queue", "transitions"])
def test_what_is_read_by_other_versions_is_recorded_whole(part: str, now: dict[str, Any]) -> None:
    assert now[part] == read(FIXTURE)[part], "record it with python -m tests.unit.test_contract_fixtures"


def test_a_recorded_record_is_read_as_it_was() -> None:
    stored = read(FIXTURE)["record"]
    found = _from_fields(stored)
    expected = {**asdict(record()), "updated_at": None}
    assert {name: value for name, value in asdict(found).items() if name in expected} == expected
    assert found.created_at == datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)


def test_recorded_objects_are_read_as_they_were() -> None:
    stored: dict[str, Any] = read(FIXTURE)["objects"]

    class Stored(Bucket):
        def get_json(self, key: str) -> Any:
            return stored.get(key)

    store = cast("ObjectStore", Stored())
    write_once = WriteOnceStore(store)
    outcome = write_once.outcome(JOB)
    assert outcome is not None
    assert (outcome.status, outcome.epoch, outcome.manifest) == ("failed", 3, "m")
    manifest = write_once.manifest(object_keys.manifest(JOB, 3))
    assert manifest is not None
    assert [entry.name for entry in manifest.objects] == ["report.json"]
    commit = commits.read_commit(store, JOB, CommitRef(step=50, epoch=3))
    assert commit is not None
    assert (commit.checkpoint, [entry.size for entry in commit.objects]) == ("prefix/", [7])
    base = commits.read_base(store, JOB, 3)
    assert base is not None
    assert (base.resumed, base.gradient_accumulation) == (CommitRef(step=40, epoch=2), 4)
    asked_for = write_once.job(JOB)
    assert asked_for is not None
    assert record_of(asked_for) == record()


def main() -> None:
    """Record it."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        FIXTURE.write_text(json.dumps(contract(Path(folder)), indent=1, sort_keys=True, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
