"""Jobs of kind serving and export: what they take over from the job whose adapters they read, and what is refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from grpo_core.adapters import LocalAdapter, name_of, read_index, write_index
from grpo_core.errors import JobFailure
from grpo_core.estimates import estimate, warnings
from grpo_core.spec import JobSpec, SpecError, parse_spec
from grpo_core.spec.sweep import parse_sweep
from jobs.errors import NotFound, Rejected
from jobs.lifecycle.deletion import used_by
from jobs.lifecycle.source_jobs import SourceJobs
from jobs.store import object_keys
from jobs.store.adapters import FILES, AdapterFinder
from jobs.store.bucket import ObjectHead
from jobs.store.job import JobRecord, record_of
from jobs.store.queues import queue_for
from jobs.store.write_once import Manifest, ManifestEntry, WriteOnceStore
from tests.integration.memory_store import MemoryStore

ID = "job-01ARZ3NDEKTSV4RRFFQ69G5FAV"
OTHER = "job-01ARZ3NDEKTSV4RRFFQ69G5FAW"
TRAINED: dict[str, Any] = {
    "model": {"name": "tiny", "max_sequence": 64},
    "lora": {"rank": 4, "alpha": 8},
    "optimizer": {"name": "adamw_torch"},
    "sampling": {"max_prompt_tokens": 40, "max_completion_tokens": 24},
    "data": {"system_prompt": "答案。", "examples": [{"question": "1+1", "answer": "2"}]},
    "resources": {"gpus": 0},
    "training": {"steps": 9},
}


class Bucket(MemoryStore):
    """With the time of each object."""

    def head(self, key: str) -> ObjectHead | None:
        body = self.get(key)
        return None if body is None else ObjectHead(size=len(body), modified=datetime.now(UTC))


def record(spec: dict[str, Any], **fields: Any) -> JobRecord:
    asked = {"id": ID, "owner": "ann", "created_at": "2026-01-01T00:00:00+00:00", "queue": "grpo.cpu"}
    return replace(record_of({**asked, "spec": parse_spec(spec).as_dict(), "spec_sha256": "0"}), **fields)


def checkpointed(*steps: int) -> Bucket:
    """A bucket in which the job has these checkpoints."""
    bucket = Bucket()
    bucket.put_json_once(object_keys.epoch(ID, 1), {"v": 1})
    for step in steps:
        folder = f"{object_keys.run(ID, 1)}checkpoints/step-{step:06d}/"
        bodies = {name: f"{name} {step}".encode() for name in (*FILES, "optimizer.pt")}
        files = [
            {"path": f"../../{name}", "size": len(body), "sha256": hashlib.sha256(body).hexdigest()}
            for name, body in bodies.items()
        ]
        for name, body in bodies.items():
            bucket.put(folder + name, body)
        bucket.put_json(folder + "manifest.json", {"files": files})
    return bucket


def resolve(asked: dict[str, Any], bucket: Bucket, owner: str = "ann", **fields: Any) -> JobSpec:
    trained = record(fields.pop("spec", TRAINED), **fields)
    found = SourceJobs(lambda job, who: trained if (job, who) == (ID, "ann") else None, bucket)
    return found.resolve(parse_spec(asked), owner)


def refused(asked: dict[str, Any], bucket: Bucket, **fields: Any) -> list[tuple[str, str]]:
    with pytest.raises(Rejected) as error:
        resolve(asked, bucket, **fields)
    return [(problem.pointer, problem.remedy) for problem in error.value.problems]


def problems(spec: dict[str, Any]) -> set[str]:
    with pytest.raises(SpecError) as error:
        parse_spec(spec)
    return {problem.pointer for problem in error.value.problems}


def test_a_job_that_serves_takes_over_what_its_source_trained_with() -> None:
    asked = {"kind": "serving", "name": "try me", "serving": {"job": ID, "steps": [5]}}
    spec = resolve(asked, checkpointed(5))
    trained = parse_spec(TRAINED)
    assert (spec.model, spec.lora, spec.sampling) == (trained.model, trained.lora, trained.sampling)
    assert spec.data.system_prompt == "答案。"
    assert spec.data.examples == trained.data.examples
    assert spec.resources.gpus == 0
    assert (spec.name, spec.serving.steps, spec.requested) == ("try me", (5,), asked)
    assert resolve(spec.as_dict(), checkpointed(5)).as_dict() == spec.as_dict()


def test_it_waits_in_queues_of_workers_that_know_its_kind() -> None:
    spec = resolve({"kind": "export", "export": {"job": ID}}, checkpointed(5))
    assert spec.needed_format() == 2
    assert queue_for(spec) == "grpo.cpu.f2"


def test_the_digest_of_a_job_that_trains_is_what_it_was() -> None:
    assert not {"kind", "serving", "export"} & set(parse_spec(TRAINED).as_dict())


def test_a_foreign_job_is_not_found() -> None:
    for asked, owner in (({"job": OTHER}, "ann"), ({"job": ID}, "bob")):
        with pytest.raises(NotFound):
            resolve({"kind": "serving", "serving": asked}, checkpointed(5), owner)


def test_a_step_that_was_not_kept_is_named_with_those_that_were() -> None:
    bucket = checkpointed(5, 10)
    asked = {"kind": "serving", "serving": {"job": ID, "steps": [5, 7]}}
    assert refused(asked, bucket) == [("/serving/steps/1", "Use one of 5, 10.")]
    asked = {"kind": "export", "export": {"job": ID, "step": 7}}
    assert refused(asked, bucket) == [("/export/step", "Use one of 5, 10.")]


def test_a_job_without_an_adapter_cannot_be_served() -> None:
    asked = {"kind": "serving", "serving": {"job": ID}}
    assert [pointer for pointer, _ in refused(asked, checkpointed())] == ["/serving/job"]
    tried = {**TRAINED, "kind": "try"}
    assert refused(asked, checkpointed(5), spec=tried) == [("/serving/job", "Use a job that trained.")]


def test_settings_of_another_adapter_are_refused() -> None:
    asked = {"kind": "serving", "serving": {"job": ID}, "model": {"name": "another"}}
    assert refused(asked, checkpointed(5)) == [("/model", "Leave it out: it is taken from that job.")]


@pytest.mark.parametrize(
    ("spec", "pointers"),
    [
        ({"serving": {"job": ID}}, {"/serving"}),
        ({"kind": "try", "export": {"job": ID}}, {"/export"}),
        ({"kind": "export"}, {"/export/job"}),
        ({"kind": "serving", "serving": {"steps": [5]}}, {"/serving/job"}),
        ({"kind": "serving", "serving": {"job": ID, "steps": [5, 5]}}, {"/serving/steps"}),
        ({"kind": "serving", "serving": {"job": ID}, "training": {"steps": 3}}, {"/training"}),
        ({"kind": "serving", "serving": {"job": "../../etc"}}, {"/serving/job"}),
        ({"kind": "export", "export": {"job": ID}, "from_checkpoint": {"job": ID, "step": 1}}, {"/from_checkpoint"}),
    ],
)
def test_what_means_nothing_for_a_kind_is_refused(spec: dict[str, Any], pointers: set[str]) -> None:
    assert problems(spec) == pointers


def test_a_sweep_trains() -> None:
    with pytest.raises(SpecError) as error:
        parse_sweep({"spec": {"kind": "serving", "serving": {"job": ID}}, "repeat": 2})
    assert [problem.pointer for problem in error.value.problems] == ["/spec/kind"]


def test_the_main_adapter_is_the_best_then_the_final_then_the_last() -> None:
    bucket = checkpointed(5, 10)
    final = [
        ManifestEntry(path=f"adapter/{name}", key=f"jobs/{ID}/e1/adapter/{name}", sha256="0", size=1) for name in FILES
    ]
    key = WriteOnceStore(bucket).put_manifest(Manifest(job=ID, epoch=1, objects=final))

    def main(best: int | None, manifest: str | None) -> int | None:
        found = AdapterFinder(bucket, ID, best, manifest).main()
        assert found is not None
        return found.step

    assert main(5, key) == 5
    assert main(7, key) is None  # the best was not kept
    assert main(None, key) is None
    assert main(None, None) == 10
    assert AdapterFinder(checkpointed(), ID, None, None).main() is None


def test_only_the_two_files_of_an_adapter_are_read() -> None:
    found = AdapterFinder(checkpointed(5), ID, None, None).at(5)
    assert found is not None
    assert [file.path for file in found.files] == list(FILES)
    assert all(file.key.startswith(f"jobs/{ID}/e1/checkpoints/step-000005/") for file in found.files)


def test_a_source_is_not_deleted_while_it_is_read() -> None:
    spec = resolve({"kind": "serving", "serving": {"job": ID}}, checkpointed(5))
    assert used_by(spec.as_dict()) == {"/serving/job": ID}


def test_a_job_that_draws_nothing_has_no_size_and_no_steps() -> None:
    spec = resolve({"kind": "serving", "serving": {"job": ID}}, checkpointed(5))
    assert (estimate(spec).completions, warnings(spec)) == (0, [])
    asked = cast("dict[str, Any]", {"id": OTHER, "owner": "ann", "created_at": "2026-01-01T00:00:00+00:00"})
    assert record_of({**asked, "queue": "", "spec": spec.as_dict(), "spec_sha256": "0"}).total_steps == 0


def test_the_run_folder_lists_its_adapters(tmp_path: Path) -> None:
    assert read_index(tmp_path / "none") == []
    folder = tmp_path / name_of(5)
    folder.mkdir()
    adapter = LocalAdapter(name="step-5", step=5, folder=folder)
    adapter.weights.write_bytes(b"")
    write_index(tmp_path, [adapter])
    assert read_index(tmp_path) == [adapter]
    for fault in ({"name": "../x"}, {"folder": ".."}, {"folder": "step-6"}):
        entry = {"name": "step-5", "step": 5, "folder": "step-5", **fault}
        (tmp_path / "adapters.json").write_text(json.dumps({"v": 1, "adapters": [entry]}))
        with pytest.raises(JobFailure):
            read_index(tmp_path)
