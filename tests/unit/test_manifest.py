"""Which checkpoints a run goes on from, and what it says of those it does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_core.checkpoints.manifest import CHECKPOINT_VERSION, FILE_NAMES, MANIFEST_NAME, open_saved_run, write_manifest
from grpo_core.errors import JobFailure
from grpo_core.spec import parse_spec

SPEC = parse_spec({"training": {"steps": 100}})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A whole one, of step 50."""
    folder = tmp_path / "step-000050"
    folder.mkdir()
    for name in FILE_NAMES:
        (folder / name).write_text(f"{name} of step 50", "utf-8")
    (folder / "progress.json").write_text('{"v":1,"recorder":{"completions":[]}}', "utf-8")
    write_manifest(folder, step=50, epoch=3, spec_digest=SPEC.digest())
    return folder


def seal_again(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    write_manifest(folder, step=50, epoch=3, spec_digest=SPEC.digest())


def change_manifest(folder: Path, **fields: Any) -> None:
    manifest = json.loads((folder / MANIFEST_NAME).read_text("utf-8")) | fields
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest), "utf-8")


def test_a_whole_checkpoint_says_where_it_was(checkpoint: Path) -> None:
    saved = open_saved_run(checkpoint, SPEC)
    assert (saved.step, saved.epoch, saved.progress["recorder"]) == (50, 3, {"completions": []})
    assert saved.metrics.read_text("utf-8") == "metrics.jsonl of step 50"


def test_a_completion_may_hold_what_no_request_may(checkpoint: Path) -> None:
    """A base of bytes draws NUL like any other token."""
    said = {"recorder": {"completions": [{"completion": "a\0b"}]}}
    (checkpoint / "progress.json").write_text(json.dumps(said), "utf-8")
    seal_again(checkpoint)
    assert open_saved_run(checkpoint, SPEC).progress == said


def test_what_a_library_adds_later_is_verified_too(checkpoint: Path) -> None:
    (checkpoint / "more.json").write_text("{}", "utf-8")
    seal_again(checkpoint)
    assert open_saved_run(checkpoint, SPEC).step == 50
    (checkpoint / "more.json").write_text("[]", "utf-8")
    with pytest.raises(JobFailure):
        open_saved_run(checkpoint, SPEC)


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "state.safetensors").read_bytes())
    content[0] ^= 1
    (folder / "state.safetensors").write_bytes(content)


def drop_from_manifest(folder: Path) -> None:
    files = json.loads((folder / MANIFEST_NAME).read_text("utf-8"))["files"]
    change_manifest(folder, files=[entry for entry in files if entry["path"] != "state.json"])


def point_outside(folder: Path) -> None:
    (folder.parent / "secret").write_text("x", "utf-8")
    files = json.loads((folder / MANIFEST_NAME).read_text("utf-8"))["files"]
    change_manifest(folder, files=[*files, {"path": "../secret", "size": 1, "sha256": "0" * 64}])


def write_no_object_as_progress(folder: Path) -> None:
    (folder / "progress.json").write_text("[]", "utf-8")
    (folder / MANIFEST_NAME).unlink()
    write_manifest(folder, step=50, epoch=3, spec_digest=SPEC.digest())


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (shutil.rmtree, "no manifest"),
        (lambda folder: (folder / MANIFEST_NAME).unlink(), "no manifest"),
        (lambda folder: (folder / MANIFEST_NAME).write_text('{"v":1,"step', "utf-8"), "no manifest"),
        (lambda folder: (folder / MANIFEST_NAME).write_text("[]", "utf-8"), "no manifest"),
        (lambda folder: change_manifest(folder, v="1"), "no version"),
        (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
        (lambda folder: (folder / "metrics.jsonl").write_text("", "utf-8"), "metrics.jsonl is not what"),
        (flip_a_bit, "state.safetensors is not what"),
        (drop_from_manifest, "does not name state.json"),
        (point_outside, "'../secret'"),
        (lambda folder: change_manifest(folder, files=[{"size": 1}]), "names the file None"),
        (lambda folder: change_manifest(folder, files=7), "does not name"),
        (lambda folder: change_manifest(folder, step=0), "step 0"),
        (lambda folder: change_manifest(folder, step=101), "step 101"),
        (write_no_object_as_progress, "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_infra(checkpoint: Path, damage: Callable[[Path], None], told: str) -> None:
    damage(checkpoint)
    with pytest.raises(JobFailure) as caught:
        open_saved_run(checkpoint, SPEC)
    report = caught.value.report
    assert (report.failure_class, report.code) == ("infra", "checkpoint_unreadable")
    assert told in report.message
    assert report.hint


def test_a_newer_version_is_left_to_the_release_that_knows_it(checkpoint: Path) -> None:
    change_manifest(checkpoint, v=CHECKPOINT_VERSION + 1)
    with pytest.raises(JobFailure) as caught:
        open_saved_run(checkpoint, SPEC)
    report = caught.value.report
    assert (report.failure_class, report.code) == ("user_config", "checkpoint_unreadable")
    assert f"version {CHECKPOINT_VERSION + 1}" in report.message


def test_another_spec_is_another_job(checkpoint: Path) -> None:
    with pytest.raises(JobFailure) as caught:
        open_saved_run(checkpoint, parse_spec({"training": {"steps": 101}}))
    report = caught.value.report
    assert (report.failure_class, report.code) == ("user_config", "checkpoint_unreadable")
    assert "from_checkpoint" in report.hint
