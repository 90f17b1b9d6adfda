"""The protocol between a run and its engine.

Owns the context that an engine gets and the methods that it must implement; the package chooses and imports engines.
Invariant: importing this module imports no engine and no torch.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from grpo_core.ranks import ALONE, Rank
from grpo_core.selftest.protocol import CheckedEngine

if TYPE_CHECKING:
    from grpo_core.checkpoints.manifest import SavedRun
    from grpo_core.checkpoints.writer import CheckpointWriter
    from grpo_core.datasets import Question, Row
    from grpo_core.evaluation.generate import Answer
    from grpo_core.evaluation.held_out import HeldOutEvaluation
    from grpo_core.grading import Grading
    from grpo_core.hardware.models import ModelFiles
    from grpo_core.monitoring.step_recorder import StepRecorder
    from grpo_core.run_dir.layout import RunFolder
    from grpo_core.run_dir.records import EventWriter
    from grpo_core.spec import JobSpec


EngineName = Literal["trl", "unsloth", "native"]


@dataclass(frozen=True, kw_only=True)
class EngineContext:
    """The inputs and outputs of an engine, which writes only through them."""

    spec: JobSpec
    folder: RunFolder
    events: EventWriter
    recorder: StepRecorder
    checkpoints: CheckpointWriter
    grading: Grading
    stop: threading.Event
    """Set if the run must end after its current step."""
    saved: SavedRun | None = None
    """The checkpoint from which the run resumes."""
    rank: Rank = ALONE
    """The rank of this process among those that train together."""


class Engine(CheckedEngine, Protocol):
    """An engine. The order of calls: `load`, the base model's answers, `train`, `save_adapter`, the adapter's answers,
    `report`, and the self-test, which ends with `release`."""

    name: EngineName
    ended_early: bool
    """Whether an evaluation has ended training before its last step."""

    def load(self, files: ModelFiles, rows: Sequence[Row]) -> None:
        """Load the model, build the prompts and the trainer, and check its settings. If the context has a saved run,
        also load its adapter and state."""
        ...

    def answer(self, questions: Sequence[Question], *, adapter: bool, max_new_tokens: int) -> Generator[Answer]:
        """Answer each question greedily, in order, with the prompts of training; with the adapter, or the base model.

        Answers are generated in batches that take seconds, so that closing the generator takes effect soon. The answers
        do not change the training that follows.
        """
        ...

    def train(self, held_out: HeldOutEvaluation | None = None) -> int:
        """Train until the last step, or until `stop` is set or an evaluation ends training. Returns the number of
        steps, including earlier runs.

        After each step `held_out` says whether an evaluation is due. The best step so far gets a checkpoint.
        """
        ...

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the last finished step, unless one exists or the run resumed from that step."""
        ...

    def save_adapter(self) -> None:
        """Write the final adapter."""
        ...

    def base_checksums(self) -> dict[str, int]:
        """Return `selftest.base_checksums` of the base model, whole wherever its parts are. All ranks must call it."""
        ...

    def part(self) -> None:
        """Part from the other ranks after training. Rank 0 lets them go, and may not need them again; the others wait
        for that and do what it needs until then."""
        ...

    def report(self) -> dict[str, Any]:
        """Return what was used: model, precision, settings, prompts, device."""
        ...
