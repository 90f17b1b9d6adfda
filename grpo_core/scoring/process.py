"""Runs a scoring request in a separate process and ends it in time.

Owns that process's environment, time and the proof that this machine confines the code of graders. Invariant: nothing
of this process's environment reaches the other one but the operator's choice of an interpreter for graders.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from grpo_core.errors import GrpoError
from grpo_core.rewards.graders.packages import PYTHON
from grpo_core.rewards.graders.proof import Proof, prove
from grpo_core.scoring.requests import ScoredRow
from grpo_core.spec import JobSpec

SECONDS: Final = 30.0
"""For starting the process, loading graders and scoring."""
MAX_ANSWER_BYTES: Final = 16 * 1024**2
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
        "not_confined": "" if proof.isolation == "landlock+seccomp" else proof.reason,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo_core.scoring"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=_ROOT,
        env=_environment(),
    )
    try:
        answer, _ = process.communicate(json.dumps(order).encode(), timeout=seconds)
    except subprocess.TimeoutExpired:
        raise ScoringFailed(f"Loading the graders and scoring the rows took more than {seconds:g} s.") from None
    finally:
        # Its graders end with it. It may write without end, so nothing more is read.
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
    if process.returncode != 0 or len(answer) > MAX_ANSWER_BYTES:
        raise ScoringFailed("The process that runs the graders ended before it had scored the rows.")
    return json.loads(answer)


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
