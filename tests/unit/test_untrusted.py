"""Files that a hostile process lays out for its reader."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.worker import rollout_compaction, run_dirs, untrusted_files
from jobs.worker.event_forwarder import CHUNK_BYTES, EventTail


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    place = tmp_path / "private"
    place.mkdir()
    (place / "secret").write_text("s3cr3t")
    return place / "secret"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def test_a_plain_file_goes_on_meaning_itself(root: Path, secret: Path) -> None:
    (root / "a").mkdir()
    (root / "a" / "file").write_text("plain")
    with untrusted_files.file(root, root / "a" / "file") as path:
        (root / "a" / "file").unlink()
        (root / "a" / "file").symlink_to(secret)
        assert path.read_text() == "plain"


def test_what_leads_elsewhere_or_holds_up_its_reader_is_refused(root: Path, secret: Path) -> None:
    (root / "link").symlink_to(secret)
    (root / "folder").symlink_to(secret.parent)
    (root / "own").symlink_to("/proc/self/environ")
    os.mkfifo(root / "pipe")
    (root / "real").mkdir()
    for name in ("link", "folder/secret", "own", "pipe", "real"):
        with pytest.raises(untrusted_files.Refused), untrusted_files.file(root, root / name):
            pass
    with pytest.raises(FileNotFoundError), untrusted_files.file(root, root / "none"):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_second_name_of_a_file_of_the_worker_is_refused(root: Path, secret: Path) -> None:
    (root / "hard").hardlink_to(secret)
    os.chown(root, 60600, 60600)
    with pytest.raises(untrusted_files.Refused), untrusted_files.file(root, root / "hard"):
        pass
    untrusted_files.clean(root)
    assert list(root.iterdir()) == []
    assert secret.read_text() == "s3cr3t"


def test_a_folder_taken_back_holds_plain_files_only(root: Path, secret: Path) -> None:
    (root / "link").symlink_to(secret)
    (root / "folder").symlink_to(secret.parent)
    os.mkfifo(root / "pipe")
    (root / "kept").mkdir()
    (root / "kept" / "file").write_text("plain")
    (root / "kept" / "file").chmod(0)
    (root / "kept").chmod(0o500)
    run_dirs.take_back(root)
    assert sorted(path.relative_to(root).as_posix() for path in root.rglob("*")) == ["kept", "kept/file"]
    assert (root / "kept" / "file").read_text() == "plain"
    assert secret.read_text() == "s3cr3t"


def test_a_part_is_written_and_files_are_removed_where_they_are(root: Path, secret: Path) -> None:
    real = root / "real"
    real.mkdir()
    (root / "rollouts").symlink_to(secret.parent)
    with pytest.raises(OSError, match=r"Not a directory|symbolic"):
        rollout_compaction.remove(root / "rollouts", [root / "rollouts" / "secret"])
    (real / ".part.parquet.part").symlink_to(secret)
    with untrusted_files.new_file(root, real / "part.parquet") as path:
        path.write_text("new")
    assert (real / "part.parquet").read_text() == "new"
    assert not (real / "part.parquet").is_symlink()
    assert secret.read_text() == "s3cr3t"


def test_events_that_lead_elsewhere_or_have_no_end_are_passed_over(root: Path, secret: Path) -> None:
    events = root / "events.jsonl"
    events.symlink_to(secret)
    tail = EventTail(events)
    tail.read()
    events.unlink()
    good = '{"type": "log", "data": {}, "step": 1, "time": "2026-01-01T00:00:00Z"}\n'
    with events.open("w") as file:
        file.write(good + "[1]\n" + "[" * 100_000 + "\n")
        file.write("x" * (CHUNK_BYTES + 10) + "\n" + good)
    tail.read()
    told = tail.batch()[1]
    assert [event.step for event in told if event.type == "log"] == [1, 1]
    assert [event.data["code"] for event in told if event.type == "warning"] == ["event_invalid", "event_too_long"]


def test_rights_are_restored_of_no_file_that_a_link_leads_to(
    root: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "file").write_text("plain")
    (root / "file").chmod(0)
    secret.chmod(0o640)
    real = os.stat

    def late(path: Any, **how: Any) -> os.stat_result:
        state = real(path, **how)
        if path == "file":
            (root / "file").unlink()
            (root / "file").symlink_to(secret)
        return state

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", late)
        untrusted_files.clean(root)
    assert secret.stat().st_mode & 0o777 == 0o640


def test_rollouts_that_would_take_much_memory_are_not_decoded(root: Path) -> None:
    def write(name: str, rows: list[dict[str, Any]]) -> None:
        pq.write_table(pa.Table.from_pylist(rows), root / name, compression="zstd")

    write("step-000001.parquet", [{"step": 1, "completion": "fine"}])
    write("step-000002.parquet", [{"step": 2, "completion": "x" * 50_000_000}] * 8)  # one text, eight times
    write("step-000003.parquet", [{"step": 3, "completion": ""}] * (rollout_compaction.MAX_STEP_ROWS + 1))
    write("step-000004.parquet", [{"step": 4, "completion": ["nested"]}])
    (root / "step-000005.parquet").write_bytes(b"PAR1 is not one PAR1")
    merged = rollout_compaction.merge(root)
    assert merged is not None
    part, replaced = merged
    assert [path.name for path in replaced] == ["step-000001.parquet"]
    assert pq.read_table(part).to_pylist() == [{"step": 1, "completion": "fine"}]
