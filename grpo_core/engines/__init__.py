"""The engines that run GRPO, behind one protocol and the same records.

Owns the choice of engine and what every engine is given; imports none of them until one is chosen. `trl` is plain
TRL with PEFT. `unsloth` patches the libraries it finds, so it is imported before them and in a process of its own.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from grpo_core.errors import JobFailure

if TYPE_CHECKING:
    from grpo_core.checkpoints import CheckpointWriter
    from grpo_core.datasets import Row
    from grpo_core.models import ModelFiles
    from grpo_core.records import EventWriter
    from grpo_core.runfolder import RunFolder
    from grpo_core.spec import JobSpec
    from grpo_core.step_recorder import StepRecorder

EngineName = Literal["trl", "unsloth"]


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What an engine works with; it writes nothing but through these."""

    spec: JobSpec
    folder: RunFolder
    events: EventWriter
    recorder: StepRecorder
    checkpoints: CheckpointWriter
    stop: threading.Event
    """Set when the run is asked to end after its current step."""


class Engine(Protocol):
    """One way to run a job, called in this order."""

    name: EngineName

    def load(self, files: ModelFiles, rows: Sequence[Row]) -> None:
        """Load the model into memory, build the prompts and the trainer, and check its settings."""
        ...

    def train(self) -> int:
        """Run until the last step or until asked to stop; returns the steps done."""
        ...

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the last finished step, unless it has one."""
        ...

    def save_adapter(self) -> None:
        """Write the result."""
        ...

    def report(self) -> dict[str, Any]:
        """What was really used: model, precision, settings, prompts, device."""
        ...


def choose_engine(spec: JobSpec, cuda_count: int) -> EngineName:
    """The engine for a job on a machine with `cuda_count` GPUs; raises a `user_config` failure if it has none."""
    if spec.resources.gpus > cuda_count:
        raise JobFailure(
            "user_config",
            "too_few_gpus",
            f"The job asks for {spec.resources.gpus} GPU(s) and this machine has {cuda_count}.",
            hint="Set resources.gpus to 0 (with optimizer.name adamw_torch) to train on a CPU, or use a GPU worker.",
        )
    if spec.resources.gpus > 1:
        raise JobFailure(
            "user_config",
            "one_gpu_only",
            f"The job asks for {spec.resources.gpus} GPUs; this version trains on one.",
            hint="Set resources.gpus to 1.",
        )
    if spec.engine == "trl" or spec.resources.gpus == 0:
        return "trl"
    if _unsloth_is_ready():
        return "unsloth"
    if spec.engine == "unsloth":
        raise JobFailure(
            "user_config",
            "engine_not_available",
            "This worker cannot run the unsloth engine.",
            hint="Set engine to trl, or install the cuda extra on the worker.",
        )
    return "trl"


def open_engine(name: EngineName, context: RunContext) -> Engine:
    """Import an engine and hand it the run; this is the moment torch is loaded."""
    assert name == "trl", "choose_engine names no engine that is not here"
    from grpo_core.engines.trl import TrlEngine

    return TrlEngine(context)


def _unsloth_is_ready() -> bool:
    return importlib.util.find_spec("grpo_core.engines.unsloth") is not None
