"""A test of this machine's confinement: a grader that tries to break out.

Owns the attempts; a worker runs them when it starts and announces the result. Invariant: a machine counts as confining
graders only if every attempt failed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from grpo_core.rewards.graders.confined import (
    ConfinedProcess,
    ConfinementError,
    LoadError,
    is_unconfined,
    why_not_confined,
)
from grpo_core.rewards.graders.models import GraderLimits

Isolation = Literal["landlock+seccomp", "unconfined", "none"]
"""`unconfined`: the operator turned confinement off. `none`: no grader that needs a separate process runs here."""

_SECONDS: Final = 20.0
_TRIES: Final = """
import os, socket

def _read(item): return open("/etc/passwd").read(1)
def _list(item): return os.listdir("/")
def _parent(item): return open(f"/proc/{item['pid']}/environ").read(1)
def _connect(item): return socket.socket()
def _fork(item): return os.fork()
def _signal(item): return os.kill(item["pid"], 0)

def grade(sample, item):
    for bit, attempt in enumerate((_read, _list, _parent, _connect, _fork, _signal)):
        try:
            attempt(item)
        except OSError:
            continue
        return float(bit + 1)
    return 0.0
"""
_NAMES: Final = ("read a file", "list a folder", "read the trainer's environment", "open a socket", "fork", "signal")


@dataclass(frozen=True, slots=True)
class Proof:
    """The result of the test."""

    isolation: Isolation
    reason: str
    """Why graders are not confined; empty if they are."""


def prove(environment: Mapping[str, str], pid: int) -> Proof:
    """Try to break out of a grader's process. `pid` is a process that no grader may reach."""
    if is_unconfined(environment):
        return Proof("unconfined", "the operator turned it off")
    if lacking := why_not_confined():
        return Proof("none", lacking)
    process = ConfinedProcess("proof", _TRIES, limits=GraderLimits(memory_mb=256), environment=environment)
    row = json.dumps({"sample": {}, "item": {"pid": pid}, "seed": 0}).encode() + b"\n"
    try:
        (result,) = process.run([row], row_seconds=_SECONDS, seconds=_SECONDS).results
    except (ConfinementError, LoadError) as error:
        return Proof("none", str(error))
    finally:
        process.close()
    if result == 0.0:
        return Proof("landlock+seccomp", "")
    return Proof("none", f"it could {_NAMES[int(result) - 1]}" if isinstance(result, float) else str(result))
