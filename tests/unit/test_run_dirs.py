"""Run folders: nothing that a run started outlives its folder, also what left the run's group of processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.worker import run_dirs
from tests.clock import patience


def test_a_process_in_a_group_of_its_own_ends_with_the_run(tmp_path: Path) -> None:
    with run_dirs.run_folder(tmp_path, "job-a", 1) as folder:
        left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=folder, process_group=0)
    try:
        assert left.wait(patience(5)) == -9
    finally:
        left.kill()
    assert not folder.exists()


def test_a_folder_that_its_worker_removes_just_now_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job-a-e1").mkdir()
    real = run_dirs._lock

    def late(folder: Path, *, wait: bool = False) -> object:
        if folder != tmp_path:
            folder.rmdir()
        return real(folder, wait=wait)

    monkeypatch.setattr(run_dirs, "_lock", late)
    assert run_dirs.remove_abandoned(tmp_path) == []


def dig(folder: Path, levels: int) -> None:
    """As a hostile process would, from inside: the whole path is longer than Linux takes."""
    code = f"import os\nfor _ in range({levels}):\n os.mkdir('deep'); os.chdir('deep')\nopen('file', 'w').close()"
    subprocess.run([sys.executable, "-S", "-c", code], cwd=folder, check=True)


def test_a_folder_is_taken_back_and_removed_however_deep_it_is(tmp_path: Path) -> None:
    with run_dirs.run_folder(tmp_path, "job-a", 1) as folder:
        dig(folder, 1500)
        (folder / "shut").mkdir(mode=0)
        run_dirs.take_back(folder)
        assert 10 < len(list(folder.rglob("deep"))) < 100
        dig(folder / "shut", 1500)
    assert list(tmp_path.iterdir()) == []


def test_an_abandoned_folder_is_removed_however_deep_it_is(tmp_path: Path) -> None:
    abandoned = tmp_path / "job-a-e1"
    abandoned.mkdir()
    dig(abandoned, 1500)
    assert run_dirs.remove_abandoned(tmp_path) == [abandoned]
    assert list(tmp_path.iterdir()) == []


def test_a_process_below_the_folder_ends_with_the_run_and_one_beside_it_does_not(tmp_path: Path) -> None:
    sleep = [sys.executable, "-S", "-c", "print(flush=True); input()"]
    (tmp_path / "job-a-e10").mkdir()
    with run_dirs.run_folder(tmp_path, "job-a", 1) as folder:
        (folder / "below").mkdir()
        below, beside = (
            subprocess.Popen(sleep, cwd=place, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for place in (folder / "below", tmp_path / "job-a-e10")
        )
        for process in (below, beside):
            assert process.stdout is not None
            process.stdout.readline()
    try:
        assert below.wait(5) == -9
        assert beside.poll() is None
    finally:
        for process in (below, beside):
            process.kill()
            process.communicate()
