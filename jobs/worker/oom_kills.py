"""Detects OOM kills by the counters of this process's cgroup, or of the host.

Owns where the counters are with cgroup v2, v1 and without a limit; the training process is in the worker's cgroup. The
kernel does not report which process was killed, so a rise counts only if a child was killed at that time.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

REMEMBERED = 25
"""Number of readings kept: the kernel counts shortly before the worker sees the death."""


class OomKills:
    """The counter, read repeatedly while a child is running."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or _counter_file()
        self._readings: deque[int] = deque(maxlen=REMEMBERED)
        self.read()

    def read(self) -> None:
        """Read the counter, which is one small file."""
        self._readings.append(_count(self._path))

    @property
    def rose(self) -> bool:
        """Whether the counter rose between the oldest and the newest reading."""
        return self._readings[-1] > self._readings[0]


def _counter_file(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Path:
    """Return the nearest file with a counter; at the root of a hierarchy, that of the host."""
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
    """Return the number after `oom_kill`; 0 if the file cannot be read."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(value) for name, _, value in (line.partition(" ") for line in lines) if name == "oom_kill"), 0)
