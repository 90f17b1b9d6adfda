"""What the runner of a kind without training steps is given: a job of serving or export, its run folder and its events.

Owns the type alone; `grpo_core.kinds` makes it and calls the runner, which imports only this. Invariant: whatever a
runner needs to know of its run is here.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo_core.run_dir.layout import RunFolder
from grpo_core.run_dir.records import EventWriter
from grpo_core.signals import StopRequest
from grpo_core.spec import JobSpec


@dataclass(frozen=True, slots=True)
class KindRun:
    """One run of such a job."""

    spec: JobSpec
    folder: RunFolder
    events: EventWriter
    epoch: int
    stop: StopRequest
