"""The engines that run GRPO, behind one protocol and the same records.

Owns the choice of engine and what every engine is given; imports none of them until one is chosen. `trl` is plain
TRL with PEFT. `unsloth` patches the libraries it finds, so it is imported before them and in a process of its own.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from grpo_core.engines import unsloth_start
from grpo_core.errors import JobFailure

if TYPE_CHECKING:
    from grpo_core.checkpoints import CheckpointWriter
    from grpo_core.datasets import Row
    from grpo_core.evaluation import Answer
    from grpo_core.models import ModelFiles, Precision
    from grpo_core.probes import LogProbs, Probe
    from grpo_core.records import EventWriter
    from grpo_core.runfolder import RunFolder
    from grpo_core.saved_run import SavedRun
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
    saved: SavedRun | None = None
    """The checkpoint that the run goes on from."""


class Engine(Protocol):
    """One way to run a job: `load`, then the base's answers, `train`, `save_adapter`, the adapter's answers, `report`,
    and the self-test, which ends with `release`."""

    name: EngineName
    patches_libraries: bool
    """Whether transformers or PEFT are not as published in this process, so that stock PEFT needs another."""

    @property
    def files(self) -> ModelFiles:
        """The base model on the disk; stock transformers must be able to load it from there."""
        ...

    @property
    def precision(self) -> Precision:
        """How the base model is held in memory."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The base model's, with its chat template."""
        ...

    @property
    def model(self) -> Any:
        """The base model with the adapter in training, a `PeftModel`: what is frozen and what is trained is read
        from it."""
        ...

    def load(self, files: ModelFiles, rows: Sequence[Row]) -> None:
        """Load the model into memory, build the prompts and the trainer, and check its settings; with the adapter and
        the state of `RunContext.saved`, where there is one."""
        ...

    def answer(self, questions: Sequence[str], *, adapter: bool, max_new_tokens: int) -> Generator[Answer]:
        """Answer each question greedily, in order, asked as in training; by the model in training, or by its base.

        Answers come in batches that take seconds, so that a caller who closes the generator is not kept waiting.
        Training goes on afterwards as if nobody had asked.
        """
        ...

    def train(self) -> int:
        """Run until the last step or until asked to stop; returns the steps done, those of earlier runs included."""
        ...

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the last finished step, unless it has one or is the one the run went on from."""
        ...

    def save_adapter(self) -> None:
        """Write the result."""
        ...

    def report(self) -> dict[str, Any]:
        """What was really used: model, precision, settings, prompts, device."""
        ...

    def logprobs(self, probes: Sequence[Probe]) -> LogProbs:
        """What the model in training computes, by `probes.token_logprobs`."""
        ...

    def served_logprobs(self, probes: Sequence[Probe], adapter: Path | None) -> LogProbs | None:
        """What the rollout server computes with the saved adapter in that folder, or without any; None where the
        model in training draws the completions itself."""
        ...

    def release(self) -> None:
        """Free the memory of the model, of the trainer and of the rollout server; nothing is asked of them again."""
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


def import_engine(name: EngineName) -> Callable[[RunContext], Engine]:
    """Import an engine; torch is loaded here, and by Unsloth, which must come before what it patches."""
    if name == "unsloth":
        unsloth_start.start()
        return import_module("grpo_core.engines.unsloth").UnslothEngine
    from grpo_core.engines.trl import TrlEngine

    return TrlEngine


def _unsloth_is_ready() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("unsloth", "vllm"))
