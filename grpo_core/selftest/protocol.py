"""What the self-test needs of an engine. Imports no torch, and the engines' own protocol is built on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_core.hardware.models import ModelFiles, Precision
    from grpo_core.selftest.logprob_probes import LogprobProbe, LogProbs


class CheckedEngine(Protocol):
    """A run's model while it is checked: stock PEFT and the rollout server are compared with it."""

    patches_libraries: bool
    """Whether transformers or PEFT are not as published in this process, so that stock PEFT needs another."""
    shares_base: bool
    """Whether several ranks each hold a part of the base, which may be larger than a GPU."""

    @property
    def files(self) -> ModelFiles:
        """The base model on disk. Stock transformers must be able to load it from there."""
        ...

    @property
    def precision(self) -> Precision:
        """How the base model is held in memory."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The base model's tokenizer, with its chat template."""
        ...

    @property
    def model(self) -> Any:
        """The base model with the adapter in training, a `PeftModel`. The self-test reads from it which parameters are
        frozen."""
        ...

    def logprobs(self, probes: Sequence[LogprobProbe]) -> LogProbs:
        """Log-probabilities by the model in training, computed with `logprob_probes.token_logprobs`."""
        ...

    def served_logprobs(self, probes: Sequence[LogprobProbe], adapter: Path | None) -> LogProbs | None:
        """Log-probabilities by the rollout server, with the saved adapter in that folder or without one. None if the
        model in training generates the completions itself."""
        ...

    def release(self) -> None:
        """Free the memory of the model, the trainer and the rollout server. None of them is used again."""
        ...
