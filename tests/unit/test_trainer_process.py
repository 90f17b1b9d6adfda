"""A process that outlives SIGKILL, as in a driver that hangs, ends its worker instead of holding the job for ever."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.worker import trainer_process
from jobs.worker.trainer_process import TrainerProcess
from tests.clock import patience


class Left(BaseException):
    """What `os._exit` would do."""


def test_a_killed_process_is_gone(tmp_path: Path) -> None:
    run = TrainerProcess({"argv": [sys.executable, "-c", "import time; time.sleep(60)"]}, tmp_path, {})
    began = time.monotonic()
    run.kill()
    assert run.exit_code == -9
    assert time.monotonic() - began < patience(5)


def test_a_process_that_outlives_its_kill_ends_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(_: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        assert timeout in (trainer_process.GUARDIAN_SECONDS, trainer_process.UNKILLABLE_SECONDS)
        raise subprocess.TimeoutExpired("train", timeout)

    def leave(status: int) -> None:
        raise Left(status)

    run = TrainerProcess({"argv": [sys.executable, "-c", ""]}, tmp_path, {})
    with monkeypatch.context() as patch:
        patch.setattr(subprocess.Popen, "wait", stuck)
        patch.setattr(trainer_process.os, "_exit", leave)
        with pytest.raises(Left) as left:
            run.kill()
    assert left.value.args == (trainer_process.EXIT_UNKILLABLE,)
    run.kill()


def test_what_it_says_goes_into_a_new_file_that_is_open_before_the_folder_is_handed_over(tmp_path: Path) -> None:
    folder, victim = tmp_path / "run", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("s3cr3t")
    plan = {"argv": [sys.executable, "-c", "print('said')"]}

    def hand_over() -> None:  # and the user puts a link where the file was
        (folder / "stderr.log").rename(folder / "moved")
        (folder / "stderr.log").symlink_to(victim)

    run = TrainerProcess(plan, folder, {}, hand_over)
    run.wait(20)
    run.kill()
    assert (folder / "moved").read_text() == "said\n"
    with pytest.raises(FileExistsError):
        TrainerProcess(plan, folder, {})
    assert victim.read_text() == "s3cr3t"
