"""Runs a scoring request in a separate process and ends it in time.

Owns that process's environment, time and the proof that this machine confines the code of graders. Invariant: of this
process's environment only the operator's settings for the graders of the request reach the other one.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from grpo_core.errors import GrpoError
from grpo_core.rewards.graders.operator import calls_servers, environment_for
from grpo_core.rewards.graders.packages import PYTHON
from grpo_core.rewards.graders.proof import Proof, prove
from grpo_core.scoring.requests import ScoredRow
from grpo_core.spec import JobSpec

SECONDS: Final = 30.0
"""For starting the process, loading graders and scoring."""
CALLS: Final = b"calls\n"
"""The first line of an order that leaves the process the network, for judges and endpoints."""
MAX_ANSWER_BYTES: Final = 16 * 1024**2
Process = subprocess.Popen[bytes]
_ROOT: Final = Path(__file__).resolve().parents[2]

_proof: Proof | None = None
_proving = threading.Lock()


class ScoringFailed(GrpoError):
    """The graders were ended, or ended by themselves, before they had scored the rows."""


def score_apart(spec: JobSpec, rows: Iterable[ScoredRow], *, seconds: float = SECONDS) -> dict[str, Any]:
    """What `grpo_core.scoring` answers; with no rows, graders are only loaded. Raises `ScoringFailed`."""
    proof = _proved()
    order = {
        "spec": spec.as_dict(),
        "rows": [asdict(row) for row in rows],
        "environment": environment_for(spec.rewards.graders, os.environ),
        "not_confined": "" if proof.isolation == "landlock+seccomp" else proof.reason,
    }
    head = CALLS if calls_servers(spec.rewards.graders) else b"\n"
    process = _PROCESSES.take()
    try:
        answer, _ = process.communicate(head + json.dumps(order).encode(), timeout=seconds)
    except subprocess.TimeoutExpired:
        raise ScoringFailed(f"Loading the graders and scoring the rows took more than {seconds:g} s.") from None
    finally:
        # Its graders end with it. It may write without end, so nothing more is read.
        _end(process)
        _PROCESSES.start_ahead()
    if process.returncode != 0 or len(answer) > MAX_ANSWER_BYTES:
        raise ScoringFailed("The process that runs the graders ended before it had scored the rows.")
    return json.loads(answer)


class _Processes:
    """Starts processes, one of them ahead, so that a request does not wait for its imports.

    Each serves one request. They are ended when the thread that started them ends: all are started by one that stays.
    """

    def __init__(self) -> None:
        self._starter = ThreadPoolExecutor(1, "scoring-starter")
        self._ahead: Future[Process] | None = None
        self._lock = threading.Lock()

    def take(self) -> Process:
        """A process that has served nobody."""
        with self._lock:
            ahead, self._ahead = self._ahead or self._starter.submit(_start), None
        process = ahead.result()
        if process.poll() is None:
            return process
        _end(process)
        return self._starter.submit(_start).result()

    def start_ahead(self) -> None:
        """Start the process for the next request, after this one, whose time it would take."""
        with self._lock:
            self._ahead = self._ahead or self._starter.submit(_start)

    def close(self) -> None:
        """End the process that waits, and start no more."""
        with self._lock:
            self._starter.shutdown()
            if self._ahead is not None:
                _end(self._ahead.result())


def _start() -> Process:
    return subprocess.Popen(
        [sys.executable, "-m", "grpo_core.scoring"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=_ROOT,
        env=_environment(),
    )


def _end(process: Process) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


_PROCESSES = _Processes()
atexit.register(_PROCESSES.close)


def _proved() -> Proof:
    """Whether `python` and `math` graders may run here, found out once."""
    global _proof
    with _proving:
        if _proof is None:
            _proof = prove({}, os.getpid())
        return _proof


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "LANG", PYTHON) if name in os.environ}
    return {**kept, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
