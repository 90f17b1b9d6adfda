"""The soak, short: `make soak` has the long one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.acceptance.soak import Settings, soak


@pytest.mark.timeout(600)
def test_many_jobs_while_everything_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"GRPO_SOAK_SECONDS": "40", "GRPO_SOAK_JOBS": "24", "GRPO_SOAK_REAL_JOBS": "0"}.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    result = soak(Settings.from_environment(), tmp_path)
    print(result)
    assert not result.wrong
    assert sum(result.faults.values()) >= 5, "nothing was done to it"
