"""The separate process that runs a job's code: starts it, sends it rows, limits its time and ends it.

Owns the trainer's side of `child`: pipes, time limits and captured output. Invariant: `run` returns in time, no matter
what the process does, and the process ends when this one ends.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from grpo_core.confinement import landlock, seccomp
from grpo_core.rewards.graders.models import GraderLimits
from grpo_core.rewards.graders.packages import OFFERED, packages_for

UNCONFINED: Final = "GRPO_GRADERS_UNCONFINED"
"""Set to `1` by an operator, this variable lets `python` graders run with the rights of the training process."""
START_SECONDS: Final = 60.0
"""Time limit for the start of the process and for loading the grader, which may import large packages."""
MAX_PRINTS: Final = 16 * 1024
_GRACE: Final = 5.0
"""Seconds by which the process may exceed its time limit before it is killed."""
_MAX_ANSWER: Final = 64 * 1024 * 1024
_READ: Final = 1 << 16
_CHILD: Final = Path(__file__).with_name("child.py")


class ConfinementError(Exception):
    """The process cannot be started or confined; the message says what is missing."""


class LoadError(Exception):
    """The grader's source cannot be loaded; the message is that of its exception."""


@dataclass(frozen=True, slots=True)
class RowFailure:
    """Why a row has no score."""

    type: str
    """Name of the exception, or `Timeout`, `Late`, `Crash` or `Start`."""
    message: str
    at: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results of a batch."""

    results: list[float | RowFailure]
    printed: str
    """Start of what the grader printed while it graded the batch."""


def is_unconfined(environment: Mapping[str, str]) -> bool:
    """Whether the operator has turned confinement off."""
    return environment.get(UNCONFINED, "") == "1"


def why_not_confined() -> str:
    """Return what this machine lacks for confinement; empty if it lacks nothing."""
    if not seccomp.is_known():
        return f"system calls cannot be filtered on {os.uname().machine}"
    if landlock.version() < landlock.OLDEST:
        return "Landlock is off, too old or forbidden by the container"
    return ""


class ConfinedProcess:
    """One grader's process. The first `run` starts it."""

    def __init__(
        self,
        name: str,
        source: str,
        *,
        limits: GraderLimits,
        environment: Mapping[str, str],
        confined: bool = True,
        packages: tuple[str, ...] = OFFERED,
        ours: bool = False,
    ) -> None:
        """With `ours`, the source is part of the product and is loaded once, also if the process is replaced."""
        self._head = json.dumps({"name": name, "source": source}).encode() + b"\n"
        found = packages_for(environment, packages)
        self._argv = found.argv
        self._plan = {
            "memory_mb": limits.memory_mb,
            "fresh": limits.fresh_process,
            "confined": confined,
            "ours": ours,
            "packages": list(found.folders),
            "names": None if found.names is None else list(found.names),
            "readable": list(found.readable),
            "listable": list(found.listable),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._write = self._read = self._prints = -1
        self._held = b""
        self._printed = bytearray()
        self.start_seconds = START_SECONDS
        self.starts = 0
        self.isolation: Mapping[str, Any] = {}

    def start(self) -> None:
        """Start the process and load the grader. Raises `ConfinementError` or `LoadError`."""
        rows_in, self._write = os.pipe()
        self._read, answers_out = os.pipe()
        self._prints, prints_in = os.pipe()
        self._held = b""
        pipes = {"rows_in": rows_in, "answers_out": answers_out}
        plan = {**self._plan, **pipes, "start_seconds": self.start_seconds, "parent": os.getpid()}
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                [*self._argv, str(_CHILD), json.dumps(plan)],
                stdin=subprocess.DEVNULL,
                stdout=prints_in,
                stderr=prints_in,
                pass_fds=(rows_in, answers_out),
                start_new_session=True,
                cwd="/",
                env=_ENVIRONMENT,
            )
        except OSError as error:
            self._close_pipes()
            raise ConfinementError(f"{self._argv[0]} cannot be started: {error.strerror}") from error
        finally:
            for descriptor in (rows_in, answers_out, prints_in):
                os.close(descriptor)
        for descriptor in (self._write, self._read, self._prints):
            os.set_blocking(descriptor, False)
        self.starts += 1
        said = self._exchange(memoryview(self._head), time.monotonic() + self.start_seconds + START_SECONDS)
        if said is not None and "ready" in said:
            self.isolation = said["ready"]
            return
        wrong = (said or {}).get("failed") or {"type": "Confinement", "message": self._last_words() or "no answer"}
        self.close()
        message = f"{wrong['type']}: {wrong['message']}"
        raise ConfinementError(message) if wrong["type"] == "Confinement" else LoadError(message)

    def run(self, rows: Sequence[bytes], *, row_seconds: float, seconds: float, fair: bool = False) -> Outcome:
        """Return a result for each row, which is a line of JSON.

        `row_seconds` limits the time of one row, and `seconds` that of the batch; with `fair`, a row gets only a part
        of the seconds that are left. Raises what `start` raises.
        """
        if self._process is None:
            self.start()
        self._printed.clear()
        asked = {"rows": len(rows), "row_seconds": row_seconds, "seconds": seconds, "fair": fair}
        data = memoryview(json.dumps(asked).encode() + b"\n" + b"".join(rows))
        said = self._exchange(data, time.monotonic() + seconds + row_seconds + _GRACE)
        results = _results(said, len(rows))
        printed = self._printed.decode(errors="replace")
        if results is None:
            self.close()
            lost = RowFailure("Crash", "the grader's process ended or broke the protocol")
            return Outcome([lost] * len(rows), printed)
        return Outcome(results, printed)

    def close(self) -> None:
        """Kill the process and everything that it started."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        self._close_pipes()

    def _close_pipes(self) -> None:
        for descriptor in (self._write, self._read, self._prints):
            os.close(descriptor)

    def _exchange(self, unsent: memoryview, end: float) -> dict[str, Any] | None:
        """Send all bytes and read one line; None if the process ended, was too slow or wrote too much."""
        while b"\n" not in self._held:
            left = end - time.monotonic()
            if left <= 0 or len(self._held) > _MAX_ANSWER:
                return None
            readable, writable, _ = select.select([self._read, self._prints], [self._write] if unsent else [], [], left)
            if writable:
                try:
                    unsent = unsent[os.write(self._write, unsent[:_READ]) :]
                except BrokenPipeError:
                    unsent = memoryview(b"")
                except BlockingIOError:
                    pass
            if self._prints in readable:
                self._take_prints()
            if self._read in readable:
                data = os.read(self._read, _READ)
                if not data:
                    return None
                self._held += data
        line, _, self._held = self._held.partition(b"\n")
        with suppress(BlockingIOError):
            self._take_prints()
        try:
            said: Any = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return said if isinstance(said, dict) else None

    def _take_prints(self) -> None:
        data = os.read(self._prints, _READ)
        self._printed += data[: MAX_PRINTS - len(self._printed)]
        if not data:
            time.sleep(0.001)  # every writer has ended, which closes the pipe of answers too

    def _last_words(self) -> str:
        return self._printed.decode(errors="replace").strip()[-300:]


_ENVIRONMENT: Final = {
    "PATH": "/nonexistent",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
"""The whole environment of the process: it inherits no variable from the trainer."""


def _results(said: dict[str, Any] | None, rows: int) -> list[float | RowFailure] | None:
    """Check and return a batch's results; None if they are malformed."""
    results = None if said is None else said.get("results")
    if not isinstance(results, list) or len(results) != rows:
        return None
    found: list[float | RowFailure] = []
    for result in results:
        if isinstance(result, dict):
            found.append(RowFailure(str(result.get("type")), str(result.get("message")), tuple(result.get("at", ()))))
        elif isinstance(result, float) and math.isfinite(result):
            found.append(result)
        else:
            return None
    return found
