"""Whether the kernel has killed a process for want of memory: the counters of this process's cgroup, or the host's.

Owns where they are on cgroup v2, v1 and without a limit; the training process is in the worker's own cgroup. The kernel
tells nobody who was killed, so a rise is evidence only together with a child that died by KILL at that time.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

REMEMBERED = 25
"""Readings kept: the kernel counts before the death is seen, and both within a moment of each other."""


class OomKills:
    """The counter, read again and again while a child lives."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or _counter_file()
        self._readings: deque[int] = deque(maxlen=REMEMBERED)
        self.read()

    def read(self) -> None:
        """Take a reading; costs one small file."""
        self._readings.append(_count(self._path))

    @property
    def rose(self) -> bool:
        """Whether a process was killed for memory between the oldest reading kept and the newest."""
        return self._readings[-1] > self._readings[0]


def _counter_file(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Path:
    """The nearest file that counts; the root of a hierarchy has none, and there the host's own is right."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        inside = path.lstrip("/")
        if not controllers:
            names = [cgroups / inside / "memory.events", cgroups / "memory.events"]
        elif "memory" in controllers.split(","):
            names = [cgroups / "memory" / inside / "memory.oom_control", cgroups / "memory" / "memory.oom_control"]
        else:
            continue
        for name in names:
            if _has_count(name):
                return name
    return proc / "vmstat"


def _has_count(path: Path) -> bool:
    try:
        return "oom_kill " in path.read_text()
    except OSError:
        return False


def _count(path: Path) -> int:
    """The number after `oom_kill`; 0 where the file cannot be read."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(value) for name, _, value in (line.partition(" ") for line in lines) if name == "oom_kill"), 0)
