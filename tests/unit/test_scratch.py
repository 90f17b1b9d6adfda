"""Run folders: nothing that a run started outlives its folder, also what left the run's group of processes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import scratch


def test_a_process_in_a_group_of_its_own_ends_with_the_run(tmp_path: Path) -> None:
    with scratch.run_folder(tmp_path, "job-a", 1) as folder:
        left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=folder, process_group=0)
        time.sleep(0.2)
    try:
        assert left.wait(5) == -9
    finally:
        left.kill()
    assert not folder.exists()


def test_a_folder_that_its_worker_removes_just_now_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job-a-e1").mkdir()
    real = scratch._lock

    def late(folder: Path, *, wait: bool = False) -> object:
        if folder != tmp_path:
            folder.rmdir()
        return real(folder, wait=wait)

    monkeypatch.setattr(scratch, "_lock", late)
    assert scratch.remove_abandoned(tmp_path) == []
