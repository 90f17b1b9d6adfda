"""The first records of a hub data set, read for the API as a training process would read them.

Owns the process that looks (`grpo_core.datasets.look`), its time and its environment: the hub's token only where the
operator lets the owner use it. Invariant: this process never connects to the hub.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from grpo_core.spec import JobSpec, Problem
from jobs.errors import Rejected
from jobs.read.hub_access import hub_environment

SECONDS: Final = 20.0
MAX_LOOKS: Final = 2
"""At the same time in one API process."""
_ROOT: Final = Path(__file__).resolve().parents[2]
_KEPT: Final = ("PATH", "LANG", "HF_ENDPOINT", "HF_HUB_OFFLINE", "GRPO_EGRESS_HOSTS", "GRPO_EGRESS_CLOSED")
_PROXIES: Final = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE")
_REMEDY: Final = "A worker may still read it when the job trains. To see its rows here, upload the file."

_looks = threading.BoundedSemaphore(MAX_LOOKS)


def hub_records(spec: JobSpec, owner: str, *, seconds: float = SECONDS) -> list[Mapping[str, Any]]:
    """The first records of the spec's hub data set. Raises `Rejected`, which says why they cannot be shown here."""
    if not _looks.acquire(timeout=seconds):
        raise _refused("hub_busy", "cannot be read now: other data sets of the hub are being read here", "Try again.")
    try:
        answer = _look(spec, owner, seconds)
    finally:
        _looks.release()
    if "records" in answer:
        return answer["records"]
    problem = answer["problem"]
    if problem is None:
        raise _refused("hub_unreachable", "cannot be read here: this service's API has no client of the hub", _REMEDY)
    detail = f"cannot be shown here: {problem['detail']}"
    raise Rejected(
        Problem(
            pointer=problem["pointer"], code=problem["code"], detail=detail, remedy=f"{problem['remedy']} {_REMEDY}"
        )
    )


def _look(spec: JobSpec, owner: str, seconds: float) -> dict[str, Any]:
    kept = {name: os.environ[name] for name in (*_KEPT, *_PROXIES) if name in os.environ}
    order = json.dumps({"data": spec.as_dict()["data"]}).encode()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "grpo_core.datasets.look"],
            input=order,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=_ROOT,
            env={**kept, **hub_environment(os.environ, spec, owner), "OMP_NUM_THREADS": "1", "HOME": "/nonexistent"},
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        reason = f"cannot be shown here: the hub sent no rows within {seconds:g} s"
        raise _refused("hub_unreachable", reason, _REMEDY) from None
    if done.returncode != 0:
        raise _refused("unreadable", "cannot be shown here: it needs too much memory, or is damaged", _REMEDY)
    return json.loads(done.stdout)


def _refused(code: str, detail: str, remedy: str) -> Rejected:
    return Rejected(Problem(pointer="/data/dataset", code=code, detail=detail, remedy=remedy))
