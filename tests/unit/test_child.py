"""A process that outlives SIGKILL, as in a driver that hangs, ends its worker instead of holding the job for ever."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import child
from jobs.child import Child


class Left(BaseException):
    """What `os._exit` would do."""


def test_a_killed_process_is_gone(tmp_path: Path) -> None:
    run = Child((sys.executable, "-c", "import time; time.sleep(60)"), tmp_path, {})
    began = time.monotonic()
    run.kill()
    assert run.exit_code == -9
    assert time.monotonic() - began < 5


def test_a_process_that_outlives_its_kill_ends_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(_: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        assert timeout == child.UNKILLABLE_SECONDS
        raise subprocess.TimeoutExpired("train", timeout)

    def leave(status: int) -> None:
        raise Left(status)

    run = Child((sys.executable, "-c", ""), tmp_path, {})
    with monkeypatch.context() as patch:
        patch.setattr(subprocess.Popen, "wait", stuck)
        patch.setattr(child.os, "_exit", leave)
        with pytest.raises(Left) as left:
            run.kill()
    assert left.value.args == (child.EXIT_UNKILLABLE,)
    run.kill()
