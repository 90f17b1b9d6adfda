"""What a training process is left of its worker's host: which folders, and which variables."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from grpo_core.spec import parse_spec
from jobs.worker import isolation, run_dirs
from jobs.worker.isolation import Isolation
from jobs.worker.trainer_process import clean_environment

LAUNCHER = (sys.executable, "-m", "grpo_core", "train")


def readable(environment: dict[str, str]) -> list[str]:
    return Isolation(landlock=True).plan(LAUNCHER, [], environment)["readable"]


def test_of_opt_only_what_is_used_is_readable() -> None:
    assert "/opt" not in readable({})
    assert "/opt/cuda" in readable({"CUDA_HOME": "/opt/cuda"})


def test_a_compiler_can_read_what_is_installed_beside_it(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "gcc"
    program.parent.mkdir()
    program.touch(mode=0o755)
    assert str(tmp_path) in readable({"CC": str(program)})
    assert str(tmp_path) not in readable({"CC": str(tmp_path / "bin" / "none")})


def test_a_work_folder_that_every_run_may_read_is_told(tmp_path: Path) -> None:
    asked = Isolation(landlock=True, caches=tmp_path / "caches", readable=(str(tmp_path / "models"),))
    inside, outside = tmp_path / "models" / "work", tmp_path / "work"
    inside.mkdir(parents=True)
    outside.mkdir()
    _, reasons = isolation.decide(asked, LAUNCHER, inside)
    assert [reason for reason in reasons if f"{inside} is below {tmp_path / 'models'}" in reason]
    _, reasons = isolation.decide(asked, LAUNCHER, outside)
    assert [reason for reason in reasons if "is below" in reason] == []


def test_keys_of_other_services_are_not_handed_over() -> None:
    parent = dict.fromkeys(
        ("NVIDIA_API_KEY", "VLLM_API_KEY", "UNSLOTH_LICENSE_KEY", "XDG_SECRET", "WANDB_API_KEY"), "k"
    )
    parent |= {"NVIDIA_VISIBLE_DEVICES": "0", "VLLM_USE_V1": "1"}
    without = clean_environment(parent, parse_spec({}), "ann")
    assert set(without) & set(parent) == {"NVIDIA_VISIBLE_DEVICES", "VLLM_USE_V1"}
    reports = clean_environment(parent, parse_spec({"training": {"report_to": ["wandb"]}}), "ann")
    assert set(reports) & set(parent) == {"NVIDIA_VISIBLE_DEVICES", "VLLM_USE_V1", "WANDB_API_KEY"}


def test_a_work_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    assert run_dirs.fault_of(mine) == ""
    mine.chmod(0o777)
    assert "everyone" in run_dirs.fault_of(mine)
    mine.chmod(0o1777)
    assert run_dirs.fault_of(mine) == ""
    if os.geteuid() == 0:
        theirs = tmp_path / "theirs"
        theirs.mkdir()
        link = tmp_path / "link"
        link.symlink_to(mine)
        os.chown(theirs, 60600, 60600)
        os.lchown(link, 60600, 60600)
        assert run_dirs.fault_of(theirs) == "belongs to another user"
        assert run_dirs.fault_of(link) == "is a link that another user has made"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_who_has_a_folder_of_a_run_open_adds_nothing_after_it_was_taken_back(tmp_path: Path) -> None:
    with run_dirs.run_folder(tmp_path, "job-a", 1) as folder:
        (folder / "inputs").mkdir()
        run_dirs.hand_over(folder, 60600)
        run_dirs.take_back(folder)
        assert {path.stat().st_uid for path in (folder, folder / "inputs")} == {0}
        assert (folder / "inputs").stat().st_mode & 0o777 == 0o700
