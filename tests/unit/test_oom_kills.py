"""Where the kernel's count of processes killed for memory is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.worker.oom_kills import REMEMBERED, OomKills, _counter_file


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "vmstat").write_text("nr_free_pages 1\noom_kill 4\n")
    return tmp_path / "proc"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_cgroup_v2(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/system.slice/worker\n")
    events = write(tmp_path / "cg/system.slice/worker/memory.events", "oom 3\noom_kill 2\n")
    assert _counter_file(proc, tmp_path / "cg") == events


def test_cgroup_v2_in_a_container_that_sees_only_its_own(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/../outside\n")
    events = write(tmp_path / "cg/memory.events", "oom_kill 0\n")
    assert _counter_file(proc, tmp_path / "cg") == events


def test_cgroup_v1(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("5:cpu:/a\n4:memory:/docker/x\n1:name=systemd:/a\n")
    control = write(tmp_path / "cg/memory/docker/x/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n")
    assert _counter_file(proc, tmp_path / "cg") == control


def test_the_hosts_own_count_where_no_group_counts(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/\n")
    assert _counter_file(proc, tmp_path / "cg") == proc / "vmstat"


def test_a_rise_is_seen_and_forgotten(tmp_path: Path) -> None:
    counter = write(tmp_path / "memory.events", "oom_kill 2\n")
    kills = OomKills(counter)
    kills.read()
    assert not kills.rose
    counter.write_text("oom_kill 3\n")
    kills.read()
    assert kills.rose
    for _ in range(REMEMBERED):
        kills.read()
    assert not kills.rose


def test_a_counter_that_cannot_be_read_never_rises(tmp_path: Path) -> None:
    kills = OomKills(tmp_path / "none")
    kills.read()
    assert not kills.rose
